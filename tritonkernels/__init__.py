"""Triton kernels and their launchers: raw tensors in, raw tensors out.

Importing this package does not import triton; importing one of its modules does.
"""
