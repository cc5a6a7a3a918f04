"""Weight averaging: an EMA of a whole model per call, and several averages at once."""

import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import swa_utils

import fastreg
from fastreg import EMA, WeightAverager

from .timing import Bench, LeftOut, nbytes

DECAY = 0.999


def resnet50():
    """The shapes of ResNet-50's parameters: 161 tensors, 25.6 million elements."""
    shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, kernel in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SHAPES = {"resnet50": resnet50(), "1000x64": [(64,)] * 1000, "100M": [(4096, 1024)] * 24}
CASES = {
    name if k == 1 else f"{name}, {k} averages": (shapes, k) for name, shapes in SHAPES.items() for k in (1, 2, 3, 4)
}


def model_and_averages(case, dtype, device):
    shapes, k = case
    model = nn.ParameterList([nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes])
    params = [p.detach() for p in model]
    return SimpleNamespace(model=model, params=params, k=k)


def shadows_of(data):
    return [[p.clone() for p in data.params] for _ in range(data.k)]


def each(averages, update):
    return {"forward": lambda: [update(average) for average in averages]}


averaging = Bench("averaging", CASES, quick=("1000x64",), compare=False)
averaging.inputs(model_and_averages)
averaging.bytes(lambda data: {"forward": (1 + 2 * data.k) * nbytes(*data.params)})


def averager_of(data, k):
    averager = WeightAverager(data.model, {str(j): EMA(DECAY) for j in range(k)})
    averager.update()
    return averager


@averaging.ours
def ours(data):
    return {"forward": averager_of(data, data.k).update}


@averaging.peer("fastreg, an averager each")
def ours_apart(data):
    return each([averager_of(data, 1) for _ in range(data.k)], WeightAverager.update)


@averaging.peer("fastreg.AveragedModel")
def module(data):
    averages = [fastreg.AveragedModel(data.model, EMA(DECAY)) for _ in range(data.k)]
    return each(averages, lambda average: average.update_parameters(data.model))


@averaging.peer("fastreg.average_")
def functional(data):
    return each(shadows_of(data), lambda shadow: fastreg.average_(shadow, data.params, 1 - DECAY))


@averaging.peer("torch._foreach_lerp_")
def foreach(data):
    return each(shadows_of(data), lambda shadow: torch._foreach_lerp_(shadow, data.params, 1 - DECAY))


def refuse_many_large(data):
    """For peers that take several times the others' time and, as every peer holds averages of its own, much memory."""
    if data.k > 1 and sum(p.numel() for p in data.params) > 5e7:
        raise LeftOut("slow: measured with one average of this size, and several of smaller ones")


def torchs(data, **options):
    averages = [swa_utils.AveragedModel(data.model, **options) for _ in range(data.k)]
    for average in averages:
        average.update_parameters(data.model)
    return each(averages, lambda average: average.update_parameters(data.model))


@averaging.peer("torch AveragedModel, EMA")
def torch_ema(data):
    return torchs(data, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))


@averaging.peer("torch AveragedModel, default")
def torch_default(data):
    refuse_many_large(data)
    return torchs(data)


def timm_model_ema():
    """timm's module of averages, without the rest of timm, which needs torchvision."""
    folder = Path(importlib.util.find_spec("timm").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("timm_model_ema", folder / "utils" / "model_ema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@averaging.peer("timm ModelEmaV3", needs="timm")
def timm(data):
    if data.params[0].dtype == torch.bfloat16:  # it rounds them stochastically, in many steps
        refuse_many_large(data)
    averages = [timm_model_ema().ModelEmaV3(data.model, decay=DECAY) for _ in range(data.k)]
    return each(averages, lambda average: average.update(data.model))


@averaging.peer("ema-pytorch", needs="ema_pytorch")
def ema_pytorch(data):
    from ema_pytorch import EMA as Peer

    averages = [
        Peer(data.model, beta=DECAY, update_every=1, update_after_step=0, use_foreach=True) for _ in range(data.k)
    ]
    return each(averages, Peer.update)


def article(data, average_of):
    """The update of the article's classes: a new tensor per parameter, copied into the average. `average_of` has the
    average, the parameter, and how often the class counted: once per parameter, not per update."""
    refuse_many_large(data)
    shadows, count = shadows_of(data), itertools.count(1)

    @torch.no_grad()
    def update(shadow):
        for average, param in zip(shadow, data.params):
            average.copy_(average_of(average, param, next(count)))

    return each(shadows, update)


@averaging.peer("article's EMAModel")
def article_ema(data):
    return article(data, lambda average, param, _: DECAY * average + (1 - DECAY) * param)


@averaging.peer("article's SWAModel")
def article_swa(data):
    return article(data, lambda average, param, n: average + (param - average) / n)


@averaging.peer("article's T_ADEMAModel")
def article_tanh(data):
    def average_of(average, param, n):
        decay = DECAY * math.tanh(n)
        return decay * average + (1 - decay) * param

    return article(data, average_of)


# ---- the host's share of an update ---------------------------------------------------------------------------
host = Bench("averaging_host", {"1000x64": ([(64,)] * 1000, 1)}, dtypes=(torch.float32,), registry="averaging")
host.inputs(model_and_averages)
host.bytes(lambda data: {"forward": 0})


@host.ours
def host_time(data):
    """`WeightAverager.update` with the launch left out: finding that every tensor is where it was, and the call."""
    averager, kernels = averager_of(data, data.k), fastreg.averaging._update_op
    nothing = dict.fromkeys(kernels, lambda *_: None)

    def update():
        fastreg.averaging._update_op = nothing
        averager.update()
        fastreg.averaging._update_op = kernels

    return {"forward": update}


@host.peer("data_ptr() of every parameter")
def pointers(data):
    return {"forward": lambda: [param.data_ptr() for param in data.params]}
