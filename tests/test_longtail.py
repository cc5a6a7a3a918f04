"""Class weights, priors, margins and splits, and the modules that are made from counts."""

import copy
import pickle
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastreg
from fastreg import longtail
from fastreg.longtail import effective_number_weights, ldam_margins, log_prior, long_tailed_counts, split_accuracy

COUNTS = [500, 120, 20, 1, 0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999, 1 - 1e-9, 1.0])
def test_effective_number_weights(beta):
    getcontext().prec = 60
    counts = [*COUNTS, 10**9]
    weights = effective_number_weights(counts, beta)
    n = [Decimal(max(c, 1)) for c in counts]
    b = Decimal(beta)
    raw = [1 / c if beta == 1 else (1 - b) / (1 - b**c) for c in n]
    exact = torch.tensor([float(w * len(n) / sum(raw)) for w in raw], dtype=torch.float64)
    torch.testing.assert_close(weights.double(), exact, rtol=2**-23, atol=0)
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-6)
    assert weights[4] == weights[3]  # no sample counts as one


def test_log_prior():
    prior = log_prior(COUNTS, tau=2.0)
    n = torch.tensor([500, 120, 20, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(prior.double(), 2 * (n / n.sum()).log(), rtol=2**-23, atol=0)
    assert torch.equal(log_prior(COUNTS, tau=0), torch.zeros(5))
    assert log_prior([0, 0]).isfinite().all()


def test_ldam_margins():
    margins = ldam_margins(COUNTS, max_margin=0.4)
    assert margins.max().item() == pytest.approx(0.4)
    assert margins[0].item() == pytest.approx(0.4 * 500**-0.25)
    assert margins[3] == margins[4]


def test_long_tailed_counts():
    assert long_tailed_counts(500, 100, 100)[[0, 99]].tolist() == [500, 5]
    published = [int(500 * 0.01 ** (c / 9.0)) for c in range(10)]  # the loop everybody copies
    assert long_tailed_counts(500, 10, 100).tolist() == published
    assert long_tailed_counts(7, 1, 10).tolist() == [7]
    assert long_tailed_counts(10, 4, 1).tolist() == [10] * 4
    assert long_tailed_counts(10, 5, 1e6).min() == 1
    for factor in (7, 10, 50, 200):
        assert long_tailed_counts(5 * factor, 10, factor)[-1] == 5  # not 4, through a rounded power


def test_split_accuracy():
    counts = [1000, 101, 100, 20, 19, 0]
    target = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5, -100])
    pred = torch.tensor([0, 1, 1, 2, 3, 0, 4, 0, 0])
    got = split_accuracy(pred, target, counts)
    assert {k: v.item() for k, v in got.items()} == {
        "all": 5 / 8,
        "many": pytest.approx((0.5 + 1) / 2),  # classes 0, 1
        "medium": pytest.approx((1 + 0.5) / 2),  # classes 2, 3
        "few": pytest.approx((1 + 0) / 2),  # classes 4, 5
    }
    scores = F.one_hot(pred, 6).float()
    assert split_accuracy(scores, target, counts) == got
    assert split_accuracy(pred, target, [1000] * 6)["few"] == 0  # no such class: 0, not NaN
    assert all(v == 0 for v in split_accuracy(pred[:0], target[:0], counts).values())


@pytest.mark.parametrize("counts", [torch.tensor(COUNTS), torch.tensor(COUNTS).float(), tuple(COUNTS)])
def test_counts_come_in_any_form(counts):
    assert torch.equal(log_prior(counts), log_prior(COUNTS))


