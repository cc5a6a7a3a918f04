"""Weight averaging against fp64, against torch, and in the corners where others go wrong."""

import contextlib
import copy
import importlib.util
import io
import math
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import (
    EMA,
    SWA,
    AveragedModel,
    PowerEMA,
    TanhEMA,
    WeightAverager,
    _backends,
    _native,
    _plan,
    average_,
    averaging,
)
from tests.machine import backends


@pytest.fixture(params=[pytest.param(p.values, id=p.id, marks=p.marks) for p in backends("averaging")])
def device(request):
    """Everything inside is served by one backend, on tensors of its device."""
    backend, device = request.param
    with fastreg.use_backend(backend), torch.device(device):
        yield device


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONV_DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def model(dtype=torch.float32, seed=0):
    """Parameters, tied parameters, float and integer buffers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 4), nn.Linear(4, 4))
    return net.to(dtype)


def train_step(net, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu"))
        for b in net.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand(b.shape, generator=generator, dtype=torch.float64, device="cpu"))
            else:
                b += 1


def tensors(net):
    return {name: t.detach().clone() for name, t in (*net.named_parameters(), *net.named_buffers())}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")  # noqa: B023


# ---- rules -----------------------------------------------------------------------------------------------
def std_of(gamma):
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


# rule, decay in update n (written from the papers, apart from the code)
RULES = {
    "ema": (EMA(0.97), lambda n: 0.97),
    "linear": (EMA(0.97, warmup="linear"), lambda n: min(0.97, (1 + n) / (10 + n))),
    "power": (EMA(0.99, warmup="power"), lambda n: min(0.99, 1 - (1 + n) ** (-2 / 3))),
    "power2": (
        EMA(0.999, warmup="power", warmup_gamma=5.0, warmup_power=0.75),
        lambda n: min(0.999, 1 - (1 + n / 5) ** -0.75),
    ),
    "swa": (SWA(), lambda n: n / (n + 1)),
    "tanh": (TanhEMA(0.95), lambda n: 0.95 * math.tanh(n)),
    "powerfunction": (PowerEMA(std_of(6.94)), lambda n: (1 - 1 / (n + 1)) ** 7.94),
    "keep": (EMA(1.0), lambda n: 1.0),
    "follow": (EMA(0.0), lambda n: 0.0),
}


@pytest.mark.parametrize("name", RULES)
def test_weight_of_each_rule(name):
    rule, decay = RULES[name]
    for n in (1, 2, 3, 10, 1000, 2**24 + 1, 2**40):
        weight = rule.weight(torch.tensor(float(n), dtype=torch.float64)).item()
        # 1 − decay loses digits in the oracle, never more than an ulp of 1
        assert weight == pytest.approx(1 - decay(n), rel=1e-9, abs=4e-16 * 10)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", RULES)
@CONV_DTYPES
def test_a_thousand_updates_equal_fp64(name, dtype, device):
    """fp64 average beside: the error stays under that of one rounding per update, damped by the decay."""
    rule, decay = RULES[name]
    interpreted = _backends.forced() == "triton" and _backends.interpreting()
    updates = 30 if interpreted else 1000
    generator = torch.Generator("cpu").manual_seed(1)
    net = nn.Linear(7, 3).to(dtype)
    averager = WeightAverager(net, {name: rule}, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    exact = None
    for n in range(updates):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, device="cpu"))
        averager.update()
        now = torch.cat([p.detach().double().flatten() for p in net.parameters()])
        d = decay(n)
        exact = now if n == 0 else d * exact + (1 - d) * now
    ours = torch.cat([t.double().flatten() for t in averager.state_dict()["averages"][name].values()])
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Each update rounds by eps/2 of values of at most 5; the errors of past updates decay as the average does.
    window = min(updates, 1 / max(1 - decay(updates), 1e-3))
    torch.testing.assert_close(ours, exact, rtol=0, atol=5 * eps * (1 + window**0.5))
    assert averager.n_averaged.item() == updates


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMA(1.5), "decay must be between 0 and 1, got 1.5"),
        (lambda: EMA(-0.1), "decay"),
        (lambda: EMA(float("nan")), "decay"),
        (lambda: EMA(0.9, warmup="cosine"), "warmup must be one of"),
        (lambda: EMA(0.9, warmup="power", warmup_gamma=0.0), "warmup_gamma must be above 0"),
        (lambda: TanhEMA(2.0), "alpha"),
        (lambda: PowerEMA(0.0), "std must be above 0"),
        (lambda: PowerEMA(0.3), "std must be above 0"),
    ],
)
def test_rules_refuse_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_of_ones_own_must_say_its_weight(device):
    class Silent(averaging.Rule):
        pass

    class Half(averaging.Rule):
        def weight(self, n):
            return torch.full_like(n, 0.5)

    with pytest.raises(TypeError, match="abstract"):
        Silent()
    net = nn.Linear(2, 2)
    if _backends.forced() != "reference":  # a rule that the kernels do not know
        with pytest.raises(RuntimeError, match="no kernel for the rule"):
            AveragedModel(net, Half()).update_parameters(net)
        return
    averaged, known = AveragedModel(net, Half()), AveragedModel(net, EMA(0.5))
    for step in range(3):
        train_step(net, step)
        averaged.update_parameters(net)
        known.update_parameters(net)
    assert_same(tensors(averaged), tensors(known))


def test_power_rule_at_its_bound_is_the_equal_mean():
    n = torch.tensor(9.0, dtype=torch.float64)
    assert PowerEMA(12**-0.5).weight(n).item() == pytest.approx(1 / 10)


# ---- average_ --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("param_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 0.9, 0.999])
def test_average_equals_fp64_rounded_once(dtype, param_dtype, weight, device):
    torch.manual_seed(0)
    average, param = torch.randn(1003, dtype=dtype), torch.randn(1003).to(param_dtype)
    exact = average.double() + weight * (param.double() - average.double())
    average_([average], [param], weight)
    compute = torch.finfo(torch.float64 if torch.float64 in (dtype, param_dtype) else torch.float32).eps
    # Three roundings of intermediate values of at most 10 in the computing dtype, then one in the result's.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 3 * compute * 10
    assert ((average.double() - exact).abs() <= bound).all()


@CONV_DTYPES
@pytest.mark.parametrize("weight", [0.001, 0.4999, 0.5, 0.7, 1.0])
def test_bit_equal_to_torch_lerp(dtype, weight):
    torch.manual_seed(0)
    averages = [torch.randn(n, dtype=dtype) for n in (1, 17, 64, 1000)]
    params = [torch.randn(n, dtype=dtype) for n in (1, 17, 64, 1000)]
    expected = [a.clone() for a in averages]
    torch._foreach_lerp_(expected, params, weight)
    average_(averages, params, weight)
    for a, e in zip(averages, expected):
        assert torch.equal(a, e)


@CONV_DTYPES
@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_subnormal_numbers_are_averaged_as_torch_does(dtype, weight):
    """Amid others: instructions that round to bf16 take subnormal numbers for zeros."""
    smallest = torch.finfo(dtype).tiny
    averages, params = torch.randn(200).to(dtype), torch.randn(200).to(dtype)
    averages[33:150:5] = torch.linspace(-smallest, smallest, 24, dtype=torch.float64).to(dtype)
    params[33:150:5] = torch.linspace(smallest / 3, -smallest / 7, 24, dtype=torch.float64).to(dtype)
    expected = averages.clone()
    torch._foreach_lerp_([expected], [params], weight)
    average_([averages], [params], weight)
    assert torch.equal(averages, expected)
    assert (averages.abs() < smallest)[33:150:5].any() and averages[33:150:5].count_nonzero() > 20


@CONV_DTYPES
def test_weight_one_copies_and_weight_zero_keeps(dtype, device):
    inf, nan = float("inf"), float("nan")
    average = torch.tensor([1.0, nan, inf, -inf, 2.0, nan], dtype=dtype)
    param = torch.tensor([nan, 1.0, -inf, 3.0, inf, nan], dtype=dtype)
    for weight in (0.0, torch.tensor(0.0)):
        kept = average.clone()
        average_([kept], [param], weight)
        assert torch.equal(kept.view(torch.uint8), average.view(torch.uint8))
    for weight in (1.0, torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)):
        copied = average.clone()
        average_([copied], [param], weight)
        assert torch.equal(copied.view(torch.uint8), param.view(torch.uint8))


def test_tensor_weight_equals_float_weight(device):
    torch.manual_seed(0)
    average, param = torch.randn(100), torch.randn(100)
    by_float, by_tensor = average.clone(), average.clone()
    average_([by_float], [param], 0.25)
    average_([by_tensor], [param], torch.tensor(0.25))
    assert torch.equal(by_float, by_tensor)


@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7F81, 0x7FC0], ids=hex)
def test_nan_of_any_bits_stays_nan_in_bf16(bits, device):
    nan = torch.full((99,), bits, dtype=torch.int16).view(torch.bfloat16).to(device)
    one = torch.ones_like(nan)
    for average, param in ((nan, one), (one, nan), (nan, nan)):
        average_([out := average.clone()], [param], 0.25)
        assert out.isnan().all()
    weight = torch.tensor(bits, dtype=torch.int64).bitwise_or(0x7FFF << 48 | (1 << 48) - 1).view(torch.float64)
    average_([out := one.clone()], [one + 1], weight.to(device))
    assert out.isnan().all()


def test_integer_and_bool_tensors_are_copied(device):
    averages = [torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([1.0, 2.0])]
    average_(averages, [torch.tensor([7, 8]), torch.tensor([False, True]), torch.tensor([3.0, 4.0])], 0.5)
    assert [a.tolist() for a in averages] == [[7, 8], [False, True], [2.0, 3.0]]


def test_complex_tensors_average_by_component(device):
    average, param = torch.tensor([1 + 2j, 0j]), torch.tensor([3 - 2j, 8 + 8j])
    average_([average], [param], 0.25)
    assert average.tolist() == [1.5 + 1j, 2 + 2j]


def test_layouts_may_differ_between_average_and_parameter():
    torch.manual_seed(0)
    param = torch.randn(2, 3, 4, 5)
    makers = {
        "channels_last": lambda t: t.to(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "contiguous": lambda t: t.clone(),
    }
    start = torch.randn(param.shape)
    expected = torch.lerp(start, param, 0.25)
    for average_layout in makers.values():
        for param_layout in makers.values():
            average = average_layout(start)
            average_([average], [param_layout(param)], 0.25)
            assert torch.equal(average, expected)


def test_empty_and_zero_dim_tensors_anywhere_in_the_list(device):
    shapes = [(0,), (3,), (), (0, 5), (2, 2), (0,)]
    for order in (shapes, shapes[1:], shapes[:-1], [(0,)], []):
        averages, params = [torch.zeros(s) for s in order], [torch.ones(s) for s in order]
        average_(averages, params, 0.5)
        assert all((a == 0.5).all() for a in averages)


@pytest.mark.parametrize(
    "averages, params, weight, error, message",
    [
        ([torch.ones(2)], [], 0.5, ValueError, "one length, got 1 and 0"),
        (
            [torch.ones(2)],
            [torch.ones(3)],
            0.5,
            ValueError,
            r"averages\[1\] must have the shape of params\[1\], \(3,\)",
        ),
        ([torch.ones(2)], [torch.ones(2)], 1.5, ValueError, "weight must be between 0 and 1, got 1.5"),
        ([torch.ones(2)], [torch.ones(2)], float("nan"), ValueError, "weight"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(2), ValueError, "0-d floating-point tensor"),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor(1), ValueError, "0-d floating-point tensor"),
        ([torch.ones(2)], [torch.ones(2, dtype=torch.int64)], 0.5, TypeError, "only one of them is floating point"),
        ([torch.ones(2)], ["w"], 0.5, TypeError, r"params\[1\] must be a tensor, got str"),
        ([torch.ones(1).expand(4)], [torch.ones(4)], 0.5, ValueError, "must not overlap itself"),
        ([torch.ones(2).to_sparse()], [torch.ones(2)], 0.5, TypeError, "dense tensor with data"),
        ([torch.ones(2, device="meta")], [torch.ones(2)], 0.5, TypeError, "dense tensor with data"),
        ([torch.ones(2).to(torch.float8_e4m3fn)], [torch.ones(2)], 0.5, TypeError, "float8_e4m3fn"),
    ],
)
def test_average_refuses_before_writing(averages, params, weight, error, message):
    witness = torch.zeros(3)
    with pytest.raises(error, match=message):
        average_([witness, *averages], [torch.ones(3), *params], weight) if params else average_(
            averages, params, weight
        )
    assert (witness == 0).all()


@pytest.mark.filterwarnings("ignore")  # quantised tensors are deprecated
def test_quantised_tensors_are_refused():
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for averages, params in (([quantised], [torch.ones(2)]), ([torch.ones(2)], [quantised])):
        with pytest.raises(TypeError, match="dense tensor with data"):
            average_(averages, params, 0.5)


def test_averages_that_share_memory_are_refused():
    base = torch.zeros(10)
    with pytest.raises(ValueError, match="share memory"):
        average_([base, base], [torch.ones(10)] * 2, 0.5)
    with pytest.raises(ValueError, match="share memory"):
        average_([base[:6], base[5:]], [torch.ones(6), torch.ones(5)], 0.5)
    average_([base[:5], base[5:]], [torch.ones(5), torch.ones(5)], 0.5)
    columns = torch.zeros(4, 2)
    average_([columns[:, 0], columns[:, 1]], [torch.ones(4), torch.ones(4)], 0.5)
    assert (base == 0.5).all() and (columns == 0.5).all()


# ---- AveragedModel ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_equals_torchs(use_buffers):
    """Bit for bit with torch's default (SWA) and its EMA, but for integer buffers, which torch averages."""
    for rule, multi_avg_fn in ((None, None), (EMA(0.9), swa_utils.get_ema_multi_avg_fn(0.9))):
        net = model()
        if use_buffers:  # torch cannot average integer buffers at all under SWA
            net[1].num_batches_tracked = None
        ours = AveragedModel(net, rule, use_buffers=use_buffers)
        theirs = swa_utils.AveragedModel(net, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
        for step in range(6):
            train_step(net, step)
            ours.update_parameters(net)
            theirs.update_parameters(net)
            if rule is None and multi_avg_fn is None and step > 0:
                # torch's default on the CPU is avg + (p − avg)/(n + 1): up to two more roundings than the lerp
                for a, b in zip(ours.parameters(), theirs.parameters()):
                    torch.testing.assert_close(a, b, rtol=0, atol=6e-7 * step)
            else:
                assert_same(tensors(ours.module), tensors(theirs.module))
        x = torch.randn(2, 3, 3, 3)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x))


