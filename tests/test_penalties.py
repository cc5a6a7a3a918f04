"""Lp penalties and FGM against their formulas in fp64."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg
from fastreg import _backends, penalties
from fastreg.testing import DTYPES
from tests import test_penalties_gpu
from tests.machine import HAS_CUDA, cudahost_missing, device_of

BACKENDS = [b for b in ("reference", "cpu", "triton") if _backends.missing("lp_penalty", b) is None]
ON_HOST = "cuda on the host"  # the CUDA kernels, compiled for the CPU, in place of the C++ ones
if "cpu" in BACKENDS and cudahost_missing() is None:
    BACKENDS.append(ON_HOST)
if HAS_CUDA and _backends.missing("lp_penalty", "cuda") is None:
    BACKENDS.append("cuda")
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    if request.param == ON_HOST:
        test_penalties_gpu.put_on_host(monkeypatch)
    device = device_of(request.param)
    # On a GPU, all that a test makes stands there.
    stands = torch.device(device) if device == "cuda" else nullcontext()
    with stands, fastreg.use_backend("cpu" if request.param == ON_HOST else request.param):
        yield request.param


def exact(tensors, p, squared=False):
    norms = [torch.linalg.vector_norm(t.detach().double(), p) for t in tensors if t.numel()]
    return sum(n**p if squared else n for n in norms)


def exact_gradient(tensor, p, squared=False):
    w = tensor.detach().double()
    size = w.abs()
    if squared:
        return p * w.sign() * size ** (p - 1)
    norm = torch.linalg.vector_norm(w, p)
    return torch.zeros_like(w) if norm == 0 else w.sign() * (size / norm) ** (p - 1)


@settings(max_examples=60, **SETTINGS)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.sampled_from([0, 1, 2, 7, 33, 1000]), min_size=1, max_size=5),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    p=st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    squared=st.booleans(),
)
def test_value_and_gradient(seed, sizes, dtypes, p, squared):
    torch.manual_seed(seed)
    tensors = [torch.randn(n).to(dtype).requires_grad_() for n, dtype in zip(sizes, dtypes)]
    out = fastreg.lp_penalty(tensors, p, squared=squared)
    double = any(t.dtype == torch.float64 for t in tensors)
    assert out.dtype == (torch.float64 if double else torch.float32) and out.dim() == 0
    want = exact(tensors, p, squared)
    # One rounding per tensor and sum in the result's dtype; in fp64 the reduction itself too, ours and the oracle's.
    roundings = 2 + len(sizes) + (2 * sum(sizes) ** 0.5 if double else 0)
    assert abs(out.item() - float(want)) <= roundings * torch.finfo(out.dtype).eps * float(want)
    (3 * out).backward()
    for t in tensors:
        want = 3 * exact_gradient(t, p, squared)
        info = torch.finfo(t.dtype)
        # In fp64 the norm's sum too, ours and the oracle's, to the power of p − 1.
        roundings = 8 + (2 * p * len(t) ** 0.5 if t.dtype == torch.float64 else 0)
        error = (t.grad.double() - want).abs() - roundings * info.eps * want.abs()
        assert t.grad.dtype == t.dtype and (error <= info.smallest_normal).all()


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, math.inf])
def test_gradient_of_zeros_is_zero(p, backend):
    if p == math.inf and backend != "reference":
        pytest.skip("p = inf is the reference's")
    zeros, other = torch.zeros(3, 4, requires_grad=True), torch.ones(2, requires_grad=True)
    fastreg.lp_penalty([zeros, other], p).backward()
    assert zeros.grad.eq(0).all() and other.grad.ne(0).all()


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_weights(p, size):
    w = (torch.randn(100) * size).requires_grad_()
    out = fastreg.lp_penalty(w, p)
    torch.testing.assert_close(out.double(), exact([w], p), rtol=1e-6, atol=0)
    out.backward()
    torch.testing.assert_close(w.grad.double(), exact_gradient(w, p), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_elements_that_all_round_alike(dtype, p):
    for size in (1.0, 1.25, 1.2001953125, 0.10009765625, 1 / 3):
        w = torch.full((5003,), size).to(dtype)
        torch.testing.assert_close(fastreg.lp_penalty(w, p).double(), exact([w], p), rtol=3 * 2**-23, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_whose_squares_fp32_cannot_hold_beside_others(dtype, p):
    w = torch.randn(9000).to(dtype)
    w[:4000] = 0
    w[4000:4100] *= 1e-25
    for size in (1.0, 1e19, 1e25):
        w[8000] = size
        torch.testing.assert_close(fastreg.lp_penalty(w, p).double(), exact([w], p), rtol=1e-6, atol=0)
        torch.testing.assert_close(fastreg.lp_penalty(w[:5000], p).double(), exact([w[:5000]], p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [32_767, 32_768, 32_777, 65_536, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_a_long_run_counts_once(dtype, size):
    """In C++ a long run is read in four parts. Sums of these whole numbers are exact in fp32."""
    x = (torch.arange(size) % 7 - 3).to(dtype)
    assert fastreg.lp_penalty(x, 1).item() == x.double().abs().sum()
    assert fastreg.lp_penalty(x, 2, squared=True).item() == x.double().square().sum()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("squared", [False, True])
def test_derivatives(p, squared):
    a, b = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(lambda a, b: fastreg.lp_penalty([a, b], p, squared=squared), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: fastreg.lp_penalty([a, b], p, squared=squared), (a, b))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_nan_and_inf_show(p):
    w = torch.ones(3000)
    w[100] = math.inf
    assert fastreg.lp_penalty([w, torch.ones(5)], p).item() == math.inf
    w[2500] = math.nan
    assert math.isnan(fastreg.lp_penalty([w, torch.ones(5)], p).item())


def test_layouts_and_ties():
    w = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    view = w.detach()[:, ::2, 1:4].transpose(1, 3).requires_grad_()
    out = fastreg.lp_penalty([w, view, w], 2)
    torch.testing.assert_close(out.double(), exact([w, view, w], 2), rtol=1e-6, atol=0)
    out.backward()
    torch.testing.assert_close(w.grad.double(), 2 * exact_gradient(w, 2), rtol=1e-6, atol=0)
    torch.testing.assert_close(view.grad.double(), exact_gradient(view, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_so_large_that_they_bypass_the_caches(dtype, p, backend):
    if backend != "cpu":
        pytest.skip("the other backends have no such path")
    whole = torch.randn(3 + (1 << 20)).to(dtype)
    tensors = [t.requires_grad_() for t in (whole[3:], torch.randn(5).to(dtype), torch.randn(70_001).to(dtype))]
    fastreg.lp_penalty(tensors, p).backward()
    for t in tensors:
        torch.testing.assert_close(t.grad.double(), exact_gradient(t, p), rtol=2 * torch.finfo(dtype).eps, atol=1e-40)


def test_the_same_bits_every_time():
    tensors = [torch.randn(n) for n in (100_003, 5, 40_000)]
    first = fastreg.lp_penalty(tensors, 1)
    assert all(torch.equal(first, fastreg.lp_penalty(tensors, 1)) for _ in range(5))


def test_the_same_bits_whatever_the_threads(backend):
    if backend != "cpu":
        pytest.skip("only the C++ kernels share work among torch's threads")
    tensors = [torch.randn(n).requires_grad_() for n in (100_003, 5, 40_000, 70_000, 32_768)]
    model, results = nn.ParameterList(tensors), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            penalty = fastreg.lp_penalty(tensors, 2)
            for tensor, grad in zip(tensors, torch.autograd.grad(penalty, tensors)):
                tensor.grad = grad
            fgm = fastreg.FGM(model, include=lambda *_: True)
            fgm.attack()
            results.append([penalty.detach(), *(x.detach().clone() for t in tensors for x in (t, t.grad))])
            fgm.restore()
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_empty_lists_and_errors():
    assert fastreg.lp_penalty([]).item() == 0 and fastreg.lp_penalty([torch.empty(0)]).item() == 0
    with pytest.raises(ValueError, match="p must be a number of at least 1"):
        fastreg.lp_penalty(torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="p must be finite where squared is set"):
        fastreg.lp_penalty(torch.ones(2), math.inf, squared=True)
    with pytest.raises(TypeError, match=r"tensors\[0\] must have a dtype among"):
        fastreg.lp_penalty(torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="tensors must be a tensor or an iterable"):
        fastreg.lp_penalty(2.0)


@pytest.mark.parametrize("p, squared", [(1, False), (2, False), (2, True), (3, False)])
def test_gradient_straight_into_grad(p, squared):
    a, b, c = torch.randn(5, 4).requires_grad_(), torch.randn(7).bfloat16().requires_grad_(), torch.randn(3)
    a.grad = torch.ones(5, 4)
    kept = a.grad
    value = fastreg.lp_penalty_backward_([a, b, c], p, weight=0.1, squared=squared)
    torch.testing.assert_close(value.double(), exact([a, b, c], p, squared).double(), rtol=1e-6, atol=0)
    assert not value.requires_grad and a.grad is kept and c.grad is None
    torch.testing.assert_close(a.grad.double(), 1 + 0.1 * exact_gradient(a, p, squared), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(b.grad.double(), 0.1 * exact_gradient(b, p, squared), rtol=2**-7, atol=0)
    with pytest.raises(ValueError, match="leaves"):
        fastreg.lp_penalty_backward_([a * 2], p)


def test_gradient_added_to_a_sparse_one():
    """Every row has a penalty, so the sum is dense, as where autograd adds the two."""
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2, 2])).sum().backward()
    want = table.weight.grad.to_dense() + 0.1 * exact_gradient(table.weight, 2).float()
    with fastreg.use_backend("reference"):  # which the automatic choice takes then
        fastreg.lp_penalty_backward_(table.weight, 2, weight=0.1)
    torch.testing.assert_close(table.weight.grad, want)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_penalty_leaves_biases_out():
    model = net()
    penalty = fastreg.Penalty(model, l1=0.1, l2=0.01)
    assert penalty.names == ["0.weight", "1.weight", "2.weight"]
    weights = [model[i].weight for i in range(3)]
    want = sum(0.1 * w.double().abs().sum() + 0.01 * (w.double() ** 2).sum() for w in weights)
    torch.testing.assert_close(penalty().double(), want, rtol=1e-6, atol=0)
    penalty().backward()
    grads = [w.grad.clone() for w in weights]
    for w, grad in zip(weights, grads):
        torch.testing.assert_close(grad, 0.1 * w.detach().sign() + 0.02 * w.detach())
        w.grad = None
    torch.testing.assert_close(penalty.add_grad().double(), want.detach(), rtol=1e-6, atol=0)
    for w, grad in zip(weights, grads):
        torch.testing.assert_close(w.grad, grad)
    assert model[0].bias.grad is None


def test_a_weight_is_what_the_parameter_is_called_and_not_its_module():
    model = nn.ModuleDict({"reweight": nn.Linear(2, 2), "cell": nn.LSTM(2, 2)})
    nn.utils.parametrizations.weight_norm(model["reweight"])
    originals = [f"reweight.parametrizations.weight.original{i}" for i in range(2)]
    assert fastreg.Penalty(model, l2=1.0).names == [*originals, "cell.weight_ih_l0", "cell.weight_hh_l0"]
    model = nn.ModuleDict({"reweight": nn.Linear(2, 2)})
    assert fastreg.Penalty(model, l2=1.0).names == ["reweight.weight"]
    assert fastreg.Penalty(model, l2=1.0, include="reweight").names == ["reweight.weight", "reweight.bias"]


def test_penalty_include_and_errors():
    model = net()
    assert fastreg.Penalty(model, l2=1.0, include=["0.", "2.bias"]).names == ["0.weight", "0.bias", "2.bias"]
    assert fastreg.Penalty(model, include=lambda name, w: w.dim() == 2).names == ["0.weight", "2.weight"]
    assert fastreg.Penalty(model)().item() == 0
    with pytest.raises(ValueError, match="include must match"):
        fastreg.Penalty(model, include="conv")
    with pytest.raises(TypeError, match="include must be strings or a function, got int"):
        fastreg.Penalty(model, include=[3])
    with pytest.raises(TypeError, match="include must be strings or a function, got bytes"):
        fastreg.Penalty(model, include=b"weight")
    with pytest.raises(ValueError, match="l1 must be at least 0"):
        fastreg.Penalty(model, l1=-1.0)
    with pytest.raises(TypeError, match="module"):
        fastreg.Penalty([torch.ones(2)])


# ---- FGM -------------------------------------------------------------------------------------------------


class Text(nn.Module):
    def __init__(self, dtype=torch.float32, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 6, sparse=sparse, dtype=dtype)
        self.out = nn.Linear(6, 2, dtype=dtype)

    def forward(self, ids):
        return self.out(self.emb(ids).mean(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_fgm_step_and_exact_restore(dtype, sparse, backend):
    if sparse and backend != "reference":
        pytest.skip("sparse gradients are the reference's")
    model = Text(dtype, sparse)
    model(torch.tensor([[1, 2, 2], [3, 1, 5]])).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    before["emb.weight"][0, 0] = -0.0
    with torch.no_grad():
        model.emb.weight[0, 0] = -0.0
    fgm = fastreg.FGM(model, epsilon=0.5)
    fgm.attack()
    grad = model.emb.weight.grad.to_dense().double()
    want = before["emb.weight"].double() + 0.5 * grad / grad.norm()
    torch.testing.assert_close(model.emb.weight.detach(), want.to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert math.copysign(1, model.emb.weight[0, 0].item()) == -1  # no gradient there: its bits stay
    assert torch.equal(model.out.weight, before["out.weight"])
    fgm.attack(0.25)
    fgm.restore()
    assert torch.equal(model.emb.weight, before["emb.weight"])
    with torch.no_grad():
        model.emb.weight.zero_()
    fgm.restore()
    assert not model.emb.weight.any()


@pytest.mark.parametrize("kinds, between", [("sd", False), ("dsd", True)])
def test_fgm_restores_what_sparse_and_dense_gradients_moved(kinds, between, monkeypatch):
    model = Text()
    before = model.emb.weight.detach().clone()
    fgm = fastreg.FGM(model)
    with monkeypatch.context() as chosen_freely:  # undone before the fixture's own choice is
        chosen_freely.setattr(_backends, "_forced", None)
        for count, kind in enumerate(kinds):
            model.emb.weight.grad = torch.ones(20, 6) if kind == "d" else torch.ones(20, 6).to_sparse(1)
            fgm.attack()
            steps = 1 if between else count + 1
            torch.testing.assert_close(model.emb.weight.detach(), before + steps / 120**0.5)
            if between:
                fgm.restore()
        fgm.restore()
    assert torch.equal(model.emb.weight, before)


def test_fgm_restores_what_several_ways_of_attacking_moved(monkeypatch):
    """The kernels back up block by block, plain PyTorch whole parameters; gradients of other strides are for the
    latter, forced or not."""
    forced, model = _backends.forced(), Text()
    before = model.emb.weight.detach().clone()
    fgm = fastreg.FGM(model)
    plain, other = torch.ones(20, 6), torch.ones(6, 20).t()
    with monkeypatch.context() as choice:  # which ends before the backend of the test does
        for round in ("plain other", "other plain", "plain other plain", "plain", "plain reference", "reference plain"):
            for last in (None, "reference", forced):
                for kind in round.split():
                    model.emb.weight.grad = other if kind == "other" else plain
                    choice.setattr(_backends, "_forced", "reference" if kind == "reference" else None)
                    fgm.attack()
                want = before + len(round.split()) / 120**0.5
                torch.testing.assert_close(model.emb.weight.detach(), want)
                choice.setattr(_backends, "_forced", last)
                fgm.restore()
                assert torch.equal(model.emb.weight, before)


def test_fgm_restores_a_model_that_was_converted_since():
    model = Text()
    before = model.emb.weight.detach().clone()
    fgm = fastreg.FGM(model)
    model.emb.weight.grad = torch.ones(20, 6)
    model.emb.weight.grad[3:] = 0
    fgm.attack()
    model.double()
    model.emb.weight.data = model.emb.weight.data.t().contiguous().t()
    fgm.restore()
    assert torch.equal(model.emb.weight, before.double())
    model.emb.weight.data, model.emb.weight.grad = before.clone(), torch.ones(20, 6)
    fgm.attack()
    model.emb.weight.data = torch.zeros(30, 6)
    with pytest.raises(RuntimeError, match=r"'emb.weight' has changed its shape, from \(20, 6\) to \(30, 6\)"):
        fgm.restore()


def test_past_the_dispatcher_the_kernels_are_the_operators(backend):
    if backend != "cpu":
        pytest.skip("the other backends are reached by their operators alone")
    results = []
    for attack, restore in (
        (penalties._attack_kernels["cpu"], penalties._restore_kernels["cpu"]),
        (torch.ops.fastreg.fgm_attack.cpu, torch.ops.fastreg.fgm_restore.cpu),
    ):
        model = Text()
        weight, before = model.emb.weight, model.emb.weight.detach().clone()
        weight.grad = torch.arange(120.0).reshape(20, 6)
        fgm = fastreg.FGM(model)
        fgm.attack()
        plan = fgm._perturbation._ready.plan
        for _ in range(2):
            restore(plan.table, plan.chunks, plan.chunk)
            assert torch.equal(weight, before)
            attack(plan.table, plan.chunks, plan.chunk, 0.5, False)
        results.append(weight.detach().clone())
    assert attack is not penalties._attack_kernels["cpu"] and torch.equal(*results)
    for wrong in ((plan.table,), (plan.table, None, 1), (plan.table, plan.chunks.to_sparse(), 1)):
        with pytest.raises(TypeError):
            penalties._restore_kernels["cpu"](*wrong)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_fgm_leaves_parameters_with_an_unusable_gradient_alone(value):
    model = Text()
    before = model.emb.weight.detach().clone()
    model.emb.weight.grad = torch.zeros_like(before)
    model.emb.weight.grad[3, 1] = value
    fgm = fastreg.FGM(model)
    fgm.attack()
    assert torch.equal(model.emb.weight, before)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_fgm_with_huge_and_tiny_gradients(size):
    model = Text()
    before = model.emb.weight.detach().clone()
    model.emb.weight.grad = torch.randn(20, 6) * size
    fastreg.FGM(model, epsilon=2.0).attack()
    torch.testing.assert_close((model.emb.weight.detach() - before).norm(), torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fgm_errs_no_more_than_twice_what_stock_pytorch_does(dtype):
    for size, epsilon, scale in ((7, 0.1, 1.0), (64, 1.0, 1e-3), (5000, 5.0, 10.0)):
        model = nn.ParameterDict({"emb": nn.Parameter(torch.randn(size).to(dtype))})
        w, grad = model["emb"].detach().clone(), (scale * torch.randn(size)).to(dtype)
        model["emb"].grad = grad
        exact = w.double() + epsilon * grad.double() / grad.double().norm()
        stock = (w + epsilon * grad / torch.norm(grad)).double()
        fastreg.FGM(model, epsilon).attack()
        error = (model["emb"].detach().double() - exact).abs() - torch.finfo(dtype).eps * exact.abs()
        assert error.max() <= 2 * (stock - exact).abs().max()


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fgm_on_weights_so_large_that_copies_bypass_the_caches(dtype, offset, backend):
    if backend != "cpu":
        pytest.skip("the other backends have no such path")
    w = torch.randn(offset + (1 << 20) + 37).to(dtype)[offset:]
    model = nn.ParameterDict({"emb": nn.Parameter(w)})
    before, grad = w.clone(), torch.randn(len(w)).to(dtype)
    grad[5000:900_000] = 0
    model["emb"].grad = grad
    fgm = fastreg.FGM(model, 100.0)
    fgm.attack()
    want = before.double() + 100 * grad.double() / grad.double().norm()
    torch.testing.assert_close(w.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    fgm.restore()
    assert torch.equal(w, before)


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
def test_tensors_without_values(mode, backend):
    if backend != "reference":
        pytest.skip("no kernel takes them")
    with mode(), torch.device("meta" if mode is nullcontext else "cpu"):
        model = nn.ModuleDict({"emb": nn.Embedding(5, 4)})
        weight = model["emb"].weight
        fastreg.lp_penalty(weight).backward()
        fastreg.lp_penalty_backward_(weight)
        fgm = fastreg.FGM(model)
        fgm.attack()
        fgm.restore()
        assert weight.grad.shape == weight.shape


def test_fgm_errors():
    with pytest.raises(ValueError, match="include must match"):
        fastreg.FGM(net())
    with pytest.raises(ValueError, match="epsilon must be finite"):
        fastreg.FGM(Text(), epsilon=math.nan).attack()


def test_fgm_backs_up_touched_blocks_alone_and_survives_new_gradients():
    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(1000, 48)})
    weight = model["emb"].weight
    before = weight.detach().clone()
    fgm = fastreg.FGM(model)
    for row in (3, 999, 500):
        weight.grad = torch.zeros_like(weight)
        weight.grad[row] = torch.randn(48)
        fgm.attack()
        changed = (weight != before).any(1).nonzero().flatten().tolist()
        assert row in changed and len(changed) <= 3
    fgm.restore()
    assert torch.equal(weight, before)
