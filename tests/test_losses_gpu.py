"""The GPU kernels of the losses at the level of the operators: on the GPU where there is one, else Triton's in its
interpreter and CUDA's on the host."""

import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastreg import _backends
from fastreg.losses import cross_entropy_reference, sigmoid_focal_loss_reference
from fastreg.testing import assert_accurate, with_layout
from tests import losses_cudahost
from tests.machine import device_of, move, needs_cudahost, needs_interpreter, needs_nvcc, needs_ptxas
from tests.proving import cubin
from tests.test_losses import far_apart

REDUCTIONS = ("none", "mean", "sum")
PLAIN = dict(
    weight=None, alpha=None, logit_adjustment=None, margin=None, ignore_index=-100, reduction="mean",
    label_smoothing=0.0, gamma=0.0, alpha_scale=1.0, scale=1.0, z_loss=0.0, all_ignored="nan",
)  # fmt: skip


def _triton():
    from tritonkernels import losses

    return losses


class OnGPU:
    """The operators of a backend, for CPU tensors that are moved there and back."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        def call(*args):
            there = {id(arg): move(arg, "cuda") for arg in args}  # one tensor given twice is one tensor there
            out = getattr(getattr(torch.ops.fastreg, name), self.backend)(*(there[id(arg)] for arg in args))
            if name in ("cross_entropy_forward_extra", "scale_gradient_"):
                written = args[0 if name == "scale_gradient_" else -1]
                if written is not None:
                    written.copy_(there[id(written)])
            return tuple(t.cpu() for t in out) if isinstance(out, (tuple, list)) else None if out is None else out.cpu()

        return call


def kernels_of(backend):
    if device_of(backend) == "cuda":
        return OnGPU(backend)
    return _triton() if backend == "triton" else losses_cudahost


def _parameter(backend, elsewhere):
    on_gpu = device_of(backend) == "cuda"
    reason = _backends.missing("cross_entropy", backend) if on_gpu else None
    marks = pytest.mark.skipif(reason is not None, reason=reason or "") if on_gpu else elsewhere
    return pytest.param(backend, marks=marks)


ours = pytest.mark.parametrize("backend", [_parameter("triton", needs_interpreter), _parameter("cuda", needs_cudahost)])


def run(backend, x, target, grad_loss=None, fp32_loss=False, **options):
    """Forward and backward of one call; the gradient of the loss defaults to ones."""
    kernels, (tensors, numbers, zero) = kernels_of(backend), arguments(x, target, **options)
    loss, lse, denominator = kernels.cross_entropy_forward(*tensors, *numbers, zero, fp32_loss)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype)
    grad = kernels.cross_entropy_backward(grad_loss, *tensors, lse, denominator, *numbers)
    return SimpleNamespace(loss=loss, lse=lse, denominator=denominator, grad=grad)


def run_extra(backend, x, target, grad=None, losses=True, argmax=True, **options):
    """The forward that knows more; the gradient goes into `grad`."""
    kernels, (tensors, numbers, zero) = kernels_of(backend), arguments(x, target, **options)
    loss, lse, denominator, losses, argmax = kernels.cross_entropy_forward_extra(
        *tensors, *numbers, zero, False, losses, argmax, grad
    )
    return SimpleNamespace(loss=loss, lse=lse, denominator=denominator, losses=losses, argmax=argmax, grad=grad)


def arguments(x, target, **options):
    """The operators' tensors and numbers, and zero_if_empty. A target of three is (a, b, share)."""
    o = SimpleNamespace(**{**PLAIN, **options})
    target, other, share = target if isinstance(target, tuple) else (target, None, None)
    if share is not None:
        share = share.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    tensors = (x, target, o.weight, o.alpha, o.logit_adjustment, o.margin, other, share)
    reduction = REDUCTIONS.index(o.reduction)
    numbers = (o.ignore_index, reduction, o.label_smoothing, o.gamma, o.alpha_scale, o.scale, o.z_loss)
    return tensors, numbers, o.all_ignored == "zero"


def expect(x, target, grad_loss=None, **options):
    """The same from the formula, in x's dtype."""
    o = {**PLAIN, **options}
    alpha_scale, alpha = o.pop("alpha_scale"), o.pop("alpha")
    o = {name: value.to(x.dtype) if isinstance(value, torch.Tensor) else value for name, value in o.items()}
    o["alpha"] = alpha_scale if alpha is None else alpha.to(x.dtype) * alpha_scale
    x = x.detach().clone().requires_grad_()
    if isinstance(target, tuple):
        target = (target[0].long(), target[1].long(), target[2].to(x.dtype))
    elif target.is_floating_point():
        o["ignore_index"] = -100
    else:
        target = target.long()
    loss = cross_entropy_reference(x, target, o.pop("weight"), **o)
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype))
    return SimpleNamespace(loss=loss.detach(), grad=x.grad)


def check(backend, x, target, grad_loss=None, **options):
    got = run(backend, x, target, grad_loss, **options)
    stock, oracle = expect(x, target, grad_loss, **options), expect(x.double(), target, grad_loss, **options)
    assert got.grad.stride() == torch.empty_like(x).stride()
    for name in ("loss", "grad"):
        if x.dtype == torch.float64:  # the oracle is no better: a few roundings per operation, relative to the largest
            bound = 64 * torch.finfo(x.dtype).eps * max(1.0, x.abs().nan_to_num(0, 0, 0).max().item())
            scale = getattr(oracle, name).nan_to_num(0, 0, 0).abs().amax().item()
            torch.testing.assert_close(
                getattr(got, name), getattr(oracle, name), rtol=bound, atol=bound * scale, equal_nan=True
            )
        else:
            # against one number stock PyTorch may have luck: a row's loss is the sum of up to eight terms, each rounded
            # and a gradient of probabilities has their sum as a factor, which is rounded in every piece of the row, and
            # in each of a few rows one large element
            few = name == "loss" and oracle.loss.numel() == 1
            if isinstance(target, torch.Tensor) and target.is_floating_point():
                few |= x.shape[1] > 8192 or x.numel() <= 8 * x.shape[1]
            largest = getattr(oracle, name).abs().nan_to_num(0, 0, 0).amax().item() if few else 0.0
            noise = 8 * 2.0**-24 * largest
            assert_accurate(getattr(got, name), getattr(stock, name), getattr(oracle, name), name, noise)
    return got


def inputs(shape, dtype=torch.float32, layout="contiguous", spread=3.0):
    x = with_layout((torch.randn(shape) * spread).to(dtype), layout)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return x, target


def probabilities(x, dtype=None):
    """Rows of x's shape that sum to about 1, with zeros among them."""
    q = torch.rand(x.shape) * (torch.rand(x.shape) < 0.5)
    return (q / q.sum(1, keepdim=True).clamp(min=1)).to(dtype or x.dtype)


def pair(target, classes):
    """(a, b, share) with shares of 0 and 1 among them, and rows whose two targets are one."""
    other, share = torch.randint(0, classes, target.shape), torch.rand(target.shape)
    flat = share.view(-1)
    flat[:1], flat[1:2] = 0.0, 1.0
    other.view(-1)[2:3] = target.reshape(-1)[2:3]
    return target, other, share


def vectors(classes):
    return dict(
        weight=torch.rand(classes) + 0.1,
        alpha=torch.rand(classes) + 0.1,
        logit_adjustment=torch.randn(classes),
        margin=torch.rand(classes),
    )


# ---- values ----------------------------------------------------------------------------------------------

# One and several rows per program, blocks with a rest, peeled rows, split rows; lanes along D, narrow and wide.
SHAPES = [(3, 1), (32, 10), (5, 7), (70, 33), (300, 4), (9, 1000), (3, 1025), (2, 8142), (1, 20001), (2, 32768)]
SHAPES_3D = [(4, 19, 5), (2, 100, 33), (1, 3, 300), (3, 300, 2), (2, 5000, 8)]


