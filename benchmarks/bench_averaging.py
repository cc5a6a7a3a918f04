"""Weight averaging: an EMA of a whole model per call, and several averages at once."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import swa_utils

import fastreg
from fastreg import EMA, WeightAverager

from .timing import Bench, nbytes

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


CASES = {
    "resnet50": (resnet50(), 1),
    "1000x64": ([(64,)] * 1000, 1),
    "100M": ([(4096, 1024)] * 24, 1),
    "resnet50-2-averages": (resnet50(), 2),
    "resnet50-4-averages": (resnet50(), 4),
}


def model_and_averages(case, dtype, device):
    shapes, k = case
    model = nn.ParameterList([nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes])
    params = [p.detach() for p in model]
    return SimpleNamespace(model=model, params=params, k=k)


def shadows_of(data):
    return [[p.clone() for p in data.params] for _ in range(data.k)]


averaging = Bench("averaging", CASES, quick=("1000x64",), compare=False)
averaging.inputs(model_and_averages)
averaging.bytes(lambda data: {"forward": (1 + 2 * data.k) * nbytes(*data.params)})


@averaging.ours
def ours(data):
    averager = WeightAverager(data.model, {str(j): EMA(DECAY) for j in range(data.k)})
    averager.update()
    return {"forward": averager.update}


@averaging.peer("fastreg, an averager each")
def ours_apart(data):
    averagers = [WeightAverager(data.model, {"ema": EMA(DECAY)}) for _ in range(data.k)]
    return {"forward": lambda: [averager.update() for averager in averagers]}


@averaging.peer("fastreg.average_")
def functional(data):
    shadows = shadows_of(data)
    return {"forward": lambda: [fastreg.average_(shadow, data.params, 1 - DECAY) for shadow in shadows]}


@averaging.peer("torch._foreach_lerp_")
def foreach(data):
    shadows = shadows_of(data)
    return {"forward": lambda: [torch._foreach_lerp_(shadow, data.params, 1 - DECAY) for shadow in shadows]}


def torchs(data, **options):
    averages = [swa_utils.AveragedModel(data.model, **options) for _ in range(data.k)]
    for average in averages:
        average.update_parameters(data.model)
    return {"forward": lambda: [average.update_parameters(data.model) for average in averages]}


@averaging.peer("torch AveragedModel, EMA")
def torch_ema(data):
    return torchs(data, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))


@averaging.peer("torch AveragedModel, default")
def torch_default(data):
    return torchs(data)


@averaging.peer("timm ModelEmaV3", needs="timm")
def timm(data):
    from timm.utils import ModelEmaV3

    averages = [ModelEmaV3(data.model, decay=DECAY) for _ in range(data.k)]
    return {"forward": lambda: [average.update(data.model) for average in averages]}


@averaging.peer("ema-pytorch", needs="ema_pytorch")
def ema_pytorch(data):
    from ema_pytorch import EMA as Peer

    averages = [
        Peer(data.model, beta=DECAY, update_every=1, update_after_step=0, use_foreach=True) for _ in range(data.k)
    ]
    return {"forward": lambda: [average.update() for average in averages]}


@averaging.peer("article")
def article(data):
    """The update of the article's EMAModel: a new tensor per parameter, copied into the average."""
    shadows = shadows_of(data)

    @torch.no_grad()
    def update():
        for shadow in shadows:
            for average, param in zip(shadow, data.params):
                average.copy_(DECAY * average + (1 - DECAY) * param)

    return {"forward": update}
