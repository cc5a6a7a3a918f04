"""Softmax cross-entropy and its long-tail family in Triton. The formula stands in fastreg/losses.py.

With z = scale·(x + logit_adjustment − margin_y·onehot(y)), v_c = w_c·α_c and nll = logsumexp(z) − z_y, a row's loss is

    (1 − ε)·v_y·(1 − p_y)^γ·nll + ε/C·Σ_c v_c·(logsumexp(z) − z_c) + z_loss·logsumexp(z)²

and its gradient is elementwise in x once three numbers per row, A, B = ε/C and D, are known:

    scale·(A·p_i − B·v_i − D·[i = y])

Bytes     forward: the logits once. Backward: the logits once, the gradient written once. Beside them only vectors
          with one element per row or per class. Ignored rows of contiguous classes are not read.
Launches  forward: 1 when one program can do everything; else rows, then the sum of the programs' losses. Rows that
          are split over programs add a merge. Backward: 1.
Tiles     [rows, classes], one kernel for all layouts. Short rows: several rows per program, from one load. Longer
          rows: a loop over blocks of classes with a running (maximum, sum) per lane, merged once at the end. Few and
          long rows: the blocks are dealt out to several programs. (N, C, D): the rows of a tile are neighbours
          along D, so that accesses are coalesced without a transpose.
Accesses  128 bits when the row pitch is a multiple of 16 bytes, for sizes are passed in units of the vector, which
          shows the compiler their divisibility. Other rows of contiguous classes are peeled: an aligned middle, and
          one small load for both ends.
Numerics  fp32 (fp64 for fp64). Maxima start from a finite number: −inf − (−inf) never arises in blocks, lanes
          or ignored rows of −inf. nll is taken from (maximum − z_y) + log(sum), never below 0; 1 − p_y keeps its
          digits where p_y is near 1. Sums have a fixed order: the same input gives the same bits.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SUM_BLOCK = 1024  # sums of programs that a program of the second stage adds
NONE, MEAN = tl.constexpr(0), tl.constexpr(1)  # reductions; the third is the sum

# The assertion on targets stays on, without one per integer addition. Sizes are plain values, so that the last,
# smaller batch of an epoch compiles nothing: what the compiler must know comes through UNIT.
_kernel = triton.jit(
    debug=True,
    do_not_specialize=["n", "inner", "outer", "classes", "phase", "splits", "blocks_per_split", "ignore_index"]
    + [f"{tensor}_{axis}" for tensor in "xgtrl" for axis in ("outer", "inner", "class")],
)


# ---- one row's mathematics -----------------------------------------------------------------------------------


@triton.jit
def _one_minus_exp(x):
    """1 − eˣ for x ≤ 0. Near 0 the rounding of eˣ is divided out again by its logarithm (Kahan's expm1)."""
    e = tl.exp(x)
    near = (e > 0.5) & (e < 1.0)
    corrected = (1.0 - e) * x / tl.log(tl.where(near, e, 0.5))
    return tl.where(near, corrected, tl.where(e == 1.0, -x, 1.0 - e))


@triton.jit
def _focal(log_p, gamma):
    """(1 − p)^γ, and the factor F of the gradient: d/dz_i of −(1 − p_y)^γ·log p_y is F·(p_i − [i = y]).

    F = u^γ·(1 + γ·p·(−log p)/u) with u = 1 − p. The quotient tends to 1 as p → 1: finite for every γ.
    """
    u = _one_minus_exp(log_p)
    safe = tl.where(u == 0.0, 1.0, u)
    power = tl.where(u == 0.0, 0.0, tl.exp(gamma * tl.log(safe)))
    p = tl.exp(log_p)
    quotient = tl.where(u == 0.0, 1.0, -log_p / safe)
    slope = tl.where(p == 0.0, 0.0, p * quotient)  # at p = 0 the quotient is infinite, the product is not
    return power, power * (1.0 + gamma * slope)


@triton.jit
def _class_factor(weight, alpha, alpha_scale, index, mask, TYPE: tl.constexpr):
    """v_c = w_c·α_c of the classes in `index`."""
    v = tl.zeros_like(index).to(TYPE) + alpha_scale
    if weight is not None:
        v *= tl.load(weight + index, mask=mask, other=0.0).to(TYPE)
    if alpha is not None:
        v *= tl.load(alpha + index, mask=mask, other=0.0).to(TYPE)
    return v


# ---- where a program's rows lie ------------------------------------------------------------------------------


@triton.jit
def _units(inner, classes, x_outer, x_inner, x_class, FAST: tl.constexpr, UNIT: tl.constexpr):
    """Sizes and strides come in units of the vector, so that the compiler sees what they are divisible by."""
    if FAST == "class":
        return inner, classes * UNIT, x_outer * UNIT, x_inner * UNIT, x_class
    return inner * UNIT, classes, x_outer * UNIT, x_inner, x_class * UNIT


@triton.jit
def _rows_of(inner, outer, ROWS: tl.constexpr):
    """The rows of this program, as (outer, inner) index: neighbours along the inner axis; and which exist."""
    blocks = tl.maximum(tl.cdiv(inner, ROWS), 1)
    pid = tl.program_id(0)
    i = (pid % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (pid // blocks).to(tl.int64), i, (i < inner) & (outer > 0)


@triton.jit
def _targets(target, offset, live, classes, ignore_index):
    """Target class per row (0 where there is none), the rows that count, and those whose class exists."""
    y = tl.load(target + offset, mask=live, other=0).to(tl.int64)
    kept = live & (y != ignore_index)
    inside = kept & (y >= 0) & (y < classes)
    tl.device_assert(inside | (kept == 0), "cross_entropy: target out of range")
    return tl.where(inside, y, 0).to(tl.int32), kept, inside


@triton.jit
def _span(base, offset, phase, classes, PEEL: tl.constexpr):
    """Where the aligned part of each row starts, at which class, and how many classes it has."""
    if PEEL:
        head = (PEEL - (phase + offset) % PEEL) % PEEL
        count = tl.multiple_of((classes - head) // PEEL * PEEL, PEEL)
        return tl.multiple_of(base + offset + head, 16), head.to(tl.int32)[:, None], count.to(tl.int32)[:, None]
    else:
        return base + offset, tl.zeros_like(offset).to(tl.int32)[:, None], classes


@triton.jit
def _edges(first, count, classes, PEEL: tl.constexpr):
    """The classes before and after the aligned part, and which of these lanes are in use."""
    lane = tl.arange(0, 2 * PEEL)[None, :]
    c = tl.where(lane < PEEL, lane, classes - 2 * PEEL + lane)
    return c, tl.where(lane < PEEL, lane < first, c >= first + count)


@triton.jit
def _logits(pointer, mask, c, y, adjustment, margin, scale, TYPE: tl.constexpr, SCALED: tl.constexpr):
    """z of a tile; −inf where the mask is off, after every transformation. `margin` is that of the row's target."""
    z = tl.load(pointer, mask=mask, other=float("-inf")).to(TYPE)
    if adjustment is not None:
        z += tl.load(adjustment + c, mask=mask, other=0.0).to(TYPE)
    if margin is not None:
        z -= tl.where(c == y[:, None], margin[:, None], 0.0)
    if SCALED:
        z *= scale
    if SCALED or adjustment is not None:
        z = tl.where(mask, z, float("-inf"))
    return z


@triton.jit
def _target_logit(pointer, inside, y, step, adjustment, margin, scale, TYPE: tl.constexpr, SCALED: tl.constexpr):
    """z_y of each row, from memory; NaN where the class does not exist."""
    z = tl.load(pointer + y.to(tl.int64) * step, mask=inside, other=float("nan")).to(TYPE)
    if adjustment is not None:
        z += tl.load(adjustment + y, mask=inside, other=0.0).to(TYPE)
    if margin is not None:
        z -= margin
    if SCALED:
        z *= scale
    return z


@triton.jit
def _pick(z, mask, c, y):
    return tl.sum(tl.where(mask & (c == y[:, None]), z, 0.0), 1)


@triton.jit
def _deviation(z, pivot, mask, c, weight, alpha, TYPE: tl.constexpr):
    """v_c·(z_c − pivot), 0 where the mask is off. Taken from a pivot, so that large logits keep their digits."""
    d = tl.where(mask, z - pivot, 0.0)
    if weight is not None or alpha is not None:
        v = _class_factor(weight, alpha, 1.0, c, mask, TYPE)
        d = tl.where(v == 0.0, 0.0, d * v)  # a class of factor 0 has no share, were its z −inf
    return d


@triton.jit
def _merge(m, s, m2, s2):
    top = tl.maximum(m, m2)
    return top, s * tl.exp(m - top) + s2 * tl.exp(m2 - top)


# ---- forward -------------------------------------------------------------------------------------------------


@triton.jit
def _finish_rows(
    m, s, deviation, zy, pivot, y, kept, inside, r, rows,
    weight, alpha, v_sum, loss, lse, denominator, partial,
    classes, smoothing, gamma, alpha_scale, z_loss,
    REDUCTION: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, Z_LOSS: tl.constexpr,
    ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """From (maximum, sum) of each row to its loss; then the loss itself, or this program's share of the sum."""
    log_s = tl.log(s)
    nll = (m - zy) + log_s
    term = nll
    if FOCAL:
        power, _ = _focal(-nll, gamma)
        term = power * nll
    factor = _class_factor(weight, alpha, alpha_scale, y, inside, TYPE)
    if SMOOTH:
        factor *= 1.0 - smoothing
    value = tl.where(factor == 0.0, 0.0, factor * term)  # a class without a share has none, were its log p −inf
    if SMOOTH:
        total = tl.full([], 1.0, TYPE) * classes
        if v_sum is not None:
            total = tl.load(v_sum)
        even = total * ((m - pivot) + log_s) - deviation
        value += smoothing / classes * alpha_scale * even
    if Z_LOSS:
        value += z_loss * (m + log_s) * (m + log_s)
    value = tl.where(kept, value, 0.0)
    live = r >= 0
    tl.store(lse + r, tl.where(kept, m, 0.0), mask=live)
    tl.store(lse + rows + r, tl.where(kept, log_s, 0.0), mask=live)
    if REDUCTION == NONE:
        tl.store(loss + r, value.to(loss.dtype.element_ty), mask=live)
        if tl.program_id(0) == 0:
            tl.store(denominator, tl.full([], 1.0, TYPE))
    else:
        count = tl.where(kept, 1.0, 0.0).to(TYPE)
        if weight is not None:
            count *= tl.load(weight + y, mask=inside, other=0.0).to(TYPE)
        if ALONE:
            _write_loss(tl.sum(value), tl.sum(count), loss, denominator, REDUCTION, ZERO_IF_EMPTY)
        else:
            pid = tl.program_id(0)
            tl.store(partial + pid, tl.sum(value))
            tl.store(partial + tl.num_programs(0) + pid, tl.sum(count))


@triton.jit
def _write_loss(total, count, loss, denominator, REDUCTION: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr):
    divisor = count if REDUCTION == MEAN else tl.full([], 1.0, count.dtype)
    if ZERO_IF_EMPTY:
        divisor = tl.where(divisor == 0.0, 1.0, divisor)
    tl.store(denominator, divisor)
    tl.store(loss, (total / divisor).to(loss.dtype.element_ty))


@_kernel
def _forward(
    x, target, weight, alpha, adjustment, margin, v_sum, loss, lse, denominator, partial,
    inner, outer, classes, phase,
    x_outer, x_inner, x_class, t_outer, t_inner, r_outer, r_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    blocks_per_split,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, PEEL: tl.constexpr, TYPE: tl.constexpr,
    REDUCTION: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, SCALED: tl.constexpr,
    Z_LOSS: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """One tile of rows: their losses (WHOLE: the classes fit in one block), or with SPLIT their partial sums."""
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    lowest = tl.full([], LOWEST, TYPE)  # where maxima start: −inf − (−inf) must not arise
    inner, classes, x_outer, x_inner, x_class = _units(inner, classes, x_outer, x_inner, x_class, FAST, UNIT)
    o, i, live = _rows_of(inner, outer, ROWS)
    y, kept, inside = _targets(target, o * t_outer + i * t_inner, live, classes, ignore_index)
    m_y = None
    if margin is not None:
        m_y = tl.load(margin + y, mask=inside, other=0.0).to(TYPE)
    offset = o * x_outer + (i if FAST == "row" else i * x_inner)
    read = live if FAST == "row" else kept  # a mask from memory, along the fast axis, would break the vectors
    start, first, count = _span(x, offset, phase, classes, PEEL)
    lane = tl.arange(0, BLOCK)
    step = lane if FAST == "class" else lane.to(tl.int64) * x_class

    if WHOLE:
        c = first + lane[None, :]
        mask = read[:, None] & (lane[None, :] < count)
        z = _logits(start[:, None] + step[None, :], mask, c, y, adjustment, m_y, scale, TYPE, SCALED)
        m = tl.maximum(tl.max(z, 1), lowest)
        s = tl.sum(tl.exp(z - m[:, None]), 1)
        zy = _pick(z, mask, c, y)
    elif SMOOTH or not SPLIT:
        zy = _target_logit(x + offset, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)
    if PEEL:
        ce, mask_e = _edges(first, count, classes, PEEL)
        mask_e = mask_e & read[:, None]
        if SPLIT:
            mask_e = mask_e & (tl.program_id(1) == 0)
        ze = _logits((x + offset)[:, None] + ce, mask_e, ce, y, adjustment, m_y, scale, TYPE, SCALED)
        m_e = tl.maximum(tl.max(ze, 1), lowest)
        s_e = tl.sum(tl.exp(ze - m_e[:, None]), 1)
        if WHOLE:
            m, s = _merge(m, s, m_e, s_e)
            zy += _pick(ze, mask_e, ce, y)
    if WHOLE:
        zy = tl.where(inside, zy, float("nan"))
    if SMOOTH or not SPLIT:
        pivot = tl.where(tl.abs(zy) <= -lowest, zy, 0.0)

    if WHOLE:
        if SMOOTH:
            deviation = tl.sum(_deviation(z, pivot[:, None], mask, c, weight, alpha, TYPE), 1)
    else:
        ms = tl.full([ROWS, BLOCK // FOLD], lowest, TYPE)
        ss = tl.zeros([ROWS, BLOCK // FOLD], TYPE)
        if SMOOTH:
            ds = tl.zeros([ROWS, BLOCK // FOLD], TYPE)
        begin = tl.program_id(1) * blocks_per_split * BLOCK
        end = tl.minimum(begin + blocks_per_split * BLOCK, classes)
        for b in range(begin, end, BLOCK):
            c = first + (b + lane)[None, :]
            mask = read[:, None] & ((b + lane)[None, :] < count)
            at = b if FAST == "class" else b * x_class.to(tl.int64)
            z = _logits((start + at)[:, None] + step[None, :], mask, c, y, adjustment, m_y, scale, TYPE, SCALED)
            # FOLD elements that one thread holds share a maximum: 1 + 1/FOLD exponentials each, no exchange.
            zf = tl.reshape(z, (ROWS, FOLD, BLOCK // FOLD))
            top = tl.maximum(ms, tl.max(zf, 1))
            ss = ss * tl.exp(ms - top) + tl.sum(tl.exp(zf - top[:, None, :]), 1)
            ms = top
            if SMOOTH:
                d = _deviation(z, pivot[:, None], mask, c, weight, alpha, TYPE)
                ds += tl.sum(tl.reshape(d, (ROWS, FOLD, BLOCK // FOLD)), 1)
        m = tl.max(ms, 1)
        s = tl.sum(ss * tl.exp(ms - m[:, None]), 1)
        if PEEL:
            m, s = _merge(m, s, m_e, s_e)
        if SMOOTH:
            deviation = tl.sum(ds, 1)
    if SMOOTH and PEEL:
        deviation += tl.sum(_deviation(ze, pivot[:, None], mask_e, ce, weight, alpha, TYPE), 1)
    if not SMOOTH:
        deviation = m

    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    if SPLIT:
        at = partial + tl.program_id(1) * rows + r
        plane = tl.num_programs(1) * rows
        tl.store(at, m, mask=live)
        tl.store(at + plane, s, mask=live)
        if SMOOTH:
            tl.store(at + 2 * plane, deviation, mask=live)
    else:
        _finish_rows(m, s, deviation, zy, pivot, y, kept, inside, r, rows, weight, alpha, v_sum, loss, lse, denominator,
                     partial, classes, smoothing, gamma, alpha_scale, z_loss,
                     REDUCTION, SMOOTH, FOCAL, Z_LOSS, ZERO_IF_EMPTY, ALONE, TYPE)  # fmt: skip


@_kernel
def _merge_splits(
    x, target, weight, alpha, adjustment, margin, v_sum, loss, lse, denominator, partial, splits_partial,
    inner, outer, classes, splits,
    x_outer, x_inner, x_class, t_outer, t_inner, r_outer, r_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, TYPE: tl.constexpr, REDUCTION: tl.constexpr, SMOOTH: tl.constexpr,
    FOCAL: tl.constexpr, SCALED: tl.constexpr, Z_LOSS: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr,
    ALONE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Merges the partial sums of rows that several programs read, always in the same order."""
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    lowest = tl.full([], LOWEST, TYPE)  # where maxima start: −inf − (−inf) must not arise
    o, i, live = _rows_of(inner, outer, ROWS)
    y, kept, inside = _targets(target, o * t_outer + i * t_inner, live, classes, ignore_index)
    m_y = None
    if margin is not None:
        m_y = tl.load(margin + y, mask=inside, other=0.0).to(TYPE)
    zy = _target_logit(x + o * x_outer + i * x_inner, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)
    pivot = tl.where(tl.abs(zy) <= -lowest, zy, 0.0)
    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    split = tl.arange(0, SPLITS)[None, :]
    at = splits_partial + split * rows + r[:, None]
    mask = live[:, None] & (split < splits)
    ms = tl.load(at, mask=mask, other=LOWEST)
    m = tl.max(ms, 1)
    s = tl.sum(tl.load(at + splits * rows, mask=mask, other=0.0) * tl.exp(ms - m[:, None]), 1)
    deviation = m
    if SMOOTH:
        deviation = tl.sum(tl.load(at + 2 * splits * rows, mask=mask, other=0.0), 1)
    _finish_rows(m, s, deviation, zy, pivot, y, kept, inside, r, rows, weight, alpha, v_sum, loss, lse, denominator,
                 partial, classes, smoothing, gamma, alpha_scale, z_loss,
                 REDUCTION, SMOOTH, FOCAL, Z_LOSS, ZERO_IF_EMPTY, ALONE, TYPE)  # fmt: skip


@triton.jit
def _sum_partials(
    partial, out, loss, denominator, count, LAST: tl.constexpr, BLOCK: tl.constexpr,
    REDUCTION: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Sums the programs' (loss, weight) pairs, BLOCK of them per program; the last stage, one program, takes all."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, weight = tl.zeros([BLOCK], TYPE), tl.zeros([BLOCK], TYPE)
    for start in range(0, count if LAST else 1, BLOCK):
        mask = start + lane < count
        total += tl.load(partial + start + lane, mask=mask, other=0.0)
        weight += tl.load(partial + count + start + lane, mask=mask, other=0.0)
    if LAST:
        _write_loss(tl.sum(total), tl.sum(weight), loss, denominator, REDUCTION, ZERO_IF_EMPTY)
    else:
        tl.store(out + tl.program_id(0), tl.sum(total))
        tl.store(out + tl.num_programs(0) + tl.program_id(0), tl.sum(weight))


# ---- backward ------------------------------------------------------------------------------------------------


@triton.jit
def _slope(z, c, mask, high, log_sum, y, at_target, a, b, weight, alpha, scale,
           TYPE: tl.constexpr, SMOOTH: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """The gradient of a tile from its rows' numbers."""
    g = a[:, None] * tl.exp((z - high[:, None]) - log_sum[:, None])
    if SMOOTH:
        if weight is None and alpha is None:
            g -= b[:, None]
        else:
            g -= b[:, None] * _class_factor(weight, alpha, 1.0, c, mask, TYPE)
    return tl.where(c == y[:, None], at_target[:, None], g)


@_kernel
def _backward(
    grad_loss, x, target, weight, alpha, adjustment, margin, v_sum, lse, denominator, grad,
    inner, outer, classes, phase,
    x_outer, x_inner, x_class, g_outer, g_inner, g_class, t_outer, t_inner, r_outer, r_inner, l_outer, l_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, PEEL: tl.constexpr, TYPE: tl.constexpr,
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, SCALED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    g_outer, g_inner, g_class = _units(inner, classes, g_outer, g_inner, g_class, FAST, UNIT)[2:]
    inner, classes, x_outer, x_inner, x_class = _units(inner, classes, x_outer, x_inner, x_class, FAST, UNIT)
    o, i, live = _rows_of(inner, outer, ROWS)
    y, kept, inside = _targets(target, o * t_outer + i * t_inner, live, classes, ignore_index)
    m_y = None
    if margin is not None:
        m_y = tl.load(margin + y, mask=inside, other=0.0).to(TYPE)
    offset = o * x_outer + (i if FAST == "row" else i * x_inner)
    to = o * g_outer + (i if FAST == "row" else i * g_inner)
    read = live if FAST == "row" else kept
    start, first, count = _span(x, offset, phase, classes, PEEL)
    out, _, _ = _span(grad, to, phase, classes, PEEL)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = first + col[None, :]
    inside_row = col[None, :] < count
    mask = read[:, None] & inside_row
    if FAST == "class":
        step, out_step = col, col
    else:
        step, out_step = col.to(tl.int64) * x_class, col.to(tl.int64) * g_class
    z = _logits(start[:, None] + step[None, :], mask, c, y, adjustment, m_y, scale, TYPE, SCALED)
    if PEEL:
        ce, edge = _edges(first, count, classes, PEEL)
        edge = edge & (tl.program_id(1) == 0)
        mask_e = edge & read[:, None]
        ze = _logits((x + offset)[:, None] + ce, mask_e, ce, y, adjustment, m_y, scale, TYPE, SCALED)
    if WHOLE:
        zy = _pick(z, mask, c, y)
        if PEEL:
            zy += _pick(ze, mask_e, ce, y)
        zy = tl.where(inside, zy, float("nan"))
    else:
        zy = _target_logit(x + offset, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)

    # a·p_i − b·v_i, and at the target a·p_y − b·v_y − d with the digits that p_y − 1 would lose
    lse += o * r_outer + i * r_inner
    high = tl.load(lse, mask=live, other=0.0)
    log_sum = tl.load(lse + outer.to(tl.int64) * inner, mask=live, other=0.0)
    g = tl.load(grad_loss + o * l_outer + i * l_inner, mask=live, other=0.0).to(TYPE)
    g = g / tl.load(denominator) * scale
    log_p = (zy - high) - log_sum
    v_y = _class_factor(weight, alpha, alpha_scale, y, inside, TYPE)
    d = g * v_y
    if FOCAL:
        _, factor = _focal(log_p, gamma)
        d *= factor
    b = tl.zeros_like(d)
    rest = tl.zeros_like(d)
    if SMOOTH:
        d *= 1.0 - smoothing
        b = g * smoothing / classes * alpha_scale
        total = tl.full([], 1.0, TYPE) * classes
        if v_sum is not None:
            total = tl.load(v_sum)
        rest += b * total
    if Z_LOSS:
        rest += g * 2.0 * z_loss * (high + log_sum)
    at_target = rest * tl.exp(log_p) - d * _one_minus_exp(log_p)
    if SMOOTH:
        at_target -= b * _class_factor(weight, alpha, 1.0, y, inside, TYPE)
    a = d + rest

    dx = _slope(z, c, mask, high, log_sum, y, at_target, a, b, weight, alpha, scale, TYPE, SMOOTH, SCALED)
    dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
    tl.store(out[:, None] + out_step[None, :], dx, mask=live[:, None] & inside_row)
    if PEEL:
        dx = _slope(ze, ce, mask_e, high, log_sum, y, at_target, a, b, weight, alpha, scale, TYPE, SMOOTH, SCALED)
        dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
        tl.store((grad + to)[:, None] + ce, dx, mask=live[:, None] & edge)


# ---- sigmoid focal loss --------------------------------------------------------------------------------------
# Elementwise: one read of the logits (and of dense targets) forward, one more and one write backward. Class indices
# are compared with each element's class: the one-hot target is never in memory. The mathematics is that of any t
# between 0 and 1; with a t of 0 or 1 nothing in it cancels.


@triton.jit
def _sigmoid_focal_terms(x, t, gamma, alpha, FOCAL: tl.constexpr, SQUARE: tl.constexpr, BALANCED: tl.constexpr):
    """α_t·(1 − p_t)^γ·ce and its derivative by x."""
    e = tl.exp(-tl.abs(x))
    total = 1.0 + e
    rest = total - 1.0  # what is left of e after rounding: log1p by dividing it out again
    log1p = tl.where(rest == 0.0, e, tl.log(total) * (e / tl.where(rest == 0.0, 1.0, rest)))
    larger, smaller = 1.0 / total, e / total
    p, q = tl.where(x >= 0.0, larger, smaller), tl.where(x >= 0.0, smaller, larger)
    other = 1.0 - t
    positive = tl.where(t == 0.0, 0.0, t * (tl.where(x > 0.0, 0.0, -x) + log1p))
    negative = tl.where(other == 0.0, 0.0, other * (tl.where(x < 0.0, 0.0, x) + log1p))
    value = positive + negative
    slope = other * p - t * q
    if FOCAL:
        u = t * q + other * p  # 1 − p_t
        safe = tl.where(u == 0.0, 1.0, u)
        if SQUARE:
            power = u * u
        else:
            power = tl.where(u == 0.0, 0.0, tl.exp(gamma * tl.log(safe)))
        ratio = tl.where(u == 0.0, 1.0, p * q / safe)  # tends to p_t where u vanishes
        slope += gamma * (other - t) * tl.where(ratio == 0.0, 0.0, ratio * value)
        value *= power
        slope *= power
    if BALANCED:
        balance = t * alpha + other * (1.0 - alpha)
        value *= balance
        slope *= balance
    return value, slope


@_kernel
def _sigmoid_focal(
    x, target, weight, normalizer, grad_loss, out, n, gamma: tl.float64, alpha: tl.float64, factor: tl.float64,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, TYPE: tl.constexpr, INDEX: tl.constexpr,
    BACKWARD: tl.constexpr, REDUCE: tl.constexpr, FOCAL: tl.constexpr, SQUARE: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """A block's terms: their sum (REDUCE), the terms themselves, or (BACKWARD) their gradient."""
    gamma, alpha, factor = tl.full([], gamma, TYPE), tl.full([], alpha, TYPE), tl.full([], factor, TYPE)
    if BACKWARD and REDUCE:
        factor = _divided(factor * tl.load(grad_loss).to(TYPE), normalizer, TYPE)
    whole = tl.multiple_of(n // VECTOR * VECTOR, VECTOR)
    total = tl.zeros([], TYPE)
    for tail in tl.static_range(2):  # whole vectors, then what is left over
        if tail:
            i = whole + tl.arange(0, VECTOR)
            mask = (i < n) & (tl.program_id(0) == 0)
        else:
            i = tl.program_id(0).to(n.dtype) * BLOCK + tl.arange(0, BLOCK)
            mask = i < whole
        if INDEX:
            y = tl.load(target + i // CLASSES, mask=mask, other=0).to(tl.int64)
            t = tl.where(y == i % CLASSES, 1.0, 0.0).to(TYPE)
        else:
            t = tl.load(target + i, mask=mask, other=0.0).to(TYPE)
        z = tl.load(x + i, mask=mask, other=0.0).to(TYPE)
        value, slope = _sigmoid_focal_terms(z, t, gamma, alpha, FOCAL, SQUARE, BALANCED)
        result = slope if BACKWARD else value
        if weight is not None:
            result *= tl.load(weight + i % CLASSES, mask=mask, other=0.0).to(TYPE)
        if BACKWARD and not REDUCE:
            result *= tl.load(grad_loss + i, mask=mask, other=0.0).to(TYPE)
        if REDUCE and not BACKWARD:
            total += tl.sum(tl.where(mask, result, 0.0))
        else:
            tl.store(out + i, (result * factor).to(out.dtype.element_ty), mask=mask)
    if REDUCE and not BACKWARD:
        tl.store(out + tl.program_id(0), total)


@triton.jit
def _divided(value, normalizer, TYPE: tl.constexpr):
    if normalizer is not None:
        divisor = tl.load(normalizer).to(TYPE)
        value = value / tl.where(divisor == 0.0, 1.0, divisor)
    return value


@triton.jit
def _sum(partial, normalizer, out, count, factor: tl.float64, BLOCK: tl.constexpr, LAST: tl.constexpr,
         TYPE: tl.constexpr):  # fmt: skip
    """Sums of BLOCK programs; the last stage, one program, takes all, scales and divides."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], TYPE)
    for start in range(0, count if LAST else 1, BLOCK):
        total += tl.load(partial + start + lane, mask=start + lane < count, other=0.0)
    result = tl.sum(total)
    if LAST:
        result = _divided(result * tl.full([], factor, TYPE), normalizer, TYPE)
    tl.store(out + tl.program_id(0), result.to(out.dtype.element_ty))


# ---- launching -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a tile [rows, classes] lies over (N, C, D): the rows of a tile are neighbours along `inner`."""

    inner_dim: int  # 0 or 2 of (N, C, D)
    fast: str  # "class" or "row": the axis along which memory is contiguous; "none" if neither is
    unit: int  # all sizes and strides along the other axes are multiples of this many elements
    peel: int  # elements of a vector, where rows of contiguous classes start anywhere; else 0
    phase: int  # elements by which the base address lies past a multiple of 16 bytes


def _layout(tensors: list[torch.Tensor]) -> _Layout:
    """The layout that serves all of `tensors`, each (N, C, D) and of one dtype."""
    x = tensors[0]
    n, classes, d = x.shape
    vector = 16 // x.element_size()
    phases = {t.data_ptr() % 16 // t.element_size() for t in tensors}
    by_row = d > 1 and all(t.stride(2) <= t.stride(1) for t in tensors)
    by_class = not by_row and all(t.stride(1) == 1 or classes == 1 for t in tensors)
    inner_dim = 2 if by_row or d > n else 0
    if by_row and all(t.stride(2) == 1 for t in tensors):
        pitches = [size for t in tensors for size in (*t.stride()[:2], d)]
        return _Layout(2, "row", math.gcd(*pitches, vector) if phases == {0} else 1, 0, 0)
    if by_class:
        pitches = [size for t in tensors for size in (t.stride(0), t.stride(2) if d > 1 else 0, classes)]
        unit = math.gcd(*pitches, vector) if phases == {0} else 1
        alike = len(phases) == 1 and len({t.stride() for t in tensors}) == 1
        if unit < vector and classes >= 4 * vector and alike:
            return _Layout(inner_dim, "class", 1, vector, phases.pop())
        return _Layout(inner_dim, "class", unit, 0, 0)
    return _Layout(inner_dim, "none", 1, 0, 0)


@dataclass(frozen=True)
class _Tile:
    rows: int
    block: int  # classes
    whole: bool  # the classes fit in one block
    warps: int
    splits: int  # programs that share a row's blocks
    fold: int = 1  # strips of a block that lie in one thread, one below the other, as vectors of 16 bytes


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tile(
    layout: _Layout, inner: int, outer: int, classes: int, itemsize: int, limit: int, thin: bool = False
) -> _Tile:
    """Block sizes from arithmetic; nothing here has been tuned on a GPU yet.

    Enough bytes must be under way to hide memory latency: 64 per thread, in four vectors, times the 2,048 threads of a
    multiprocessor are 128 KB, three times what Little's law asks for. So a tile holds 64 bytes per thread: at most
    `limit` bytes (16 KB: 8 warps), less where there are too few rows to give every multiprocessor two programs. Rows
    that lie side by side in memory make lines of 128 bytes.
    Longer rows are read in blocks of `limit`, and dealt out to several programs if rows are few. `thin` halves what a
    thread holds, for loops that read per-class vectors beside the logits and would run out of registers.
    """
    width = _power_of_2(classes)
    lanes = 1 if layout.fast != "row" else min(_power_of_2(inner), 128 // itemsize)
    wanted = 2 * _multiprocessors()
    if lanes * width * itemsize > limit:
        block = max(1, limit // (lanes * itemsize * (2 if thin else 1)))
        programs = -(-inner // lanes) * outer
        blocks = -(-classes // block)
        splits = min(blocks, max(1, wanted // max(1, programs)), 1024)
        return _Tile(lanes, block, False, max(1, limit // 2048), splits, min(2 if thin else 4, block))
    rows = lanes
    total = inner * outer
    while rows < inner and 2 * rows * width * itemsize <= limit // 2 and total > 2 * rows * wanted:
        rows *= 2
    if total * width * itemsize <= limit and outer == 1:
        rows = _power_of_2(max(1, inner))  # one program does it all, and no second launch is needed
    return _Tile(rows, width, True, min(8, max(1, rows * width * itemsize // 2048)), 1)


@functools.cache
def _multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def _vectors(weight, alpha, logit_adjustment, margin, label_smoothing, accumulate):
    """The per-class vectors, contiguous, and the sum of v_c (without alpha's scalar) if smoothing asks for it."""
    vectors = [v if v is None else v.contiguous() for v in (weight, alpha, logit_adjustment, margin)]
    factors = [v.to(accumulate) for v in vectors[:2] if v is not None]
    if not (label_smoothing and factors):
        return *vectors, None
    return *vectors, math.prod(factors).sum()


def _strides(tensor, inner_dim):
    """(outer, inner) strides of an (N, D) tensor, or of an (N, C, D) one and its stride of the classes."""
    steps = list(tensor.stride())
    classes = [steps.pop(1)] if tensor.dim() == 3 else []
    return (*(steps if inner_dim == 2 else steps[::-1]), *classes)


def _in_units(strides, layout):
    outer, inner, classes = strides
    if layout.fast == "class":
        return outer // layout.unit, inner // layout.unit, classes
    return outer // layout.unit, inner, classes // layout.unit


def _check_options(other_target, target):
    if other_target is not None or target.is_floating_point():
        raise NotImplementedError("the Triton kernels take one class index per row")


def _accumulate(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _triton_type(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 2 else t.unsqueeze(1)


def _classes(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 3 else t.unsqueeze(2)


def cross_entropy_forward(
    input, target, weight, alpha, logit_adjustment, margin, other_target, share,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, fp32_loss,
):  # fmt: skip
    _check_options(other_target, target)
    accumulate = _accumulate(input)
    rows = [input.shape[0], *input.shape[2:]]
    loss = input.new_empty([] if reduction else rows, dtype=accumulate if fp32_loss else input.dtype)
    lse = input.new_empty([2, *rows], dtype=accumulate)
    denominator = input.new_empty([], dtype=accumulate)

    x, target = _classes(input), _rows(target)
    layout = _layout([x])
    classes, inner, outer = x.shape[1], x.shape[layout.inner_dim], x.shape[2 - layout.inner_dim]
    thin = logit_adjustment is not None or (label_smoothing != 0 and (weight is not None or alpha is not None))
    tile = _tile(layout, inner, outer, classes, input.element_size(), limit=16384, thin=thin)
    blocks = max(1, -(-inner // tile.rows)) * max(1, outer)
    split = tile.splits > 1
    merge_rows = 16
    programs = max(1, -(-inner // merge_rows)) * max(1, outer) if split else blocks
    alone = programs == 1
    empty = functools.partial(torch.empty, dtype=accumulate, device=input.device)
    partial = None if alone or reduction == 0 else empty(2, programs)
    parts = empty(2 + bool(label_smoothing), tile.splits, outer * inner) if split else None

    *vectors, v_sum = _vectors(weight, alpha, logit_adjustment, margin, label_smoothing, accumulate)
    strides = _strides(x, layout.inner_dim)
    rows_strides = (*_strides(target, layout.inner_dim), *_strides(_rows(lse[0]), layout.inner_dim))
    options = (ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss)
    flags = dict(
        TYPE=_triton_type(accumulate),
        REDUCTION=reduction, SMOOTH=label_smoothing != 0, FOCAL=gamma != 0, SCALED=scale != 1, Z_LOSS=z_loss != 0,
        ZERO_IF_EMPTY=zero_if_empty, ALONE=alone, LOWEST=torch.finfo(accumulate).min,
    )  # fmt: skip
    unit = layout.unit
    sizes = (inner, outer, classes // unit) if layout.fast == "class" else (inner // unit, outer, classes)
    class_blocks = -(-classes // tile.block)
    with torch.cuda.device_of(input):
        _forward[(blocks, tile.splits)](
            x, target, *vectors, v_sum, loss, lse, denominator, parts if split else partial,
            *sizes, layout.phase, *_in_units(strides, layout), *rows_strides, *options,
            -(-class_blocks // tile.splits),
            ROWS=tile.rows, BLOCK=tile.block, FOLD=tile.fold, WHOLE=tile.whole, SPLIT=split,
            FAST=layout.fast, UNIT=unit, PEEL=layout.peel, **flags, num_warps=tile.warps, sanitize_overflow=False,
        )  # fmt: skip
        if split:
            _merge_splits[(programs,)](
                x, target, *vectors, v_sum, loss, lse, denominator, partial, parts,
                inner, outer, classes, tile.splits, *strides, *rows_strides, *options,
                ROWS=merge_rows, SPLITS=_power_of_2(tile.splits), **flags, num_warps=4, sanitize_overflow=False,
            )  # fmt: skip
        if partial is not None:

            def add(partial, out, programs, last):
                _sum_partials[(programs,)](
                    partial, out, loss, denominator, partial.shape[1], LAST=last, BLOCK=SUM_BLOCK,
                    REDUCTION=reduction, ZERO_IF_EMPTY=zero_if_empty, TYPE=flags["TYPE"], num_warps=4,
                )  # fmt: skip

            _in_stages(add, partial, None)
    return loss, lse, denominator


def _in_stages(add, partial, out):
    """Sums `partial` along its last dimension into `out`, in a fixed order: by SUM_BLOCK, then in one program."""
    while partial.shape[-1] > 16 * SUM_BLOCK:  # what one program sums in a few microseconds
        programs = -(-partial.shape[-1] // SUM_BLOCK)
        stage = partial.new_empty(*partial.shape[:-1], programs)
        add(partial, stage, programs, False)
        partial = stage
    add(partial, out, 1, True)


def cross_entropy_backward(
    grad_loss, input, target, weight, alpha, logit_adjustment, margin, other_target, share, lse, denominator,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss,
):  # fmt: skip
    _check_options(other_target, target)
    grad_input = torch.empty_like(input)
    if input.numel() == 0:
        return grad_input
    accumulate = lse.dtype
    x, grad, target = _classes(input), _classes(grad_input), _rows(target)
    layout = _layout([x, grad])
    classes, inner, outer = x.shape[1], x.shape[layout.inner_dim], x.shape[2 - layout.inner_dim]
    tile = _tile(layout, inner, outer, classes, input.element_size(), limit=8192)
    blocks = -(-inner // tile.rows) * outer
    *vectors, v_sum = _vectors(weight, alpha, logit_adjustment, margin, label_smoothing, accumulate)
    unit = layout.unit
    sizes = (inner, outer, classes // unit) if layout.fast == "class" else (inner // unit, outer, classes)
    with torch.cuda.device_of(input):
        _backward[(blocks, -(-classes // tile.block))](
            grad_loss, x, target, *vectors, v_sum, lse, denominator, grad, *sizes, layout.phase,
            *_in_units(_strides(x, layout.inner_dim), layout),
            *_in_units(_strides(grad, layout.inner_dim), layout),
            *_strides(target, layout.inner_dim),
            *_strides(_rows(lse[0]), layout.inner_dim),
            *((0, 0) if reduction else _strides(_rows(grad_loss), layout.inner_dim)),
            ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss,
            ROWS=tile.rows, BLOCK=tile.block, WHOLE=tile.whole,
            FAST=layout.fast, UNIT=unit, PEEL=layout.peel,
            TYPE=_triton_type(accumulate),
            SMOOTH=label_smoothing != 0, FOCAL=gamma != 0, SCALED=scale != 1, Z_LOSS=z_loss != 0,
            num_warps=tile.warps, sanitize_overflow=False,
        )  # fmt: skip
    return grad_input


def _sigmoid_launch(x, target, weight, normalizer, grad_loss, out, alpha, gamma, reduce, factor):
    """Launches over all elements of x, which is contiguous like everything else here."""
    vector = 16 // x.element_size()
    block = 512 * vector  # 64 bytes per thread of four warps
    index = target.dim() == 1
    with torch.cuda.device_of(x):
        _sigmoid_focal[(-(-x.numel() // block),)](
            x, target, weight, normalizer, grad_loss, out, x.numel(), gamma, alpha, factor,
            CLASSES=x.shape[1] if index or weight is not None else 1, BLOCK=block, VECTOR=vector,
            TYPE=_triton_type(_accumulate(x)), INDEX=index, BACKWARD=grad_loss is not None, REDUCE=reduce,
            FOCAL=gamma != 0, SQUARE=gamma == 2, BALANCED=alpha >= 0, num_warps=4, sanitize_overflow=False,
        )  # fmt: skip
    return block


def sigmoid_focal_forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss):
    accumulate = _accumulate(input)
    loss_dtype = accumulate if fp32_loss else input.dtype
    x, target = input.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    if not reduce:
        loss = input.new_empty(input.shape, dtype=loss_dtype)
        if x.numel():
            _sigmoid_launch(x, target, weight, None, None, loss, alpha, gamma, False, scale)
        return loss
    programs = -(-x.numel() // (512 * 16 // x.element_size()))
    partial = x.new_empty(programs, dtype=accumulate)
    if x.numel():
        _sigmoid_launch(x, target, weight, None, None, partial, alpha, gamma, True, 1.0)
    loss = input.new_empty([], dtype=loss_dtype)

    def add(partial, out, programs, last):
        _sum[(programs,)](
            partial, normalizer, out, partial.shape[-1], scale, BLOCK=SUM_BLOCK, LAST=last,
            TYPE=_triton_type(accumulate), num_warps=4,
        )  # fmt: skip

    with torch.cuda.device_of(input):
        _in_stages(add, partial, loss)
    return loss


def sigmoid_focal_backward(grad_loss, input, target, weight, normalizer, alpha, gamma, reduce, scale):
    grad = torch.empty_like(input)
    if input.numel():
        x, target = input.contiguous(), target.contiguous()
        weight = None if weight is None else weight.contiguous()
        out = grad if grad.is_contiguous() else torch.empty_like(x)
        grad_loss = grad_loss if reduce else grad_loss.contiguous()
        _sigmoid_launch(x, target, weight, normalizer, grad_loss, out, alpha, gamma, reduce, scale)
        if out is not grad:
            grad.copy_(out)
    return grad
