"""What the callbacks of fastreg.lightning and fastreg.transformers share."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .averaging import Rule, WeightAverager


class Averaging:
    """A WeightAverager inside somebody else's training loop. It is made when the model is ready for training; a state
    dict that comes earlier waits for it."""

    def __init__(self, rules: Mapping[str, Rule], evaluate: str | bool, options: Mapping[str, Any]) -> None:
        WeightAverager(nn.Module(), rules, **options)  # wrong arguments are told here, not when training begins
        name = next(iter(rules)) if evaluate is True else evaluate
        if name is not False and name not in rules:
            raise ValueError(f"evaluate must be True, False or one of {', '.join(map(repr, rules))}, got {evaluate!r}")
        self.averager: WeightAverager | None = None
        self._rules, self._options, self._evaluate = rules, options, name
        self._waiting: Mapping[str, Any] | None = None
        self.inside = ExitStack()

    def begin(self, model: nn.Module) -> None:
        if self.averager is None or self.averager._model is not model:
            self.averager = WeightAverager(model, self._rules, **self._options)
        if self._waiting is not None:
            self.averager.load_state_dict(self._waiting)
            self._waiting = None

    def load(self, state: Mapping[str, Any]) -> None:
        self._waiting = state

    def enter(self, model: nn.Module) -> None:
        """Until `leave`, the model holds the average that is evaluated, once there is one."""
        if self._waiting is not None:
            self.begin(model)
        if self._evaluate is not False and self.averager is not None and self.averager.n_averaged > 0:
            self.inside.enter_context(self.averager.swapped(self._evaluate))

    def leave(self) -> None:
        self.inside.close()

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """The model holds its own weights inside the block, also between `enter` and `leave`."""
        if self.averager is None or self.averager._swapped is None:
            yield
        else:
            with self.averager._swapped_back():
                yield
