"""The one place where operators are declared: schemas, fake kernels, and what torch.compile may assume.

An operator is declared once per backend that has a kernel, as an overload: `fastreg::name.cpu`,
`fastreg::name.cuda`, `fastreg::name.triton`. The public functions pick the overload (see _backends.py), so a
call goes straight from Python into the kernel. The C++ extensions register `.cpu` and `.cuda`; `.triton` is
the function of the same name in `tritonkernels`, imported at its first call.
"""

import importlib
from collections.abc import Callable

import torch

KERNEL_BACKENDS = ("cpu", "cuda", "triton")


def _define(name: str, schema: str, fake: Callable, module: str, backends: tuple[str, ...] = KERNEL_BACKENDS) -> None:
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
# input is (N, C) or (N, C, D); a row is one position over which classes are compared, (N) or (N, D) of them.
# target holds class indices, one per row, or probabilities of input's shape. Options are explained in losses.py.

REDUCTIONS = ("none", "mean", "sum")  # the operators take the index

_TENSORS = "Tensor input, Tensor target, Tensor? weight, Tensor? alpha, Tensor? logit_adjustment, Tensor? margin"
_OPTIONS = (
    "int ignore_index, int reduction, float label_smoothing, float gamma, float alpha_scale, float scale, float z_loss"
)


def _cross_entropy_forward(
    input,
    target,
    weight,
    alpha,
    logit_adjustment,
    margin,
    ignore_index,
    reduction,
    label_smoothing,
    gamma,
    alpha_scale,
    scale,
    z_loss,
    zero_if_empty,
    fp32_loss,
):
    rows = [input.shape[0], *input.shape[2:]]
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(rows if reduction == 0 else [], dtype=accumulate if fp32_loss else input.dtype)
    return loss, input.new_empty(rows, dtype=accumulate), input.new_empty([], dtype=accumulate)


_define(
    "cross_entropy_forward",
    # Returns the loss; the log-sum-exp of each row; what the sum of the losses was divided by (1 unless the
    # reduction is mean; with zero_if_empty never 0).
    f"({_TENSORS}, {_OPTIONS}, bool zero_if_empty, bool fp32_loss) -> (Tensor loss, Tensor lse, Tensor denominator)",
    _cross_entropy_forward,
    "losses",
)
_define(
    "cross_entropy_backward",
    f"(Tensor grad_loss, {_TENSORS}, Tensor lse, Tensor denominator, {_OPTIONS}) -> Tensor grad_input",
    lambda grad_loss, input, *rest: torch.empty_like(input),
    "losses",
)

# ---- what was built --------------------------------------------------------------------------------------
CAPABILITIES = ("baseline", "AVX2", "AVX-512")
torch.library.define("fastreg::cpu_capability", "() -> int")
