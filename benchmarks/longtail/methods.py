"""The methods compared, each as one declaration.

A method is trained from scratch, or it starts from what another one trained: either a second stage that trains the
classifier alone, or a change of the trained classifier without any training. The settings (weight decay, tau, caps)
were chosen on the validation set, with `--validate`; the test set took no part.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import fastreg
from fastreg.nn import BalancedSoftmaxLoss, ClassBalancedLoss, CrossEntropyLoss, FocalLoss, LDAMLoss

WEIGHT_DECAY = 1e-3  # of all weights in the first stage; the paper has 5e-3 for a far longer training


@dataclass(frozen=True)
class Cap:
    """Max-norm on the classifier's rows: the cap lies `thresh` of the way from the smallest to the largest row norm
    at the start, or is the number `max_norm`; projected after every step or once per epoch."""

    thresh: float | None = None
    max_norm: float | None = None
    every: str = "step"


@dataclass(frozen=True)
class Method:
    name: str
    title: str
    loss: Callable[[Tensor], nn.Module] = lambda counts: CrossEntropyLoss()  # of the training images per class
    weight_decay: float = 0.0
    cap: Cap | None = None
    cosine: bool = False  # a classifier of cosines, as LDAM wants
    start: str | None = None  # the method whose trained network this one starts from
    finish: Callable[[nn.Linear], object] | None = None  # instead of training


def unit_norm(classifier: nn.Linear) -> None:
    fastreg.UnitNorm(classifier).project()


def tau_norm(classifier: nn.Linear) -> None:
    fastreg.tau_normalize_(classifier.weight, tau=0.5)


def class_balanced(counts: Tensor) -> nn.Module:
    return ClassBalancedLoss(counts, beta=0.9999)


METHODS = (
    Method("ce", "cross-entropy"),
    Method("l2-norm", "cross-entropy, L2-normalised", start="ce", finish=unit_norm),
    Method("wd", "weight decay", weight_decay=WEIGHT_DECAY),
    Method("max-norm", "max-norm per step", cap=Cap(max_norm=1.5)),
    # The paper's second stage as its code runs it, with the projection after each step that its text describes, and
    # with none: what strong decay does by itself.
    Method("two-stage", "two stages, cap per epoch", class_balanced, 0.1, Cap(thresh=0.1, every="epoch"), start="wd"),
    Method("two-stage/step", "two stages, cap per step", class_balanced, 0.1, Cap(thresh=0.1), start="wd"),
    Method("two-stage/decay", "two stages, no cap", class_balanced, 0.1, start="wd"),
    # Decay so weak that only the cap holds the rows back, and the same without the cap: what max-norm does by itself.
    Method("two-stage/weak", "two stages, weak decay, cap", class_balanced, 1e-3, Cap(thresh=0.5), start="wd"),
    Method("two-stage/free", "two stages, weak decay, no cap", class_balanced, 1e-3, start="wd"),
    Method("wd+l2", "weight decay, L2-normalised", start="wd", finish=unit_norm),
    Method("wd+tau", "weight decay, tau-normalised", start="wd", finish=tau_norm),
    Method("focal", "focal loss", lambda counts: FocalLoss(gamma=2.0)),
    Method("smoothing", "label smoothing", lambda counts: CrossEntropyLoss(label_smoothing=0.1)),
    Method("class-balanced", "class-balanced loss", class_balanced),
    Method("balanced-softmax", "balanced softmax", BalancedSoftmaxLoss),
    Method("ldam", "LDAM", LDAMLoss, cosine=True),
)
BY_NAME = {method.name: method for method in METHODS}

# Which five the article draws, in its order.
PANELS = ("ce", "l2-norm", "wd", "max-norm", "two-stage")
