"""Fused regularisation ops for PyTorch, for people who train classifiers and vision models."""

from ._backends import BACKENDS, backends, use_backend
from ._version import __version__
from .losses import cross_entropy

__all__ = ["BACKENDS", "__version__", "backends", "cross_entropy", "use_backend"]
