"""GroupNorm with its activation and a residual.

The C channels of a sample are cut into G groups of C/G; with the mean m and the (biased) variance v of a group,
taken over its channels and all positions:

    y = act((x − m) / sqrt(v + eps) · weight_c + bias_c + residual)

The kernels: csrc/cpu/group_norm.cpp, csrc/cuda/group_norm.cu, tritonkernels/group_norm.py, with the formulas of the
gradients in csrc/group_norm.h. Between forward and backward only m and 1/sqrt(v + eps) of each group are kept; the
backward computes the activation's derivative again from the input.
"""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _backends, _checks, _ops
from ._ops import ACTIVATIONS

_forward = _ops.kernels("group_norm_forward")
_backward = _ops.kernels("group_norm_backward")
_backends.register("group_norm", kernels=("cpu", "cuda", "triton"))

_FLOATS = frozenset(_checks.FLOATS)
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # without a device to parse


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Group normalisation, then `residual` added, then the activation: act(GN(input)·weight + bias + residual).

    With the defaults it is `torch.nn.functional.group_norm`, except that a group of one element is allowed: it
    normalises to 0, so that the result is act(bias + residual) and the gradient to `input` is 0.

    Args:
        input: (N, C, …) of rank 2 or more, fp16, bf16, fp32 or fp64. Contiguous, channels_last and
            channels_last_3d tensors are read as they lie, also when they are slices along N or C.
        num_groups: divides C.
        weight, bias: (C,) or None, of any floating dtype; it may differ from the input's.
        eps: added to the variance in fp32 (fp64 for fp64 input).
        activation: None, "relu", "silu", "gelu" (exact, by erf) or "gelu_tanh".
        residual: of the input's shape and dtype, or None.

    Returns:
        The result in the input's dtype and memory format. The statistics are those of fp32 (fp64 for fp64) taken
        about the mean, accurate also where |mean| is 10⁴ times the standard deviation. Under CUDA autocast the
        input is widened to fp32, as in PyTorch.

    Raises:
        TypeError: an argument is no tensor where one is expected, or has a dtype that is not listed.
        ValueError: a shape, `num_groups`, `eps`, `activation` or a device does not fit.

    Source: Wu & He, Group Normalization, ECCV 2018.
    """
    if residual is None and _ready(input, num_groups, weight, bias, eps) and activation in ACTIVATIONS:
        backend = "cpu"
    else:
        _check(input, num_groups, weight, bias, eps, activation, residual)
        if _ops.autocast_enabled(input.device.type):
            input, residual = _autocast(input, residual)
        if residual is not None and residual.dtype != input.dtype:
            raise TypeError(f"residual must have the dtype of input, {input.dtype}, got {residual.dtype}")
        backend = _backends.choose("group_norm", input.device.type, _refuse, (input, weight, bias, residual))
        if backend == "reference":
            if _backends.recorded():  # what runs the graph later knows PyTorch's group norm, and has a kernel for it
                weight, bias = (vector if vector is None else vector.to(input.dtype) for vector in (weight, bias))
                x = torch.group_norm(input, num_groups, weight, bias, eps)
                return _activate(x if residual is None else x + residual, activation)
            return group_norm_reference(input, num_groups, weight, bias, eps, activation=activation, residual=residual)
    index = ACTIVATIONS.index(activation)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _backends.apply(_GroupNorm, input, weight, bias, residual, num_groups, eps, index, backend)
    return _forward[backend](input, num_groups, weight, bias, eps, index, residual, False)[0]


def _ready(input, num_groups, weight, bias, eps) -> bool:
    """Whether nothing is wrong or unusual, and the CPU kernels serve the call: what `_check` and `_backends.choose`
    find, without their calls, which take longer than the kernel where the tensor is small."""
    return (
        not _is_compiling()
        and type(input) is Tensor
        and input.is_cpu
        and input.dtype in _FLOATS
        and input.dim() > 1
        and type(num_groups) is int
        and num_groups > 0
        and (channels := input.size(1)) % num_groups == 0
        and (weight is None or _is_vector(weight, channels))
        and (bias is None or _is_vector(bias, channels))
        and type(eps) is float
        and eps >= 0
        and not _is_any_autocast_enabled()
        and _backends.only_arguments_matter()
    )


def _is_vector(vector, channels: int) -> bool:
    return (
        (type(vector) is Parameter or type(vector) is Tensor)
        and vector.is_cpu
        and vector.dtype in _FLOATS
        and vector.dim() == 1
        and vector.size(0) == channels
    )


def _refuse(backend: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    return _backends.unusual(*tensors)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, residual, num_groups, eps, activation, backend):
        output, stats = _forward[backend](input, num_groups, weight, bias, eps, activation, residual, True)
        ctx.save_for_backward(input, weight, bias, residual if activation else None, stats)
        ctx.options = (num_groups, eps, activation, backend)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, bias, residual, stats = ctx.saved_tensors
        num_groups, eps, activation, backend = ctx.options
        of_input, of_weight, of_bias, of_residual, *_ = needed = ctx.needs_input_grad
        if torch.is_grad_enabled() and not _is_compiling():
            # create_graph: a second derivative may be asked for
            if not activation and of_residual:
                residual = torch.zeros_like(input, requires_grad=True)
            grads = _differentiable_backward(
                grad_output, needed[:4], (input, weight, bias, residual), num_groups, eps, activation
            )
            return *grads, None, None, None, None
        # Without an activation the residual's gradient is the output's.
        wanted = of_input + 2 * of_weight + 4 * of_bias + (8 * of_residual if activation else 0)
        grad_input, grad_weight, grad_bias, grad_residual = _backward[backend](
            grad_output, input, num_groups, weight, bias, activation, residual, stats, wanted
        )
        return (
            grad_input if of_input else None,
            grad_weight if of_weight else None,
            grad_bias if of_bias else None,
            (grad_residual if activation else grad_output) if of_residual else None,
            None,
            None,
            None,
            None,
        )


def _differentiable_backward(grad_output, needed, tensors, num_groups, eps, activation) -> list[Tensor | None]:
    """The gradients by differentiating the reference, with a graph of their own."""
    input, weight, bias, residual = tensors
    output = group_norm_reference(
        input, num_groups, weight, bias, eps, activation=ACTIVATIONS[activation], residual=residual
    )
    asked = [tensor for tensor, need in zip(tensors, needed) if need]
    grads = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))
    return [next(grads) if need else None for need in needed]


def _check(input, num_groups, weight, bias, eps, activation, residual) -> None:
    _checks.is_tensor("input", input)
    _checks.dtype_in("input", input, _checks.FLOATS)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, (N, C, …), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    _checks.is_integer("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must be positive and divide the {channels} channels of input, got {num_groups}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            _checks.is_tensor(name, vector)
            _checks.dtype_in(name, vector, _checks.FLOATS)
            _checks.same_device(name, vector, "input", input)
            if vector.dim() != 1 or vector.shape[0] != channels:
                raise ValueError(f"{name} must have shape ({channels},), got {tuple(vector.shape)}")
    _checks.in_range("eps", eps, 0.0)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if residual is not None:
        _checks.is_tensor("residual", residual)
        _checks.dtype_in("residual", residual, _checks.FLOATS)
        _checks.same_device("residual", residual, "input", input)
        if residual.shape != input.shape:
            raise ValueError(
                f"residual must have the shape of input, {tuple(input.shape)}, got {tuple(residual.shape)}"
            )


def _autocast(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """PyTorch's policy: fp32 on CUDA; on the CPU the dtype stays, and a residual of another one widens both."""
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    if input.device.type == "cuda":
        dtype = torch.promote_types(dtype, torch.float32)
    return input.to(dtype), None if residual is None else residual.to(dtype)


