"""Lp penalties and FGM in Triton: one pass over the tensors of a plan. The formulas stand in fastreg/penalties.py, the
tables' layout in csrc/penalties.h.

Bytes     norms: each weight once. Gradient: the weight once, the gradient written once (and read, to add to it).
          Attack: each gradient once; weight and backup only in the blocks of 64 where the gradient is not zero.
Launches  norms: 3, whatever the number of tensors: a sum per chunk, a norm per tensor, the penalty. Attack: the first
          two of these, for the gradients, and 1. The others: 1.
Numerics  sums in fp64, in an order that the plan fixes. Where powers could overflow or vanish they are of values
          relative to the largest so far.
"""

# Conditions known when a kernel is compiled stand apart from those known when it runs.
# ruff: noqa: SIM102, SIM300

import torch
import triton
import triton.language as tl

from .max_norm import ANY, INF, ONE, TWO, _bits, _collect, _float64, _power, _root, _scale_of

BLOCK = tl.constexpr(2048)
STEP = tl.constexpr(1024)  # of an attack, which holds more per element
MARKED = tl.constexpr(64)  # elements that share a mark; csrc/penalties.h has the same
TENSORS = tl.constexpr(1024)  # whose chunks a program counts at a time


@triton.jit
def _add(scale, total, size, p, ORDER: tl.constexpr, SCALED: tl.constexpr):
    """(scale, total) with a block of |x| added: the sum of powers is scale^p · total."""
    if ORDER == ANY:  # whose powers know no NaN
        total += tl.sum(tl.sum(tl.where(size < INF, 0.0, size), 1), 0)
    if SCALED:
        block = tl.max(_scale_of(tl.max(size, 1), ORDER), 0)
        larger = tl.where(total > 0, tl.maximum(scale, block), block)
        inverse = 1 / larger
        total = total * _power(scale * inverse, p, ORDER) + tl.sum(_collect(size * inverse, p, ORDER), 0)
        return larger, total
    else:
        return scale, total + tl.sum(_collect(size, p, ORDER), 0)


@triton.jit
def _sum(base, n, p, ORDER: tl.constexpr, SCALED: tl.constexpr):
    scale = tl.zeros([], tl.float64) + 1
    total = tl.zeros([], tl.float64)
    lanes = tl.arange(0, BLOCK)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(base + start + lanes)
        scale, total = _add(scale, total, tl.abs(x.to(tl.float64))[None, :], p, ORDER, SCALED)
    if whole < n:
        x = tl.load(base + whole + lanes, mask=whole + lanes < n, other=0.0)
        scale, total = _add(scale, total, tl.abs(x.to(tl.float64))[None, :], p, ORDER, SCALED)
    return scale, total


@triton.jit
def _sum_typed(address, first, n, p, ORDER: tl.constexpr, TYPE: tl.constexpr):
    SCALED: tl.constexpr = ORDER == ANY or TYPE == tl.float64
    base = address.to(tl.pointer_type(TYPE)) + first
    if address % 16 == 0:
        return _sum(tl.multiple_of(base, 16), n, p, ORDER, SCALED)
    else:
        return _sum(base, n, p, ORDER, SCALED)


@triton.jit(do_not_specialize=["p_bits", "chunk"])
def _norm_chunks(
    table, chunks, parts, chunk, p_bits,
    ORDER: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, COLUMN: tl.constexpr,
):  # fmt: skip
    """Of the tensors whose addresses stand in COLUMN of COLUMNS."""
    i = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * i) * COLUMNS
    first = tl.load(chunks + 2 * i + 1)
    n = tl.minimum(tl.load(row) - first, chunk).to(tl.int32)
    code, address = tl.load(row + 1), tl.load(row + COLUMN)
    p = _float64(p_bits)
    scale = tl.zeros([], tl.float64) + 1
    total = tl.zeros([], tl.float64)
    if code == 0:
        scale, total = _sum_typed(address, first, n, p, ORDER, tl.float32)
    if code == 1:
        scale, total = _sum_typed(address, first, n, p, ORDER, tl.float16)
    if code == 2:
        scale, total = _sum_typed(address, first, n, p, ORDER, tl.bfloat16)
    if WIDE:
        if code == 3:
            scale, total = _sum_typed(address, first, n, p, ORDER, tl.float64)
    tl.store(parts + 2 * i, scale)
    tl.store(parts + 2 * i + 1, total)


