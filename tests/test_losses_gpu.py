"""The GPU kernels of the losses, Triton's in its interpreter and CUDA's on the host, at the level of the operators."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from fastreg.losses import cross_entropy_reference, sigmoid_focal_loss_reference
from fastreg.testing import assert_accurate, with_layout
from tests import losses_cudahost
from tests.machine import needs_cudahost, needs_interpreter, needs_nvcc, needs_ptxas
from tests.proving import cubin, cudahost

REDUCTIONS = ("none", "mean", "sum")
PLAIN = dict(
    weight=None, alpha=None, logit_adjustment=None, margin=None, ignore_index=-100, reduction="mean",
    label_smoothing=0.0, gamma=0.0, alpha_scale=1.0, scale=1.0, z_loss=0.0, all_ignored="nan",
)  # fmt: skip


def _triton():
    from tritonkernels import losses

    return losses


BACKENDS = {"triton": _triton, "cuda": lambda: losses_cudahost}
ours = pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=needs_interpreter), pytest.param("cuda", marks=needs_cudahost)]
)


def run(backend, x, target, grad_loss=None, fp32_loss=False, **options):
    """Forward and backward of one call; the gradient of the loss defaults to ones."""
    kernels, o = BACKENDS[backend](), SimpleNamespace(**{**PLAIN, **options})
    tensors = (x, target, o.weight, o.alpha, o.logit_adjustment, o.margin, None, None)
    numbers = (
        o.ignore_index,
        REDUCTIONS.index(o.reduction),
        o.label_smoothing,
        o.gamma,
        o.alpha_scale,
        o.scale,
        o.z_loss,
    )
    loss, lse, denominator = kernels.cross_entropy_forward(*tensors, *numbers, o.all_ignored == "zero", fp32_loss)
    grad_loss = torch.ones_like(loss) if grad_loss is None else grad_loss.to(loss.dtype)
    grad = kernels.cross_entropy_backward(grad_loss, *tensors, lse, denominator, *numbers)
    return SimpleNamespace(loss=loss, lse=lse, denominator=denominator, grad=grad)


def expect(x, target, grad_loss=None, **options):
    """The same from the formula, in x's dtype."""
    o = {**PLAIN, **options}
    alpha_scale, alpha = o.pop("alpha_scale"), o.pop("alpha")
    o = {name: value.to(x.dtype) if isinstance(value, torch.Tensor) else value for name, value in o.items()}
    o["alpha"] = alpha_scale if alpha is None else alpha.to(x.dtype) * alpha_scale
    x = x.detach().clone().requires_grad_()
    loss = cross_entropy_reference(x, target.long(), o.pop("weight"), **o)
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
            assert_accurate(getattr(got, name), getattr(stock, name), getattr(oracle, name), name)
    return got


def inputs(shape, dtype=torch.float32, layout="contiguous", spread=3.0):
    x = with_layout((torch.randn(shape) * spread).to(dtype), layout)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return x, target


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


@ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES + SHAPES_3D, ids=str)
def test_every_size(backend, shape, dtype):
    x, target = inputs(shape, dtype)
    check(backend, x, target)