def test_state_dict_goes_to_torch_and_back(device):
    net = model()
    ours, theirs = AveragedModel(net, EMA(0.9)), swa_utils.AveragedModel(net)
    for step in range(3):
        train_step(net, step)
        ours.update_parameters(net)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.n_averaged.dtype == theirs.n_averaged.dtype
    theirs.load_state_dict(ours.state_dict())
    assert_same(theirs.state_dict(), ours.state_dict())
    again = AveragedModel(model(seed=5), EMA(0.9))
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer))
    assert_same(again.state_dict(), ours.state_dict())
    train_step(net, 7)
    again.update_parameters(net)
    ours.update_parameters(net)
    assert_same(again.state_dict(), ours.state_dict())


def test_update_every_and_start_step(device):
    net = nn.Linear(2, 2)
    for every, start in ((1, 0), (3, 0), (1, 4), (3, 2)):
        averaged = AveragedModel(net, SWA(), update_every=every, start_step=start)
        taken = []
        for call in range(11):
            train_step(net, call)
            if call >= start and (call - start) % every == 0:
                taken.append(net.weight.detach().clone())
            averaged.update_parameters(net)
            assert averaged.n_averaged.item() == len(taken)
            if taken:
                torch.testing.assert_close(averaged.module.weight, torch.stack(taken).mean(0), rtol=1e-5, atol=1e-6)


def test_resuming_keeps_the_cadence():
    net = nn.Linear(2, 2)
    make = lambda: AveragedModel(net, EMA(0.5), update_every=3, start_step=1)  # noqa: E731
    whole, resumed = make(), make()
    for call in range(12):
        train_step(net, call)
        whole.update_parameters(net)
        resumed.update_parameters(net)
        state, resumed = copy.deepcopy(resumed.state_dict()), make()
        resumed.load_state_dict(state)
    assert_same(resumed.state_dict(), whole.state_dict())
    torchs = swa_utils.AveragedModel(net)
    for _ in range(2):
        torchs.update_parameters(net)
    resumed.load_state_dict(torchs.state_dict())
    assert (resumed.n_averaged.item(), resumed.calls.item()) == (2, 7)


def test_found_inf_skips_and_does_not_count(device):
    net = nn.Linear(2, 2)
    averaged = AveragedModel(net, EMA(0.5), update_every=2)
    train_step(net, 0)
    averaged.update_parameters(net, found_inf=torch.tensor([0.0]))
    before = tensors(averaged)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    for _ in range(3):
        averaged.update_parameters(net, found_inf=torch.tensor([1.0]))
    assert_same(tensors(averaged), before)
    assert averaged.calls.item() == 1
    with pytest.raises(ValueError, match="found_inf must hold one element"):
        averaged.update_parameters(net, found_inf=torch.zeros(2))


