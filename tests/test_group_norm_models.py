"""`replace_modules` on models of other libraries as those build them; skipped where a library is missing.
The patterns that their blocks consist of are in test_group_norm.py, for machines that have none of them."""

import copy
from collections import Counter
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn

import fastreg
from tests.test_group_norm import randomise, same_model, tensor

UNCHANGED = {"torch.nn.modules.normalization.GroupNorm", "timm.layers.norm.GroupNorm", "timm.layers.norm.GroupNorm1"}


def library(name: str, part: str | None = None):
    """The module, or a part of it that it imports when asked; a skip where that fails, as timm does without
    torchvision, and torchvision with another torch than its own."""
    try:
        module = import_module(name)
        return getattr(module, part) if part else module
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


def timm_resnet():
    resnet, layers = library("timm.models.resnet"), library("timm.layers")
    norm = partial(layers.GroupNorm, num_groups=8)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, norm_layer=norm), {None: 12}


def timm_resnet_before_activation():
    """Big Transfer's: a GroupNormAct before each convolution."""
    resnet, layers = library("timm.models.resnetv2"), library("timm.layers")
    norm = partial(layers.GroupNormAct, num_groups=8)
    model = resnet.ResNetV2(
        [1, 1, 1, 1], channels=(32, 64, 96, 128), num_classes=10, stem_chs=16, norm_layer=norm
    )  # fmt: skip
    return model, {"relu": 13}


def timm_poolformer():
    metaformer, layers = library("timm.models.metaformer"), library("timm.layers")
    model = metaformer.MetaFormer(
        depths=(1, 1, 1, 1), dims=(16, 32, 48, 64), num_classes=10, norm_layers=layers.GroupNorm1
    )
    return model, {None: 8}


def torchvision_resnet():
    resnet = library("torchvision.models.resnet")
    model = resnet.ResNet(
        resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, norm_layer=lambda channels: nn.GroupNorm(8, channels)
    )
    return model, {None: 17}


def torchvision_conv_norm_activation():
    misc = library("torchvision.ops.misc")
    block = partial(misc.Conv2dNormActivation, norm_layer=partial(nn.GroupNorm, 4), activation_layer=nn.SiLU)
    return nn.Sequential(block(3, 16), block(16, 32, stride=2), nn.Flatten(), nn.LazyLinear(10)), {"silu": 2}


def diffusers_unet():
    """GroupNorm and SiLU twice in a residual block, GroupNorm before attention."""
    model = library("diffusers", "UNet2DModel")(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    return model, None


class Denoiser(nn.Module):
    """A UNet at one time step, with the tensor that it returns."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x):
        return self.unet(x, 3).sample


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "build",
    [
        timm_resnet, timm_resnet_before_activation, timm_poolformer, torchvision_resnet,
        torchvision_conv_norm_activation, diffusers_unet,
    ],
)  # fmt: skip
def test_other_libraries_models(build, format):
    model, expected = build()
    if build is diffusers_unet:
        model = Denoiser(model)
    x = tensor(2, 3, 32, 32)
    model(x)  # makes what is lazy
    model = randomise(model)
    for parameter in model.parameters():
        parameter.data *= 0.3  # deep models of large weights would amplify rounding
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert norms
    replaced = copy.deepcopy(model)
    report = fastreg.replace_modules(replaced)
    assert not report.kept and len(report.group_norm) == norms
    assert expected is None or Counter(report.group_norm.values()) == expected
    assert not any(f"{type(module).__module__}.{type(module).__name__}" in UNCHANGED for module in replaced.modules())
    replaced.load_state_dict(model.state_dict())
    same_model(model, replaced.to(memory_format=format), x.to(memory_format=format))
