"""What the objects say of themselves, and what is said of arguments of a wrong kind, throughout the package."""

import inspect
import typing

import numpy as np
import pytest
import torch
from torch import nn

import fastreg
from fastreg import compat, longtail, losses

MODEL = nn.Linear(4, 3)
X, Y = torch.ones(2, 3), torch.tensor([0, 2])


def averager() -> fastreg.WeightAverager:
    return fastreg.WeightAverager(MODEL, {"swa": fastreg.SWA()})


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: fastreg.MaxNorm(MODEL, 1.0), "MaxNorm(1 tensor, p=2.0, dim=0)"),
        (lambda: fastreg.UnitNorm([MODEL.weight, torch.ones(2, 2)]), "UnitNorm(2 tensors, p=2.0, dim=0)"),
        (lambda: fastreg.Penalty(MODEL, l2=0.1), "Penalty(1 tensor, l1=0.0, l2=0.1)"),
        (lambda: fastreg.FGM(MODEL, include="bias"), "FGM(1 tensor, epsilon=1.0)"),
        (
            averager,
            "WeightAverager(2 tensors, {'swa': SWA()})",
        ),
    ],
    ids=["MaxNorm", "UnitNorm", "Penalty", "FGM", "WeightAverager"],
)
def test_objects_say_what_they_hold(made, expected):
    assert repr(made()) == expected


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: fastreg.AveragedModel(3), "model must be a torch.nn.Module, got int"),
        (lambda: fastreg.WeightAverager([MODEL], {"swa": fastreg.SWA()}), "model must be a torch.nn.Module, got list"),
        (lambda: fastreg.focal_loss(torch.ones(2, 3), torch.ones(2).long(), gamma="2"), "gamma must be a number"),
        (lambda: fastreg.drop_path(torch.ones(2, 3), None), "p must be a number, got NoneType"),
        (lambda: fastreg.MaxNorm(MODEL, 1.0, tau="1"), "tau must be a number, got str"),
        (lambda: fastreg.UnitNorm([Y]), r"params_or_module\[0\] must have a dtype among"),
        (lambda: fastreg.MaxNorm(MODEL, 1.0).load_state_dict([1.0]), "state must be a mapping, got list"),
        (lambda: fastreg.max_norm_(X, 1.0, dim=True), "dim must be an integer, got bool"),
        (lambda: fastreg.max_norm_(X, 1.0, tau=True), "tau must be a number, got bool"),
        (lambda: compat.MaxNorm_via_PGD(layers="fc").PGD(MODEL), "layers must be a list of names, got 'fc'"),
        (lambda: fastreg.Penalty(MODEL, l1=[0.1]), "l1 must be a number, got list"),
        (lambda: fastreg.group_norm(torch.ones(2, 4), 2, eps="small"), "eps must be a number, got str"),
        (lambda: fastreg.EMA("0.9"), "decay must be a number, got str"),
        (lambda: fastreg.EMA(warmup_gamma="1"), "warmup_gamma must be a number, got str"),
        (lambda: fastreg.PowerEMA("wide"), "std must be a number, got str"),
        (lambda: fastreg.average_([X], [X], None), "weight must be a number, got NoneType"),
        (lambda: fastreg.average_(3, [X], 0.5), "averages must be a sequence of tensors, got int"),
        (lambda: fastreg.AveragedModel(MODEL).update_parameters(None), "model must be a torch.nn.Module, got NoneType"),
        (lambda: averager().copy_to(None, "swa"), "model must be a torch.nn.Module, got NoneType"),
        (lambda: fastreg.cross_entropy(X, Y, ignore_index=None), "ignore_index must be an integer, got NoneType"),
        (lambda: fastreg.cross_entropy(X, Y, gamma=torch.ones(3)), r"gamma must be a number, got a tensor of .*\(3,\)"),
        (lambda: fastreg.sigmoid_focal_loss(X, Y, alpha=None), "alpha must be a number, got NoneType"),
        (lambda: fastreg.group_norm(X, 1.0), "num_groups must be an integer, got float"),
        (
            lambda: fastreg.drop_path(X, 0.5, "batch"),
            "training must be True or False, got 'batch'",
        ),  # torchvision's order
        (lambda: fastreg.flood(X.sum(), None), "b must be a number, got NoneType"),
        (lambda: fastreg.MaxNorm(MODEL, 1.0).attach(MODEL), "optimizer must be a torch.optim.Optimizer, got Linear"),
        (lambda: fastreg.Penalty(MODEL, include=None), "include must be strings or a function, got NoneType"),
        (lambda: fastreg.FGM(MODEL, "1", include="weight"), "epsilon must be a number, got str"),
        (lambda: fastreg.lp_penalty_backward_(X, weight="1"), "weight must be a number, got str"),
        (lambda: compat.MaxNorm_via_PGD("high"), "thresh must be a number, got str"),
        (lambda: compat.Regularization(MODEL, None), "weight_decay must be a number, got NoneType"),
        (lambda: compat.drop_connect(X, "p", True), "p must be a number, got str"),
        (lambda: longtail.log_prior({0: 3}), "counts must be a sequence or tensor of numbers, got dict"),
        (lambda: longtail.log_prior([1], tau=None), "tau must be a number, got NoneType"),
        (lambda: longtail.long_tailed_counts(500, 10.5, 100), "num_classes must be an integer, got float"),
        (lambda: longtail.ClassStatistics(2.5), "num_classes must be an integer, got float"),
        (lambda: longtail.long_tailed_counts(10.5, 3, 10), "n_max must be an integer, got float"),
        (lambda: fastreg.AveragedModel(MODEL, update_every=True), "update_every must be an integer, got bool"),
        (lambda: fastreg.AveragedModel(MODEL, rounding_seed="1"), "rounding_seed must be an integer, got str"),
        (
            lambda: fastreg.WeightAverager(MODEL, {"swa": fastreg.SWA()}, rounding_seed=1.5),
            "rounding_seed must be an integer, got float",
        ),
        (lambda: fastreg.linear_cross_entropy(X, X, Y, chunk_size=True), "chunk_size must be an integer, got bool"),
        (
            lambda: fastreg.linear_cross_entropy(X, X, Y, options={"gamma": 2.0}),
            "options must be a torch.nn.LinearCrossEntropyOptions, got dict",
        ),
    ],
)
def test_wrong_kinds_of_argument_are_named(call, expected):
    with pytest.raises(TypeError, match=expected):
        call()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: fastreg.nn.DropPath(0.1, "column"), "mode must be one of 'row', 'batch', got 'column'"),
        (lambda: fastreg.FGM(MODEL, float("inf"), include="weight"), "epsilon must be finite, got inf"),
        (lambda: averager().load_state_dict({}), "state_dict must be that of a WeightAverager: it misses"),
        (lambda: fastreg.MaxNorm(MODEL, 1.0).load_state_dict({}), "state must be that of a MaxNorm: it misses"),
        (lambda: compat.MaxNorm_via_PGD(LpNorm=0), "LpNorm must be above 0, got 0"),
        (lambda: fastreg.MaxNorm(MODEL, 1.0, dim=3), r"dim must be .* for params_or_module\[0\] of shape \(3, 4\)"),
        (lambda: fastreg.UnitNorm(MODEL).load_state_dict({}), "state must be that of a UnitNorm: it misses"),
        (lambda: fastreg.max_norm(X, 1.0, dim=5), r"dim must be between -2 and 1 for input of shape \(2, 3\)"),
        (lambda: fastreg.max_norm_(X, 1.0, p=True), "p must be a number above 0, or inf, got True"),
        (lambda: fastreg.project_lp_ball_(X, 1.0, True), "p must be 1, 2 or inf, got True"),
        (lambda: fastreg.nn.DropPath(1.5), "drop_prob must be between 0 and 1, got 1.5"),
        (lambda: fastreg.linear_drop_rates(-1, 0.1), "depth must be at least 0, got -1"),
        (lambda: fastreg.flood(X, float("nan")), "b must be finite, got nan"),
        (lambda: compat.drop_connect(torch.tensor(1.0), 0.1, True), "inputs must have a dimension of samples"),
        (lambda: compat.Regularization(MODEL, 0.1, p=0), "p must be at least 1, got 0"),
        (lambda: fastreg.max_norm_(X, 1.0, tau=float("inf")), "tau must be finite and at least 0, got inf"),
    ],
)
def test_wrong_values_are_named(call, expected):
    with pytest.raises((ValueError, IndexError), match=expected):
        call()