@CONV_DTYPES
def test_first_update_copies_whatever_the_average_holds(dtype, device):
    net = nn.Linear(3, 3).to(dtype)
    for rule in (EMA(0.999), SWA(), TanhEMA(), PowerEMA(0.05), EMA(0.9, warmup="linear"), EMA(1.0)):
        averaged = AveragedModel(net, rule)
        with torch.no_grad():
            averaged.module.weight.fill_(float("nan"))
            averaged.module.bias.fill_(float("inf"))
        averaged.update_parameters(net)
        assert torch.equal(averaged.module.weight, net.weight) and torch.equal(averaged.module.bias, net.bias)


def test_decay_one_keeps_the_average_beside_nan(device):
    net = nn.Linear(3, 3)
    averaged = AveragedModel(net, EMA(1.0))
    averaged.update_parameters(net)
    before = tensors(averaged.module)
    with torch.no_grad():
        net.weight.fill_(float("nan"))
    averaged.update_parameters(net)
    assert_same(tensors(averaged.module), before)


def test_integer_buffers_are_copied(device):
    net = model()
    averaged = AveragedModel(net, EMA(0.9), use_buffers=True)
    for step in range(10):
        train_step(net, step)
        averaged.update_parameters(net)
    assert averaged.module[1].num_batches_tracked.item() == net[1].num_batches_tracked.item() == 10
    assert not torch.equal(averaged.module[1].running_mean, net[1].running_mean)


def test_dtypes_may_be_mixed_in_one_model(device):
    net = nn.ModuleList([nn.Linear(9, 2).to(dtype) for dtype in FLOATS])
    for dtype in (None, torch.float32, torch.float64):
        averager = WeightAverager(net, {"ema": EMA(0.75), "swa": SWA()}, dtype=dtype)
        exact = {}
        for n in range(4):
            train_step(net, n)
            averager.update()
            for name, weight in (("ema", 0.25), ("swa", 1 / (n + 1))):
                now = [p.detach().double() for p in net.parameters()]
                exact[name] = [torch.lerp(e, p, weight if n else 1.0) for e, p in zip(exact.get(name, now), now)]
        for name, tensors_ in averager.state_dict()["averages"].items():
            for ours, p, e in zip(tensors_.values(), net.parameters(), exact[name]):
                assert ours.dtype == (dtype or p.dtype)
                eps = max(torch.finfo(ours.dtype).eps, torch.finfo(torch.float32).eps)
                bound = 4 * eps * 5  # a rounding of values of at most 5 per update
                torch.testing.assert_close(ours.double(), e, rtol=0, atol=bound)


def test_expanded_parameters_get_averages_of_their_own():
    net = nn.Module()
    net.weight = nn.Parameter(torch.zeros(1).expand(4))
    averaged, averager = AveragedModel(net, EMA(0.5)), WeightAverager(net, {"a": EMA(0.5)})
    for value in (0.0, 1.0):
        net.weight = nn.Parameter(torch.full((1,), value).expand(4))
        averaged.update_parameters(net)
        averager.update()
    assert averaged.module.weight.tolist() == averager.state_dict()["averages"]["a"]["weight"].tolist() == [0.5] * 4


def test_counts_beyond_fp32_still_move_an_equal_mean(device):
    """1/(n + 1) at n = 2^24 + 1, where a count in fp32 would stand still; n beyond 2^53 does not occur."""
    net = nn.Linear(2, 2).double()
    averager = WeightAverager(net, {"swa": SWA(), "power": PowerEMA(0.1), "tanh": TanhEMA(0.5)})
    averager.update()
    n = 2**24 + 1
    averager.load_state_dict(averager.state_dict() | {"n_averaged": torch.tensor(n), "calls": torch.tensor(n)})
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    averager.update()
    for name, weight in (("swa", 1 / (n + 1)), ("power", 1 - (1 - 1 / (n + 1)) ** (PowerEMA(0.1).gamma + 1))):
        moved = averager.state_dict()["averages"][name]["weight"] - before
        torch.testing.assert_close(moved, torch.full_like(moved, weight), rtol=1e-7, atol=0)
    assert averager.n_averaged.item() == n + 1


def test_the_first_call_of_a_kernel_is_applied_once(device):
    """A kernel that is tuned by trial at its first call would update in place more than once. Seven averages: no other
    test compiles for that many."""
    net = nn.Linear(3, 2)
    averager = WeightAverager(net, {str(i): EMA(0.5) for i in range(7)})
    averager._clock.n_averaged += 1  # past the copy
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    averager.update()
    for named in averager.state_dict()["averages"].values():
        torch.testing.assert_close(named["weight"], before + 0.5)
    averages, params = [torch.zeros(2, dtype=torch.float16)], [torch.ones(2, dtype=torch.float64)]
    average_(averages, params, 0.25)
    assert averages[0].tolist() == [0.25, 0.25]


def test_one_launch_repeated_as_it_is_copies_first_and_then_follows_the_rule(monkeypatch):
    """What a CUDA graph replays: the very same arguments, while the count on the device moves the decay on."""
    if fastreg.backends()["averaging"]["cpu"] != "usable":
        pytest.skip("there are no C++ kernels")
    net = nn.Linear(3, 2)
    rules = {name: rule for name, (rule, _) in RULES.items()}
    averager = WeightAverager(net, rules, update_every=2, start_step=1)
    calls, kernel = [], averaging._update_op["cpu"]
    monkeypatch.setattr(averaging, "_update_op", {"cpu": lambda *args: calls.append(args)})
    averager.update()
    exact, n = None, 0
    for step in range(12):
        train_step(net, step)
        kernel(*calls[0])
        if step % 2:
            now = net.weight.detach().double()
            exact = {
                name: now if n == 0 else decay(n) * exact[name] + (1 - decay(n)) * now
                for name, (_, decay) in RULES.items()
            }
            n += 1
    assert averager.n_averaged == n == 6
    for name, e in exact.items():
        torch.testing.assert_close(averager._averages[name]["weight"].double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["AveragedModel", "WeightAverager"])