def test_counts_may_be_a_reversed_array():
    """As np.sort(counts)[::-1] makes it, with a stride below 0."""
    assert torch.equal(log_prior(np.array(COUNTS)[::-1]), log_prior(COUNTS[::-1]))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "negative", lambda: log_prior([1, -1])),
        (ValueError, "whole numbers, got 1.5", lambda: log_prior([1, 1.5])),
        (TypeError, "whole", lambda: log_prior([True, False])),
        (ValueError, "one number per class", lambda: log_prior([])),
        (ValueError, "one number per class", lambda: log_prior([[1]])),
        (ValueError, "tau", lambda: log_prior([1], tau=float("inf"))),
        (ValueError, "beta", lambda: effective_number_weights([1], beta=1.1)),
        (ValueError, "max_margin", lambda: ldam_margins([1], max_margin=-1)),
        (ValueError, "imbalance", lambda: long_tailed_counts(500, 10, 0.01)),
        (ValueError, "n_max", lambda: long_tailed_counts(0, 10, 1)),
        (ValueError, "pred", lambda: split_accuracy(torch.zeros(3), torch.zeros(2), [1, 2])),
        (ValueError, "few", lambda: split_accuracy(torch.zeros(2), torch.zeros(2), [1], many=10, few=20)),
    ],
)
def test_bad_arguments(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_is_an_attribute_of_the_package():
    assert fastreg.longtail is longtail


# ---- modules -----------------------------------------------------------------------------------------------

COUNTED = [500, 100, 20, 3, 0]
X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, -100])
MODULES = {
    "cross-entropy": (lambda: fastreg.nn.CrossEntropyLoss(torch.arange(1.0, 6), label_smoothing=0.1), {}),
    "focal": (lambda: fastreg.nn.FocalLoss(1.5, alpha=torch.rand(5)), {}),
    "balanced softmax": (
        lambda: fastreg.nn.BalancedSoftmaxLoss(COUNTED),
        lambda: {"logit_adjustment": log_prior(COUNTED)},
    ),
    "logit adjusted": (
        lambda: fastreg.nn.LogitAdjustedLoss(COUNTED, tau=0.5, reduction="sum"),
        lambda: {"logit_adjustment": log_prior(COUNTED, 0.5), "reduction": "sum"},
    ),
    "LDAM": (
        lambda: fastreg.nn.LDAMLoss(COUNTED, max_margin=0.3, scale=10),
        lambda: {"margin": ldam_margins(COUNTED, 0.3), "scale": 10},
    ),
    "class-balanced": (
        lambda: fastreg.nn.ClassBalancedLoss(COUNTED, beta=0.99, gamma=0.5),
        lambda: {"weight": effective_number_weights(COUNTED, 0.99), "gamma": 0.5},
    ),
}


@pytest.mark.parametrize("make", [make for make, _ in MODULES.values()], ids=MODULES)
def test_modules_survive_copies_checkpoints_and_moves(make):
    module = make()
    loss = module(X, Y)
    assert loss.isfinite()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(X, Y), loss)
        assert repr(twin) == repr(module)
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(X, Y), loss)
    moved = make().to("meta").to_empty(device="cpu")
    moved.load_state_dict(module.state_dict())
    assert torch.equal(moved(X, Y), loss)


@pytest.mark.parametrize("name", [name for name, (_, options) in MODULES.items() if options])
def test_modules_from_counts_equal_the_function(name):
    make, options = MODULES[name]
    module = make()
    x = X.clone().requires_grad_()
    expected = fastreg.cross_entropy(x, Y, **options())
    assert torch.equal(module(x, Y), expected)
    assert list(module.state_dict()) == ["counts"]
    assert module.counts.dtype == torch.int64
    assert torch.equal(copy.deepcopy(module).half()(x, Y), expected)  # what follows from the counts stays exact
    other = type(module)([1, 2, 3, 4, 5])
    counts = other.counts.clone()
    twin = type(module)(counts)
    for loss in (other, twin):
        loss.load_state_dict(module.state_dict())
    assert counts.tolist() == [1, 2, 3, 4, 5]  # who gave them keeps them
    if name == "balanced softmax":  # the others have a parameter besides, which is no part of the state
        assert torch.equal(other.logit_adjustment, module.logit_adjustment)


def test_modules_equal_torch():
    weight = torch.rand(5)
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1, "ignore_index": 3}):
        ours, theirs = fastreg.nn.CrossEntropyLoss(weight, **options), torch.nn.CrossEntropyLoss(weight, **options)
        torch.testing.assert_close(ours(X, Y.clamp(0)), theirs(X, Y.clamp(0)))
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (lambda: fastreg.nn.CrossEntropyLoss(), "CrossEntropyLoss()"),
        (lambda: fastreg.nn.CrossEntropyLoss(torch.ones(3)), "CrossEntropyLoss(weight=(3,))"),
        (lambda: fastreg.nn.FocalLoss(gamma=1.0, alpha=0.25), "FocalLoss(alpha=0.25, gamma=1.0)"),
        (
            lambda: fastreg.nn.LDAMLoss([3, 1], reduction="sum"),
            "LDAMLoss(reduction='sum', scale=30, max_margin=0.5, margin=(2,), counts=(2,))",
        ),
        (lambda: fastreg.nn.SigmoidFocalLoss(), "SigmoidFocalLoss(alpha=0.25, gamma=2.0, reduction='none')"),
    ],
)
def test_reprs(module, text):
    assert repr(module()) == text


