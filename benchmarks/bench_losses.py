"""Softmax losses. A row of logits is read once forward; read once and its gradient written once backward."""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

import fastreg

from .timing import Bench, LeftOut, Run, differentiable, nbytes

CASES = {
    "32x10": (32, 10),
    "512x1000": (512, 1000),
    "1024x8142": (1024, 8142),
    "2048x32000": (2048, 32000),
    "64x262144": (64, 262144),
}


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


@cross_entropy.peer("fastreg, grad_in_forward")
def in_forward(data):
    call = lambda: fastreg.cross_entropy(data.logits, data.target, grad_in_forward=True)  # noqa: E731
    return {"both": differentiable(call, data.logits)["both"]}  # a second backward makes the gradient again


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


def focal_formula(logits, target, gamma=2.0):
    """What is pasted for want of a kernel."""
    log_p = F.log_softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)
    return (-((1 - log_p.exp()) ** gamma) * log_p).mean()


focal = Bench("focal_loss", CASES, quick=("32x10", "512x1000"), registry="cross_entropy")
focal.inputs(logits_and_classes)
focal.bytes(least_bytes)


@focal.ours
def ours_focal(data):
    return differentiable(lambda: fastreg.focal_loss(data.logits, data.target), data.logits)


@focal.peer("torch eager")
def eager_focal(data):
    return differentiable(lambda: focal_formula(data.logits, data.target), data.logits)


@focal.peer("torch.compile", compiled=True)
def compiled_focal(data):
    loss = torch.compile(focal_formula)
    return differentiable(lambda: loss(data.logits, data.target), data.logits)


def onehot_formula(logits, target, gamma=2.0):
    """kornia's: the term of every class, of which a one-hot target leaves one."""
    log_p = F.log_softmax(logits, 1)
    onehot = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    return (onehot * -((1 - log_p.exp()) ** gamma) * log_p).sum(1).mean()


def softmax_formula(logits, target, gamma=2.0):
    """mmcv's: softmax first, its logarithm held above the smallest normal number of fp32."""
    p = F.softmax(logits, 1).gather(1, target.unsqueeze(1)).squeeze(1)
    return (-((1 - p) ** gamma) * p.clamp(min=torch.finfo(torch.float32).tiny).log()).mean()


@focal.peer("kornia's formula")
def onehot_focal(data):
    return differentiable(lambda: onehot_formula(data.logits, data.target), data.logits)


@focal.peer("mmcv's formula")
def softmax_focal(data):
    return differentiable(lambda: softmax_formula(data.logits, data.target), data.logits)


@focal.peer("kornia", needs="kornia")
def kornia_focal(data):
    from kornia.losses import focal_loss

    return differentiable(lambda: focal_loss(data.logits, data.target, None, 2.0, "none").sum(1).mean(), data.logits)


def sigmoid_formula(logits, targets, alpha=0.25, gamma=2.0):
    """torchvision's."""
    p = torch.sigmoid(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = loss * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma
    return ((alpha * targets + (1 - alpha) * (1 - targets)) * loss).sum()


def logits_and_onehots(shape, dtype, device):
    data = logits_and_classes(shape, dtype, device)
    data.onehot = F.one_hot(data.target, shape[1]).to(dtype)
    return data


SIGMOID_CASES = {"512x80": (512, 80), "4096x80": (4096, 80), "100000x80": (100_000, 80)}
sigmoid_focal = Bench("sigmoid_focal_loss", SIGMOID_CASES, quick=("512x80", "4096x80"))
sigmoid_focal.inputs(logits_and_onehots)
sigmoid_focal.bytes(least_bytes)


@sigmoid_focal.ours
def ours_sigmoid(data):
    return differentiable(lambda: fastreg.sigmoid_focal_loss(data.logits, data.target, reduction="sum"), data.logits)


@sigmoid_focal.peer("torchvision", needs="torchvision")
def torchvision_sigmoid(data):
    from torchvision.ops import sigmoid_focal_loss

    return differentiable(lambda: sigmoid_focal_loss(data.logits, data.onehot, reduction="sum"), data.logits)


@sigmoid_focal.peer("torch eager")
def eager_sigmoid(data):
    return differentiable(lambda: sigmoid_formula(data.logits, data.onehot), data.logits)


@sigmoid_focal.peer("torch.compile", compiled=True)
def compiled_sigmoid(data):
    loss = torch.compile(sigmoid_formula)
    return differentiable(lambda: loss(data.logits, data.onehot), data.logits)


def features_and_classes(shape, dtype, device):
    rows, features, classes = shape
    return SimpleNamespace(
        input=torch.randn(rows, features, device=device).to(dtype).requires_grad_(),
        weight=(torch.randn(classes, features, device=device) / features**0.5).to(dtype).requires_grad_(),
        target=torch.randint(classes, (rows,), device=device),
    )


LINEAR_CASES = {"1024x128x8142": (1024, 128, 8142), "2048x256x32000": (2048, 256, 32000)}
linear = Bench("linear_cross_entropy", LINEAR_CASES, quick=("1024x128x8142",), registry="cross_entropy")
linear.inputs(features_and_classes)


@linear.bytes
def operands(data):
    """Its operands once, and their gradients once: far below what it takes, which is the products' time."""
    once = nbytes(data.input, data.weight)
    return {"forward": once, "backward": once}


def loss_or_gradients(call, data):
    """The forward alone is that of an evaluation, under no_grad: where gradients are wanted, the chunked ones make them
    in the forward already. So there is no backward alone either, which ours would make again if it came twice."""
    return {"forward": Run(torch.no_grad()(call)), "both": differentiable(call, data.input, data.weight)["both"]}


@linear.ours
def ours_linear(data):
    return loss_or_gradients(
        lambda: fastreg.linear_cross_entropy(data.input, data.weight, data.target, chunk_size=512), data
    )


@linear.peer("torch eager")
def eager_linear(data):
    return loss_or_gradients(lambda: F.cross_entropy(F.linear(data.input, data.weight), data.target), data)


@linear.peer("torch.compile", compiled=True)
def compiled_linear(data):
    loss = torch.compile(lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target))
    return loss_or_gradients(lambda: loss(data.input, data.weight, data.target), data)


@linear.peer("liger-kernel", needs="liger_kernel", devices=("cuda",))
def liger_linear(data):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return loss_or_gradients(lambda: liger_fused_linear_cross_entropy(data.input, data.weight, data.target), data)


@linear.peer("torch chunked")
def chunked_linear(data):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise LeftOut("this torch has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return loss_or_gradients(
        lambda: F.linear_cross_entropy(data.input, data.weight, data.target, options=options), data
    )