def test_parameters_of_one_shape_are_matched_by_name(kind, device):
    net, other = nn.Module(), nn.Module()
    for module, order in ((net, "abc"), (other, "cab")):
        for name in order:
            setattr(module, name, nn.Parameter(torch.full((2,), float(ord(name)))))
    if kind == "AveragedModel":
        average = AveragedModel(net, EMA(0.5))
        average.update_parameters(net)
        average.update_parameters(other)
        target = average.module
    else:
        average, target = WeightAverager(net, {"x": EMA(0.5)}), other
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        average.update()
        average.copy_to(other, "x")
    assert {name: p[0].item() for name, p in target.named_parameters()} == {name: ord(name) for name in "abc"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_averaged_once(device):
    net = Tied()
    averaged = AveragedModel(net, EMA(0.9))
    averager = WeightAverager(net, {"ema": EMA(0.9)})
    for value in (0.0, 1.0):
        with torch.no_grad():
            net.embed.weight.fill_(value)
        averaged.update_parameters(net)
        averager.update()
    torch.testing.assert_close(averaged.module.head.weight, torch.full((5, 4), 0.1))
    assert averaged.module.head.weight is averaged.module.embed.weight
    torch.testing.assert_close(averager.state_dict()["averages"]["ema"]["head.weight"], torch.full((5, 4), 0.1))


def test_parameters_tied_by_storage_alone_are_averaged_once(device):
    net = Tied()
    net.head.weight = nn.Parameter(net.embed.weight.detach())
    assert net.head.weight is not net.embed.weight
    averager = WeightAverager(net, {"ema": EMA(0.9)})
    for value in (0.0, 1.0):
        with torch.no_grad():
            net.embed.weight.fill_(value)
        averager.update()
    torch.testing.assert_close(averager.state_dict()["averages"]["ema"]["head.weight"], torch.full((5, 4), 0.1))
    net.head.weight = nn.Parameter(torch.ones(5, 4))
    with pytest.raises(ValueError, match="no longer shares"):
        averager.update()


@pytest.mark.parametrize("kind", ["AveragedModel", "WeightAverager"])
def test_changed_models_are_refused_before_writing(kind, device):
    def add(net):
        net.extra = nn.Parameter(torch.ones(2))

    def add_module(net):
        net.add_module("extra", nn.Linear(1, 1))

    def remove(net):
        del net[4].bias

    def resize(net):
        net[4].bias = nn.Parameter(torch.ones(9))

    def resize_data(net):
        net[4].bias.data = torch.ones(9)

    def add_buffer(net):
        net.register_buffer("extra", torch.ones(2))

    def remove_buffer(net):
        net[1].register_buffer("running_mean", None)

    def resize_buffer(net):
        net[1].running_mean = torch.ones(9)

    for change in (add, add_module, remove, resize, resize_data, add_buffer, remove_buffer, resize_buffer):
        net = model()
        average = AveragedModel(net, EMA(0.5)) if kind == "AveragedModel" else WeightAverager(net, {"x": EMA(0.5)})
        update = (lambda: average.update_parameters(net)) if kind == "AveragedModel" else average.update  # noqa: B023
        held = (lambda: tensors(average.module)) if kind == "AveragedModel" else (lambda: average._averages["x"])  # noqa: B023
        update()
        before = {name: t.clone() for name, t in held().items()}
        train_step(net, 1)
        change(net)
        with pytest.raises(ValueError, match=r"extra|4\.bias|1\.running_mean"):
            update()
        if kind == "WeightAverager":
            with pytest.raises(ValueError, match=r"extra|4\.bias|1\.running_mean"):
                average.state_dict()
        assert_same(held(), before)


@pytest.mark.parametrize("kind", ["AveragedModel", "WeightAverager"])
def test_replaced_and_moved_parameters_are_noticed(kind, device):
    net = nn.Linear(2, 2, bias=False)
    average = AveragedModel(net, EMA(0.5)) if kind == "AveragedModel" else WeightAverager(net, {"x": EMA(0.5)})
    update = (lambda: average.update_parameters(net)) if kind == "AveragedModel" else average.update
    held = (lambda: average.module.weight) if kind == "AveragedModel" else (lambda: average._averages["x"]["weight"])
    with torch.no_grad():
        net.weight.fill_(0.0)
    update()
    old = net.weight
    net.weight.data = torch.full((2, 2), 1.0)
    update()
    assert (held() == 0.5).all()
    net.load_state_dict({"weight": torch.full((2, 2), 2.5)}, assign=True)
    update()
    assert (held() == 1.5).all()
    net.weight = nn.Parameter(torch.full((2, 2), 3.5))
    update()
    assert (held() == 2.5).all()
    net.to(torch.float64)
    update()
    assert (held() == 3.0).all() and (old == 1.0).all()
    if kind == "AveragedModel":
        shadow = average.module.weight
        average.module.weight.data = torch.full((2, 2), 5.5, dtype=torch.float64)
        update()
        assert (held() == 4.5).all() and held() is shadow
        average.to(torch.float32)
        update()
        assert (held() == 4.0).all() and held().dtype == torch.float32


class Subclass(torch.Tensor):
    pass


CHANGES = {
    "moved": lambda t: t.clone(),
    "smaller": lambda t: t[:2],
    "reshaped": lambda t: t.reshape(6, 4),
    "transposed": lambda t: t.t(),
    "of another dtype": lambda t: t.view(torch.float64 if t.is_complex() else torch.int32),
    "conjugated": lambda t: t.conj() if t.is_complex() else t[1:],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6),
        lambda: nn.Parameter(torch.randn(4, 6), requires_grad=False),
        lambda: torch.randn(4, 6, dtype=torch.complex64),
        lambda: torch.randn(4, 6).as_subclass(Subclass),
    ],
    ids=["tensor", "parameter", "complex", "subclass"],
)
def test_a_plan_notices_every_change_of_a_tensor(make, change):
    tensors = [torch.zeros(3), make(), nn.Parameter(torch.zeros(0))]
    rows = _plan.describe(tensors)
    assert not _plan.unchanged(tensors[:2], rows)
    tensors[1].mul_(2)
    assert _plan.unchanged(tensors, rows)
    before = tensors[1].data
    tensors[1].data = change(before)
    assert not _plan.unchanged(tensors, rows)
    tensors[1].data = before
    assert _plan.unchanged(tensors, rows)
    assert not _plan.unchanged([tensors[0], before.clone(), tensors[2]], rows)


def test_the_native_reader_knows_this_torchs_tensors():
    if _native.missing["cpu"] is not None:
        pytest.skip("the C++ extension is not there")
    assert _plan._native is not None
    lookalike = torch.zeros(1)
    assert not _plan._native.recognise(lookalike, lookalike._cdata + 1, nn.Parameter(lookalike), lookalike._cdata)


def test_an_average_can_be_moved_by_swapping_its_tensors():
    net = nn.Linear(2, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        averaged = AveragedModel(net, EMA(0.5))
        averaged.update_parameters(net)
        averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))
        averaged.to(torch.float64)
        averaged.module.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train_step(net, 1)
    averaged.update_parameters(net)
    assert averaged.n_averaged.item() == 2 and not torch.equal(averaged.module.weight, net.weight)


def test_names_are_matched_without_the_wrappers():
    net = model()
    compiled = torch.compile(net, backend="eager")
    parallel = nn.DataParallel(net)
    for wrapped in (compiled, parallel, nn.DataParallel(compiled)):
        averaged, plain = AveragedModel(wrapped, EMA(0.5)), AveragedModel(net, EMA(0.5))
        assert averaged.state_dict().keys() == plain.state_dict().keys()
        for step in range(3):
            train_step(net, step)
            averaged.update_parameters(net if step % 2 else wrapped)
            plain.update_parameters(wrapped)
        assert_same(tensors(averaged), tensors(plain))
        torchs = swa_utils.AveragedModel(parallel)
        torchs.update_parameters(parallel)
        averaged.load_state_dict(torchs.state_dict())
        assert_same(tensors(averaged.module), tensors(net))


def test_a_model_whose_own_names_look_like_a_wrapper():
    net = nn.ModuleDict({"module": nn.Linear(2, 2)})
    net.weight, net.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    averager = WeightAverager(net, {"a": EMA(0.5)})
    averager.update()
    assert averager.state_dict()["averages"]["a"].keys() == {"module.weight", "module.bias", "weight", "bias"}
    averager.copy_to(nn.DataParallel(net), "a")
    average = AveragedModel(net, EMA(0.5))
    for wrapped in (net, nn.DataParallel(net), torch.compile(net, backend="eager")):
        average.update_parameters(wrapped)
    assert average.n_averaged.item() == 3
    state = _saved(average.state_dict())
    with torch.no_grad():
        net.weight.fill_(3.0)
    average.update_parameters(net)
    average.load_state_dict(state)
    assert_same(dict(average.state_dict()), dict(state))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_average_of_a_low_precision_model_does_not_stall(dtype, device):
    net = nn.Linear(4, 4, bias=False).to(dtype)
    averaged = AveragedModel(net, EMA(0.999), dtype=torch.float32)
    with torch.no_grad():
        net.weight.fill_(0.0)
    averaged.update_parameters(net)
    with torch.no_grad():
        net.weight.fill_(1.0)
    updates = 400 if _backends.forced() == "triton" and _backends.interpreting() else 2000
    for _ in range(updates):
        averaged.update_parameters(net)
    assert averaged.module.weight.dtype == torch.float32
    torch.testing.assert_close(averaged.module.weight, torch.full((4, 4), 1 - 0.999**updates), rtol=1e-4, atol=0)


@pytest.mark.parametrize("time", ["first", "second"])
def test_no_plan_of_an_earlier_test_is_left(time):
    """Its kernel would serve this test, were a tensor to stand where one of that test's stood."""
    assert not _plan._plans
    fastreg.max_norm_(torch.randn(4, 3), 1.0)
    assert _plan._plans


def test_another_thread_may_drop_a_plan_that_is_being_checked(monkeypatch):
    average, param, unchanged = [torch.zeros(2)], [torch.ones(2)], _plan.unchanged
    average_(average, param, 0.5)
    monkeypatch.setattr(_plan, "unchanged", lambda *args: _plan._plans.clear() or unchanged(*args))
    average_(average, param, 0.5)
    assert average[0].tolist() == [0.75, 0.75]


