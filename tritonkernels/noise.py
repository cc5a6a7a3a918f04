"""Stochastic depth and soft-thresholding in Triton. The formulas stand in fastreg/noise.py.

Bytes     drop_path: x where the branch is kept, the residual, the output, once each. soft_threshold: x and the output
          once each; backward, x and the gradient once, x's gradient and a sum per run of elements.
Launches  1 each.
Tiles     [runs, elements of a run]: many short runs, or a part of a long one, in one program.
Numerics  fp32 (fp64 for fp64), one rounding.
"""

import torch
import triton
import triton.language as tl

from .max_norm import _bits, _float64

TILE = 4096  # elements of a long run
SHORT = 1024  # elements of several short ones, each of which needs an address of its own: 4096 spill


@triton.jit
def _wide(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit(do_not_specialize=["kept_bits"])
def _drop_path(
    x, mask, residual, out, kept_bits, rows, length, parts,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = i // parts * ROWS + tl.arange(0, ROWS)
    at = i % parts * BLOCK + tl.arange(0, BLOCK)
    keeps = tl.load(mask + row, mask=row < rows, other=0.0) != 0
    inside = (row < rows)[:, None] & (at < length)[None, :]
    place = row[:, None] * length + at[None, :]
    value = _wide(tl.load(x + place, mask=inside & keeps[:, None], other=0.0))
    value = value * _float64(kept_bits).to(value.dtype)
    if RESIDUAL:
        value += _wide(tl.load(residual + place, mask=inside, other=0.0))
    tl.store(out + place, value.to(x.dtype.element_ty), mask=inside)


def _tile(runs: int, length: int) -> tuple[int, int]:
    """(runs, elements) of a tile."""
    block = min(TILE, triton.next_power_of_2(max(length, 16)))
    return min(max(1, SHORT // block), triton.next_power_of_2(runs)), block


def drop_path(x, mask, p, residual):
    out = torch.empty_like(x)
    rows, length = mask.numel(), x.numel() // mask.numel()
    tile = _tile(rows, length)
    parts = triton.cdiv(length, tile[1])
    grid = (triton.cdiv(rows, tile[0]) * parts,)
    kept = _bits(1 / max(1 - p, 2.0**-126))
    _drop_path[grid](x, mask, residual, out, kept, rows, length, parts, residual is not None, *tile)
    return out


@triton.jit
def _shrink(
    x, tau, out, grad, sums, elements, run, runs, channels, sample_step, channel_step,
    BACKWARD: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    given = tl.load(tau + r // channels * sample_step + r % channels * channel_step, mask=r < runs, other=0.0)
    t = tl.maximum(given, 0.0)[:, None]
    total = tl.zeros([RUNS, BLOCK], t.dtype)
    for start in range(0, run, BLOCK):
        j = start + tl.arange(0, BLOCK)
        place = r[:, None] * run + j[None, :]
        inside = (r < runs)[:, None] & (j < run)[None, :] & (place < elements)
        v = _wide(tl.load(x + place, mask=inside, other=0.0))
        if BACKWARD:
            g = _wide(tl.load(grad + place, mask=inside, other=0.0))
            moved = tl.abs(v) > t
            total += tl.where(moved, tl.where(v > 0, -g, g), 0.0)
            value = tl.where(moved, g, 0.0)
        else:
            value = tl.where(v > t, v - t, tl.where(-v > t, v + t, v * 0))
        tl.store(out + place, value.to(x.dtype.element_ty), mask=inside)
    if BACKWARD:
        tl.store(sums + r, tl.where(given < 0, 0.0, tl.sum(total, 1)), mask=r < runs)


def _launch(x, tau, run, channels, sample_step, channel_step, out, grad, sums):
    runs = triton.cdiv(x.numel(), run)
    tile = _tile(runs, run)
    numbers = (x.numel(), run, runs, channels, sample_step, channel_step)
    _shrink[(triton.cdiv(runs, tile[0]),)](x, tau, out, grad, sums, *numbers, sums is not None, *tile)


def soft_threshold(x, tau, run, channels, sample_step, channel_step):
    out = torch.empty_like(x)
    _launch(x, tau, run, channels, sample_step, channel_step, out, None, None)
    return out


def soft_threshold_backward(grad, x, tau, run, channels, sample_step, channel_step):
    grad_x, sums = torch.empty_like(x), tau.new_empty(triton.cdiv(x.numel(), run))
    _launch(x, tau, run, channels, sample_step, channel_step, grad_x, grad, sums)
    return grad_x, sums
