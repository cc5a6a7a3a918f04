"""The one place where operators are declared: schemas, fake kernels, and what torch.compile may assume.

An operator is declared once per backend that has a kernel, as an overload: `fastreg::name.cpu`,
`fastreg::name.cuda`, `fastreg::name.triton`. The public functions pick the overload (see _backends.py), so a
call goes straight from Python into the kernel. The C++ extensions register `.cpu` and `.cuda`; `.triton` is
the function of the same name in `tritonkernels`, imported at its first call.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

KERNEL_BACKENDS = ("cpu", "cuda", "triton")


def _define(
    name: str, schema: str, fake: Callable, module: str, backends: tuple[str, ...] = KERNEL_BACKENDS
) -> None:
    for backend in backends:
        overload = f"fastreg::{name}.{backend}"
        torch.library.define(overload, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(overload, fake)
        if backend == "triton":

            def launch(*args, **kwargs):
                return getattr(importlib.import_module(f"tritonkernels.{module}"), name)(*args, **kwargs)

            torch.library.impl(overload, ("cpu", "cuda"))(launch)


def kernels(name: str) -> dict[str, Callable]:
    """Backend name -> the operator overload that runs there."""
    packet = getattr(torch.ops.fastreg, name)
    return {backend: getattr(packet, backend) for backend in packet.overloads()}


# ---- losses ----------------------------------------------------------------------------------------------
# Rows are the positions over which classes are compared: input (N, C) has N rows, (N, C, D) has N·D.

REDUCTIONS = ("none", "mean", "sum")  # the operators take the index


def _row_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _cross_entropy_forward(input, target, weight, ignore_index, reduction, label_smoothing, fp32_loss):
    rows = [input.shape[0], *input.shape[2:]]
    accumulate = _row_dtype(input)
    loss = input.new_empty(rows if reduction == 0 else [], dtype=accumulate if fp32_loss else input.dtype)
    return loss, input.new_empty(rows, dtype=accumulate), input.new_empty([], dtype=accumulate)


def _cross_entropy_backward(
    grad_loss, input, target, weight, lse, denominator, ignore_index, reduction, label_smoothing
):
    return torch.empty_like(input)


_define(
    "cross_entropy_forward",
    # loss; log-sum-exp per row; what the sum of the rows' losses was divided by (1 unless reduction is mean)
    "(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, float label_smoothing, "
    "bool fp32_loss) -> (Tensor loss, Tensor lse, Tensor denominator)",
    _cross_entropy_forward,
    "losses",
)
_define(
    "cross_entropy_backward",
    "(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor denominator, "
    "int ignore_index, int reduction, float label_smoothing) -> Tensor",
    _cross_entropy_backward,
    "losses",
)

# ---- what was built --------------------------------------------------------------------------------------
CAPABILITIES = ("baseline", "AVX2", "AVX-512")
torch.library.define("fastreg::cpu_capability", "() -> int")
