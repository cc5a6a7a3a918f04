"""Softmax cross-entropy and its long-tail family in Triton. The formula stands in fastreg/losses.py.

With z = scale·(x + logit_adjustment − margin_y·onehot(y)), v_c = w_c·α_c and nll = logsumexp(z) − z_y, a row's loss is

    (1 − ε)·v_y·(1 − p_y)^γ·nll + ε/C·Σ_c v_c·(logsumexp(z) − z_c) + z_loss·logsumexp(z)²

and its gradient is elementwise in x once three numbers per row, A, B = ε/C and D, are known:

    scale·(A·p_i − B·v_i − D·[i = y])

A second target brings a term like that of the first, and a D of its own. Where every class has a share q_c of its own,
in probabilities and in smoothing with γ, the gradient is scale·(S·p_i − q_i·v_i·F_i), F_c being the focal slope of
class c and S = Σ_c q_c·v_c·F_c, known only after logsumexp(z): rows that fit on a chip wait there in the forward
for their loss and S, longer ones are read a second time.

Bytes     forward: the logits (and probabilities) once. Backward: the logits once, the gradient written once. The
          gradient in the forward: the logits once, or, if a row is too long to stay on the chip, once more right after
          the first time, from L2; and the gradient written once. Beside them only vectors with one element per row or
          per class. Ignored rows of contiguous classes are not read.
Launches  forward: 1 when one program can do everything; else rows, then the sum of the programs' losses. Rows that
          are split over programs add a merge. Backward: 1. The gradient in the forward: what the rows count in the
          mean, ahead of all. Long rows in which every class has a share: in the forward their sums, and the losses.
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
NOWHERE = tl.constexpr(2**31 - 1)  # a class above all others
SHORT = tl.constexpr(128)  # classes among which the target's logit is picked; of more, its load costs less than looking
RESIDENT = 16384  # elements of a row that is kept in registers to be used twice
# The assertion on targets stays on, without one per integer addition. Sizes are plain values, so that the last,
# smaller batch of an epoch compiles nothing: what the compiler must know comes through UNIT.
_kernel = triton.jit(
    debug=True,
    do_not_specialize=["n", "inner", "outer", "classes", "phase", "splits", "blocks_per_split", "ignore_index"]
    + [f"{tensor}_{axis}" for tensor in "xgtosrl" for axis in ("outer", "inner", "class", "gap")],
)


# ---- one row's mathematics -----------------------------------------------------------------------------------


@triton.jit
def _flushed_exp(x):
    """eˣ of what is added to greater numbers: 0 where it is subnormal, which tl.exp spends three instructions on."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)


