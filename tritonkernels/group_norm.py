"""GroupNorm with activation and residual in Triton. The formula stands in fastreg/group_norm.py.

With x̂ = (x − mean)·rstd and z = x̂·weight + bias + residual, y = act(z), and with dz = dy·act'(z) per element:

    dresidual = dz,   dbias = Σ dz,   dweight = Σ dz·x̂,   dx = rstd·(weight·dz − m1 − x̂·m2)

where m1 and m2 are the means of weight·dz and weight·dz·x̂ over a group.

Bytes     groups that fit on chip: forward x once, y once; backward x and dy once, dx once. Larger ones: forward
          x twice, backward x and dy twice. A residual is one read more wherever z is made.
Launches  on chip: forward 1, backward 2. Larger: forward 3 (statistics of chunks, merge, apply), backward 4.
Tiles     [channels, positions], or [positions, channels] for channels_last: the axis that is contiguous in memory is
          last, so one kernel serves both layouts, coalesced. The channels of a tile are those of one or several whole
          groups, or a part of one: sums go to channels first and from there to groups by a mask.
          D, the channels of a group, is a constant of the kernels: so it is known how tiles are aligned.
Numerics  fp32 (fp64 for fp64). Deviations are taken from the mean (on chip) or from the mean of a chunk's first
          tile, and chunks are merged by their own means. Squares are also summed scaled by 2⁻⁶⁴: these serve where
          the plain ones overflow. Sums have a fixed order: the same input gives the same bits.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ON_CHIP = 16384  # elements of a tile that holds whole groups
TILE = 4096  # elements of a tile of the loops
CHANNELS = 128  # channels of a tile, unless one group has more
PROGRAMS = 512  # as many as keep every multiprocessor of a large GPU busy
SMALL = tl.constexpr(2.0**-64)
NONE, RELU, SILU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(5))


# ---- activations ---------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(z):
    """1/(1 + e⁻ᶻ) and 1 minus it, both without cancellation or overflow."""
    e = tl.exp(-tl.abs(z))
    near = 1.0 / (1.0 + e)  # off by up to 2 units in the last place: a step of Newton's method mends that
    near = tl.fma(near, tl.fma(-1.0 - e, near, 1.0), near)
    return tl.where(z < 0, e * near, near), tl.where(z < 0, near, e * near)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(z < 0, 0.0, z)  # NaN stays
    elif ACT == SILU:
        return z * _sigmoid(z)[0]
    elif ACT == GELU:
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT == GELU_TANH:
        return z * _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * z * z))[0]
    else:
        return z


@triton.jit
def _activation_gradient(dy, z, ACT: tl.constexpr):
    if ACT == RELU:
        return tl.where(z > 0, dy, 0.0)
    elif ACT == SILU:
        s, rest = _sigmoid(z)
        return dy * (s * (1.0 + z * rest))
    elif ACT == GELU:
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return dy * (cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z)))
    elif ACT == GELU_TANH:
        z = tl.where(z > 100.0, 100.0, tl.where(z < -100.0, -100.0, z))  # flat there, and z² must not overflow
        square = z * z
        s, rest = _sigmoid(z * (1.5957691216057308 + 0.07135481627260025 * square))
        return dy * (s * (1.0 + z * rest * (1.5957691216057308 + 0.21406444881780075 * square)))
    else:
        return dy


# ---- tiles ---------------------------------------------------------------------------------------------------


@triton.jit
def _along_channels(v, LAST: tl.constexpr):
    """[channels] against a tile."""
    if LAST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _along_positions(v, LAST: tl.constexpr):
    if LAST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def _channel_sums(tile, LAST: tl.constexpr):
    if LAST:
        return tl.sum(tile, 0)
    else:
        return tl.sum(tile, 1)


@triton.jit
def _to_groups(v, member):
    """Sums of [channels] over each group; what is not finite stays in its group."""
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def _to_channels(v, member):
    """[groups] at each channel, 0 beyond them."""
    return tl.sum(tl.where(member, v[None, :], 0.0), 1)


@triton.jit
def _place(C, G, D: tl.constexpr, K: tl.constexpr, CH: tl.constexpr, channel_blocks, position_chunks):
    """This program's sample, first group, channel block and chunk; its channels and which of them and of its groups
    exist; which channel belongs to which group; how many channels of a group are here."""
    pid = tl.program_id(0)
    chunk = pid % position_chunks
    pid = pid // position_chunks
    block = pid % channel_blocks
    pid = pid // channel_blocks
    group_blocks = tl.cdiv(G, K)
    n = (pid // group_blocks).to(tl.int64)
    first = (pid % group_blocks) * K
    local = tl.arange(0, CH)
    inside = block * CH + local
    here = (inside < K * D) & (first * D + inside < C)
    group = tl.arange(0, K)
    member = (inside[:, None] // D == group[None, :]) & here[:, None]
    width = tl.minimum(D - block * CH, CH)
    return n, first, block, chunk, first * D + inside, here, group, member, width


@triton.jit
def _offsets(channel, position, row_stride, LAST: tl.constexpr):
    c, s = _along_channels(channel.to(tl.int64), LAST), _along_positions(position.to(tl.int64), LAST)
    if LAST:
        return s * row_stride + c
    else:
        return c * row_stride + s


@triton.jit
def _parameter(pointer, channel, here, default: tl.constexpr, TYPE: tl.constexpr):
    if pointer is None:
        return tl.full(channel.shape, default, TYPE)
    else:
        return tl.load(pointer + channel, mask=here, other=0.0).to(TYPE)


# ---- statistics ----------------------------------------------------------------------------------------------


@triton.jit
def _product(a, b):
    """a·b, rounded before it is added to another lane's. Fused with that sum where a thread has one, it would give two
    lanes, each of which rounds the other's product alone, two sums, and the block whichever is stored last."""
    return tl.fma(a, b, 0.0)


