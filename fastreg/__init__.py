"""Fused regularisation ops for PyTorch, for people who train classifiers and vision models."""

from inspect import isfunction as _isfunction

from torch import fx as _fx

from . import compat, longtail, nn
from ._backends import BACKENDS, backends, use_backend
from ._version import __version__
from .averaging import EMA, SWA, AveragedModel, PowerEMA, TanhEMA, WeightAverager, average_
from .group_norm import group_norm
from .linear_cross_entropy import linear_cross_entropy
from .losses import cross_entropy, focal_loss, sigmoid_focal_loss
from .max_norm import (
    MaxNorm,
    UnitNorm,
    max_norm,
    max_norm_,
    max_norm_threshold,
    project_lp_ball_,
    row_norms,
    tau_normalize_,
)
from .nn import replace_modules
from .noise import drop_path, flood, linear_drop_rates, soft_threshold
from .penalties import FGM, Penalty, lp_penalty, lp_penalty_backward_

__all__ = [
    "BACKENDS",
    "EMA",
    "FGM",
    "SWA",
    "AveragedModel",
    "MaxNorm",
    "Penalty",
    "PowerEMA",
    "TanhEMA",
    "UnitNorm",
    "WeightAverager",
    "__version__",
    "average_",
    "backends",
    "compat",
    "cross_entropy",
    "drop_path",
    "flood",
    "focal_loss",
    "group_norm",
    "linear_cross_entropy",
    "linear_drop_rates",
    "longtail",
    "lp_penalty",
    "lp_penalty_backward_",
    "max_norm",
    "max_norm_",
    "max_norm_threshold",
    "nn",
    "project_lp_ball_",
    "replace_modules",
    "row_norms",
    "sigmoid_focal_loss",
    "soft_threshold",
    "tau_normalize_",
    "use_backend",
]

# To torch.fx.symbolic_trace, whose stand-ins for tensors have no shape to check, each is one step of the graph.
for _name in __all__:
    if _isfunction(globals()[_name]):
        _fx.wrap(_name)
