"""Regularisation by noise and shrinkage: stochastic depth, soft-thresholding, flooding.

    drop_path:       y = x · m / (1 - p) (+ residual),  m ~ Bernoulli(1 - p), one per sample ("row") or one ("batch")
    soft_threshold:  y = sign(x) · max(|x| - τ, 0)
    flood:           y = |loss - b| + b

Sources: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016; Zhao et al., "Deep Residual Shrinkage Networks
for Fault Diagnosis", IEEE TII 2020; Ishida et al., "Do We Need Zero Training Loss After Achieving Zero Training
Error?", ICML 2020.

The kernels (csrc/cpu/noise.cpp, csrc/cuda/noise.cu, tritonkernels/noise.py) make one pass over their tensors each way:
drop_path reads x where the branch is kept, and the residual; the backward of soft_threshold reads x and the gradient,
writes x's, and sums tau's over each run of elements that share a threshold.
"""

import torch
from torch import Tensor

from . import _backends, _checks, _ops, _plan

_drop_path = _ops.kernels("drop_path")
_shrink, _shrink_backward = _ops.kernels("soft_threshold"), _ops.kernels("soft_threshold_backward")
for _name in ("drop_path", "soft_threshold"):
    _backends.register(_name, kernels=("cpu", "cuda", "triton"))


def drop_path(
    x: Tensor, p: float, training: bool = True, mode: str = "row", *, residual: Tensor | None = None
) -> Tensor:
    """Drops the branch `x` of each sample with probability p and scales the kept ones by 1 / (1 - p).

    Args:
        x: (N, ...), of fp16, bf16, fp32 or fp64.
        p: between 0 and 1; at 1 everything is dropped (and nothing divided by zero).
        training: if false, or with p = 0, the branch passes unchanged.
        mode: "row" draws for each sample, "batch" once for all.
        residual: of x's shape and dtype, added to the result in the same pass. Under autocast the dtypes may differ:
            the result has that of their sum.

    The mask comes from torch's generator for the device, by the draws of `torchvision.ops.stochastic_depth`.
    Raises TypeError or ValueError for anything else.
    """
    _check_float("x", x)
    check_drop_path("p", p, mode)
    if not isinstance(training, bool):  # torchvision's order of arguments is another
        raise TypeError(f"training must be True or False, got {training!r}")
    if mode == "row" and not x.dim():
        raise ValueError("x must have a dimension of samples for mode 'row', got a 0-d tensor")
    if residual is not None:
        _check_float("residual", residual)
        if residual.dtype != x.dtype and _ops.autocast_enabled(x.device.type):  # as for the sum of the two
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual must have x's shape and dtype, {tuple(x.shape)} and {x.dtype}, "
                f"got {tuple(residual.shape)} and {residual.dtype}"
            )
        _checks.same_device("residual", residual, "x", x)
    if not training or p == 0.0:
        return x if residual is None else x + residual
    mask = x.new_empty([x.shape[0] if mode == "row" else 1]).bernoulli_(1.0 - p)
    backend = _backends.choose("drop_path", x.device.type, lambda _: _backends.unusual(x, residual))
    if backend == "reference" or not x.numel():
        return drop_path_reference(x, mask, p, residual)
    if not x.is_contiguous():
        row = x.numel() // x.shape[0]
        if not _plan.is_dense(x) or (mode == "row" and x.shape[0] > 1 and x.stride(0) != row):
            x = x.contiguous()
    residual = None if residual is None else _with_strides(x.stride(), residual)
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return _backends.apply(_DropPath, x, residual, mask, p, backend)
    return _drop_path[backend](x, mask, p, residual)


def _with_strides(strides: tuple[int, ...], tensor: Tensor) -> Tensor:
    """`tensor` laid in memory with these strides, copied if need be."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _DropPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, mask, p, backend):
        ctx.save_for_backward(mask)
        ctx.strides, ctx.p, ctx.backend = x.stride(), p, backend
        return _drop_path[backend](x, mask, p, residual)

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:  # linear in x: the gradient is the same operation
            if torch.is_grad_enabled() and grad.requires_grad and not torch.compiler.is_compiling():
                grad_x = drop_path_reference(grad, mask, ctx.p)
            else:
                grad_x = _drop_path[ctx.backend](_with_strides(ctx.strides, grad), mask, ctx.p, None)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None


def linear_drop_rates(depth: int, p: float) -> list[float]:
    """The drop rate of each of `depth` blocks, rising evenly from 0 at the first to p at the last."""
    _checks.is_integer("depth", depth)
    _checks.in_range("depth", depth, 0)
    _checks.in_range("p", p, 0.0, 1.0)
    return [p * block / max(depth - 1, 1) for block in range(depth)]


def soft_threshold(x: Tensor, tau: float | Tensor) -> Tensor:
    """sign(x) · max(|x| - tau, 0), differentiable in x and in tau.

    Args:
        x: (N, C, ...) or any shape if tau is a scalar; fp16, bf16, fp32 or fp64.
        tau: at least 0: a number or a 0-d tensor; one per channel, (C,); or one per sample and channel, (N, C).
            Trailing dimensions of size 1 may follow. In a tensor, a value below 0 acts as 0.

    The gradient in x is 1 where |x| > tau, else 0; in tau it is the sum of -sign(x) over where |x| > tau.
    Raises TypeError or ValueError for anything else.
    """
    _check_float("x", x)
    if not isinstance(tau, Tensor):
        _checks.in_range("tau", tau, 0.0)
        tau = x.new_full((), tau, dtype=_computed_in(x))
    _check_float("tau", tau)
    _checks.same_device("tau", tau, "x", x)
    tau = _align_threshold(x, tau)
    backend = _backends.choose("soft_threshold", x.device.type, _refuse_shrink, x, tau)
    if backend == "reference" or not x.numel():
        return soft_threshold_reference(x, tau)
    if torch.is_grad_enabled() and (x.requires_grad or tau.requires_grad):
        return _backends.apply(_SoftThreshold, x, tau, backend)
    return _like(x, _shrink[backend](x.contiguous(), *_runs(x, tau)))


def _refuse_shrink(backend: str, x: Tensor, tau: Tensor) -> str | None:
    if reason := _backends.unusual(x, tau):
        return reason
    if _backends.forced() is None and tau.numel() > 1 and x.numel() < 4 * x.shape[0] * x.shape[1]:
        return "fewer than 4 elements share a threshold"
    return None


_RUN = 4096  # elements that are summed together where one threshold serves all


def _runs(x: Tensor, tau: Tensor) -> tuple[Tensor, int, int, int, int]:
    """tau flat in the dtype of computation, and how the runs of elements of x find theirs in it: see _ops.py."""
    flat = tau.to(_computed_in(x)).reshape(-1)
    if tau.numel() == 1:
        return flat, _RUN, 1, 0, 0
    samples, channels = tau.shape[:2]
    return flat, x[0, 0].numel(), x.shape[1], channels * (samples > 1), int(channels > 1)


def _like(x: Tensor, out: Tensor) -> Tensor:
    """`out` with x's strides, where those are dense."""
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


