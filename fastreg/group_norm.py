"""GroupNorm with its activation and a residual.

The C channels of a sample are cut into G groups of C/G; with the mean m and the (biased) variance v of a group,
taken over its channels and all positions:

    y = act((x − m) / sqrt(v + eps) · weight_c + bias_c + residual)
"""

import math

import torch
from torch import Tensor

from . import _backends, _checks

ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")

_backends.register("group_norm")


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
    _check(input, num_groups, weight, bias, eps, activation, residual)
    if torch.is_autocast_enabled(input.device.type):
        input, residual = _autocast(input, residual)
    if residual is not None and residual.dtype != input.dtype:
        raise TypeError(f"residual must have the dtype of input, {input.dtype}, got {residual.dtype}")
    return group_norm_reference(input, num_groups, weight, bias, eps, activation=activation, residual=residual)


def _check(input, num_groups, weight, bias, eps, activation, residual) -> None:
    _checks.is_tensor("input", input)
    _checks.dtype_in("input", input, _checks.FLOATS)
    if input.dim() < 2:
        raise ValueError(f"input must have at least 2 dimensions, (N, C, …), got shape {tuple(input.shape)}")
    channels = input.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt):
        raise TypeError(f"num_groups must be an int, got {type(num_groups).__name__}")
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
    x = input.to(compute).unflatten(1, (num_groups, input.shape[1] // num_groups))
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
