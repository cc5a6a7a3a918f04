"""Max-norm and its kin in Triton. The formulas stand in fastreg/max_norm.py, the decisions in csrc/max_norm.h.

Bytes     each element is read once. Rows of more than 16,384 elements that are over the cap, 8,192 of fp64 or where
          rows do not begin at multiples of 16 bytes, and 4,096 for other p, for the l1 ball, or where elements lie
          apart, are read once more to be written, a moment later, when a cache has them. Rows under the cap are not
          written, but for the form out of place, which writes each row once. Backward: x and the gradient are read
          once, or twice if the row has more than 4,096 elements.
Launches  1 for all tensors of the plan, whatever their sizes and dtypes; 1 each way out of place. Rows of more than
          SPLIT elements are cut into pieces, a program each, of which a few rows too fill the GPU: 2 launches for
          them (1 more in the backward), norms of pieces and then what becomes of them, and for p = 1 and 2, in
          dtypes narrower than fp64, a third, which mends rows that rounding has brought above their caps. (The l1
          ball cuts none.)
Tiles     [rows, elements] in registers, of four widths; a program takes the width that its tensor's rows need. What a
          tile of 8,192 elements goes through in fp64 spills, with 8 warps and with 16. Longer rows are held in their
          dtype, as up to 8 tiles of 2,048, of which one at a time is in fp64.
Numerics  norms in fp64. Values are scaled by a power of two (by the largest one for other p) where sums of fp64
          or high powers could overflow. Cap after rounding as in the reference; but rows that are capped by a norm of
          powers, and long ones by their largest element, are rounded towards zero, and long ones that rounding to the
          nearest has left above the cap are scaled once more, towards zero.
"""

# Conditions known when a kernel is compiled stand apart from those known when it runs.
# Triton has no tuples with a star.
# ruff: noqa: SIM102, SIM109, SIM300, RUF005

import math
import struct

import torch
import triton
import triton.language as tl

COLUMNS = tl.constexpr(16)
ONE, TWO, LARGEST, ANY = (tl.constexpr(i) for i in range(4))  # how a norm is summed
CAP, NORMALIZE, L1_BALL, LINF_BALL = (tl.constexpr(i) for i in range(4))  # _ops.ROW_KINDS
IN_PLACE, AWAY, NORMS = (tl.constexpr(i) for i in range(3))  # where rows go: back, to a copy, or only their norms
WHOLE, SUMS, GRADIENTS = (tl.constexpr(i) for i in range(3))  # what a launch of the backward does
ULP = tl.constexpr(2.0**-53)
INF = tl.constexpr(math.inf)
TYPES = tl.constexpr((tl.float32, tl.float16, tl.bfloat16, tl.float64))  # by their codes
# Elements of the tiles' rows, and how many rows a tile has; rows of more than TILED elements, long ones, have none.
WIDTHS, HEIGHTS = tl.constexpr((0, 128, 512, 2048, 4096, 8192, 16384)), tl.constexpr((0, 16, 4, 1, 1))
TILED = tl.constexpr(4096)
LOOP = tl.constexpr(2048)  # elements of a long row that a pass over it treats at a time
SPLIT = 32768  # elements of the rows that one program treats, at most
PIECE, PIECES = 8192, tl.constexpr(1024)  # elements of a piece, at least; pieces of a row, at most


@triton.constexpr_function
def _longest_held(KIND, ORDER, BOXED, ALIGN, TYPE):
    """Elements of the longest row that registers hold. What powers and the l1 ball take besides, or where elements
    that lie apart are, leaves no room for a long one."""
    if KIND == L1_BALL or ORDER == ANY or BOXED:
        return TILED.value
    return 8192 if TYPE == tl.float64 or ALIGN == 1 else 16384


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)  # a small number arrives as int32


@triton.jit
def _power(t, p, ORDER: tl.constexpr):
    """|t|^p of t ≥ 0; for ORDER == ANY that of NaN is 0, as its root is."""
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
def _unit(TYPE: tl.constexpr):
    """By how much, relatively, rounding to the nearest may move a number."""
    if TYPE == tl.float32:
        return 2.0**-24
    elif TYPE == tl.float16:
        return 2.0**-11
    else:
        return 2.0**-8


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
def _log2(t):
    """log2 of a normal number, exact of a power of two. tl.log2 is a natural logarithm times 1 / ln 2: of 2^-12 it
    is a bit off -12, which is 12 units in the last place of a factor."""
    bits = t.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    return ((bits >> 52) - 1023).to(tl.float64) + tl.log2(mantissa)


@triton.jit
def _factor(scale, s, cap, target, slack, tau, KIND: tl.constexpr, TAU: tl.constexpr):
    """(whether the row changes, the factor for x / scale)."""
    if KIND == NORMALIZE:
        over = s > 0
        safe = tl.where(over, s, 1.0)
        if TAU:
            factor = tl.exp2((1 - tau) * _log2(scale) - tau * _log2(safe))
        else:
            factor = 1 / safe
    elif TAU:
        safe = tl.where(s > 0, s, 1.0)
        log_norm = _log2(scale) + _log2(safe)
        log_cap = tl.where(cap > 0, tl.log2(tl.where(cap > 0, cap, 1.0)), -INF)
        slack = 2 * tau * slack + 16 * ULP * (1 + tl.minimum(tl.abs(log_cap), 1100.0))
        over = (s > 0) & (tau * log_norm > log_cap + slack)
        factor = tl.exp2(tl.where(over, log_cap - tau * log_norm + _log2(scale), 0.0))
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
def _decayed(x, keep, TYPE: tl.constexpr):
    if TYPE == tl.float64:
        return x * keep
    else:
        return (x.to(tl.float32) * keep.to(tl.float32)).to(TYPE)


