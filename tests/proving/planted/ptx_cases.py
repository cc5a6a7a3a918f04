"""Calls of planted Triton kernels as compiled code; each runs in a process of its own, for `cudahost.run_sanitized`."""

import torch

from tests.proving import ptx


def _kernels():
    ptx.install(90)
    from . import triton_kernels

    return triton_kernels


def values() -> None:
    """Loads, sums across warps, another layout, rounding to bf16, exp."""
    planted = _kernels()
    x = torch.randn(64, 64)
    out, sums = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64)
    planted.transpose_and_sum[(1,)](x, out, sums, SIZE=64)
    torch.testing.assert_close(out, x.t().bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(sums, x.double().exp().sum(1).float(), rtol=2**-20, atol=0)


def approximations() -> None:
    """Worse than rounded to the nearest, and no worse than PTX allows."""
    planted = _kernels()
    x = torch.linspace(1, 2, 1024)
    out = torch.empty(2, 1024)
    planted.divide_and_exp2[(1,)](x, out, SIZE=1024)
    exact = torch.stack([1 / (3 * x).double(), x.double().exp2()])
    error = ((out - exact) / exact).abs().amax(1) * 2**24  # 1: half a unit in the last place, at worst
    assert (error > 1).all() and (error < 6).all(), error


def clear_marks(barrier: str) -> None:
    """Without the barrier, a warp may clear the mark before another has read it."""
    planted = _kernels()
    mark, out = torch.ones(1, dtype=torch.uint8), torch.zeros(128)
    planted.take_mark[(1,)](mark, out, BARRIER=barrier == "1", SIZE=128)
    assert mark.item() == 0 and (out == 1).all()


def misaligned() -> None:
    planted = _kernels()
    x, y = torch.randn(1032), torch.empty(1024)
    try:
        planted.copy_claimed_aligned[(1,)](torch.tensor(x[1:].data_ptr()), y, BLOCK=1024)
    except RuntimeError as error:
        assert "misaligned" in str(error)
    else:
        raise AssertionError("nothing was found")
    planted.copy_claimed_aligned[(1,)](torch.tensor(x[4:].data_ptr()), y, BLOCK=1024)
    assert torch.equal(y, x[4:1028])


def assertion(holds: str) -> None:
    planted = _kernels()
    try:
        planted.assert_positive[(1,)](torch.full((4,), 2.0 * int(holds) - 1), SIZE=4)
    except RuntimeError as error:
        assert holds == "0" and "assertion" in str(error)
    else:
        assert holds == "1"


def out_of_bounds(size: str) -> None:
    """To ASan; its memory is numpy's, which comes from malloc."""
    import numpy as np

    planted = _kernels()
    x, y = (torch.from_numpy(np.zeros(n, np.float32)) for n in (int(size), 1024))
    planted.copy_unmasked[(1,)](x, y, 1000, BLOCK=1024)
