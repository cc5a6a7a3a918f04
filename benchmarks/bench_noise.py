"""Stochastic depth, with and without the residual it leads to; soft-thresholding, alone and in the block of the
residual shrinkage network, which learns its thresholds; flooding."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import fastreg

from .timing import Bench, differentiable, nbytes

# ---- stochastic depth ------------------------------------------------------------------------------------

RATE = 0.2

drop_path = Bench(
    "drop_path",
    {
        "64x197x768": ((64, 197, 768), False),
        "64x197x768 + residual": ((64, 197, 768), True),
        "64x256x14x14 + residual": ((64, 256, 14, 14), True),
        "8x32x7x7": ((8, 32, 7, 7), False),
    },
    quick=("8x32x7x7",),
    compare=False,  # each call draws a mask of its own
)


@drop_path.inputs
def branch(case, dtype, device):
    shape, with_residual = case
    x, residual = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return SimpleNamespace(x=x, residual=residual if with_residual else None)


@drop_path.bytes
def drop_path_bytes(data):
    """Dropped branches are not read; the residual's gradient is the incoming one."""
    moved = round((2 - RATE) * nbytes(data.x))
    return {"forward": moved + (nbytes(data.residual) if data.residual is not None else 0), "backward": moved}


def dropping(data, drop):
    def plain():
        return drop(data.x)

    def added():
        return data.residual + drop(data.x)

    leaves = [data.x] if data.residual is None else [data.x, data.residual]
    return differentiable(plain if data.residual is None else added, *leaves)


@drop_path.ours
def our_drop_path(data):
    leaves = [data.x] if data.residual is None else [data.x, data.residual]
    return differentiable(lambda: fastreg.drop_path(data.x, RATE, residual=data.residual), *leaves)


def masked(x):
    """The article's drop_connect."""
    keep = 1 - RATE
    mask = torch.floor(keep + torch.rand([len(x), *[1] * (x.dim() - 1)], dtype=x.dtype, device=x.device))
    return x / keep * mask


@drop_path.peer("article's formula")
def article(data):
    return dropping(data, masked)


@drop_path.peer("timm", needs="timm")
def timm(data):
    # From its file: the package imports torchvision, which this function does not need.
    place = Path(importlib.util.find_spec("timm").origin).parent / "layers" / "drop.py"
    spec = importlib.util.spec_from_file_location("timm_drop", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dropping(data, lambda x: module.drop_path(x, RATE, True))


@drop_path.peer("torchvision", needs="torchvision")
def torchvision(data):
    from torchvision.ops import stochastic_depth

    return dropping(data, lambda x: stochastic_depth(x, RATE, "row"))


@drop_path.peer("torch.compile", compiled=True)
def compiled_drop_path(data):
    leaves = [data.x] if data.residual is None else [data.x, data.residual]
    call = torch.compile(lambda x, residual: masked(x) if residual is None else residual + masked(x))
    return differentiable(lambda: call(data.x, data.residual), *leaves)


# ---- soft-thresholding -----------------------------------------------------------------------------------

SHAPES = {"64x64x56x56": (64, 64, 56, 56), "64x512x7x7": (64, 512, 7, 7)}

soft_threshold = Bench("soft_threshold", SHAPES, quick=("64x512x7x7",))


@soft_threshold.inputs
def thresholds(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    return SimpleNamespace(x=x, tau=torch.rand(shape[:2], device=device).to(dtype).requires_grad_())


@soft_threshold.bytes
def soft_threshold_bytes(data):
    return {"forward": 2 * nbytes(data.x), "backward": 3 * nbytes(data.x)}


@soft_threshold.ours
def our_soft_threshold(data):
    return differentiable(lambda: fastreg.soft_threshold(data.x, data.tau), data.x, data.tau)


def shrink(x, tau):
    return x.sign() * F.relu(x.abs() - tau[:, :, None, None])


@soft_threshold.peer("torch eager")
def eager(data):
    return differentiable(lambda: shrink(data.x, data.tau), data.x, data.tau)


@soft_threshold.peer("torch.compile", compiled=True)
def compiled_soft_threshold(data):
    call = torch.compile(shrink)
    return differentiable(lambda: call(data.x, data.tau), data.x, data.tau)


channel_shrinkage = Bench(
    "channel_shrinkage",
    SHAPES,
    quick=("64x512x7x7",),
    dtypes=(torch.float32,),
    registry="soft_threshold",
    compare=False,  # the gradient jumps at the threshold: of a million elements a rounding moves one across
)


@channel_shrinkage.inputs
def block(shape, dtype, device):
    # Maps of different sizes: BatchNorm magnifies what tells them apart, which must be more than rounding.
    sizes = 0.5 + torch.rand(*shape[:2], 1, 1, device=device, dtype=dtype)
    x = (sizes * torch.randn(shape, device=device, dtype=dtype)).requires_grad_()
    return SimpleNamespace(x=x, block=fastreg.nn.ChannelShrinkage(shape[1]).to(device, dtype))


@channel_shrinkage.bytes
def block_bytes(data):
    """The thresholds must be known before the first element is written: the input is read twice each way."""
    return {"forward": 3 * nbytes(data.x), "backward": 4 * nbytes(data.x)}


@channel_shrinkage.ours
def our_block(data):
    block = copy.deepcopy(data.block)
    return differentiable(lambda: block(data.x), data.x)


def shrinkage(fc, x):
    size = x.abs().mean((2, 3))
    return shrink(x, size * fc(size))


@channel_shrinkage.peer("torch eager")
def eager_block(data):
    fc = copy.deepcopy(data.block.fc)
    return differentiable(lambda: shrinkage(fc, data.x), data.x)


@channel_shrinkage.peer("torch.compile", compiled=True)
def compiled_block(data):
    fc, call = copy.deepcopy(data.block.fc), torch.compile(shrinkage)
    return differentiable(lambda: call(fc, data.x), data.x)


# ---- flooding --------------------------------------------------------------------------------------------

# The article's formula is all there is to it: what is shown is that the checks around it cost little.
flood = Bench("flood", {"a loss": (), "losses of 4096 samples": (4096,)}, dtypes=(torch.float32,))


@flood.inputs
def losses(shape, dtype, device):
    return SimpleNamespace(loss=torch.rand(shape, device=device, dtype=dtype).requires_grad_())


@flood.bytes
def flood_bytes(data):
    return {"forward": 2 * nbytes(data.loss), "backward": 3 * nbytes(data.loss)}


@flood.ours
def our_flood(data):
    return differentiable(lambda: fastreg.flood(data.loss, 0.1), data.loss)


@flood.peer("article's formula")
def article_flood(data):
    return differentiable(lambda: (data.loss - 0.1).abs() + 0.1, data.loss)


@flood.peer("torch.compile", compiled=True)
def compiled_flood(data):
    call = torch.compile(lambda loss: (loss - 0.1).abs() + 0.1)
    return differentiable(lambda: call(data.loss), data.loss)
