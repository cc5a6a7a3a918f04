"""Fused regularisation ops for PyTorch, for people who train classifiers and vision models."""

from . import longtail, nn
from ._backends import BACKENDS, backends, use_backend
from ._version import __version__
from .averaging import EMA, SWA, AveragedModel, PowerEMA, TanhEMA, WeightAverager, average_
from .group_norm import group_norm
from .linear_cross_entropy import linear_cross_entropy
from .losses import cross_entropy, focal_loss, sigmoid_focal_loss
from .nn import replace_modules

__all__ = [
    "BACKENDS",
    "EMA",
    "SWA",
    "AveragedModel",
    "PowerEMA",
    "TanhEMA",
    "WeightAverager",
    "__version__",
    "average_",
    "backends",
    "cross_entropy",
    "focal_loss",
    "group_norm",
    "linear_cross_entropy",
    "longtail",
    "nn",
    "replace_modules",
    "sigmoid_focal_loss",
    "use_backend",
]