def test_models_that_cannot_be_averaged_are_refused():
    with pytest.raises(ValueError, match="not initialised yet"):
        WeightAverager(nn.LazyLinear(3), {"a": EMA()})
    net = nn.Linear(2, 2)
    net.weight = nn.Parameter(net.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="float8_e4m3fn"):
        AveragedModel(net)
    with pytest.raises(TypeError, match="dense tensor with data"):
        WeightAverager(nn.Linear(2, 2, device="meta"), {"a": EMA()})
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("edges", torch.eye(3).to_sparse())
    lazy = nn.LazyBatchNorm1d(affine=False)
    for make in (AveragedModel, lambda net: WeightAverager(net, {"a": EMA()})):
        with pytest.raises(TypeError, match="buffer 'edges' must be a dense tensor with data"):
            make(sparse)
        with pytest.raises(ValueError, match="buffer 'running_mean' is not initialised yet"):
            make(lazy)
    for kwargs, error in (
        ({"update_every": 0}, ValueError),
        ({"start_step": -1}, ValueError),
        ({"update_every": 1.5}, TypeError),
        ({"dtype": torch.int32}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(kwargs))):
            AveragedModel(nn.Linear(2, 2), EMA(), **kwargs)
    with pytest.raises(TypeError, match="rule must be a rule"):
        AveragedModel(nn.Linear(2, 2), 0.99)
    with pytest.raises(ValueError, match="rules must map"):
        WeightAverager(nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="buffers must be one of"):
        WeightAverager(nn.Linear(2, 2), {"a": EMA()}, buffers="skip")


def test_a_model_without_parameters_only_counts(device):
    averaged = AveragedModel(nn.ReLU())
    averaged.update_parameters(nn.ReLU())
    averaged.update_parameters(nn.ReLU())
    assert averaged.n_averaged.item() == 2


def test_works_with_update_bn_pickle_and_deepcopy():
    net = model()
    averaged = AveragedModel(net, EMA(0.9))
    averaged.update_parameters(net)
    data = [torch.randn(4, 3, 3, 3) for _ in range(3)]
    swa_utils.update_bn(data, averaged)
    assert averaged.module[1].num_batches_tracked.item() == 3
    for twin in (copy.deepcopy(averaged), _pickled(averaged)):
        train_step(net, 1)
        before = tensors(averaged)
        twin.update_parameters(net)
        assert twin.n_averaged.item() == 2
        assert_same(tensors(averaged), before)


def _pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_the_model_is_not_kept_alive():
    net = model()
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    references = weakref.ref(net), weakref.ref(net[0].weight)
    del net
    assert [reference() for reference in references] == [None, None]


def test_versions_are_bumped(device):
    net = model()
    averaged, averager = AveragedModel(net, EMA(0.9), use_buffers=True), WeightAverager(net, {"a": EMA(0.9)})
    for _ in range(2):
        shadow = averager.state_dict()["averages"]["a"]["0.weight"]
        versions = [shadow._version, *(t._version for t in (*averaged.parameters(), *averaged.buffers()))]
        averaged.update_parameters(net)
        averager.update()
        now = [shadow._version, *(t._version for t in (*averaged.parameters(), *averaged.buffers()))]
        assert all(after > before for before, after in list(zip(versions, now))[:-1])
    weight = net[0].weight
    before = weight._version
    with averager.swapped("a"):
        inside = weight._version
    assert before < inside < weight._version


def test_averages_under_no_grad_and_inference_mode(device):
    net = nn.Linear(2, 2)
    averaged = AveragedModel(net, EMA(0.5))
    assert torch.is_grad_enabled()
    averaged.update_parameters(net)
    with torch.inference_mode():
        averaged.update_parameters(net)
    assert averaged.module.weight.grad_fn is None and averaged.n_averaged.item() == 2


# ---- averages on the host of a model on a GPU, without the GPU ------------------------------------------------
class _HeldBack(averaging._Transfer):
    """Stands for the copy to pinned memory: it arrives when the test opens the gate, with what was taken aside."""

    started: list  # of all transfers

    def _open(self):
        self.gate = threading.Event()

    def start(self):
        average_(self._snapshots, self._tensors, 1.0)
        self._pinned.fill_(0xFF)  # what a reader would see who does not wait
        self.started.append(self)

    def finish(self):
        assert self.gate.wait(10), "nobody opened the gate"
        self._pinned.copy_(self._aside)


@pytest.fixture
def transfers(monkeypatch):
    monkeypatch.setattr(_HeldBack, "started", started := [], raising=False)
    monkeypatch.setattr(averaging, "_Transfer", _HeldBack)
    monkeypatch.setattr(averaging, "_crosses", lambda *_: True)
    monkeypatch.setattr(averaging, "_buffers", lambda _, n: [torch.empty(n, dtype=torch.uint8) for _ in range(2)])
    yield started
    for transfer in started:
        transfer.gate.set()


def _odd_model():
    net = model(torch.bfloat16)
    net[0].to(memory_format=torch.channels_last)
    net.scale, net.empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0, 3))
    net.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    net.every_other = nn.Parameter(torch.randn(3, 8)[:, ::2])
    return net


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_on_the_host_does_not_hold_up_the_training(transfers, use_buffers):
    """The next step changes the parameters while their copy is under way: what counts are the values of the update."""
    net = _odd_model()
    make = lambda: AveragedModel(net, EMA(0.5), dtype=torch.float32, use_buffers=use_buffers)  # noqa: E731
    background, plain = make(), make()
    for step in range(3):
        train_step(net, step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(averaging, "_crosses", lambda *_: False)
            plain.update_parameters(net)
        background.update_parameters(net)  # returns, though the gate is closed
        assert background._pending is not None and not background._pending.done()
        train_step(net, 100 + step)
        transfers[-1].gate.set()
        background.synchronize()
        transfers[-1].gate.clear()
        assert_same(tensors(background.module), tensors(plain.module))
    assert len(transfers) == 3 and len({id(transfer) for transfer in transfers}) == 1


READERS = {
    "n_averaged": lambda average: average.n_averaged,
    "forward": lambda average: average(torch.ones(1, 3)),
    "module": lambda average: average.module.weight.clone(),
    "state_dict": lambda average: average.state_dict()["module.weight"],
    "deepcopy": lambda average: copy.deepcopy(average).module.weight,
    "update": lambda average: average.update_parameters(nn.Linear(3, 2)),
    "to": lambda average: average.to(torch.float64),
    "load": lambda average: average.load_state_dict(average.state_dict()),
    "parameters": lambda average: list(average.parameters()),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_an_average_on_the_host_waits_for_it(transfers, reader):
    net = nn.Linear(3, 2)
    average = AveragedModel(net, EMA(0.5))
    average.update_parameters(net)
    pending = average._pending
    threading.Timer(0.05, transfers[0].gate.set).start()
    READERS[reader](average)
    assert pending.done()


def test_an_average_on_the_host_skips_what_is_not_due_and_what_overflowed(transfers):
    net = nn.Linear(3, 2)
    average = AveragedModel(net, EMA(0.5), update_every=2)
    for step, found_inf in enumerate((None, None, torch.tensor([1.0]), torch.tensor([0.0]))):
        train_step(net, step)
        average.update_parameters(net, found_inf=found_inf)
        if transfers:
            transfers[-1].gate.set()
    # the third call was due but overflowed, which the host cannot know; the fourth took its place
    assert len(transfers) == 3
    assert (average.n_averaged.item(), average.calls.item()) == (2, 3)


def test_errors_in_the_background_are_raised_at_the_next_use(transfers, monkeypatch):
    net = nn.Linear(3, 2)
    average = AveragedModel(net, EMA(0.5))
    average.update_parameters(net)
    monkeypatch.setattr(averaging._Link, "update", lambda *_: 1 / 0)
    transfers[0].gate.set()
    with pytest.raises(ZeroDivisionError):
        average(torch.ones(1, 3))


class _Stream:
    """Stands for a CUDA stream: what is queued runs when somebody waits for it, or at once if `eager`."""

    def __init__(self, eager=False):
        self.queue, self.queued, self.done, self.eager = [], 0, 0, eager

    def put(self, work):
        self.queue.append(work)
        self.queued += 1
        if self.eager:
            self.run_to(self.queued)

    def run_to(self, count):
        while self.done < count:
            self.done += 1
            self.queue.pop(0)()

    def wait_stream(self, other):
        until = other.queued
        self.put(lambda: other.run_to(until))


class _Event:
    def record(self):
        self.stream, self.until = _Event.current[-1], _Event.current[-1].queued

    def synchronize(self):
        self.stream.run_to(self.until)


class _OnDevice(torch.Tensor):
    def record_stream(self, stream):
        self.recorded = stream


class _Pinned(torch.Tensor):
    def copy_(self, source, non_blocking=False):
        assert non_blocking
        to, source = self.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor)
        _Event.current[-1].put(lambda: to.copy_(source))


class _Later:
    """Stands for the thread that updates, at the last moment: when its result is asked for."""

    def submit(self, work, *args):
        return type("Pending", (), {"result": lambda _: work(*args)})()


@pytest.mark.parametrize("eager", [False, True], ids=["side stream late", "side stream early"])
def test_a_transfer_orders_streams_so_that_each_update_sees_its_own_step(eager, monkeypatch):
    """The real transfer over streams that run as late, or as early, as they may."""
    main, side = _Stream(), _Stream(eager)
    _Event.current = [main]

    @contextlib.contextmanager
    def on(stream):
        _Event.current.append(stream)
        yield
        _Event.current.pop()

    def buffers(_, size):
        made = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        return made[0].as_subclass(_OnDevice), made[1].as_subclass(_Pinned)

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: side)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: _Event.current[-1])
    monkeypatch.setattr(averaging, "_buffers", buffers)
    monkeypatch.setattr(averaging, "_worker", _Later)
    net = model(torch.bfloat16)
    plain = AveragedModel(net, EMA(0.5), dtype=torch.float32)
    background = copy.deepcopy(plain)
    seen = []

    def train_to(step):
        train_step(net, step)
        net[1].num_batches_tracked.fill_(step)

    for step in range(4):
        train_to(step)
        plain.update_parameters(net)
        seen.append(tensors(plain.module))
    monkeypatch.setattr(averaging, "_crosses", lambda *_: True)
    on_device = averaging.average_  # a launch is queued
    monkeypatch.setattr(averaging, "average_", lambda *args: main.put(lambda: on_device(*args)))
    for step in range(4):
        main.put(lambda step=step: train_to(step))
        background.synchronize()
        done = main.done
        background.update_parameters(net)
        assert eager or main.done == done  # the host has not waited for the device
        main.put(lambda step=step: train_to(100 + step))  # what comes next must not reach the average
        if step == 2:
            background.synchronize()
            assert_same(tensors(background.module), seen[step])
    background.synchronize()
    assert_same(tensors(background.module), seen[-1])
    (transfer,) = background._links[net].staging._transfers
    assert transfer._aside.recorded is side


