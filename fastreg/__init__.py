"""Fused regularisation ops for PyTorch."""

from . import _ops, _native
from ._backends import BACKENDS, backends, use_backend
from ._version import __version__
