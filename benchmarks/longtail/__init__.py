"""The long-tail comparison: one small network, real images, every method of the library side by side.

`methods.py` is the table of methods, each a few lines; `training.py` is the loop that they plug into.
"""
