"""Max-norm projection, half of the rows over the cap: each element is read once, half of them are written. The same of
the l1 ball, whose projection others find by sorting."""

from types import SimpleNamespace

import torch

import fastreg

from .timing import Bench, Run, nbytes

CASES = {"1000x2048": (1000, 2048), "8142x2048": (8142, 2048), "50257x768": (50257, 768)}


def weights_and_cap(shape, dtype, device):
    fresh = torch.randn(shape, device=device).to(dtype)
    return SimpleNamespace(fresh=fresh, cap=float(fresh.float().norm(dim=1).median()))


def weights_and_radius(shape, dtype, device):
    fresh = torch.randn(shape, device=device).to(dtype)
    return SimpleNamespace(fresh=fresh, cap=float(fresh.float().norm(p=1, dim=1).median()) / 2)


def projecting(data, project):
    """A projected weight has nothing left to project, so every call starts from the fresh one, untimed."""
    weight = data.fresh.clone()
    return {"forward": Run(lambda: project(weight, data.cap), before=lambda: weight.copy_(data.fresh))}


max_norm = Bench("max_norm", CASES, quick=("1000x2048",), registry="max_norm_", compare=False)
max_norm.inputs(weights_and_cap)
max_norm.bytes(lambda data: {"forward": 3 * nbytes(data.fresh) // 2})


@max_norm.ours
def ours(data):
    return projecting(data, fastreg.max_norm_)


@max_norm.peer("article")
def article(data):
    """The projection of the article's MaxNorm_via_PGD for one layer: masks, gathers and scatters."""

    def project(weight, cap):
        norms = torch.linalg.norm(weight, ord=2, dim=1).unsqueeze(-1)
        scaling = torch.ones_like(weight)
        over = (norms > cap).squeeze()
        factor = (cap / norms[over].squeeze()).unsqueeze(-1)
        scaling[over] = torch.mul(scaling[over], factor)
        weight[over] = scaling[over] * weight[over]

    return projecting(data, project)


@max_norm.peer("torch.renorm")
def renorm(data):
    return projecting(data, lambda weight, cap: torch.renorm(weight, 2, 0, cap))


@max_norm.peer("torch.renorm_")
def renorm_in_place(data):
    return projecting(data, lambda weight, cap: weight.renorm_(2, 0, cap))


def masked(weight, cap):
    norms = torch.linalg.vector_norm(weight, 2, 1, keepdim=True)
    weight.copy_(torch.where(norms > cap, weight * (cap / norms), weight))


@max_norm.peer("torch eager, no masks")
def eager(data):
    return projecting(data, masked)


@max_norm.peer("torch.compile", compiled=True)
def compiled(data):
    return projecting(data, torch.compile(masked))


l1_ball = Bench("l1_ball", {"1000x2048": CASES["1000x2048"]}, registry="project_lp_ball_", compare=False)
l1_ball.inputs(weights_and_radius)
l1_ball.bytes(lambda data: {"forward": 2 * nbytes(data.fresh)})


@l1_ball.ours
def our_ball(data):
    return projecting(data, lambda weight, radius: fastreg.project_lp_ball_(weight, radius, 1))


def by_sorting(weight, radius):
    """Duchi et al. 2008, figure 1, for all rows at once."""
    size = weight.abs()
    ordered = size.sort(1, descending=True).values
    sums = ordered.cumsum(1) - radius
    counts = torch.arange(1, weight.shape[1] + 1, device=weight.device)
    kept = (ordered * counts > sums).sum(1, keepdim=True)
    theta = (sums.gather(1, kept - 1) / kept).clamp(min=0)
    weight.copy_(weight.sign() * (size - theta).clamp(min=0))


@l1_ball.peer("by sorting")
def sorting(data):
    return projecting(data, by_sorting)


@l1_ball.peer("torch.compile", compiled=True)
def compiled_sorting(data):
    return projecting(data, torch.compile(by_sorting))