def test_deferred_reweighting():
    loss = fastreg.nn.LDAMLoss(COUNTED)
    loss.weight = effective_number_weights(COUNTED)
    expected = fastreg.cross_entropy(X, Y, loss.weight, margin=loss.margin, scale=30)
    assert torch.equal(loss(X, Y), expected)
    balanced = fastreg.nn.ClassBalancedLoss(COUNTED)
    balanced.weight = None  # put off
    assert torch.equal(copy.deepcopy(balanced).to(X.device, torch.float64)(X, Y), fastreg.cross_entropy(X, Y))


def test_what_the_vector_follows_from_takes_it_along():
    for make, name, value in (
        (fastreg.nn.LogitAdjustedLoss, "tau", 2.0),
        (fastreg.nn.LDAMLoss, "max_margin", 0.2),
        (fastreg.nn.ClassBalancedLoss, "beta", 0.5),
        (fastreg.nn.BalancedSoftmaxLoss, "counts", [5, 4, 3, 2, 1]),
        (fastreg.nn.LDAMLoss, "counts", torch.tensor([5, 4, 3, 2, 1])),
    ):
        changed = make(COUNTED)
        before = changed(X, Y)
        setattr(changed, name, value)
        fresh = make(**{"counts": COUNTED, name: value})
        assert torch.equal(changed(X, Y), fresh(X, Y)) and not torch.equal(changed(X, Y), before)
        assert repr(changed) == repr(fresh) and torch.equal(changed.counts, fresh.counts)
        changed.load_state_dict(fresh.state_dict(), assign=True)
        assert torch.equal(changed(X, Y), fresh(X, Y))


def test_what_is_assigned_and_wrong_changes_nothing():
    loss = fastreg.nn.LogitAdjustedLoss(COUNTED)
    before = loss(X, Y)
    with pytest.raises(ValueError, match="tau must be finite"):
        loss.tau = float("nan")
    with pytest.raises(ValueError, match="counts must not be negative"):
        loss.counts = [-1]
    assert loss.tau == 1.0 and loss.counts.tolist() == COUNTED and torch.equal(loss(X, Y), before)


@pytest.mark.parametrize("make", [make for make, _ in MODULES.values()], ids=MODULES)
def test_modules_tell_what_one_call_is_asked_for(make):
    module, seen = make(), longtail.ClassStatistics(5)
    x = X.clone().requires_grad_()
    found = module(x, Y, outputs=True, statistics=seen, grad_in_forward=True)
    assert torch.equal(found.loss, module(x, Y)) and seen.count.tolist() == [1] * 5
    assert torch.equal(found.argmax, torch.where(Y < 0, -1, X.argmax(1))) and torch.equal(
        found.correct, found.argmax == Y.clamp(0)
    )
    (grad,) = torch.autograd.grad(found.loss, x)
    assert (grad[5] == 0).all() and grad[:5].any()
    mixed = module(x, (Y, Y.flip(0), 0.5))  # a target of two classes is one, as to the function
    assert mixed.isfinite()


def test_modules_refuse_bad_options_when_made():
    with pytest.raises(ValueError, match="gamma"):
        fastreg.nn.FocalLoss(-1.0)
    with pytest.raises(ValueError, match="reduction"):
        fastreg.nn.BalancedSoftmaxLoss([1, 2], reduction="avg")
    with pytest.raises(TypeError, match="logit_adjustment follows from the counts"):
        fastreg.nn.BalancedSoftmaxLoss([1, 2], logit_adjustment=torch.zeros(2))
    with pytest.raises(TypeError, match="unknown"):
        fastreg.nn.BalancedSoftmaxLoss([1, 2], unknown=1)
    with pytest.raises(ValueError, match="alpha"):
        fastreg.nn.SigmoidFocalLoss(alpha=2.0)
