"""Stochastic depth, soft-thresholding and flooding against their formulas."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastreg
from fastreg import _backends
from fastreg.testing import DTYPES, layouts_of
from tests import test_noise_gpu
from tests.machine import HAS_CUDA, cudahost_missing, device_of

BACKENDS = [b for b in ("reference", "cpu", "triton") if _backends.missing("drop_path", b) is None]
ON_HOST = "cuda on the host"  # the CUDA kernels, compiled for the CPU, in place of the C++ ones
if "cpu" in BACKENDS and cudahost_missing() is None:
    BACKENDS.append(ON_HOST)
if HAS_CUDA and _backends.missing("drop_path", "cuda") is None:
    BACKENDS.append("cuda")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    if request.param == ON_HOST:
        test_noise_gpu.put_on_host(monkeypatch)
    device = device_of(request.param)
    # On a GPU, all that a test makes stands there.
    stands = torch.device(device) if device == "cuda" else nullcontext()
    with stands, fastreg.use_backend("cpu" if request.param == ON_HOST else request.param):
        yield request.param


def stochastic_depth(x, p, mode):
    """torchvision.ops.stochastic_depth in training, restated."""
    size = [x.shape[0] if mode == "row" else 1] + [1] * (x.dim() - 1)
    noise = torch.empty(size, dtype=x.dtype).bernoulli_(1 - p)
    return x * (noise / (1 - p) if p < 1 else noise)


# ---- drop path -------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("shape", [(64,), (64, 7), (64, 3, 5, 5)])
def test_drop_path_has_torchvision_s_draws(dtype, mode, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    residual = torch.randn(shape).to(dtype).requires_grad_()
    torch.manual_seed(3)
    want = stochastic_depth(x.detach().double(), 0.3, mode)
    torch.manual_seed(3)
    plain = fastreg.drop_path(x, 0.3, True, mode)
    torch.manual_seed(3)
    added = fastreg.drop_path(x, 0.3, True, mode, residual=residual)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(plain.double(), want, rtol=eps, atol=0)
    exact = want + residual.double()
    assert ((added.double() - exact).abs() <= eps * exact.abs() + 1e-6 * want.abs()).all()
    added.sum().backward()
    torch.testing.assert_close(x.grad.double(), (want != 0).double() / 0.7, rtol=eps, atol=0)
    assert residual.grad.eq(1).all()


def test_drop_path_layouts():
    for _, x in layouts_of(torch.randn(8, 3, 4, 4)):
        torch.manual_seed(1)
        out = fastreg.drop_path(x, 0.5)
        torch.manual_seed(1)
        torch.testing.assert_close(out, stochastic_depth(x, 0.5, "row"))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_drop_path_ends_and_inference(mode):
    x = torch.randn(5, 4)
    assert fastreg.drop_path(x, 0.0, True, mode) is x
    assert fastreg.drop_path(x, 0.7, False, mode) is x
    assert fastreg.drop_path(x, 1.0, False, mode) is x
    assert fastreg.drop_path(x, 1.0, True, mode).eq(0).all()
    residual = torch.randn(5, 4)
    assert torch.equal(fastreg.drop_path(x, 1.0, True, mode, residual=residual), residual)
    assert torch.equal(fastreg.drop_path(x, 0.5, False, mode, residual=residual), x + residual)
    assert fastreg.drop_path(torch.empty(0, 4), 0.5, True, mode).shape == (0, 4)


def test_a_dropped_branch_leaves_no_nan_behind():
    x = torch.full((4, 3), math.inf, requires_grad=True)
    out = fastreg.drop_path(x, 1.0, residual=torch.ones(4, 3))
    assert out.eq(1).all()
    out.sum().backward()
    assert x.grad.eq(0).all()


def test_drop_path_keeps_the_mean(backend):
    rows = 5_000 if backend == ON_HOST else 200_000  # there each row is a block of threads
    out = fastreg.drop_path(torch.ones(rows, 1), 0.2)
    assert abs(out.mean().item() - 1) < 5 * math.sqrt(0.2 / 0.8 / rows)


def test_drop_path_second_derivative():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def same_draws(x):
        torch.manual_seed(0)
        return fastreg.drop_path(x, 0.4) ** 2

    assert torch.autograd.gradcheck(same_draws, (x,)) and torch.autograd.gradgradcheck(same_draws, (x,))


def test_drop_path_errors():
    x = torch.ones(2, 2)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p must be between 0 and 1"):
            fastreg.drop_path(x, p)
    with pytest.raises(ValueError, match="mode must be one of 'row', 'batch'"):
        fastreg.drop_path(x, 0.5, True, "column")
    with pytest.raises(ValueError, match="residual must have x's shape and dtype"):
        fastreg.drop_path(x, 0.5, residual=torch.ones(2))
    with pytest.raises(TypeError, match="x must have a dtype among"):
        fastreg.drop_path(torch.ones(2, dtype=torch.int32), 0.5)
    with pytest.raises(ValueError, match="dimension of samples"):
        fastreg.drop_path(torch.tensor(1.0), 0.5)


def test_drop_path_module():
    layer = fastreg.nn.DropPath(0.5)
    x = torch.randn(16, 3)
    torch.manual_seed(0)
    out = layer(x, torch.ones(16, 3))
    torch.manual_seed(0)
    assert torch.equal(out, fastreg.drop_path(x, 0.5, residual=torch.ones(16, 3)))
    assert layer.eval()(x) is x and not layer.state_dict()
    assert "drop_prob=0.5" in repr(layer)


@pytest.mark.parametrize("training", [False, True])
def test_drop_path_under_autocast_adds_to_a_wider_residual(training):
    """The branch ends in a bf16 product there, while what it is added to has stayed in fp32."""
    torch.manual_seed(0)
    branch, residual = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    module = fastreg.nn.DropPath(1.0).train(training)
    with torch.autocast(branch.device.type, torch.bfloat16):
        out = module(branch.bfloat16(), residual)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, residual if training else residual + branch.bfloat16())
    out.sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual))
    assert torch.equal(branch.grad, torch.full_like(branch, 0.0 if training else 1.0))


def test_linear_drop_rates():
    assert fastreg.linear_drop_rates(5, 0.2) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert fastreg.linear_drop_rates(1, 0.2) == [0.0] and fastreg.linear_drop_rates(0, 0.2) == []
    with pytest.raises(ValueError, match="depth"):
        fastreg.linear_drop_rates(-1, 0.2)


# ---- soft threshold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau_shape", [None, (), (3,), (4, 3), (4, 3, 1, 1), (1, 3), (4, 1)])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 2)])
def test_soft_threshold(dtype, tau_shape, shape):
    x = torch.randn(shape).to(dtype).requires_grad_()
    if tau_shape is None:
        tau, per_element = 0.4, torch.tensor(0.4).double() if dtype != torch.float64 else torch.tensor(0.4, dtype=dtype)
    else:
        tau = torch.rand(tau_shape).to(dtype).requires_grad_()
        per_element = tau.detach().double()
        if len(tau_shape) == 1:
            per_element = per_element.reshape(1, 3, *[1] * (len(shape) - 2))
        elif tau_shape:
            per_element = per_element.reshape(*tau_shape[:2], *[1] * (len(shape) - 2))
    wide = x.detach().double()
    want = wide.sign() * (wide.abs() - per_element).clamp(min=0)
    out = fastreg.soft_threshold(x, tau)
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=0)
    weights = torch.randn(shape).to(dtype)
    (out * weights).sum().backward()
    above = (wide.abs() > per_element).double()
    torch.testing.assert_close(x.grad.double(), above * weights.double())
    if tau_shape is not None:
        slope = -(above * wide.sign() * weights.double())
        want = slope.sum_to_size(per_element.shape).reshape(tau.shape)
        bound = torch.finfo(dtype).eps * (want.abs() + math.sqrt(x.numel()) * slope.abs().max())
        assert ((tau.grad.double() - want).abs() <= bound).all()


def test_a_threshold_that_is_a_number_is_not_rounded_to_the_dtype_of_x():
    x = torch.tensor([0.302734375, 0.30078125, -0.5], dtype=torch.bfloat16, requires_grad=True)
    want = nn.functional.softshrink(x.detach().float(), 0.3).bfloat16()
    out = fastreg.soft_threshold(x, 0.3)
    assert torch.equal(out, want)
    out.sum().backward()
    assert x.grad.eq(1).all()  # of 0.30078125 too, which is what bf16 makes of 0.3


def test_soft_threshold_special_values():
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0])
    out = fastreg.soft_threshold(x, 1.0)
    assert out[0].isnan() and out[1:].tolist() == [math.inf, -math.inf, 0.0, 0.0, 0.0]
    negative = torch.tensor(-1.0, requires_grad=True)
    out = fastreg.soft_threshold(x[3:], negative)
    assert torch.equal(out, x[3:])
    out.sum().backward()
    assert negative.grad.item() == 0
    assert fastreg.soft_threshold(torch.empty(0, 3), torch.ones(3)).shape == (0, 3)
    zero = torch.zeros(1, requires_grad=True)
    fastreg.soft_threshold(torch.tensor([[2.0, -3.0, -4.0]]), zero).sum().backward()
    assert zero.grad.item() == 1.0


@pytest.mark.sampled(2)
def test_soft_threshold_derivatives():
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    tau = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastreg.soft_threshold, (x, tau))
    assert torch.autograd.gradgradcheck(lambda x, t: fastreg.soft_threshold(x, t) ** 2, (x, tau))


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("positions", [(), (5,), (3, 5)])
def test_a_threshold_per_channel_broadcasts(samples, positions):
    """(C, 1, 1) beside (N, C, H, W), also where there are as many samples as channels."""
    x, tau = torch.randn(samples, 4, *positions), torch.rand(4)
    want = fastreg.soft_threshold(x, tau)
    assert torch.equal(fastreg.soft_threshold(x, tau.reshape(4, *[1] * len(positions))), want)
    assert torch.equal(fastreg.soft_threshold(x, tau.reshape(1, 4, *[1] * len(positions))), want)


def test_soft_threshold_errors():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="tau must be at least 0, got -1"):
        fastreg.soft_threshold(x, -1.0)
    for shape in ((4,), (3, 2), (2, 3, 4)):
        with pytest.raises(ValueError, match="tau must be a scalar, one value per channel"):
            fastreg.soft_threshold(x, torch.ones(shape))


def test_channel_shrinkage():
    torch.manual_seed(0)
    block = fastreg.nn.ChannelShrinkage(6)
    x = torch.randn(5, 6, 4, 4, requires_grad=True)
    size = x.detach().abs().mean((2, 3))
    tau = size * block.fc(size)
    out = block(x)
    want = x.sign() * (x.abs() - tau[:, :, None, None]).clamp(min=0)
    torch.testing.assert_close(out, want)
    assert (tau < size).all() and out.ne(0).any()
    out.sum().backward()
    assert x.grad is not None and all(p.grad is not None for p in block.parameters())
    assert fastreg.nn.ChannelShrinkage(6, hidden=2)(torch.randn(5, 6)).shape == (5, 6)
    for bad in (torch.ones(6), torch.ones(2, 5, 4)):
        with pytest.raises(ValueError, match=r"x must be \(N, 6, ...\), got shape"):
            block(bad)
    with pytest.raises(ValueError, match="channels must be above 0, got 0"):
        fastreg.nn.ChannelShrinkage(0)


# ---- flooding --------------------------------------------------------------------------------------------


def test_flood():
    loss = torch.tensor([0.5, 0.1], requires_grad=True)
    out = fastreg.flood(loss, 0.2)
    torch.testing.assert_close(out, torch.tensor([0.5, 0.3]))
    out.sum().backward()
    assert loss.grad.tolist() == [1.0, -1.0]
    with pytest.raises(TypeError, match="loss must be a tensor"):
        fastreg.flood(0.5, 0.1)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != ON_HOST], indirect=True)  # which is no operator
def test_modules_compile_without_a_graph_break(backend):
    block = nn.Sequential(fastreg.nn.DropPath(0.5), fastreg.nn.ChannelShrinkage(3))
    x = torch.randn(8, 3, 4)
    torch.manual_seed(0)
    eager = block(x)
    torch.manual_seed(0)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
