"""Softmax losses. A row of logits is read once forward; read once and its gradient written once backward."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

import fastreg

from .timing import Bench, differentiable, nbytes

CASES = {"32x10": (32, 10), "512x1000": (512, 1000), "1024x8142": (1024, 8142), "2048x32000": (2048, 32000)}


def logits_and_classes(shape, dtype, device):
    rows, classes = shape
    logits = (3 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    return SimpleNamespace(logits=logits, target=torch.randint(classes, (rows,), device=device))


def least_bytes(data):
    return {"forward": nbytes(data.logits), "backward": 2 * nbytes(data.logits)}


cross_entropy = Bench("cross_entropy", CASES, quick=("32x10", "512x1000"))
cross_entropy.inputs(logits_and_classes)
cross_entropy.bytes(least_bytes)


@cross_entropy.ours
def ours(data):
    return differentiable(lambda: fastreg.cross_entropy(data.logits, data.target), data.logits)


@cross_entropy.peer("torch eager")
def eager(data):
    return differentiable(lambda: F.cross_entropy(data.logits, data.target), data.logits)


@cross_entropy.peer("torch.compile", compiled=True)
def compiled(data):
    loss = torch.compile(F.cross_entropy)
    return differentiable(lambda: loss(data.logits, data.target), data.logits)


@cross_entropy.peer("liger-kernel", needs="liger_kernel", devices=("cuda",))
def liger(data):
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over the logits in its forward: a copy keeps the data of the other providers.
    logits = data.logits.detach().clone().requires_grad_()
    return differentiable(lambda: liger_cross_entropy(logits, data.target), logits)
