"""Modules over the functions, with the state_dict of their torch.nn namesakes."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from . import _checks
from .group_norm import ACTIVATIONS, group_norm

# ---- normalisation ---------------------------------------------------------------------------------------


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` with an activation, and a residual that is added before it; see `fastreg.group_norm`.

    act(GN(input)·weight + bias + residual); `activation` is None, "relu", "silu", "gelu" or "gelu_tanh".
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        _checks.choice("activation", activation, ACTIVATIONS)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation, residual=residual
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


@dataclass
class Replacements:
    """What `replace_modules` did: module name → the activation fused into it (None: replaced alone), and the
    names of the modules it left alone → why."""

    group_norm: dict[str, str | None] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name}: GroupNorm" + (f" + {act}" if act else "") for name, act in self.group_norm.items()]
        return "\n".join(lines + [f"{name}: left alone, {reason}" for name, reason in self.kept.items()])


def replace_modules(model: nn.Module, group_norm: bool = True, fuse_activation: bool = True) -> Replacements:
    """Turns the `nn.GroupNorm` modules of `model` into `fastreg.nn.GroupNorm`, in place.

    A module keeps its identity, parameters, hooks and name: only its class changes, so optimisers, shared
    modules and state_dict keys stay as they are. timm's GroupNorm, GroupNorm1 and GroupNormAct are taken too.
    With `fuse_activation`, a ReLU, SiLU or GELU that follows a GroupNorm in an `nn.Sequential` moves into it and
    leaves an `nn.Identity`; not where a hook would see the difference, nor where the GroupNorm stands in several
    places.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Replacements()
    if not group_norm:
        return report
    for name, module in model.named_modules():
        if not isinstance(module, nn.GroupNorm) or isinstance(module, GroupNorm):
            continue
        reason = _unlike_group_norm(module)
        if reason is not None:
            report.kept[name] = reason
            continue
        own = getattr(module, "act", None) if type(module).__name__ in _TIMM_WITH_ACTIVATION else None
        module.__class__ = GroupNorm
        module.activation = report.group_norm[name] = _activation_name(own)
    if fuse_activation:
        _fuse_following(model, report)
    return report


def _fuse_following(model: nn.Module, report: Replacements) -> None:
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    for prefix, parent in model.named_modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        for (norm_name, norm), (act_name, act) in pairwise(parent._modules.items()):
            activation = _activation_name(act)
            if type(norm) is not GroupNorm or norm.activation is not None or activation is None:
                continue
            if places[norm] == 1 and not _hooked(norm) and not _hooked(act) and not act._forward_pre_hooks:
                norm.activation = activation
                setattr(parent, act_name, nn.Identity())
                report.group_norm[f"{prefix}.{norm_name}".lstrip(".")] = activation


_TIMM_WITH_ACTIVATION = ("GroupNormAct", "GroupNorm1Act")
_TIMM = ("GroupNorm", "GroupNorm1", *_TIMM_WITH_ACTIVATION)


def _unlike_group_norm(module: nn.GroupNorm) -> str | None:
    """Why this instance of `nn.GroupNorm` is not one that `group_norm` computes."""
    kind = type(module)
    if kind is nn.GroupNorm:
        return None
    if not kind.__module__.startswith("timm.layers.") or kind.__name__ not in _TIMM:
        return f"its class {kind.__module__}.{kind.__qualname__} may compute something else"
    if kind.__name__ in _TIMM_WITH_ACTIVATION:
        if type(module.drop) is not nn.Identity:
            return "it drops between norm and activation"
        if type(module.act) is not nn.Identity and (_activation_name(module.act) is None or _hooked(module.act)):
            return f"its activation, {type(module.act).__name__}, is not one of {', '.join(ACTIVATIONS[1:])}"
    return None


def _activation_name(module: nn.Module | None) -> str | None:
    kind = type(module)
    if kind is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if kind.__module__ == "timm.layers.activations":
        return {"GELU": "gelu", "GELUTanh": "gelu_tanh"}.get(kind.__name__)
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(kind)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks see what the module returns, which fusion changes."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)