@triton.jit(do_not_specialize=["p_bits", "chunk", "tensors"])
def _norm_tensors(
    table, parts, norms, terms, tensors, chunk, p_bits,
    ORDER: tl.constexpr, SQUARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the sums of a tensor's chunks, in their order, its norm as scale · s and, if wanted, its share in the
    penalty."""
    t = tl.program_id(0).to(tl.int64)
    p = _float64(p_bits)
    begin = t * 0
    for start in range(0, t, TENSORS):
        i = start + tl.arange(0, TENSORS)
        elements = tl.load(table + i.to(tl.int64) * COLUMNS, mask=i < t, other=0)
        begin += tl.sum((elements + chunk - 1) // chunk, 0)
    count = (tl.load(table + t * COLUMNS) + chunk - 1) // chunk
    lanes = tl.arange(0, 256)
    largest = tl.zeros([], tl.float64)
    for start in range(0, count, 256):
        mask = start + lanes < count
        at = parts + 2 * (begin + start + lanes)
        total = tl.load(at + 1, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.where(total != 0, tl.load(at, mask=mask, other=0.0), 0.0), 0))
    scale = tl.where(largest > 0, largest, 1.0)
    sums = tl.zeros([], tl.float64)
    for start in range(0, count, 256):
        mask = start + lanes < count
        at = parts + 2 * (begin + start + lanes)
        total = tl.load(at + 1, mask=mask, other=0.0)
        ratio = tl.load(at, mask=mask, other=0.0) / scale
        sums += tl.sum(tl.where(total < INF, total * _power(ratio, p, ORDER), total), 0)
    s = tl.where(sums < INF, _root(sums, p, ORDER), sums)
    tl.store(norms + 2 * t, scale)
    tl.store(norms + 2 * t + 1, s)
    if terms is not None:
        norm = scale * s
        if SQUARED:
            if ORDER == ANY:
                norm = _power(scale, p, ORDER) * sums
            else:
                norm = _power(norm, p, ORDER)
        tl.store(terms + t, norm)


@triton.jit(do_not_specialize=["tensors"])
def _total(terms, penalty, tensors):
    sums = tl.zeros([TENSORS], tl.float64)
    for start in range(0, tensors, TENSORS):
        i = start + tl.arange(0, TENSORS)
        sums += tl.load(terms + i, mask=i < tensors, other=0.0)
    tl.store(penalty, tl.sum(sums, 0))


def _order(p):
    return {1.0: ONE, 2.0: TWO}.get(p, ANY)


def _norms(table, chunks, chunk, column, p, squared, wide, terms):
    """Of the tensors whose addresses stand in `column`; `terms` is None or gets their shares in the penalty."""
    tensors = table.shape[0]
    norms = torch.empty((tensors, 2), dtype=torch.float64, device=table.device)
    parts = torch.empty((chunks.shape[0], 2), dtype=torch.float64, device=table.device)
    options = dict(ORDER=_order(p), COLUMNS=table.shape[1])
    if chunks.shape[0]:
        _norm_chunks[(chunks.shape[0],)](
            table, chunks, parts, chunk, _bits(p), WIDE=wide, COLUMN=column, **options,
            num_warps=8 if wide else 4, maxnreg=128,  # unasked ptxas spills where that fits another block
        )  # fmt: skip
    _norm_tensors[(tensors,)](table, parts, norms, terms, tensors, chunk, _bits(p), SQUARED=squared, **options)
    return norms


def lp_norms(table, chunks, chunk, p, squared, wide):
    tensors, device = table.shape[0], table.device
    penalty = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)
    terms = torch.empty(tensors, dtype=torch.float64, device=device)
    norms = _norms(table, chunks, chunk, 2, p, squared, wide, terms)
    _total[(1,)](terms, penalty, tensors)
    return penalty, norms


# ---- the gradient ----------------------------------------------------------------------------------------


@triton.jit
def _slope(w, out, mask, factor, inverse, p, ORDER: tl.constexpr, ADD: tl.constexpr, TYPE: tl.constexpr):
    w = w.to(tl.float64)
    if ORDER == TWO:
        slope = w * inverse * factor
    else:
        slope = tl.where(w > 0, factor, tl.where(w < 0, -factor, w * 0))
        if ORDER == ANY:
            slope = slope * _power(tl.abs(w) * inverse, p - 1, ORDER)
    if ADD:
        slope += (tl.load(out) if mask is None else tl.load(out, mask=mask, other=0.0)).to(tl.float64)
    if TYPE == tl.float64:
        tl.store(out, slope, mask=mask)
    else:
        tl.store(out, slope.to(tl.float32).to(TYPE), mask=mask)


@triton.jit
def _gradient(base, out, n, factor, inverse, p, ORDER: tl.constexpr, ADD: tl.constexpr, TYPE: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    whole = n // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        _slope(tl.load(base + start + lanes), out + start + lanes, None, factor, inverse, p, ORDER, ADD, TYPE)
    if whole < n:
        mask = whole + lanes < n
        w = tl.load(base + whole + lanes, mask=mask, other=0.0)
        _slope(w, out + whole + lanes, mask, factor, inverse, p, ORDER, ADD, TYPE)


@triton.jit
def _gradient_typed(
    address, to, first, n, factor, inverse, p, ORDER: tl.constexpr, ADD: tl.constexpr, TYPE: tl.constexpr
):
    base = address.to(tl.pointer_type(TYPE)) + first
    out = to.to(tl.pointer_type(TYPE)) + first
    if (address | to) % 16 == 0:
        base, out = tl.multiple_of(base, 16), tl.multiple_of(out, 16)
        _gradient(base, out, n, factor, inverse, p, ORDER, ADD, TYPE)
    else:
        _gradient(base, out, n, factor, inverse, p, ORDER, ADD, TYPE)


@triton.jit(do_not_specialize=["p_bits", "chunk"])
def _gradients(
    table, chunks, outs, norms, grad, chunk, p_bits, ORDER: tl.constexpr, SQUARED: tl.constexpr, ADD: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64)
    t = tl.load(chunks + 2 * i)
    row = table + t * 3
    to = tl.load(outs + t)
    if to != 0:
        first = tl.load(chunks + 2 * i + 1)
        n = tl.minimum(tl.load(row) - first, chunk).to(tl.int32)
        code, address = tl.load(row + 1), tl.load(row + 2)
        p = _float64(p_bits)
        scale, s, factor = tl.load(norms + 2 * t), tl.load(norms + 2 * t + 1), tl.load(grad)
        inverse = factor * 0 + 1
        if SQUARED:
            factor = factor * p
        elif ORDER != ONE:
            inverse = tl.where(s > 0, 1 / scale / tl.where(s > 0, s, 1.0), tl.where(s == 0, 1.0, s))
        factor = tl.where(s == 0, 0.0, factor)
        if code == 0:
            _gradient_typed(address, to, first, n, factor, inverse, p, ORDER, ADD, tl.float32)
        if code == 1:
            _gradient_typed(address, to, first, n, factor, inverse, p, ORDER, ADD, tl.float16)
        if code == 2:
            _gradient_typed(address, to, first, n, factor, inverse, p, ORDER, ADD, tl.bfloat16)
        if code == 3:
            _gradient_typed(address, to, first, n, factor, inverse, p, ORDER, ADD, tl.float64)


def lp_penalty_backward(table, chunks, chunk, outs, norms, grad, p, squared, add):
    if chunks.shape[0]:
        options = dict(ORDER=_order(p), SQUARED=squared, ADD=add)
        _gradients[(chunks.shape[0],)](table, chunks, outs, norms, grad, chunk, _bits(p), **options)


# ---- FGM -------------------------------------------------------------------------------------------------
# Each warp reads the marks of its elements for itself, and one of them writes them all: behind a barrier, for another
# may not have read them yet.


@triton.jit
def _attack_block(weight, grad, backup, marks, start, n, inverse, step, TYPE: tl.constexpr, TAIL: tl.constexpr):
    blocks = start // MARKED + tl.arange(0, STEP // MARKED)
    at = blocks[:, None] * MARKED + tl.arange(0, MARKED)[None, :]
    g = tl.load(grad + at, mask=at < n, other=0.0) if TAIL else tl.load(grad + at)
    wanted = tl.max((g != 0).to(tl.int32), 1) > 0
    if tl.max(wanted.to(tl.int32), 0) > 0:
        fresh = wanted & (tl.load(marks + blocks, mask=wanted, other=1) == 0)
        # The bounds of the tensor are left out where they hold: with them no access would be wide.
        inside = at < n
        here = (inside & wanted[:, None]) if TAIL else tl.broadcast_to(wanted[:, None], at.shape)
        saved = (inside & fresh[:, None]) if TAIL else tl.broadcast_to(fresh[:, None], at.shape)
        old = tl.load(weight + at, mask=here, other=0.0)
        tl.store(backup + at, old, mask=saved)
        tl.debug_barrier()
        tl.store(marks + blocks, fresh.to(tl.uint8), mask=fresh)
        # Adding a zero would turn -0 into 0.
        moved = old.to(tl.float64) + g.to(tl.float64) * inverse * step
        if TYPE != tl.float64:
            moved = moved.to(tl.float32)
        tl.store(weight + at, tl.where(g != 0, moved.to(TYPE), old), mask=here)


@triton.jit
def _attack(weight, grad, backup, marks, n, inverse, step, TYPE: tl.constexpr):
    whole = n // STEP * STEP
    for start in range(0, whole, STEP):
        _attack_block(weight, grad, backup, marks, start, n, inverse, step, TYPE, False)
    if whole < n:
        _attack_block(weight, grad, backup, marks, whole, n, inverse, step, TYPE, True)


@triton.jit
def _attack_typed(row, first, n, inverse, step, TYPE: tl.constexpr):
    weight, grad, backup = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    marks = tl.load(row + 5).to(tl.pointer_type(tl.uint8)) + first // MARKED
    kind: tl.constexpr = tl.pointer_type(TYPE)
    w, g, b = weight.to(kind) + first, grad.to(kind) + first, backup.to(kind) + first
    if (weight | grad | backup) % 16 == 0:
        w, g, b = tl.multiple_of(w, 16), tl.multiple_of(g, 16), tl.multiple_of(b, 16)
        _attack(w, g, b, marks, n, inverse, step, TYPE)
    else:
        _attack(w, g, b, marks, n, inverse, step, TYPE)


@triton.jit(do_not_specialize=["epsilon_bits", "chunk"])
def _attacks(table, chunks, norms, chunk, epsilon_bits):
    i = tl.program_id(0).to(tl.int64)
    t = tl.load(chunks + 2 * i)
    row = table + t * 6
    scale, s = tl.load(norms + 2 * t), tl.load(norms + 2 * t + 1)
    if (s > 0) & (s < INF):
        first = tl.load(chunks + 2 * i + 1)
        n = tl.minimum(tl.load(row) - first, chunk).to(tl.int32)
        code = tl.load(row + 1)
        inverse, step = 1 / scale, _float64(epsilon_bits) / s
        if code == 0:
            _attack_typed(row, first, n, inverse, step, tl.float32)
        if code == 1:
            _attack_typed(row, first, n, inverse, step, tl.float16)
        if code == 2:
            _attack_typed(row, first, n, inverse, step, tl.bfloat16)
        if code == 3:
            _attack_typed(row, first, n, inverse, step, tl.float64)


def fgm_attack(table, chunks, chunk, epsilon, wide):
    if chunks.shape[0]:
        norms = _norms(table, chunks, chunk, 3, 2.0, False, wide, None)
        _attacks[(chunks.shape[0],)](table, chunks, norms, chunk, _bits(epsilon))


@triton.jit
def _restore_blocks(weight, backup, marks, n):
    for start in range(0, n, BLOCK):
        blocks = start // MARKED + tl.arange(0, BLOCK // MARKED)
        at = blocks[:, None] * MARKED + tl.arange(0, MARKED)[None, :]
        marked = tl.load(marks + blocks, mask=blocks * MARKED < n, other=0) != 0
        if start + BLOCK <= n:
            here = tl.broadcast_to(marked[:, None], at.shape)
            tl.store(weight + at, tl.load(backup + at, mask=here, other=0), mask=here)
        else:
            here = (at < n) & marked[:, None]
            tl.store(weight + at, tl.load(backup + at, mask=here, other=0), mask=here)
        tl.debug_barrier()
        tl.store(marks + blocks, (marked & False).to(tl.uint8), mask=marked)


@triton.jit
def _restore(row, first, n, TYPE: tl.constexpr):
    weight, backup = tl.load(row + 2), tl.load(row + 4)
    marks = tl.load(row + 5).to(tl.pointer_type(tl.uint8)) + first // MARKED
    kind: tl.constexpr = tl.pointer_type(TYPE)
    w, b = weight.to(kind) + first, backup.to(kind) + first
    if (weight | backup) % 16 == 0:
        _restore_blocks(tl.multiple_of(w, 16), tl.multiple_of(b, 16), marks, n)
    else:
        _restore_blocks(w, b, marks, n)


@triton.jit(do_not_specialize=["chunk"])
def _restores(table, chunks, chunk):
    """Bits, not numbers: of integers there are no NaN to be quieted."""
    i = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * i) * 6
    first = tl.load(chunks + 2 * i + 1)
    n = tl.minimum(tl.load(row) - first, chunk).to(tl.int32)
    code = tl.load(row + 1)
    if code == 0:
        _restore(row, first, n, tl.int32)
    if (code == 1) | (code == 2):
        _restore(row, first, n, tl.int16)
    if code == 3:
        _restore(row, first, n, tl.int64)


def fgm_restore(table, chunks, chunk):
    if chunks.shape[0]:
        _restores[(chunks.shape[0],)](table, chunks, chunk)