# ---- nothing is read back ----------------------------------------------------------------------------------
class _NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def test_no_value_of_a_device_is_read_back(monkeypatch):
    """What would make the host wait for a GPU: `.item()`, `bool()` and the like, anywhere on the way to a launch."""
    if fastreg.backends()["averaging"]["cpu"] != "usable":
        pytest.skip("there are no C++ kernels")
    for name in ("_update_op", "_lerp_op", "_swap_op"):
        monkeypatch.setattr(averaging, name, {"cpu": lambda *_: None})
    net = model()
    averager = WeightAverager(net, {"a": EMA(0.5, warmup="linear"), "b": SWA()}, update_every=2, start_step=1)
    averaged = AveragedModel(net, TanhEMA(), use_buffers=True, update_every=3)
    averages, params = [torch.zeros(5)], [torch.ones(5)]
    with pytest.raises(AssertionError), _NoReadBack():
        torch.ones(1).item()
    for found_inf in (None, torch.zeros(1)):
        with _NoReadBack():
            averager.update(found_inf=found_inf)
            averaged.update_parameters(net, found_inf=found_inf)
            average_(averages, params, torch.tensor(0.5))
            average_(averages, params, 0.5)
            with averager.swapped("a"):
                averager.state_dict()
            averager.copy_to(model(seed=2), "b")
            averaged.state_dict()


# ---- several devices, without them -----------------------------------------------------------------------
class _Elsewhere(torch.Tensor):
    """Stands for a tensor on a second device."""

    device = property(lambda self: torch.device("cpu:1"))


def _on_two_devices(count):
    return [torch.randn(5 + i).as_subclass(_Elsewhere if i % 2 else torch.Tensor) for i in range(count)]


@pytest.fixture
def launches(monkeypatch):
    """The tables that reach the kernels."""
    if fastreg.backends()["averaging"]["cpu"] != "usable":
        pytest.skip("there are no C++ kernels")
    seen = []
    for name in ("_update_op", "_lerp_op", "_swap_op"):
        kernel = getattr(averaging, name)["cpu"]
        spy = lambda *args, kernel=kernel: (seen.append(args), kernel(*args))  # noqa: E731
        monkeypatch.setattr(averaging, name, {"cpu": spy})
    return seen


def test_tensors_on_two_devices_take_a_launch_each(launches):
    averages, params = _on_two_devices(7), _on_two_devices(7)
    expected = [torch.lerp(a, p, 0.25) for a, p in zip(averages, params)]
    average_(averages, params, 0.25)
    assert [len(table) for table, *_ in launches] == [3, 4]  # the first tensor's device is the last
    assert all(torch.equal(a, e) for a, e in zip(averages, expected))
    averaging._swap_all(list(zip(averages, params)))
    assert len(launches) == 4 and all(torch.equal(p, e) for p, e in zip(params, expected))
    with pytest.raises(ValueError, match=r"averages\[0\] must be on the device of params\[0\], cpu:1, got cpu"):
        average_(averages[:1], params[1:2] and [torch.randn(5).as_subclass(_Elsewhere)], 0.5)


def test_a_model_on_two_devices_takes_a_launch_each_and_counts_once(launches):
    link = object.__new__(averaging._Link)
    link.sources, link.averages, link.copied = _on_two_devices(4), [_on_two_devices(4) for _ in range(2)], [False] * 4
    link._parts, link._rules, link._written = None, (), []
    clock = averaging._Clock(torch.tensor(0), torch.tensor(0), 1, 0)
    exact = [[t.double() for t in column] for column in link.averages]
    for n in range(3):
        link.update([EMA(0.5), SWA()], clock, None, None)
        for column, weight in zip(exact, (0.5 if n else 1.0, 1 / (n + 1))):
            column[:] = [torch.lerp(e, s.double(), weight) for e, s in zip(column, link.sources)]
        assert (clock.n_averaged, clock.calls) == (n + 1, n + 1)
        assert len(launches) == 2 * (n + 1)
        for source in link.sources:
            source.normal_()
    for column, e in zip(link.averages, exact):
        for ours, theirs in zip(column, e):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


