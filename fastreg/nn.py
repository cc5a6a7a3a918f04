"""Modules over the functions, with the state_dict of their torch.nn namesakes."""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from . import _backends, _checks, longtail, losses
from .group_norm import ACTIVATIONS, group_norm
from .losses import cross_entropy, sigmoid_focal_loss
from .max_norm import row_norms
from .noise import check_drop_path, drop_path, soft_threshold

# To torch.fx.symbolic_trace, whose stand-ins for tensors have no shape to check, each is one step of the graph.
for _name in ("cross_entropy", "sigmoid_focal_loss", "group_norm", "drop_path", "soft_threshold", "_channel_size"):
    torch.fx.wrap(_name)

# ---- losses ----------------------------------------------------------------------------------------------


class CrossEntropyLoss(nn.Module):
    """`fastreg.cross_entropy` as a module: `torch.nn.CrossEntropyLoss` with the options of the long-tail family.

    weight, logit_adjustment, margin and a tensor alpha are buffers. Attributes may be changed between calls, as
    deferred re-weighting (Cao et al. 2019) does with `loss.weight = …`. What belongs to one call is told with it:
    `forward(input, target, *, grad_in_forward=False, outputs=False, statistics=None)`, of which with outputs a
    `LossOutputs` comes back; this and all that follows holds for the losses below, too.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        losses.check_options(reduction, label_smoothing, gamma, alpha, scale, z_loss, all_ignored)
        self.register_buffer("weight", weight)
        self.register_buffer("logit_adjustment", logit_adjustment)
        self.register_buffer("margin", margin)
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.gamma = gamma
        self.scale = scale
        self.z_loss = z_loss
        self.all_ignored = all_ignored

    def forward(
        self,
        input: Tensor,
        target: losses.Target,
        *,
        grad_in_forward: bool | str = False,
        outputs: bool = False,
        statistics: longtail.ClassStatistics | None = None,
    ) -> Tensor | losses.LossOutputs:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
            alpha=self.alpha,
            logit_adjustment=self.logit_adjustment,
            margin=self.margin,
            scale=self.scale,
            z_loss=self.z_loss,
            all_ignored=self.all_ignored,
            grad_in_forward=grad_in_forward,
            outputs=outputs,
            statistics=statistics,
        )

    def extra_repr(self) -> str:
        """The options that are not at their defaults, and which vectors there are."""
        defaults = inspect.signature(CrossEntropyLoss).parameters
        options = {name: getattr(self, name) for name in self.__dict__ if name in defaults or name in self._shown}
        told = [f"{k}={v!r}" for k, v in options.items() if k in self._shown or v != defaults[k].default]
        return ", ".join(told + [f"{k}={tuple(v.shape)}" for k, v in self._buffers.items() if v is not None])

    _shown: tuple[str, ...] = ()

    def _check_names(self, options: dict[str, Any]) -> None:
        """Of a subclass that passes its options on: one that is none is to be said in its own name."""
        for name in options.keys() - inspect.signature(CrossEntropyLoss).parameters.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")


class FocalLoss(CrossEntropyLoss):
    """Softmax focal loss (Lin et al. 2017), `fastreg.focal_loss` as a module; options as for CrossEntropyLoss."""

    def __init__(
        self, gamma: float = 2.0, alpha: float | Tensor | None = None, weight: Tensor | None = None, **options: Any
    ) -> None:
        self._check_names(options)
        super().__init__(weight, gamma=gamma, alpha=alpha, **options)


class _FromCounts(CrossEntropyLoss):
    """A loss one of whose vectors follows from the class counts: a subclass names it in `_vector`, makes it in
    `_derive()`, and names in `_shown` what else it follows from.

    `counts` is an int64 buffer, and what the state_dict holds; the vector is made again when a state_dict is loaded,
    and when what it follows from is assigned. `.half()` and the like leave the vector's dtype alone.
    """

    _vector = ""

    def __init__(self, counts: longtail.Counts, **options: Any) -> None:
        self._check_names(options)
        if self._vector in options:
            raise TypeError(f"{self._vector} follows from the counts and must not be given")
        super().__init__(**options)
        self.register_buffer("counts", longtail.check_counts(counts).clone())  # loading writes to it

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("counts", *self._shown):
            super().__setattr__(name, value)
            return
        if name == "counts":
            device = value.device if isinstance(value, Tensor) else self.counts.device
            value = longtail.check_counts(value).to(device)
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        try:
            self._refresh()
        except (TypeError, ValueError):
            super().__setattr__(name, before)
            raise

    def _refresh(self) -> None:
        self.register_buffer(self._vector, self._derive(), persistent=False)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._refresh()

    def _apply(self, *args, **kwargs) -> "_FromCounts":
        vector = self._buffers[self._vector]
        super()._apply(*args, **kwargs)
        if vector is not None and not vector.is_meta:
            self._buffers[self._vector] = vector.to(self.counts.device)
        return self


class LogitAdjustedLoss(_FromCounts):
    """Cross-entropy of logits + τ·log prior (Menon et al. 2021). At test time use the bare logits.

    counts: training samples per class; a class with none is taken as one with one.
    """

    _vector, _shown = "logit_adjustment", ("tau",)

    def __init__(self, counts: longtail.Counts, tau: float = 1.0, **options: Any) -> None:
        super().__init__(counts, **options)
        self.tau = tau

    def _derive(self) -> Tensor:
        return longtail.log_prior(self.counts, self.tau)


class BalancedSoftmaxLoss(_FromCounts):
    """Balanced softmax (Ren et al. 2020): cross-entropy of logits + log prior. At test time use the bare logits.

    counts: training samples per class; a class with none is taken as one with one.
    """

    _vector = "logit_adjustment"

    def __init__(self, counts: longtail.Counts, **options: Any) -> None:
        super().__init__(counts, **options)
        self._refresh()

    def _derive(self) -> Tensor:
        return longtail.log_prior(self.counts)


class LDAMLoss(_FromCounts):
    """Label-distribution-aware margins (Cao et al. 2019): cross-entropy of scale·(logits − margin_y·onehot(y)).

    Meant for logits that are cosines of normalised features and class vectors, hence the scale.
    counts: training samples per class; the rarest class gets max_margin, others max_margin·(n_min/n_c)^(1/4).
    """

    _vector, _shown = "margin", ("max_margin",)

    def __init__(self, counts: longtail.Counts, max_margin: float = 0.5, scale: float = 30, **options: Any) -> None:
        super().__init__(counts, scale=scale, **options)
        self.max_margin = max_margin

    def _derive(self) -> Tensor:
        return longtail.ldam_margins(self.counts, self.max_margin)


class ClassBalancedLoss(_FromCounts):
    """Class-balanced loss (Cui et al. 2019): (focal) cross-entropy weighted by the effective number of samples.

    The weights sum to C and, being class weights, normalise the mean as in `torch.nn.CrossEntropyLoss`.
    counts: training samples per class; a class with none is taken as one with one.
    """

    _vector, _shown = "weight", ("beta",)

    def __init__(self, counts: longtail.Counts, beta: float = 0.9999, gamma: float = 0.0, **options: Any) -> None:
        super().__init__(counts, gamma=gamma, **options)
        self.beta = beta

    def _derive(self) -> Tensor:
        return longtail.effective_number_weights(self.counts, self.beta)


class SigmoidFocalLoss(nn.Module):
    """`fastreg.sigmoid_focal_loss` as a module; forward(inputs, targets, normalizer=None)."""

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none", *, weight: Tensor | None = None
    ) -> None:
        super().__init__()
        losses.check_sigmoid_options(alpha, gamma, reduction)
        self.alpha = alpha
        self.gamma = gamma
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, inputs: Tensor, targets: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return sigmoid_focal_loss(
            inputs, targets, self.alpha, self.gamma, self.reduction, weight=self.weight, normalizer=normalizer
        )

    def extra_repr(self) -> str:
        weight = "" if self.weight is None else f", weight={tuple(self.weight.shape)}"
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}{weight}"


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
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        _checks.choice("activation", activation, ACTIVATIONS)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:  # torch's own argument of that name is not in torch 2.11
            self.register_parameter("bias", None)
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
    places, nor where a module has a `forward` of its own, set on the instance as accelerate does.
    """
    _checks.is_module("model", model)
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
        plain = isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward
        if not plain or _own_forward(parent):
            continue
        for (norm_name, norm), (act_name, act) in pairwise(parent._modules.items()):
            activation = _activation_name(act)
            if type(norm) is not GroupNorm or norm.activation is not None or activation is None:
                continue
            if places[norm] == 1 and not _hooked(norm) and not _hooked(act) and not act._forward_pre_hooks:
                norm.activation = activation
                setattr(parent, act_name, nn.Identity().train(act.training))
                report.group_norm[f"{prefix}.{norm_name}".lstrip(".")] = activation