class _SoftThreshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tau, backend):
        ctx.save_for_backward(x, tau)
        ctx.backend = backend
        return _like(x, _shrink[backend](x.contiguous(), *_runs(x, tau)))

    @staticmethod
    def backward(ctx, grad):
        x, tau = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: a second derivative may be asked for
            needed = ctx.needs_input_grad[:2]
            asked = [tensor for tensor, need in zip((x, tau), needed) if need]
            made = iter(torch.autograd.grad(soft_threshold_reference(x, tau), asked, grad, create_graph=True))
            return *(next(made) if need else None for need in needed), None
        runs = _runs(x, tau)
        grad_x, sums = _shrink_backward[ctx.backend](grad.contiguous(), x.contiguous(), *runs)
        grad_tau = None
        if ctx.needs_input_grad[1]:
            if tau.numel() > 1:
                sums = sums.reshape(x.shape[:2]).sum_to_size(tau.shape[:2])
            grad_tau = (sums if tau.numel() > 1 else sums.sum()).reshape(tau.shape).to(tau.dtype)
        return _like(x, grad_x), grad_tau, None


def _align_threshold(x: Tensor, tau: Tensor) -> Tensor:
    """tau with as many dimensions as x, or none."""
    if not tau.dim():
        return tau
    sizes = list(tau.shape)
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) == 2 and tau.dim() == x.dim() - 1 and sizes == [x.shape[1], 1]:
        sizes.pop()  # (C, 1, 1) beside (N, C, H, W), as it broadcasts
    if x.dim() >= 2:
        if len(sizes) == 1 and sizes[0] in (1, x.shape[1]):
            return tau.reshape([1, *sizes, *[1] * (x.dim() - 2)])
        if len(sizes) == 2 and sizes[0] in (1, x.shape[0]) and sizes[1] in (1, x.shape[1]):
            return tau.reshape([*sizes, *[1] * (x.dim() - 2)])
    raise ValueError(
        f"tau must be a scalar, one value per channel (C,) or per sample and channel (N, C) of x, "
        f"got shape {tuple(tau.shape)} for x of shape {tuple(x.shape)}"
    )


def flood(loss: Tensor, b: float) -> Tensor:
    """|loss - b| + b: below the flood level b the gradient turns round, so training hovers there."""
    _check_float("loss", loss)
    (_checks.is_number if isinstance(b, Tensor) else _checks.finite)("b", b)  # the host waits for no tensor
    return (loss - b).abs() + b


def _check_float(name: str, value: object) -> None:
    _checks.is_tensor(name, value)
    _checks.dtype_in(name, value, _checks.FLOATS)


def _computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_drop_path(name: str, p: float, mode: str) -> None:
    _checks.in_range(name, p, 0.0, 1.0)
    _checks.choice("mode", mode, ("row", "batch"))


# ---- reference -------------------------------------------------------------------------------------------


def drop_path_reference(x: Tensor, mask: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch, given the mask of zeros and ones, (N,) or (1,)."""
    wide = x.to(_computed_in(x))
    mask = mask.to(wide.dtype).reshape([-1, *[1] * (x.dim() - 1)]) if x.dim() else mask.to(wide.dtype).reshape(())
    # A dropped branch leaves nothing behind, not even the NaN of 0 · inf.
    out = torch.where(mask != 0, wide * (mask / max(1.0 - p, torch.finfo(torch.float32).tiny)), 0)
    if residual is not None:
        out = out + residual
    return out.to(x.dtype)


def soft_threshold_reference(x: Tensor, tau: Tensor) -> Tensor:
    """The formula in plain PyTorch; tau broadcasts against x."""
    wide = x.to(_computed_in(x))
    tau = tau.to(wide.dtype)
    tau = tau.masked_fill(tau < 0, 0)  # since torch 2.14 clamp(min=0) has no derivative at 0
    return torch.where(wide.abs() > tau, wide - tau * wide.sign(), wide * 0).to(x.dtype)