@ours
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "offset", "expanded"])
@pytest.mark.parametrize("shape", [(6, 40), (3, 1001), (5, 33, 6), (2, 600, 8)], ids=str)
def test_every_layout(backend, shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x, target = inputs(shape, dtype, layout)
        check(backend, x, with_layout(target, "strided"), reduction="sum", label_smoothing=0.1)
    if len(shape) == 3:  # classes contiguous: logits.transpose(1, 2) of a language model
        check(backend, x.transpose(1, 2).contiguous().transpose(1, 2), target)


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


@ours
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(backend, name, reduction):
    # whole tiles, peeled loops, split rows, lanes along D
    for shape, dtype in (((40, 12), torch.float32), ((4, 4099), torch.float64), ((3, 9, 20), torch.bfloat16)):
        x, target = inputs(shape, dtype)
        grad_loss = torch.randn(target.shape if reduction == "none" else ())
        check(backend, x, target, grad_loss, reduction=reduction, **OPTIONS[name](shape[1]))


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
    x, target = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert run(backend, x, target).loss.isnan()
    assert run(backend, x, target, all_ignored="zero").loss == 0
    assert run(backend, x, target, reduction="sum").loss == 0
    assert run(backend, x, target, reduction="none").loss.shape == (0,)


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
    x, target = inputs((4, 10))
    target[2] = bad
    with pytest.raises(Exception, match=r"out of range|__trap"):
        run(backend, x, target)


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
    kernels = BACKENDS[backend]()
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


@needs_interpreter
@pytest.mark.parametrize("indices", [True, False], ids=["indices", "dense"])
def test_sigmoid_focal_bytes(indices):
    """The logits once each way, dense targets once, the gradient once; class indices stay indices."""
    from tests.proving.sanitizer import sanitize
    from tests.proving.traffic import traffic

    x = torch.randn(33, 91)
    target = torch.randint(0, 91, (33,)) if indices else torch.rand(33, 91)
    with traffic() as log:
        run_sigmoid("triton", x, target, True)
    forward, total, backward = log
    assert (forward.reads(x) == 1).all() and (backward.reads(x) == 1).all() and total.loaded <= 64
    if not indices:
        assert (forward.reads(target) == 1).all() and (backward.reads(target) == 1).all()
    assert forward.stored <= 64 and backward.stored == x.nbytes
    with sanitize():
        run_sigmoid("triton", x, target, True)


# ---- Triton: bytes, addresses, races, padding --------------------------------------------------------------


BYTE_SHAPES = [(64, 10), (16, 1000), (4, 20, 300), (64, 100), (4, 8142), (2, 50257), (2, 2200, 40)]


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "shape"),
    [("plain", shape) for shape in BYTE_SHAPES]
    + [
        pytest.param(name, shape, marks=[pytest.mark.slow] * (shape not in BYTE_SHAPES[1:3]))
        for name in OPTIONS
        for shape in BYTE_SHAPES
    ],
    ids=str,
)
def test_bytes(name, shape):
    """Forward: the logits once. Backward: the logits once, the gradient once. Vectors are all that comes on top."""
    from tests.proving.traffic import traffic

    x, target = inputs(shape)
    options = OPTIONS[name](shape[1]) if name != "plain" else {}
    options.pop("ignore_index", None)
    with traffic() as log:
        run("triton", x, target, **options)
    for launch in log:
        backward = launch.kernel == "_backward"
        assert (launch.writes(x) == 0).all()
        if launch.kernel in ("_forward", "_backward"):
            reads = launch.reads(x)
            assert (reads >= 1).all()
            again = reads.sum().item() - x.numel()  # a row's target, by each program that does not hold the whole row
            assert again <= (0.02 * x.numel() if shape[1] > 2048 else 0)
        assert launch.stored - backward * x.nbytes <= 16 * target.numel() + 0.02 * x.nbytes + 64
    assert log.kernels.count("_backward") == 1 and len(log) <= 4


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
@pytest.mark.parametrize("shape", [(5, 10), (3, 1001), (2, 9001), (1, 40000), (2, 30, 70), (2, 5, 3)], ids=str)
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
        x = torch.empty(4096, 80, dtype=dtype)
        for target in (torch.empty_like(x), torch.zeros(4096, dtype=torch.int64)):
            run_sigmoid("triton", x, target, True)


def compile_odd():
    for dtype in (torch.bfloat16, torch.float32):
        for shape in ((4096, 1001), (4096, 8142), (4096, 50257)):
            _compile_call(shape, dtype)


def compile_options():
    for name in OPTIONS:
        for shape in ((4096, 1000), (4096, 32000)):
            _compile_call(shape, torch.bfloat16, **OPTIONS[name](shape[1]))


@needs_ptxas
@pytest.mark.parametrize(
    "calls", ["compile_aligned", "compile_odd", pytest.param("compile_options", marks=pytest.mark.slow)]
)
def test_no_spills_and_wide_accesses(calls):
    (launches,) = cubin.launch_facts(f"tests.test_losses_gpu:{calls}").values()
    for facts in launches:
        assert facts.spills == 0, facts
        if facts.kernel in ("_forward", "_backward", "_sigmoid_focal"):  # 64 bytes per thread in accesses of 16
            assert facts.loads.get(128, 0) >= 4, facts
            narrow = 0 if calls == "compile_aligned" else 2
        if facts.kernel == "_backward":
            assert facts.stores.get(128, 0) == 4, facts
            assert sum(facts.stores.values()) <= 4 + narrow, facts


@needs_nvcc
@pytest.mark.slow
def test_cuda_has_no_spills_and_wide_accesses():
    sources = ("csrc/cuda/losses.cu", "csrc/cuda/losses_sigmoid.cu")
    for facts in [facts for source in sources for facts in cubin.nvcc_facts(source)]:
        assert facts.spills == 0, facts
        if "<double" in facts.kernel:  # a vector is two elements, and may well be read one by one
            continue
        if facts.kernel.startswith(("forward_rows", "backward_rows", "sigmoid_terms")):
            assert facts.loads.get(128, 0) >= 4, facts
        if facts.kernel.startswith("backward_rows"):
            assert facts.stores.get(128, 0) >= 4, facts


# ---- CUDA on the host: memory errors, races ----------------------------------------------------------------


def cuda_calls():
    """What the sanitizers watch: every kernel of the file, each with a rest."""
    for shape in ((37, 10), (6, 1001), (2, 9001), (3, 30, 40)):
        for options in (dict(ignore_index=0), dict(**vectors(shape[1]), label_smoothing=0.1)):
            x, target = inputs(shape, torch.bfloat16)
            run("cuda", x.clone(), target, **options)
        x = torch.randn(37, 91)
        for target_ in (torch.rand(37, 91), torch.randint(0, 91, (37,))):
            run_sigmoid("cuda", x, target_, shape[1] % 2 == 0)


@needs_cudahost
@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "seed"), [("address", 0), ("thread", 0), ("thread", 1), ("thread", 2)])
def test_cuda_under_sanitizers(sanitizer, seed):
    assert cudahost.run_sanitized(sanitizer, "tests.test_losses_gpu:cuda_calls", seed=seed) == ""
