"""The articles' classes: their own calling code, beside the old behaviour restated where it is right."""

import math

import pytest
import torch
from torch import nn

from fastreg import compat

# ---- max-norm, penalties, perturbation, stochastic depth -------------------------------------------------


def old_thresholds(params, thresh, order):
    out = []
    for w in params:
        if w.dim() <= 1:
            out.append(math.inf)
            continue
        norms = torch.linalg.norm(w.reshape(w.shape[0], -1), ord=order, dim=1)
        out.append(norms.min() + thresh * (norms.max() - norms.min()))
    return out


def old_projection(params, thresholds, order):
    """The article's projection for tau = 1 (with tau it divides by norm^tau^2)."""
    out = []
    for w, threshold in zip(params, thresholds):
        rows = w.reshape(w.shape[0], -1)
        norms = torch.linalg.norm(rows, ord=order, dim=1, keepdim=True)
        out.append(torch.where(norms > threshold, rows * (threshold / norms), rows).reshape(w.shape))
    return out


class Encoder(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.body = nn.Linear(7, 8)
        self.fc = nn.Linear(8, classes)


class LongTailNet(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = Encoder(classes)


@pytest.mark.parametrize("order", [1, 2, math.inf])
@pytest.mark.parametrize("thresh", [0.1, 0.7])
def test_max_norm_as_the_article_calls_it(order, thresh):
    model = LongTailNet()
    old = [model.encoder.fc.weight.detach().clone(), model.encoder.fc.bias.detach().clone()]
    body = model.encoder.body.weight.detach().clone()
    pgd = compat.MaxNorm_via_PGD(thresh=thresh, LpNorm=order)
    pgd.setPerLayerThresh(model)
    thresholds = old_thresholds(old, thresh, order)
    torch.testing.assert_close(pgd.perLayerThresh[0].float(), thresholds[0])
    assert pgd.perLayerThresh[1] == math.inf
    for _ in range(3):
        with torch.no_grad():
            for old_w, w in zip(old, (model.encoder.fc.weight, model.encoder.fc.bias)):
                old_w.mul_(1.3), w.mul_(1.3)
        old = old_projection(old, thresholds, order)
        assert pgd.PGD(model).item() > 0
        torch.testing.assert_close(model.encoder.fc.weight.detach(), old[0])
        torch.testing.assert_close(model.encoder.fc.bias.detach(), old[1])
    assert torch.equal(model.encoder.body.weight, body)


def test_max_norm_sets_thresholds_by_itself():
    model = LongTailNet()
    pgd = compat.MaxNorm_via_PGD(0.5)
    assert pgd.perLayerThresh == [] and (pgd.thresh, pgd.LpNorm, pgd.tau) == (0.5, 2, 1)
    pgd.PGD(model)
    assert len(pgd.perLayerThresh) == 2


def test_max_norm_on_one_output_unit():
    """The article's boolean index is squeezed to no dimension there, and it stops with a shape mismatch."""
    model = LongTailNet(classes=1)
    pgd = compat.MaxNorm_via_PGD(thresh=0.5)
    pgd.setPerLayerThresh(model)
    before = model.encoder.fc.weight.detach().clone()
    assert pgd.PGD(model).item() == 0 and torch.equal(model.encoder.fc.weight, before)
    with torch.no_grad():
        model.encoder.fc.weight.mul_(4)
    assert pgd.PGD(model).item() == 1
    torch.testing.assert_close(model.encoder.fc.weight.detach(), before)


def test_max_norm_survives_a_nan_row():
    model = LongTailNet()
    with torch.no_grad():
        model.encoder.fc.weight[2, 3] = math.nan
    pgd = compat.MaxNorm_via_PGD(thresh=0.2)
    assert pgd.PGD(model).item() >= 3


def test_max_norm_applies_tau_once():
    model = LongTailNet()
    pgd = compat.MaxNorm_via_PGD(tau=2)
    pgd.perLayerThresh = [torch.tensor(0.01), math.inf]
    before = model.encoder.fc.weight.detach().clone()
    pgd.PGD(model)
    want = before * (0.01 / before.norm(dim=1, keepdim=True) ** 2)
    torch.testing.assert_close(model.encoder.fc.weight.detach(), want)


@pytest.mark.parametrize("tau", [0.5, 2])
def test_max_norm_s_thresholds_are_of_what_they_are_compared_with(tau):
    model = LongTailNet()
    before = model.encoder.fc.weight.detach().clone()
    assert compat.MaxNorm_via_PGD(thresh=1.0, tau=tau).PGD(model).item() == 0
    assert torch.equal(model.encoder.fc.weight, before)
    pgd = compat.MaxNorm_via_PGD(thresh=0.3, tau=tau)
    pgd.setPerLayerThresh(model)
    powers = before.double().norm(dim=1) ** tau
    torch.testing.assert_close(pgd.perLayerThresh[0], torch.lerp(powers.min(), powers.max(), 0.3))


def test_max_norm_finds_the_last_linear_layers_of_any_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
    pgd = compat.MaxNorm_via_PGD(thresh=0.5)
    pgd.setPerLayerThresh(model)
    assert len(pgd.perLayerThresh) == 3
    first = model[0].weight.detach().clone()
    assert pgd.PGD(model).item() >= 2 and torch.equal(model[0].weight, first)

    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    pgd.setPerLayerThresh(nested)
    assert len(pgd.perLayerThresh) == 2
    named = compat.MaxNorm_via_PGD(thresh=0.5, layers=["0.0"])
    named.PGD(nested)
    assert len(named.perLayerThresh) == 2
    with pytest.raises(ValueError, match="name the layers"):
        pgd.setPerLayerThresh(nn.Conv2d(1, 1, 1))


def article_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_regularization_as_the_article_calls_it(p, capsys):
    model = article_net()
    reg = compat.Regularization(model, 0.01, p=p).to("cpu")
    assert "0.weight" in capsys.readouterr().out
    assert [name for name, _ in reg.get_weight(model)] == ["0.weight", "1.weight", "4.weight"]
    old = 0.01 * sum(torch.norm(w, p=p) for name, w in model.named_parameters() if "weight" in name)
    loss = model(torch.randn(2, 3, 3, 3)).sum() * 0
    loss = loss + reg(model)
    torch.testing.assert_close(loss, old)
    grads = torch.autograd.grad(old, [w for _, w in reg.weight_list])
    loss.backward()
    for (_, w), grad in zip(reg.weight_list, grads):
        torch.testing.assert_close(w.grad, grad)
    assert model[0].bias.grad.eq(0).all()


@pytest.mark.parametrize("weight_decay", [0, -0.1, math.nan])
def test_regularization_refuses_a_weight_decay_of_zero_or_less(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be above 0"):
        compat.Regularization(article_net(), weight_decay)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: compat.MaxNorm_via_PGD().PGD([1]), "model must be a torch.nn.Module, got list"),
        (lambda: compat.MaxNorm_via_PGD(layers=["fc"]).PGD(article_net()), "which are no modules of the model"),
        (lambda: compat.Regularization(3, 0.1), "model must be a torch.nn.Module, got int"),
        (lambda: compat.Regularization(article_net(), "0.1"), "weight_decay must be a number, got str"),
        (lambda: compat.FGM(3), "model must be a torch.nn.Module, got int"),
        (lambda: compat.EMA(3, 0.9), "model must be a torch.nn.Module, got int"),
        (lambda: compat.FGM(TextNet()).attack(1.0, 3), "emb_name must be a string, got int"),
        (lambda: compat.drop_connect(3, 0.5, True), "inputs must be a tensor, got int"),
    ],
)
def test_wrong_arguments_are_named(call, expected):
    with pytest.raises((TypeError, ValueError), match=expected):
        call()


class TextNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(10, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, ids):
        return self.out(self.emb(ids).mean(1)).tanh()


def test_fgm_as_the_article_calls_it():
    ids = torch.tensor([[1, 2], [3, 4]])
    model, old_model = TextNet(), TextNet()
    fgm = compat.FGM(model)
    model(ids).sum().backward()
    start = model.emb.weight.detach().clone()
    fgm.attack()
    model(ids).sum().backward()
    fgm.restore()
    assert torch.equal(model.emb.weight, start)

    old_model(ids).sum().backward()
    grad = old_model.emb.weight.grad
    with torch.no_grad():
        old_model.emb.weight.add_(grad / torch.norm(grad))
    old_model(ids).sum().backward()
    for ours, theirs in zip(model.parameters(), old_model.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_fgm_on_another_name_and_length():
    model = TextNet()
    model(torch.tensor([[1, 2]])).sum().backward()
    before = model.out.weight.detach().clone()
    fgm = compat.FGM(model)
    fgm.attack(epsilon=0.5, emb_name="out.weight")
    torch.testing.assert_close((model.out.weight - before).norm(), torch.tensor(0.5))
    fgm.restore(emb_name="out.weight")
    assert torch.equal(model.out.weight, before)


def old_drop_connect(inputs, p, training):
    if not training:
        return inputs
    keep = 1 - p
    mask = torch.floor(keep + torch.rand([inputs.shape[0], 1, 1, 1], dtype=inputs.dtype))
    return inputs / keep * mask


@pytest.mark.parametrize("p", [0.0, 0.2, 0.9])
def test_drop_connect_as_the_article_calls_it(p):
    x = torch.randn(64, 3, 4, 4)
    torch.manual_seed(5)
    old = old_drop_connect(x, p, True)
    torch.manual_seed(5)
    torch.testing.assert_close(compat.drop_connect(x, p, True), old)
    assert compat.drop_connect(x, p, False) is x


def test_drop_connect_of_everything_and_of_any_rank():
    x = torch.randn(4, 3, requires_grad=True)
    out = compat.drop_connect(x, 1.0, training=True)
    assert out.eq(0).all()
    out.sum().backward()
    assert x.grad.eq(0).all()
    with pytest.raises(ValueError, match="p must be between 0 and 1"):
        compat.drop_connect(x, 1.5, True)