# ---- WeightAverager --------------------------------------------------------------------------------------
def test_many_averages_equal_one_each():
    net = model()
    rules = {name: rule for name, (rule, _) in RULES.items()}
    for buffers in ("copy", "average"):
        together = WeightAverager(net, rules, buffers=buffers)
        apart = {name: AveragedModel(net, rule, use_buffers=buffers == "average") for name, rule in rules.items()}
        for step in range(5):
            train_step(net, step)
            together.update()
            for averaged in apart.values():
                averaged.update_parameters(net)
        state = together.state_dict()
        for name, averaged in apart.items():
            assert_same(state["averages"][name], tensors(averaged.module))
            target = model(seed=9)
            together.copy_to(target, name)
            assert_same(tensors(target), tensors(averaged.module))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("average_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@CONV_DTYPES
def test_swapped_restores_every_bit(dtype, average_dtype, device):
    net = model(dtype)
    averager = WeightAverager(net, {"a": EMA(0.5), "b": SWA()}, dtype=average_dtype)
    for step in range(3):
        train_step(net, step)
        averager.update()
    mine = tensors(net)
    averages = copy.deepcopy(averager.state_dict()["averages"])
    pointers = {name: p.data_ptr() for name, p in net.named_parameters()}
    for name in ("a", "b"):
        with averager.swapped(name) as inside:
            assert inside is net
            for key, value in tensors(net).items():
                assert torch.equal(value, averages[name][key].to(value.dtype))
            for other, named in averager.state_dict()["averages"].items():
                assert_same(named, averages[other])
        assert_same(tensors(net), mine)
        with pytest.raises(KeyError), averager.swapped(name):
            raise KeyError("inside")
        assert_same(tensors(net), mine)
    for name in ("a", "b"):
        assert_same(averager.state_dict()["averages"][name], averages[name])
    assert pointers == {name: p.data_ptr() for name, p in net.named_parameters()}


def test_a_model_that_changes_its_dtype_inside_swapped_gets_its_own_values_in_it(device):
    net = model()
    averager = WeightAverager(net, {"a": EMA(0.5)})
    for step in range(2):
        train_step(net, step)
        averager.update()
    mine, average = tensors(net), {name: t.clone() for name, t in averager.state_dict()["averages"]["a"].items()}
    with averager.swapped("a"):
        net.half()
    half = lambda held: {name: t.half() if t.is_floating_point() else t for name, t in held.items()}  # noqa: E731
    assert_same(tensors(net), half(mine))
    assert_same(half(averager.state_dict()["averages"]["a"]), half(average))


@pytest.mark.parametrize("average_dtype", [None, torch.float64], ids=str)
def test_a_model_whose_buffers_change_inside_swapped_gets_back_what_is_its_own(average_dtype):
    for change in (
        lambda net: net.register_buffer("mask", torch.ones(2)),
        lambda net: setattr(net, "cache", torch.zeros(5)),
        lambda net: setattr(net, "cache", None),
        lambda net: setattr(net[3], "bias", None),
        lambda net: setattr(
            net, "cache", torch.full((3,), 7.0)
        ),  # in its place: it is the average's, as with update_bn
    ):
        net = model()
        net.register_buffer("cache", torch.ones(3))
        averager = WeightAverager(net, {"a": EMA(0.5)}, dtype=average_dtype)
        for step in range(2):
            train_step(net, step)
            averager.update()
        mine, average = tensors(net), copy.deepcopy(averager.state_dict()["averages"]["a"])
        with averager.swapped("a"):
            change(net)
        now = tensors(net)
        kept = [name for name in mine if name in now and now[name].shape == mine[name].shape]
        assert len(kept) >= len(mine) - 1
        assert_same({name: now[name] for name in kept}, {name: mine[name] for name in kept})
        if now.keys() != mine.keys() or len(kept) < len(mine):
            with pytest.raises(ValueError, match=r"mask|cache|3\.bias"):
                averager.update()
            assert_same(averager._averages["a"], average)


def test_tensors_of_a_model_that_share_memory_are_swapped_and_restored():
    encoder, decoder = nn.Linear(3, 4), nn.Linear(4, 3)
    decoder.weight = nn.Parameter(encoder.weight.detach().t())
    net = nn.Sequential(encoder, decoder)
    net.register_buffer("scale", torch.ones(1, 1).expand(2, 3))
    averager = WeightAverager(net, {"a": EMA(0.5)})
    for step in range(2):
        with torch.no_grad():
            for param in (encoder.weight, encoder.bias, decoder.bias):
                param.add_(step + 1.0)
        net.scale = torch.full((1, 1), 2.0).expand(2, 3)
        averager.update()
    mine, average = tensors(net), copy.deepcopy(averager.state_dict()["averages"]["a"])
    with averager.swapped("a"):
        assert_same(tensors(net), average)
        assert_same(averager.state_dict()["averages"]["a"], average)
    assert_same(tensors(net), mine)
    assert_same(averager.state_dict()["averages"]["a"], average)
    averager.copy_to(net, "a")
    assert_same(tensors(net), average)


@pytest.mark.parametrize("convert", [torch.jit.script, lambda net: torch.jit.trace(net, torch.randn(2, 3, 3, 3))])
def test_models_of_torchscript(convert):
    plain, net = model().eval(), convert(model().eval())
    averages = [(each, AveragedModel(each, EMA(0.5)), WeightAverager(each, {"a": EMA(0.5)})) for each in (plain, net)]
    for each, average, averager in averages:
        for step in range(3):
            train_step(each, step)
            average.update_parameters(each)
            averager.update()
    (_, plain_average, _), (_, average, averager) = averages
    assert_same(tensors(average.module), tensors(plain_average.module))
    with averager.swapped("a"):
        assert_same(tensors(net), tensors(plain_average.module))


def test_inside_swapped_what_would_go_wrong_is_refused():
    net = model()
    averager = WeightAverager(net, {"a": EMA(0.5)})
    state = averager.state_dict()
    with averager.swapped("a"):
        for call in (
            averager.update,
            lambda: averager.copy_to(model(), "a"),
            lambda: averager.load_state_dict(state),
            lambda: averager.swapped("a").__enter__(),
        ):
            with pytest.raises(RuntimeError, match="holds the average 'a'"):
                call()
    averager.update()
    with pytest.raises(ValueError, match="name must be one of 'a', got 'b'"), averager.swapped("b"):
        pass


def test_swapping_leaves_the_optimizer_alone():
    torch.manual_seed(0)
    runs = []
    for swap in (False, True):
        net = model(seed=3)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        averager = WeightAverager(net, {"a": EMA(0.5)})
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            net(torch.randn(4, 3, 3, 3, generator=generator)).square().sum().backward()
            optimizer.step()
            averager.update()
            if swap:
                with averager.swapped("a"):
                    net.eval()(torch.ones(1, 3, 3, 3))
                    net.train()
        runs.append(tensors(net))
    assert_same(*runs)


def test_update_bn_inside_swapped_stays_in_the_average(device):
    net = model()
    averager = WeightAverager(net, {"a": EMA(0.5)})
    averager.update()
    mine = tensors(net)
    with averager.swapped("a"):
        swa_utils.update_bn([torch.randn(4, 3, 3, 3)], net)
        trained = net[1].running_mean.clone()
    assert_same(tensors(net), mine)
    assert torch.equal(averager.state_dict()["averages"]["a"]["1.running_mean"], trained)


def test_averager_state_dict_round_trip(device):
    net = model()
    make = lambda: WeightAverager(net, {"a": EMA(0.5), "b": SWA()}, update_every=2)  # noqa: E731
    whole, resumed = make(), make()
    for step in range(7):
        train_step(net, step)
        whole.update()
        resumed.update()
        state, resumed = _saved(resumed.state_dict()), make()
        resumed.load_state_dict(state)
    for name in ("a", "b"):
        assert_same(resumed.state_dict()["averages"][name], whole.state_dict()["averages"][name])
    assert resumed.n_averaged.item() == 4

    other = WeightAverager(nn.Linear(2, 2), {"a": EMA(), "b": EMA()})
    with pytest.raises(ValueError, match="average 'a' misses"):
        other.load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="holds averages"):
        WeightAverager(net, {"c": EMA()}).load_state_dict(whole.state_dict())
    state = whole.state_dict()
    state["averages"]["b"]["3.bias"] = torch.ones(9)
    before = copy.deepcopy(whole.state_dict()["averages"])
    with pytest.raises(ValueError, match=r"'3\.bias' of average 'b' must have shape"):
        whole.load_state_dict(state)
    zeros = {name: {key: torch.zeros_like(t) for key, t in named.items()} for name, named in before.items()}
    with pytest.raises(ValueError, match="'calls' must be 0-d"):
        whole.load_state_dict({**whole.state_dict(), "averages": zeros, "calls": torch.ones(1)})
    zeros["b"]["3.bias"] = 3
    with pytest.raises(TypeError, match=r"'3\.bias' of average 'b' must be a tensor"):
        whole.load_state_dict({**whole.state_dict(), "averages": zeros})
    with pytest.raises(TypeError, match="must be a mapping"):
        whole.load_state_dict(None)
    assert_same(whole.state_dict()["averages"]["a"], before["a"])


def _saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer)


# ---- other libraries -------------------------------------------------------------------------------------
def _timm():
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    from benchmarks.bench_averaging import timm_model_ema

    return timm_model_ema().ModelEmaV3


def test_state_dicts_go_to_timm_and_back():
    net, torchs = model(), swa_utils.AveragedModel(model(seed=4))
    theirs = _timm()(net, decay=0.5)
    ours = AveragedModel(model(seed=1), EMA(0.5), use_buffers=True)
    for step in range(3):
        train_step(net, step)
        theirs.update(net)
    ours.load_state_dict(averaging.convert_state_dict(theirs.state_dict(), n_averaged=3))  # timm keeps no count
    assert ours.n_averaged.item() == 3
    assert_same(tensors(ours.module), tensors(theirs.module))
    for step in range(2):  # both go on as one
        train_step(net, 3 + step)
        theirs.update(net)
        ours.update_parameters(net)
        assert_same(tensors(ours.module), tensors(theirs.module))
    train_step(net, 9)
    ours.update_parameters(net)
    state = ours.state_dict()
    del state["n_averaged"]
    theirs.load_state_dict(state)
    assert_same(tensors(theirs.module), tensors(ours.module))
    torchs.update_parameters(net)
    ours.load_state_dict(averaging.convert_state_dict(torchs.state_dict()))
    assert ours.n_averaged.item() == 1
    for wrong in (net.state_dict(), {}):
        with pytest.raises(ValueError, match="got names such as"):
            averaging.convert_state_dict(wrong)


def test_state_dicts_go_to_ema_pytorch_and_back():
    peer = pytest.importorskip("ema_pytorch", reason="ema-pytorch is not installed")
    net = model()
    theirs = peer.EMA(net, beta=0.5, update_every=1, update_after_step=0)
    for step in range(3):
        train_step(net, step)
        theirs.update()
    ours = AveragedModel(model(seed=1), EMA(0.5))
    ours.load_state_dict(averaging.convert_state_dict(theirs.state_dict()))
    assert_same(tensors(ours.module), tensors(theirs.ema_model))
    assert ours.n_averaged.item() == 3
    train_step(net, 5)
    ours.update_parameters(net)
    theirs.ema_model.load_state_dict(ours.module.state_dict())
    again = peer.EMA(model(), beta=0.5, update_every=1, update_after_step=0)
    again.load_state_dict(theirs.state_dict())
    assert_same(tensors(again.ema_model), tensors(ours.module))


