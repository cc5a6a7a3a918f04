"""Argument checks. Every message names the argument, what came and what was expected."""

from collections.abc import Sequence, Sized
from numbers import Integral, Real

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32, torch.uint8)


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def is_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def dtype_in(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must have a dtype among {names}, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def in_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """low <= value <= high; NaN is outside."""
    is_number(name, value)
    if not low <= value <= high:
        wanted = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def finite_at_least(name: str, value: float, low: float) -> None:
    is_number(name, value)
    if not low <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least {low:g}, got {value}")


def finite(name: str, value: float) -> None:
    is_number(name, value)
    if not abs(value) < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def above_zero(name: str, value: float) -> None:
    is_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def is_real(value: object) -> bool:
    """A number, and neither True nor False. To tell a float by its abstract class would take ten times as long."""
    return type(value) is float or type(value) is int or (isinstance(value, Real) and not isinstance(value, bool))


def is_number(name: str, value: object) -> None:
    if is_real(value):
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def is_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def in_bounds(name: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Looks at the values of class indices."""
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        raise IndexError(
            f"{name} must be in [0, {classes}) or ignore_index, {ignore_index}, got {int(target[wrong][0])}"
        )


# ---- words for messages and reprs


def counted(things: Sized, noun: str) -> str:
    """ "1 tensor", "3 tensors"."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
