"""Max-norm and its kin in Triton. The formulas stand in fastreg/max_norm.py, the decisions in csrc/max_norm.h.

Bytes     each element is read once, if its row has at most 4,096 elements; longer rows are read once more if they
          are over the cap, and once more to be written. Rows under the cap are not written.
Launches  1 for all tensors of the plan, whatever their sizes and dtypes.
Tiles     [rows, elements] in registers, of four widths; a program takes the width that its tensor's rows need.
Numerics  norms in fp64. Values are scaled by a power of two (by the largest one for other p) where sums of fp64
          or high powers could overflow. Cap after rounding as in the reference.
"""

# Conditions known when a kernel is compiled stand apart from those known when it runs.
# ruff: noqa: SIM102, SIM109, SIM300

import math

import torch
import triton
import triton.language as tl

COLUMNS = tl.constexpr(16)
ONE, TWO, LARGEST, ANY = (tl.constexpr(i) for i in range(4))  # how a norm is summed
CAP, NORMALIZE, L1_BALL, LINF_BALL = (tl.constexpr(i) for i in range(4))  # _ops.ROW_KINDS
ULP = tl.constexpr(2.0**-53)
INF = tl.constexpr(math.inf)
# (elements, rows) of the tiles, and the widest row that is held in registers.
WIDTHS = (128, 512, 2048, 4096)
LOOP = tl.constexpr(2048)


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)  # a small number arrives as int32


@triton.jit
def _power(t, p, ORDER: tl.constexpr):
    """|t|^p of t ≥ 0."""
    if ORDER == TWO:
        return t * t
    elif ORDER == ANY:
        return tl.where(t > 0, tl.exp2(p * tl.log2(tl.where(t > 0, t, 1.0))), 0.0)
    else:
        return t


@triton.jit
def _root(total, p, ORDER: tl.constexpr):
    if ORDER == TWO:
        return tl.sqrt(total)
    elif ORDER == ANY:
        return tl.where(total > 0, tl.exp2(tl.log2(tl.where(total > 0, total, 1.0)) / p), 0.0)
    else:
        return total


@triton.jit
def _collect(t, p, ORDER: tl.constexpr):
    """Along the rows of a tile, the sum of |t|^p, or the largest."""
    if ORDER == LARGEST:
        return tl.max(t, 1)
    else:
        return tl.sum(_power(t, p, ORDER), 1)


@triton.jit
def _scale_of(largest, ORDER: tl.constexpr):
    """What a row is divided by before its powers are summed."""
    usable = (largest > 0) & (largest < INF)
    if ORDER == ANY:
        return tl.where(usable, largest, 1.0)
    else:  # a power of two: the exponent alone, of which 0 and 2047 are none
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF
        exponent = tl.minimum(tl.maximum(exponent, 2), 2045) << 52
        return tl.where(usable, exponent.to(tl.float64, bitcast=True), 1.0)