@triton.jit
def _squares(square, off, count):
    """Σ(d − off)² from Σd² and the mean of d; infinity where that has overflowed."""
    m2 = tl.maximum(square - off * off * count, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(square == float("inf"), square, m2)


@triton.jit
def _quotient(a, b):
    """a / b, in fp32 rounded once: `/` is an approximation, and what is off here is off in a whole group."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _rstd(m2, scaled, count, eps):
    """From Σd², and from Σ(d·2⁻⁶⁴)² where that has overflowed."""
    plain = _quotient(1.0, _root(_quotient(m2, count) + eps))
    large = _quotient(SMALL, _root(_quotient(scaled, count)))
    return tl.where(m2 == float("inf"), large, plain)


@triton.jit
def _forward_whole(
    x, residual, weight, bias, y, stats,
    N, C, G, D: tl.constexpr, S, count: tl.float64, eps: tl.float64, x_n, x_r, r_n, r_r, y_n, y_r,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    count, eps = tl.full([], count, TYPE), tl.full([], eps, TYPE)
    n, first, _, _, channel, here, group, member, _ = _place(C, G, D, K, CH, 1, 1)
    position = tl.arange(0, P)
    mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
    v = tl.load(x + n * x_n + _offsets(channel, position, x_r, LAST), mask=mask, other=0.0).to(TYPE)
    pivot = _to_channels(_quotient(_to_groups(_channel_sums(v, LAST), member), count), member)
    d = tl.where(mask, v - _along_channels(pivot, LAST), 0.0)
    # What the rounded mean is off by.
    off = _quotient(_to_groups(_channel_sums(d, LAST), member), count)
    m2 = _squares(_to_groups(_channel_sums(_product(d, d), LAST), member), off, count)
    scaled = _to_groups(_channel_sums(_product(d * SMALL, d * SMALL), LAST), member)
    rstd = _rstd(m2, scaled, count, eps)
    off = _to_channels(off, member)
    if stats is not None:
        here_g = first + group < G
        mean = _to_groups(tl.where(tl.arange(0, CH) % D == 0, pivot + off, 0.0), member)
        tl.store(stats + n * G + first + group, mean, mask=here_g)
        tl.store(stats + (N + n) * G + first + group, rstd, mask=here_g)
    scale = _to_channels(rstd, member) * _parameter(weight, channel, here, 1.0, TYPE)
    shift = _parameter(bias, channel, here, 0.0, TYPE) - off * scale  # here, not in d: a rounding less of each element
    z = d * _along_channels(scale, LAST) + _along_channels(shift, LAST)
    if residual is not None:
        z += tl.load(residual + n * r_n + _offsets(channel, position, r_r, LAST), mask=mask, other=0.0).to(TYPE)
    tl.store(y + n * y_n + _offsets(channel, position, y_r, LAST), _activate(z, ACT), mask=mask)


@triton.jit
def _moments(
    x, parts,
    C, G, D: tl.constexpr, S, x_n, x_r, channel_blocks, position_chunks, steps,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Count, mean, Σd² and Σ(d·2⁻⁶⁴)² of each group in this program's chunk."""
    n, first, block, chunk, channel, here, group, member, width = _place(
        C, G, D, K, CH, channel_blocks, position_chunks
    )
    begin = chunk.to(tl.int64) * steps * P
    x += n * x_n
    position = begin + tl.arange(0, P)
    mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
    v = tl.load(x + _offsets(channel, position, x_r, LAST), mask=mask, other=0.0).to(TYPE)
    lead = tl.minimum(S - begin, P).to(TYPE) * width.to(TYPE)
    pivot = _quotient(_to_groups(_channel_sums(v, LAST), member), lead)
    pivots = _along_channels(_to_channels(pivot, member), LAST)
    d = tl.where(mask, v - pivots, 0.0)
    total, square, scaled = d, d * d, (d * SMALL) * (d * SMALL)
    for step in range(1, steps):
        position = begin + step * P + tl.arange(0, P)
        mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
        v = tl.load(x + _offsets(channel, position, x_r, LAST), mask=mask, other=0.0).to(TYPE)
        d = tl.where(mask, v - pivots, 0.0)
        total += d
        square += d * d
        scaled += (d * SMALL) * (d * SMALL)
    count = tl.minimum(S - begin, steps * P).to(TYPE) * width.to(TYPE)
    off = _quotient(_to_groups(_channel_sums(total, LAST), member), count)
    m2 = _squares(_to_groups(_channel_sums(square, LAST), member), off, count)
    scaled_sum = _to_groups(_channel_sums(scaled, LAST), member)
    chunks = channel_blocks * position_chunks
    to = parts + ((n * G + first + group) * chunks + block * position_chunks + chunk) * 4
    here_g = first + group < G
    tl.store(to, tl.zeros_like(off) + count, mask=here_g)
    tl.store(to + 1, pivot + off, mask=here_g)
    tl.store(to + 2, m2, mask=here_g)
    tl.store(to + 3, scaled_sum, mask=here_g)


@triton.jit
def _merge_moments(
    parts, stats, total_groups, chunks, count: tl.float64, eps: tl.float64, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and rstd of groups from the moments of their chunks."""
    TYPE: tl.constexpr = stats.dtype.element_ty
    count, eps = tl.full([], count, TYPE), tl.full([], eps, TYPE)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here_g = index < total_groups
    j = tl.arange(0, CHUNKS)
    at = parts + (index[:, None] * chunks + j[None, :]) * 4
    mask = here_g[:, None] & (j < chunks)[None, :]
    n = tl.load(at, mask=mask, other=0.0)
    mean = tl.load(at + 1, mask=mask, other=0.0)
    m2 = tl.load(at + 2, mask=mask, other=0.0)
    scaled = tl.load(at + 3, mask=mask, other=0.0)
    # Relative to the first chunk's, means add up without losing digits to their common part.
    base = tl.sum(tl.where(mask & (j == 0)[None, :], mean, 0.0), 1)
    all_mean = base + tl.sum(tl.where(mask, n * _quotient(mean - base[:, None], count), 0.0), 1)
    d = tl.where(mask, mean - all_mean[:, None], 0.0)
    total = tl.sum(m2 + n * d * d, 1)
    large = tl.sum(scaled + n * (d * SMALL) * (d * SMALL), 1)
    tl.store(stats + index, all_mean, mask=here_g)
    tl.store(stats + total_groups + index, _rstd(total, large, count, eps), mask=here_g)


@triton.jit
def _statistics(stats, N, G, n, first, group, member, LAST: tl.constexpr):
    here_g = first + group < G
    mean = tl.load(stats + n * G + first + group, mask=here_g, other=0.0)
    rstd = tl.load(stats + (N + n) * G + first + group, mask=here_g, other=0.0)
    return (
        _along_channels(_to_channels(mean, member), LAST),
        _along_channels(_to_channels(rstd, member), LAST),
    )


@triton.jit
def _apply(
    x, residual, weight, bias, y, stats,
    N, C, G, D: tl.constexpr, S, x_n, x_r, r_n, r_r, y_n, y_r, channel_blocks, position_chunks, steps,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    n, first, _, chunk, channel, here, group, member, _ = _place(C, G, D, K, CH, channel_blocks, position_chunks)
    means, rstd = _statistics(stats, N, G, n, first, group, member, LAST)
    scale = rstd * _along_channels(_parameter(weight, channel, here, 1.0, TYPE), LAST)
    shift = _along_channels(_parameter(bias, channel, here, 0.0, TYPE), LAST)
    begin = chunk.to(tl.int64) * steps * P
    for step in range(steps - 1, -1, -1):  # backwards: what was read last is still in the cache
        position = begin + step * P + tl.arange(0, P)
        mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
        v = tl.load(x + n * x_n + _offsets(channel, position, x_r, LAST), mask=mask, other=0.0).to(TYPE)
        z = (v - means) * scale + shift
        if residual is not None:
            z += tl.load(residual + n * r_n + _offsets(channel, position, r_r, LAST), mask=mask, other=0.0).to(TYPE)
        tl.store(y + n * y_n + _offsets(channel, position, y_r, LAST), _activate(z, ACT), mask=mask)


# ---- backward ------------------------------------------------------------------------------------------------


@triton.jit
def _dz(x, residual, dy, mean, rstd, scale, shift, mask, ACT: tl.constexpr, TYPE: tl.constexpr):
    """x̂ and dz of a tile; both 0 beyond it."""
    v = tl.load(x, mask=mask, other=0.0).to(TYPE)
    dz = tl.load(dy, mask=mask, other=0.0).to(TYPE)
    normal = tl.where(mask, (v - mean) * rstd, 0.0)
    if ACT != NONE:
        z = normal * scale + shift
        if residual is not None:
            z += tl.load(residual, mask=mask, other=0.0).to(TYPE)
        dz = tl.where(mask, _activation_gradient(dz, z, ACT), 0.0)
    return normal, dz


@triton.jit
def _backward_whole(
    dy, x, residual, weight, bias, stats, dx, dr, sums,
    N, C, G, D: tl.constexpr, S, count: tl.float64, g_n, g_r, x_n, x_r, r_n, r_r, y_n, y_r,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    count = tl.full([], count, TYPE)
    n, first, _, _, channel, here, group, member, _ = _place(C, G, D, K, CH, 1, 1)
    position = tl.arange(0, P)
    mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
    mean, rstd = _statistics(stats, N, G, n, first, group, member, LAST)
    scale = _parameter(weight, channel, here, 1.0, TYPE)
    shift = _along_channels(_parameter(bias, channel, here, 0.0, TYPE), LAST)
    r = residual
    if residual is not None:
        r = residual + n * r_n + _offsets(channel, position, r_r, LAST)
    normal, dz = _dz(
        x + n * x_n + _offsets(channel, position, x_r, LAST), r,
        dy + n * g_n + _offsets(channel, position, g_r, LAST),
        mean, rstd, _along_channels(scale, LAST), shift, mask, ACT, TYPE,
    )  # fmt: skip
    of_dz, of_dz_x = _channel_sums(dz, LAST), _channel_sums(_product(dz, normal), LAST)
    if sums is not None:
        tl.store(sums + n * C + channel, of_dz, mask=here)
        tl.store(sums + (N + n) * C + channel, of_dz_x, mask=here)
    to = n * y_n + _offsets(channel, position, y_r, LAST)
    if dr is not None:
        tl.store(dr + to, dz, mask=mask)
    if dx is not None:
        m1 = _to_channels(_quotient(_to_groups(scale * of_dz, member), count), member)
        m2 = _to_channels(_quotient(_to_groups(scale * of_dz_x, member), count), member)
        d = dz * _along_channels(scale, LAST) - _along_channels(m1, LAST) - normal * _along_channels(m2, LAST)
        d = tl.where(count == 1.0, 0.0, d)  # exactly, where rounding would leave a rest
        tl.store(dx + to, d * rstd, mask=mask)


@triton.jit
def _partial_sums(
    dy, x, residual, weight, bias, stats, dr, parts,
    N, C, G, D: tl.constexpr, S, g_n, g_r, x_n, x_r, r_n, r_r, y_n, y_r, channel_blocks, position_chunks, steps,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Σ dz and Σ dz·x̂ of each channel in this program's chunk, to parts[2, N, position_chunks, C]."""
    n, first, _, chunk, channel, here, group, member, _ = _place(C, G, D, K, CH, channel_blocks, position_chunks)
    mean, rstd = _statistics(stats, N, G, n, first, group, member, LAST)
    scale = _along_channels(_parameter(weight, channel, here, 1.0, TYPE), LAST)
    shift = _along_channels(_parameter(bias, channel, here, 0.0, TYPE), LAST)
    begin = chunk.to(tl.int64) * steps * P
    if LAST:
        total = tl.zeros((P, CH), TYPE)
    else:
        total = tl.zeros((CH, P), TYPE)
    total_x = total
    for step in range(steps):
        position = begin + step * P + tl.arange(0, P)
        mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
        r = residual
        if residual is not None:
            r = residual + n * r_n + _offsets(channel, position, r_r, LAST)
        normal, dz = _dz(
            x + n * x_n + _offsets(channel, position, x_r, LAST), r,
            dy + n * g_n + _offsets(channel, position, g_r, LAST), mean, rstd, scale, shift, mask, ACT, TYPE,
        )  # fmt: skip
        total += dz
        total_x += dz * normal
        if dr is not None:
            tl.store(dr + n * y_n + _offsets(channel, position, y_r, LAST), dz, mask=mask)
    to = parts + (n * position_chunks + chunk) * C + channel
    tl.store(to, _channel_sums(total, LAST), mask=here)
    tl.store(to + N * position_chunks * C, _channel_sums(total_x, LAST), mask=here)


@triton.jit
def _merge_sums(
    parts, weight, sums, terms, N, C, G, D, S, count: tl.float64, position_chunks, blocks, CH: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """Per sample and group: Σ over the chunks, to sums[2, N, C], and m1 and m2, to terms[2, N, G]."""
    count = tl.full([], count, TYPE)
    pid = tl.program_id(0).to(tl.int64)
    n, g = pid // G, pid % G
    m1 = tl.zeros((CH,), TYPE)
    m2 = tl.zeros((CH,), TYPE)
    for block in range(blocks):
        inside = block * CH + tl.arange(0, CH)
        here = inside < D
        channel = g * D + inside
        of_dz = tl.zeros((CH,), TYPE)
        of_dz_x = tl.zeros((CH,), TYPE)
        for chunk in range(position_chunks):
            at = parts + (n * position_chunks + chunk) * C + channel
            of_dz += tl.load(at, mask=here, other=0.0)
            of_dz_x += tl.load(at + N * position_chunks * C, mask=here, other=0.0)
        tl.store(sums + n * C + channel, of_dz, mask=here)
        tl.store(sums + (N + n) * C + channel, of_dz_x, mask=here)
        scale = _parameter(weight, channel, here, 1.0, TYPE)
        m1 += scale * of_dz
        m2 += scale * of_dz_x
    tl.store(terms + n * G + g, _quotient(tl.sum(m1, 0), count))
    tl.store(terms + (N + n) * G + g, _quotient(tl.sum(m2, 0), count))


@triton.jit
def _apply_backward(
    dy, x, residual, weight, bias, stats, terms, dx,
    N, C, G, D: tl.constexpr, S, g_n, g_r, x_n, x_r, r_n, r_r, y_n, y_r, channel_blocks, position_chunks, steps,
    K: tl.constexpr, CH: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    n, first, _, chunk, channel, here, group, member, _ = _place(C, G, D, K, CH, channel_blocks, position_chunks)
    mean, rstd = _statistics(stats, N, G, n, first, group, member, LAST)
    m1, m2 = _statistics(terms, N, G, n, first, group, member, LAST)
    scale = _along_channels(_parameter(weight, channel, here, 1.0, TYPE), LAST)
    shift = _along_channels(_parameter(bias, channel, here, 0.0, TYPE), LAST)
    begin = chunk.to(tl.int64) * steps * P
    for step in range(steps - 1, -1, -1):
        position = begin + step * P + tl.arange(0, P)
        mask = _along_channels(here, LAST) & _along_positions(position < S, LAST)
        r = residual
        if residual is not None:
            r = residual + n * r_n + _offsets(channel, position, r_r, LAST)
        normal, dz = _dz(
            x + n * x_n + _offsets(channel, position, x_r, LAST), r,
            dy + n * g_n + _offsets(channel, position, g_r, LAST), mean, rstd, scale, shift, mask, ACT, TYPE,
        )  # fmt: skip
        to = dx + n * y_n + _offsets(channel, position, y_r, LAST)
        tl.store(to, (dz * scale - m1 - normal * m2) * rstd, mask=mask)


@triton.jit
def _parameter_gradients(sums, dweight, dbias, N, C, second, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = channel < C
    of_dz = tl.zeros((BLOCK,), TYPE)
    of_dz_x = tl.zeros((BLOCK,), TYPE)
    at = sums + channel
    for _ in range(N):
        if dbias is not None:
            of_dz += tl.load(at, mask=here, other=0.0)
        if dweight is not None:
            of_dz_x += tl.load(at + second, mask=here, other=0.0)
        at += C
    if dbias is not None:
        tl.store(dbias + channel, of_dz, mask=here)
    if dweight is not None:
        tl.store(dweight + channel, of_dz_x, mask=here)


# ---- launchers -----------------------------------------------------------------------------------------------


def _rows(tensor: Tensor | None, last: bool) -> tuple[int, int]:
    """The strides of the sample and of the row: a channel, or for channels_last a position."""
    if tensor is None:
        return 0, 0
    if not last:
        return tensor.stride(0), tensor.stride(1)
    step = [tensor.stride(d) for d in range(tensor.dim() - 1, 1, -1) if tensor.shape[d] != 1]
    return tensor.stride(0), step[0] if step else tensor.shape[1]


def _kind(tensor: Tensor) -> bool | None:
    """Whether rows are positions; None if the tensor can be read neither as rows of channels nor of positions."""
    if not tensor.numel():
        return False  # nothing is read, and no copy would lie otherwise
    step = expected = None
    for d in range(tensor.dim() - 1, 1, -1):
        if tensor.shape[d] != 1:
            if expected is None:
                step = tensor.stride(d)
            elif tensor.stride(d) != expected:
                return None
            expected = tensor.stride(d) * tensor.shape[d]
    adjacent = tensor.shape[1] == 1 or tensor.stride(1) == 1
    if step is None or step == 1:
        return adjacent and step is None
    return True if adjacent else None


def _laid_out(tensor: Tensor, last: bool) -> Tensor:
    """The tensor, or a copy, as rows of the kind asked for."""
    kind = _kind(tensor)
    if kind is last or (kind is not None and math.prod(tensor.shape[2:]) <= 1 and not last):
        return tensor
    if kind is not None and last and (tensor.shape[1] == 1 or tensor.stride(1) == 1) and tensor.dim() > 2:
        return tensor
    sizes = tensor.shape
    order = (0, *range(2, tensor.dim()), 1) if last else range(tensor.dim())
    strides, step = [0] * tensor.dim(), 1
    for d in reversed(order):
        strides[d], step = step, step * sizes[d]
    return tensor.new_empty_strided(sizes, strides).copy_(tensor)


def _power(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


@dataclass
class _Plan:
    """How the work is cut: K groups and CH channels per tile, P positions; programs = samples · group blocks ·
    channel blocks · position chunks, each with some steps."""

    K: int
    CH: int
    P: int
    whole: bool
    channel_blocks: int
    position_chunks: int
    steps: int
    programs: int
    warps: int

    @property
    def registers(self) -> int:
        """What there is for a thread. Unasked, ptxas spills where that fits another block."""
        return min(255, 2048 // self.warps)


def _plan(samples: int, groups: int, per_group: int, positions: int, last: bool, on_chip: int, tile: int) -> _Plan:
    # Several groups where one has few channels: many of them, so that rows of channels_last fill their sectors of 32
    # bytes and small groups a program; but no more than fit.
    k, fewest = 1, 16 if last else 1
    while 2 * k * per_group <= CHANNELS and k < groups:
        k *= 2
    while k > 1 and _power(k * per_group) * _power(positions) > tile and k // 2 * per_group >= fewest:
        if last and k // 2 * per_group % 8:
            break  # rows of a tile begin where 16 bytes of two-byte elements do
        k //= 2
    ch, p = _power(k * per_group), _power(positions)
    programs = samples * -(-groups // k)
    if ch * p <= on_chip:
        held = ch * p * (ON_CHIP // on_chip)  # x, in the backward dy too: at most 32 numbers to a thread, 64 spill
        warps = 16 if held > 8192 else 8 if held >= 4096 else 4 if held >= 1024 else 1
        return _Plan(k, ch, p, True, 1, 1, 1, programs, warps)
    ch = min(ch, 1024)
    channel_blocks = -(-k * per_group // ch)
    p = max(min(tile // ch, p), 1)
    tiles = -(-positions // p)
    programs *= channel_blocks
    # Enough programs for a GPU, but no more chunks than a program can merge at once.
    chunks = max(min(-(-PROGRAMS // programs), tiles, 1024 // channel_blocks), 1)
    steps = -(-tiles // chunks)
    chunks = -(-tiles // steps)
    return _Plan(k, ch, p, False, channel_blocks, chunks, steps, programs * chunks, 4)


def group_norm_forward(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: int,
    residual: Tensor | None,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(input)
    last = _kind(output)
    if last is None:  # in an order of dimensions of its own
        values, stats = group_norm_forward(
            input.contiguous(), num_groups, weight, bias, eps, activation, residual, save_stats
        )
        return output.copy_(values), stats
    samples, channels, positions = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    stats = input.new_empty((2, samples, num_groups) if save_stats else (0,), dtype=accumulate)
    if input.numel() == 0:
        return output, stats.fill_(math.nan)
    input = _laid_out(input, last)
    residual = None if residual is None else _laid_out(residual, last)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    per_group = channels // num_groups
    plan = _plan(samples, num_groups, per_group, positions, last, ON_CHIP, TILE)
    kind = tl.float64 if accumulate == torch.float64 else tl.float32
    sizes = (channels, num_groups, per_group, positions)
    count = float(per_group) * positions
    strides = (*_rows(input, last), *_rows(residual, last), *_rows(output, last))
    saved = stats if save_stats else None
    tile = dict(K=plan.K, CH=plan.CH, P=plan.P, LAST=last, TYPE=kind, num_warps=plan.warps)
    if plan.whole:
        _forward_whole[(plan.programs,)](
            input, residual, weight, bias, output, saved, samples, *sizes, count, eps, *strides, ACT=activation, **tile,
            maxnreg=plan.registers,
        )  # fmt: skip
        return output, stats
    chunks = plan.channel_blocks * plan.position_chunks
    parts = stats.new_empty(samples, num_groups, chunks, 4)
    cut = (plan.channel_blocks, plan.position_chunks, plan.steps)
    _moments[(plan.programs,)](input, parts, *sizes, *strides[:2], *cut, **tile)
    made = stats if save_stats else stats.new_empty(2, samples, num_groups)
    total = samples * num_groups
    padded = _power(chunks)
    block = max(1024 // padded, 1)
    _merge_moments[(triton.cdiv(total, block),)](
        parts, made, total, chunks, count, eps, CHUNKS=padded, BLOCK=block, num_warps=4
    )
    _apply[(plan.programs,)](
        input, residual, weight, bias, output, made, samples, *sizes, *strides, *cut, ACT=activation, **tile
    )
    return output, stats


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    residual: Tensor | None,
    stats: Tensor,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [
        torch.empty_like(like) if wanted & bit else input.new_empty(0)
        for bit, like in ((1, input), (2, weight), (4, bias), (8, input))
    ]
    last = _kind(torch.empty_like(input, device="meta"))
    if last is None:
        values = group_norm_backward(
            grad_output, input.contiguous(), num_groups, weight, bias, activation, residual, stats, wanted
        )
        for i in (0, 3):
            if wanted >> i & 1:
                grads[i].copy_(values[i])
        return grads[0], values[1], values[2], grads[3]
    samples, channels, positions = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    dx, dweight, dbias, dr = (grad if wanted >> i & 1 else None for i, grad in enumerate(grads))
    if input.numel() == 0:
        for grad in grads:
            grad.zero_()
        return tuple(grads)
    input, grad_output = _laid_out(input, last), _laid_out(grad_output, last)
    residual = None if residual is None or not activation else _laid_out(residual, last)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    per_group = channels // num_groups
    plan = _plan(samples, num_groups, per_group, positions, last, ON_CHIP // 2, TILE // 2)
    kind = tl.float64 if stats.dtype == torch.float64 else tl.float32
    sizes = (samples, channels, num_groups, per_group, positions)
    count = float(per_group) * positions
    made = dx if dx is not None else dr
    strides = [s for t in (grad_output, input, residual, made) for s in _rows(t, last)]
    tile = dict(K=plan.K, CH=plan.CH, P=plan.P, LAST=last, ACT=activation, TYPE=kind, num_warps=plan.warps)
    sums = None
    if wanted & 6 or not plan.whole:
        sums = stats.new_empty(2, samples, channels)
    if plan.whole:
        _backward_whole[(plan.programs,)](
            grad_output, input, residual, weight, bias, stats, dx, dr, sums, *sizes, count, *strides, **tile
        )
    else:
        parts = stats.new_empty(2, samples, plan.position_chunks, channels)
        terms = torch.empty_like(stats)
        cut = (plan.channel_blocks, plan.position_chunks, plan.steps)
        _partial_sums[(plan.programs,)](
            grad_output, input, residual, weight, bias, stats, dr, parts, *sizes, *strides, *cut, **tile,
            maxnreg=plan.registers,
        )  # fmt: skip
        block = min(_power(per_group), 1024)
        _merge_sums[(samples * num_groups,)](
            parts, weight, sums, terms, *sizes, count, plan.position_chunks, -(-per_group // block),
            CH=block, TYPE=kind, num_warps=1 if block <= 128 else 4,
        )  # fmt: skip
        if dx is not None:
            _apply_backward[(plan.programs,)](
                grad_output, input, residual, weight, bias, stats, terms, dx, *sizes, *strides, *cut, **tile
            )
    if wanted & 6:
        _parameter_gradients[(triton.cdiv(channels, 128),)](
            sums, dweight, dbias, samples, channels, samples * channels, BLOCK=128, TYPE=kind, num_warps=1
        )
    return tuple(grads)