@pytest.mark.sampled(3)
@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_3D, ids=str)
def test_every_size(backend, shape, dtype):
    x, target = inputs(shape, dtype)
    check(backend, x, target)


@pytest.mark.sampled(3)
@ours
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "offset", "expanded"])
@pytest.mark.parametrize("shape", [(6, 40), (3, 1001), (5, 33, 6), (2, 600, 8)], ids=str)
def test_every_layout(backend, shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, target = inputs(shape, dtype, layout)
        check(backend, x, with_layout(target, "strided"), reduction="sum", label_smoothing=0.1)
    if len(shape) == 3:  # classes contiguous: logits.transpose(1, 2) of a language model
        check(backend, x.transpose(1, 2).contiguous().transpose(1, 2), target)


@ours
def test_offsets_past_2_to_32(backend, tmp_path):
    if device_of(backend) == "cuda":
        pytest.skip("what lies far apart in a file lies together on the GPU")
    for x in far_apart(tmp_path / "logits"):
        target = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
        want = check(backend, x, target, label_smoothing=0.1).grad
        run_extra(backend, x, target, x, label_smoothing=0.1)  # the gradient takes the place of the logits
        torch.testing.assert_close(x, want, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-7)


OPTIONS = {
    "weight": lambda c: dict(weight=vectors(c)["weight"]),
    "ignore": lambda c: dict(ignore_index=1),
    "smoothing": lambda c: dict(label_smoothing=0.1),
    "smoothing-weight-alpha": lambda c: dict(
        label_smoothing=0.3, weight=vectors(c)["weight"], alpha=vectors(c)["alpha"], alpha_scale=0.5
    ),
    "focal": lambda c: dict(gamma=2.0, alpha_scale=0.25),
    "adjusted": lambda c: dict(logit_adjustment=vectors(c)["logit_adjustment"]),
    "margin": lambda c: dict(margin=vectors(c)["margin"], scale=30.0),
    "z-loss": lambda c: dict(z_loss=1e-2),
    "all": lambda c: dict(**vectors(c), gamma=1.5, scale=2.0, z_loss=1e-2, ignore_index=0, alpha_scale=2.0),
    "all-smooth": lambda c: dict(**vectors(c), label_smoothing=0.2, scale=0.5, z_loss=1e-2, ignore_index=0),
}


@pytest.mark.sampled(3)
@ours
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(backend, name, reduction):
    # whole tiles, peeled loops, split rows, lanes along D
    shapes = (((40, 12), torch.float32), ((4, 4099), torch.float64), ((3, 9, 20), torch.bfloat16))
    for shape, dtype in shapes if reduction == "mean" or backend == "cuda" else shapes[:1]:
        x, target = inputs(shape, dtype)
        grad_loss = torch.randn(target.shape if reduction == "none" else ())
        check(backend, x, target, grad_loss, reduction=reduction, **OPTIONS[name](shape[1]))


DENSE = {
    "pair": lambda c: dict(),
    "pair-all": lambda c: dict(**vectors(c), gamma=1.5, scale=2.0, z_loss=1e-2, ignore_index=0, alpha_scale=2.0),
    "pair-smooth": lambda c: dict(**vectors(c), label_smoothing=0.2, ignore_index=1),
    "smooth-focal": lambda c: dict(label_smoothing=0.1, gamma=2.0, ignore_index=0),
    "smooth-focal-all": lambda c: dict(**vectors(c), label_smoothing=0.2, gamma=0.5, scale=2.0, z_loss=1e-2),
    "pair-smooth-focal": lambda c: dict(**vectors(c), label_smoothing=0.1, gamma=1.0, ignore_index=0),
    "probabilities": lambda c: dict(),
    "probabilities-all": lambda c: dict(
        **vectors(c), gamma=2.0, label_smoothing=0.1, scale=2.0, z_loss=1e-2, alpha_scale=2.0
    ),
    "probabilities-smooth": lambda c: dict(label_smoothing=0.3, weight=vectors(c)["weight"]),
}


def target_for(name, x, target, dtype=None):
    if name.startswith("pair"):
        return pair(target, x.shape[1])
    return probabilities(x, dtype) if name.startswith("probabilities") else target


@pytest.mark.sampled(3)
@ours
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", DENSE)
def test_every_kind_of_target(backend, name, reduction):
    """Two targets with a share, probabilities, smoothing with gamma; whole rows and rows that no block holds."""
    shapes = [((40, 12), torch.float32), ((5, 77), torch.bfloat16), ((3, 9, 20), torch.float64)]
    shapes += [((1, 8200), torch.float32), ((1, 1100, 9), torch.float32)]
    for shape, dtype in shapes if reduction == "mean" else shapes[1:2]:
        x, target = inputs(shape, dtype)
        grad_loss = torch.randn(target.shape if reduction == "none" else ())
        check(backend, x, target_for(name, x, target), grad_loss, reduction=reduction, **DENSE[name](shape[1]))


@ours
def test_layouts_of_probabilities_and_pairs(backend):
    dtypes = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    for shape in ((6, 40), (3, 1001), (5, 33, 6)):
        for layout, other in (("transposed", "contiguous"), ("strided", "sliced"), ("offset", "offset")):
            for dtype, kept in dtypes if backend != "triton" else dtypes[:1]:
                x, target = inputs(shape, dtype, layout)
                check(backend, x, with_layout(probabilities(x, kept), other), gamma=1.0)
                a, b, share = pair(target, shape[1])
                twice = with_layout(a, "strided"), with_layout(b.int(), "transposed"), share[:1].expand(share.shape)
                check(backend, x, twice, label_smoothing=0.1)


@pytest.mark.sampled(2)
@ours
@pytest.mark.parametrize("name", ["probabilities", "pair", "smooth-focal"])
def test_a_class_without_a_share_may_be_impossible(backend, name):
    """A share of 0 of a class with p = 0 adds nothing; a share above 0 makes the loss infinite, as in PyTorch."""
    for shape in ((4, 10), (1, 20000)):
        x, target = inputs(shape)
        options = DENSE[name](shape[1])
        if name == "pair":
            target = torch.zeros_like(target), torch.ones_like(target), torch.zeros(target.shape)
        elif name == "probabilities":
            target = probabilities(x)
            target[:, 0] = 0
        else:
            options["weight"] = torch.ones(shape[1])
            options["weight"][0] = 0
            target.fill_(1)
        x[:, 0] = -torch.inf
        got = check(backend, x, target, reduction="none", **options)
        assert got.loss.isfinite().all() and got.grad.isfinite().all()
        x[:, 1] = -torch.inf
        if name == "probabilities":
            target[:, 1] = 0.5
        assert run(backend, x, target, reduction="none", **options).loss.isposinf().all()


@ours
def test_probabilities_that_are_certain_keep_their_digits(backend):
    x = torch.zeros(3, 2, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor([2.0, 7.0, 10.0])
    target = torch.tensor([[1.0, 0.0]] * 3)
    for gamma in (0.0, 1.0):
        got = run(backend, x, target, reduction="sum", gamma=gamma).grad[:, 0].double()
        want = expect(x.double(), target, reduction="sum", gamma=gamma).grad[:, 0]
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)


# ---- what the forward knows besides the loss ---------------------------------------------------------------


EXTRA_SHAPES = [(3, 1), (40, 12), (9, 1000), (5, 1025), (2, 8142), (1, 17001), (3, 9, 20), (1, 2500, 8)]


@pytest.mark.sampled(5)
@ours
@pytest.mark.parametrize("shape", EXTRA_SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_forward_tells_losses_argmax_and_gradient(backend, shape, reduction):
    names, dtypes = ["plain", *OPTIONS, *DENSE], (torch.float32, torch.bfloat16, torch.float64)
    one = (EXTRA_SHAPES.index(shape) + REDUCTIONS.index(reduction)) % 3
    for i, dtype in enumerate(dtypes):
        if backend == "triton" and i != one:
            continue  # the interpreter is slow
        name = names[(EXTRA_SHAPES.index(shape) + 7 * i + 3 * REDUCTIONS.index(reduction)) % len(names)]
        x, target = inputs(shape, dtype)
        x = x.round() if i == 0 else x  # several largest ones
        target = target_for(name, x, target)
        options = (OPTIONS | DENSE)[name](shape[1]) if name != "plain" else {}
        apart = run(backend, x, target, reduction=reduction, **options)
        losses = run(backend, x, target, reduction="none", fp32_loss=True, **options).loss
        y = x.clone()
        got = run_extra(backend, y, target, torch.empty_like(y) if i == 1 else y, reduction=reduction, **options)
        # the same formula, its sums in the order of another tile
        unit, wide = torch.finfo(dtype).eps, 64 * torch.finfo(got.lse.dtype).eps
        assert_same = partial(torch.testing.assert_close, equal_nan=True)
        assert_same(got.loss, apart.loss, rtol=unit + wide, atol=wide)
        assert_same(got.lse.sum(0), apart.lse.sum(0), rtol=wide, atol=wide)
        assert_same(got.denominator, apart.denominator, rtol=wide, atol=0)
        assert_same(got.losses, losses.to(got.losses.dtype), rtol=wide, atol=wide)
        largest = apart.grad.nan_to_num(0, 0, 0).abs().max().item()
        assert_same(got.grad, apart.grad, rtol=2 * unit, atol=wide * largest)
        kept = torch.ones(losses.shape, dtype=torch.bool)
        if not name.startswith("probabilities"):
            for a in target[:2] if isinstance(target, tuple) else (target,):
                kept &= a != options.get("ignore_index", -100)
        assert torch.equal(got.argmax[kept], x.argmax(1)[kept])


@pytest.mark.sampled(2)
@ours
@pytest.mark.parametrize("name", ["all", "smooth-focal", "probabilities"])
def test_the_gradient_in_the_forward_may_lie_otherwise_than_the_logits(backend, name):
    for shape, layout in (((40, 12), "strided"), ((40, 12), "transposed"), ((9, 12, 33), "transposed")):
        x, target = inputs(shape, layout=layout)
        target, options = target_for(name, x, target), BUDGET_OPTIONS[name](12)
        grad = run_extra(backend, x, target, torch.empty(shape), **options).grad
        torch.testing.assert_close(grad, expect(x, target, **options).grad, rtol=1e-5, atol=1e-7)


@ours
def test_extras_come_alone_too(backend):
    x, target = inputs((20, 300))
    want = run(backend, x, target)
    for losses, argmax, grad in ((True, False, False), (False, True, False), (False, False, True)):
        got = run_extra(backend, x, target, torch.empty_like(x) if grad else None, losses, argmax)
        assert torch.equal(got.loss, want.loss)
        assert got.losses.shape == ((20,) if losses else (0,)) and got.argmax.shape == ((20,) if argmax else (0,))
        assert got.argmax.dtype == torch.int64
        if grad:
            torch.testing.assert_close(got.grad, want.grad)


@ours
def test_argmax_is_the_lowest_among_equals_wherever_it_stands(backend):
    for shape in ((6, 50), (2, 5001), (1, 20001), (2, 700, 9)):
        for dtype in (torch.float32, torch.bfloat16):
            x, target = torch.zeros(shape, dtype=dtype), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
            for row in range(shape[0]):
                x[row, -1] = x[row, row * shape[1] // shape[0] + 1] = 1.0
            got = run_extra(backend, x, target, logit_adjustment=torch.randn(shape[1]))
            assert torch.equal(got.argmax, x.argmax(1))
            assert (run_extra(backend, torch.full(shape, -torch.inf, dtype=dtype), target).argmax == 0).all()
            x[:, 0 : shape[1] // 3 : 2] = torch.nan
            got = run_extra(backend, x, target)
            assert torch.equal(got.argmax, x.nan_to_num(-torch.inf).argmax(1))


@ours
@pytest.mark.parametrize("shape", [(6, 10), (2, 17001), (3, 700, 4)], ids=str)
def test_the_gradient_of_ignored_rows_is_zero_in_place(backend, shape):
    x, target = inputs(shape)
    target[1] = -100
    x[1] = torch.nan
    every_option = ({}, dict(gamma=2.0, label_smoothing=0.1))
    for options in every_option if backend != "triton" else every_option[shape[1] > 10000 :]:
        y = x.clone()
        got = run_extra(backend, y, target, y, **options)
        assert got.loss.isfinite() and (y[1] == 0).all() and y.isfinite().all() and (got.losses[1] == 0).all()
        assert got.argmax.amin() >= 0 and got.argmax.amax() < shape[1]  # of the row of NaN too
    y = x.clone()
    run_extra(backend, y, target.fill_(-100), y)
    assert (y == 0).all()


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scale_gradient(backend, dtype):
    for layout in ("contiguous", "transposed", "offset", "sliced"):
        for shape in ((0, 3), (5, 7), (40, 1001)):
            x = with_layout(torch.randn(shape).to(dtype), layout)
            if torch.ops.aten.is_non_overlapping_and_dense(x) or backend == "triton":
                want = (x.double() * 0.3).to(dtype)
                kernels = kernels_of(backend)
                same = x.clone()
                kernels.scale_gradient_(x, torch.ones((), dtype=dtype))
                assert torch.equal(x, same)
                factor = torch.tensor(0.3, dtype=dtype)
                want = (x.double() * factor.double()).to(dtype)
                kernels.scale_gradient_(x, factor)
                torch.testing.assert_close(x, want, rtol=torch.finfo(dtype).eps, atol=0)
                x[..., ::3] = 0
                kernels.scale_gradient_(x, torch.tensor(torch.inf, dtype=dtype))
                assert torch.equal(x, torch.where(x == 0, x, x.sign() * torch.inf))


@ours
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    classes = rng.choice([1, 2, 3, 10, 31, 64, 100, 1000, 1023, 2500])
    shape = rng.choice([(rng.randint(1, 50), classes), (rng.randint(1, 5), classes, rng.randint(1, 40))])
    layout = rng.choice(["contiguous", "transposed", "sliced", "strided", "offset", "expanded"])
    x, target = inputs(shape, rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]), layout)
    options = dict(ignore_index=rng.choice([-100, 0, classes - 1]), reduction=rng.choice(REDUCTIONS))
    options |= {name: vector for name, vector in vectors(classes).items() if rng.random() < 0.4}
    options["gamma"] = rng.choice([0.0, 0.0, 0.5, 1.0, 2.0, 5.0])
    options["label_smoothing"] = 0.0 if options["gamma"] else rng.choice([0.0, 0.1, 1.0])
    options |= dict(alpha_scale=rng.choice([1.0, 0.3]), scale=rng.choice([1.0, 4.0]), z_loss=rng.choice([0.0, 1e-3]))
    target = target.to(rng.choice([torch.int64, torch.int32, torch.uint8]) if classes < 256 else torch.int64)
    check(backend, x, target, torch.randn(target.shape if options["reduction"] == "none" else ()), **options)


@ours
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_target_types(backend, dtype):
    x, target = inputs((30, 17))
    target[::3] = 255
    check(backend, x, target.to(dtype), ignore_index=255)


# ---- hard values -----------------------------------------------------------------------------------------


@ours
@pytest.mark.parametrize("shape", [(6, 10), (3, 5001), (3, 700, 4)], ids=str)
def test_ignored_rows_hide_nan_and_get_zero(backend, shape):
    x, target = inputs(shape)
    target[1] = -100
    x[1] = torch.nan
    for options in ({}, dict(label_smoothing=0.1), dict(gamma=2.0, z_loss=0.1), vectors(shape[1])):
        got = run(backend, x, target, **options)
        assert got.loss.isfinite()
        assert (got.grad[1] == 0).all() and got.grad.isfinite().all()


@ours
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("all_ignored", ["nan", "zero"])
def test_all_rows_ignored(backend, reduction, all_ignored):
    x, target = inputs((5, 12))
    got = run(backend, x, target.fill_(-100), reduction=reduction, all_ignored=all_ignored)
    if reduction == "mean" and all_ignored == "nan":
        assert got.loss.isnan()
    else:
        assert (got.loss == 0).all()
    assert (got.grad == 0).all()


@ours
def test_no_rows(backend):
    for shape in ((0, 20000), (0, 700, 5), (3, 700, 0)):  # rows that would be split over blocks
        x, target = inputs(shape)
        assert run_extra(backend, x, target, torch.empty_like(x)).loss.isnan()
        assert run(backend, x, target, label_smoothing=0.1, gamma=2.0).grad.shape == shape
    x, target = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert run(backend, x, target).loss.isnan()
    assert run(backend, x, target, all_ignored="zero").loss == 0
    assert run(backend, x, target, reduction="sum").loss == 0
    assert run(backend, x, target, reduction="none").loss.shape == (0,)


@pytest.mark.sampled(2)
@ours
@pytest.mark.parametrize("shape", [(4, 10), (2, 9001), (2, 600, 5)], ids=str)
def test_minus_infinity(backend, shape):
    """A single class, the first half of a row (a whole block of a long one), all but the target, the target."""
    for kind in ("one", "half", "rest", "target"):
        x, target = inputs(shape)
        target.fill_(shape[1] - 1)
        if kind == "one":
            x[:, 0] = -torch.inf
        if kind == "half":
            x[:, : shape[1] // 2] = -torch.inf
        if kind == "rest":
            x[:, :-1] = -torch.inf
        if kind == "target":
            x[:, -1] = -torch.inf
        got = check(backend, x, target, reduction="none")
        if kind == "rest":
            assert (got.loss == 0).all()
    assert run(backend, torch.full(shape, -torch.inf), target).loss.isnan()


@ours
@pytest.mark.parametrize("level", [1e4, -200.0, 1e8, -1e8])
def test_large_logits(backend, level):
    for shape in ((6, 30), (2, 5001)):
        x, target = inputs(shape)
        check(backend, x + level, target)
        check(backend, x + level, target, label_smoothing=0.1)


def exact_focal(gap, gamma):
    """Loss and gradient of the target for one logit `gap` above two others, from formulas that keep all digits."""
    others = math.log(2) - gap.double()  # log of the others' share against the target's
    nll, u, p = torch.nn.functional.softplus(others, threshold=800), others.sigmoid(), (-others).sigmoid()
    ratio = torch.where(u == 0, 1.0, p * nll / u.clamp(min=1e-300))
    return u, u**gamma * nll, -(u ** (1 + gamma)) * (1 + gamma * ratio)


@ours
@pytest.mark.parametrize("gamma", [0.0, 0.001, 0.5, 1.0, 2.0, 5.0])
def test_focal_from_certainty_to_error(backend, gamma):
    """p_t from 1 (exactly) to 0 (exactly): values and gradients are finite and right, the loss never negative."""
    gap = torch.tensor([-1e3, -100.0, -20, -1, 0, 1, 5, 7, 10, 14, 17, 20, 50, 100, 1e3])
    u, loss, slope = exact_focal(gap, gamma)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.zeros(len(gap), 3, dtype=dtype)
        x[:, 1] = gap.to(dtype)
        got = run(backend, x, torch.ones(len(gap), dtype=torch.int64), gamma=gamma, reduction="none")
        assert got.loss.isfinite().all() and (got.loss >= 0).all() and got.grad.isfinite().all()
        # log Σ exp is known to one unit near 1, and so is −log p_t: u is off by that, u^(1+γ) by its slope times that
        unit = 2 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        off = (1 + gamma) ** 2 * unit * (u + unit) ** gamma
        relative = torch.finfo(dtype).eps + 100 * (1 + gamma) * unit
        assert ((got.loss.double() - loss).abs() <= off + relative * loss).all()
        assert ((got.grad[:, 1].double() - slope).abs() <= off + relative * slope.abs()).all()
        torch.testing.assert_close(got.grad[:, 0], got.grad[:, 2], rtol=0, atol=0)


@ours
def test_the_gradient_of_a_certain_target_keeps_its_digits(backend):
    """p_t of 0.999 and more in bf16: the gradient p_t − 1 must not be taken from a rounded p_t."""
    x = torch.zeros(3, 2, dtype=torch.bfloat16)
    x[:, 0] = torch.tensor([2.0, 7.0, 10.0])
    got = run(backend, x, torch.zeros(3, dtype=torch.int64), reduction="sum").grad[:, 0].double()
    torch.testing.assert_close(got, -(-x[:, 0].double()).sigmoid(), rtol=2**-8, atol=0)


@ours
@pytest.mark.parametrize("bad", [-1, 10, 1 << 40])
def test_a_target_out_of_range_is_an_assertion(backend, bad):
    if device_of(backend) == "cuda":
        pytest.skip("a device-side assertion ends the use of the GPU in this process")
    x, target = inputs((4, 10))
    target[2] = bad
    for options in ({}, vectors(10), dict(label_smoothing=0.1, gamma=2.0)):
        for named in (target, (target.clamp(0, 9), target, torch.rand(4))):
            with pytest.raises(Exception, match=r"out of range|__trap"):
                run(backend, x, named, **options)


@ours
def test_same_input_same_bits(backend):
    x, target = inputs((37, 1001), torch.bfloat16)
    first, second = (run(backend, x, target, label_smoothing=0.1) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.grad, second.grad)


@ours
def test_outputs_keep_to_the_operator(backend):
    x, target = inputs((4, 6, 5), torch.bfloat16)
    got = run(backend, x, target, reduction="none", fp32_loss=True)
    assert got.loss.dtype == torch.float32 and got.loss.shape == (4, 5) and got.denominator == 1
    z = x.double()
    torch.testing.assert_close(got.lse.double().sum(0), z.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(got.lse[0], x.amax(1).float())
    assert run(backend, x, target, reduction="mean").denominator == 20


# ---- sigmoid focal loss -----------------------------------------------------------------------------------


def run_sigmoid(backend, x, target, reduce, alpha=0.25, gamma=2.0, weight=None, normalizer=None, scale=1.0, grad=None):
    kernels = kernels_of(backend)
    loss = kernels.sigmoid_focal_forward(x, target, weight, normalizer, alpha, gamma, reduce, scale, False)
    grad = torch.ones_like(loss) if grad is None else grad.to(loss.dtype)
    return loss, kernels.sigmoid_focal_backward(grad, x, target, weight, normalizer, alpha, gamma, reduce, scale)


def expect_sigmoid(x, target, reduce, alpha=0.25, gamma=2.0, weight=None, normalizer=None, scale=1.0, grad=None):
    x = x.detach().clone().requires_grad_()
    target = target.to(x.dtype) if target.is_floating_point() else target
    loss = scale * sigmoid_focal_loss_reference(
        x, target, alpha, gamma, "sum" if reduce else "none", weight, normalizer
    )
    loss.backward(torch.ones_like(loss) if grad is None else grad.to(loss.dtype))
    return loss.detach(), x.grad


@ours
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("reduce", [True, False], ids=["reduced", "each"])
@pytest.mark.parametrize("indices", [True, False], ids=["indices", "dense"])
def test_sigmoid_focal(backend, indices, reduce, gamma):
    sizes = ((5, 7, torch.float64), (64, 80, torch.float32), (33, 91, torch.bfloat16), (60, 400, torch.float16))
    for rows, classes, dtype in sizes:
        x = (6 * torch.randn(rows, classes)).to(dtype)
        target = torch.randint(-1, classes + 2, (rows,)) if indices else torch.rand(rows, classes).round(decimals=1)
        target = target.to(dtype) if not indices else target.to(torch.int32 if rows == 64 else torch.int64)
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        options = dict(alpha=-1.0 if gamma == 1.5 else 0.25, gamma=gamma, scale=0.5)
        if gamma == 2.0:
            options["weight"] = torch.rand(classes, dtype=accumulate)
        if reduce and gamma == 0.5:
            options["normalizer"] = torch.tensor(0.0 if rows == 5 else 3.0, dtype=accumulate)
        options["grad"] = torch.randn(() if reduce else x.shape)
        got = run_sigmoid(backend, x, target, reduce, **options)
        exact = expect_sigmoid(x.double(), target, reduce, **options)
        for ours_, oracle in zip(got, exact, strict=True):
            # rounding of the result; a dozen operations; a sum of n terms in blocks; x·ulp of the exponential
            unit = torch.finfo(accumulate).eps
            bound = torch.finfo(dtype).eps + (32 + 2 * x.abs().max().item()) * unit
            info = torch.finfo(dtype)
            # between 0 and 1, the derivative is a difference that vanishes somewhere
            tiny = max((1e-3 if indices else 4.0) * unit, info.smallest_normal * info.eps)
            torch.testing.assert_close(ours_.double(), oracle, rtol=bound, atol=tiny)


@ours
def test_sigmoid_focal_is_finite_at_the_ends(backend):
    x = torch.tensor([[-1e4, -200.0, -90, -17, 0, 17, 90, 200, 1e4]])
    for gamma in (0.0, 0.01, 1.0, 2.0):
        for target in (torch.zeros_like(x), torch.ones_like(x)):
            loss, grad = run_sigmoid(backend, x, target, False, gamma=gamma)
            assert loss.isfinite().all() and (loss >= 0).all() and grad.isfinite().all()


@ours
def test_sigmoid_focal_of_nothing(backend):
    x, target = torch.empty(0, 5), torch.empty(0, dtype=torch.int64)
    assert run_sigmoid(backend, x, target, True)[0] == 0
    assert run_sigmoid(backend, x, target, False)[0].shape == (0, 5)


def with_gaps(rows, classes, gap):
    """Rows as of a slice of the classes: aligned to 16 bytes, if classes and gap are, or not."""
    return torch.randn(rows, classes + gap)[:, :classes] if gap % 4 == 0 else torch.randn(rows, classes + gap)[:, gap:]


@pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_interpreter), pytest.param("host", marks=needs_cudahost)]
)
@pytest.mark.parametrize("kind", ["indices", "dense", "dense with gaps", "bytes"])
@pytest.mark.parametrize(("classes", "gap"), [(91, 0), (91, 1), (80, 16)], ids=["rows", "odd slice", "even slice"])
def test_sigmoid_focal_bytes(backend, kind, classes, gap):
    """The logits once each way, dense targets once, the gradient once; class indices stay indices. What lies between
    the rows of a slice is not read."""
    from tests.proving.sanitizer import sanitize
    from tests.proving.traffic import traffic

    x = with_gaps(33, classes, gap)
    target = {
        "indices": torch.randint(0, classes, (33,)),
        "dense": torch.rand(33, classes),
        "dense with gaps": with_gaps(33, classes, 8).abs().clamp(max=1),
        "bytes": (with_gaps(33, classes, 3) > 0).view(torch.uint8),
    }[kind]
    with traffic() as log:
        run_sigmoid(backend, x, target, True)
    forward, *total, backward = log
    assert (forward.reads(x) == 1).all() and (backward.reads(x) == 1).all()
    assert all(launch.loaded <= 64 for launch in total)
    targets = target.nbytes
    if kind == "indices":
        targets = 8 * x.numel()  # that of the row, for each element
    else:
        assert (forward.reads(target) == 1).all() and (backward.reads(target) == 1).all()
    assert forward.loaded <= x.numel() * 4 + targets + 64 and backward.loaded <= x.numel() * 4 + targets + 1024
    assert forward.stored <= 64 and backward.stored == x.numel() * 4
    if backend == "triton":
        with sanitize():
            run_sigmoid(backend, x, target, True)


# ---- Triton: bytes, addresses, races, padding --------------------------------------------------------------


BYTE_SHAPES = [(64, 10), (16, 1000), (4, 20, 300), (64, 100), (4, 8142), (2, 50257), (2, 2200, 40)]


LONG = ("probabilities", (2, 2200, 40))  # which no block holds: read a second time
BUDGET_OPTIONS = {"plain": lambda c: {}, **OPTIONS, **DENSE}


@pytest.mark.sampled(4)
@needs_interpreter
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name,
            shape,
            marks=() if name == "plain" or shape == BYTE_SHAPES[1] or (name, shape) == LONG else pytest.mark.slow,
        )
        for name in BUDGET_OPTIONS
        for shape in BYTE_SHAPES
    ],
    ids=str,
)
def test_bytes(name, shape):
    """At most 1.02 times the budget: forward, the logits (and probabilities) once; backward, the same and the gradient
    written once. Rows that no block holds, if every class has a share, are read a second time in the forward. Vectors
    of one element per row or class are all that comes on top; and where rows are split, four numbers per row and
    program: of 264 programs with 32 rows at most, so never more than 135 KB. And each program looks up the logits of
    its rows' targets, which where strided classes are dealt out by 32 to 64 is one or two more in a piece."""
    from tests.proving.traffic import traffic

    x, target = inputs(shape)
    target = target_for(name, x, target)
    options = BUDGET_OPTIONS[name](shape[1])
    options.pop("ignore_index", None)
    with traffic() as log:
        run("triton", x, target, **options)
    probabilities = name.startswith("probabilities")
    # a tile of 8,192 elements; of 8 rows, where rows lie side by side
    twice = shape[1] > (8192 if len(shape) == 2 else 1024) and (probabilities or "smooth-focal" in name)
    backward = log.kernels.index("_backward")
    rows = x.numel() // shape[1]
    small = 32 * sum(launch.kernel in ("_forward", "_backward", "_dense") for launch in log) * rows + 4096
    looked_up = rows * (1 + name.startswith("pair")) if shape[1] > 128 else 0  # a target's logit each
    if len(shape) == 3 and "_merge_splits" in log.kernels:
        pieces = -(-shape[1] // 32)
        small += 16 * rows * min(264 // (shape[0] * -(-shape[2] // 32)), pieces)
        looked_up = rows * pieces * (2 if name.startswith("pair") else 1)
    for launches, times, written in ((log[:backward], 1 + twice, 0), (log[backward:], 1, x.nbytes)):
        reads, writes = (sum(getattr(launch, kind)(x) for launch in launches) for kind in ("reads", "writes"))
        assert (reads >= 1).all() and (writes == 0).all()
        assert reads.sum() <= (1.02 * times if shape[1] > 1024 else times) * x.numel() + looked_up
        if probabilities:
            assert sum(launch.reads(target) for launch in launches).sum() <= times * x.numel() * 1.02
        budget = times * (1 + probabilities) * x.nbytes + written
        assert sum(launch.stored for launch in launches) <= written + 0.02 * budget + small
    assert len(log[backward:]) == 1 and len(log) <= (6 if twice else 4)


@needs_interpreter
@pytest.mark.parametrize("name", ["plain", "all", "pair", "smooth-focal", "probabilities"])
def test_bytes_of_the_gradient_in_the_forward(name):
    """One read and one write of rows that fit on the chip, argmax and losses included; longer rows a second read."""
    from tests.proving.traffic import traffic

    cases = [((16, 1000), torch.float32, 1), ((2, 8001), torch.bfloat16, 1), ((2, 17, 64), torch.float32, 1)]
    for shape, dtype, times in (*cases, ((40, 40), torch.float32, 1), ((1, 60000), torch.bfloat16, 2)):
        x, target = inputs(shape, dtype)
        target, options = target_for(name, x, target), BUDGET_OPTIONS[name](shape[1])
        options.pop("ignore_index", None)
        for in_place in (True, False)[: 3 - times]:
            y = x.clone()
            grad = y if in_place else torch.empty_like(y)
            with traffic() as log:
                run_extra("triton", y, target, grad, **options)
            assert (log.writes(grad) == 1).all() and (log.reads(y) >= 1).all()
            reads = times + (times == 2 and name in ("smooth-focal", "probabilities"))
            assert log.reads(y).sum() <= 1.02 * reads * y.numel()
            budget = reads * y.nbytes + grad.nbytes
            assert log.stored - grad.nbytes <= 0.02 * budget + 64 * target_rows(x) + 64


def target_rows(x):
    return x.numel() // x.shape[1]


@needs_interpreter
def test_a_gradient_times_one_costs_nothing():
    from tests.proving.traffic import traffic

    grad = torch.randn(40, 1001)
    with traffic() as log:
        _triton().scale_gradient_(grad, torch.ones(()))
        assert (log.reads(grad) == 0).all() and log.stored == 0
        _triton().scale_gradient_(grad, torch.full((), 2.0))
    assert (log.reads(grad) == 1).all() and (log.writes(grad) == 1).all()


@needs_interpreter
def test_small_calls_are_one_launch_each_way():
    from tests.proving.traffic import traffic

    x, target = inputs((32, 10))
    with traffic() as log:
        run("triton", x, target)
    assert log.kernels == ["_forward", "_backward"]


@needs_interpreter
def test_ignored_rows_are_not_read():
    from tests.proving.traffic import traffic

    x, target = inputs((32, 100))
    target[5] = -100
    with traffic() as log:
        run("triton", x, target)
    assert (log.reads(x)[5] == 0).all() and (log.reads(x)[6] == 2).all()


@needs_interpreter
@pytest.mark.parametrize(
    "shape",
    [(5, 10), (3, 1001), (1, 8400), pytest.param((1, 17000), marks=pytest.mark.slow), (2, 30, 70), (2, 5, 3)],
    ids=str,
)
def test_addresses_races_and_padding(shape):
    from tests.proving.sanitizer import POISONS, sanitize

    options = dict(**vectors(shape[1]), label_smoothing=0.1, scale=2.0, z_loss=0.01, ignore_index=0)
    x, target = inputs(shape, torch.bfloat16, "sliced")
    want = run("triton", x, target, **options)
    for seed, poison in enumerate(POISONS):
        with sanitize(seed=seed, poison=poison):
            got = run("triton", x, target, **options)
        assert torch.equal(got.loss, want.loss) and torch.equal(got.grad, want.grad)


@needs_interpreter
@pytest.mark.parametrize("shape", [(1, 128256), (2, 50257), (1, 1 << 20)], ids=str)
def test_few_long_rows_fill_the_gpu(shape):
    """Every multiprocessor of 132 has a program, or has at most 2 KB to read, a warp's vectors."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    layout = _triton()._layout([x.unsqueeze(2)])
    for limit in (16384, 8192):
        tile = _triton()._tile(layout, shape[0], 1, shape[1], 2, limit)
        blocks = -(-shape[1] // tile.block)
        assert shape[0] * blocks >= 132 or tile.block <= 1024
        assert limit == 8192 or tile.splits == min(blocks, 264 // shape[0])


@needs_interpreter
@pytest.mark.parametrize(("shape", "dtype"), [((1, 1 << 28), torch.bfloat16), ((1, 1 << 22, 64), torch.float64)])
def test_grids_of_very_long_rows(shape, dtype, monkeypatch):
    """Their first axis ends at 2^31, the others at 65,535. Nothing is run, so no memory is touched."""
    grids = []

    class Launcher:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    for kernel in ("_forward", "_merge_splits", "_dense", "_finish_dense", "_sum_partials", "_backward"):
        monkeypatch.setattr(_triton(), kernel, Launcher())
    x = torch.empty(shape, dtype=dtype)
    for options in ({}, DENSE["smooth-focal"](1)):
        run("triton", x, torch.zeros(1, *shape[2:], dtype=torch.int64), **options)
    assert len(grids) >= 7
    assert all(first < 2**31 and max(others, default=1) <= 65535 for first, *others in grids), grids


@needs_interpreter
def test_many_programs_leave_many_sums(monkeypatch):
    """The sum over programs in two stages."""
    monkeypatch.setattr(_triton(), "SUM_BLOCK", 4)
    x, target = inputs((300, 40))
    monkeypatch.setattr(_triton(), "_multiprocessors", lambda: 1000)
    check("triton", x, target)


# ---- what the compilers make of them ----------------------------------------------------------------------


def _compile_call(shape, dtype, **options):
    run("triton", torch.empty(shape, dtype=dtype), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64), **options)


def compile_aligned():
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((4096, 1000), (4096, 32000), (8, 128256), (8, 24, 4096)):
            _compile_call(shape, dtype)
        for x in (torch.empty(4096, 80, dtype=dtype), torch.empty(4096, 96, dtype=dtype)[:, :80]):
            for target in (torch.empty_like(x), x, torch.zeros(4096, dtype=torch.int64)):
                run_sigmoid("triton", x, target, True)


def compile_odd():
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((4096, 1001), (4096, 8142), (4096, 50257)):
            _compile_call(shape, dtype)


def compile_odd_options():
    """Whose rows' two ends stand in registers beside what the options take; as it is at most, and with two targets."""
    for classes in (101, 201, 1001, 3001):
        x, target = torch.empty(4096, classes, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int64)
        for name in ("margin", "all-smooth", "pair-all", "pair-smooth"):
            run("triton", x, target_for(name, x, target), **BUDGET_OPTIONS[name](classes))


def compile_options():
    for name in OPTIONS:
        for shape in ((4096, 1000), (4096, 32000)):
            _compile_call(shape, torch.bfloat16, **OPTIONS[name](shape[1]))


def compile_dense():
    """Two loads of 16 bytes per thread and tensor: every class has its own logarithms."""
    for name in ("probabilities", "probabilities-all", "smooth-focal", "smooth-focal-all"):
        for shape, dtype in (
            ((4096, 1000), torch.bfloat16),
            ((4096, 8192), torch.bfloat16),
            ((512, 32000), torch.float32),
        ):
            target = torch.zeros(shape[0], dtype=torch.int64)
            x = torch.empty(shape, dtype=dtype)
            run("triton", x, x if name.startswith("prob") else target, **DENSE[name](shape[1]))


def compile_dense_odd(classes="1001"):
    """Rows whose two ends stand in registers too."""
    for dtype in (torch.bfloat16, torch.float32):
        x, target = torch.empty(4096, int(classes), dtype=dtype), torch.zeros(4096, dtype=torch.int64)
        for name in ("probabilities", "probabilities-all", "smooth-focal", "smooth-focal-all", "pair-smooth-focal"):
            run("triton", x, target_for(name, x, target), **DENSE[name](x.shape[1]))


def compile_short_rows():
    """Of two classes, which many rows of a program have; what is known of each row takes registers."""
    x, target = torch.empty(2_000_000, 2, dtype=torch.bfloat16), torch.zeros(2_000_000, dtype=torch.int64)
    for name in ("plain", "all-smooth", "pair-all", "smooth-focal-all"):
        run("triton", x, target_for(name, x, target), **BUDGET_OPTIONS[name](2))


def compile_one_long_row():
    """Which 245 programs share, whose parts are merged."""
    x, target = torch.empty(1, 1_000_000, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    for name in ("plain", "all-smooth", "smooth-focal"):
        run("triton", x, target, **BUDGET_OPTIONS[name](x.shape[1]))


@needs_ptxas
@pytest.mark.parametrize("calls", ["compile_short_rows", "compile_one_long_row"])
@pytest.mark.slow
def test_the_shortest_and_the_longest_rows_do_not_spill(calls):
    (launches,) = cubin.launch_facts(f"tests.test_losses_gpu:{calls}").values()
    assert launches and all(facts.spills == 0 for facts in launches), [f for f in launches if f.spills]


def compile_pairs():
    target = torch.zeros(4096, dtype=torch.int64)
    for name in ("pair", "pair-all", "pair-smooth"):
        for classes in (1000, 32000):
            x = torch.empty(4096, classes, dtype=torch.bfloat16)
            run("triton", x, (target, target, torch.empty(4096)), **DENSE[name](classes))


def compile_extra():
    """The gradient in the forward, with the argmax: rows that stay in registers, and rows read twice."""
    for name, shape, dtype in (
        ("plain", (4096, 1000), torch.bfloat16), ("all", (4096, 1000), torch.bfloat16),
        ("plain", (4096, 16384), torch.bfloat16), ("plain", (4096, 8192), torch.float32),
        ("all-smooth", (4096, 8192), torch.bfloat16), ("plain", (4096, 32000), torch.bfloat16),
        ("all", (4096, 32000), torch.bfloat16), ("plain", (8, 24, 4096), torch.bfloat16),
        ("smooth-focal", (4096, 1000), torch.bfloat16),
    ):  # fmt: skip
        x, target = torch.empty(shape, dtype=dtype), torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
        run_extra("triton", x, target, torch.empty_like(x), **BUDGET_OPTIONS[name](shape[1]))
    _triton().scale_gradient_(torch.empty(4096, 1000), torch.ones(()))


@needs_ptxas
@pytest.mark.parametrize(
    "calls", ["compile_dense", "compile_dense_odd", "compile_odd_options", "compile_pairs", "compile_extra"]
)
@pytest.mark.slow
def test_all_options_keep_to_registers_and_wide_accesses(calls):
    (launches,) = cubin.launch_facts(f"tests.test_losses_gpu:{calls}").values()
    for facts in launches:
        assert facts.spills == 0, facts
        if facts.kernel in ("_forward", "_backward", "_dense", "_scale_gradient"):
            assert facts.loads.get(128, 0) >= 2, facts
        if facts.kernel in ("_backward", "_scale_gradient") or (
            facts.kernel == "_forward" and calls == "compile_extra"
        ):
            assert facts.stores.get(128, 0) >= 1, facts


@needs_ptxas
@pytest.mark.slow
def test_the_widest_odd_rows_that_wait_for_their_terms_do_not_spill():
    """The forward of 4,097 to 8,192 classes that all have a share: 32 warps, which have 64 registers each and no more.
    To read such rows twice would cost a third of the traffic."""
    (launches,) = cubin.launch_facts("tests.test_losses_gpu:compile_dense_odd:4097").values()
    assert {facts.warps for facts in launches if facts.kernel == "_forward"} == {32}
    assert all(facts.spills == 0 for facts in launches), [facts for facts in launches if facts.spills]


@needs_ptxas
@pytest.mark.parametrize(
    ("calls", "architectures"),
    [
        ("compile_aligned", (90,)),
        pytest.param("compile_aligned", (80, 100, 120), marks=pytest.mark.slow),
        pytest.param("compile_odd", cubin.ARCHITECTURES, marks=pytest.mark.slow),
        pytest.param("compile_options", cubin.ARCHITECTURES, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_spills_and_wide_accesses(calls, architectures):
    (launches,) = cubin.launch_facts(f"tests.test_losses_gpu:{calls}", architectures=architectures).values()
    for facts in launches:
        assert facts.spills == 0, facts
        if facts.kernel in ("_forward", "_backward", "_sigmoid_focal"):  # 64 bytes per thread in accesses of 16
            assert facts.loads.get(128, 0) >= 4, facts
            narrow = 0 if calls == "compile_aligned" else 2
        if (
            facts.kernel == "_forward" and facts.issued and calls == "compile_aligned"
        ):  # of 99 that an H200 has time for
            assert facts.issued <= 75, facts
        if facts.kernel == "_backward":
            assert facts.stores.get(128, 0) == 4, facts
            assert sum(facts.stores.values()) <= 4 + narrow, facts


def compile_rows_of(classes_option_and_dtype):
    classes, name, dtype = classes_option_and_dtype.split()
    x = torch.empty(4096, int(classes), dtype=getattr(torch, dtype))
    target = torch.zeros(4096, dtype=torch.int64)
    if name.startswith("pair"):
        target = (target, target, torch.empty(4096))
    elif name.startswith("probabilities"):
        target = x
    run("triton", x, target, fp32_loss=True, **BUDGET_OPTIONS[name](x.shape[1]))


@needs_ptxas
@pytest.mark.parametrize(
    ("even", "name", "dtype"),
    [
        (1000, "plain", torch.bfloat16),
        pytest.param(1000, "plain", torch.float32, marks=pytest.mark.slow),
        pytest.param(32000, "plain", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1000, "all", torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_odd_rows_take_at_most_two_loads_more(even, name, dtype):
    """For what lies before the first and behind the last multiple of 16 bytes: one for both ends, and one for the
    target's logit, which they want too where the row is longer than a tile. In bf16 logits alone have 16 bits; 32 have
    the numbers of a row, three in the backward, which are loaded once more for the ends from where they have just
    been, and what is per class."""
    width, more = (16, 2) if dtype == torch.bfloat16 else (32, 2 + 3)
    spelled = str(dtype).removeprefix("torch.")
    calls = [f"tests.test_losses_gpu:compile_rows_of:{classes} {name} {spelled}" for classes in (even, even + 1)]
    aligned, odd = cubin.launch_facts(*calls, architectures=(90,)).values()
    for one, other in zip(aligned, odd, strict=True):
        assert one.kernel == other.kernel
        assert other.loads.get(128, 0) <= one.loads.get(128, 0), (one, other)
        assert other.loads.get(width, 0) <= one.loads.get(width, 0) + more, (one, other)
        assert sum(other.stores.values()) <= sum(one.stores.values()) + 1, (one, other)


@needs_nvcc
@pytest.mark.slow
def test_cuda_has_no_spills_and_wide_accesses():
    sources = ("csrc/cuda/losses.cu", "csrc/cuda/losses_sigmoid.cu")
    for facts in [facts for source in sources for facts in cubin.nvcc_facts(source)]:
        assert facts.spills == 0, facts
        assert facts.shared <= 8192, facts  # what `allow` in elements.h counts on
        if "<double" in facts.kernel:  # a vector is two elements, and may well be read one by one
            continue
        strided = facts.kernel.startswith(("forward_rows", "sigmoid_terms")) and facts.kernel.split(", ")[2] == "true"
        if facts.kernel.startswith(("forward_rows", "backward_rows", "sigmoid_terms")) and not strided:
            assert facts.loads.get(128, 0) >= 4, facts
        if facts.kernel.startswith("backward_rows"):  # four under way, or two where every class has a share; and one
            assert facts.stores.get(128, 0) >= (3 if "(Mode)2" in facts.kernel else 5), facts
        plain = facts.kernel.startswith(("forward_rows", "backward_rows")) and "(Mode)0" in facts.kernel
        if plain and not strided and facts.arch == 90:
            # of 99 and, with the store, 198 that an H200 has time for; for others nvcc makes branches of the search for
            # the target's place, which nearly no vector takes and which would be counted here
            assert facts.issued <= (64 if facts.kernel.startswith("forward") else 120), facts


FEW = {("all-smooth", 90), ("smooth-focal-all", 90), ("pair-all", 80)}


@needs_cudahost
@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if (name, capability) in FEW else pytest.mark.slow)
        for name in ("plain", "all-smooth", "pair-all", "smooth-focal-all", "probabilities-all")
        for capability in (80, 90)
    ],
)
def test_cuda_walks_long_rows_again_with_and_without_clusters(name, capability, monkeypatch):
    """Few rows and many for four multiprocessors, contiguous and strided; rows that a cluster holds in half or in all
    of its shared memory, or does not hold."""
    monkeypatch.setattr(losses_cudahost, "CAPABILITY", capability)
    shapes = [((1, 9001), torch.bfloat16), ((3, 30000), torch.float32), ((6, 9001), torch.float32)]
    shapes += [((5, 45000), torch.float32), ((1, 2000, 9), torch.bfloat16), ((9, 500, 33), torch.float32)]
    shapes += [((2, 5000, 5), torch.float32), ((7, 2100), torch.float64)]
    if name == "plain":
        shapes += [((5, 90000), torch.float32), ((2, 170000), torch.bfloat16)]
    for shape, dtype in shapes:
        x, target = inputs(shape, dtype)
        target, options = target_for(name, x, target), BUDGET_OPTIONS[name](shape[1])
        options.pop("ignore_index", None)
        apart = run("host", x, target, **options)
        for grad in (x, torch.empty_like(x)):
            y = x.clone() if grad is x else x
            got = run_extra("host", y, target, y if grad is x else grad, **options)
            wide = 64 * torch.finfo(got.lse.dtype).eps
            torch.testing.assert_close(got.loss, apart.loss, rtol=torch.finfo(dtype).eps + wide, atol=wide)
            largest = apart.grad.abs().max().item()
            torch.testing.assert_close(got.grad, apart.grad, rtol=2 * torch.finfo(dtype).eps, atol=wide * largest)
            torch.testing.assert_close(got.lse, apart.lse, rtol=wide, atol=wide)
            assert torch.equal(got.argmax, x.argmax(1))
        exact = expect(x.double(), target, **options).grad.to(dtype)
        torch.testing.assert_close(got.grad, exact, rtol=max(2 * torch.finfo(dtype).eps, 1e-4), atol=1e-7)


@needs_cudahost
@pytest.mark.parametrize(("name", "apart"), [("plain", 3), ("smooth-focal", 5)])
def test_cuda_runs_a_row_that_a_cluster_shares_in_one_launch(name, apart, monkeypatch):
    from tests.proving.traffic import traffic

    x, target = inputs((1, 30000), torch.bfloat16)
    options = BUDGET_OPTIONS[name](30000) | dict(reduction="sum")
    for capability, launches in ((90, 1), (80, apart)):
        monkeypatch.setattr(losses_cudahost, "CAPABILITY", capability)
        with traffic() as log:
            run_extra("host", x, target, torch.empty_like(x), **options)
        assert len(log) == launches, log.kernels


@needs_cudahost
def test_cuda_counts_many_rows_and_classes_in_two_stages(monkeypatch):
    """What the mean of a gradient in the forward divides by, and the sum of all classes' weights."""
    monkeypatch.setattr(losses_cudahost, "MULTIPROCESSORS", 8)
    x, target = inputs((9000, 3))
    target[::7] = -100
    for options in ({}, dict(weight=torch.rand(3) + 0.1)):
        grad = run_extra("host", x, target, torch.empty_like(x), **options).grad
        torch.testing.assert_close(grad, expect(x.double(), target, **options).grad.float(), rtol=1e-5, atol=1e-10)
    for classes in (4096, 5000):
        x, target = inputs((3, classes))
        check("cuda", x, target, label_smoothing=0.3, weight=vectors(classes)["weight"])


@needs_cudahost
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_cuda_asks_for_the_shared_memory_that_rows_take(kilobytes, monkeypatch):
    """Of GPUs with little and with much of it: up to 48 KB, which need not be asked for, then half of it, then all."""
    monkeypatch.setenv("CUDAHOST_SHARED_BYTES", str(kilobytes << 10))
    monkeypatch.setattr(losses_cudahost, "SHARED_BYTES", kilobytes << 10)
    monkeypatch.setattr(losses_cudahost, "MULTIPROCESSORS", 1)  # two rows fill it, and are not split
    sizes = (12_100, kilobytes * 128 - 600, kilobytes * 256 - 600, kilobytes * 256 + 600)
    for classes, capability in (*((classes, 80) for classes in sizes), (kilobytes * 2048 - 8000, 90)):
        monkeypatch.setattr(losses_cudahost, "CAPABILITY", capability)
        x, target = inputs((2, classes))
        for options in ({"gamma": 2.0}, {"gamma": 2.0, "label_smoothing": 0.1}):
            got, exact = (
                run_extra("host", x, target, torch.empty_like(x), **options),
                expect(x.double(), target, **options),
            )
            torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


# ---- CUDA on the host: memory errors, races ----------------------------------------------------------------


def cuda_calls():
    """What the sanitizers watch: every kernel of the file, each with a rest."""
    losses_cudahost.CAPABILITY = 90
    for shape in ((37, 10), (6, 1001), (2, 9001), (3, 30, 40), (1, 500, 9), (2, 4999)):
        if shape[1] == 4999:
            losses_cudahost.CAPABILITY = 80
        for options in (dict(ignore_index=0), dict(**vectors(shape[1]), label_smoothing=0.1)):
            x, target = inputs(shape, torch.bfloat16)
            run("host", x.clone(), target, **options)
            grad = x.clone()
            run_extra("host", grad, target, grad, **options)
        for name in ("probabilities-all", "pair-all", "smooth-focal"):
            grad = x.clone()
            options = DENSE[name](shape[1])
            run_extra("host", grad, target_for(name, x, target), grad, **options)
            run("host", x, target_for(name, x, target, torch.float32), **options)
        for classes, gap in ((91, 0), (91, 1), (80, 16)):
            x = with_gaps(37, classes, gap)
            for target_ in (torch.rand(37, classes), torch.randint(0, classes, (37,)), (x > 0).view(torch.uint8)):
                run_sigmoid("host", x, target_, shape[1] % 2 == 0)


@needs_cudahost
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["plain", "all", "pair", "smooth-focal", "probabilities"])
@pytest.mark.sampled(4)
def test_cuda_bytes(name, capability, monkeypatch):
    """Rows for which the shared memory of a block, or of a cluster, has room are read once, with the gradient in the
    forward or every class's share in the loss; of longer ones what has no room is read a second time, or a third. Each
    lane looks at the targets' logits besides."""
    from tests.proving.traffic import traffic

    monkeypatch.setattr(losses_cudahost, "CAPABILITY", capability)
    every = name in ("smooth-focal", "probabilities")
    shapes = [((9, 1000), torch.float32), ((5, 33), torch.bfloat16), ((9, 4501), torch.bfloat16)]
    if capability == 90:
        shapes += [((2, 9001), torch.bfloat16), ((1, 60001), torch.bfloat16), ((1, 700, 9), torch.float32)]
    shapes += [((9, 60, 33), torch.float32), ((9, 500, 30), torch.bfloat16)]  # strided classes
    for shape, dtype in (*shapes, ((9, 15001), torch.bfloat16), ((9, 30000), torch.bfloat16)):
        x, target = inputs(shape, dtype)
        target, options = target_for(name, x, target), BUDGET_OPTIONS[name](shape[1])
        options.pop("ignore_index", None)
        other = torch.ones(shape, dtype=torch.bool)
        for y in () if name == "probabilities" else target[:2] if isinstance(target, tuple) else (target,):
            other.scatter_(1, y.unsqueeze(1), False)
        half = (losses_cudahost.SHARED_BYTES // 2 - (8192 if len(shape) == 3 else 2048)) // dtype.itemsize
        room = 8 * (half // 32 if len(shape) == 3 else half - 32)  # of a cluster
        half = half // 32 // 64 * 64 if len(shape) == 3 else half - 16
        whole = half if every or len(shape) == 3 else (losses_cudahost.SHARED_BYTES - 2048) // dtype.itemsize - 16
        grad = torch.empty_like(x)
        with traffic() as log:
            run_extra("host", x, target, grad, **options)
        if capability == 90 and shape[1] <= room:
            half = whole = shape[1]
        held = shape[1] if shape[1] <= whole else whole - 16  # of each row, wherever it begins
        assert (log.reads(x)[:, :held][other[:, :held]] == 1).all() and (log.writes(grad) == 1).all()
        assert (log.reads(x)[:, held + 32 :][other[:, held + 32 :]] == 2 + every).all()
        with traffic() as log:
            run("host", x, target, **options)
        held = half - 16 if every and shape[1] > half else shape[1]
        assert (log.reads(x)[:, :held][other[:, :held]] == 2).all() and (log.writes(x) == 0).all()
        assert (log.reads(x)[:, held + 32 :][other[:, held + 32 :]] == 3).all()
