"""Weight averaging in PyTorch Lightning; needs `lightning` or `pytorch_lightning` (`pip install fastreg[lightning]`).

from fastreg.lightning import WeightAveraging

trainer = Trainer(callbacks=[WeightAveraging({"ema": EMA(0.999)})])
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from ._callbacks import Averaging
from .averaging import Rule, WeightAverager


class WeightAveraging(Callback):
    """Averages the module's weights during `fit`, and evaluates with the averages.

    One update after each step of the optimizers, however many batches it took; where a batch takes several steps, as
    in manual optimization with two optimizers, one after the batch. Checkpoints hold the averages beside the module's
    own weights, those taken during evaluation too, and resuming from one goes on with the averages.

    Args:
        rules: name → rule, as for `fastreg.WeightAverager`.
        evaluate: the average that the module holds while the trainer validates, tests and predicts: True for the
            first of the rules, False for none. Before the first update the module keeps its own weights.
        **options: as for `fastreg.WeightAverager`; update_every and start_step count optimizer steps.

    `averager` is the WeightAverager, from the beginning of training on; to keep an average when training is over:
    `callback.averager.copy_to(module, "ema")`.
    """

    def __init__(self, rules: Mapping[str, Rule], *, evaluate: str | bool = True, **options: Any) -> None:
        self._averaging = Averaging(rules, evaluate, options)
        self._step = 0

    @property
    def averager(self) -> WeightAverager | None:
        return self._averaging.averager

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaging.begin(pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.averager.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaging.enter(pl_module)
        # Where every checkpoint gets the weights from, those of weights alone too, of which callbacks are not told.
        strategy, state_dict = trainer.strategy, trainer.strategy.lightning_module_state_dict

        def own_state_dict() -> dict[str, Any]:
            with self._averaging.own_weights():
                return {name: t.clone() if isinstance(t, Tensor) else t for name, t in state_dict().items()}

        strategy.lightning_module_state_dict = own_state_dict
        self._averaging.inside.callback(delattr, strategy, "lightning_module_state_dict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaging.leave()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._averaging.leave()

    @property
    def state_key(self) -> str:
        return "fastreg.WeightAveraging"  # Lightning has a class of this name too

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averager is None else self.averager.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._averaging.load(state_dict)