@triton.jit
def _margins(length, p, ORDER: tl.constexpr):
    """slack, below and aim of csrc/max_norm.h."""
    unit = tl.zeros([], tl.float64) + ULP
    if ORDER == LARGEST:
        return unit * 0, unit * 0, 8 * unit
    if ORDER == ONE:
        unit = 2 * unit
    if ORDER == ANY:  # powers are not exact
        unit = unit * tl.maximum(2 / p, 1.0)
        below = (2 + length // 2).to(tl.float64) * unit
        slack = below + 4 * unit
    else:
        orders = (length // 2).to(tl.float64) * unit
        below = tl.where(length >= 64, orders, 0.0)
        slack = orders + 4 * unit
    return slack, below, 2 * below + 8 * unit


@triton.jit
def _rounded(exact, TYPE: tl.constexpr):
    """To the nearest, through fp32 for the half types, as PyTorch does."""
    if TYPE == tl.float64:
        return exact
    else:
        return exact.to(tl.float32).to(TYPE)


@triton.jit
def _toward_zero(exact, TYPE: tl.constexpr):
    near = _rounded(exact, TYPE)
    up = tl.abs(near.to(tl.float64)) > tl.abs(exact)
    if TYPE == tl.float64:
        return near
    elif TYPE == tl.float32:
        return tl.where(up, (near.to(tl.int32, bitcast=True) - 1).to(TYPE, bitcast=True), near)
    else:
        return tl.where(up, (near.to(tl.int16, bitcast=True) - 1).to(TYPE, bitcast=True), near)


@triton.jit
def _norm_of(size, p, ORDER: tl.constexpr, SCALED: tl.constexpr):
    """(scale, s, finite) of the rows of a tile of |x|."""
    if SCALED:
        largest = tl.max(tl.where(size < INF, size, INF), 1)  # a NaN counts as inf
        scale = _scale_of(largest, ORDER)
        s = _root(_collect(size * (1 / scale)[:, None], p, ORDER), p, ORDER)
        return scale, s, largest < INF
    elif ORDER == LARGEST:
        largest = tl.max(tl.where(size < INF, size, INF), 1)
        return largest * 0 + 1, largest, largest < INF
    else:
        s = _root(_collect(size, p, ORDER), p, ORDER)
        return s * 0 + 1, s, s < INF


@triton.jit
def _plain_norm(written, p, ORDER: tl.constexpr, SCALED: tl.constexpr):
    scale, s, _finite = _norm_of(tl.abs(written.to(tl.float64)), p, ORDER, SCALED)
    return scale * s


@triton.jit
def _factor(scale, s, cap, target, slack, tau, KIND: tl.constexpr, TAU: tl.constexpr):
    """(whether the row changes, the factor for x / scale)."""
    if KIND == NORMALIZE:
        over = s > 0
        safe = tl.where(over, s, 1.0)
        if TAU:
            factor = tl.exp2((1 - tau) * tl.log2(scale) - tau * tl.log2(safe))
        else:
            factor = 1 / safe
    elif TAU:
        safe = tl.where(s > 0, s, 1.0)
        log_norm = tl.log2(scale) + tl.log2(safe)
        log_cap = tl.where(cap > 0, tl.log2(tl.where(cap > 0, cap, 1.0)), -INF)
        slack = 2 * tau * slack + 16 * ULP * (1 + tl.minimum(tl.abs(log_cap), 1100.0))
        over = (s > 0) & (tau * log_norm > log_cap + slack)
        factor = tl.exp2(tl.where(over, log_cap - tau * log_norm + tl.log2(scale), 0.0))
    else:
        over = s > cap * (1 + slack) / scale
        factor = target / tl.where(over, s, 1.0)
    return over, factor


@triton.jit
def _soft(x, size, top, theta):
    left = tl.maximum((size - top[:, None]) - theta[:, None], 0.0)
    return tl.where(x < 0, -left, left)


@triton.jit
def _theta(size, mask, top, radius):
    """Michelot's iteration, as in csrc/cpu/max_norm.cpp."""
    gap = tl.where(mask, size - top[:, None], -INF)
    theta = -radius
    kept = theta * 0 - 1
    count = kept * 0
    moving = 1
    while moving > 0:
        inside = gap > theta[:, None]
        count = tl.sum(inside.to(tl.float64), 1)
        total = tl.sum(tl.where(inside, gap, 0.0), 1)
        change = (count != kept) & (count > 0)
        theta = tl.where(change, (total - radius) / tl.where(count > 0, count, 1.0), theta)
        kept = count
        moving = tl.max(change.to(tl.int32), 0)
    return theta


@triton.jit
def _offsets(j, box, BOXED: tl.constexpr):
    """Where element j of a row lies."""
    if BOXED:
        offset = j * 0
        for d in tl.static_range(4):
            size, stride = tl.load(box + 2 * d), tl.load(box + 2 * d + 1)
            offset += (j % size) * stride
            j = j // size
        return offset
    else:
        return j


@triton.jit
def _tile(
    base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [r, r + ROWS) below `last`, held in registers. Returns how many changed."""
    rows = r + tl.arange(0, ROWS).to(tl.int64)
    j = tl.arange(0, BLOCK).to(tl.int64)
    live = rows < last
    mask = live[:, None] & (j < length)[None, :]
    pointers = base + rows[:, None] * stride + _offsets(j, box, BOXED)[None, :]
    x = tl.load(pointers, mask=mask, other=0.0)
    if DECAY:
        if TYPE == tl.float64:
            x = x * keep
        else:
            x = (x.to(tl.float32) * keep.to(tl.float32)).to(TYPE)
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    cap = tl.load(caps + rows * cap_step, mask=live, other=INF)
    cap = tl.where(cap >= 0, cap, INF)
    slack, below, aim = _margins(length, p, ORDER)
    bound, target = cap * (1 - below), cap * (1 - aim)
    scale, s, finite = _norm_of(size, p, ORDER, SCALED)
    if (KIND == CAP) or (KIND == NORMALIZE):
        over, factor = _factor(scale, s, cap, target, slack, tau, KIND, TAU)
        unit = wide
        if SCALED:
            unit = wide * (1 / scale)[:, None]
        exact = unit * factor[:, None]
        new = _rounded(exact, TYPE)
    else:
        over = s > cap * (1 + slack) / scale
        top = tl.max(size, 1)
        if KIND == L1_BALL:
            safe = tl.where(over & finite, target, 0.0)
            exact = _soft(wide, size, top, _theta(size, mask, top, safe))
            new = _rounded(exact, TYPE)
        else:
            limit = tl.minimum(size, bound[:, None])
            new = _toward_zero(tl.where(wide < 0, -limit, limit), TYPE)
    over = over & finite & live
    if TYPE != tl.float64:
        if ((KIND == CAP) and (not TAU)) or (KIND == L1_BALL):
            ratio = _plain_norm(tl.where(over[:, None], new, 0.0), p, ORDER, SCALED) / bound
            high = over & (ratio > 1)
            if tl.max(high.to(tl.int32), 0) > 0:
                lower = 2 * tl.where(high, ratio, 1.0) - 1
                if KIND == CAP:
                    second = _rounded(unit * (factor / lower)[:, None], TYPE)
                else:
                    second = _rounded(_soft(wide, size, top, _theta(size, mask, top, safe / lower)), TYPE)
                fails = _plain_norm(tl.where(high[:, None], second, 0.0), p, ORDER, SCALED) > bound
                second = tl.where(fails[:, None], _toward_zero(exact, TYPE), second)
                new = tl.where(high[:, None], second, new)
    if DECAY:
        tl.store(pointers, tl.where(over[:, None], new, x), mask=mask)
    else:
        tl.store(pointers, new, mask=mask & over[:, None])
    return tl.sum(over.to(tl.int64), 0)


@triton.jit
def _long_sum(
    base, row, length, box, p, keep, inverse, factor, bound,
    ORDER: tl.constexpr, DECAY: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """One pass over a long row. WHAT: "largest" |x|, "norm" of x · inverse, or of what "nearest" or "zero" rounding
    makes of x · inverse · factor; "write nearest" and "write zero" store that."""
    total = tl.zeros([1, LOOP], tl.float64)
    for start in range(0, length, LOOP):
        j = start + tl.arange(0, LOOP).to(tl.int64)
        mask = (j < length)[None, :]
        pointers = base + row + _offsets(j, box, BOXED)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0)
        if DECAY:
            if TYPE == tl.float64:
                x = x * keep
            else:
                x = (x.to(tl.float32) * keep.to(tl.float32)).to(TYPE)
        if WHAT == "write x":
            tl.store(pointers, x, mask=mask)
        wide = x.to(tl.float64) * inverse
        if (WHAT == "nearest") or (WHAT == "write nearest"):
            new = _rounded(wide * factor, TYPE)
        if (WHAT == "zero") or (WHAT == "write zero"):
            new = _toward_zero(wide * factor, TYPE)
        if WHAT == "clamp":
            limit = tl.minimum(tl.abs(wide), bound)
            new = _toward_zero(tl.where(wide < 0, -limit, limit), TYPE)
        if (WHAT == "write nearest") or (WHAT == "write zero") or (WHAT == "clamp"):
            tl.store(pointers, new, mask=mask)
        if (WHAT == "nearest") or (WHAT == "zero"):
            wide = new.to(tl.float64)
        size = tl.abs(wide)
        if (WHAT == "largest") or (ORDER == LARGEST):
            total = tl.maximum(total, tl.where(size < INF, size, INF))
        else:
            total += _power(size, p, ORDER)
    if (WHAT == "largest") or (ORDER == LARGEST):
        return tl.max(tl.max(total, 1), 0)
    else:
        return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _long(
    base, r, length, stride, box, caps, cap_step, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr, SCALED: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One row too long for registers. Returns 1 if it changed."""
    row = r * stride
    one = keep * 0 + 1
    cap = tl.load(caps + r * cap_step)
    cap = tl.where(cap >= 0, cap, INF)
    slack, below, aim = _margins(length, p, ORDER)
    bound, target = cap * (1 - below), cap * (1 - aim)
    scale, finite = one, one > 0
    if SCALED:
        largest = _long_sum(base, row, length, box, p, keep, one, one, one, ORDER, DECAY, BOXED, TYPE, "largest")
        scale, finite = _scale_of(largest, ORDER), largest < INF
    inverse = 1 / scale
    s = _root(
        _long_sum(base, row, length, box, p, keep, inverse, one, one, ORDER, DECAY, BOXED, TYPE, "norm"), p, ORDER
    )
    if KIND == LINF_BALL:
        over, factor = s > cap, one
    else:
        over, factor = _factor(scale, s, cap, target, slack, tau, KIND, TAU)
    over = over & finite & (s < INF)
    if over:
        if KIND == LINF_BALL:
            _long_sum(base, row, length, box, p, keep, one, one, bound, ORDER, DECAY, BOXED, TYPE, "clamp")
        elif (TYPE == tl.float64) or (KIND == NORMALIZE) or TAU:
            _long_sum(base, row, length, box, p, keep, inverse, factor, one, ORDER, DECAY, BOXED, TYPE, "write nearest")
        else:
            # What is rounded lies below the cap: its powers need no scaling.
            ratio = (
                _root(
                    _long_sum(
                        base, row, length, box, p, keep, inverse, factor, one, ORDER, DECAY, BOXED, TYPE, "nearest"
                    ),
                    p,
                    ORDER,
                )
                / bound
            )
            fails = ratio > 1
            if fails:
                factor = factor / (2 * ratio - 1)
                again = _root(
                    _long_sum(
                        base, row, length, box, p, keep, inverse, factor, one, ORDER, DECAY, BOXED, TYPE, "nearest"
                    ),
                    p,
                    ORDER,
                )
                fails = again > bound
            if fails:
                factor = factor * (2 * ratio - 1)
                _long_sum(
                    base, row, length, box, p, keep, inverse, factor, one, ORDER, DECAY, BOXED, TYPE, "write zero"
                )
            else:
                _long_sum(
                    base, row, length, box, p, keep, inverse, factor, one, ORDER, DECAY, BOXED, TYPE, "write nearest"
                )
    elif DECAY:
        _long_sum(base, row, length, box, p, keep, one, one, one, ORDER, DECAY, BOXED, TYPE, "write x")
    return over.to(tl.int64)


@triton.jit
def _chunk(
    tensor, first, caps, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    WIDEST: tl.constexpr, BOXED: tl.constexpr, ALIGNED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """All rows of one chunk, of a tensor of TYPE."""
    base = tl.load(tensor).to(tl.pointer_type(TYPE))
    rows, stride, length = tl.load(tensor + 2), tl.load(tensor + 3), tl.load(tensor + 4)
    if ALIGNED:
        base, stride, length = tl.multiple_of(base, 16), tl.multiple_of(stride, 8), tl.multiple_of(length, 8)
    last = tl.minimum(rows, first + tl.load(tensor + 13))
    caps += tl.load(tensor + 14)
    cap_step = tl.load(tensor + 15)
    box = tensor + 5
    SCALED: tl.constexpr = (TYPE == tl.float64 and ORDER != LARGEST) or ORDER == ANY
    changed = first * 0
    if length <= 128:
        for r in range(first, last, 16):
            changed += _tile(base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
                             KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE, 16, 128)  # fmt: skip
    if WIDEST > 128:
        if (length > 128) & (length <= 512):
            for r in range(first, last, 4):
                changed += _tile(base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
                                 KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE, 4, 512)  # fmt: skip
    if WIDEST > 512:
        if (length > 512) & (length <= 2048):
            for r in range(first, last, 1):
                changed += _tile(base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
                                 KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE, 1, 2048)  # fmt: skip
    if WIDEST > 2048:
        if (length > 2048) & (length <= 4096):
            for r in range(first, last, 1):
                changed += _tile(base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
                                 KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE, 1, 4096)  # fmt: skip
    if (WIDEST > 4096) and (KIND != L1_BALL):
        if length > 4096:
            for r in range(first, last, 1):
                changed += _long(base, r, length, stride, box, caps, cap_step, p, tau, keep,
                                 KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE)  # fmt: skip
    return changed


@triton.jit(do_not_specialize=["p_bits", "tau_bits", "keep_bits"])
def _max_norm_rows(
    table, chunks, caps, count, p_bits, tau_bits, keep_bits,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    CODES: tl.constexpr, WIDEST: tl.constexpr, BOXED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor = table + tl.load(chunks + 2 * chunk) * COLUMNS
    first = tl.load(chunks + 2 * chunk + 1)
    p, tau, keep = _float64(p_bits), _float64(tau_bits), _float64(keep_bits)
    code = tl.load(tensor + 1)
    changed = first * 0
    if CODES & 1:
        if code == 0:
            changed = _chunk(tensor, first, caps, p, tau, keep, KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGNED,
                             tl.float32)  # fmt: skip
    if CODES & 2:
        if code == 1:
            changed = _chunk(tensor, first, caps, p, tau, keep, KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGNED,
                             tl.float16)  # fmt: skip
    if CODES & 4:
        if code == 2:
            changed = _chunk(tensor, first, caps, p, tau, keep, KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGNED,
                             tl.bfloat16)  # fmt: skip
    if CODES & 8:
        if code == 3:
            changed = _chunk(tensor, first, caps, p, tau, keep, KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGNED,
                             tl.float64)  # fmt: skip
    if changed > 0:
        tl.atomic_add(count, changed, sem="relaxed")


def _bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def max_norm_rows(table, chunks, chunk, caps, p, tau, decay, kind):
    """`chunk` is what the plan knows about its tensors: see `_traits` in fastreg/max_norm.py."""
    count = torch.zeros((), dtype=torch.int64, device=table.device)
    if chunks.shape[0]:
        order = {1.0: ONE, 2.0: TWO, math.inf: LARGEST}.get(p, ANY)
        widest = (*WIDTHS, 2 * WIDTHS[-1])[chunk >> 8]
        _max_norm_rows[(chunks.shape[0],)](
            table, chunks, caps, count, _bits(p), _bits(tau), _bits(1.0 - decay),
            KIND=kind, ORDER=order, TAU=tau != 1.0, DECAY=decay != 0.0,
            CODES=chunk & 15, WIDEST=widest, BOXED=bool(chunk & 16), ALIGNED=bool(chunk & 32),
            num_warps=4 if widest <= 512 else 8,
        )  # fmt: skip
    return count
