"""csrc/cuda/group_norm.cu on the CPU, with the signatures of the operators."""

import functools

import numpy as np
import torch

from tests.proving import cudahost

MULTIPROCESSORS = 4  # of the imagined GPU: few, so that small tests have larger slabs
SHARED_BYTES = 227 << 10
CAPABILITY = 80  # without clusters
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


@functools.cache
def _kernels():
    names = ("forward", "backward", "workspace")
    return cudahost.load("csrc/cuda/group_norm.cu", [f"fastreg::cuda::group_norm_{name}" for name in names])


def is_last(tensor):
    """Whether the rows of an (N, C, S) tensor are positions."""
    return tensor.stride(1) == 1 and tensor.shape[1] > 1 and (tensor.stride(2) != 1 or tensor.shape[2] == 1)


def _rows(tensor, last):
    return (tensor, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(2 if last else 1))


def _parameter(tensor):
    return tensor, 0 if tensor is None else _CODES[tensor.dtype]


def workspace(input, groups, backward, last):
    n, channels, positions = input.shape
    size = np.zeros(1, np.int64)
    _kernels().group_norm_workspace(
        _CODES[input.dtype], backward, last, n, channels, groups, positions, MULTIPROCESSORS, SHARED_BYTES, CAPABILITY,
        size,
    )  # fmt: skip
    return np.full(size[0], 0xFF, np.uint8)  # NaN, whatever the type


def group_norm_forward(input, num_groups, weight, bias, eps, activation, residual, save_stats):
    """input and residual: (N, C, S), rows of channels or of positions."""
    n, channels, positions = input.shape
    last = is_last(input)
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    output = torch.empty_like(input).fill_(torch.nan)
    stats = torch.full((2, n, num_groups), torch.nan, dtype=accumulate)
    _kernels().group_norm_forward(
        _CODES[input.dtype], last, n, channels, num_groups, positions, *_rows(input, last), *_rows(residual, last),
        *_parameter(weight), *_parameter(bias), *_rows(output, last), stats if save_stats else None,
        workspace(input, num_groups, False, last), eps, activation, MULTIPROCESSORS, SHARED_BYTES, CAPABILITY,
    )  # fmt: skip
    return output, stats


def group_norm_backward(grad_output, input, num_groups, weight, bias, activation, residual, stats, wanted):
    n, channels, positions = input.shape
    last = is_last(input)
    grads = [
        torch.empty_like(like).fill_(torch.nan) if wanted & bit else None
        for bit, like in ((1, input), (2, weight), (4, bias), (8, input))
    ]
    dx, dweight, dbias, dr = grads
    _kernels().group_norm_backward(
        _CODES[input.dtype], last, n, channels, num_groups, positions, *_rows(grad_output, last),
        *_rows(input, last), *_rows(residual, last), *_parameter(weight), *_parameter(bias), stats,
        *_rows(dx, last), *_rows(dr, last), *_parameter(dweight), *_parameter(dbias),
        workspace(input, num_groups, True, last), activation, MULTIPROCESSORS, SHARED_BYTES, CAPABILITY,
    )  # fmt: skip
    return tuple(grads)
