"""csrc/cuda/losses.cu on the CPU, with the signatures of the operators."""

import functools
import re

import numpy as np
import torch

from fastreg._ops import every_class_has_a_share
from tests.proving import cudahost

MULTIPROCESSORS = 4  # of the imagined GPU: few, so that small tests have grids that loop, and rows that are split
SHARED_BYTES = 40 << 10  # of a block: little, so that not only short rows wait there and long ones do not
CAPABILITY = 90  # below, blocks cannot share a row
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


# Of csrc/cuda/losses_launch.h: every member of CrossEntropyCall, all of 8 bytes.
_POINTERS = "input target other share weight alpha adjustment margin loss lse denominator losses argmax grad_loss"
_POINTERS = (*_POINTERS.split(), "grad_input", "workspace")
_REALS = ("smoothing", "gamma", "alpha_scale", "scale", "z_loss")


@functools.cache
def _members():
    text = (cudahost.ROOT / "csrc/cuda/losses_launch.h").read_text()
    body = re.search(r"struct CrossEntropyCall {(.*?)^};", text, re.S | re.M)[1]
    declarations = re.sub(r"//.*", "", body).replace("const void", "").replace("*", "").split(";")
    names = [name for line in declarations for name in re.sub(r"^\s*(int64_t|double|void)?\s", "", line).split(",")]
    return [name.strip() for name in names if name.strip()]


@functools.cache
def _kernels():
    names = ("cross_entropy_forward", "cross_entropy_backward", "cross_entropy_workspace", "scale_gradient")
    return cudahost.load("csrc/cuda/losses.cu", [f"fastreg::cuda::{name}" for name in names])


def _run(name, **members):
    """Fills in the struct, with a workspace full of NaN, and calls one of the launchers with it."""
    dtypes = {
        name: np.uint64 if name in _POINTERS else np.float64 if name in _REALS else np.int64 for name in _members()
    }
    call, touched = np.zeros(1, list(dtypes.items())), []
    for member, value in members.items():
        if isinstance(value, torch.Tensor):
            touched.append(value)
            value = value.data_ptr()
        call[member] = 0 if value is None else value
    size = np.zeros(1, np.int64)
    _kernels().cross_entropy_workspace(call, size)
    workspace = np.full(max(1, size[0]), 0xFF, np.uint8)
    call["workspace"] = workspace.ctypes.data
    getattr(_kernels(), name)(call, *touched, workspace)


def _accumulate(input):
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _strides(name, tensor, classes=True):
    """The members stride_n, stride_c, stride_d of a tensor (N, C, D) or (N, C), or (N, D) or (N,) without classes."""
    if tensor is None:
        return {}
    names = ("stride_n", "stride_c", "stride_d") if classes else ("stride_n", "stride_d")
    return {f"{name}{member}": step for member, step in zip(names, tensor.stride(), strict=False)}


def _vectors(vectors, accumulate):
    return [v if v is None else v.to(accumulate).contiguous() for v in vectors]


def _call(
    input, target, weight, alpha, logit_adjustment, margin, other_target, share,
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss,
):  # fmt: skip
    accumulate = _accumulate(input)
    n, classes, d = (*input.shape, 1)[:3]
    probabilities = target.is_floating_point()
    if probabilities and target.dtype != input.dtype:
        target = target.to(accumulate)
    vectors = zip(
        ("weight", "alpha", "adjustment", "margin"), _vectors((weight, alpha, logit_adjustment, margin), accumulate),
        strict=True,
    )  # fmt: skip
    return dict(
        dtype=_CODES[input.dtype], input=input, n=n, classes=classes, d=d, **_strides("", input), target=target,
        target_bytes=0 if probabilities else target.element_size(), wide_target=target.dtype == accumulate,
        **_strides("target_", target, probabilities), other=other_target,
        other_bytes=0 if other_target is None else other_target.element_size(),
        **_strides("other_", other_target, False), share=share, **_strides("share_", share, False), **dict(vectors),
        ignore_index=ignore_index, reduction=reduction, smoothing=label_smoothing, gamma=gamma,
        alpha_scale=alpha_scale, scale=scale, z_loss=z_loss, multiprocessors=MULTIPROCESSORS, shared_bytes=SHARED_BYTES,
        capability=CAPABILITY,
    )  # fmt: skip