def group_norm_reference(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula in plain PyTorch, differentiable as often as wanted, on any device and for any subclass."""
    # PyTorch's fp32 sums over the outer dimensions of a CPU tensor, channels_last among them, lose digits.
    wide = input.dtype == torch.float64 or input.device.type == "cpu"
    compute = torch.float64 if wide else torch.float32
    # Only views and pointwise operations on the whole tensor: they keep its memory format.
    samples, channels, *positions = input.shape
    x = input.to(compute).reshape(samples, num_groups, channels // num_groups, *positions)
    within = list(range(2, x.dim()))
    count = math.prod(x.shape[2:])
    x = x - x.sum(within, keepdim=True) / count
    # In units of its largest deviation where that is above 1, a group's squares cannot overflow.
    unit = x.detach().abs().amax(within, keepdim=True).clamp(min=1) if count else 1
    variance = (x / unit).square().sum(within, keepdim=True) / count
    x = x * (torch.rsqrt(variance + eps / unit / unit) / unit)
    x = x.flatten(1, 2)
    along_channels = [-1] + [1] * (input.dim() - 2)
    if weight is not None:
        x = x * weight.to(compute).reshape(along_channels)
    if bias is not None:
        x = x + bias.to(compute).reshape(along_channels)
    if residual is not None:
        x = x + residual.to(compute)
    return _activate(x, activation).to(input.dtype)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return x
    if activation.startswith("gelu"):
        return torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return getattr(torch.nn.functional, activation)(x)
