"""csrc/cuda/losses.cu on the CPU, with the signatures of the operators."""

import functools

import numpy as np
import torch

from tests.proving import cudahost

MULTIPROCESSORS = 4  # of the imagined GPU: few, so that small tests have grids that loop, and rows that are split
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


@functools.cache
def _kernels():
    names = ("forward", "backward", "workspace")
    return cudahost.load("csrc/cuda/losses.cu", [f"fastreg::cuda::cross_entropy_{name}" for name in names])


def _accumulate(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _places(tensor, classes=True):
    """(N, C, D) strides of a tensor without classes (N, D), or with them."""
    dims = 3 if classes else 2
    strides = list(tensor.stride()) if tensor.dim() == dims else [*tensor.stride(), 0]
    return strides


def _vectors(vectors, accumulate):
    return [v if v is None else v.to(accumulate).contiguous() for v in vectors]


def _workspace(input):
    rows = input.numel() // max(1, input.shape[1])
    size = np.zeros(1, np.int64)
    _kernels().cross_entropy_workspace(
        _CODES[input.dtype], rows, input.shape[1], input.stride(1), MULTIPROCESSORS, size
    )
    return np.full(size[0], 0xFF, np.uint8)  # NaN, whatever the type


def cross_entropy_forward(
    input, target, weight, alpha, logit_adjustment, margin, other_target, share,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, fp32_loss,
):  # fmt: skip
    accumulate = _accumulate(input)
    n, classes, d = (*input.shape, 1)[:3]
    rows = [input.shape[0], *input.shape[2:]]
    loss = torch.full([] if reduction else rows, torch.nan, dtype=accumulate if fp32_loss else input.dtype)
    lse = torch.full([2, *rows], torch.nan, dtype=accumulate)
    denominator = torch.full([], torch.nan, dtype=accumulate)
    _kernels().cross_entropy_forward(
        _CODES[input.dtype], input, n, classes, d, *_places(input), target, target.element_size(),
        *_places(target, False), *_vectors((weight, alpha, logit_adjustment, margin), accumulate),
        loss, loss.dtype == accumulate, lse, denominator, _workspace(input), ignore_index, reduction,
        label_smoothing, gamma, alpha_scale, scale, z_loss, zero_if_empty, MULTIPROCESSORS,
    )  # fmt: skip
    return loss, lse, denominator


def cross_entropy_backward(
    grad_loss, input, target, weight, alpha, logit_adjustment, margin, other_target, share, lse, denominator,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss,
):  # fmt: skip
    accumulate = _accumulate(input)
    n, classes, d = (*input.shape, 1)[:3]
    grad = torch.empty_like(input).fill_(torch.nan)
    _kernels().cross_entropy_backward(
        _CODES[input.dtype], grad_loss, grad_loss.dtype == accumulate,
        *((0, 0) if reduction else _places(grad_loss, False)), input, n, classes, d, *_places(input),
        target, target.element_size(), *_places(target, False),
        *_vectors((weight, alpha, logit_adjustment, margin), accumulate), lse, denominator, grad, *_places(grad),
        _workspace(input), ignore_index, label_smoothing, gamma, alpha_scale, scale, z_loss, MULTIPROCESSORS,
    )  # fmt: skip
    return grad


@functools.cache
def _sigmoid_kernels():
    names = ("sigmoid_focal", "sigmoid_focal_workspace")
    return cudahost.load("csrc/cuda/losses_sigmoid.cu", [f"fastreg::cuda::{name}" for name in names])


def _sigmoid_focal(grad_loss, input, target, weight, normalizer, out, alpha, gamma, reduce, scale):
    accumulate, size = _accumulate(input), np.zeros(1, np.int64)
    code, wide = _CODES[input.dtype], (out if grad_loss is None else grad_loss).dtype == accumulate
    _sigmoid_kernels().sigmoid_focal_workspace(code, input.numel(), MULTIPROCESSORS, size)
    _sigmoid_kernels().sigmoid_focal(
        code, grad_loss is not None, grad_loss, input, target, 0 if target.dim() == 2 else target.element_size(),
        *_vectors((weight, normalizer), accumulate), out, wide, np.full(size[0], 0xFF, np.uint8), *input.shape,
        alpha, gamma, reduce, scale, MULTIPROCESSORS,
    )  # fmt: skip
    return out


def sigmoid_focal_forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss):
    out = torch.empty([] if reduce else input.shape, dtype=_accumulate(input) if fp32_loss else input.dtype)
    return _sigmoid_focal(None, input, target, weight, normalizer, out.fill_(torch.nan), alpha, gamma, reduce, scale)


def sigmoid_focal_backward(grad_loss, input, target, weight, normalizer, alpha, gamma, reduce, scale):
    out = torch.empty_like(input).fill_(torch.nan)
    return _sigmoid_focal(grad_loss, input, target, weight, normalizer, out, alpha, gamma, reduce, scale)