_TIMM_WITH_ACTIVATION = ("GroupNormAct", "GroupNorm1Act")
_TIMM = ("GroupNorm", "GroupNorm1", *_TIMM_WITH_ACTIVATION)


def _unlike_group_norm(module: nn.GroupNorm) -> str | None:
    """Why this instance of `nn.GroupNorm` is not one that `group_norm` computes."""
    kind = type(module)
    if _own_forward(module):
        return "it has a forward of its own"
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
    """Whether hooks, or a forward in the place of the class's, see what the module returns, which fusion changes."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or _own_forward(module))


def _own_forward(module: nn.Module) -> bool:
    """Whether calls do not reach the forward of the module's class."""
    return "forward" in vars(module)


# ---- noise -----------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of each sample with probability `drop_prob`; see `fastreg.drop_path`.

    `forward(x, residual=None)` adds the residual in the same pass.
    """

    def __init__(self, drop_prob: float = 0.0, mode: str = "row") -> None:
        super().__init__()
        check_drop_path("drop_prob", drop_prob, mode)
        self.drop_prob, self.mode = drop_prob, mode

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return drop_path(x, self.drop_prob, self.training, self.mode, residual=residual)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, mode={self.mode!r}"


class ChannelShrinkage(nn.Module):
    """The block of the residual shrinkage network (its channel-wise form): soft-thresholding by learned thresholds.

    τ_nc = mean over positions of |x_nc| · sigmoid(fc(that mean))_c with fc = Linear, BatchNorm, ReLU, Linear, and the
    output is `soft_threshold(x, τ)`; x is (N, C, ...). The batch norm needs more than one sample in training.
    """

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = channels if hidden is None else hidden
        for name, value in (("channels", channels), ("hidden", hidden)):
            _checks.is_integer(name, value)
            _checks.above_zero(name, value)
        self.channels = channels
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        size = _channel_size(x, self.channels)
        return soft_threshold(x, size * self.fc(size))


def _channel_size(x: Tensor, channels: int) -> Tensor:
    """(N, C): the mean of |x| over the positions."""
    _checks.is_tensor("x", x)
    _checks.dtype_in("x", x, _checks.FLOATS)
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"x must be (N, {channels}, ...), got shape {tuple(x.shape)}")
    if x.dim() == 2:
        return x.abs()
    if _backends.recorded():
        return x.abs().flatten(2).mean(2)
    # A norm takes one read.
    size = row_norms(x.flatten(2).flatten(0, 1), 1.0) / x.shape[2:].numel()
    return size.to(x.dtype).reshape(x.shape[:2])
