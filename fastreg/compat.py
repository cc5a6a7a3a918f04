"""The classes of well-known articles under their own names and signatures, corrected.

Changing the import line is enough. Each class says what it does differently from what it replaces.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from . import _checks, _plan, averaging
from .max_norm import _threshold, max_norm_
from .noise import drop_path_reference
from .penalties import Perturbation, lp_penalty


# ---- weight averaging ------------------------------------------------------------------------------------
class _ArticleAverage(averaging.AveragedModel):
    """`update(model)` after each optimizer step; evaluate by calling the object.

    The average lives on the GPU if `cuda` is true and there is one, else on the CPU. Corrected: a model on a GPU does
    not wait for an average on the CPU (see `AveragedModel`); integer buffers are copied, not truncated; tied weights
    are averaged once; the update count is never read back from the device, and is part of the state dict.
    """

    def __init__(self, model: nn.Module, cuda: bool, rule: averaging.Rule, use_buffers: bool) -> None:
        device = "cuda" if cuda and torch.cuda.is_available() else "cpu"
        super().__init__(model, rule, device=device, use_buffers=use_buffers)

    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


class EMAModel(_ArticleAverage):
    """decay·average + (1 − decay)·model; the first update copies."""

    def __init__(self, model: nn.Module, cuda: bool = False, decay: float = 0.9, use_buffers: bool = False) -> None:
        super().__init__(model, cuda, averaging.EMA(decay), use_buffers)


class SWAModel(_ArticleAverage):
    """The equal mean of the model after each update: average + (model − average)/(n + 1)."""

    def __init__(self, model: nn.Module, cuda: bool = False, use_buffers: bool = False) -> None:
        super().__init__(model, cuda, averaging.SWA(), use_buffers)


class T_ADEMAModel(_ArticleAverage):
    """An EMA with decay alpha·tanh(n) in update n.

    The article's class counts tensors where it means updates, so that all but the first five tensors of the first
    average get decay alpha at once: it is `EMAModel(decay=alpha)`, which gives its results if they are wanted.
    """

    def __init__(self, model: nn.Module, cuda: bool = False, alpha: float = 0.9, use_buffers: bool = False) -> None:
        super().__init__(model, cuda, averaging.TanhEMA(alpha), use_buffers)


class EMA:
    """EMA of the trainable parameters by name: `register()` once, `update()` after each optimizer step,
    `apply_shadow()` before evaluation and `restore()` after it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        _checks.is_module("model", model)
        self.model = model
        self.decay = averaging.EMA(decay).decay
        self.shadow: dict[str, Tensor] = {}
        self.backup: dict[str, Tensor] = {}

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def register(self) -> None:
        self.shadow = {name: param.clone() for name, param in self._trainable().items()}

    def _with_shadow(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The trainable parameters, which may have become fewer, and their averages."""
        if not self.shadow:
            raise RuntimeError("register() must come first")
        params = self._trainable()
        if new := sorted(params.keys() - self.shadow.keys()):
            raise RuntimeError(f"since register() these have become trainable: {new}")
        return params, [self.shadow[name] for name in params]

    def update(self) -> None:
        params, shadow = self._with_shadow()
        averaging.average_(shadow, list(params.values()), 1 - self.decay)

    def apply_shadow(self) -> None:
        params, shadow = self._with_shadow()
        if self.backup:
            raise RuntimeError("apply_shadow() was called already: call restore() first")
        self.backup = {name: param.clone() for name, param in params.items()}
        averaging.average_(list(params.values()), shadow, 1.0)

    def restore(self) -> None:
        if not self.backup:
            raise RuntimeError("apply_shadow() must come first")
        params = dict(self.model.named_parameters())
        averaging.average_([params[name].detach() for name in self.backup], list(self.backup.values()), 1.0)
        self.backup = {}


# ---- max-norm, penalties, perturbation, stochastic depth -------------------------------------------------


class MaxNorm_via_PGD:
    """Max-norm by projected gradient descent: `setPerLayerThresh(model)` once, then `PGD(model)` after each epoch or
    step.

    Args:
        thresh: each weight's cap is min + thresh · (max - min) of its row norms to the power tau; biases have none.
        LpNorm, tau: order of the norm, and its power, as in `fastreg.max_norm_`.
        layers: names of the modules to constrain. By default `model.encoder.fc`, or where there is none the last two
            `nn.Linear` among the model's children, or else the last `nn.Linear` anywhere in it.

    Corrected: layers with one output unit work; tau is applied once, and to what sets the caps too; rows with NaN or
    Inf do no harm; every layer that has a threshold is projected; the host does not wait for the GPU. `PGD` returns
    the number of rows scaled.
    """

    def __init__(
        self, thresh: float = 1.0, LpNorm: float = 2, tau: float = 1, layers: Sequence[str] | None = None
    ) -> None:
        _checks.finite_at_least("thresh", thresh, 0.0)
        _checks.above_zero("LpNorm", LpNorm)
        _checks.finite_at_least("tau", tau, 0.0)
        self.thresh, self.LpNorm, self.tau, self.layers = thresh, LpNorm, tau, layers
        self.perLayerThresh: list[float | Tensor] = []

    def setPerLayerThresh(self, model: nn.Module) -> None:
        self.perLayerThresh = [
            _threshold(param, self.thresh, self.LpNorm, 0, self.tau) if param.dim() > 1 else float("inf")
            for param in self._parameters(model)
        ]

    def PGD(self, model: nn.Module) -> Tensor:
        if not self.perLayerThresh:
            self.setPerLayerThresh(model)
        return max_norm_(self._parameters(model), self.perLayerThresh, p=self.LpNorm, tau=self.tau)

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        _checks.is_module("model", model)
        if self.layers is not None:
            if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
                raise TypeError(f"layers must be a list of names, got {self.layers!r}")
            named = dict(model.named_modules())
            if absent := [name for name in self.layers if name not in named]:
                raise ValueError(f"layers names {absent}, which are no modules of the model: {list(named)[1:]}")
            layers = [named[name] for name in self.layers]
        elif hasattr(model, "encoder") and hasattr(model.encoder, "fc"):
            layers = [model.encoder.fc]
        else:
            layers = [child for child in model.children() if isinstance(child, nn.Linear)][-2:]
            layers = layers or [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        params = [param for layer in layers for param in layer.parameters(recurse=False)]
        if not params:
            raise ValueError("model must have an encoder.fc or an nn.Linear; else name the layers to constrain")
        return params


class Regularization(nn.Module):
    """`weight_decay` · Σ ‖w‖_p over the parameters with "weight" in their name, to be added to the loss.

    Args:
        model: the model whose weights are penalised; their names are printed.
        weight_decay: above 0.
        p: order of the norm, at least 1.

    Corrected: a weight_decay of 0 or less raises ValueError instead of ending the process; one fused pass over all
    weights; the gradient of a weight of zeros is zero.
    """

    def __init__(self, model: nn.Module, weight_decay: float, p: float = 2) -> None:
        super().__init__()
        _checks.is_module("model", model)
        _checks.above_zero("weight_decay", weight_decay)
        _checks.in_range("p", p, 1.0)
        self.model, self.weight_decay, self.p = model, weight_decay, p
        self.weight_list = self.get_weight(model)
        self.weight_info(self.weight_list)

    def get_weight(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        return [(name, param) for name, param in model.named_parameters() if "weight" in name]

    def regularization_loss(self, weight_list: list[tuple[str, Tensor]], weight_decay: float, p: float = 2) -> Tensor:
        return weight_decay * lp_penalty([param for _, param in weight_list], p)

    def forward(self, model: nn.Module) -> Tensor:
        self.weight_list = self.get_weight(model)
        return self.regularization_loss(self.weight_list, self.weight_decay, p=self.p)

    def weight_info(self, weight_list: list[tuple[str, Tensor]]) -> None:
        print("---------------regularization weight---------------")
        for name, _ in weight_list:
            print(name)
        print("---------------------------------------------------")


class FGM:
    """Adversarial training of embeddings: `attack()` after the first backward pass, `restore()` after the second.

    Corrected: the host does not wait for the GPU; a gradient with Inf is skipped like one with NaN; a second attack
    before `restore` keeps the first one's backup.
    """

    def __init__(self, model: nn.Module) -> None:
        _checks.is_module("model", model)
        self.model = model
        self._perturbation = Perturbation()

    @_plan.eagerly
    @torch.no_grad()
    def attack(self, epsilon: float = 1.0, emb_name: str = "emb.") -> None:
        if not isinstance(emb_name, str):
            raise TypeError(f"emb_name must be a string, got {type(emb_name).__name__}")
        chosen = {name: param for name, param in self.model.named_parameters() if emb_name in name}
        self._perturbation.attack(chosen, epsilon)

    @_plan.eagerly
    @torch.no_grad()
    def restore(self, emb_name: str = "emb.") -> None:
        self._perturbation.restore()


def drop_connect(inputs: Tensor, p: float, training: bool) -> Tensor:
    """Drops each sample of the residual branch with probability p; the draws are the article's.

    Corrected: any number of dimensions; p = 1 gives zeros, not NaN; the mask is drawn in fp32 whatever the dtype.
    """
    _checks.is_tensor("inputs", inputs)
    _checks.dtype_in("inputs", inputs, _checks.FLOATS)
    _checks.in_range("p", p, 0.0, 1.0)
    if not training:
        return inputs
    if not inputs.dim():
        raise ValueError("inputs must have a dimension of samples, got a 0-d tensor")
    keep = torch.floor(1 - p + torch.rand(inputs.shape[0], device=inputs.device))
    return drop_path_reference(inputs, keep, p)
