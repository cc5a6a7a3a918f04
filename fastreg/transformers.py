"""Weight averaging in Hugging Face's Trainer; needs `transformers` (`pip install fastreg[transformers]`).

from fastreg.transformers import WeightAveraging

trainer = Trainer(model, args, …)
WeightAveraging(trainer, {"ema": EMA(0.999)})
trainer.train()
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ._callbacks import Averaging
from .averaging import Rule, WeightAverager

FILE = "fastreg_averages.pt"  # in a checkpoint's folder: WeightAverager.state_dict()


class WeightAveraging(TrainerCallback):
    """Averages the model's weights while `trainer` trains, and evaluates with the averages.

    One update after each optimizer step, however many batches are accumulated for it. A checkpoint's folder gets the
    averages in a file of their own, fastreg_averages.pt, and `trainer.train(resume_from_checkpoint=…)` goes on with
    them; the model's file holds the model's own weights.

    Args:
        trainer: gets this callback, which also wraps the trainer's methods `train`, `evaluation_loop` and `save_model`:
            Trainer tells callbacks neither which checkpoint it resumes from nor that an evaluation begins, and what is
            saved during one are the model's own weights.
        rules: name → rule, as for `fastreg.WeightAverager`.
        evaluate: the average that the model holds during `trainer.evaluate` and `trainer.predict`: True for the first
            of the rules, False for none. Before the first update the model keeps its own weights.
        **options: as for `fastreg.WeightAverager`; update_every and start_step count optimizer steps.

    `averager` is the WeightAverager, from the beginning of training on; to keep an average when training is over:
    `callback.averager.copy_to(model, "ema")`. With `load_best_model_at_end` the trainer loads the best checkpoint's
    own weights; the averages of that checkpoint are in its folder.
    """

    def __init__(
        self, trainer: Trainer, rules: Mapping[str, Rule], *, evaluate: str | bool = True, **options: Any
    ) -> None:
        self._averaging = Averaging(rules, evaluate, options)
        self._resume_from: str | bool | None = None
        trainer.train = self._told_of_checkpoint(trainer.train, trainer)
        trainer.evaluation_loop = self._with_averages(trainer.evaluation_loop, trainer)
        trainer.save_model = self._with_own_weights(trainer.save_model)
        trainer.add_callback(self)

    @property
    def averager(self) -> WeightAverager | None:
        return self._averaging.averager

    def _told_of_checkpoint(self, train: Callable, trainer: Trainer) -> Callable:
        @functools.wraps(train)
        def wrapped(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            self._resume_from = resume_from_checkpoint
            if resume_from_checkpoint is True:
                self._resume_from = get_last_checkpoint(trainer.args.output_dir)
            return train(resume_from_checkpoint, *args, **kwargs)

        return wrapped

    def _with_averages(self, loop: Callable, trainer: Trainer) -> Callable:
        @functools.wraps(loop)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._averaging.enter(trainer.model)
            try:
                return loop(*args, **kwargs)
            finally:
                self._averaging.leave()

        return wrapped

    def _with_own_weights(self, save: Callable) -> Callable:
        @functools.wraps(save)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._averaging.own_weights():
                return save(*args, **kwargs)

        return wrapped

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        if self._resume_from:
            file = Path(self._resume_from) / FILE
            if file.exists():
                self._averaging.load(torch.load(file, map_location="cpu", weights_only=True))
            else:
                warnings.warn(f"{file} does not exist: the averages start anew", stacklevel=2)
        self._averaging.begin(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.averager.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            torch.save(self.averager.state_dict(), folder / FILE)