# ---- sizes, rounding, instruction sets ---------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", range(4))
def test_every_size_around_chunks_and_vectors(offset, dtype):
    sizes = [*range(1, 40), 1023, 1024, 1025, 2047, 2049, 65535, 65536, 65537, 3 * 65536 + 5]
    torch.manual_seed(0)
    averages, params = ([torch.randn(offset + n).to(dtype)[offset:] for n in sizes] for _ in range(2))
    expected = [torch.lerp(a, p, 0.3) for a, p in zip(averages, params)]
    average_(averages, params, 0.3)
    for a, e in zip(averages, expected):
        assert torch.equal(a, e)


def test_more_tensors_than_any_argument_list_takes():
    averages, params = [torch.zeros(3) for _ in range(2500)], [torch.full((3,), float(i)) for i in range(2500)]
    average_(averages, params, 0.5)
    assert all((a == i / 2).all() for i, a in enumerate(averages))


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_two_to_the_32_elements(param_dtype, device):
    """The first and the last chunk of a huge tensor, whose memory between them is never touched."""
    if device == "cuda":
        pytest.skip("memory on a GPU is there as soon as it is asked for; the slow test takes it")
    size = 2**32 + 5
    param, averages = torch.empty(size, dtype=param_dtype), [torch.empty(size, dtype=torch.bfloat16) for _ in range(2)]
    for t, value in ((param, 4.0), (averages[0], 0.0), (averages[1], 2.0)):
        t[:3], t[-3:] = value, value
        t[5 * 2**16 - 3 : 5 * 2**16] = t[2**32 - 2**16 - 3 : 2**32 - 2**16] = value  # beyond what is launched
    row = averaging._row_of(param, averages, False)
    plan = averaging._make_plan([row], 5, param.device)
    chunks = plan.chunks[[0, -1]]
    assert chunks[-1].tolist() == [0, 2**32]
    (backend,) = [name for name in fastreg.BACKENDS if name == _backends.forced()]
    if backend == "reference":
        pytest.skip("plain PyTorch has no chunks")
    rules = torch.tensor([EMA(0.5)._row(), EMA(0.75)._row()], dtype=torch.float64)
    counters = torch.tensor(3), torch.tensor(3), torch.zeros((), dtype=torch.int32)
    averaging._update_op[backend](plan.table, chunks, 8, averaging._kinds([row]), rules, *counters, None, 1, 0, None)
    for average, first, value in ((averages[0], 2.0, 0.0), (averages[1], 2.5, 2.0)):
        assert average[:3].tolist() == average[-3:].tolist() == [first] * 3
        assert average[2**32 - 2**16 - 3 : 2**32 - 2**16].tolist() == [value] * 3
    averaging._lerp_op[backend](plan.table[:, :4].contiguous(), chunks, 8, averaging._kinds([row]), 0.5, None)
    assert averages[0][-3:].tolist() == averages[0][:3].tolist() == [3.0] * 3
    twins = [t[:size].view(torch.uint8) for t in averages]
    plan = averaging._make_plan([averaging._row_of(twins[0], [twins[1]], True)], 4, param.device)
    averaging._swap_op[backend](plan.table, plan.chunks[[-1]], plan.chunk)
    assert averages[0][-3:].tolist() == [2.5] * 3 and averages[1][-3:].tolist() == [3.0] * 3


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    size = 2**31 + 3
    average, param = torch.zeros(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.bfloat16)
    param[-3:] = param[0] = 4.0
    average_([average], [param], 0.5)
    assert average[[0, -3, -2, -1]].tolist() == [2.0] * 4 and average.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_stochastic_rounding_follows_where_nearest_stalls(dtype, device):
    """From 0 to 1 with decay 0.999: rounding to nearest stops far short; the mean of many elements does not."""
    if _backends.forced() == "triton" and _backends.interpreting():
        pytest.skip("two thousand interpreted launches; the kernel's bits are compared elsewhere")
    net = nn.Linear(64, 64, bias=False).to(dtype)
    nearest, stochastic = (AveragedModel(net, EMA(0.999), rounding_seed=seed) for seed in (None, 1))
    with torch.no_grad():
        net.weight.fill_(0.0)
    for average in (nearest, stochastic):
        average.update_parameters(net)
    with torch.no_grad():
        net.weight.fill_(1.0)
    for _ in range(2000):
        nearest.update_parameters(net)
        stochastic.update_parameters(net)
    exact = 1 - 0.999**2000
    assert nearest.module.weight.float().mean() < (0.3 if dtype == torch.bfloat16 else 0.757)  # fp16: 1 − 2^-12 / 0.001
    # 4,096 elements, each with a standard deviation of some hundredths (fewer than two units in the last place)
    assert abs(stochastic.module.weight.float().mean().item() - exact) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_reproducible_and_equal_on_every_backend(dtype):
    results = {}
    for backend in ("reference", "cpu", "triton", "cpu"):
        if fastreg.backends()["averaging"][backend] != "usable":
            continue
        torch.manual_seed(0)
        net = nn.Linear(40, 7).to(dtype)
        average = AveragedModel(net, EMA(0.9), rounding_seed=3)
        with torch.no_grad():
            average.module.weight.mul_(1e-5)  # fp16: below its normal numbers
        with fastreg.use_backend(backend):
            for step in range(3):
                train_step(net, step)
                average.update_parameters(net)
        now = tensors(average.module)
        if backend in results:
            assert_same(now, results[backend])
        results[backend] = now
    for other in results.values():
        for name, t in results["reference"].items():
            assert (other[name] != t).sum() <= 2  # fused multiply-add may move the bits that are dropped


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set(level):
    """The rest of this file runs on the best that there is."""
    if fastreg.backends()["averaging"]["cpu"] != "usable" or "FASTREG_CPU_CAPABILITY" in os.environ:
        pytest.skip("there are no C++ kernels, or this is one level already")
    selected = "nan_of or rounded_once or weight_one or many_averages"
    if level != "baseline":  # which has no fused multiply-add, and torch has: their bits differ
        selected += " or every_size or subnormal or torch_lerp"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, __file__],
        env=os.environ | {"FASTREG_CPU_CAPABILITY": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


# ---- the articles' classes -------------------------------------------------------------------------------
def test_article_classes_do_what_the_articles_say():
    from fastreg import compat

    net = model()
    averages = {
        "ema": (compat.EMAModel(net, cuda=False, decay=0.8), lambda n: 0.8),
        "swa": (compat.SWAModel(net, cuda=False), lambda n: n / (n + 1)),
        "tanh": (compat.T_ADEMAModel(net, cuda=False, alpha=0.9), lambda n: 0.9 * math.tanh(n)),
    }
    exact = dict.fromkeys(averages)
    for n in range(6):
        train_step(net, n)
        now = net[3].weight.detach().double()
        for name, (average, decay) in averages.items():
            average.update(net)
            exact[name] = now if n == 0 else decay(n) * exact[name] + (1 - decay(n)) * now
            torch.testing.assert_close(average.module[3].weight.double(), exact[name], rtol=0, atol=5e-6)
            assert average.n_averaged.item() == n + 1
    x = torch.randn(2, 3, 3, 3)
    assert averages["ema"][0].eval()(x).shape == (2, 4)


def test_article_ema_with_shadow_and_backup(device):
    from fastreg import compat

    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    ema = compat.EMA(net, 0.9)
    with pytest.raises(RuntimeError, match="register"):
        ema.update()
    ema.register()
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    ema.update()
    mine = tensors(net)
    torch.testing.assert_close(ema.shadow["weight"], start + 0.1)
    assert ema.shadow.keys() == {"weight"}
    ema.apply_shadow()
    assert torch.equal(net.weight, ema.shadow["weight"])
    with pytest.raises(RuntimeError, match="restore"):
        ema.apply_shadow()
    ema.restore()
    assert_same(tensors(net), mine)
    with pytest.raises(RuntimeError, match="apply_shadow"):
        ema.restore()


def test_article_ema_where_layers_are_frozen_and_thawed_during_training():
    from fastreg import compat

    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[1].requires_grad_(False)
    ema = compat.EMA(net, 0.9)
    ema.register()
    net[0].bias.requires_grad_(False)
    ema.update()
    mine = tensors(net)
    ema.apply_shadow()
    net[0].requires_grad_(False)
    ema.restore()
    assert_same(tensors(net), mine)
    net.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"have become trainable: \['1.bias', '1.weight'\]"):
        ema.update()


def test_backends_table_names_averaging():
    assert fastreg.backends()["averaging"]["reference"] == "usable"
