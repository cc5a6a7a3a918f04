"""Lp penalties of a ResNet-50's weights, and FGM on an embedding, beside the articles' loops."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

import fastreg

from .timing import Bench, Run, differentiable, nbytes


def resnet50_weights() -> list[tuple[int, ...]]:
    """The shapes of the parameters of a ResNet-50 that have "weight" in their name."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width,), (width, width, 3, 3), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels)]


# ---- Lp penalty ------------------------------------------------------------------------------------------

penalty = Bench(
    "lp_penalty", {"resnet50 l2": (2, resnet50_weights()), "resnet50 l1": (1, resnet50_weights())}, compare=False
)


@penalty.inputs
def weights(case, dtype, device):
    p, shapes = case
    made = [nn.Parameter(0.01 * torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    return SimpleNamespace(weights=made, p=p)


@penalty.bytes
def penalty_bytes(data):
    return {"forward": nbytes(*data.weights), "backward": 2 * nbytes(*data.weights)}


@penalty.ours
def ours(data):
    return differentiable(lambda: fastreg.lp_penalty(data.weights, data.p), *data.weights)


def loop(weights, p):
    loss = 0
    for weight in weights:
        loss = loss + torch.norm(weight, p=p)
    return loss


@penalty.peer("article's loop")
def article(data):
    return differentiable(lambda: loop(data.weights, data.p), *data.weights)


@penalty.peer("torch._foreach_norm")
def foreach(data):
    return differentiable(lambda: torch.stack(torch._foreach_norm(data.weights, data.p)).sum(), *data.weights)


@penalty.peer("torch.compile", compiled=True)
def compiled(data):
    call = torch.compile(loop)
    return differentiable(lambda: call(data.weights, data.p), *data.weights)


# ---- FGM -------------------------------------------------------------------------------------------------

fgm = Bench(
    "fgm",
    {
        "2000x128 dense": (2000, 128, 1.0),
        "30522x768 of a batch": (30522, 768, 0.1),
        "30522x768 dense": (30522, 768, 1.0),
    },
    dtypes=(torch.float32,),
    registry="FGM",
    compare=False,
)


@fgm.inputs
def embedding(case, dtype, device):
    rows, width, share = case
    module = nn.ModuleDict({"emb": nn.Embedding(rows, width, dtype=dtype, device=device)})
    touched = (torch.rand(rows, 1, device=device) < share).to(dtype)
    module["emb"].weight.grad = torch.randn(rows, width, device=device).to(dtype) * touched
    return SimpleNamespace(module=module, weight=module["emb"].weight)


@fgm.bytes
def fgm_bytes(data):
    """Norm: the gradient. Attack: read both, write the weight and its backup. Restore: read and write."""
    return {"forward": 7 * nbytes(data.weight)}


def own_copy(data):
    """Each provider has an embedding of its own: the article's class moves the parameter to other memory."""
    module = copy.deepcopy(data.module)
    module["emb"].weight.grad = data.weight.grad.clone()
    return module


def there_and_back(attack, restore):
    def call():
        attack()
        restore()

    return {"forward": Run(call)}


@fgm.ours
def our_fgm(data):
    ours = fastreg.FGM(own_copy(data), include="emb.")
    return there_and_back(ours.attack, ours.restore)


class Article:
    def __init__(self, module):
        self.module = module

    def attack(self):
        self.backup = {}
        for name, param in self.module.named_parameters():
            self.backup[name] = param.data.clone()
            norm = torch.norm(param.grad)
            if norm != 0 and not torch.isnan(norm):
                param.data.add_(1.0 * param.grad / norm)

    def restore(self):
        for name, param in self.module.named_parameters():
            param.data = self.backup[name]


@fgm.peer("article's class")
def article_fgm(data):
    theirs = Article(own_copy(data))
    return there_and_back(theirs.attack, theirs.restore)


@fgm.peer("torch.compile", compiled=True)
def compiled_fgm(data):
    """With a break of the graph where the norm is looked at."""
    theirs = Article(own_copy(data))
    return there_and_back(torch.compile(theirs.attack), torch.compile(theirs.restore))
