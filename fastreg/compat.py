"""The classes of well-known articles under their own names and signatures, corrected.

Changing the import line is enough. Each class says what it does differently from what it replaces.
"""

import torch
from torch import Tensor, nn

from . import averaging


# ---- weight averaging ------------------------------------------------------------------------------------
class _ArticleAverage(averaging.AveragedModel):
    """`update(model)` after each optimizer step; evaluate by calling the object.

    The average lives on the GPU if `cuda` is true and there is one, else on the CPU. Corrected: integer buffers are
    copied, not truncated; tied weights are averaged once; the update count is never read back from the device, and
    is part of the state dict.
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
        self.model = model
        self.decay = averaging.EMA(decay).decay
        self.shadow: dict[str, Tensor] = {}
        self.backup: dict[str, Tensor] = {}

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def register(self) -> None:
        self.shadow = {name: param.clone() for name, param in self._trainable().items()}

    def _matched(self, kept: dict[str, Tensor], call: str) -> tuple[list[Tensor], list[Tensor]]:
        params = self._trainable()
        if not kept or kept.keys() != params.keys():
            raise RuntimeError(
                f"{call} must come first" if not kept else f"the trainable parameters changed since {call}"
            )
        return list(kept.values()), list(params.values())

    def update(self) -> None:
        shadow, params = self._matched(self.shadow, "register()")
        averaging.average_(shadow, params, 1 - self.decay)

    def apply_shadow(self) -> None:
        shadow, params = self._matched(self.shadow, "register()")
        if self.backup:
            raise RuntimeError("apply_shadow() was called already: call restore() first")
        self.backup = {name: param.clone() for name, param in self._trainable().items()}
        averaging.average_(params, shadow, 1.0)

    def restore(self) -> None:
        backup, params = self._matched(self.backup, "apply_shadow()")
        averaging.average_(params, backup, 1.0)
        self.backup = {}
