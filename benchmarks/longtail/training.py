"""The network and the loop: losses, GroupNorm, max-norm and weight averages as a training script uses them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
from fastreg.nn import GroupNorm

from .data import LongTailed
from .methods import Cap, Method

LEARNING_RATE = 0.1
STAGE_TWO_LEARNING_RATE = 0.05
AVERAGES = {
    "ema": fastreg.EMA(0.99, warmup="linear"),
    "swa": fastreg.SWA(),
    "t-adema": fastreg.TanhEMA(alpha=0.99),
}
WEIGHTS = ("last", *AVERAGES)


class Block(nn.Module):
    """Two convolutions and a skip, with the activation and the addition inside GroupNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = GroupNorm(8, channels, activation="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(8, channels, activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=x)


class Net(nn.Module):
    """A small residual network. Its classifier has no bias: a class can be favoured by its weight norm alone."""

    def __init__(self, channels: int, num_classes: int, width: int = 16, cosine: bool = False):
        super().__init__()
        stages = []
        for into, out in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            stages += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False), GroupNorm(8, out, activation="relu")]
            stages += [Block(out)] if out > width else []
        self.features = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(4 * width, num_classes, bias=False)
        self.cosine = cosine

    def forward(self, images: Tensor) -> Tensor:
        features, weight = self.features(images), self.classifier.weight
        if self.cosine:
            features, weight = F.normalize(features), F.normalize(weight)
        return F.linear(features, weight)


@dataclass
class Trained:
    """What a method leaves behind: the network under each kind of weights, and how it came there."""

    nets: dict[str, Net]
    projected: int = 0  # rows that max-norm scaled,
    projectable: int = 0  # of so many that it looked at
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # epoch, training loss, validation accuracy


def run(
    method: Method, done: dict[str, Trained], data: LongTailed, *, seed: int, epochs: int, step: Callable[[], None]
) -> Trained:
    """Trains one method; `step` is called after every training step."""
    if method.finish is not None:
        nets = copy.deepcopy(done[method.start].nets)
        with torch.no_grad():
            for net in nets.values():
                method.finish(net.classifier)
        return Trained(nets)
    torch.manual_seed(seed)
    if method.start is None:
        net = Net(data.train.pixels.shape[1], data.num_classes, cosine=method.cosine).to(data.train.pixels.device)
        return train(net, method, data, LEARNING_RATE, epochs, step)
    net = copy.deepcopy(done[method.start].nets["last"])
    net.features.requires_grad_(False)
    return train(net, method, data, STAGE_TWO_LEARNING_RATE, stage_two_epochs(epochs), step)


def train(
    net: Net, method: Method, data: LongTailed, learning_rate: float, epochs: int, step: Callable[[], None]
) -> Trained:
    loss_of = method.loss(data.counts).to(data.train.pixels.device)
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, learning_rate, momentum=0.9, nesterov=True, weight_decay=method.weight_decay)
    steps = epochs * steps_per_epoch(data)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps + 1, pct_start=0.1, cycle_momentum=False, div_factor=25, final_div_factor=1e4
    )
    averager = fastreg.WeightAverager(net, AVERAGES, start_step=steps // 2)
    cap = max_norm(net.classifier, method.cap)
    if cap is not None and method.cap.every == "step":
        cap.attach(optimizer)

    curve = []
    for epoch in range(epochs):
        net.train()
        total = torch.zeros((), device=data.train.pixels.device)
        for images, classes in batches(data):
            loss = loss_of(net(images), classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averager.update()
            total += loss.detach() * len(classes)
            step()
        if cap is not None and method.cap.every == "epoch":
            cap.project()
        accuracy = (predict(net, data.validation.pixels) == data.validation.classes).double().mean().item()
        curve.append((epoch + 1, total.item() / len(data.train), accuracy))

    trained = Trained({}, curve=curve)
    if cap is not None:
        trained.projected = int(cap.total)
        trained.projectable = data.num_classes * (steps if method.cap.every == "step" else epochs)
    trained.nets["last"] = net
    for name in AVERAGES:
        trained.nets[name] = copy.deepcopy(net)
        averager.copy_to(trained.nets[name], name)
    return trained


def max_norm(classifier: nn.Linear, cap: Cap | None) -> fastreg.MaxNorm | None:
    return cap and fastreg.MaxNorm(classifier, cap.max_norm, thresh=cap.thresh)


def steps_per_epoch(data: LongTailed) -> int:
    return -(-len(data.train) // data.batch)


def stage_two_epochs(epochs: int) -> int:
    return max(1, epochs // 2)


def steps_of(method: Method, data: LongTailed, epochs: int) -> int:
    """How many training steps `run` takes."""
    if method.finish is not None:
        return 0
    return steps_per_epoch(data) * (epochs if method.start is None else stage_two_epochs(epochs))


def batches(data: LongTailed):
    """One epoch in random order, each image shifted by up to two pixels and, where that is allowed, mirrored."""
    images = data.train
    device = images.pixels.device
    size = images.pixels.shape[-1]
    padded = F.pad(images.pixels, (2, 2, 2, 2), value=float(images.pixels.min()))
    across = torch.arange(size, device=device)
    for chosen in torch.randperm(len(images)).to(device).split(data.batch):
        down, right = torch.randint(5, (2, len(chosen), 1), device=device)
        columns = right + across
        if data.flip:
            mirrored = torch.rand(len(chosen), 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        rows = (down + across)[:, None, :, None]
        channels = torch.arange(images.pixels.shape[1], device=device)[None, :, None, None]
        yield padded[chosen[:, None, None, None], channels, rows, columns[:, None, None, :]], images.classes[chosen]


@torch.no_grad()
def predict(net: Net, pixels: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(part).argmax(1) for part in pixels.split(500)])
