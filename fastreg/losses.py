"""Softmax losses: cross-entropy and its long-tail family.

For one row of logits x (C classes) with target class y, and z = scale·(x + logit_adjustment − margin_y·onehot(y)):

    log p = z − logsumexp(z)
    loss  = −Σ_c q_c · w_c · α_c · (1 − p_c)^γ · log p_c  +  z_loss · logsumexp(z)²

q is the smoothed target, (1 − ε)·onehot(y) + ε/C, w the class weights, α the focal balance. The plain call is
`torch.nn.functional.cross_entropy`, argument by argument.

The kernels: csrc/cpu/losses.cpp, csrc/cuda/losses.cu, tritonkernels/losses.py. They read the logits once in the
forward, and read and write them once in the backward; between the two only each row's log-sum-exp is kept.
"""

import torch
from torch import Tensor

from . import _backends, _checks, _ops

_forward = _ops.kernels("cross_entropy_forward")
_backward = _ops.kernels("cross_entropy_backward")
_backends.register("cross_entropy", kernels=())  # a backend is named here once its kernel is in


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    all_ignored: str = "nan",
) -> Tensor:
    _checks.choice("reduction", reduction, _ops.REDUCTIONS)
    plain = (
        gamma == 0.0
        and alpha is None
        and logit_adjustment is None
        and margin is None
        and scale == 1.0
        and z_loss == 0.0
        and target.dtype in _checks.INDICES
    )
    backend = _backends.choose("cross_entropy", input.device.type, _refuse, input, plain)
    if backend == "reference":
        return cross_entropy_reference(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            gamma=gamma,
            alpha=alpha,
            logit_adjustment=logit_adjustment,
            margin=margin,
            scale=scale,
            z_loss=z_loss,
            all_ignored=all_ignored,
        )
    rows = target.shape
    if input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    # The kernels know (N, C) and (N, C, D); flatten copies only where no single stride spans the dimensions.
    if input.dim() > 3:
        input, target = input.flatten(2), target.flatten(1)
    # Under autocast PyTorch computes this loss in fp32; the kernels do so anyway and only widen the result.
    fp32_loss = torch.is_autocast_enabled(input.device.type)
    loss = _CrossEntropy.apply(
        input,
        target,
        weight,
        None,
        None,
        None,
        None,
        None,
        ignore_index,
        _ops.REDUCTIONS.index(reduction),
        label_smoothing,
        gamma,
        1.0,
        scale,
        z_loss,
        all_ignored == "zero",
        fp32_loss,
        backend,
    )
    return loss.reshape(rows) if reduction == "none" else loss


def _refuse(backend: str, input: Tensor, plain: bool) -> str | None:
    if input.dtype not in _checks.FLOATS:
        return f"it has no kernel for {input.dtype}"
    if not plain:
        return "it serves class indices without focal and long-tail options; the reference serves those"
    if type(input) is not Tensor and type(input) is not torch.nn.Parameter:
        return f"the input is a tensor subclass, {type(input).__name__}"
    if torch._C._functorch.is_functorch_wrapped_tensor(input):
        return "the call is inside a torch.func transform"
    return None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *args, zero_if_empty, fp32_loss, backend = args
        tensors, options = args[:8], args[8:]
        loss, lse, denominator = _forward[backend](*tensors, *options, zero_if_empty, fp32_loss)
        ctx.save_for_backward(*tensors, lse, denominator)
        ctx.options, ctx.zero_if_empty, ctx.backend = options, zero_if_empty, backend
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = _differentiable_backward(ctx, grad_loss)  # create_graph: a second derivative may be asked for
        else:
            grad = _backward[ctx.backend](grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, *([None] * 17)


def _differentiable_backward(ctx, grad_loss: Tensor) -> Tensor:
    input, target, weight, alpha, logit_adjustment, margin, _, _, _, _ = ctx.saved_tensors
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss = ctx.options
    loss = cross_entropy_reference(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=_ops.REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
        gamma=gamma,
        alpha=alpha_scale if alpha is None else alpha * alpha_scale,
        logit_adjustment=logit_adjustment,
        margin=margin,
        scale=scale,
        z_loss=z_loss,
        all_ignored="zero" if ctx.zero_if_empty else "nan",
    )
    (grad,) = torch.autograd.grad(loss, input, grad_loss.to(loss.dtype), create_graph=True)
    return grad


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    all_ignored: str = "nan",
) -> Tensor:
    """The formula in plain PyTorch, differentiable as often as wanted, on any device and for any subclass."""
    dim = 0 if input.dim() == 1 else 1  # of the classes
    num_classes = input.shape[dim]
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32

    def per_class(vector: Tensor) -> Tensor:
        return vector.to(compute).reshape([-1, *([1] * (input.dim() - 1 - dim))])

    x = input.to(compute)
    if target.is_floating_point():
        kept, q = None, target.to(compute)
    else:
        kept = target != ignore_index
        y = torch.where(kept, target, 0).to(torch.int64)
        onehot = torch.arange(num_classes, device=x.device).reshape([-1, *([1] * (x.dim() - 1 - dim))]) == y.unsqueeze(
            dim
        )
        q = onehot.to(compute)
        # Whatever an ignored row holds, NaN included, must reach neither the loss nor the gradient.
        x = torch.where(kept.unsqueeze(dim), x, 0)
    if logit_adjustment is not None:
        x = x + per_class(logit_adjustment)
    if margin is not None:
        x = x - per_class(margin) * q
    z = scale * x
    log_p = torch.log_softmax(z, dim)
    if label_smoothing:
        q = (1 - label_smoothing) * q + label_smoothing / num_classes

    terms = -log_p
    if gamma:
        # 1 − p from expm1 keeps its digits where p is near 1; the bounds keep every derivative finite.
        u = -torch.expm1(log_p.clamp(min=-100.0))
        terms = terms * u.clamp(min=torch.finfo(compute).tiny) ** gamma
    factor = q if weight is None else q * per_class(weight)
    if isinstance(alpha, Tensor) and alpha.dim():
        factor = factor * per_class(alpha)
    elif alpha is not None:
        factor = factor * alpha
    # A class without a share in the target has no share in the loss, were its log p −inf.
    losses = torch.where(q == 0, 0, factor * terms).sum(dim)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(z, dim) ** 2

    if kept is not None:
        losses = torch.where(kept, losses, 0)
    if reduction == "none":
        return losses.to(input.dtype)
    total = losses.sum()
    if reduction == "mean":
        if kept is None:
            denominator = torch.full_like(total, losses.numel())
        elif weight is None:
            denominator = kept.sum().to(compute)
        else:
            denominator = torch.where(kept, weight.to(compute)[y], 0).sum()
        if all_ignored == "zero":
            denominator = torch.where(denominator == 0, 1, denominator)
        total = total / denominator
    return total.to(input.dtype)
