"""Linear layer and cross-entropy in one: loss = cross_entropy(input @ linear_weightᵀ + linear_bias, target, …)."""

import torch.nn.functional as F
from torch import Tensor

from . import _checks
from .losses import Target, cross_entropy


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    all_ignored: str = "nan",
    chunk_size: int | None = None,
) -> Tensor:
    """`fastreg.cross_entropy` of a linear layer's output, with every option of it.

    Args:
        input: (in,) or (N, in).
        linear_weight: (C, in), or (C, d1, …, in) for targets (N, d1, …).
        target: as for `cross_entropy` with logits of (C,), (N, C) or (N, C, d1, …).
        linear_bias: linear_weight's shape without the last dimension, or None.
        ignore_index: None is -100.
        chunk_size: how many rows of logits are in memory at a time; None chooses.

    The remaining arguments, what is returned and what is raised are those of `cross_entropy`.
    """
    _check_linear(input, linear_weight, linear_bias, chunk_size)
    classes = linear_weight.shape[:-1]
    logits = F.linear(
        input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()
    ).unflatten(-1, classes)
    return cross_entropy(
        logits,
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
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


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk_size: int | None) -> None:
    named = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        _checks.is_tensor(name, tensor)
        _checks.dtype_in(name, tensor, _checks.FLOATS)
        _checks.same_device(name, tensor, "input", input)
    if input.dim() not in (1, 2):
        raise ValueError(f"input must have the shape (in,) or (N, in), got {tuple(input.shape)}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have the shape (C, …, {input.shape[-1]}) for input of shape {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(f"input must be (N, in) for linear_weight of shape {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must have the shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