def test_numbers_of_numpy_are_numbers():
    x = torch.randn(4, 6)
    assert torch.equal(fastreg.group_norm(x, np.int64(2)), fastreg.group_norm(x, 2))
    assert torch.equal(fastreg.max_norm(x, np.float32(0.5)), fastreg.max_norm(x, 0.5))
    assert torch.equal(fastreg.lp_penalty(x, np.int64(2)), fastreg.lp_penalty(x, 2))
    fastreg.AveragedModel(MODEL, update_every=np.int64(2), rounding_seed=np.int64(3)).update_parameters(MODEL)


@pytest.mark.parametrize("function", [fastreg.cross_entropy, fastreg.focal_loss, fastreg.linear_cross_entropy])
def test_type_checkers_see_every_option(function):
    """The overloads, which tell the loss from `LossOutputs`, name the options of cross_entropy, with its types."""
    wanted = {name: p.annotation for name, p in inspect.signature(fastreg.cross_entropy).parameters.items()}
    for overload, answer in zip(typing.get_overloads(function), (losses.LossOutputs, torch.Tensor), strict=True):
        signature = inspect.signature(overload)
        assert signature.return_annotation is answer
        named = {name: p.annotation for name, p in signature.parameters.items() if name != "loss_options"}
        assert signature.parameters["loss_options"].annotation == typing.Unpack[losses.LossOptions]
        told = named | typing.get_type_hints(losses.LossOptions)
        assert {name: told[name] for name in wanted if name != "outputs"} == {
            name: annotation for name, annotation in wanted.items() if name != "outputs"
        }


