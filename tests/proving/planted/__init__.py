"""Kernels with planted bugs, and the same kernels without: what tests/test_proving.py proves the tools with."""