@triton.jit
def _tile(
    base, to, norms, r, last, length, stride, box, caps, cap_step, p, tau, keep,
    FORM: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    SCALED: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [r, r + ROWS) below `last`, held in registers. Returns how many changed."""
    rows = r + tl.arange(0, ROWS).to(tl.int64)
    j = tl.arange(0, BLOCK).to(tl.int64)
    live = rows < last
    mask = live[:, None] & (j < length)[None, :]
    places = rows[:, None] * stride + _offsets(j, box, BOXED)[None, :]
    x = tl.load(base + places, mask=mask, other=0.0)
    if DECAY:
        x = _decayed(x, keep, TYPE)
    wide = x.to(tl.float64)
    size = tl.abs(wide)
    if FORM == NORMS:
        scale, s, finite = _norm_of(size, p, ORDER, SCALED)
        # Of a row with NaN or inf, that.
        tl.store(norms + rows, tl.where(finite, scale * s, tl.sum(size, 1)), mask=live)
        return tl.sum(rows * 0, 0)
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
        if (KIND == CAP) and (ORDER == ANY) and (not TAU):  # to take powers again costs more than it gains
            new = _toward_zero(exact, TYPE)
        else:
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
        if ((KIND == CAP) and (ORDER != ANY) and (not TAU)) or (KIND == L1_BALL):
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
    if FORM == AWAY:
        tl.store(norms + rows, tl.where(over, scale * s, -1.0), mask=live)
    if DECAY or (FORM == AWAY):
        tl.store(to + places, tl.where(over[:, None], new, x), mask=mask)
    else:
        tl.store(to + places, new, mask=mask & over[:, None])
    return tl.sum(over.to(tl.int64), 0)


@triton.jit
def _long_places(start, end, box, BOXED: tl.constexpr):
    """Of elements [start, start + LOOP) of a long row: the mask of those below `end`, and where they lie."""
    j = start + tl.arange(0, LOOP)
    return j < end, _offsets(j, box, BOXED)


@triton.jit
def _long_load(row, mask, places, keep, DECAY: tl.constexpr, TYPE: tl.constexpr):
    x = tl.load(row + places, mask=mask, other=0.0)
    if DECAY:
        x = _decayed(x, keep, TYPE)
    return x


@triton.jit
def _hold(
    row, end, box, keep,
    DECAY: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A long row in registers: TILES tiles of LOOP elements, none if every pass is to read it anew."""
    held = ()
    for i in tl.static_range(TILES):
        mask, places = _long_places(i * LOOP, end, box, BOXED)
        held = held + (_long_load(row, mask, places, keep, DECAY, TYPE),)
    return held


@triton.jit
def _again(held, known, TYPE: tl.constexpr):
    """The row held, for one more pass. The compiler must take it for another: it would keep, for all of the row, what
    it has made of it in fp64. `known` comes out of the pass before, and is not negative."""
    BITS: tl.constexpr = tl.int64 if TYPE == tl.float64 else tl.int32 if TYPE == tl.float32 else tl.int16
    zero = (known < 0).to(BITS)
    out = ()
    for i in tl.static_range(len(held)):
        out = out + ((held[i].to(BITS, bitcast=True) ^ zero).to(TYPE, bitcast=True),)
    return out


@triton.jit
def _long_step(
    total, x, to, mask, places, p, a, b, inverse,
    ORDER: tl.constexpr, SOFT: tl.constexpr, TYPE: tl.constexpr, WHAT: tl.constexpr,
):  # fmt: skip
    """What `_long_sum` does with the tile x, and `total` with what the tile adds to it."""
    wide = x.to(tl.float64)
    if WHAT == "write x":
        tl.store(to + places, x, mask=mask)
    elif WHAT == "norm":
        wide = wide * a
    elif WHAT == "clamp":
        limit = _toward_zero(b, TYPE)
        tl.store(to + places, tl.where(tl.abs(x) > limit, tl.where(x < 0, -limit, limit), x), mask=mask)
    elif WHAT != "largest":
        if SOFT:
            left = tl.maximum((tl.abs(wide) - a) - b, 0.0)
            exact = tl.where(mask, tl.where(wide < 0, -left, left), 0.0)
        else:
            exact = wide * a * b
        if (WHAT == "nearest") or (WHAT == "write nearest"):
            new = _rounded(exact, TYPE)
        elif WHAT == "mend":
            new = _toward_zero(_rounded(exact, TYPE).to(tl.float64) * inverse, TYPE)
        else:
            new = _toward_zero(exact, TYPE)
        if WHAT != "nearest":
            tl.store(to + places, new, mask=mask)
        wide = new.to(tl.float64) * inverse
    size = tl.abs(wide)
    if (WHAT == "largest") or (ORDER == LARGEST):
        return tl.maximum(total, tl.where(size < INF, size, INF))
    else:
        if ORDER == ANY:  # whose powers know no NaN
            total += tl.where(size < INF, 0.0, size)
        return total + _power(size, p, ORDER)


@triton.jit
def _long_sum(
    row, held, to, begin, end, box, p, keep, a, b, inverse,
    ORDER: tl.constexpr, SOFT: tl.constexpr, DECAY: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr,
    WHAT: tl.constexpr,
):  # fmt: skip
    """One pass over elements [begin, end) of a long row, or all those held. WHAT: "largest" |x|, "norm" of x · a, or,
    times `inverse`, of what "nearest" or "zero" rounding makes of x · a · b (SOFT: of sign(x) · max(|x| - a - b, 0));
    "write nearest" and "write zero" store that, "mend" the nearest times `inverse`, rounded towards zero, "clamp" x
    clamped to b, "write x" itself. A norm is the sum of powers, or the largest."""
    total = tl.zeros([LOOP], tl.float64)
    if len(held) > 0:
        for i in tl.static_range(len(held)):
            mask, places = _long_places(i * LOOP, end, box, BOXED)
            total = _long_step(total, held[i], to, mask, places, p, a, b, inverse, ORDER, SOFT, TYPE, WHAT)
    else:
        for start in range(begin, end, LOOP):
            mask, places = _long_places(start, end, box, BOXED)
            x = _long_load(row, mask, places, keep, DECAY, TYPE)
            total = _long_step(total, x, to, mask, places, p, a, b, inverse, ORDER, SOFT, TYPE, WHAT)
    if (WHAT == "largest") or (ORDER == LARGEST):
        return tl.max(total, 0)
    else:
        return tl.sum(total, 0)


@triton.jit
def _long_theta(
    row, length, box, keep, top, radius,
    DECAY: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """`_theta` of a long row, which is read once per iteration."""
    theta = -radius
    kept = theta * 0 - 1
    moving = 1
    while moving > 0:
        count = tl.zeros([LOOP], tl.float64)
        total = tl.zeros([LOOP], tl.float64)
        for start in range(0, length, LOOP):
            mask, places = _long_places(start, length, box, BOXED)
            x = _long_load(row, mask, places, keep, DECAY, TYPE)
            gap = tl.where(mask, tl.abs(x.to(tl.float64)) - top, -INF)
            inside = gap > theta
            count += inside.to(tl.float64)
            total += tl.where(inside, gap, 0.0)
        inner = tl.sum(count, 0)
        sum_inside = tl.sum(total, 0)
        change = (inner != kept) & (inner > 0)
        theta = tl.where(change, (sum_inside - radius) / tl.where(inner > 0, inner, 1.0), theta)
        kept = inner
        moving = change.to(tl.int32)
    return theta


@triton.jit
def _long_norm(
    row, held, begin, end, box, p, keep,
    FORM: tl.constexpr, ORDER: tl.constexpr, DECAY: tl.constexpr, BOXED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """(scale, total) of elements [begin, end) of a long row: the sum of |x / scale|^p, or the largest |x|. Where there
    is NaN or inf the total is one of them, and for FORM == NORMS the right one. Scaled only where need be."""
    scale = keep * 0 + 1
    total = _long_sum(row, held, row, begin, end, box, p, keep, scale, scale, scale,
                      ORDER, False, DECAY, BOXED, TYPE, "norm")  # fmt: skip
    if ORDER == LARGEST:
        if FORM == NORMS:
            if total == INF:
                total = _long_sum(row, held, row, begin, end, box, p, keep, scale, scale, scale,
                                  ONE, False, DECAY, BOXED, TYPE, "norm")  # fmt: skip
    elif (ORDER == ANY) or (TYPE == tl.float64):
        safe = (total > 2.0**-900) & (total < 2.0**900)
        if not safe:
            largest = _long_sum(row, held, row, begin, end, box, p, keep, scale, scale, scale,
                                ORDER, False, DECAY, BOXED, TYPE, "largest")  # fmt: skip
            if (largest > 0) & (largest < INF):
                scale = _scale_of(largest, ORDER)
                total = _long_sum(row, held, row, begin, end, box, p, keep, 1 / scale, scale, scale,
                                  ORDER, False, DECAY, BOXED, TYPE, "norm")  # fmt: skip
    return scale, total


@triton.jit
def _verdict(
    scale, total, length, cap, p, tau,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Of a long row, from its norm: (whether it changes, a and b for `_long_sum`, the bound after rounding)."""
    s = _root(total, p, ORDER)
    slack, below, aim = _margins(length, p, ORDER)
    bound, target = cap * (1 - below), cap * (1 - aim)
    if KIND == CAP:
        # Roundings of relative size u shift the norm of n elements by about u / sqrt(n): see csrc/max_norm.h. Where
        # the factor is so near 1 that many elements move by the same step or by none, by up to some u / 5.
        if TYPE != tl.float64:
            target = target - cap * _unit(TYPE) * (0.25 + 4 / tl.sqrt(length.to(tl.float64)))
    if (KIND == CAP) or (KIND == NORMALIZE):
        over, b = _factor(scale, s, cap, target, slack, tau, KIND, TAU)
        a = 1 / scale
    else:
        over, a, b = s > cap * (1 + slack) / scale, scale * 0 + 1, bound
        if KIND == L1_BALL:
            b = target
    return over & (total < INF), a, b, bound


@triton.jit
def _long(
    base, to, norms, r, length, stride, box, caps, cap_step, p, tau, keep,
    FORM: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One long row, of at most LOOP · TILES elements if it is to be held. Returns 1 if it changed."""
    SOFT: tl.constexpr = KIND == L1_BALL
    row, to = base + r * stride, to + r * stride
    if TILES:
        length = length.to(tl.int32)
    held = _hold(row, length, box, keep, DECAY, BOXED, TYPE, TILES)
    one = keep * 0 + 1
    scale, total = _long_norm(row, held, 0, length, box, p, keep, FORM, ORDER, DECAY, BOXED, TYPE)
    if FORM == NORMS:
        tl.store(norms + r, tl.where(total < INF, scale * _root(total, p, ORDER), total))
        return (r * 0).to(tl.int64)
    cap = tl.load(caps + r * cap_step)
    cap = tl.where(cap >= 0, cap, INF)
    over, a, b, bound = _verdict(scale, total, length, cap, p, tau, KIND, ORDER, TAU, TYPE)
    if FORM == AWAY:
        tl.store(norms + r, tl.where(over, scale * _root(total, p, ORDER), -1.0))
    held = _again(held, total, TYPE)
    if over:
        target = b
        if SOFT:
            a = _long_sum(row, held, to, 0, length, box, p, keep, one, one, one,
                          ORDER, False, DECAY, BOXED, TYPE, "largest")  # fmt: skip
            b = _long_theta(row, length, box, keep, a, target, DECAY, BOXED, TYPE)
        if KIND == LINF_BALL:
            _long_sum(row, held, to, 0, length, box, p, keep, one, bound, one,
                      ORDER, SOFT, DECAY, BOXED, TYPE, "clamp")  # fmt: skip
        elif (TYPE == tl.float64) or (KIND == NORMALIZE) or TAU:
            _long_sum(row, held, to, 0, length, box, p, keep, a, b, one,
                      ORDER, SOFT, DECAY, BOXED, TYPE, "write nearest")  # fmt: skip
        elif (ORDER == LARGEST) or (ORDER == ANY):
            # Powers cost more than what rounding to the nearest gains, and the largest is often rounded up.
            _long_sum(row, held, to, 0, length, box, p, keep, a, b, one,
                      ORDER, SOFT, DECAY, BOXED, TYPE, "write zero")  # fmt: skip
        elif KIND == CAP:
            if 1 - a * b < _unit(TYPE):  # nearer still: too few elements would move
                _long_sum(row, held, to, 0, length, box, p, keep, a, b, one,
                          ORDER, SOFT, DECAY, BOXED, TYPE, "write zero")  # fmt: skip
            else:
                inverse = 1 / tl.where(bound > 0, bound, INF)
                ratio = _root(_long_sum(row, held, to, 0, length, box, p, keep, a, b, inverse,
                                        ORDER, SOFT, DECAY, BOXED, TYPE, "write nearest"), p, ORDER)  # fmt: skip
                if ratio > 1:  # what is there now is scaled once more, towards zero
                    lower = (1 - 8 * ULP) / ratio
                    if TILES:
                        _long_sum(row, _again(held, ratio, TYPE), to, 0, length, box, p, keep, a, b, lower,
                                  ORDER, SOFT, DECAY, BOXED, TYPE, "mend")  # fmt: skip
                    else:
                        tl.debug_barrier()
                        _long_sum(to, held, to, 0, length, box, p, keep, one, lower, one,
                                  ORDER, SOFT, False, BOXED, TYPE, "write zero")  # fmt: skip
        else:
            inverse = 1 / tl.where(bound > 0, bound, INF)
            tried = _long_sum(row, held, to, 0, length, box, p, keep, a, b, inverse,
                              ORDER, SOFT, DECAY, BOXED, TYPE, "nearest")  # fmt: skip
            ratio = _root(tried, p, ORDER)
            fails = ratio > 1
            lower = b
            if fails:
                lower = _long_theta(row, length, box, keep, a, target / (2 * ratio - 1), DECAY, BOXED, TYPE)
                tried = _long_sum(row, held, to, 0, length, box, p, keep, a, lower, inverse,
                                  ORDER, SOFT, DECAY, BOXED, TYPE, "nearest")  # fmt: skip
                fails = _root(tried, p, ORDER) > 1
            if fails:
                _long_sum(row, held, to, 0, length, box, p, keep, a, b, one,
                          ORDER, SOFT, DECAY, BOXED, TYPE, "write zero")  # fmt: skip
            else:
                _long_sum(row, held, to, 0, length, box, p, keep, a, lower, one,
                          ORDER, SOFT, DECAY, BOXED, TYPE, "write nearest")  # fmt: skip
    elif DECAY or (FORM == AWAY):
        _long_sum(row, held, to, 0, length, box, p, keep, one, one, one,
                  ORDER, False, DECAY, BOXED, TYPE, "write x")  # fmt: skip
    return over.to(tl.int64)


# ---- rows in pieces --------------------------------------------------------------------------------------
# Piece i of all has parts[i], (scale, total) as of `_long_norm`; those of a row follow one another.


@triton.jit
def _merged(parts, first, count, p, ORDER: tl.constexpr):
    """(scale, total) of a row from those of its pieces, whichever program asks."""
    lanes = tl.arange(0, PIECES)
    mask = lanes < count
    places = parts + 2 * (first + lanes)
    scales, totals = tl.load(places, mask=mask, other=1.0), tl.load(places + 1, mask=mask, other=0.0)
    finite = totals < INF
    if ORDER == LARGEST:
        scale = tl.zeros([], tl.float64) + 1
        total = tl.max(tl.where(finite, totals, 0.0), 0)
    else:
        scale = tl.max(tl.where(finite & (totals > 0), scales, 0.0), 0)
        scale = tl.where(scale > 0, scale, 1.0)
        total = tl.sum(tl.where(finite, totals * _power(scales * (1 / scale), p, ORDER), 0.0), 0)
    return scale, total + tl.sum(tl.where(finite, 0.0, totals), 0)


@triton.jit
def _piece_of(number, length, piece, ALIGN: tl.constexpr):
    """(row, which of its pieces, how many it has, the first element, and the one past the last)."""
    count = (length + piece - 1) // piece
    which = number % count
    begin = which * piece
    end = tl.minimum(length, begin + piece)
    return number // count, which, count, tl.multiple_of(begin, ALIGN), tl.multiple_of(end, ALIGN)


@triton.jit
def _piece_norm(
    base, to, norms, parts, again, i, number, length, stride, piece, box, caps, cap_step, p, tau, keep, count,
    FORM: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    r, _which, _count, begin, end = _piece_of(number, length, piece, ALIGN)
    scale, total = _long_norm(base + r * stride, (), begin, end, box, p, keep, FORM, ORDER, DECAY, BOXED, TYPE)
    tl.store(parts + 2 * i, scale)
    tl.store(parts + 2 * i + 1, total)


@triton.jit
def _piece_change(
    base, to, norms, parts, again, i, number, length, stride, piece, box, caps, cap_step, p, tau, keep, count,
    FORM: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What becomes of a piece, from the norms of its row's. `again` gets what rounding has made of its norm."""
    r, which, pieces, begin, end = _piece_of(number, length, piece, ALIGN)
    base, to = base + r * stride, to + r * stride
    scale, total = _merged(parts, i - which, pieces, p, ORDER)
    norm = scale * _root(total, p, ORDER)
    if FORM == NORMS:
        if which == 0:
            tl.store(norms + r, tl.where(total < INF, norm, total))
    else:
        cap = tl.load(caps + r * cap_step)
        cap = tl.where(cap >= 0, cap, INF)
        over, a, b, bound = _verdict(scale, total, length, cap, p, tau, KIND, ORDER, TAU, TYPE)
        if which == 0:
            if FORM == AWAY:
                tl.store(norms + r, tl.where(over, norm, -1.0))
            elif over:
                tl.atomic_add(count, 1, sem="relaxed")
        one = keep * 0 + 1
        rounded = keep * 0
        if over:
            if KIND == LINF_BALL:
                _long_sum(base, (), to, begin, end, box, p, keep, one, bound, one,
                          ORDER, False, DECAY, BOXED, TYPE, "clamp")  # fmt: skip
            elif (KIND == CAP) and (not TAU) and ((ORDER == LARGEST) or (ORDER == ANY)):  # as in `_long`
                _long_sum(base, (), to, begin, end, box, p, keep, a, b, one,
                          ORDER, False, DECAY, BOXED, TYPE, "write zero")  # fmt: skip
            else:
                rounded = _long_sum(base, (), to, begin, end, box, p, keep, a, b,
                                    1 / tl.where(bound > 0, bound, INF),
                                    ORDER, False, DECAY, BOXED, TYPE, "write nearest")  # fmt: skip
        elif DECAY or (FORM == AWAY):
            _long_sum(base, (), to, begin, end, box, p, keep, one, one, one,
                      ORDER, False, DECAY, BOXED, TYPE, "write x")  # fmt: skip
        tl.store(again + 2 * i, one)
        tl.store(again + 2 * i + 1, rounded)


@triton.jit
def _piece_mend(
    base, to, norms, parts, again, i, number, length, stride, piece, box, caps, cap_step, p, tau, keep, count,
    FORM: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    BOXED: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where a row has been rounded above its bound, what is there is scaled once more, towards zero."""
    r, which, pieces, begin, end = _piece_of(number, length, piece, ALIGN)
    to += r * stride
    scale, total = _merged(again, i - which, pieces, p, ORDER)
    ratio = _root(total, p, ORDER)
    if ratio > 1:
        _long_sum(to, (), to, begin, end, box, p, keep, scale, (1 - 8 * ULP) / ratio, scale,
                  ORDER, False, False, BOXED, TYPE, "write zero")  # fmt: skip


@triton.jit(do_not_specialize=["first", "p_bits", "tau_bits", "decay_bits"])
def _pieces(
    table, chunks, first, x, out, norms, parts, again, caps, length, piece, p_bits, tau_bits, decay_bits, decay_tensor,
    count, TREAT: tl.constexpr, FORM: tl.constexpr, CAP_STEP: tl.constexpr, KIND: tl.constexpr, ORDER: tl.constexpr,
    TAU: tl.constexpr, DECAY: tl.constexpr, CODES: tl.constexpr, BOXED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """A program per piece: of the rows of a matrix x, or from chunk `first` on of those of a plan."""
    i = tl.program_id(0).to(tl.int64)
    p, tau, keep = _float64(p_bits), _float64(tau_bits), 1 - _float64(decay_bits)
    if decay_tensor is not None:
        keep = 1 - tl.load(decay_tensor)
    if table is None:
        length = tl.multiple_of(length.to(tl.int64), ALIGN)
        TREAT(x, out, norms, parts, again, i, i, length, length, piece, parts, caps, CAP_STEP, p, tau, keep, count,
              FORM, KIND, ORDER, TAU, DECAY, BOXED, x.dtype.element_ty, ALIGN)  # fmt: skip
    else:
        tensor = table + tl.load(chunks + 2 * (first + i)) * COLUMNS
        number = tl.load(chunks + 2 * (first + i) + 1)
        code, stride, length = tl.load(tensor + 1), tl.load(tensor + 3), tl.load(tensor + 4)
        stride, length = tl.multiple_of(stride, ALIGN), tl.multiple_of(length, ALIGN)
        piece, cap, cap_step = tl.load(tensor + 13), caps + tl.load(tensor + 14), tl.load(tensor + 15)
        for c in tl.static_range(4):
            if CODES & (1 << c):
                if code == c:
                    base = tl.load(tensor).to(tl.pointer_type(TYPES[c]))
                    if ALIGN > 1:
                        base = tl.multiple_of(base, 16)
                    TREAT(base, base, norms, parts, again, i, number, length, stride, piece, tensor + 5, cap, cap_step,
                          p, tau, keep, count, FORM, KIND, ORDER, TAU, DECAY, BOXED, TYPES[c], ALIGN)  # fmt: skip


# ---- rows whole ------------------------------------------------------------------------------------------


@triton.jit
def _tiles_of_chunk(
    base, first, last, length, stride, box, caps, cap_step, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr, BOXED: tl.constexpr,
    TYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SCALED: tl.constexpr = (TYPE == tl.float64 and ORDER != LARGEST) or ORDER == ANY
    changed = first * 0
    for r in range(first, last, ROWS):
        changed += _tile(base, base, base, r, last, length, stride, box, caps, cap_step, p, tau, keep,
                         IN_PLACE, KIND, ORDER, TAU, DECAY, SCALED, BOXED, TYPE, ROWS, BLOCK)  # fmt: skip
    return changed


@triton.jit
def _long_row(
    tensor, r, caps, cap_step, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    WIDEST: tl.constexpr, BOXED: tl.constexpr, ALIGN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    base, stride, length = tl.load(tensor).to(tl.pointer_type(TYPE)), tl.load(tensor + 3), tl.load(tensor + 4)
    if ALIGN > 1:
        base, stride, length = tl.multiple_of(base, 16), tl.multiple_of(stride, ALIGN), tl.multiple_of(length, ALIGN)
    HELD: tl.constexpr = _longest_held(KIND, ORDER, BOXED, ALIGN, TYPE)
    changed = r * 0
    for w in tl.static_range(5, 7):
        if (WIDEST >= w) and (WIDTHS[w] <= HELD):
            if (length > WIDTHS[w - 1]) & (length <= WIDTHS[w]):
                changed = _long(base, base, base, r, length, stride, tensor + 5, caps, cap_step, p, tau, keep,
                                IN_PLACE, KIND, ORDER, TAU, DECAY, BOXED, TYPE, WIDTHS[w] // LOOP)  # fmt: skip
    if (WIDEST == 7) or (WIDTHS[WIDEST] > HELD):
        if length > HELD:
            changed = _long(base, base, base, r, length, stride, tensor + 5, caps, cap_step, p, tau, keep,
                            IN_PLACE, KIND, ORDER, TAU, DECAY, BOXED, TYPE, 0)  # fmt: skip
    return changed


@triton.jit
def _chunk(
    tensor, first, caps, p, tau, keep,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    WIDEST: tl.constexpr, BOXED: tl.constexpr, ALIGN: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """All rows of one chunk, of a tensor of TYPE."""
    base = tl.load(tensor).to(tl.pointer_type(TYPE))
    rows, stride, length = tl.load(tensor + 2), tl.load(tensor + 3), tl.load(tensor + 4)
    if ALIGN > 1:
        base, stride, length = tl.multiple_of(base, 16), tl.multiple_of(stride, ALIGN), tl.multiple_of(length, ALIGN)
    last = tl.minimum(rows, first + tl.load(tensor + 13))
    caps += tl.load(tensor + 14)
    cap_step = tl.load(tensor + 15)
    box = tensor + 5
    changed = first * 0
    for w in tl.static_range(1, 5):
        if WIDEST > w - 1:
            if (length > WIDTHS[w - 1]) & (length <= WIDTHS[w]):
                changed = _tiles_of_chunk(base, first, last, length, stride, box, caps, cap_step, p, tau, keep,
                                          KIND, ORDER, TAU, DECAY, BOXED, TYPE, HEIGHTS[w], WIDTHS[w])  # fmt: skip
    if WIDEST >= 5:
        if length > TILED:  # the one row of the chunk
            if ALIGN > 1:
                changed = _long_row(tensor, first, caps, cap_step, p, tau, keep,
                                    KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGN, TYPE)  # fmt: skip
            elif (tl.load(tensor) % 16 == 0) & (stride % 8 == 0) & (length % 8 == 0):  # another tensor is not
                changed = _long_row(tensor, first, caps, cap_step, p, tau, keep,
                                    KIND, ORDER, TAU, DECAY, WIDEST, BOXED, 8, TYPE)  # fmt: skip
            else:
                changed = _long_row(tensor, first, caps, cap_step, p, tau, keep,
                                    KIND, ORDER, TAU, DECAY, WIDEST, BOXED, 1, TYPE)  # fmt: skip
    return changed


@triton.jit(do_not_specialize=["p_bits", "tau_bits", "decay_bits"])
def _max_norm_rows(
    table, chunks, caps, count, p_bits, tau_bits, decay_bits, decay_tensor,
    KIND: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, DECAY: tl.constexpr,
    CODES: tl.constexpr, WIDEST: tl.constexpr, BOXED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor = table + tl.load(chunks + 2 * chunk) * COLUMNS
    first = tl.load(chunks + 2 * chunk + 1)
    p, tau, keep = _float64(p_bits), _float64(tau_bits), 1 - _float64(decay_bits)
    if decay_tensor is not None:
        keep = 1 - tl.load(decay_tensor)
    code = tl.load(tensor + 1)
    changed = first * 0
    for c in tl.static_range(4):
        if CODES & (1 << c):
            if code == c:
                changed = _chunk(tensor, first, caps, p, tau, keep, KIND, ORDER, TAU, DECAY, WIDEST, BOXED, ALIGN,
                                 TYPES[c])  # fmt: skip
    if changed > 0:
        tl.atomic_add(count, changed, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "length", "p_bits", "tau_bits"])
def _matrix_rows(
    x, out, norms, caps, rows, length, p_bits, tau_bits,
    FORM: tl.constexpr, CAP_STEP: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a matrix, BLOCK being the power of two that their length reaches: capped, to `out`, or only their
    norms."""
    TYPE: tl.constexpr = x.dtype.element_ty
    SCALED: tl.constexpr = (TYPE == tl.float64 and ORDER != LARGEST) or ORDER == ANY
    p, tau = _float64(p_bits), _float64(tau_bits)
    keep = tl.zeros([], tl.float64) + 1
    # The product tells the compiler, in whatever integers, what it is a multiple of.
    rows, length = rows.to(tl.int64), (length // ALIGN * ALIGN).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * ROWS
    if BLOCK <= TILED:
        _tile(x, out, norms, first, rows, length, length, caps, caps, CAP_STEP, p, tau, keep,
              FORM, CAP, ORDER, TAU, False, SCALED, False, TYPE, ROWS, BLOCK)  # fmt: skip
    else:
        TILES: tl.constexpr = BLOCK // LOOP if BLOCK <= _longest_held(CAP, ORDER, False, ALIGN, TYPE) else 0
        _long(x, out, norms, first, length, length, caps, caps, CAP_STEP, p, tau, keep,
              FORM, CAP, ORDER, TAU, False, False, TYPE, TILES)  # fmt: skip


@triton.jit
def _slope(x, p, norm, inverse, ORDER: tl.constexpr):
    """sign(x) · (|x| · inverse)^(p - 1); for p = inf that of the largest elements alone, which share it."""
    if ORDER == TWO:
        return x * inverse
    elif ORDER == ONE:
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0))
    elif ORDER == LARGEST:
        return tl.where(x == norm, 1.0, 0.0) - tl.where(x == -norm, 1.0, 0.0)
    else:
        size = _power(tl.abs(x) * inverse, p - 1, ORDER)
        return tl.where(x < 0, -size, size)


@triton.jit
def _coefficients(norm, moves, along, cap, tau, TAU: tl.constexpr):
    """(a, b, slope in the cap): the gradient of x is a · g + b · slope(x)."""
    norm = tl.where(moves, norm, 1.0)
    inverse = 1 / norm
    below = inverse * 0 + 1  # norm^(1 - tau)
    if TAU:
        below = tl.exp2((1 - tau) * tl.log2(norm))
    a = tl.where(cap >= 0, cap, INF) * below * inverse
    return a, -a * tau * along, along * below


@triton.jit
def _of_two(x, g, places, mask, moves, WITH_G: tl.constexpr):
    """Elements of x, where their rows move, and of the gradient if there is one."""
    vx = tl.load(x + places, mask=mask & moves[:, None], other=0.0)
    if WITH_G:
        return vx, tl.load(g + places, mask=mask, other=0.0)
    else:
        return vx, vx


@triton.jit(do_not_specialize=["rows", "length", "p_bits", "tau_bits"])
def _matrix_gradients(
    x, g, out, caps, norms, grads, slopes, parts, rows, length, piece, p_bits, tau_bits,
    WITH_G: tl.constexpr, CAP_STEP: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOPED: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Of the capped rows of a matrix given the gradient g, or without it of their norms given `grads`. Rows of more
    than BLOCK elements, if LOOPED, are walked through twice; rows in pieces in two launches, SUMS and GRADIENTS."""
    TYPE: tl.constexpr = x.dtype.element_ty
    p, tau = _float64(p_bits), _float64(tau_bits)
    rows, length = rows.to(tl.int64), tl.multiple_of(length.to(tl.int64), ALIGN)
    i = tl.program_id(0).to(tl.int64)
    if STAGE == WHOLE:
        first, which, count, begin, end = i * ROWS, i * 0, i * 0, i * 0, length
    else:
        first, which, count, begin, end = _piece_of(i, length, piece, ALIGN)
    r = first + tl.arange(0, ROWS).to(tl.int64)
    live = r < rows
    norm = tl.load(norms + r, mask=live, other=-1.0)
    moves = live
    if WITH_G:
        moves = live & (norm >= 0)
    inverse = 1 / tl.where(moves & (norm != 0), norm, 1.0)
    along, largest = norm * 0, norm * 0  # sum of g · x / norm; how many elements are the largest
    j = tl.arange(0, BLOCK).to(tl.int64)
    if not LOOPED:
        mask = live[:, None] & (j < length)[None, :]
        vx, vg = _of_two(x, g, r[:, None] * length + j[None, :], mask, moves, WITH_G)
    if STAGE == GRADIENTS:
        lanes = tl.arange(0, PIECES)
        of_row = parts + 2 * (i - which + lanes)
        along += tl.sum(tl.load(of_row, mask=lanes < count, other=0.0), 0)
        largest += tl.sum(tl.load(of_row + 1, mask=lanes < count, other=0.0), 0)
    elif WITH_G or (ORDER == LARGEST):
        if LOOPED:
            products = tl.zeros([ROWS, BLOCK], tl.float64)
            counts = tl.zeros([ROWS, BLOCK], tl.float64)
            if tl.max(moves.to(tl.int32), 0) > 0:
                for start in range(begin, end, BLOCK):
                    mask = moves[:, None] & (start + j < end)[None, :]
                    lx, lg = _of_two(x, g, r[:, None] * length + start + j[None, :], mask, moves, WITH_G)
                    wide = lx.to(tl.float64)
                    if WITH_G:
                        products += lg.to(tl.float64) * (wide * inverse[:, None])
                    if ORDER == LARGEST:
                        counts += tl.where(mask & (tl.abs(wide) == norm[:, None]), 1.0, 0.0)
            along, largest = tl.sum(products, 1), tl.sum(counts, 1)
        else:
            wide = vx.to(tl.float64)
            if WITH_G:
                along = tl.sum(vg.to(tl.float64) * (wide * inverse[:, None]), 1)
            if ORDER == LARGEST:
                largest = tl.sum(tl.where(mask & (tl.abs(wide) == norm[:, None]), 1.0, 0.0), 1)
    if STAGE == SUMS:
        tl.store(parts + 2 * i, tl.sum(along, 0))
        tl.store(parts + 2 * i + 1, tl.sum(largest, 0))
    else:
        a, b = norm * 0, norm * 0
        if WITH_G:
            cap = tl.load(caps + r * CAP_STEP, mask=live, other=0.0)
            a, b, slope = _coefficients(norm, moves, along, cap, tau, TAU)
            tl.store(slopes + r, tl.where(moves, slope, 0.0), mask=live & (which == 0))
        else:
            b = tl.load(grads + r, mask=live, other=0.0)
            b = tl.where(norm == 0, 0.0, b)
        if ORDER == LARGEST:
            b = b / tl.where(moves & (norm != 0), largest, 1.0)
        if LOOPED:
            for start in range(begin, end, BLOCK):
                mask = live[:, None] & (start + j < end)[None, :]
                places = r[:, None] * length + start + j[None, :]
                lx, lg = _of_two(x, g, places, mask, moves, WITH_G)
                new = _slope(lx.to(tl.float64), p, norm[:, None], inverse[:, None], ORDER) * b[:, None]
                if WITH_G:
                    new += lg.to(tl.float64) * a[:, None]
                    tl.store(out + places, tl.where(moves[:, None], _rounded(new, TYPE), lg), mask=mask)
                else:
                    tl.store(out + places, _rounded(new, TYPE), mask=mask)
        else:
            places = r[:, None] * length + j[None, :]
            new = _slope(vx.to(tl.float64), p, norm[:, None], inverse[:, None], ORDER) * b[:, None]
            if WITH_G:
                new += vg.to(tl.float64) * a[:, None]
                tl.store(out + places, tl.where(moves[:, None], _rounded(new, TYPE), vg), mask=mask)
            else:
                tl.store(out + places, _rounded(new, TYPE), mask=mask)


# ---- launchers -------------------------------------------------------------------------------------------


def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _order(p: float) -> tl.constexpr:
    return {1.0: ONE, 2.0: TWO, math.inf: LARGEST}.get(p, ANY)


def _treat_pieces(table, chunks, first, x, out, norms, caps, programs, piece, form, kind, p, tau, mends, **options):
    """The launches for rows in pieces. `mends`: whether rounding may bring a row above its cap."""
    parts, again = torch.empty((2, programs, 2), dtype=torch.float64, device=caps.device)
    for treat in (_piece_norm, _piece_change, _piece_mend)[: 3 if mends else 2]:
        _pieces[(programs,)](
            table, chunks, first, x, out, norms, parts, again, caps, 0 if x is None else x.shape[1], piece,
            _bits(p), _bits(tau), TREAT=treat, FORM=form, KIND=kind, ORDER=_order(p), TAU=tau != 1.0, **options,
            num_warps=8,
        )  # fmt: skip


def max_norm_rows(table, chunks, traits, caps, p, tau, decay, decay_tensor, kind):
    """`traits` is what the plan knows about its tensors: see `_traits` in fastreg/max_norm.py."""
    count = torch.zeros((), dtype=torch.int64, device=table.device)
    codes, widest, pieces = traits & 15, traits >> 8 & 15, traits >> 20
    options = {
        "decay_bits": _bits(decay), "decay_tensor": decay_tensor, "count": count, "CODES": codes,
        "DECAY": decay != 0.0 or decay_tensor is not None, "BOXED": bool(traits & 16), "ALIGN": 8 if traits & 32 else 1,
    }  # fmt: skip
    whole = chunks.shape[0] - pieces
    if whole:
        _max_norm_rows[(whole,)](
            table, chunks, caps, p_bits=_bits(p), tau_bits=_bits(tau), **options,
            KIND=kind, ORDER=_order(p), TAU=tau != 1.0, WIDEST=widest,
            num_warps=4 if widest <= 2 and _order(p) != ANY else 8,  # powers in fp64 want twice the registers
        )  # fmt: skip
    if pieces:
        mends = kind == CAP.value and p in (1.0, 2.0) and tau == 1.0 and codes & 7 != 0
        _treat_pieces(table, chunks, whole, None, None, None, caps, pieces, 0, IN_PLACE, kind, p, tau, mends,
                      CAP_STEP=0, **options)  # fmt: skip
    return count


def _tiles(matrix: torch.Tensor) -> tuple[int, int, int]:
    """(elements to which the rows' length is a multiple, up to 16 bytes; rows and elements of a tile)."""
    length = matrix.shape[1]
    align = 16 // matrix.element_size()
    block = max(16, triton.next_power_of_2(length))
    return align if length % align == 0 else 1, max(1, 2048 // block), block


def _piece(length: int) -> int:
    """Elements of the pieces of a row."""
    return max(PIECE, triton.next_power_of_2(triton.cdiv(length, PIECES.value)))


def _capped(x, out, norms, caps, p, tau, form):
    align, rows, block = _tiles(x)
    cap_step = int(caps.shape[0] > 1)
    if x.shape[1] > SPLIT:
        piece = _piece(x.shape[1])
        programs = x.shape[0] * triton.cdiv(x.shape[1], piece)
        mends = form == AWAY.value and p in (1.0, 2.0) and tau == 1.0 and x.dtype != torch.float64
        plain = {"decay_bits": 0, "decay_tensor": None, "count": None, "DECAY": False, "CODES": 0, "BOXED": False}
        _treat_pieces(None, None, 0, x, out, norms, caps, programs, piece, form, CAP, p, tau, mends,
                      CAP_STEP=cap_step, ALIGN=align, **plain)  # fmt: skip
        return
    _matrix_rows[(triton.cdiv(x.shape[0], rows),)](
        x, out, norms, caps, x.shape[0], x.shape[1], _bits(p), _bits(tau),
        FORM=form, CAP_STEP=cap_step, ORDER=_order(p), TAU=tau != 1.0, ALIGN=align, ROWS=rows,
        BLOCK=block, num_warps=4 if block <= 512 else 8,
    )  # fmt: skip


def max_norm_forward(input, caps, p, tau):
    output, norms = torch.empty_like(input), caps.new_empty(input.shape[0])
    _capped(input, output, norms, caps, p, tau, AWAY)
    return output, norms


def row_norms(input, p):
    norms = torch.empty(input.shape[0], dtype=torch.float64, device=input.device)
    _capped(input, input, norms, norms, p, 1.0, NORMS)
    return norms


def _gradients(x, g, out, caps, norms, grads, slopes, p, tau):
    align, rows, block = _tiles(x)
    length = x.shape[1]
    looped = block > TILED.value
    stages, programs, piece, parts = (WHOLE,), triton.cdiv(x.shape[0], rows), 0, None
    if length > SPLIT:
        stages, piece = (GRADIENTS,), _piece(length)
        programs = x.shape[0] * triton.cdiv(length, piece)
        parts = torch.zeros((programs, 2), dtype=torch.float64, device=x.device)
        if g is not None or p == math.inf:
            stages = SUMS, GRADIENTS
    for stage in stages:
        _matrix_gradients[(programs,)](
            x, g, out, caps, norms, grads, slopes, parts, x.shape[0], length, piece, _bits(p), _bits(tau),
            WITH_G=g is not None, CAP_STEP=int(caps is not None and caps.shape[0] > 1), ORDER=_order(p), TAU=tau != 1.0,
            ALIGN=align, ROWS=rows, BLOCK=LOOP.value if looped else block, LOOPED=looped, STAGE=stage,
            num_warps=4 if block <= 512 else 8,
        )  # fmt: skip


def max_norm_backward(grad_output, input, caps, norms, p, tau):
    grad, slopes = torch.empty_like(input), torch.empty_like(norms)
    _gradients(input, grad_output, grad, caps, norms, None, slopes, p, tau)
    return grad, slopes


def row_norms_backward(grad, input, norms, p):
    out = torch.empty_like(input)
    _gradients(input, None, out, None, norms, grad, None, p, 1.0)
    return out