@pytest.mark.parametrize("function", [fastreg.focal_loss, fastreg.linear_cross_entropy])
def test_signatures_name_every_option(function):
    """What `help` and editors show: the options of cross_entropy with its defaults, and no others."""
    wanted, told = (inspect.signature(f).parameters for f in (fastreg.cross_entropy, function))
    own = {"gamma"} if function is fastreg.focal_loss else {"ignore_index"}
    for name, parameter in wanted.items():
        assert told[name].annotation == parameter.annotation or name in own
        assert told[name].default == parameter.default or name in own
    linear = {"linear_weight", "linear_bias", "chunk_size", "options"}
    assert told.keys() - wanted.keys() == (linear if function is fastreg.linear_cross_entropy else set())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cross_entropy", lambda options: fastreg.cross_entropy(X, Y, **options)),
        ("focal_loss", lambda options: fastreg.focal_loss(X, Y, **options)),
        ("linear_cross_entropy", lambda options: fastreg.linear_cross_entropy(X, X, Y % 2, chunk_size=1, **options)),
        ("FocalLoss", lambda options: fastreg.nn.FocalLoss(**options)),
        ("LogitAdjustedLoss", lambda options: fastreg.nn.LogitAdjustedLoss([1, 2], **options)),
        ("BalancedSoftmaxLoss", lambda options: fastreg.nn.BalancedSoftmaxLoss([1, 2], **options)),
        ("LDAMLoss", lambda options: fastreg.nn.LDAMLoss([1, 2], **options)),
        ("ClassBalancedLoss", lambda options: fastreg.nn.ClassBalancedLoss([1, 2], **options)),
    ],
)
def test_misspelt_options_name_themselves_and_what_was_called(name, call):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'label_smoothin'"):
        call({"label_smoothin": 0.1})
    call({"label_smoothing": 0.1})


@pytest.mark.parametrize("option", ["label_smoothing", "gamma", "scale", "z_loss", "ignore_index"])
def test_true_and_false_are_no_numbers_where_a_gradient_is_wanted_either(option):
    """Whatever way the call takes: small losses without options have one of their own."""
    for value in (False, True):
        with pytest.raises(TypeError, match=f"{option} must be .*, got bool"):
            fastreg.cross_entropy(X.clone().requires_grad_(), Y, **{option: value})
