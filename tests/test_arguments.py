"""What the objects say of themselves, and what is said of arguments of a wrong kind, throughout the package."""

import pytest
import torch
from torch import nn

import fastreg

MODEL = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda: fastreg.MaxNorm(MODEL, 1.0), "MaxNorm(1 tensor, p=2.0, dim=0)"),
        (lambda: fastreg.UnitNorm([MODEL.weight, torch.ones(2, 2)]), "UnitNorm(2 tensors, p=2.0, dim=0)"),
        (lambda: fastreg.Penalty(MODEL, l2=0.1), "Penalty(1 tensor, l1=0.0, l2=0.1)"),
        (lambda: fastreg.FGM(MODEL, include="bias"), "FGM(1 tensor, epsilon=1.0)"),
        (
            lambda: fastreg.WeightAverager(MODEL, {"swa": fastreg.SWA()}),
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
        (lambda: fastreg.Penalty(MODEL, l1=[0.1]), "l1 must be a number, got list"),
        (lambda: fastreg.group_norm(torch.ones(2, 4), 2, eps="small"), "eps must be a number, got str"),
        (lambda: fastreg.EMA("0.9"), "decay must be a number, got str"),
    ],
)
def test_wrong_kinds_of_argument_are_named(call, expected):
    with pytest.raises(TypeError, match=expected):
        call()
