"""Fused regularisation ops for PyTorch, for people who train classifiers and vision models."""

from . import nn
from ._backends import BACKENDS, backends, use_backend
from ._version import __version__
from .group_norm import group_norm
from .losses import cross_entropy
from .nn import replace_modules

__all__ = ["BACKENDS", "__version__", "backends", "cross_entropy", "group_norm", "nn", "replace_modules", "use_backend"]