def cross_entropy_forward(*args):
    return cross_entropy_forward_extra(*args, False, False, None)[:3]


def cross_entropy_forward_extra(*args):
    *args, zero_if_empty, fp32_loss, want_losses, want_argmax, grad_input = args
    call = _call(*args)
    input, reduction = args[0], args[9]
    accumulate = _accumulate(input)
    rows = [input.shape[0], *input.shape[2:]]
    loss = torch.full([] if reduction else rows, torch.nan, dtype=accumulate if fp32_loss else input.dtype)
    known = 2 + every_class_has_a_share(args[1], *args[10:12])
    lse = torch.full([known, *rows], torch.nan, dtype=accumulate)
    denominator = torch.full([], torch.nan, dtype=accumulate)
    losses = torch.full(rows if want_losses else [0], torch.nan, dtype=accumulate)
    argmax = torch.full(rows if want_argmax else [0], -7, dtype=torch.int64)
    _run(
        "cross_entropy_forward", **call, loss=loss, wide=loss.dtype == accumulate, lse=lse, denominator=denominator,
        losses=losses if want_losses else None, argmax=argmax if want_argmax else None, grad_input=grad_input,
        **_strides("grad_", grad_input), zero_if_empty=zero_if_empty,
    )  # fmt: skip
    return loss, lse, denominator, losses, argmax


def cross_entropy_backward(grad_loss, *args):
    *tensors, lse, denominator = args[:10]
    call = _call(*tensors, *args[10:])
    input, reduction = tensors[0], args[11]
    grad = torch.empty_like(input).fill_(torch.nan)
    _run(
        "cross_entropy_backward", **call, grad_loss=grad_loss, wide=grad_loss.dtype == _accumulate(input),
        **(_strides("grad_loss_", grad_loss, False) if reduction == 0 else {}), lse=lse, denominator=denominator,
        grad_input=grad, **_strides("grad_", grad),
    )  # fmt: skip
    return grad


def scale_gradient_(grad, factor):
    _kernels().scale_gradient(_CODES[grad.dtype], grad, factor.to(_accumulate(grad)), grad.numel(), MULTIPROCESSORS)


@functools.cache
def _sigmoid_kernels():
    names = ("sigmoid_focal", "sigmoid_focal_workspace")
    return cudahost.load("csrc/cuda/losses_sigmoid.cu", [f"fastreg::cuda::{name}" for name in names])


def _sigmoid_focal(grad_loss, input, target, weight, normalizer, out, alpha, gamma, reduce, scale):
    accumulate, size = _accumulate(input), np.zeros(1, np.int64)
    code, wide = _CODES[input.dtype], (out if grad_loss is None else grad_loss).dtype == accumulate
    input, target = (t if t.dim() == 2 and t.stride(1) == 1 else t.contiguous() for t in (input, target))
    _sigmoid_kernels().sigmoid_focal_workspace(code, input.numel(), MULTIPROCESSORS, size)
    _sigmoid_kernels().sigmoid_focal(
        code, grad_loss is not None, grad_loss, input, input.stride(0), target, target.stride(0), target.dim() == 2,
        target.element_size(), *_vectors((weight, normalizer), accumulate), out, wide,
        np.full(size[0], 0xFF, np.uint8), *input.shape, alpha, gamma, reduce, scale, MULTIPROCESSORS,
    )  # fmt: skip
    return out


def sigmoid_focal_forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss):
    out = torch.empty([] if reduce else input.shape, dtype=_accumulate(input) if fp32_loss else input.dtype)
    return _sigmoid_focal(None, input, target, weight, normalizer, out.fill_(torch.nan), alpha, gamma, reduce, scale)


def sigmoid_focal_backward(grad_loss, input, target, weight, normalizer, alpha, gamma, reduce, scale):
    out = torch.empty(input.shape, dtype=input.dtype).fill_(torch.nan)
    grad_loss = grad_loss.contiguous()
    _sigmoid_focal(grad_loss, input, target, weight, normalizer, out, alpha, gamma, reduce, scale)
    return torch.empty_like(input).copy_(out)
