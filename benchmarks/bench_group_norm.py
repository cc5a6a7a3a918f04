"""GroupNorm with 32 groups, plain and with SiLU, in both layouts. A group that fits on chip is read once and its
result written once; in the backward the input and the incoming gradient are read once and the gradient written once.
"""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

import fastreg
from fastreg import _backends

from .timing import Bench, LeftOut, Run, differentiable, nbytes

GROUPS = 32
SHAPES = ((8, 64, 56, 56), (8, 320, 32, 32), (2, 512, 64, 64), (1, 512, 64, 64), (64, 256, 14, 14), (64, 256, 7, 7))
CASES = {
    f"{'x'.join(map(str, shape))} {layout}{' SiLU' if activation else ''}": (shape, layout, activation)
    for shape in SHAPES
    for layout in ("NCHW", "NHWC")
    for activation in ("silu", None)
}
# Small groups, and little to do at all.
CASES |= {"64x64x8x8 NCHW": ((64, 64, 8, 8), "NCHW", None), "2x64x8x8 NCHW": ((2, 64, 8, 8), "NCHW", None)}
CASES |= {"64x256": ((64, 256), None, None)}


def features(case, dtype, device):
    shape, layout, activation = case
    x = torch.randn(shape, device=device).to(dtype)
    if layout == "NHWC":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device=device).to(dtype).requires_grad_() for _ in range(2))
    return SimpleNamespace(x=x.requires_grad_(), weight=weight, bias=bias, activation=activation)


def least_bytes(data):
    size = nbytes(data.x)
    return {"forward": 2 * size, "backward": 3 * size, "inference": 2 * size}


group_norm = Bench("group_norm", CASES, quick=("8x64x56x56 NCHW SiLU", "8x64x56x56 NHWC SiLU"))
group_norm.inputs(features)
group_norm.bytes(least_bytes)


def with_inference(call, data):
    def inference():
        with torch.no_grad():
            return call()

    return {**differentiable(call, data.x, data.weight, data.bias), "inference": Run(inference)}


def torch_group_norm(x, weight, bias, activation):
    y = F.group_norm(x, GROUPS, weight, bias)
    return F.silu(y) if activation else y


@group_norm.ours
def ours(data):
    if _backends.forced() == "reference" and data.x.device.type == "cpu" and data.x.numel() >= 1 << 21:
        raise LeftOut("takes a hundred times as long as the others: measured on the smallest tensors alone")
    return with_inference(
        lambda: fastreg.group_norm(data.x, GROUPS, data.weight, data.bias, activation=data.activation), data
    )


@group_norm.peer("torch eager")
def eager(data):
    return with_inference(lambda: torch_group_norm(data.x, data.weight, data.bias, data.activation), data)


@group_norm.peer("torch.compile", compiled=True)
def compiled(data):
    call = torch.compile(torch_group_norm)
    return with_inference(lambda: call(data.x, data.weight, data.bias, data.activation), data)


@group_norm.peer("liger-kernel", needs="liger_kernel", devices=("cuda",))
def liger(data):
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    if data.x.dim() == 2:
        raise LeftOut("takes no (N, C)")
    if data.x.dim() != 3:  # its backward takes (N, C, L) alone, and no channels_last
        flat = data.x.detach().flatten(2).contiguous().requires_grad_()
    else:
        flat = data.x
    channels = data.x.shape[1]

    def call():
        y = LigerGroupNormFunction.apply(flat, data.weight, data.bias, channels, GROUPS, 1e-5)
        return F.silu(y) if data.activation else y

    return differentiable(call, flat, data.weight, data.bias)


@group_norm.peer("flag-gems", needs="flag_gems", devices=("cuda",))
def flag_gems(data):
    import flag_gems

    per_group = data.x.shape[1] // GROUPS
    if per_group & (per_group - 1) or data.x[0, 0].numel() & (data.x[0, 0].numel() - 1):
        raise LeftOut("its results are wrong where C/G or H·W is no power of two")

    def call():
        with flag_gems.use_gems():
            return torch_group_norm(data.x, data.weight, data.bias, data.activation)

    return with_inference(call, data)