@triton.jit
def _one_minus_exp(x):
    """1 − eˣ for x ≤ 0. Near 0, where the difference would have no digits, −x·(1 + x/2·(1 + x/3·(1 + …)))."""
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9  # what is left out is below 0.7^TERMS/(TERMS + 1)!
    near = tl.maximum(x, -0.7)
    series = 1.0 + near * (1.0 / TERMS)
    for k in tl.static_range(1, TERMS - 1):
        series = 1.0 + series * near * (1.0 / (TERMS - k))
    return tl.where(x > -0.7, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _focal(log_p, gamma):
    """(1 − p)^γ, and the factor F of the gradient: d/dz_i of −(1 − p_y)^γ·log p_y is F·(p_i − [i = y]).

    F = u^γ·(1 + γ·p·(−log p)/u) with u = 1 − p. The quotient tends to 1 as p → 1: finite for every γ.
    """
    u = _one_minus_exp(log_p)
    floor = tl.maximum(u, 1e-30)  # of 1 or of its last digits, or of 0: then the power, which is 0, is all that counts
    power = tl.where(u == 0.0, 0.0, tl.exp(gamma * tl.log(floor)))
    slope = tl.exp(log_p) * (tl.minimum(-log_p, 1e30) / floor)  # 0 at p = 0, where the quotient would be infinite
    return power, power * (1.0 + gamma * slope)


@triton.jit
def _class_factor(factor, alpha_scale, index, mask, TYPE: tl.constexpr):
    """v_c = w_c·α_c of the classes in `index`; `factor` holds what of it is per class."""
    v = tl.zeros_like(index).to(TYPE) + alpha_scale
    if factor is not None:
        v *= tl.load(factor + index, mask=mask, other=0.0).to(TYPE)
    return v


# ---- where a program's rows lie ------------------------------------------------------------------------------


@triton.jit
def _units(inner, classes, x_outer, x_inner, x_class, FAST: tl.constexpr, UNIT: tl.constexpr):
    """Sizes and strides come in units of the vector, so that the compiler sees what they are divisible by."""
    x_outer, x_inner, x_class = x_outer.to(tl.int64), x_inner.to(tl.int64), x_class.to(tl.int64)
    if FAST == "class":
        return inner, classes * UNIT, x_outer * UNIT, x_inner * UNIT, x_class
    return inner * UNIT, classes, x_outer * UNIT, x_inner, x_class * UNIT


@triton.jit
def _rows_of(pid, inner, outer, ROWS: tl.constexpr):
    """The rows of a program, as (outer, inner) index: neighbours along the inner axis; and which exist."""
    blocks = tl.maximum(tl.cdiv(inner, ROWS), 1)
    i = (pid % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (pid // blocks).to(tl.int64), i, (i < inner) & (outer > 0)


@triton.jit
def _load_class(pointer, live, classes, ignore_index):
    """The class that each row names, which rows count, and of which rows that class exists."""
    y = tl.load(pointer, mask=live, other=0).to(tl.int64)
    kept = live & (y != ignore_index)
    return y, kept, kept & (y >= 0) & (y < classes)


@triton.jit
def _targets(target, other, share, margin, at, other_at, share_at, live, classes, ignore_index,
             TYPE: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """Of each row: its target class (0 where there is none), the other one, the share of the first, what the margin
    takes off the logits of both; which rows count, and of which the classes exist. What a call does not have is 0, for
    Triton 3.6 cannot return None: `other` says whether there are two."""
    y2 = tl.zeros_like(at).to(tl.int32)
    zero = y2.to(TYPE)
    m, m2, s = zero, zero, zero
    if PROBS:
        y, kept, inside = tl.zeros_like(at).to(tl.int32) - 1, live, live
    else:
        y, kept, inside = _load_class(target + at, live, classes, ignore_index)
        if other is not None:
            y2, kept2, inside2 = _load_class(other + other_at, live, classes, ignore_index)
            kept, inside = kept & kept2, inside & inside2
            y2 = tl.where(inside, y2, 0).to(tl.int32)
            s = tl.load(share + share_at, mask=live, other=0.0).to(TYPE)
        tl.device_assert(inside | (kept == 0), "cross_entropy: target out of range")
        y = tl.where(inside, y, 0).to(tl.int32)
        if margin is not None:
            m = tl.load(margin + y, mask=inside, other=0.0).to(TYPE)
            if other is not None:
                m *= s
                m2 = (1.0 - s) * tl.load(margin + y2, mask=inside, other=0.0).to(TYPE)
                both = y == y2
                m, m2 = tl.where(both, m + m2, m), tl.where(both, m + m2, m2)
    return y, y2, s, m, m2, kept, inside


@triton.jit
def _count(kept, inside, y, y2, s, weight, TYPE: tl.constexpr, PROBS: tl.constexpr):
    """What each row counts in a mean."""
    count = tl.where(kept, 1.0, 0.0).to(TYPE)
    if weight is not None and not PROBS:
        w = tl.load(weight + y, mask=inside, other=0.0).to(TYPE)
        if y2 is not None:
            w2 = tl.load(weight + y2, mask=inside, other=0.0).to(TYPE)
            w = tl.where(s == 0.0, 0.0, s * w) + tl.where(s == 1.0, 0.0, (1.0 - s) * w2)
        count *= w
    return count


@triton.jit
def _span(base, offset, phase, classes, PEEL: tl.constexpr):
    """Where the aligned part of each row starts, at which class, and how many classes it has. The class comes in 64
    bits, so that what is loaded of each class from there on has one address, and not one per element; what is compared
    with a target is counted from there, in 32 bits."""
    if PEEL:
        head = (PEEL - (phase + offset) % PEEL) % PEEL
        count = tl.multiple_of((classes - head) // PEEL * PEEL, PEEL)
        return tl.multiple_of(base + offset + head, 16), head, count.to(tl.int32)[:, None]
    else:
        return base + offset, tl.zeros_like(offset).to(tl.int32), classes


@triton.jit
def _edges(first, count, classes, PEEL: tl.constexpr, EDGE: tl.constexpr):
    """The classes before and after the aligned part, and which of these EDGE lanes are in use."""
    lane = tl.arange(0, EDGE)[None, :]
    c = tl.where(lane < PEEL, lane, classes - 2 * PEEL + lane)
    return c, tl.where(lane < PEEL, lane < first[:, None], (c >= first[:, None] + count) & (c < classes))


@triton.jit
def _load(pointer, mask, TYPE: tl.constexpr):
    return tl.load(pointer, mask=mask, other=float("-inf")).to(TYPE)


@triton.jit
def _probabilities(target, offset, phase, classes, column, step, mask, FAST: tl.constexpr, PEEL: tl.constexpr,
                   TYPE: tl.constexpr, WANTED: tl.constexpr):  # fmt: skip
    """The target's tile, where it is WANTED; else anything."""
    if WANTED:
        start, _, _ = _span(target, offset, phase, classes, PEEL)
        at = column if FAST == "class" else column.to(tl.int64) * step
        return tl.load(start[:, None] + at[None, :], mask=mask, other=0.0).to(TYPE)
    else:
        return mask


@triton.jit
def _probability_edges(target, offset, c, mask, TYPE: tl.constexpr, WANTED: tl.constexpr):
    if WANTED:
        return tl.load((target + offset)[:, None] + c, mask=mask, other=0.0).to(TYPE)
    else:
        return mask


@triton.jit
def _adjust(z, mask, c, k, y, y2, q, adjustment, margin, m_y, m_y2, scale, TYPE: tl.constexpr, SCALED: tl.constexpr,
            PROBS: tl.constexpr):  # fmt: skip
    """From a tile of x to z; −inf where the mask is off, after every transformation. `c` are the tile's classes, `k`
    the same as `y` counts them."""
    if adjustment is not None:
        z += tl.load(adjustment + c, mask=mask, other=0.0).to(TYPE)
    if margin is not None:
        if PROBS:
            z -= q * tl.load(margin + c, mask=mask, other=0.0).to(TYPE)
        else:
            if y2 is not None:
                z -= tl.where((k == y2[:, None]) & (k != y[:, None]), m_y2[:, None], 0.0)
            z -= tl.where(k == y[:, None], m_y[:, None], 0.0)
    if SCALED:
        z *= scale
    if SCALED or adjustment is not None or (PROBS and margin is not None):
        z = tl.where(mask, z, float("-inf"))
    return z


@triton.jit
def _pick(z, mask, k, y):
    return tl.sum(tl.where(mask & (k == y[:, None]), z, 0.0), 1)


@triton.jit
def _target_logit(pointer, inside, y, step, adjustment, m_y, scale, TYPE: tl.constexpr, SCALED: tl.constexpr):
    """z of a target of each row, from memory; NaN where the class does not exist."""
    z = tl.load(pointer + y.to(tl.int64) * step, mask=inside, other=float("nan")).to(TYPE)
    if adjustment is not None:
        z += tl.load(adjustment + y, mask=inside, other=0.0).to(TYPE)
    z -= m_y
    if SCALED:
        z *= scale
    return z


@triton.jit
def _deviation(z, pivot, mask, c, factor, TYPE: tl.constexpr):
    """v_c·(z_c − pivot), 0 where the mask is off. Taken from a pivot, so that large logits keep their digits."""
    d = tl.where(mask, z - pivot, 0.0)
    if factor is not None:
        v = _class_factor(factor, 1.0, c, mask, TYPE)
        d = tl.where(v == 0.0, 0.0, d * v)  # a class of factor 0 has no share, were its z −inf
    return d


@triton.jit
def _merge(m, s, m2, s2):
    top = tl.maximum(m, m2)
    return top, s * _flushed_exp(m - top) + s2 * _flushed_exp(m2 - top)


@triton.jit
def _largest(x, c, NOWHERE: tl.constexpr):
    """The largest x of each row and the lowest class that has it. (NaN is no candidate.)"""
    x = _without_nan(x)
    top = tl.max(x, 1)
    return top, tl.min(tl.where(x == top[:, None], c.to(tl.int32), NOWHERE), 1)


@triton.jit
def _without_nan(x):
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _larger(x, c, x2, c2):
    return tl.maximum(x, x2), tl.where((x2 > x) | ((x2 == x) & (c2 < c)), c2, c)


# ---- rows whose every class has a share of its own: probabilities, or smoothing with gamma --------------------------


@triton.jit
def _shares(q, c, k, mask, y, y2, s, factor, alpha_scale, smoothing, classes, TYPE: tl.constexpr,
            SMOOTH: tl.constexpr, PROBS: tl.constexpr):  # fmt: skip
    """q_c·v_c of a tile, 0 where the mask is off."""
    if not PROBS:
        if y2 is None:
            q = tl.where(k == y[:, None], 1.0, 0.0).to(TYPE)
        else:
            q = tl.where(k == y[:, None], s[:, None], 0.0)
            q = tl.where(k == y2[:, None], q + (1.0 - s)[:, None], q)
    if SMOOTH:
        q = q * (1.0 - smoothing) + smoothing / classes
    v = _class_factor(factor, alpha_scale, c, mask, TYPE)
    return tl.where(mask & (q != 0.0) & (v != 0.0), q * v, 0.0)


@triton.jit
def _dense_sums(z, qv, high, log_sum, gamma, FOCAL: tl.constexpr):
    """Σ_c q_c·v_c·(1 − p_c)^γ·(−log p_c) of each row, and S = Σ_c q_c·v_c·F_c."""
    log_p = (z - high[:, None]) - log_sum[:, None]
    if FOCAL:
        power, slope = _focal(log_p, gamma)
        return tl.sum(tl.where(qv == 0.0, 0.0, qv * power * -log_p), 1), tl.sum(qv * slope, 1)
    else:
        return tl.sum(tl.where(qv == 0.0, 0.0, qv * -log_p), 1), tl.sum(qv, 1)


@triton.jit
def _dense_slope(z, qv, high, log_sum, g, slopes, gamma, z_loss, FOCAL: tl.constexpr, Z_LOSS: tl.constexpr):
    """The gradient of a tile, S·p_i − q_i·v_i·F_i, from its rows' S."""
    log_p = (z - high[:, None]) - log_sum[:, None]
    p = tl.exp(log_p)
    total = slopes[:, None]
    if Z_LOSS:
        total += 2.0 * z_loss * (high + log_sum)[:, None]
    if FOCAL:
        _, slope = _focal(log_p, gamma)
        t = qv * slope
        return g[:, None] * ((total - t) * p - t * _one_minus_exp(log_p))  # the digits that p_i − 1 would lose
    else:
        return g[:, None] * (total * p - qv)


# ---- forward -------------------------------------------------------------------------------------------------


@triton.jit
def _row_value(
    m, log_s, deviation, zy, zy2, pivot, y, y2, s, inside, factor, v_sum,
    classes, smoothing, gamma, alpha_scale,
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The loss of each row, from what is known of it, without z_loss."""
    value = _target_term(m, log_s, zy, y, inside, s, factor, alpha_scale, smoothing, gamma,
                         SMOOTH, FOCAL, TYPE)  # fmt: skip
    if y2 is not None:
        value += _target_term(m, log_s, zy2, y2, inside, 1.0 - s, factor, alpha_scale, smoothing, gamma,
                              SMOOTH, FOCAL, TYPE)  # fmt: skip
    if SMOOTH:
        total = tl.full([], 1.0, TYPE) * classes
        if v_sum is not None:
            total = tl.load(v_sum)
        value += smoothing / classes * alpha_scale * (total * ((m - pivot) + log_s) - deviation)
    return value


@triton.jit
def _target_term(m, log_s, zy, y, inside, s, factor, alpha_scale, smoothing, gamma,
                 SMOOTH: tl.constexpr, FOCAL: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    term = (m - zy) + log_s
    if FOCAL:
        power, _ = _focal(-term, gamma)
        term = power * term
    factor = _class_factor(factor, alpha_scale, y, inside, TYPE)
    if s is not None:
        factor = tl.where(s == 0.0, 0.0, factor * s)
    if SMOOTH:
        factor *= 1.0 - smoothing
    return tl.where(factor == 0.0, 0.0, factor * term)  # a class without a share has none, were its log p −inf


@triton.jit
def _deliver(
    value, count, m, log_s, kept, r, rows, loss, losses, denominator, partial, z_loss,
    REDUCTION: tl.constexpr, Z_LOSS: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """From each row's loss to the loss itself, or to this program's share of the sum."""
    value += log_s - log_s  # NaN where the row has no softmax, even if none of its classes has a share
    if Z_LOSS:
        value += z_loss * (m + log_s) * (m + log_s)
    value = tl.where(kept, value, 0.0)
    live = r >= 0
    if losses is not None:
        tl.store(losses + r, value, mask=live)
    if REDUCTION == NONE:
        tl.store(loss + r, value.to(loss.dtype.element_ty), mask=live)
        if tl.program_id(0) == 0:
            tl.store(denominator, tl.full([], 1.0, TYPE))
    elif ALONE:
        _write_loss(tl.sum(value), tl.sum(count), loss, denominator, REDUCTION, ZERO_IF_EMPTY)
    else:
        pid = tl.program_id(0)
        tl.store(partial + pid, tl.sum(value))
        tl.store(partial + tl.num_programs(0) + pid, tl.sum(count))


@triton.jit
def _divisor(count, REDUCTION: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr):
    """See mean_denominator in fastreg/losses.py."""
    if REDUCTION == MEAN:
        return tl.where(count == 0.0, float("inf") if ZERO_IF_EMPTY else float("nan"), count)
    else:
        return tl.full([], 1.0, count.dtype)


@triton.jit
def _write_loss(total, count, loss, denominator, REDUCTION: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr):
    divisor = _divisor(count, REDUCTION, ZERO_IF_EMPTY)
    tl.store(denominator, divisor)
    tl.store(loss, (total / divisor).to(loss.dtype.element_ty))


@triton.jit
def _store_row(to, value, kept, r):
    if to is not None:
        tl.store(to + r, tl.where(kept, value, 0), mask=r >= 0)


@_kernel
def _forward(
    x, target, other, share, weight, factor, adjustment, margin, v_sum, counted,
    loss, lse, denominator, losses, argmax, grad, partial,
    inner, outer, classes, phase,
    x_outer, x_inner, x_class, t_outer, t_inner, t_class, o_outer, o_inner, s_outer, s_inner,
    g_outer, g_inner, g_class, r_outer, r_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    blocks_per_split,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr, WHOLE: tl.constexpr, SPLIT: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, PEEL: tl.constexpr, EDGE: tl.constexpr, TYPE: tl.constexpr,
    PROBS: tl.constexpr, REDUCTION: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, SCALED: tl.constexpr,
    Z_LOSS: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """One tile of rows: their losses and, where asked for, their gradient (WHOLE: the classes fit in one block, and are
    read once for both); with SPLIT their partial sums. Rows that are not whole and in which every class has a share get
    their log-sum-exp here and their losses from _dense."""
    DENSE: tl.constexpr = PROBS or (SMOOTH and FOCAL)
    LINEAR: tl.constexpr = SMOOTH and not DENSE
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    lowest = tl.full([], LOWEST, TYPE)  # where maxima start: −inf − (−inf) must not arise
    g_outer, g_inner, g_class = _units(inner, classes, g_outer, g_inner, g_class, FAST, UNIT)[2:]
    if PROBS:
        t_outer, t_inner, t_class = _units(inner, classes, t_outer, t_inner, t_class, FAST, UNIT)[2:]
    inner, classes, x_outer, x_inner, x_class = _units(inner, classes, x_outer, x_inner, x_class, FAST, UNIT)
    o, i, live = _rows_of(tl.program_id(0), inner, outer, ROWS)
    t_at = o * t_outer + (i if PROBS and FAST == "row" else i * t_inner)
    y, y2, s, m_y, m_y2, kept, inside = _targets(
        target, other, share, margin, t_at, o * o_outer + i * o_inner, o * s_outer + i * s_inner, live, classes,
        ignore_index, TYPE, PROBS)  # fmt: skip
    if other is None:
        y2, s = None, None
    offset = o * x_outer + (i if FAST == "row" else i * x_inner)
    read = live if FAST == "row" else kept  # a mask from memory, along the fast axis, would break the vectors
    start, first, count = _span(x, offset, phase, classes, PEEL)
    y_k, y2_k = y - first.to(tl.int32), None  # as `k` counts
    if y2 is not None:
        y2_k = y2 - first.to(tl.int32)
    lane = tl.arange(0, BLOCK)
    step = lane if FAST == "class" else lane.to(tl.int64) * x_class
    # A gradient may take the place of x: no thread may read a logit that another one writes.
    PICK: tl.constexpr = WHOLE and (BLOCK <= SHORT or grad is not None) and not DENSE
    zy2 = None

    if WHOLE:
        k = lane[None, :]
        c = first[:, None] + k
        mask = read[:, None] & (k < count)
        raw = _load(start[:, None] + step[None, :], mask, TYPE)
        q = _probabilities(target, t_at, phase, classes, lane, t_class, mask, FAST, PEEL, TYPE, PROBS)
        if argmax is not None:
            best, best_c = _largest(raw, c, NOWHERE)
        z = _adjust(raw, mask, c, k, y_k, y2_k, q, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
        if DENSE:  # now, while its loads and those of x are under way together, and nothing else stands in registers
            qv = _shares(q, c, k, mask, y_k, y2_k, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH, PROBS)
        m = tl.maximum(tl.max(z, 1), lowest)
        total = tl.sum(_flushed_exp(z - m[:, None]), 1)
    if PICK:
        zy = _pick(z, mask, k, y_k)
        if y2 is not None:
            zy2 = _pick(z, mask, k, y2_k)
    elif not DENSE and (SMOOTH or not SPLIT):
        zy = _target_logit(x + offset, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)
        if y2 is not None:
            zy2 = _target_logit(x + offset, inside, y2, x_class, adjustment, m_y2, scale, TYPE, SCALED)
    if PEEL:
        ce, mask_e = _edges(first, count, classes, PEEL, EDGE)
        mask_e = mask_e & read[:, None]
        if SPLIT:
            mask_e = mask_e & (tl.program_id(1) == 0)
        raw_e = _load((x + offset)[:, None] + ce, mask_e, TYPE)
        qe = _probability_edges(target, t_at, ce, mask_e, TYPE, PROBS)
        ze = _adjust(raw_e, mask_e, ce, ce, y, y2, qe, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
        m_e = tl.maximum(tl.max(ze, 1), lowest)
        s_e = tl.sum(_flushed_exp(ze - m_e[:, None]), 1)
        if argmax is not None:
            best_e, best_ce = _largest(raw_e, ce, NOWHERE)
        if WHOLE:
            m, total = _merge(m, total, m_e, s_e)
            if argmax is not None:
                best, best_c = _larger(best, best_c, best_e, best_ce)
        if PICK:
            zy += _pick(ze, mask_e, ce, y)
            if y2 is not None:
                zy2 += _pick(ze, mask_e, ce, y2)
    if PICK:
        zy = tl.where(inside, zy, float("nan"))
    if not DENSE and (SMOOTH or not SPLIT):
        pivot = tl.where(tl.abs(zy) <= -lowest, zy, 0.0)

    if WHOLE:
        if LINEAR:
            deviation = tl.sum(_deviation(z, pivot[:, None], mask, c, factor, TYPE), 1)
    else:
        ms = tl.full([ROWS, BLOCK // FOLD], lowest, TYPE)
        ss = tl.zeros([ROWS, BLOCK // FOLD], TYPE)
        if LINEAR:
            ds = tl.zeros([ROWS, BLOCK // FOLD], TYPE)
        begin = tl.program_id(1) * blocks_per_split * BLOCK
        end = tl.minimum(begin + blocks_per_split * BLOCK, classes)
        if argmax is not None:
            bests = tl.full([ROWS, BLOCK // FOLD], float("-inf"), TYPE)
            first_c = first.to(tl.int32)[:, None]
            best_cs = first_c + begin + tl.zeros([ROWS, 1], tl.int32) + tl.arange(0, BLOCK // FOLD)[None, :]
        for b in range(begin, end, BLOCK):
            k = (b + lane)[None, :]
            c = first[:, None] + k
            mask = read[:, None] & (k < count)
            at = b if FAST == "class" else b * x_class.to(tl.int64)
            raw = _load((start + at)[:, None] + step[None, :], mask, TYPE)
            q_b = _probabilities(target, t_at, phase, classes, b + lane, t_class, mask, FAST, PEEL, TYPE,
                                 PROBS and margin is not None)  # fmt: skip
            z = _adjust(raw, mask, c, k, y_k, y2_k, q_b, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
            # FOLD elements that one thread holds share a maximum: 1 + 1/FOLD exponentials each, no exchange.
            zf = tl.reshape(z, (ROWS, FOLD, BLOCK // FOLD))
            top = tl.maximum(ms, tl.max(zf, 1))
            ss = ss * _flushed_exp(ms - top) + tl.sum(_flushed_exp(zf - top[:, None, :]), 1)
            ms = top
            if LINEAR:
                d = _deviation(z, pivot[:, None], mask, c, factor, TYPE)
                ds += tl.sum(tl.reshape(d, (ROWS, FOLD, BLOCK // FOLD)), 1)
            if argmax is not None:
                bare = tl.reshape(_without_nan(raw), (ROWS, FOLD, BLOCK // FOLD))
                found, strip = tl.max(bare, 1, return_indices=True)
                found_c = first_c + b + strip * (BLOCK // FOLD) + tl.arange(0, BLOCK // FOLD)[None, :]
                best_cs = tl.where(found > bests, found_c, best_cs)
                bests = tl.where(found > bests, found, bests)
        m = tl.max(ms, 1)
        total = tl.sum(ss * _flushed_exp(ms - m[:, None]), 1)
        if argmax is not None:
            best, best_c = _largest(bests, best_cs, NOWHERE)
        if PEEL:
            m, total = _merge(m, total, m_e, s_e)
            if argmax is not None:
                best, best_c = _larger(best, best_c, best_e, best_ce)
        if LINEAR:
            deviation = tl.sum(ds, 1)
    if LINEAR and PEEL:
        deviation += tl.sum(_deviation(ze, pivot[:, None], mask_e, ce, factor, TYPE), 1)
    if not LINEAR:
        deviation = m

    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    if SPLIT:
        at = partial + tl.program_id(1) * rows + r
        plane = tl.num_programs(1) * rows
        tl.store(at, m, mask=live)
        tl.store(at + plane, total, mask=live)
        if LINEAR:
            tl.store(at + 2 * plane, deviation, mask=live)
        if argmax is not None:
            tl.store(at + 3 * plane, best, mask=live)
            tl.store(argmax + tl.program_id(1) * rows + r, best_c.to(tl.int64), mask=live)
    else:
        log_s = tl.log(total)
        _store_row(lse, m, kept, r)
        _store_row(lse + rows, log_s, kept, r)
        if argmax is not None:
            _store_row(argmax, tl.minimum(best_c, classes - 1).to(tl.int64), kept, r)
        if not DENSE:
            value = _row_value(m, log_s, deviation, zy, zy2, pivot, y, y2, s, inside, factor, v_sum, classes,
                               smoothing, gamma, alpha_scale, SMOOTH, FOCAL, TYPE)  # fmt: skip
        elif WHOLE:
            if PEEL:  # first, so that they are done with when the others want the registers
                qve = _shares(qe, ce, ce, mask_e, y, y2, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH,
                              PROBS)  # fmt: skip
                value_e, slopes_e = _dense_sums(ze, qve, m, log_s, gamma, FOCAL)
            value, slopes = _dense_sums(z, qv, m, log_s, gamma, FOCAL)
            if PEEL:
                value += value_e
                slopes += slopes_e
            _store_row(lse + 2 * rows, slopes, kept, r)
        if WHOLE or not DENSE:
            counts = _count(kept, inside, y, y2, s, weight, TYPE, PROBS)
            _deliver(value, counts, m, log_s, kept, r, rows, loss, losses, denominator, partial, z_loss,
                     REDUCTION, Z_LOSS, ZERO_IF_EMPTY, ALONE, TYPE)  # fmt: skip
        if grad is not None:
            number = tl.sum(counts)
            if counted is not None:
                number = tl.load(counted).to(TYPE)
            g = tl.zeros_like(m) + scale / _divisor(number, REDUCTION, ZERO_IF_EMPTY)
            to = o * g_outer + (i if FAST == "row" else i * g_inner)
            out, _, _ = _span(grad, to, phase, classes, PEEL)
            out_step = lane if FAST == "class" else lane.to(tl.int64) * g_class
            if not DENSE:
                steep, even, at_y, at_y2 = _row_gradient(
                    g, m, log_s, zy, zy2, y, y2, s, inside, factor, v_sum, classes, smoothing, gamma,
                    alpha_scale, z_loss, TYPE, SMOOTH, FOCAL, Z_LOSS)  # fmt: skip
            if WHOLE:
                if DENSE:
                    dx = _dense_slope(z, qv, m, log_s, g, slopes, gamma, z_loss, FOCAL, Z_LOSS)
                else:
                    dx = _slope(z, c, k, mask, m, log_s, y_k, y2_k, at_y, at_y2, steep, even, factor, TYPE, SMOOTH)
                dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
                tl.store(out[:, None] + out_step[None, :], dx, mask=live[:, None] & (k < count))
            else:  # the row once more, soon enough to find it in L2
                for b in range(0, classes, BLOCK):
                    k = (b + lane)[None, :]
                    c = first[:, None] + k
                    in_row = k < count
                    mask = read[:, None] & in_row
                    at = b if FAST == "class" else b * x_class.to(tl.int64)
                    z = _load((start + at)[:, None] + step[None, :], mask, TYPE)
                    z = _adjust(z, mask, c, k, y_k, y2_k, None, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED,
                                PROBS)  # fmt: skip
                    dx = _slope(z, c, k, mask, m, log_s, y_k, y2_k, at_y, at_y2, steep, even, factor, TYPE, SMOOTH)
                    dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
                    out_at = b if FAST == "class" else b * g_class.to(tl.int64)
                    tl.store((out + out_at)[:, None] + out_step[None, :], dx, mask=live[:, None] & in_row)
            if PEEL:
                _, edge = _edges(first, count, classes, PEEL, EDGE)
                if DENSE:
                    dx = _dense_slope(ze, qve, m, log_s, g, slopes, gamma, z_loss, FOCAL, Z_LOSS)
                else:
                    dx = _slope(ze, ce, ce, mask_e, m, log_s, y, y2, at_y, at_y2, steep, even, factor, TYPE, SMOOTH)
                dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
                tl.store((grad + to)[:, None] + ce, dx, mask=live[:, None] & edge)


@_kernel
def _merge_splits(
    x, target, other, share, weight, factor, adjustment, margin, v_sum,
    loss, lse, denominator, losses, argmax, target_logits, partial, splits_partial, splits_argmax,
    inner, outer, classes, splits,
    x_outer, x_inner, x_class, t_outer, t_inner, o_outer, o_inner, s_outer, s_inner, r_outer, r_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, TYPE: tl.constexpr, PROBS: tl.constexpr, REDUCTION: tl.constexpr,
    SMOOTH: tl.constexpr, FOCAL: tl.constexpr, SCALED: tl.constexpr, Z_LOSS: tl.constexpr,
    ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Merges the partial sums of rows that several programs read, always in the same order."""
    DENSE: tl.constexpr = PROBS or (SMOOTH and FOCAL)
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    lowest = tl.full([], LOWEST, TYPE)
    o, i, live = _rows_of(tl.program_id(0), inner, outer, ROWS)
    y, y2, s, m_y, m_y2, kept, inside = _targets(
        target, other, share, margin, o * t_outer + i * t_inner, o * o_outer + i * o_inner, o * s_outer + i * s_inner,
        live, classes, ignore_index, TYPE, PROBS)  # fmt: skip
    if other is None:
        y2, s = None, None
    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    split = tl.arange(0, SPLITS)[None, :]
    at = splits_partial + split * rows + r[:, None]
    mask = live[:, None] & (split < splits)
    ms = tl.load(at, mask=mask, other=LOWEST)
    m = tl.max(ms, 1)
    log_s = tl.log(tl.sum(tl.load(at + splits * rows, mask=mask, other=0.0) * tl.exp(ms - m[:, None]), 1))
    _store_row(lse, m, kept, r)
    _store_row(lse + rows, log_s, kept, r)
    if argmax is not None:
        best = tl.load(at + 3 * splits * rows, mask=mask, other=float("-inf"))
        best_c = tl.load(splits_argmax + split * rows + r[:, None], mask=mask, other=NOWHERE)
        _, best_c = _largest(best, best_c, NOWHERE)
        _store_row(argmax, tl.minimum(best_c, classes - 1), kept, r)
    if not DENSE:
        at_x = x + o * x_outer + i * x_inner
        zy = _target_logit(at_x, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)
        _store_row(target_logits, zy, kept, r)
        zy2 = None
        if y2 is not None:
            zy2 = _target_logit(at_x, inside, y2, x_class, adjustment, m_y2, scale, TYPE, SCALED)
            if target_logits is not None:
                _store_row(target_logits + rows, zy2, kept, r)
        deviation = m
        if SMOOTH:
            deviation = tl.sum(tl.load(at + 2 * splits * rows, mask=mask, other=0.0), 1)
        pivot = tl.where(tl.abs(zy) <= -lowest, zy, 0.0)
        value = _row_value(m, log_s, deviation, zy, zy2, pivot, y, y2, s, inside, factor, v_sum, classes,
                           smoothing, gamma, alpha_scale, SMOOTH, FOCAL, TYPE)  # fmt: skip
        counts = _count(kept, inside, y, y2, s, weight, TYPE, PROBS)
        _deliver(value, counts, m, log_s, kept, r, rows, loss, losses, denominator, partial, z_loss,
                 REDUCTION, Z_LOSS, ZERO_IF_EMPTY, ALONE, TYPE)  # fmt: skip


@_kernel
def _dense(
    x, target, other, share, factor, adjustment, margin, lse, sums,
    inner, outer, classes, phase,
    x_outer, x_inner, x_class, t_outer, t_inner, t_class, o_outer, o_inner, s_outer, s_inner, r_outer, r_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    blocks_per_split,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr, UNIT: tl.constexpr, PEEL: tl.constexpr,
    EDGE: tl.constexpr, TYPE: tl.constexpr, PROBS: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Rows too long for one block, in which every class has a share: what _dense_sums adds up, per split and row."""
    smoothing, gamma = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    if PROBS:
        t_outer, t_inner, t_class = _units(inner, classes, t_outer, t_inner, t_class, FAST, UNIT)[2:]
    inner, classes, x_outer, x_inner, x_class = _units(inner, classes, x_outer, x_inner, x_class, FAST, UNIT)
    o, i, live = _rows_of(tl.program_id(0), inner, outer, ROWS)
    t_at = o * t_outer + (i if PROBS and FAST == "row" else i * t_inner)
    y, y2, s, m_y, m_y2, kept, _ = _targets(
        target, other, share, margin, t_at, o * o_outer + i * o_inner, o * s_outer + i * s_inner, live, classes,
        ignore_index, TYPE, PROBS)  # fmt: skip
    if other is None:
        y2, s = None, None
    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    high = tl.load(lse + r, mask=live, other=0.0)
    log_sum = tl.load(lse + rows + r, mask=live, other=0.0)
    offset = o * x_outer + (i if FAST == "row" else i * x_inner)
    read = live if FAST == "row" else kept
    start, first, count = _span(x, offset, phase, classes, PEEL)
    y_k, y2_k = y - first.to(tl.int32), None  # as `k` counts
    if y2 is not None:
        y2_k = y2 - first.to(tl.int32)
    lane = tl.arange(0, BLOCK)
    step = lane if FAST == "class" else lane.to(tl.int64) * x_class
    value, slopes = tl.zeros_like(high), tl.zeros_like(high)
    begin = tl.program_id(1) * blocks_per_split * BLOCK
    end = tl.minimum(begin + blocks_per_split * BLOCK, classes)
    for b in range(begin, end, BLOCK):
        k = (b + lane)[None, :]
        c = first[:, None] + k
        mask = read[:, None] & (k < count)
        at = b if FAST == "class" else b * x_class.to(tl.int64)
        z = _load((start + at)[:, None] + step[None, :], mask, TYPE)
        q = _probabilities(target, t_at, phase, classes, b + lane, t_class, mask, FAST, PEEL, TYPE, PROBS)
        z = _adjust(z, mask, c, k, y_k, y2_k, q, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
        qv = _shares(q, c, k, mask, y_k, y2_k, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH, PROBS)
        more, more_slopes = _dense_sums(z, qv, high, log_sum, gamma, FOCAL)
        value += more
        slopes += more_slopes
    if PEEL:
        ce, mask_e = _edges(first, count, classes, PEEL, EDGE)
        mask_e = mask_e & read[:, None] & (tl.program_id(1) == 0)
        z = _load((x + offset)[:, None] + ce, mask_e, TYPE)
        q_e = _probability_edges(target, t_at, ce, mask_e, TYPE, PROBS)
        z = _adjust(z, mask_e, ce, ce, y, y2, q_e, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
        qv = _shares(q_e, ce, ce, mask_e, y, y2, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH, PROBS)
        more, more_slopes = _dense_sums(z, qv, high, log_sum, gamma, FOCAL)
        value += more
        slopes += more_slopes
    at = sums + tl.program_id(1) * rows + r
    tl.store(at, value, mask=live)
    tl.store(at + tl.num_programs(1) * rows, slopes, mask=live)


@_kernel
def _finish_dense(
    target, other, share, weight, sums, loss, lse, denominator, losses, partial,
    inner, outer, classes, splits,
    t_outer, t_inner, o_outer, o_inner, s_outer, s_inner, r_outer, r_inner,
    ignore_index, z_loss: tl.float64,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, TYPE: tl.constexpr, PROBS: tl.constexpr, REDUCTION: tl.constexpr,
    Z_LOSS: tl.constexpr, ZERO_IF_EMPTY: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    z_loss = tl.full([], z_loss, TYPE)
    o, i, live = _rows_of(tl.program_id(0), inner, outer, ROWS)
    y, y2, s, _, _, kept, inside = _targets(
        target, other, share, None, o * t_outer + i * t_inner, o * o_outer + i * o_inner, o * s_outer + i * s_inner,
        live, classes, ignore_index, TYPE, PROBS)  # fmt: skip
    if other is None:
        y2, s = None, None
    r = tl.where(live, o * r_outer + i * r_inner, -1)
    rows = outer.to(tl.int64) * inner
    high = tl.load(lse + r, mask=live, other=0.0)
    log_sum = tl.load(lse + rows + r, mask=live, other=0.0)
    value = _over_splits(sums, r, rows, live, splits, SPLITS)
    _store_row(lse + 2 * rows, _over_splits(sums + splits * rows, r, rows, live, splits, SPLITS), kept, r)
    counts = _count(kept, inside, y, y2, s, weight, TYPE, PROBS)
    _deliver(value, counts, high, log_sum, kept, r, rows, loss, losses, denominator, partial, z_loss,
             REDUCTION, Z_LOSS, ZERO_IF_EMPTY, ALONE, TYPE)  # fmt: skip


@triton.jit
def _over_splits(sums, r, rows, live, splits, SPLITS: tl.constexpr):
    split = tl.arange(0, SPLITS)[None, :]
    return tl.sum(tl.load(sums + split * rows + r[:, None], mask=live[:, None] & (split < splits), other=0.0), 1)


@_kernel
def _count_rows(
    target, other, share, weight, partial, inner, outer, classes, t_outer, t_inner, o_outer, o_inner, s_outer, s_inner,
    ignore_index, ROWS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What a program's rows count in a mean: the gradient is divided by it before the last row has been read."""
    o, i, live = _rows_of(tl.program_id(0), inner, outer, ROWS)
    y, y2, s, _, _, kept, inside = _targets(
        target, other, share, None, o * t_outer + i * t_inner, o * o_outer + i * o_inner, o * s_outer + i * s_inner,
        live, classes, ignore_index, TYPE, False)  # fmt: skip
    if other is None:
        y2, s = None, None
    tl.store(partial + tl.program_id(0), tl.sum(_count(kept, inside, y, y2, s, weight, TYPE, False)))


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
def _row_gradient(
    g, high, log_sum, zy, zy2, y, y2, s, inside, factor, v_sum, classes, smoothing, gamma, alpha_scale, z_loss,
    TYPE: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    """The numbers of _slope: A, B, and the gradient at the targets, with the digits that p_y − 1 would lose."""
    b = tl.zeros_like(g)
    rest = tl.zeros_like(g)
    if SMOOTH:
        b = g * smoothing / classes * alpha_scale
        total = tl.full([], 1.0, TYPE) * classes
        if v_sum is not None:
            total = tl.load(v_sum)
        rest += b * total
    if Z_LOSS:
        rest += g * 2.0 * z_loss * (high + log_sum)
    d, log_p = _target_slope(g, high, log_sum, zy, y, inside, s, factor, alpha_scale, smoothing, gamma,
                             SMOOTH, FOCAL, TYPE)  # fmt: skip
    if y2 is None:
        at_y = _at_target(rest, d, log_p, b, y, inside, factor, SMOOTH, TYPE)
        return d + rest, b, at_y, at_y
    else:
        d2, log_p2 = _target_slope(g, high, log_sum, zy2, y2, inside, 1.0 - s, factor, alpha_scale, smoothing,
                                   gamma, SMOOTH, FOCAL, TYPE)  # fmt: skip
        both = d + d2
        same = y == y2
        d, d2 = tl.where(same, both, d), tl.where(same, 0.0, d2)
        at_y = _at_target(rest + d2, d, log_p, b, y, inside, factor, SMOOTH, TYPE)
        at_y2 = _at_target(rest + d, d2, log_p2, b, y2, inside, factor, SMOOTH, TYPE)
        return both + rest, b, at_y, at_y2


@triton.jit
def _target_slope(g, high, log_sum, zy, y, inside, s, factor, alpha_scale, smoothing, gamma,
                  SMOOTH: tl.constexpr, FOCAL: tl.constexpr, TYPE: tl.constexpr):  # fmt: skip
    log_p = (zy - high) - log_sum
    d = g * _class_factor(factor, alpha_scale, y, inside, TYPE)
    if s is not None:
        d = tl.where(s == 0.0, 0.0, d * s)
    if FOCAL:
        _, factor = _focal(log_p, gamma)
        d *= factor
    if SMOOTH:
        d *= 1.0 - smoothing
    return d, log_p


@triton.jit
def _at_target(rest, d, log_p, b, y, inside, factor, SMOOTH: tl.constexpr, TYPE: tl.constexpr):
    at = rest * tl.exp(log_p) - d * _one_minus_exp(log_p)
    if SMOOTH:
        at -= b * _class_factor(factor, 1.0, y, inside, TYPE)
    return at


@triton.jit
def _slope(z, c, k, mask, high, log_sum, y, y2, at_y, at_y2, a, b, factor,
           TYPE: tl.constexpr, SMOOTH: tl.constexpr):  # fmt: skip
    """The gradient of a tile from its rows' numbers."""
    g = a[:, None] * tl.exp((z - high[:, None]) - log_sum[:, None])
    if SMOOTH:
        if factor is None:
            g -= b[:, None]
        else:
            g -= b[:, None] * _class_factor(factor, 1.0, c, mask, TYPE)
    if y2 is not None:
        g = tl.where(k == y2[:, None], at_y2[:, None], g)
    return tl.where(k == y[:, None], at_y[:, None], g)


@_kernel
def _backward(
    grad_loss, x, target, other, share, factor, adjustment, margin, v_sum, lse, denominator, target_logits,
    grad,
    inner, outer, classes, phase,
    x_outer, x_inner, x_class, g_outer, g_inner, g_class, t_outer, t_inner, t_class, o_outer, o_inner, s_outer, s_inner,
    r_outer, r_inner, l_outer, l_inner,
    ignore_index, smoothing: tl.float64, gamma: tl.float64, alpha_scale: tl.float64, scale: tl.float64,
    z_loss: tl.float64,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FAST: tl.constexpr, UNIT: tl.constexpr, PEEL: tl.constexpr, EDGE: tl.constexpr, TYPE: tl.constexpr,
    PROBS: tl.constexpr, SMOOTH: tl.constexpr, FOCAL: tl.constexpr, SCALED: tl.constexpr, Z_LOSS: tl.constexpr,
):  # fmt: skip
    DENSE: tl.constexpr = PROBS or (SMOOTH and FOCAL)
    smoothing, gamma, z_loss = tl.full([], smoothing, TYPE), tl.full([], gamma, TYPE), tl.full([], z_loss, TYPE)
    alpha_scale, scale = tl.full([], alpha_scale, TYPE), tl.full([], scale, TYPE)
    g_outer, g_inner, g_class = _units(inner, classes, g_outer, g_inner, g_class, FAST, UNIT)[2:]
    if PROBS:
        t_outer, t_inner, t_class = _units(inner, classes, t_outer, t_inner, t_class, FAST, UNIT)[2:]
    inner, classes, x_outer, x_inner, x_class = _units(inner, classes, x_outer, x_inner, x_class, FAST, UNIT)
    pid, chunk = tl.program_id(0), tl.full([], 0, tl.int32)
    if not WHOLE:  # chunks of a row are no second axis of the grid, which would end at 65,535
        blocks = tl.cdiv(inner, ROWS) * outer
        chunk = pid // blocks
        pid = pid % blocks
    o, i, live = _rows_of(pid, inner, outer, ROWS)
    t_at = o * t_outer + (i if PROBS and FAST == "row" else i * t_inner)
    y, y2, s, m_y, m_y2, kept, inside = _targets(
        target, other, share, margin, t_at, o * o_outer + i * o_inner, o * s_outer + i * s_inner, live, classes,
        ignore_index, TYPE, PROBS)  # fmt: skip
    if other is None:
        y2, s = None, None
    offset = o * x_outer + (i if FAST == "row" else i * x_inner)
    to = o * g_outer + (i if FAST == "row" else i * g_inner)
    read = live if FAST == "row" else kept
    start, first, count = _span(x, offset, phase, classes, PEEL)
    y_k, y2_k = y - first.to(tl.int32), None  # as `k` counts
    if y2 is not None:
        y2_k = y2 - first.to(tl.int32)
    out, _, _ = _span(grad, to, phase, classes, PEEL)
    col = chunk * BLOCK + tl.arange(0, BLOCK)
    k = col[None, :]
    c = first[:, None] + k
    inside_row = k < count
    mask = read[:, None] & inside_row
    if FAST == "class":
        step, out_step = col, col
    else:
        step, out_step = col.to(tl.int64) * x_class, col.to(tl.int64) * g_class
    z = _load(start[:, None] + step[None, :], mask, TYPE)
    q = _probabilities(target, t_at, phase, classes, col, t_class, mask, FAST, PEEL, TYPE, PROBS)
    z = _adjust(z, mask, c, k, y_k, y2_k, q, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)
    if PEEL:
        ce, edge = _edges(first, count, classes, PEEL, EDGE)
        edge = edge & (chunk == 0)
        mask_e = edge & read[:, None]
        ze = _load((x + offset)[:, None] + ce, mask_e, TYPE)
        qe = _probability_edges(target, t_at, ce, mask_e, TYPE, PROBS)
        ze = _adjust(ze, mask_e, ce, ce, y, y2, qe, adjustment, margin, m_y, m_y2, scale, TYPE, SCALED, PROBS)

    r = o * r_outer + i * r_inner
    rows = outer.to(tl.int64) * inner
    high = tl.load(lse + r, mask=live, other=0.0)
    log_sum = tl.load(lse + rows + r, mask=live, other=0.0)
    g = tl.zeros_like(high) + scale
    if grad_loss is not None:
        g *= tl.load(grad_loss + o * l_outer + i * l_inner, mask=live, other=0.0).to(TYPE)
    g = g / tl.load(denominator)
    if DENSE:
        qv = _shares(q, c, k, mask, y_k, y2_k, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH, PROBS)
        if PEEL:
            qve = _shares(qe, ce, ce, mask_e, y, y2, s, factor, alpha_scale, smoothing, classes, TYPE, SMOOTH,
                          PROBS)  # fmt: skip
        slopes = tl.load(lse + 2 * rows + r, mask=live, other=0.0)
    else:
        zy2 = None
        if WHOLE and BLOCK <= SHORT:
            zy = _pick(z, mask, k, y_k)
            if PEEL:
                zy += _pick(ze, mask_e, ce, y)
            zy = tl.where(inside, zy, float("nan"))
            if y2 is not None:
                zy2 = _pick(z, mask, k, y2_k)
                if PEEL:
                    zy2 += _pick(ze, mask_e, ce, y2)
        elif target_logits is not None:  # x may be written meanwhile
            zy = tl.load(target_logits + r, mask=live, other=0.0)
            if y2 is not None:
                zy2 = tl.load(target_logits + rows + r, mask=live, other=0.0)
        else:
            zy = _target_logit(x + offset, inside, y, x_class, adjustment, m_y, scale, TYPE, SCALED)
            if y2 is not None:
                zy2 = _target_logit(x + offset, inside, y2, x_class, adjustment, m_y2, scale, TYPE, SCALED)
        a, b, at_y, at_y2 = _row_gradient(
            g, high, log_sum, zy, zy2, y, y2, s, inside, factor, v_sum, classes, smoothing, gamma, alpha_scale,
            z_loss, TYPE, SMOOTH, FOCAL, Z_LOSS)  # fmt: skip
    if PEEL:  # first, so that they are done with when the others want the registers
        if DENSE:
            dx = _dense_slope(ze, qve, high, log_sum, g, slopes, gamma, z_loss, FOCAL, Z_LOSS)
        else:
            dx = _slope(ze, ce, ce, mask_e, high, log_sum, y, y2, at_y, at_y2, a, b, factor, TYPE, SMOOTH)
        dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
        tl.store((grad + to)[:, None] + ce, dx, mask=live[:, None] & edge)
    if DENSE:
        dx = _dense_slope(z, qv, high, log_sum, g, slopes, gamma, z_loss, FOCAL, Z_LOSS)
    else:
        dx = _slope(z, c, k, mask, high, log_sum, y_k, y2_k, at_y, at_y2, a, b, factor, TYPE, SMOOTH)
    dx = tl.where(kept[:, None], dx, 0.0).to(grad.dtype.element_ty)
    tl.store(out[:, None] + out_step[None, :], dx, mask=live[:, None] & inside_row)


@_kernel
def _scale_gradient(grad, factor, n, BLOCK: tl.constexpr, VECTOR: tl.constexpr, TYPE: tl.constexpr):
    """grad *= factor, which memory is spared where the factor is 1. A 0 stays 0, were the factor infinite."""
    by = tl.load(factor).to(TYPE)
    if by != 1.0:
        whole = tl.multiple_of(n // VECTOR * VECTOR, VECTOR)
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < whole
        value = tl.load(grad + i, mask=mask, other=0.0).to(TYPE)
        tl.store(grad + i, tl.where(value == 0.0, value, value * by).to(grad.dtype.element_ty), mask=mask)
        i = whole + tl.arange(0, VECTOR)
        mask = (i < n) & (tl.program_id(0) == 0)
        value = tl.load(grad + i, mask=mask, other=0.0).to(TYPE)
        tl.store(grad + i, tl.where(value == 0.0, value, value * by).to(grad.dtype.element_ty), mask=mask)


# ---- sigmoid focal loss --------------------------------------------------------------------------------------
# Elementwise: one read of the logits (and of dense targets) forward, one more and one write backward. Class indices
# are compared with each element's class: the one-hot target is never in memory. The rows of the logits and of dense
# targets may have gaps between them. The mathematics is that of any t between 0 and 1; with a t of 0 or 1 nothing in it
# cancels.


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
        value = _weighed(balance, value)
        slope *= balance
    return value, slope


@triton.jit
def _weighed(factor, value):
    """factor·value; 0 for a factor of 0, were the value infinite."""
    return factor * tl.where((factor == 0.0) & (value == float("inf")), 0.0, value)


@_kernel
def _sigmoid_focal(
    x, target, weight, normalizer, grad_loss, out, n, x_gap, t_gap, gamma: tl.float64, alpha: tl.float64,
    factor: tl.float64, CLASSES: tl.constexpr, GAPS: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, TYPE: tl.constexpr, INDEX: tl.constexpr, BACKWARD: tl.constexpr, REDUCE: tl.constexpr,
    FOCAL: tl.constexpr, SQUARE: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """A block's terms: their sum (REDUCE), the terms themselves, or (BACKWARD) their gradient. GAPS: between rows of
    x or of dense targets lie x_gap and t_gap units of other elements."""
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
        from_x, from_t = i, i
        if GAPS:
            units = (i // CLASSES).to(tl.int64) * UNIT
            from_x, from_t = i + units * x_gap, i + units * t_gap
        if INDEX:
            y = tl.load(target + i // CLASSES, mask=mask, other=0).to(tl.int64)
            t = tl.where(y == i % CLASSES, 1.0, 0.0).to(TYPE)
        else:
            t = tl.load(target + from_t, mask=mask, other=0.0).to(TYPE)
        z = tl.load(x + from_x, mask=mask, other=0.0).to(TYPE)
        value, slope = _sigmoid_focal_terms(z, t, gamma, alpha, FOCAL, SQUARE, BALANCED)
        result = slope if BACKWARD else value
        if weight is not None:
            result = _weighed(tl.load(weight + i % CLASSES, mask=mask, other=0.0).to(TYPE), result)
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
    """The layout that serves all of `tensors`, each (N, C, D)."""
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
        alike = len(phases) == 1 and len({(t.stride(), t.dtype) for t in tensors}) == 1
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
    registers: int | None = None  # the limit for a thread, where there must be one


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tile(
    layout: _Layout,
    inner: int,
    outer: int,
    classes: int,
    itemsize: int,
    limit: int,
    thin: bool = False,
    whole: int = 0,
    half: bool = False,
    dense: bool = False,
    busy: bool = False,
) -> _Tile:
    """Block sizes from arithmetic; nothing here has been tuned on a GPU yet.

    Enough bytes must be under way to hide memory latency: 64 per thread, in four vectors, times the 2,048 threads of a
    multiprocessor are 128 KB, three times what Little's law asks for. So a tile holds 64 bytes per thread: at most
    `limit` bytes (16 KB: 8 warps), less where there are too few rows to give every multiprocessor two programs. Rows
    that lie side by side in memory make lines of 128 bytes.
    Longer rows are read in blocks of `limit`, and dealt out to several programs if rows are few. `thin` halves what a
    thread holds, for loops that read per-class vectors beside the logits and would run out of registers.

    Where a row is needed twice, tiles of up to `whole` elements hold whole rows, in up to 16 warps; rows side by side
    then give up some of their lines, down to a sector of 32 bytes. `half` halves what a thread holds in every tile;
    `busy`, something done to each logit first, in whole rows whose two ends stand in registers too.

    Tiles that have more in registers than logits get a limit of them, that of so many warps or less, for without one
    ptxas spills a value or two where that fits another block: `thin` ones of few warps; whole rows whose pitch is not a
    multiple of 16 bytes, for many rows' addresses, or a row's two ends; `dense` ones, in which every class has
    logarithms of its own and mostly a probability beside its logit; and those of 16 warps. The limit is 128; 255 for
    dense ones, which do not fit in 128 beside the two ends. The widest of those tiles would have 128 for 16 elements:
    they get 64 for 8, in 32 warps.
    """
    width = _power_of_2(classes)
    lanes = 1 if layout.fast != "row" else min(_power_of_2(inner), 128 // itemsize)
    wanted = 2 * _multiprocessors()
    registers = lambda warps: min(255 if dense else 128, 2048 // warps)  # noqa: E731
    whole = min(whole * itemsize, 65536)
    fewest = min(lanes, 32 // itemsize)
    if fewest * width * itemsize <= whole:
        while lanes * width * itemsize > max(limit, whole):
            lanes //= 2
    if lanes * width * itemsize > max(limit, whole):
        programs = -(-inner // lanes) * outer
        while limit // (lanes * itemsize) >= 1024 and programs * -(-classes * lanes * itemsize // limit) < wanted:
            limit //= 2  # one row of 128,256 in bf16: 126 programs
        block = max(1, limit // (lanes * itemsize * 2 ** (thin + half)))
        blocks = -(-classes // block)
        splits = min(blocks, max(1, wanted // max(1, programs)), 1024)
        warps, fold = max(1, limit // 2048), min(4 // 2 ** (thin + half), block)
        limited = dense or (thin and warps <= 2)
        return _Tile(lanes, block, False, warps, splits, fold, registers(warps) if limited else None)
    rows = lanes
    total = inner * outer
    while rows < inner and 2 * rows * width * itemsize <= limit // 2 and total > 2 * rows * wanted:
        rows *= 2
    if total * width * itemsize <= limit and outer == 1:
        rows = _power_of_2(max(1, inner))  # one program does it all, and no second launch is needed
    # four rows per thread at most: what is known of each is a dozen numbers
    half = half or (busy and layout.peel > 0)
    warps = min(16, max(1, rows * width * itemsize // (1024 if half else 2048), rows // 128))
    odd = layout.unit * itemsize < 16
    if odd and dense and rows * width > 4096:
        warps = 32
    limited = odd or dense or warps == 16
    return _Tile(rows, width, True, warps, 1, registers=registers(warps) if limited else None)


@functools.cache
def _multiprocessors() -> int:
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def _vectors(weight, alpha, logit_adjustment, margin, linear, accumulate):
    """The per-class vectors, contiguous: v_c without alpha's scalar, one factor of a class to load where there are two,
    adjustment and margin; and the sum of v_c if a closed form asks for it."""
    factor = weight if alpha is None else alpha if weight is None else weight.to(accumulate) * alpha
    vectors = [v if v is None else v.contiguous() for v in (factor, logit_adjustment, margin)]
    return *vectors, factor.sum(dtype=accumulate) if linear and factor is not None else None


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


def _accumulate(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _triton_type(dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _every_class_has_a_share(target, label_smoothing, gamma) -> bool:
    return target.is_floating_point() or (label_smoothing != 0 and gamma != 0)


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 2 else t.unsqueeze(1)


def _classes(t: torch.Tensor) -> torch.Tensor:
    return t if t.dim() == 3 else t.unsqueeze(2)


class _Call:
    """What every launch of one call is told, and how its tensors lie."""

    def __init__(self, tensors, lse, grad, ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss):
        input, target, *vectors, other, share = tensors
        self.input, self.accumulate = input, lse.dtype
        self.probabilities = target.is_floating_point()
        self.dense = _every_class_has_a_share(target, label_smoothing, gamma)
        self.x, self.grad = _classes(input), None if grad is None else _classes(grad)
        self.target = _classes(target) if self.probabilities else _rows(target)
        tiles = [self.x, self.grad, self.target if self.probabilities else None]
        self.layout = layout = _layout([t for t in tiles if t is not None])
        inner_dim = layout.inner_dim
        self.classes, self.inner, self.outer = (self.x.shape[dim] for dim in (1, inner_dim, 2 - inner_dim))
        self.weight = vectors[0] if vectors[0] is None else vectors[0].contiguous()
        self.vectors = _vectors(*vectors, label_smoothing and not self.dense, lse.dtype)
        self.targets = (self.target, other, share)
        _, adjustment, margin, v_sum = self.vectors
        self.busy = scale != 1 or any(t is not None for t in (adjustment, margin, v_sum, other))
        sizes = (self.inner, self.outer, self.classes)
        self.plain_sizes = sizes
        if layout.fast == "class":
            self.sizes = (self.inner, self.outer, self.classes // layout.unit)
        else:
            self.sizes = (self.inner // layout.unit, self.outer, self.classes)
        self.x_strides = _strides(self.x, inner_dim)
        self.x_units = _in_units(self.x_strides, layout)
        self.grad_units = (0, 0, 0) if grad is None else _in_units(_strides(self.grad, inner_dim), layout)
        steps = _strides(self.target, inner_dim)
        self.target_units = _in_units(steps, layout) if self.probabilities else (*steps, 0)
        self.target_strides = steps[:2]
        pair = (0, 0, 0, 0)
        if other is not None:
            pair = (*_strides(_rows(other), inner_dim), *_strides(_rows(share), inner_dim))
        self.pair_strides = pair
        self.row_strides = _strides(_rows(lse[0]), inner_dim)
        self.grad_loss_strides = lambda grad_loss: _strides(_rows(grad_loss), inner_dim)
        self.ignore_index, self.z_loss = ignore_index, z_loss
        self.options = (ignore_index, label_smoothing, gamma, alpha_scale, scale)
        self.flags = dict(
            TYPE=_triton_type(lse.dtype), PROBS=self.probabilities,
            SMOOTH=label_smoothing != 0, FOCAL=gamma != 0, SCALED=scale != 1,
            # Else scale·x − high would be one instruction, and its product another than the rounded one in high.
            enable_fp_fusion=scale == 1,
        )  # fmt: skip
        self.layout_flags = dict(FAST=layout.fast, UNIT=layout.unit, PEEL=layout.peel)

    def tile(self, limit: int, **options) -> _Tile:
        if self.dense:
            options |= dict(half=True, dense=True)
        shape = self.inner, self.outer, self.classes, self.input.element_size()
        return _tile(self.layout, *shape, limit, busy=self.busy, **options)

    def edge(self, tile: _Tile) -> int:
        """Lanes of a row's two ends. Not fewer than threads, or Triton 3.6 loads them in the tile's layout: as many
        elements per thread and tensor as a vector has."""
        return self.layout.peel and max(2 * self.layout.peel, 32 * tile.warps // tile.rows)

    def blocks(self, rows: int) -> int:
        """Programs of so many rows."""
        return max(1, -(-self.inner // rows)) * max(1, self.outer)

    def empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.accumulate, device=self.input.device)

    def dense_sums(self, lse) -> torch.Tensor:
        """_dense_sums of rows that no block holds: (2, splits, rows)."""
        tile = self.tile(8192)
        sums = self.empty(2, tile.splits, self.outer * self.inner)
        _dense[(self.blocks(tile.rows), tile.splits)](
            self.x, *self.targets, *self.vectors[:3], lse, sums,
            *self.sizes, self.layout.phase, *self.x_units, *self.target_units, *self.pair_strides, *self.row_strides,
            *self.options, -(-self.classes // tile.block // tile.splits),
            ROWS=tile.rows, BLOCK=tile.block, EDGE=self.edge(tile), **self.layout_flags, **self.flags,
            num_warps=tile.warps, maxnreg=tile.registers, sanitize_overflow=False,
        )  # fmt: skip
        return sums

    def counted(self) -> torch.Tensor:
        """What all rows count in the mean."""
        rows = SUM_BLOCK
        partial, out = self.empty(self.blocks(rows)), self.empty()
        _count_rows[(partial.shape[0],)](
            *self.targets, self.weight, partial, *self.plain_sizes, *self.target_strides, *self.pair_strides,
            self.ignore_index, ROWS=rows, TYPE=self.flags["TYPE"], num_warps=4, sanitize_overflow=False,
        )  # fmt: skip
        if partial.shape[0] == 1:
            return partial

        def add(partial, out, programs, last):
            _sum[(programs,)](partial, None, out, partial.shape[-1], 1.0, BLOCK=SUM_BLOCK, LAST=last,
                              TYPE=self.flags["TYPE"], num_warps=4)  # fmt: skip

        _in_stages(add, partial, out)
        return out

    def backward(self, grad_loss, reduction, lse, denominator, target_logits=None) -> None:
        tile = self.tile(8192)
        each = grad_loss is not None and reduction == 0
        _backward[(self.blocks(tile.rows) * -(-self.classes // tile.block),)](
            grad_loss, self.x, *self.targets, *self.vectors, lse, denominator,
            target_logits, self.grad,
            *self.sizes, self.layout.phase, *self.x_units, *self.grad_units, *self.target_units,
            *self.pair_strides, *self.row_strides, *(self.grad_loss_strides(grad_loss) if each else (0, 0)),
            *self.options, self.z_loss,
            ROWS=tile.rows, BLOCK=tile.block, EDGE=self.edge(tile), WHOLE=tile.whole,
            **self.layout_flags, **self.flags, Z_LOSS=self.z_loss != 0,
            num_warps=tile.warps, maxnreg=tile.registers, sanitize_overflow=False,
        )  # fmt: skip


def cross_entropy_forward(*args):
    loss, lse, denominator, _, _ = cross_entropy_forward_extra(*args, False, False, None)
    return loss, lse, denominator


def cross_entropy_forward_extra(
    input, target, weight, alpha, logit_adjustment, margin, other_target, share,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, fp32_loss,
    want_losses, want_argmax, grad_input,
):  # fmt: skip
    accumulate = _accumulate(input)
    rows = [input.shape[0], *input.shape[2:]]
    loss = input.new_empty([] if reduction else rows, dtype=accumulate if fp32_loss else input.dtype)
    known = 2 + _every_class_has_a_share(target, label_smoothing, gamma)
    lse = input.new_empty([known, *rows], dtype=accumulate)
    denominator = input.new_empty([], dtype=accumulate)
    losses = input.new_empty(rows, dtype=accumulate) if want_losses else None
    argmax = input.new_empty(rows, dtype=torch.int64) if want_argmax else None

    tensors = (input, target, weight, alpha, logit_adjustment, margin, other_target, share)
    grad = grad_input if grad_input is not None and grad_input.numel() else None
    call = _Call(tensors, lse, grad, ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss)
    linear = label_smoothing != 0 and not call.dense
    vectors = weight is not None or alpha is not None
    thin = logit_adjustment is not None or (linear and vectors)
    half = want_argmax or (thin and other_target is not None)
    whole = RESIDENT // 2 if call.dense else RESIDENT if grad is not None else 0
    tile = call.tile(16384, thin=thin, half=half, whole=whole)
    split = tile.splits > 1
    later = call.dense and not tile.whole  # the losses come from _dense
    splits = max(tile.splits, call.tile(8192).splits if later else 1)
    merge_rows = 2048 // max(128, _power_of_2(splits))  # 16 numbers per thread, of each kind
    programs = call.blocks(merge_rows if split or later else tile.rows)
    alone = programs == 1
    partial = None if alone or reduction == 0 else call.empty(2, programs)
    parts = call.empty(4, tile.splits, call.outer * call.inner) if split else None
    parts_argmax = call.empty(*parts.shape[1:], dtype=torch.int64) if split and want_argmax else None
    in_forward = grad is not None and not (split or later)
    target_logits = call.empty(2, *rows) if grad is not None and split and not call.dense else None
    means = reduction == MEAN.value
    flags = call.flags | dict(REDUCTION=reduction, Z_LOSS=z_loss != 0, ZERO_IF_EMPTY=zero_if_empty, ALONE=alone)
    lowest = torch.finfo(accumulate).min
    counted = None
    if in_forward and means and not alone:
        # Rows of probabilities all count 1, so that no device has to add them up.
        counted = call.empty().fill_(math.prod(rows)) if call.probabilities else call.counted()
    _forward[(call.blocks(tile.rows), tile.splits)](
        call.x, *call.targets, call.weight, *call.vectors, counted,
        loss, lse, denominator, losses, parts_argmax if split else argmax,
        call.grad if in_forward else None, parts if split else partial,
        *call.sizes, call.layout.phase, *call.x_units, *call.target_units, *call.pair_strides, *call.grad_units,
        *call.row_strides, *call.options, z_loss, -(-call.classes // tile.block // tile.splits),
        ROWS=tile.rows, BLOCK=tile.block, EDGE=call.edge(tile), FOLD=tile.fold, WHOLE=tile.whole, SPLIT=split,
        **call.layout_flags, **flags, LOWEST=lowest, num_warps=tile.warps, maxnreg=tile.registers,
        sanitize_overflow=False,
    )  # fmt: skip
    if split:
        _merge_splits[(programs,)](
            call.x, *call.targets, call.weight, *call.vectors, loss, lse, denominator, losses, argmax, target_logits,
            partial, parts, parts_argmax, *call.plain_sizes, tile.splits, *call.x_strides, *call.target_strides,
            *call.pair_strides, *call.row_strides, *call.options, z_loss,
            ROWS=merge_rows, SPLITS=_power_of_2(tile.splits), **flags, LOWEST=lowest,
            num_warps=4, sanitize_overflow=False,
        )  # fmt: skip
    if later:
        sums = call.dense_sums(lse)
        _finish_dense[(programs,)](
            *call.targets, call.weight, sums, loss, lse, denominator, losses, partial,
            *call.plain_sizes, sums.shape[1], *call.target_strides, *call.pair_strides, *call.row_strides,
            ignore_index, z_loss, ROWS=merge_rows, SPLITS=_power_of_2(sums.shape[1]),
            **{name: flags[name] for name in _FINISH}, num_warps=4, sanitize_overflow=False,
        )  # fmt: skip
    if partial is not None:

        def add(partial, out, programs, last):
            _sum_partials[(programs,)](
                partial, out, loss, denominator, partial.shape[1], LAST=last, BLOCK=SUM_BLOCK,
                REDUCTION=reduction, ZERO_IF_EMPTY=zero_if_empty, TYPE=flags["TYPE"], num_warps=4,
            )  # fmt: skip

        _in_stages(add, partial, None)
    if grad is not None and not in_forward:
        call.backward(None, reduction, lse, denominator, target_logits)
    if losses is None:
        losses = lse.new_empty(0)
    if argmax is None:
        argmax = lse.new_empty(0, dtype=torch.int64)
    return loss, lse, denominator, losses, argmax


_FINISH = ("TYPE", "PROBS", "REDUCTION", "Z_LOSS", "ZERO_IF_EMPTY", "ALONE")


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
    grad_input = torch.empty_like(input)
    if input.numel():
        tensors = (input, target, weight, alpha, logit_adjustment, margin, other_target, share)
        call = _Call(tensors, lse, grad_input, ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss)
        call.backward(grad_loss, reduction, lse, denominator)
    return grad_input


def scale_gradient_(grad, factor):
    if not torch.ops.aten.is_non_overlapping_and_dense(grad):
        grad.copy_(torch.where(grad == 0, grad, grad * factor))  # in every case a pass, and right
    elif grad.numel():
        vector = 16 // grad.element_size()
        block = 512 * vector
        _scale_gradient[(-(-grad.numel() // block),)](
            grad, factor, grad.numel(), BLOCK=block, VECTOR=vector, TYPE=_triton_type(_accumulate(grad)),
            num_warps=4, sanitize_overflow=False,
        )  # fmt: skip


def _in_rows(tensor):
    """Of two dimensions with contiguous rows, or contiguous."""
    return tensor if tensor.dim() == 2 and tensor.stride(1) == 1 else tensor.contiguous()


def _sigmoid_launch(x, target, weight, normalizer, grad_loss, out, alpha, gamma, reduce, factor):
    """Launches over all elements of x. Rows of x and of dense targets may have gaps between them; all else is
    contiguous."""
    rows, classes = x.shape
    vector = 16 // x.element_size()
    block = 512 * vector  # 64 bytes per thread of four warps
    index = target.dim() == 1
    x_gap, t_gap = (0 if rows == 1 else t.stride(0) - classes for t in (x, x if index else target))
    gaps = bool(x_gap or t_gap)
    unit = math.gcd(vector, classes, x_gap, t_gap) if gaps else 1  # of which the compiler is told
    _sigmoid_focal[(-(-x.numel() // block),)](
        x, target, weight, normalizer, grad_loss, out, x.numel(), x_gap // unit, t_gap // unit, gamma, alpha, factor,
        CLASSES=classes if index or weight is not None or gaps else 1, GAPS=gaps, UNIT=unit, BLOCK=block,
        VECTOR=vector, TYPE=_triton_type(_accumulate(x)), INDEX=index, BACKWARD=grad_loss is not None, REDUCE=reduce,
        FOCAL=gamma != 0, SQUARE=gamma == 2, BALANCED=alpha >= 0, num_warps=4, sanitize_overflow=False,
    )  # fmt: skip
    return block


def sigmoid_focal_forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss):
    accumulate = _accumulate(input)
    loss_dtype = accumulate if fp32_loss else input.dtype
    x, target = _in_rows(input), _in_rows(target)
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

    _in_stages(add, partial, loss)
    return loss


def sigmoid_focal_backward(grad_loss, input, target, weight, normalizer, alpha, gamma, reduce, scale):
    grad = torch.empty_like(input)
    if input.numel():
        x, target = _in_rows(input), _in_rows(target)
        weight = None if weight is None else weight.contiguous()
        out = grad if grad.is_contiguous() else grad.new_empty(grad.shape)
        grad_loss = grad_loss if reduce else grad_loss.contiguous()
        _sigmoid_launch(x, target, weight, normalizer, grad_loss, out, alpha, gamma, reduce, scale)
        if out is not grad:
            grad.copy_(out)
    return grad
