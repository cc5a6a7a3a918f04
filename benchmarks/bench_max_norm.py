"""Max-norm projection, half of the rows over the cap: each element is read once, half of them are written; of one
weight, and of all those of a ResNet-50 in one call, which others take one by one. The same of the l1 ball, whose
projection others find by sorting."""

import math
from types import SimpleNamespace

import torch

import fastreg

from .bench_penalties import resnet50_weights
from .timing import Bench, Run, nbytes

RESNET50 = [(shape[0], math.prod(shape[1:])) for shape in resnet50_weights() if len(shape) > 1]
CASES = {"1000x2048": [(1000, 2048)], "8142x2048": [(8142, 2048)], "50257x768": [(50257, 768)], "resnet50": RESNET50}


def weights_and_caps(shapes, dtype, device, p=2, share=1.0):
    fresh = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    return SimpleNamespace(fresh=fresh, caps=[share * float(w.float().norm(p, dim=1).median()) for w in fresh])


def projecting(data, project):
    """A projected weight has nothing left to project, so every call starts from the fresh ones, untimed."""
    weights = [weight.clone() for weight in data.fresh]

    def reset():
        torch._foreach_copy_(weights, data.fresh)

    return {"forward": Run(lambda: project(weights, data.caps), before=reset)}


def one_by_one(project):
    def projected(weights, caps):
        for weight, cap in zip(weights, caps):
            project(weight, cap)

    return projected


max_norm = Bench("max_norm", CASES, quick=("1000x2048",), registry="max_norm_", compare=False)
max_norm.inputs(weights_and_caps)
max_norm.bytes(lambda data: {"forward": 3 * nbytes(*data.fresh) // 2})


@max_norm.ours
def ours(data):
    return projecting(data, fastreg.max_norm_)


def by_masks(weight, cap):
    """The projection of the article's MaxNorm_via_PGD for one layer: masks, gathers and scatters."""
    norms = torch.linalg.norm(weight, ord=2, dim=1).unsqueeze(-1)
    scaling = torch.ones_like(weight)
    over = (norms > cap).squeeze()
    factor = (cap / norms[over].squeeze()).unsqueeze(-1)
    scaling[over] = torch.mul(scaling[over], factor)
    weight[over] = scaling[over] * weight[over]


def by_renorm(weight, cap):
    weight.copy_(torch.renorm(weight, 2, 0, cap))


def without_masks(weight, cap):
    norms = torch.linalg.vector_norm(weight, 2, 1, keepdim=True)
    weight.copy_(torch.where(norms > cap, weight * (cap / norms), weight))


@max_norm.peer("article")
def article(data):
    return projecting(data, one_by_one(by_masks))


@max_norm.peer("torch.renorm")
def renorm(data):
    return projecting(data, one_by_one(lambda weight, cap: torch.renorm(weight, 2, 0, cap)))


@max_norm.peer("torch.renorm_")
def renorm_in_place(data):
    return projecting(data, one_by_one(lambda weight, cap: weight.renorm_(2, 0, cap)))


@max_norm.peer("torch eager, no masks")
def eager(data):
    return projecting(data, one_by_one(without_masks))


@max_norm.peer("torch.compile", compiled=True)
def compiled(data):
    return projecting(data, torch.compile(one_by_one(without_masks)))


@max_norm.peer("torch.compile of renorm", compiled=True)
def compiled_renorm(data):
    return projecting(data, torch.compile(one_by_one(by_renorm)))


@max_norm.peer("torch.compile of the article", compiled=True)
def compiled_article(data):
    """With a break of the graph at each mask."""
    return projecting(data, torch.compile(one_by_one(by_masks)))


l1_ball = Bench("l1_ball", {"1000x2048": CASES["1000x2048"]}, registry="project_lp_ball_", compare=False)
l1_ball.inputs(lambda shapes, dtype, device: weights_and_caps(shapes, dtype, device, 1, 0.5))
l1_ball.bytes(lambda data: {"forward": 2 * nbytes(*data.fresh)})


@l1_ball.ours
def our_ball(data):
    return projecting(data, lambda weights, radii: fastreg.project_lp_ball_(weights, radii, 1))


def by_sorting(weight, radius):
    """Duchi et al. 2008, figure 1, for all rows at once."""
    size = weight.abs()
    ordered = size.sort(1, descending=True).values
    sums = ordered.cumsum(1) - radius
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    kept = (ordered * counts > sums).sum(1, keepdim=True)
    theta = (sums.gather(1, kept - 1) / kept).clamp(min=0)
    return weight.copy_(weight.sign() * (size - theta).clamp(min=0))


@l1_ball.peer("by sorting")
def sorting(data):
    return projecting(data, one_by_one(by_sorting))


@l1_ball.peer("torch.compile", compiled=True)
def compiled_sorting(data):
    return projecting(data, torch.compile(one_by_one(by_sorting)))
