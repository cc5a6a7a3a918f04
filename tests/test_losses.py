"""Softmax and sigmoid losses: every backend against an oracle written from the formula, in extended precision.

The hard cases of such losses, and the tests that hold them. A test that takes `backend` runs on each: plain PyTorch,
C++, Triton, in its interpreter where there is no GPU, and CUDA, there compiled for the CPU. (gpu): more of it for the
GPU kernels alone, in tests/test_losses_gpu.py; (cpu): for the C++ ones, in tests/test_losses_cpu.py.

 1 class counts, few and many rows, rows that start anywhere: test_every_number_of_classes, test_very_long_rows,
   test_no_rows, test_many_rows; (gpu) test_every_size, (cpu) test_rows_are_accurate
 2 more than 2^31 and 2^32 elements: test_offsets_past_2_to_32, test_past_2_to_31_elements (C++ alone);
   (gpu) test_offsets_past_2_to_32, where gradients lie as far apart, test_grids_of_very_long_rows
 3 layouts: test_layouts_of_logits_targets_and_gradients, test_transposed_tokens, test_any_order_of_memory,
   test_crops_in_any_order_of_memory, test_incoming_gradients;
   (gpu) test_every_layout, test_target_types, (cpu) test_layouts_are_accurate
 4 ignored rows, whatever they hold: test_ignored_rows, test_ignored_rows_hold_anything, test_nothing_kept;
   (gpu) test_ignored_rows_hide_nan_and_get_zero, test_ignored_rows_are_not_read, (cpu) test_ignored_rows_are_never_read
 5 targets out of range: test_target_out_of_range (plain PyTorch, C++), (gpu)
   test_a_target_out_of_range_is_an_assertion, on a GPU the test of that name in tests/test_gpu.py
 6 weights: test_weights_of_every_kind, test_kept_rows_of_weight_0,
   test_means_divide_by_weights_for_indices_and_by_rows_for_probabilities
 7 smoothing: test_label_smoothing
 8 infinite, huge and equal logits: test_logits_of_minus_infinity, test_rows_without_a_softmax_are_nan,
   test_large_and_equal_logits; (gpu) test_minus_infinity, test_large_logits,
   (cpu) test_a_whole_block_of_minus_infinity, test_special_values_are_those_of_pytorch
 9 certain rows: test_confident_rows, test_focal_is_finite_everywhere;
   (gpu) test_focal_from_certainty_to_error, test_the_gradient_of_a_certain_target_keeps_its_digits,
   (cpu) test_a_loss_is_never_negative
10 focal: test_focal_is_finite_everywhere, test_focal_with_gamma_0_is_cross_entropy,
   test_alpha_scales_terms_and_weight_does_not_enter_p, test_softmax_over_two_classes_is_a_sigmoid_of_their_difference,
   test_smoothed_focal_terms_of_likely_classes, test_no_positives_divide_by_one, test_formulas_of_other_libraries
11 probabilities: test_probabilities, test_gradient_to_probabilities, test_shapes_that_could_mean_either,
   test_probabilities_that_are_those_of_the_logits; (gpu) test_a_class_without_a_share_may_be_impossible
12 moved and scaled logits: test_scale_with_adjustment_on_odd_sizes, test_scale_where_the_softmax_saturates;
   (gpu) test_addresses_races_and_padding
13 autograd: test_backward_twice, test_logits_shared_with_another_loss, test_without_gradients,
   test_create_graph_gives_the_gradient_itself_too, test_gradient_penalty_through_a_network,
   test_vmap_and_functional_gradients, test_forced_kernels_refuse_transforms, test_vectors_must_not_want_gradients
14 incoming gradients: test_incoming_gradients, test_gradient_scaler, test_autocast
15 compilers, graphs, memory: test_compiles_in_one_graph, test_compiles_with_inductor, test_every_output_is_written;
   on a GPU tests/test_gpu.py (graphs, streams, devices, no waiting)
16 the same bits: test_same_bits_every_time, test_a_row_does_not_depend_on_its_place,
   test_argmax_takes_the_lowest_of_equals, test_argmax_past_the_whole_numbers_of_fp32;
   (gpu) test_argmax_is_the_lowest_among_equals_wherever_it_stands, (cpu) test_threads_change_nothing
17 what else the pass knows: test_outputs, test_only_the_loss_has_a_gradient, test_outputs_without_class_indices,
   test_class_statistics
18 long tails: tests/test_longtail.py, test_effective_number_weights, test_log_prior, test_ldam_margins,
   test_modules_from_counts_equal_the_function
19 every option with every other: test_every_option_with_every_other, test_random_combinations,
   test_gradcheck_and_gradgradcheck; (gpu) test_every_option, test_every_kind_of_target, test_random_calls
"""

import contextlib
import copy
import ctypes
import itertools
import math
import random
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastreg
from fastreg import _backends, cross_entropy, focal_loss, sigmoid_focal_loss
from fastreg.testing import DTYPES, LAYOUTS, assert_accurate, with_layout
from tests import losses_cudahost
from tests.machine import cudahost_missing, device_of, move

BACKENDS = [name for name, state in fastreg.backends()["cross_entropy"].items() if state == "usable"]
if find_spec("tritonkernels.losses") is None:
    BACKENDS = [name for name in BACKENDS if name != "triton"]
KERNELS = [name for name in BACKENDS if name != "reference"]
INTERPRETED = "triton" if _backends.interpreting() else None  # the backend that takes 1,000 times as long as others
ON_THE_HOST = "cuda on the host"  # the CUDA kernels, compiled for the CPU, in the place of the C++ ones
if "cpu" in KERNELS and "cuda" not in KERNELS and cudahost_missing() is None:
    BACKENDS.append(ON_THE_HOST)
compiled = pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in (INTERPRETED, ON_THE_HOST)])
on_the_cpu = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("reference", "cpu")])
LD = np.longdouble
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def cuda_on_the_host(request, monkeypatch):
    """For tests of that backend, whether they take it from the fixture or are parametrised themselves."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or ON_THE_HOST not in (callspec.params.get(name) for name in ("backend", "sigmoid_backend")):
        return
    losses = fastreg.losses
    monkeypatch.setattr(losses, "_SMALL", -1)
    for kernels in ("forward", "forward_extra", "backward"):
        there = getattr(losses_cudahost, f"cross_entropy_{kernels}")
        monkeypatch.setitem(getattr(losses, f"_{kernels}"), "cpu", there)
    monkeypatch.setitem(losses._scale_gradient, "cpu", losses_cudahost.scale_gradient_)
    for kernels in ("forward", "backward"):
        there = getattr(losses_cudahost, f"sigmoid_focal_{kernels}")
        monkeypatch.setitem(getattr(losses, f"_sigmoid_{kernels}"), "cpu", there)


def use(backend):
    return fastreg.use_backend("cpu" if backend == ON_THE_HOST else backend)


def serve(backend, call):
    """call() on this backend, or, where it refuses such calls, on the backend that serves them."""
    try:
        with use(backend):
            return call()
    except RuntimeError as error:
        if "cannot serve this call" not in str(error):
            raise
    return call()


# ---- the oracle --------------------------------------------------------------------------------------------


def longdouble(tensor):
    return None if tensor is None else tensor.detach().double().numpy().astype(LD)


def class_last(array, dim):
    return np.moveaxis(array, dim, -1).reshape(-1, array.shape[dim])


def oracle(input, target, weight=None, grad=None, **options):
    """Loss and, for the incoming gradient `grad` (None: ones), gradient to the input: the formula row by row, its
    derivative worked out by hand, in extended precision."""
    o = SimpleNamespace(**{**DEFAULTS, **options})
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    x = class_last(longdouble(input), dim)
    rows = len(x)
    share = np.ones(rows, LD)
    if isinstance(target, tuple):
        a, b, share = target
        if isinstance(share, torch.Tensor):
            share = share.reshape([-1] + [1] * (a.dim() - 1)) if share.dim() == 1 else share
            share = longdouble(share.expand(a.shape)).reshape(-1)
        share = share * np.ones(rows, LD)
    else:
        a = b = target
    if a.is_floating_point():
        q = class_last(longdouble(a), dim)
        kept = np.ones(rows, bool)
    else:
        a, b = (t.reshape(-1).numpy().astype(np.int64) for t in (a, b))
        kept = (a != o.ignore_index) & (b != o.ignore_index)
        q = np.zeros((rows, classes), LD)
        for r in np.flatnonzero(kept):
            q[r, a[r]] += share[r]
            q[r, b[r]] += 1 - share[r]
    probabilities = not isinstance(target, tuple) and target.is_floating_point()
    w = np.ones(classes, LD) if weight is None else longdouble(weight)
    alpha = 1 if o.alpha is None else longdouble(torch.as_tensor(o.alpha, dtype=torch.float64))
    losses, grads = np.zeros(rows, LD), np.zeros((rows, classes), LD)
    denominator = LD(rows) if probabilities else LD(0)
    with np.errstate(all="ignore"):
        for r in np.flatnonzero(kept):
            z = x[r].copy()
            if o.logit_adjustment is not None:
                z = z + longdouble(o.logit_adjustment)
            if o.margin is not None:
                z = z - longdouble(o.margin) * q[r]
            z = o.scale * z
            top = z.max()
            tail = np.log(np.exp(z - top).sum())
            log_p = (z - top) - tail
            p, u = np.exp(log_p), -np.expm1(log_p)
            smooth = (1 - o.label_smoothing) * q[r] + LD(o.label_smoothing) / classes
            if not probabilities:  # whole numbers stay whole, whatever the rounding of the line above
                smooth = np.where((o.label_smoothing == 0) | (smooth != 0), smooth, 0)
            factor = smooth * w * alpha
            # term = -u^g log p; its derivative by log p, with the limits 0 at p = 1 and -1 at p = 0
            power = np.ones_like(u) if o.gamma == 0 else u ** LD(o.gamma)
            slope = -power
            if o.gamma:
                inner = (u > 0) & (p > 0)
                slope[inner] += o.gamma * u[inner] ** LD(o.gamma - 1) * p[inner] * log_p[inner]
            term = np.where(log_p == 0, 0, -power * log_p)
            has = (factor != 0) | np.isnan(log_p)
            lse = top + tail
            losses[r] = (factor[has] * term[has]).sum() + (o.z_loss * lse**2 if o.z_loss else 0)
            d = np.where(has, factor * np.where(has, slope, 0), 0)
            grads[r] = d * u - p * (d.sum() - d) + (2 * o.z_loss * lse * p if o.z_loss else 0)
            grads[r] *= o.scale
            if not probabilities:
                denominator += 1 if weight is None else share[r] * w[a[r]] + (1 - share[r]) * w[b[r]]
        if o.reduction != "mean":
            denominator = LD(1)
        elif denominator == 0:  # whatever is divided by it
            denominator = LD(math.inf if o.all_ignored == "zero" else math.nan)
        loss = losses if o.reduction == "none" else losses.sum() / denominator
        g = np.ones_like(loss) if grad is None else longdouble(grad)
        grads = np.where(kept[:, None], grads * (g.reshape(-1, 1) if o.reduction == "none" else g / denominator), 0)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    loss = torch.from_numpy(np.asarray(loss, np.float64))
    grads = torch.from_numpy(grads.astype(np.float64)).reshape(*shape, classes).movedim(-1, dim)
    return (loss.reshape(shape) if o.reduction == "none" else loss), grads


DEFAULTS = {
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "alpha": None,
    "logit_adjustment": None,
    "margin": None,
    "scale": 1.0,
    "z_loss": 0.0,
    "all_ignored": "nan",
}
FAMILY = ("gamma", "alpha", "logit_adjustment", "margin", "scale", "z_loss", "all_ignored")


def stock(input, target, weight=None, **options):
    """F.cross_entropy where it has the options, else the formula as one would type it."""
    dtype = input.dtype
    weight = None if weight is None else weight.to(dtype)
    if not isinstance(target, tuple) and all(
        (options.get(name) is None or options[name] == DEFAULTS[name]) for name in FAMILY
    ):
        options = {name: value for name, value in options.items() if name not in FAMILY}
        if target.is_floating_point():
            return F.cross_entropy(input, target.to(dtype), weight, **options)
        return F.cross_entropy(input, target.long(), weight, **options)
    o = SimpleNamespace(**{**DEFAULTS, **options})
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    a, b, share = target if isinstance(target, tuple) else (target, target, 1.0)

    def column(vector):
        return vector.to(dtype).reshape([-1] + [1] * (input.dim() - 1 - dim))

    def onehot(y):
        return F.one_hot(torch.where(kept, y.long(), 0), classes).to(dtype).movedim(-1, dim)

    if a.is_floating_point():
        kept, q, normal = torch.ones(a.select(dim, 0).shape, dtype=torch.bool), a.to(dtype), 1
    else:
        kept = (a.long() != o.ignore_index) & (b.long() != o.ignore_index)
        if isinstance(share, torch.Tensor):
            share = (share.reshape([-1] + [1] * (a.dim() - 1)) if share.dim() == 1 else share).to(dtype)
            share = share.expand(a.shape).unsqueeze(dim)
        q = share * onehot(a) + (1 - share) * onehot(b)
        normal = 1 if weight is None else (q * column(weight)).sum(dim)
    z = input
    if o.logit_adjustment is not None:
        z = z + column(o.logit_adjustment)
    if o.margin is not None:
        z = z - column(o.margin) * q
    log_p = F.log_softmax(o.scale * z, dim)
    factor = (1 - o.label_smoothing) * q + o.label_smoothing / classes
    if weight is not None:
        factor = factor * column(weight)
    if o.alpha is not None:
        factor = factor * (column(o.alpha) if isinstance(o.alpha, torch.Tensor) and o.alpha.dim() else o.alpha)
    terms = -log_p
    if o.gamma:
        terms = terms * (1 - log_p.exp()).clamp(min=torch.finfo(dtype).tiny) ** o.gamma
    losses = (factor * terms).sum(dim) + o.z_loss * torch.logsumexp(o.scale * z, dim) ** 2
    losses = torch.where(kept, losses, 0)
    if o.reduction == "none":
        return losses.to(dtype)
    denominator = torch.where(kept, normal, 0).sum() if o.reduction == "mean" else 1
    denominator = denominator or (math.inf if o.all_ignored == "zero" else math.nan)
    return (losses.sum() / denominator).to(dtype)


def noise(input, weight, grad, **options):
    """What rounding in the accumulating dtype may cost beyond an ulp of the result: log p carries the rounding of z,
    its largest magnitude times eps for each of 8 roundings; the loss and its gradient multiply that by their
    factors and by the slope and curvature of the focal term, and a sum over rows adds an eps of itself per row."""
    o = SimpleNamespace(**{**DEFAULTS, **options})
    eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    if not input.numel():
        return 0.0, 0.0
    size = [input.double().nan_to_num(0, 0, 0).abs().max()]
    size += [v.double().abs().max() for v in (o.logit_adjustment, o.margin) if v is not None]
    size = o.scale * float(sum(size).detach()) + math.log(input.shape[min(input.dim() - 1, 1)]) + 1
    factor = 1.0 if o.alpha is None else float(torch.as_tensor(o.alpha).double().abs().max())
    factor *= 1.0 if weight is None else float(weight.double().abs().max())
    rows = input.numel() // input.shape[min(input.dim() - 1, 1)]
    each = 8 * eps * size * (factor * (1 + o.gamma) + 2 * o.z_loss * size)
    loss = each * (1 + rows * size * eps) * (rows if o.reduction == "sum" else 1)
    grads = each * (1 + o.gamma) * o.scale * (1 if grad is None else float(grad.double().abs().max()))
    return loss, grads


def check(backend, input, target, weight=None, grad=None, **options):
    """Loss and gradient on this backend, held to the rule of fastreg.testing against the oracle."""
    if grad is None and options.get("reduction") == "none":
        grad = torch.ones(input.select(min(input.dim() - 1, 1), 0).shape, dtype=input.dtype)
    x, *there = (move(value, device_of(backend)) for value in (input.detach(), target, weight, grad))
    x.requires_grad_()
    moved = {name: move(value, device_of(backend)) for name, value in options.items()}
    loss = serve(backend, lambda: cross_entropy(x, *there[:2], **moved))
    options = {name: value for name, value in options.items() if name not in ("grad_in_forward", "outputs")}
    loss = loss.loss if isinstance(loss, fastreg.losses.LossOutputs) else loss
    (grad_x,) = torch.autograd.grad(loss, x, there[2], materialize_grads=True)
    loss, grad_x = move(loss, "cpu"), move(grad_x, "cpu")
    # In half precision stock PyTorch is held to be what it is under autocast: the kernels compute in fp32 too.
    y = input.detach().to(torch.promote_types(input.dtype, torch.float32)).requires_grad_()
    stock_loss = stock(y, target, weight, **options)
    wide = None if grad is None else grad.to(y.dtype)
    (stock_grad,) = torch.autograd.grad(stock_loss, y, wide, materialize_grads=True)
    stock_loss, stock_grad = stock_loss.to(input.dtype), stock_grad.to(input.dtype)
    exact_loss, exact_grad = oracle(input, target, weight, grad, **options)
    loss_noise, grad_noise = noise(input, weight, grad, **options)
    if options.get("reduction", "mean") == "mean" and weight is not None:  # divided by the weights that occur
        by_one, _ = oracle(input, target, weight, grad, **{**options, "reduction": "sum"})
        ratio = float((exact_loss / by_one).abs().nan_to_num(1, 1, 1)) * max(1, len(loss.shape) or 1)
        rows = max(input.numel() // input.shape[min(input.dim() - 1, 1)], 1)
        loss_noise, grad_noise = loss_noise * max(ratio * rows, 1), grad_noise * max(ratio, 1)
    assert_accurate(loss, stock_loss, exact_loss, "loss", noise=loss_noise)
    divided_by_0 = not exact_loss.dim() and not exact_loss.isfinite() and not exact_grad.isfinite().all()
    if not divided_by_0:  # else, on rows whose weights sum to 0, there is no gradient to speak of
        assert_accurate(grad_x, stock_grad, exact_grad, "gradient", noise=grad_noise)
    return loss.detach(), grad_x


# ---- random combinations of everything ---------------------------------------------------------------------


def problem(seed):
    """Everything about a call drawn at random, evenly: hypothesis's own strategies crowd around the simplest case."""
    rng = random.Random(seed)
    pick = lambda *values: rng.choice(values)  # noqa: E731
    dtype = pick(*DTYPES)
    classes = pick(1, 2, 3, 7, 8, 9, 17, 31, 33, 65)
    shape = pick((classes,), *[(n, classes, *rest) for n in (0, 1, 3, 5) for rest in ((), (), (1,), (4,), (2, 3))])
    g = torch.Generator().manual_seed(seed)
    size = pick(1.0, 5.0, 40.0)
    input = with_layout((size * torch.randn(shape, generator=g)).to(dtype), pick(*LAYOUTS))
    rows = input.select(0 if input.dim() == 1 else 1, 0).shape

    def vector(low, high):
        kind = pick("none", "none", "same", "fp32", "strided")
        if kind == "none":
            return None
        values = low + (high - low) * torch.rand(classes, generator=g)
        values = values.to(torch.float32 if kind == "fp32" else dtype)
        return with_layout(values, "strided") if kind == "strided" else values

    options, kind = {}, pick("index", "index", "index", "pair", "probabilities")
    weight = vector(0.0, 2.0)
    if weight is not None and pick(False, True):
        weight[0] = 0.0
    if kind == "probabilities":
        target = torch.randn(shape, generator=g).softmax(0 if len(shape) == 1 else 1).to(pick(dtype, torch.float32))
    else:

        def indices():
            y = torch.randint(classes, rows, generator=g)
            y = torch.where(torch.rand(rows, generator=g) < ignored, options["ignore_index"], y)
            return y.to(pick(torch.int64, torch.int32, torch.uint8) if options["ignore_index"] >= 0 else torch.int64)

        options["ignore_index"] = pick(-100, -1, 0, classes - 1, 255)
        ignored = pick(0.0, 0.4, 1.0)
        target = with_layout(indices(), pick("contiguous", "strided"))
        if kind == "pair":
            share = torch.rand(pick((), rows[:1], rows), generator=g)
            target = (target, indices(), pick(0.0, 1.0, 0.25, share))
    options["reduction"] = pick("mean", "sum", "none")
    options["label_smoothing"] = pick(0.0, 0.0, 1e-8, 0.1, 1.0)
    if pick(False, True):
        options["gamma"] = pick(0.0, 1e-3, 0.5, 1, 2.0, 5.0)
        options["alpha"] = pick(None, 0.25, 0, torch.tensor(0.5, dtype=dtype), vector(0.0, 1.0))
        options["logit_adjustment"] = vector(-8.0, 0.0)
        options["margin"] = vector(0.0, 0.5)
        options["scale"] = pick(1.0, 0.5, 4)
        options["z_loss"] = pick(0.0, 1e-2)
        options["all_ignored"] = pick("nan", "zero")
    if options["reduction"] != "none" and pick(False, True):
        options["grad_in_forward"] = True
    options["outputs"] = pick(False, False, True)
    grad = torch.randn(rows if options["reduction"] == "none" else (), generator=g)
    if pick(False, True):
        grad = grad * (grad > 0)
    return (
        input,
        target,
        weight,
        pick(None, grad.to(dtype)) if options["reduction"] != "none" else grad.to(dtype),
        options,
    )


def examples(number):
    return settings(
        max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )


def left_out(backend, seed):
    """Most examples are, of Triton's: interpreted they take long, and compiled each wants kernels of its own."""
    return backend == "triton" and seed % (10 if backend == INTERPRETED else 25) != 0


def combination(backend, seed):
    if left_out(backend, seed):
        return
    input, target, weight, grad, options = problem(seed)
    check(backend, input, target, weight, grad, **options)


@examples(300)
@given(seed=st.integers(0, 2**32))
def test_random_combinations(backend, seed):
    combination(backend, seed)


@pytest.mark.slow
@examples(10000)
@given(seed=st.integers(0, 2**32))
def test_many_random_combinations(backend, seed):
    combination(backend, seed)


EVERY_OPTION = {
    "weight": lambda classes: torch.linspace(0.5, 1.5, classes),
    "label_smoothing": lambda classes: 0.1,
    "gamma": lambda classes: 1.5,
    "alpha": lambda classes: torch.linspace(0.2, 1, classes),
    "logit_adjustment": lambda classes: -torch.linspace(0, 5, classes),
    "margin": lambda classes: torch.linspace(0.1, 0.5, classes),
    "scale": lambda classes: 2.0,
    "z_loss": lambda classes: 1e-2,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
def test_every_option_with_every_other(backend, kind):
    """Each set of options is a kernel of its own; reductions, dtypes and layouts take turns."""
    turns = itertools.product(("mean", "sum", "none"), DTYPES, ((3, 9), (2, 9, 3)), (False, True))
    turns = itertools.cycle(random.sample(list(turns), 3 * len(DTYPES) * 4))
    for wanted in itertools.product((False, True), repeat=len(EVERY_OPTION)):
        reduction, dtype, shape, extra = next(turns)
        options = {name: make(9) for want, (name, make) in zip(wanted, EVERY_OPTION.items(), strict=True) if want}
        x, rows = (3 * torch.randn(shape)).to(dtype), shape[:1] + shape[2:]
        a, b = torch.randint(9, (2, *rows))
        a.view(-1)[0] = -100
        target = {"index": a, "pair": (a, b, torch.rand(rows)), "probabilities": torch.rand(shape).softmax(1)}[kind]
        extra = {"outputs": extra, "grad_in_forward": extra and reduction != "none"}
        grad = torch.randn(rows if reduction == "none" else ()).to(dtype)
        check(backend, x, target, options.pop("weight", None), grad, reduction=reduction, **extra, **options)


# ---- the hard edges, one by one ----------------------------------------------------------------------------

OPTION_SETS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"gamma": 2.0, "alpha": 0.25},
    "focal with smoothing": {"gamma": 0.5, "label_smoothing": 0.1},
    "scale and z-loss": {"scale": 2.0, "z_loss": 1e-3},
}


def options_named(name, classes):
    """One of OPTION_SETS, or "family": everything at once."""
    if name != "family":
        return OPTION_SETS[name]
    return {
        "gamma": 1.5,
        "label_smoothing": 0.1,
        "alpha": torch.linspace(0.2, 1, classes),
        "logit_adjustment": -torch.linspace(0, 5, classes),
        "margin": torch.linspace(0.1, 0.5, classes),
        "scale": 2.0,
        "z_loss": 1e-3,
    }


ALL_OPTIONS = pytest.mark.parametrize("name", [*OPTION_SETS, "family"])


CLASSES = (1, 2, 3, 7, 8, 9, 31, 33, 1000, 1023, 1024, 1025, 32769)


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize(
    ("backend", "classes"),
    [
        pytest.param(
            backend,
            classes,
            marks=[pytest.mark.slow] * (classes > 10000 or (backend == INTERPRETED and classes not in (3, 1025))),
        )
        for backend in BACKENDS
        for classes in CLASSES
    ],
)
def test_every_number_of_classes(backend, classes, name):
    for dtype, n in ((torch.float32, 3), (torch.bfloat16, 1)):
        flat = (4 * torch.randn(n * classes + 1)).to(dtype)
        for first in (0, 1):  # 1: no row begins at an aligned address
            x = flat[first : first + n * classes].view(n, classes)
            check(backend, x, torch.randint(classes, (n,)), **options_named(name, classes))


@pytest.mark.parametrize(
    ("backend", "classes"),
    [
        pytest.param(backend, classes, marks=[pytest.mark.slow] * (backend == INTERPRETED and classes > 50000))
        for backend in BACKENDS
        for classes in (32000, 65537, 128256, 262144)
    ],
)
def test_very_long_rows(backend, classes):
    x, y = 4 * torch.randn(1, classes), torch.tensor([classes - 1])
    check(backend, x, y)
    check(backend, x.bfloat16(), y, gamma=2.0)


def test_no_rows(backend):
    for reduction, all_ignored in itertools.product(("mean", "sum", "none"), ("nan", "zero")):
        check(
            backend, torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), reduction=reduction, all_ignored=all_ignored
        )
        check(backend, torch.randn(0, 5, 3), torch.zeros(0, 3, dtype=torch.int64), reduction=reduction)
        check(backend, torch.randn(2, 5, 0), torch.zeros(2, 0, dtype=torch.int64), reduction=reduction)
        crop = torch.randn(4, 5, 6, 7).permute(0, 3, 2, 1)[:0, :, 1:, 1:]
        check(backend, crop, torch.zeros(0, 5, 4, dtype=torch.int64), reduction=reduction)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] * (name == INTERPRETED)) for name in BACKENDS]
)
def test_many_rows(backend):
    n = 65537
    x, y = torch.randn(n, 3, dtype=torch.float64), torch.randint(3, (n,))
    with use(backend):
        torch.testing.assert_close(cross_entropy(x, y), F.cross_entropy(x, y), rtol=1e-13, atol=0)
        # one number is close to the sum of fp32 terms in any sane order: log2(n) roundings
        ours = cross_entropy(x.float(), y, reduction="sum")
    exact = F.cross_entropy(x.float().double(), y, reduction="sum")
    torch.testing.assert_close(ours.double(), exact, rtol=math.log2(n) * 2**-23, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "cpu"])  # others need more GB, or an hour
@pytest.mark.parametrize("shape", [(2**16 + 1, 2**15), (1, 2, 2**30 + 1)], ids=["rows", "positions"])
def test_past_2_to_31_elements(backend, shape):
    few = torch.randn(3, shape[1]) if len(shape) == 2 else torch.randn(1, 2, 1)
    # All rows alike through a stride of 0, save that the last has another target.
    x = few[:1].expand(shape).to(torch.float16) if len(shape) == 2 else few.to(torch.float16).expand(shape)
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.uint8)
    y[..., -1] = 1
    x.requires_grad_()
    with use(backend):
        loss = cross_entropy(x, y, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, torch.ones((), dtype=loss.dtype).expand(loss.shape))
    first, last = (x[..., 0], x[..., -1]) if len(shape) == 3 else (x[:1], x[-1:])
    for logits, target, at in ((first, 0, 0), (last, 1, -1)):
        logits = logits.detach().double().requires_grad_()
        exact = F.cross_entropy(logits, torch.tensor([target]))
        (exact_grad,) = torch.autograd.grad(exact, logits)
        ours = grad[..., at] if len(shape) == 3 else grad[at : grad.shape[0] if at == -1 else 1]
        torch.testing.assert_close(loss.reshape(-1)[at].double(), exact, rtol=2**-10, atol=0)
        torch.testing.assert_close(ours.double(), exact_grad, rtol=2**-10, atol=2**-24)


def far_apart(path):
    """Logits as rows, long rows, neighbouring rows and positions, 2**31 and 2**32 elements apart, in a file of
    holes."""
    flat = torch.from_file(str(path), shared=True, size=2**32 + 2**15, dtype=torch.bfloat16)
    for shape, strides in (
        ((2, 40), (2**32 + 8, 1)),
        ((2, 17001), (2**32 + 8, 1)),
        ((20, 3), (1, 2**31 + 8)),
        ((1, 3, 20), (0, 2**31 + 8, 1)),
        ((2, 9, 2), (2**31 + 8, 1, 2**30 + 8)),
    ):
        x = flat.as_strided(shape, strides)
        yield x.copy_(torch.randn(shape))


def test_offsets_past_2_to_32(backend, tmp_path):
    for x in far_apart(tmp_path / "logits"):
        y = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
        check(backend, x, y)
        check(backend, x, torch.rand(x.shape), gamma=2.0)


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_logits_targets_and_gradients(backend, layout, name):
    shapes = [(6, 9), (4, 9, 5), (2, 9, 3, 4)]
    for shape in shapes[:1] if backend == INTERPRETED else shapes:
        x = with_layout(3 * torch.randn(shape), layout)
        rows = shape[:1] + shape[2:]
        y = torch.randint(9, rows)
        options = options_named(name, 9)
        check(
            backend, x, with_layout(y, layout), grad=with_layout(torch.randn(rows), layout), reduction="none", **options
        )
        check(backend, x, torch.stack([y, y], -1).to(torch.int32)[..., 0], weight=with_layout(torch.rand(9), "strided"))
        if len(shape) == 4:
            check(backend, x.contiguous(memory_format=torch.channels_last), y.to(torch.uint8), **options)


def test_transposed_tokens(backend):
    logits = torch.randn(2, 7, 11)  # (batch, time, classes), handed over as (batch, classes, time)
    check(backend, logits.transpose(1, 2), torch.randint(11, (2, 7)), reduction="none", grad=torch.randn(2, 7))


ORDERS = [
    (0, 1, 2, 3), (0, 3, 1, 2), (0, 3, 2, 1), (0, 2, 4, 1, 3), (3, 1, 2, 0), (1, 4, 3, 2, 0), (2, 3, 0, 1), (2, 1, 0, 3)
]  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_any_order_of_memory(backend, order):
    """(batch, width, height, classes) in memory, for one, handed over as (batch, classes, height, width)."""
    check_dense_prediction(backend, torch.randn([3, 4, 2, 5, 3][: len(order)]).permute(order))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dims", [(2,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_crops_in_any_order_of_memory(backend, order, dims):
    x = torch.randn([3, 4, 2, 5, 3][: len(order)]).permute(order)
    for dim in dims:
        x = x.narrow(dim, 1, x.shape[dim] - 1)
    check_dense_prediction(backend, x)


def check_dense_prediction(backend, x):
    """Every kind of target for logits (N, C, d1, …), and what the pass knows besides."""
    classes, rows = x.shape[1], x.shape[:1] + x.shape[2:]
    y, other = torch.randint(classes, (2, *rows))
    grad = torch.randn(rows)
    check(backend, x, y, reduction="none", label_smoothing=0.1, grad=grad)
    check(backend, x, torch.rand(x.shape), reduction="none", gamma=1.0, grad=grad)
    for share in (0.3, torch.rand(rows[:1]), torch.rand(rows)):
        check(backend, x, (y, other, share), weight=torch.rand(classes), reduction="none", grad=grad)
    found, plain = (
        serve(backend, lambda: cross_entropy(z, y, reduction="none", outputs=True))  # noqa: B023
        for z in (x, x.contiguous())
    )
    for ours, theirs in zip(found, plain):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize(
    ("backend", "ignore_index"),
    [
        pytest.param(name, index, marks=[pytest.mark.slow] * (name == INTERPRETED and index not in (-100, 0)))
        for name in BACKENDS
        for index in (-100, -1, 0, 6, 255)
    ],
)
def test_ignored_rows(backend, ignore_index, name):
    weight = torch.rand(7) + 0.1
    y = torch.randint(1, 6, (6,))
    some, every = torch.tensor([True, False] * 3), torch.ones(6, dtype=torch.bool)
    for ignored in (~every, some, every):
        target = torch.where(ignored, ignore_index, y)
        for reduction, w in itertools.product(("mean", "sum", "none"), (None, weight)):
            options = {**options_named(name, 7), "reduction": reduction, "ignore_index": ignore_index}
            check(backend, 3 * torch.randn(6, 7), target, w, torch.ones(6) if reduction == "none" else None, **options)


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_hold_anything(backend, poison, name):
    for shape in ((4, 9), (2, 9, 3)):
        x = torch.randn(shape)
        rows = shape[:1] + shape[2:]
        y = torch.randint(9, rows)
        y.view(-1)[0] = -100
        x[(0, slice(None), *([0] * (len(shape) - 2)))] = poison
        for reduction in ("mean", "none"):
            options = {**options_named(name, 9), "reduction": reduction}
            grad = torch.ones(rows) if reduction == "none" else None
            loss, grad_x = check(backend, x, y, grad=grad, **options)
            assert loss.isfinite().all()
            assert (grad_x[(0, slice(None), *([0] * (len(shape) - 2)))] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_kept(backend, reduction):
    x = torch.full((3, 4), NAN, requires_grad=True)
    y = torch.full((3,), -100)
    for weight in (None, torch.rand(4)):
        for all_ignored in ("nan", "zero"):
            call = lambda: cross_entropy(x, y, weight, reduction=reduction, all_ignored=all_ignored)  # noqa: B023, E731
            loss = serve(backend, call)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert (grad == 0).all()
            if reduction == "mean" and all_ignored == "nan":
                assert loss.isnan()
            else:
                assert (loss == 0).all()
    one = serve(backend, lambda: cross_entropy(torch.zeros(1, 2), torch.tensor([0]), all_ignored="zero"))
    assert one.item() == pytest.approx(math.log(2))  # and nothing else is divided by another number


@on_the_cpu  # elsewhere it is a device-side assertion
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 2), (5,)])
def test_target_out_of_range(backend, dtype, shape):
    x = torch.randn(shape)
    for wrong in (5, 200, *([-1, -101, -(2**31)] if dtype != torch.uint8 else [])):
        y = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=dtype)
        y.view(-1)[-1] = wrong
        for options in ({}, {"gamma": 2.0}):
            with pytest.raises(IndexError, match=str(wrong)):
                serve(backend, lambda: cross_entropy(x, y, torch.rand(5), **options))  # noqa: B023


def test_weights_of_every_kind(backend):
    x, y = 2 * torch.randn(8, 6), torch.randint(6, (8,))
    zeros = torch.rand(6)
    zeros[y[0]] = 0
    huge = torch.rand(6)
    huge[2] = 1e6
    for weight in (zeros, huge, torch.rand(12)[::2], torch.rand(1).expand(6), torch.rand(6).double()):
        for dtype, reduction in itertools.product((torch.float32, torch.bfloat16), ("mean", "sum")):
            check(backend, x.to(dtype), y, weight, reduction=reduction)
            check(backend, x.to(dtype), y, weight, reduction=reduction, label_smoothing=0.1)
            check(backend, x.to(dtype), y, weight, reduction=reduction, gamma=2.0)
    infinite = torch.ones(6)
    infinite[y[0]] = INF
    assert serve(backend, lambda: cross_entropy(x, y, infinite, reduction="sum")) == INF


@pytest.mark.parametrize("classes", [6, 600])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"z_loss": 0.1}], ids=str)
def test_kept_rows_of_weight_0(backend, classes, options):
    """Their mean divides by 0: NaN as in PyTorch, or 0, even where smoothing or z_loss give them a loss."""
    x, y = torch.randn(5, classes), torch.tensor([0, 1, 1, -100, 0])
    absent = torch.ones(classes)
    absent[:2] = 0
    for all_ignored, extra in itertools.product(("nan", "zero"), ({}, {"grad_in_forward": True})):
        leaf = x.clone().requires_grad_()
        options_ = {**options, **extra, "all_ignored": all_ignored}
        loss = serve(backend, lambda: cross_entropy(leaf, y, absent, **options_))  # noqa: B023
        loss.backward()
        expected = NAN if all_ignored == "nan" else 0.0
        assert_equal_with_nan(loss, torch.tensor(expected))
        assert_equal_with_nan(leaf.grad[y >= 0], torch.full((4, classes), expected))
        assert (leaf.grad[3] == 0).all()
    if "z_loss" not in options:
        leaf = x.clone().requires_grad_()
        stock = F.cross_entropy(leaf, y, absent, **options)
        stock.backward()
        assert stock.isnan() and leaf.grad[y >= 0].isnan().all()


def assert_equal_with_nan(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_means_divide_by_weights_for_indices_and_by_rows_for_probabilities(backend):
    x, y, weight = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    terms = -weight[y] * x.log_softmax(1)[range(5), y]
    probabilities = F.one_hot(y, 4).float()
    index = serve(backend, lambda: cross_entropy(x, y, weight))
    dense = serve(backend, lambda: cross_entropy(x, probabilities, weight))
    torch.testing.assert_close(index, terms.sum() / 16)
    torch.testing.assert_close(dense, terms.sum() / 5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("smoothing", [0.0, 1e-8, 0.1, 1.0])
def test_label_smoothing(backend, smoothing):
    for shape in ((5, 7), (2, 7, 3)):
        rows = shape[:1] + shape[2:]
        x, y = 3 * torch.randn(shape), torch.randint(7, rows)
        y.view(-1)[0] = -100
        for weight in (None, torch.rand(7)):
            check(backend, x, y, weight, label_smoothing=smoothing)
            check(backend, x, y, weight, label_smoothing=smoothing, gamma=2.0)
    # ε is shared among all C classes, the target's included, and each term has its own focal power
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    q = torch.tensor([1 - smoothing + smoothing / 3, smoothing / 3, smoothing / 3], dtype=torch.float64)
    ours = serve(backend, lambda: cross_entropy(p.log(), torch.tensor(0), label_smoothing=smoothing, gamma=2.0))
    torch.testing.assert_close(ours, -(q * (1 - p) ** 2 * p.log()).sum(), rtol=1e-12, atol=0)


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize("where", ["one", "first block", "all but the target", "target"])
def test_logits_of_minus_infinity(backend, where, name):
    classes = 300
    for y in (3, 299):
        x = torch.randn(2, classes)
        x[0] = x[0].index_fill(
            0,
            {
                "one": torch.tensor([7]),
                "first block": torch.tensor([k for k in range(260) if k != y]),
                "all but the target": torch.tensor([k for k in range(classes) if k != y]),
                "target": torch.tensor([y]),
            }[where],
            -INF,
        )
        options = {**options_named(name, classes), "reduction": "none"}
        if options.get("z_loss"):
            options["z_loss"] = 0.0
        loss, grad = check(backend, x, torch.tensor([y, y]), grad=torch.ones(2), **options)
        assert not loss.isnan().any()
        assert not grad.isnan().any()
        infinite = where == "target" or bool(options.get("label_smoothing"))
        assert (loss[0] == INF) == infinite


def test_rows_without_a_softmax_are_nan(backend):
    for row in ([-INF, -INF, -INF], [INF, 0.0, 0.0], [NAN, 0.0, 0.0]):
        x = torch.tensor([row, [1.0, 2.0, 3.0]], requires_grad=True)
        y = torch.tensor([0, 1])
        loss = serve(backend, lambda: cross_entropy(x, y, reduction="none"))  # noqa: B023
        torch.testing.assert_close(loss, F.cross_entropy(x, y, reduction="none"), equal_nan=True)
        (grad,) = torch.autograd.grad(loss[1], x, retain_graph=True)
        assert grad[1].isfinite().all()
        (grad,) = torch.autograd.grad(loss[0], x)
        assert grad[0].isnan().any()


@pytest.mark.parametrize("lost", [NAN, INF, -INF])
def test_rows_without_a_softmax_are_nan_even_where_no_class_has_a_share(backend, lost):
    """As in PyTorch: factors of 0 hide a class that is impossible, but not that something went wrong. Their gradient
    is NaN, and a loss of 0 above it would let it pass."""
    for shape in ((3, 9), (3, 9, 5)) if backend == "triton" else ((3, 9), (3, 9, 5), (3, 5000)):
        x, y = torch.randn(shape), torch.randint(1, 8, (3, *shape[2:]))
        first = (0, slice(None), *[0] * (len(shape) - 2))
        x[first] = lost
        y[first[:1] + first[2:]] = 0
        zero = torch.ones(shape[1]).index_fill(0, torch.tensor([0]), 0.0)
        for options in (
            {"alpha": 0.0},
            {"alpha": zero, "gamma": 2.0},
            {"alpha": 0.0, "label_smoothing": 0.1, "gamma": 1.5},
            {"weight": zero},
            {"weight": zero * 0, "label_smoothing": 0.1, "z_loss": 1e-3},
            {"weight": zero * 0, "probabilities": True},
        ):
            options, target = dict(options), y
            if options.pop("probabilities", False):
                target = torch.rand(shape)
            leaf = move(x, device_of(backend)).requires_grad_()
            there = {name: move(value, device_of(backend)) for name, value in options.items()}
            target = move(target, device_of(backend))
            loss = serve(backend, lambda: cross_entropy(leaf, target, reduction="none", **there))  # noqa: B023
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            loss, grad = move(loss.detach(), "cpu"), move(grad, "cpu")
            assert loss[first[:1] + first[2:]].isnan() and grad[first].isnan().any(), options
            assert loss.isnan().sum() == 1, options
            assert grad.isnan().any(1).sum() == 1, options


@pytest.mark.sampled(2)
@ALL_OPTIONS
@pytest.mark.parametrize("logit", [1e4, 1e8, -200.0, 65504.0])
def test_large_and_equal_logits(backend, logit, name):
    dtype = torch.float16 if logit == 65504.0 else torch.float32
    equal = torch.full((2, 10), logit, dtype=dtype)
    lone = torch.zeros(2, 10, dtype=dtype)
    lone[:, 4] = logit
    options = {**options_named(name, 10), "z_loss": 0.0}
    for x in (equal, lone):
        _, grad = check(backend, x, torch.tensor([4, 5]), grad=torch.ones(2, dtype=dtype), reduction="none", **options)
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_confident_rows(backend, dtype, gamma):
    """Near p_t = 1 the target's gradient, p_t − 1, must not be what is left of two rounded numbers."""
    for p in (0.9, 0.99, 0.999, 1 - 1e-5, 1 - 1e-7):
        x = torch.tensor([[math.log(p / (1 - p) * 3), 0.0, 0.0, 0.0]]).to(dtype)
        loss, grad = check(backend, x, torch.tensor([0]), gamma=gamma)
        assert loss >= 0
        _, exact = oracle(x, torch.tensor([0]), gamma=gamma)
        # the gradient of the target is a product of p_t − 1, of which fp32 keeps 2**-24 / (1 − p), rounded once
        relative = torch.finfo(dtype).eps + 8 * (1 + gamma) * 2**-24 / (1 - p)
        assert (
            abs(grad[0, 0].double() - exact[0, 0]) <= relative * exact[0, 0].abs() + torch.finfo(dtype).smallest_normal
        )


@pytest.mark.parametrize("gamma", [1e-3, 0.5, 1, 2, 2.0, 5.0, 20.0])
def test_focal_is_finite_everywhere(backend, gamma):
    x = torch.tensor([[1e3, 0.0], [-1e3, 0.0], [0.0, 0.0], [30.0, 0.0], [-90.0, 0.0], [-110.0, 0.0], [1e-7, 0.0]])
    y = torch.zeros(len(x), dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        loss, grad = check(backend, x.to(dtype), y, grad=torch.ones(len(x), dtype=dtype), gamma=gamma, reduction="none")
        assert loss.isfinite().all()
        assert (loss >= 0).all()
        assert grad.isfinite().all()
        v = x.to(dtype).requires_grad_()
        loss = serve(backend, lambda: cross_entropy(v, y, gamma=gamma, reduction="sum"))  # noqa: B023
        (first,) = torch.autograd.grad(loss, v, create_graph=True)
        (second,) = torch.autograd.grad((first * torch.randn(first.shape, dtype=dtype)).sum(), v)
        assert second.isfinite().all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
def test_smoothed_focal_terms_of_likely_classes(backend, gamma, dtype):
    """Any class may be the likely one, the target or another, in whatever vector of the row."""
    classes = 331
    x = torch.randn(6, classes, generator=torch.Generator().manual_seed(5))
    for row, p in enumerate((0.3, 0.5, 0.6, 0.7, 0.99, 0.999999)):
        x[row, 37 * row] = math.log(p / (1 - p)) + torch.logsumexp(x[row], 0)
    target = torch.tensor([0, 37, 74, 5, 148, 185])
    weight = torch.linspace(0.5, 1.5, classes)
    weight[100] = 0.0
    for w in (None, weight):
        check(backend, x.to(dtype), target, w, label_smoothing=0.1, gamma=gamma, reduction="none")


def test_focal_with_gamma_0_is_cross_entropy(backend):
    x, y = torch.randn(6, 9), torch.randint(9, (6,))
    plain = serve(backend, lambda: cross_entropy(x, y))
    for gammas in ((0, 0.0), (2, 2.0)):  # a whole number is as good
        whole, real = (serve(backend, lambda: focal_loss(x, y, gamma=gamma)) for gamma in gammas)  # noqa: B023
        assert torch.equal(whole, real)
        assert torch.equal(whole, plain) == (gammas[0] == 0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1, torch.tensor(0.5), torch.linspace(0, 1, 9)])
def test_alpha_scales_terms_and_weight_does_not_enter_p(backend, alpha):
    x, y, weight = torch.randn(6, 9), torch.randint(9, (6,)), torch.rand(9)
    for reduction, w in itertools.product(("mean", "sum"), (None, weight)):
        check(backend, x, y, w, alpha=alpha, gamma=2.0, reduction=reduction)
        check(backend, x, y, w, alpha=alpha, reduction=reduction)


def test_softmax_over_two_classes_is_a_sigmoid_of_their_difference(backend):
    x, y = 3 * torch.randn(20, 2, dtype=torch.float64), torch.randint(2, (20,))
    for gamma in (0.0, 0.5, 2.0):
        softmax = serve(backend, lambda: cross_entropy(x, y, gamma=gamma, reduction="none"))  # noqa: B023
        margin = (x[:, 1] - x[:, 0]).unsqueeze(1)
        sigmoid = serve(backend, lambda: sigmoid_focal_loss(margin, y.double().unsqueeze(1), alpha=-1, gamma=gamma))  # noqa: B023
        torch.testing.assert_close(softmax, sigmoid.squeeze(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_formulas_of_other_libraries(backend, gamma):
    """Where they agree with the definition, losses and gradients: kornia's, with the term of every class and a one-hot
    target, mmcv's, with the softmax first, class weights and rows of negative targets left out, and torchvision's,
    with a sigmoid."""

    def compare(call, formula, x):
        grad = torch.randn(formula.shape, dtype=x.dtype)
        ours = serve(backend, call)
        torch.testing.assert_close(ours, formula)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x, grad, retain_graph=True) for loss in (ours, formula)))

    for shape in ((30, 7), (3, 7, 4, 2)):
        x, y = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randint(7, shape[:1] + shape[2:])
        onehot = F.one_hot(y, 7).movedim(-1, 1).double()
        p, log_p = x.softmax(1), x.log_softmax(1)
        kornia = (onehot * -0.25 * (1 - p) ** gamma * log_p).sum(1)
        compare(lambda: focal_loss(x, y, gamma=gamma, alpha=0.25, reduction="none"), kornia, x)  # noqa: B023
        weight, labels = torch.rand(7, dtype=torch.float64), torch.where(torch.rand(y.shape) < 0.3, -1, y)
        p_y = p.gather(1, y.unsqueeze(1)).squeeze(1)
        mmcv = -0.25 * (1 - p_y) ** gamma * p_y.clamp(min=torch.finfo(torch.float32).tiny).log() * weight[y]
        options = {"gamma": gamma, "alpha": 0.25, "weight": weight, "ignore_index": -1, "reduction": "none"}
        compare(lambda: focal_loss(x, labels, **options), torch.where(labels < 0, 0, mmcv), x)  # noqa: B023
    x, y = torch.randn(30, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (30,))
    t, s = F.one_hot(y, 7).double(), x.sigmoid()
    p_t = s * t + (1 - s) * (1 - t)
    terms = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** gamma
    torchvision = (0.25 * t + 0.75 * (1 - t)) * terms
    for targets in (y, t):
        compare(lambda: sigmoid_focal_loss(x, targets, gamma=gamma, reduction="none"), torchvision, x)  # noqa: B023


def test_no_positives_divide_by_one(backend):
    x, background = torch.randn(4, 5), torch.full((4,), 5)
    for zero in (0.0, torch.tensor(0.0)):
        ours = serve(backend, lambda: sigmoid_focal_loss(x, background, reduction="sum", normalizer=zero))  # noqa: B023
        torch.testing.assert_close(ours, sigmoid_focal_loss(x, torch.zeros(4, 5), reduction="sum"))


@compiled
def test_argmax_past_the_whole_numbers_of_fp32(backend):
    x = torch.zeros(1, 2**24 + 4, dtype=torch.bfloat16)
    x[0, -2] = 1.0
    target = torch.tensor([x.shape[1] - 2])
    found = serve(backend, lambda: cross_entropy(x, target, outputs=True))
    assert found.argmax.item() == target.item()
    assert found.correct.all()


def test_gradient_scaler(backend):
    """A scaler's factor comes with the incoming gradient, in fp16 before the gradient is rounded."""
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(64, 9).to(dtype).requires_grad_()
        y = torch.randint(9, (64,))
        for options in ({}, {"grad_in_forward": True}):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            loss = serve(backend, lambda: cross_entropy(x, y, **options))  # noqa: B023
            (grad,) = torch.autograd.grad(scaler.scale(loss), x)
            wide = x.detach().double().requires_grad_()
            (exact,) = torch.autograd.grad(F.cross_entropy(wide, y), wide)
            # A GPU's exponential rounds its exponent, here of up to 8, besides.
            rtol = 4 * torch.finfo(dtype).eps + 16 * 2.0**-24
            torch.testing.assert_close(grad.double() / 2**10, exact, rtol=rtol, atol=2.0**-24 / 2**10)


@compiled
@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
def test_rows_of_several_blocks_with_everything(backend, kind):
    for classes in (4097, 9001):
        x, y, other = 3 * torch.randn(2, classes), torch.tensor([5, classes - 1]), torch.tensor([4096, 7])
        q = torch.rand(2, classes).softmax(1)
        target = {"index": y, "pair": (y, other, 0.3), "probabilities": q}[kind]
        for name in ("focal with smoothing", "family", "smoothing"):
            check(backend, x, target, torch.rand(classes), **options_named(name, classes))
            check(backend, x.bfloat16(), target, **options_named(name, classes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_that_are_those_of_the_logits(backend, dtype):
    """Where nothing is left to learn the gradient is the rounding of p alone, for one class exactly 0."""
    for shape, weight in (((3, 1), torch.tensor([1.0791])), ((4, 65), None), ((2, 65, 3), None)):
        x = torch.randn(shape).to(dtype)
        check(backend, x, x.to(torch.promote_types(dtype, torch.float32)).softmax(1), weight)


def test_probabilities(backend):
    x = torch.randn(4, 7)
    sharp = F.one_hot(torch.randint(7, (4,)), 7).float()
    for q in (torch.rand(4, 7), sharp, torch.zeros(4, 7), torch.rand(4, 7).bfloat16(), torch.rand(4, 7).double()):
        for weight, smoothing in itertools.product((None, torch.rand(7)), (0.0, 0.1)):
            check(backend, x, q, weight, label_smoothing=smoothing)
            check(backend, x, q, weight, label_smoothing=smoothing, gamma=2.0)
    check(backend, torch.randn(4, 1), torch.rand(4, 1))
    check(backend, torch.randn(5), torch.rand(5))  # (C,) logits and (C,) probabilities
    check(backend, torch.randn(2, 7, 3), torch.rand(2, 7, 3), reduction="none", grad=torch.randn(2, 3))
    masked = x.clone()
    masked[:, 2] = -INF
    q = sharp.clone()
    q[:, 2] = 0  # 0 of an infinite term is 0
    loss, grad = check(backend, masked, q)
    assert loss.isfinite()
    assert grad.isfinite().all()


def test_shapes_that_could_mean_either(backend):
    """As many rows as classes, and a row of its own: the dtype of the target says what it holds."""
    x, y = torch.randn(5, 5), torch.randint(5, (5,))
    check(backend, x, y)
    check(backend, x, torch.rand(5, 5))
    check(backend, x[0], y[0])
    check(backend, x[0], torch.rand(5))
    for logits, target in ((x[0], y), (x, F.one_hot(y, 5)), (x, torch.rand(5))):
        with pytest.raises(ValueError, match="target"):
            serve(backend, lambda: cross_entropy(logits, target))  # noqa: B023


def test_gradient_to_probabilities(backend):
    x, q = torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64)
    q[0, 0] = 0
    q.requires_grad_()
    (grad,) = torch.autograd.grad(serve(backend, lambda: cross_entropy(x, q)), q)
    torch.testing.assert_close(grad, -x.log_softmax(1) / 4)
    if backend != "reference":
        with use(backend), pytest.raises(RuntimeError, match="forced"):
            cross_entropy(x, q)


def test_gradient_to_the_share_of_two_targets():
    x, (a, b), share = torch.randn(4, 7, dtype=torch.float64), torch.randint(7, (2, 4)), torch.tensor(0.3)
    share.requires_grad_()
    for logits in (x, x.clone().requires_grad_()):
        (grad,) = torch.autograd.grad(cross_entropy(logits, (a, b, share)), share)
        of_a, of_b = (F.cross_entropy(x, y) for y in (a, b))
        torch.testing.assert_close(grad, (of_a - of_b).float())


def test_shares_of_two_targets_are_their_probabilities(backend):
    x = torch.randn(4, 6)
    a, b = torch.randint(6, (2, 4))
    for share in (0.3, torch.tensor(0.3), torch.rand(4)):
        s = share.unsqueeze(-1) if isinstance(share, torch.Tensor) and share.dim() else share
        q = s * F.one_hot(a, 6) + (1 - s) * F.one_hot(b, 6)
        for options in ({}, {"label_smoothing": 0.1}, {"gamma": 2.0}, {"margin": torch.rand(6)}):
            ours = serve(backend, lambda: cross_entropy(x, (a, b, share), **options))  # noqa: B023
            torch.testing.assert_close(ours, serve("reference", lambda: cross_entropy(x, q, **options)))  # noqa: B023
    weight = torch.rand(6)
    for share, y in ((1.0, a), (0.0, b)):
        ours = serve(backend, lambda: cross_entropy(x, (a, b, share), weight))  # noqa: B023
        torch.testing.assert_close(ours, cross_entropy(x, y, weight))
    ignored = a.clone()
    ignored[0] = -100
    grad = check(backend, x, (ignored, b, 0.4), weight)[1]
    assert (grad[0] == 0).all()
    check(backend, x, (a, ignored, 0.4), weight)


def test_scale_with_adjustment_on_odd_sizes(backend):
    """What pads a vector must stay without mass after the logits have been moved and scaled."""
    for classes in (1, 3, 5, 17, 63, 65):
        x = torch.full((2, classes), -200.0)
        for sign in (-50.0, 50.0):
            adjustment = torch.full((classes,), sign)
            check(backend, x, torch.tensor([0, classes - 1]), logit_adjustment=adjustment, scale=0.01)
            check(backend, x, torch.tensor([0, classes - 1]), margin=adjustment, scale=3.0, label_smoothing=0.1)


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
def test_scale_where_the_softmax_saturates(backend, scale):
    """A scale that makes every row even, or certain: the gradient carries the scale, and neither overflows."""
    x, y = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0], [-2.0, 3.0, 2.9]]), torch.tensor([0, 1, 0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in ({}, {"gamma": 2.0}, {"label_smoothing": 0.1}, {"margin": torch.tensor([0.3, 0.2, 0.1])}):
            loss, grad = check(backend, x.to(dtype), y, scale=scale, **options)
            assert loss.isfinite()
            assert grad.isfinite().all()


# ---- autograd ----------------------------------------------------------------------------------------------


def test_backward_twice(backend):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    loss = serve(backend, lambda: cross_entropy(x, y, reduction="none"))
    ones, other = torch.ones(4), torch.randn(4)
    first, again = (torch.autograd.grad(loss, x, ones, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    (weighted,) = torch.autograd.grad(loss, x, other)
    torch.testing.assert_close(weighted, first * other[:, None])


def test_logits_shared_with_another_loss(backend):
    w, y = torch.randn(6, 5, requires_grad=True), torch.randint(5, (4,))
    data = torch.randn(4, 6)
    for upstream in (torch.tanh, lambda t: torch.softmax(t, 1), lambda t: t):  # they save their output
        logits = upstream(data @ w)
        before, version = logits.detach().clone(), logits._version
        loss = serve(backend, lambda: cross_entropy(logits, y)) + logits.square().mean()  # noqa: B023
        (ours,) = torch.autograd.grad(loss, w)
        assert torch.equal(before, logits)
        assert logits._version == version
        logits = upstream(data @ w)
        (theirs,) = torch.autograd.grad(F.cross_entropy(logits, y) + logits.square().mean(), w)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    with mode():
        loss = serve(backend, lambda: cross_entropy(x, y))
        parameter = torch.rand(5, requires_grad=True)
        serve(backend, lambda: cross_entropy(x, y, parameter))  # nobody asks for its gradient
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(x, y).detach())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64])
def test_incoming_gradients(backend, grad_dtype):
    x, y = torch.randn(5, 4), torch.randint(4, (5,))
    for grad in (torch.randn(5), torch.zeros(5), -torch.ones(5), torch.rand(1).expand(5), torch.randn(10)[::2]):
        check(backend, x, y, grad=grad, reduction="none")
    # Under GradScaler the gradient of a reduced loss is not 1.
    check(backend, x.half(), y, grad=torch.tensor(1024.0).half())
    # another dtype of the loss's gradient arrives through a cast
    loss = serve(backend, lambda: cross_entropy(x.half().requires_grad_(), y, reduction="none"))
    loss.to(grad_dtype).backward(torch.randn(5, dtype=grad_dtype))


DIFFERENTIABLE = [*OPTION_SETS, "family"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
def test_gradcheck_and_gradgradcheck(backend, name, kind):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y, z = torch.tensor([0, 4, -100]), torch.tensor([1, 4, 2])
    target = {"index": y, "pair": (y, z, 0.3), "probabilities": torch.rand(3, 5, dtype=torch.float64)}[kind]
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options_named(name, 5).items()}
    weight = torch.rand(5, dtype=torch.float64)
    for reduction in ("mean", "none") if backend != "triton" else ("mean",):  # the interpreter is slow
        loss = lambda t: serve(  # noqa: E731
            backend,
            lambda: cross_entropy(t, target, weight, reduction=reduction, **options),  # noqa: B023
        )
        assert torch.autograd.gradcheck(loss, x)
        if backend == "reference" or name == "family":  # every second derivative is taken of the reference
            assert torch.autograd.gradgradcheck(loss, x)


def test_create_graph_gives_the_gradient_itself_too(backend):
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, -100, 2])
    loss = serve(backend, lambda: cross_entropy(x, y))
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (graph,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(plain, graph.detach())
    assert graph.requires_grad


def test_gradient_penalty_through_a_network(backend):
    """A second derivative that reaches weights behind the logits."""

    def penalty(loss_of):
        torch.manual_seed(1)
        net = torch.nn.Linear(6, 5)
        data = torch.randn(4, 6, requires_grad=True)
        loss = loss_of(net(data), torch.tensor([0, 1, 2, 3]))
        (grad,) = torch.autograd.grad(loss, data, create_graph=True)
        grad.square().sum().backward()
        return net.weight.grad

    torch.testing.assert_close(penalty(lambda *a: serve(backend, lambda: cross_entropy(*a))), penalty(F.cross_entropy))


@pytest.mark.parametrize("argument", ["weight", "alpha", "logit_adjustment", "margin"])
def test_vectors_must_not_want_gradients(argument):
    x, y = torch.randn(4, 5, requires_grad=True), torch.randint(5, (4,))
    vector = torch.rand(5, requires_grad=True)
    with pytest.raises(ValueError, match=f"{argument} must not require a gradient"):
        cross_entropy(x, y, **{argument: vector})
    cross_entropy(x, y, **{argument: vector.detach()})


# ---- transforms --------------------------------------------------------------------------------------------


def test_vmap_and_functional_gradients(backend):
    x, y = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    y[0, 0] = -100
    loss = lambda x, y: serve_transform(backend, lambda: cross_entropy(x, y, gamma=2.0))  # noqa: E731
    expected = torch.stack([cross_entropy(a, b, gamma=2.0) for a, b in zip(x, y)])
    torch.testing.assert_close(torch.vmap(loss)(x, y), expected)
    per_sample = torch.vmap(torch.func.grad(loss))(x, y)
    for k in range(3):
        v = x[k].clone().requires_grad_()
        torch.testing.assert_close(per_sample[k], torch.autograd.grad(cross_entropy(v, y[k], gamma=2.0), v)[0])
    torch.testing.assert_close(
        torch.vmap(lambda t: serve_transform(backend, lambda: cross_entropy(x[0], t)))(y),  # only targets are mapped
        torch.stack([cross_entropy(x[0], t) for t in y]),
    )
    torch.func.hessian(lambda t: loss(t, y[0]))(x[0])
    torch.func.jvp(lambda t: loss(t, y[0]), (x[0],), (x[1],))


@pytest.mark.parametrize("name", ["weight", "alpha", "margin", "logit_adjustment"])
def test_gradient_of_each_sample_alone(name):
    """A sample has one target, 0-d, which vmap lets nobody read."""
    x, y, options = torch.randn(3, 5), torch.tensor([4, 0, -100]), {name: torch.rand(5), "reduction": "sum"}
    alone = torch.vmap(torch.func.grad(lambda x, y: cross_entropy(x, y, **options)))(x, y)
    v = x.clone().requires_grad_()
    torch.testing.assert_close(alone, torch.autograd.grad(cross_entropy(v, y, **options), v)[0])


def serve_transform(backend, call):
    """Transforms are served by the reference; the automatic choice must see that by itself."""
    return call() if backend != "reference" else serve(backend, call)


def test_forced_kernels_refuse_transforms():
    for backend in KERNELS:
        with fastreg.use_backend(backend), pytest.raises(RuntimeError, match="transform"):
            torch.vmap(cross_entropy)(torch.randn(2, 4, 5), torch.randint(5, (2, 4)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast(backend, dtype):
    x, y = torch.randn(4, 5).to(dtype), torch.tensor([0, 1, 2, -100])
    with torch.autocast("cpu", torch.bfloat16):
        for target in (y, torch.rand(4, 5)):
            x.requires_grad_()
            ours, theirs = serve(backend, lambda: cross_entropy(x, target)), F.cross_entropy(x, target)  # noqa: B023
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)
            (grad,) = torch.autograd.grad(ours, x)
            assert grad.dtype == dtype
        assert serve(backend, lambda: sigmoid_focal_loss(x, x.detach().sigmoid(), reduction="sum")).dtype == ours.dtype


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transforms_and_compile_of_any_order_of_memory(dynamic):
    call = lambda x, y: cross_entropy(x, y, gamma=1.0)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for order in ((0, 3, 2, 1), (2, 3, 0, 1), (2, 1, 0, 3)):
        whole = torch.randn(4, 5, 6, 7).permute(order)
        for x in (whole, whole[:, :, 1:, 1:]):
            y = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
            x.requires_grad_()
            ours, eager = compiled(x, y), call(x, y)
            torch.testing.assert_close(ours, eager)
            torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(eager, x)[0])
    x, y = torch.randn(3, 4, 5, 6, 7).permute(0, 1, 4, 3, 2), torch.randint(7, (3, 4, 6, 5))
    torch.testing.assert_close(torch.vmap(call)(x, y), torch.stack([call(a, b) for a, b in zip(x, y)]))


@compiled  # which the interpreter is not
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(backend, dynamic):
    torch._dynamo.reset()

    def step(x, y, w):
        return cross_entropy(x, y, w, label_smoothing=0.1) + cross_entropy(x, y, gamma=2.0)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, classes in ((6, 5), (9, 5), (4, 11)):
        x, y = torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))
        y[1] = -100  # rows that are ignored must not be read from, or left unwritten
        w = torch.rand(classes)
        with fastreg.use_backend(backend) if backend == "reference" else contextlib.nullcontext():
            ours, eager = compiled(x, y, w), step(x, y, w)
        torch.testing.assert_close(ours, eager)
        torch.testing.assert_close(torch.autograd.grad(ours, x)[0], torch.autograd.grad(eager, x)[0])


@compiled
@pytest.mark.slow
def test_compiles_with_inductor(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: cross_entropy(x, y, reduction="none"), fullgraph=True)
    x, y = torch.randn(6, 5, requires_grad=True), torch.tensor([0, -100, 2, 3, 4, -100])
    with use(backend):
        ours = compiled(x, y)
    stock, grad = F.cross_entropy(x, y, reduction="none"), torch.randn(6)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x, grad) for loss in (ours, stock)))


def operator_calls():
    """Every operator of the losses with arguments that its kernels take."""
    x, y, w = torch.randn(4, 5), torch.tensor([0, 1, -100, 3]), torch.rand(5)
    share = torch.rand(4)
    for backend in KERNELS:
        for target, other, gamma in (
            (y, None, 0.0),
            (y, y.flip(0), 0.0),
            (torch.rand(4, 5), None, 0.0),
            (y, None, 2.0),
        ):
            tensors = (x, target, w, None, None, None, other, None if other is None else share)
            options = (-100, 1, 0.1, gamma, 1.0, 1.0, 0.0)
            forward = getattr(torch.ops.fastreg.cross_entropy_forward, backend)
            yield f"cross_entropy_forward.{backend}", (*tensors, *options, False, False)
            _, lse, denominator = forward(*tensors, *options, False, False)
            yield f"cross_entropy_backward.{backend}", (torch.tensor(1.0), *tensors, lse, denominator, *options)
            for want, grad in ((False, torch.empty_like(x)), (True, None), (True, torch.empty_like(x))):
                yield f"cross_entropy_forward_extra.{backend}", (*tensors, *options, False, False, want, want, grad)
        yield f"scale_gradient_.{backend}", (torch.randn(4, 5), torch.tensor(0.5))
        for logits, target, reduce in (
            (x, torch.rand(4, 5), True),
            (x, y, False),
            (torch.randn(4, 6)[:, 1:], torch.rand(4, 7)[:, :5], False),
        ):
            args = (logits, target, w, torch.tensor(3.0) if reduce else None, 0.25, 2.0, reduce, 1.0)
            yield f"sigmoid_focal_forward.{backend}", (*args, False)
            if backend == "cpu":
                yield "sigmoid_focal_small.cpu", (*args, False)
            yield f"sigmoid_focal_backward.{backend}", (torch.tensor(1.0) if reduce else torch.rand(4, 5), *args)


def test_operators_pass_opcheck():
    for name, args in operator_calls():
        op, overload = name.split(".")
        torch.library.opcheck(getattr(getattr(torch.ops.fastreg, op), overload), args)


# ---- memory, determinism -----------------------------------------------------------------------------------


@contextlib.contextmanager
def rubbish_in_fresh_memory():
    """Where no kernel writes, numbers far from any result stand: NaN in tensors that PyTorch makes, and in all memory
    of the host, if the C library is glibc, bytes of 0xFE, which are no less than 10^37 in every floating dtype."""
    mallopt, perturb = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None), -6
    torch.use_deterministic_algorithms(True)
    mallopt(perturb, 0x01)
    try:
        yield
    finally:
        mallopt(perturb, 0)
        torch.use_deterministic_algorithms(False)


@pytest.mark.sampled(2)
@ALL_OPTIONS
def test_every_output_is_written(backend, name):
    for shape, extra in itertools.product(((5, 7), (3, 7, 4)), (False, True)):
        rows = shape[:1] + shape[2:]
        x, y = torch.randn(shape, requires_grad=True), torch.randint(7, rows)
        y.view(-1)[::3] = -100
        for reduction in ("mean", "none"):
            options = {**options_named(name, 7), "reduction": reduction, "outputs": extra}
            options["grad_in_forward"] = extra and reduction != "none"
            want = serve("reference", lambda: cross_entropy(x, y, **options))  # noqa: B023
            with rubbish_in_fresh_memory():
                got = serve(backend, lambda: cross_entropy(x, y, **options))  # noqa: B023
                (grad,) = torch.autograd.grad((got.loss if extra else got).sum(), x)
            (want_grad,) = torch.autograd.grad((want.loss if extra else want).sum(), x)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(grad, want_grad)


def test_same_bits_every_time(backend):
    rows = 40 if backend == INTERPRETED else 257
    x, y, weight = torch.randn(rows, 33, requires_grad=True), torch.randint(33, (rows,)), torch.rand(33)
    runs = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        loss = serve(backend, lambda: cross_entropy(x, y, weight, label_smoothing=0.1))
        runs.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


def test_a_row_does_not_depend_on_its_place(backend):
    x, y = torch.randn(9, 33), torch.randint(33, (9,))
    whole = serve(backend, lambda: cross_entropy(x, y, reduction="none"))
    for k in range(9):
        alone = serve(backend, lambda: cross_entropy(x[k : k + 1], y[k : k + 1], reduction="none"))  # noqa: B023
        if backend == "triton" and not _backends.interpreting():  # how a row is added depends on how many a tile has
            torch.testing.assert_close(alone[0], whole[k], rtol=33 * 2**-24, atol=33 * 2**-24)
        else:
            assert torch.equal(alone[0], whole[k])


# ---- what else the pass knows ------------------------------------------------------------------------------


@ALL_OPTIONS
@pytest.mark.parametrize("shape", [(6, 9), (2, 9, 3), (9,)])
def test_outputs(backend, shape, name):
    x = 3 * torch.randn(shape)
    y = torch.randint(9, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if y.dim():
        y.view(-1)[0] = -100
    options = options_named(name, 9)
    dim = min(len(shape) - 1, 1)
    for reduction in ("mean", "none"):
        plain = serve(backend, lambda: cross_entropy(x, y, reduction=reduction, **options))  # noqa: B023
        found = serve(backend, lambda: cross_entropy(x, y, reduction=reduction, outputs=True, **options))  # noqa: B023
        torch.testing.assert_close(found.loss, plain)
        kept = y != -100
        z = x.double().movedim(dim, -1)
        predicted = torch.where(kept, z.argmax(-1), -1)
        if name == "family":
            onehot = F.one_hot(y.clamp(min=0), 9)
            z = options["scale"] * (z + options["logit_adjustment"] - options["margin"] * onehot)
        z = z * (options.get("scale", 1.0) if name != "family" else 1.0)
        torch.testing.assert_close(found.lse.double(), torch.where(kept, z.logsumexp(-1), 0.0), rtol=1e-6, atol=1e-6)
        assert found.argmax.dtype == torch.int64
        assert torch.equal(found.argmax, predicted)
        assert torch.equal(found.correct, kept & (predicted == y))
        assert found.lse.shape == found.argmax.shape == y.shape


def test_only_the_loss_has_a_gradient(backend):
    x = torch.randn(4, 5, requires_grad=True)
    found = serve(backend, lambda: cross_entropy(x, torch.tensor([0, 1, 2, 3]), outputs=True))
    assert [t.requires_grad for t in found] == [True, False, False, False]
    (grad,) = torch.autograd.grad(found.loss, x)
    torch.testing.assert_close(grad, torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1, 2, 3])), x)[0])


def test_argmax_takes_the_lowest_of_equals(backend):
    for classes in (9, 33, 1025):
        x = torch.zeros(3, classes)
        x[1, [classes - 1, classes // 2]] = 5.0
        x[2] = -INF
        x[2, 4:6] = -7.0
        found = serve(backend, lambda: cross_entropy(x, torch.tensor([0, 0, 4]), outputs=True))  # noqa: B023
        assert found.argmax.tolist() == [0, classes // 2, 4]
    channels = torch.zeros(2, 5, 4)
    channels[:, 3] = 1.0
    found = serve(backend, lambda: cross_entropy(channels, torch.zeros(2, 4, dtype=torch.int64), outputs=True))
    assert (found.argmax == 3).all()


def test_argmax_leaves_nan_out(backend):
    for classes in (9, 33, 1025, 5000):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, classes).to(dtype)
            expected = [classes - 1, 2, 3, classes // 2]
            for row, c in enumerate(expected):
                x[row, c] = INF if row == 0 else 50.0
            for row, nan in enumerate(([0], [0, 1, 7], [classes - 1], list(range(0, classes // 2, 2)))):
                x[row, nan] = NAN
            for logits in (x, x.T.contiguous().T):
                found = serve(backend, lambda: cross_entropy(logits, torch.zeros(4, dtype=torch.int64), outputs=True))  # noqa: B023
                assert found.argmax.tolist() == expected
                assert found.loss.isnan()


def test_outputs_without_class_indices(backend):
    x, a = torch.randn(4, 5), torch.tensor([0, 1, 2, -100])
    for target in (torch.rand(4, 5), (a, a.flip(0), 0.5)):
        found = serve(backend, lambda: cross_entropy(x, target, outputs=True))  # noqa: B023
        assert found.correct is None
    assert found.argmax.tolist() == [-1, *x.argmax(1)[1:3].tolist(), -1]
    nothing = serve(backend, lambda: cross_entropy(x, torch.full((4,), -100), outputs=True))
    assert not nothing.correct.any()  # and a rate over no rows is for the caller to define
    assert (nothing.lse == 0).all()


def test_class_statistics(backend):
    statistics = fastreg.longtail.ClassStatistics(7)
    losses, hits, counts = torch.zeros(7, dtype=torch.float64), torch.zeros(7), torch.zeros(7)
    for reduction in ("mean", "none", "sum"):
        x, y = 2 * torch.randn(50, 7), torch.randint(5, (50,))
        y[::9] = -100
        loss = serve(backend, lambda: cross_entropy(x, y, reduction=reduction, gamma=1.0, statistics=statistics))  # noqa: B023
        torch.testing.assert_close(loss, cross_entropy(x, y, reduction=reduction, gamma=1.0))
        for logits, target in zip(x, y):
            if target >= 0:
                losses[target] += cross_entropy(logits.double(), target, gamma=1.0)
                hits[target] += logits.argmax() == target
                counts[target] += 1
    assert torch.equal(statistics.count, counts.long())
    assert torch.equal(statistics.correct, hits.long())
    torch.testing.assert_close(statistics.loss_sum, losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics.accuracy(), (hits / counts.clamp(min=1)).double(), rtol=1e-6, atol=0)
    assert statistics.mean_loss()[5] == 0  # never seen, and not NaN
    split = statistics.split([1000, 1000, 50, 50, 5, 5, 5])
    assert split["many"] == statistics.accuracy()[:2].mean()
    assert split["few"] == statistics.accuracy()[4]
    assert copy.deepcopy(statistics).half().loss_sum.dtype == torch.float64
    statistics.reset()
    assert statistics.count.sum() == 0


def test_class_statistics_have_the_same_bits_every_time(backend):
    x, y = torch.randn(500, 5), torch.randint(5, (500,))
    sums = []
    for _ in range(3):
        statistics = fastreg.longtail.ClassStatistics(5)
        serve(backend, lambda: cross_entropy(x, y, statistics=statistics))  # noqa: B023
        sums.append(statistics.loss_sum)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.sampled(3)
@ALL_OPTIONS
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_made_in_the_forward(backend, dtype, name):
    few = backend == INTERPRETED
    for shape in ((5, 9), (2, 9, 3))[: 2 - few]:
        x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
        y = torch.randint(9, shape[:1] + shape[2:])
        y.view(-1)[0] = -100
        before = x.detach().clone()
        for reduction in ("mean", "sum"):
            options = {**options_named(name, 9), "reduction": reduction}
            ours = serve(backend, lambda: cross_entropy(x, y, grad_in_forward=True, **options))  # noqa: B023
            plain = serve(backend, lambda: cross_entropy(x, y, **options))  # noqa: B023
            torch.testing.assert_close(ours, plain)
            assert torch.equal(x, before)
            for factor in (1.0, 0.5, 1024.0, 1.0)[few :: 1 + few]:  # one after the other: no backward spoils the next
                factor = torch.tensor(factor, dtype=dtype)
                got, expected = (torch.autograd.grad(loss, x, factor, retain_graph=True)[0] for loss in (ours, plain))
                # one rounding more where the factor comes after it, and another order of a few others
                rounding = 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
                rtol = 2 * torch.finfo(dtype).eps + rounding
                torch.testing.assert_close(got, expected, rtol=rtol, atol=rounding * float(factor))
            (graph,) = torch.autograd.grad(ours, x, create_graph=True)
            torch.testing.assert_close(graph.detach(), expected, rtol=rtol, atol=rounding)
            assert graph.requires_grad


def test_gradient_made_in_the_forward_is_handed_over(backend):
    """The first gradient belongs to its receiver: what he does to it must not show in a second one."""
    x, y = torch.randn(5, 9, requires_grad=True), torch.randint(9, (5,))
    loss = serve(backend, lambda: cross_entropy(x, y, grad_in_forward=True))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(second, kept)
    with torch.no_grad():
        assert not serve(backend, lambda: cross_entropy(x, y, grad_in_forward=True)).requires_grad
    empty = x.detach()[:0].clone().requires_grad_()
    loss = serve(backend, lambda: cross_entropy(empty, y[:0], grad_in_forward=True))
    for _ in range(2):  # nothing stood in its place
        assert torch.autograd.grad(loss, empty, retain_graph=True)[0].shape == (0, 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_in_the_place_of_the_logits(backend, dtype):
    for layout in (*LAYOUTS[:-1], "expanded"):
        leaf = torch.randn(5, 9).to(dtype).requires_grad_()
        y = torch.randint(9, (5,))
        logits, apart = (with_layout(leaf * 1, layout) for _ in range(2))
        before = logits.detach().clone()
        loss = serve(backend, lambda: cross_entropy(logits, y, grad_in_forward="in_place"))  # noqa: B023
        plain = serve(backend, lambda: cross_entropy(apart, y))  # noqa: B023
        made = not torch.equal(before, logits)
        if backend in ("reference", "cpu"):
            dense = layout in ("contiguous", "transposed", "offset")
            assert made == (backend == "cpu" and dtype != torch.float16 and dense)
        factor = torch.tensor(0.5, dtype=dtype)
        (got,) = torch.autograd.grad(loss, leaf, factor, retain_graph=True)
        (expected,) = torch.autograd.grad(plain, leaf, factor)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        if made:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, leaf)
    spoilt = torch.tanh(torch.randn(5, 9, requires_grad=True))  # whose output its backward needs
    loss = serve(backend, lambda: cross_entropy(spoilt, y, grad_in_forward="in_place"))
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.no_grad():  # without a gradient nothing is written
        logits = torch.randn(5, 9)
        before = logits.clone()
        serve(backend, lambda: cross_entropy(logits, y, grad_in_forward="in_place"))
        assert torch.equal(before, logits)


@pytest.mark.parametrize("classes", [1000, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_in_the_place_of_wide_rows(backend, dtype, classes):
    """No thread may read a logit where another has written the gradient: tests/test_compiled_triton.py looks on."""
    x, y, other = torch.randn(3, classes).to(dtype), *torch.randint(classes, (2, 3))
    for target, options in (
        (y, {}),
        (y, {"gamma": 2.0, "label_smoothing": 0.1}),
        ((y, other, 0.3), {}),
        (torch.rand(3, classes), {}),
    ):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        serve(backend, lambda: cross_entropy(leaves[0] * 1, target, grad_in_forward="in_place", **options)).backward()  # noqa: B023
        serve(backend, lambda: cross_entropy(leaves[1], target, **options)).backward()  # noqa: B023
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_many_incoming_gradients_at_once(backend):
    x, y = torch.randn(5, 9, requires_grad=True), torch.tensor([3, -100, 0, 8, 2])
    grads = torch.tensor([0.5, 1.0, INF])
    # What stands in for an operator of CUDA is none, to which nothing can be given one by one.
    for grad_in_forward in (True,) if backend == ON_THE_HOST else (False, True):
        loss = serve(backend, lambda: cross_entropy(x, y, grad_in_forward=grad_in_forward))  # noqa: B023
        with warnings.catch_warnings(action="ignore"):  # of the time that it takes
            (got,) = torch.autograd.grad(loss, x, grads, is_grads_batched=True, retain_graph=True)
        for each, grad in zip(got, grads[:2]):
            torch.testing.assert_close(each, torch.autograd.grad(loss, x, grad, retain_graph=True)[0])
        assert (got[2, 1] == 0).all() and not got[2, y >= 0].isfinite().any()


@pytest.mark.parametrize("grad_in_forward", [False, True, "in_place"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_ignored_rows_stay_0_under_an_infinite_gradient(backend, layout, grad_in_forward):
    x, y = torch.randn(5, 9, requires_grad=True), torch.tensor([3, -100, 0, 8, 2])
    logits = with_layout(x * 1, layout)
    loss = serve(backend, lambda: cross_entropy(logits, y, grad_in_forward=grad_in_forward))
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(INF))
    assert (grad[1] == 0).all() and not grad[y >= 0].isfinite().any()


def test_extra_arguments_are_checked():
    x, y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
    statistics = fastreg.longtail.ClassStatistics(5)
    with pytest.raises(ValueError, match="grad_in_forward needs reduction"):
        cross_entropy(x, y, reduction="none", grad_in_forward=True)
    with pytest.raises(ValueError, match="grad_in_forward must be"):
        cross_entropy(x, y, grad_in_forward="inplace")
    with pytest.raises(ValueError, match="leaf"):
        cross_entropy(x.clone().requires_grad_(), y, grad_in_forward="in_place")
    with pytest.raises(ValueError, match="class indices"):
        cross_entropy(x, x, statistics=statistics)
    with pytest.raises(ValueError, match="5 classes"):
        cross_entropy(x, y, statistics=fastreg.longtail.ClassStatistics(4))
    with pytest.raises(TypeError, match="ClassStatistics"):
        cross_entropy(x, y, statistics=True)
    with pytest.raises(ValueError, match="device"):
        cross_entropy(x, y, statistics=statistics.to("meta"))


# ---- arguments ---------------------------------------------------------------------------------------------

X, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "input must be a tensor", ([[0.0]], Y), {}),
        (TypeError, "target must be a tensor", (X, [0]), {}),
        (TypeError, "input must have a dtype", (X.int(), Y), {}),
        (TypeError, "target must have a dtype", (X, Y.bool()), {}),
        (TypeError, "target must have a dtype", (X, Y.to(torch.int16)), {}),
        (ValueError, "0-d", (torch.tensor(0.0), Y), {}),
        (ValueError, "at least one class", (torch.zeros(4, 0), Y), {}),
        (ValueError, r"target must have the shape \(4,\)", (X, Y[:3]), {}),
        (ValueError, "floating dtype", (X, torch.zeros(4, 5, dtype=torch.int64)), {}),
        (ValueError, "input's shape", (X, torch.zeros(4, 4)), {}),
        (ValueError, "input's shape", (X, Y.float()), {}),
        (ValueError, "ignore_index", (X, X), {"ignore_index": 1}),
        (ValueError, "3|got 2 values", (X, (Y, Y)), {}),
        (ValueError, "share", (X, (Y, Y, 1.5)), {}),
        (ValueError, "share", (X, (Y, Y, torch.zeros(3))), {}),
        (ValueError, r"target\[1\]", (X, (Y, Y[:3], 0.5)), {}),
        (TypeError, r"target\[0\]", (X, (X, X, 0.5)), {}),
        (ValueError, "weight must have the shape", (X, Y, torch.zeros(4)), {}),
        (TypeError, "weight must have a dtype", (X, Y, torch.zeros(5, dtype=torch.int64)), {}),
        (TypeError, "weight must be a tensor", (X, Y, [1.0] * 5), {}),
        (ValueError, "weight must be on the device", (X, Y, torch.zeros(5, device="meta")), {}),
        (ValueError, "target must be on the device", (X, Y.to("meta")), {}),
        (ValueError, "alpha must have the shape", (X, Y), {"alpha": torch.zeros(4)}),
        (ValueError, "alpha", (X, Y), {"alpha": -0.1}),
        (TypeError, "alpha must be a number or a tensor of one per class, got str", (X, Y), {"alpha": "0.25"}),
        (
            TypeError,
            r"target must be a tensor or a tuple \(target_a, target_b, share\), got list",
            (X, [Y, Y, 0.5]),
            {},
        ),
        (ValueError, "margin must have the shape", (X, Y), {"margin": torch.zeros(1, 5)}),
        (ValueError, "logit_adjustment must have", (X, Y), {"logit_adjustment": torch.zeros(4)}),
        (ValueError, "reduction", (X, Y), {"reduction": "avg"}),
        (ValueError, "label_smoothing", (X, Y), {"label_smoothing": 1.1}),
        (ValueError, "label_smoothing", (X, Y), {"label_smoothing": NAN}),
        (ValueError, "gamma", (X, Y), {"gamma": -1.0}),
        (ValueError, "gamma", (X, Y), {"gamma": INF}),
        (ValueError, "scale", (X, Y), {"scale": 0.0}),
        (ValueError, "scale must be above 0, got -1", (X, Y), {"scale": -1.0}),
        (ValueError, "scale must be finite", (X, Y), {"scale": INF}),
        (ValueError, "z_loss", (X, Y), {"z_loss": -1.0}),
        (ValueError, "all_ignored", (X, Y), {"all_ignored": "one"}),
    ],
)
def test_bad_arguments(error, match, args, options):
    with pytest.raises(error, match=match):
        cross_entropy(*args, **options)
    with pytest.raises(error, match=match):
        focal_loss(*args[:2], **options, **({"weight": args[2]} if len(args) > 2 else {}))


# ---- sigmoid focal loss ------------------------------------------------------------------------------------

SIGMOID_BACKENDS = [name for name, state in fastreg.backends()["sigmoid_focal_loss"].items() if state == "usable"]
SIGMOID_BACKENDS += [name for name in BACKENDS if name == ON_THE_HOST]


@pytest.fixture(params=SIGMOID_BACKENDS)
def sigmoid_backend(request):
    return request.param


def dense_targets(inputs, targets):
    if targets.shape == inputs.shape:
        return longdouble(targets)
    return (np.arange(inputs.shape[-1]) == targets.numpy()[..., None]).astype(LD)


def sigmoid_oracle(inputs, targets, alpha=0.25, gamma=2.0, reduction="none", weight=None, normalizer=None, grad=None):
    """Loss and gradient from the formula, in extended precision, where sigmoid and log-sigmoid neither overflow nor
    lose digits."""
    x, t = longdouble(inputs), dense_targets(inputs, targets)
    with np.errstate(all="ignore"):
        small = np.exp(-np.abs(x))
        p = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
        q = np.where(x >= 0, small / (1 + small), 1 / (1 + small))
        nll, slope = -(np.minimum(x, 0) - np.log1p(small)), -q  # of a positive; -log p
        nll_of_0, slope_of_0 = np.maximum(x, 0) + np.log1p(small), p
        ce = np.where(t == 0, 0, t * nll) + np.where(t == 1, 0, (1 - t) * nll_of_0)
        d_ce = t * slope + (1 - t) * slope_of_0
        u = t * q + (1 - t) * p
        d_u = (1 - 2 * t) * p * q
        g = LD(gamma)
        power = u**g if gamma else np.ones_like(u)
        loss = np.where(power == 0, 0, power * ce)
        d = power * d_ce + (np.where((u > 0) & (d_u != 0), g * u ** (g - 1) * d_u * ce, 0) if gamma else 0)
    factor = (t * LD(alpha) + (1 - t) * (1 - LD(alpha))) if alpha >= 0 else np.ones_like(t)
    if weight is not None:
        factor = factor * longdouble(weight)
    loss, d = factor * loss, factor * d
    if reduction != "none":
        scale = LD(1) / (
            loss.size if reduction == "mean" else (float(normalizer) or 1) if normalizer is not None else 1
        )
        loss, d = loss.sum() * scale, d * scale
    d = d * (1 if grad is None else longdouble(grad))
    return torch.from_numpy(np.asarray(loss, np.float64)), torch.from_numpy(np.asarray(d, np.float64))


def sigmoid_stock(inputs, targets, alpha=0.25, gamma=2.0, reduction="none", weight=None, normalizer=None):
    """torchvision's formula."""
    t = torch.from_numpy(dense_targets(inputs, targets).astype(np.float64)).to(inputs.dtype)
    p = torch.sigmoid(inputs)
    loss = F.binary_cross_entropy_with_logits(inputs, t, reduction="none")
    loss = loss * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    if alpha >= 0:
        loss = (alpha * t + (1 - alpha) * (1 - t)) * loss
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss if normalizer is None else loss / (float(normalizer) or 1)


def check_sigmoid(backend, inputs, targets, grad=None, **options):
    x = inputs.detach().requires_grad_()
    y = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32)).requires_grad_()
    loss = serve(backend, lambda: sigmoid_focal_loss(x, targets, **options))
    if grad is None and loss.dim():
        grad = torch.ones_like(loss)
    (grad_x,) = torch.autograd.grad(loss, x, grad, materialize_grads=True)
    stock_loss = sigmoid_stock(y, targets, **options)
    (stock_grad,) = torch.autograd.grad(stock_loss, y, None if grad is None else grad.to(y.dtype))
    exact_loss, exact_grad = sigmoid_oracle(inputs, targets, grad=grad, **options)
    # a few roundings of the terms themselves; and for a sum, one of what it has come to for each doubling
    eps = torch.finfo(y.dtype).eps
    rounding = 16 * (1 + options.get("gamma", 2.0)) * eps
    terms = max(math.log2(max(inputs.numel(), 2)), 4)
    loss_noise = (rounding + terms * eps) * float(exact_loss.abs().nan_to_num(0, 0, 0).max()) if loss.numel() else 0.0
    grad_noise = rounding * float(exact_grad.abs().max()) if grad_x.numel() else 0.0
    assert_accurate(loss, stock_loss.to(loss.dtype), exact_loss, "loss", noise=loss_noise)
    assert_accurate(grad_x, stock_grad.to(grad_x.dtype), exact_grad, "gradient", noise=grad_noise)
    return loss, grad_x


SLICES = ("classes from the second on", "every second row", "aligned rows")


def sliced(tensor, layout):
    """The same values as such a part of a larger tensor, or in one of LAYOUTS."""
    if layout == "classes from the second on":
        return torch.cat([tensor[..., :1], tensor], -1)[..., 1:]
    if layout == "every second row":
        return torch.stack([tensor, tensor], -2).flatten(0, -2)[::2].view(tensor.shape)
    if layout == "aligned rows":
        return F.pad(tensor.float(), (0, -tensor.shape[-1] % 16 + 16)).to(tensor.dtype)[..., : tensor.shape[-1]]
    return with_layout(tensor, layout)


@examples(200)
@given(seed=st.integers(0, 2**32))
def test_sigmoid_focal_random_combinations(sigmoid_backend, seed):
    if left_out(sigmoid_backend, seed):
        return
    rng = random.Random(seed)
    pick = lambda *values: rng.choice(values)  # noqa: E731
    g = torch.Generator().manual_seed(seed)
    dtype, classes = pick(*DTYPES), pick(1, 2, 7, 33, 80)
    rows = pick((), (0,), (5,), (2, 3))
    inputs = (pick(1.0, 5.0, 30.0) * torch.randn(*rows, classes, generator=g)).to(dtype)
    inputs = sliced(inputs, pick(*LAYOUTS, *SLICES))
    kind = pick("indices", "hard", "soft", "bool")
    if kind == "indices":
        targets = torch.randint(-2, classes + 2, rows, generator=g).to(pick(torch.int64, torch.int32))
    else:
        targets = torch.rand(*rows, classes, generator=g)
        targets = targets if kind == "soft" else (targets > 0.5).to(torch.bool if kind == "bool" else dtype)
        targets = targets.to(pick(*DTYPES)) if kind == "soft" else targets
        targets = sliced(targets, pick(*LAYOUTS, *SLICES))
    options = {
        "alpha": pick(0.25, -1, 0.0, 1.0),
        "gamma": pick(0.0, 0.5, 1, 2.0, 5.0),
        "reduction": pick("none", "mean", "sum"),
    }
    if pick(False, True):
        options["weight"] = torch.rand(classes, generator=g)
    if options["reduction"] == "sum":
        options["normalizer"] = pick(None, 7.0, 0.0, torch.tensor(3.0), torch.tensor(0), torch.tensor(5))
    if options["reduction"] == "mean" and not inputs.numel():
        return
    grad = torch.randn(inputs.shape, generator=g).to(dtype) if options["reduction"] == "none" else None
    check_sigmoid(sigmoid_backend, inputs, targets, grad, **options)


def sigmoid_ends(backend, x, dtype, gamma):
    """Loss, gradient and second derivative for targets 0 and 1, with where the logit is on the wrong side."""
    for t in (torch.zeros_like(x), torch.ones_like(x)):
        inputs = x.to(dtype).requires_grad_()
        loss = serve(backend, lambda: sigmoid_focal_loss(inputs, t.to(dtype), gamma=gamma))  # noqa: B023
        (grad,) = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        yield loss.detach(), grad, inputs, (x > 0 if t.sum() == 0 else x < 0)


@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.5, 1.0, 2.0, 5.0])
def test_sigmoid_focal_is_finite_for_every_finite_logit(sigmoid_backend, gamma):
    x = torch.tensor([[1e3, -1e3, 0.0, 90.0, -90.0]])
    for dtype in (torch.float32, torch.float64):
        for loss, grad, inputs, _ in sigmoid_ends(sigmoid_backend, x, dtype, gamma):
            (second,) = torch.autograd.grad(grad.sum(), inputs)
            assert (loss >= 0).all()
            assert all(t.isfinite().all() for t in (loss, grad, second))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_at_infinite_logits(sigmoid_backend, gamma):
    for loss, grad, _, wrong in sigmoid_ends(sigmoid_backend, torch.tensor([[INF, -INF]]), torch.float32, gamma):
        assert torch.equal(loss, torch.where(wrong, INF, 0.0))
        assert grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_terms_without_a_share_may_be_infinite(sigmoid_backend, gamma):
    """Under a factor of 0, alpha's or weight's, the loss of every finite logit is 0; so it is of infinite ones."""
    inputs = torch.tensor([[INF, -INF, NAN, 3.0]] * 3)
    soft = torch.tensor([0.0, 1.0, 0.25])[:, None].expand(3, 4)
    for targets, dtype in itertools.product((soft, torch.tensor([-1, 1, 0])), (torch.float32, torch.float64)):
        t = torch.from_numpy(dense_targets(inputs, targets).astype(np.float64))
        for alpha, weight in itertools.product((0.0, 1.0, 0.25, -1.0), (None, torch.tensor([0.0, 1.0, 0.0, 0.0]))):
            balance = t * alpha + (1 - t) * (1 - alpha) if alpha >= 0 else torch.ones_like(t)
            factor = balance if weight is None else balance * weight
            x = inputs.to(dtype).requires_grad_()
            call = lambda: sigmoid_focal_loss(x, targets.to(dtype) if targets is soft else targets, alpha, gamma,  # noqa: B023, E731
                                              weight=weight)  # noqa: B023  # fmt: skip
            loss = serve(sigmoid_backend, call)
            (grad,) = torch.autograd.grad(loss.sum(), x)
            nan = inputs.isnan()
            assert torch.equal(loss.isnan(), nan) and torch.equal(grad.isnan(), nan)
            assert (loss[(factor == 0) & ~nan] == 0).all() and (grad[(factor == 0) & ~nan] == 0).all()
            wrong = (factor != 0) & inputs.isinf() & (torch.where(inputs > 0, 1 - t, t) > 0)
            assert torch.equal(loss.isinf(), wrong)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "other layout", "bool", "indices", "weight"])
def test_sigmoid_focal_of_permuted_logits(sigmoid_backend, order, kind):
    """The gradient and the terms lie as the logits do."""
    back = [order.index(dim) for dim in range(3)]
    x = torch.randn(3, 4, 5).permute(order).contiguous().permute(back)
    t = torch.rand(3, 4, 5)
    t = {
        "indices": torch.randint(-1, 5, (3, 4)),
        "bool": t > 0.5,
        "other layout": t,
    }.get(kind, t.permute(order).contiguous().permute(back))
    weight = torch.rand(5) if kind == "weight" else None
    copied = kind in ("indices", "weight") and order[-1] != 2  # whose classes do not lie next to each other
    for reduction in ("none", "sum"):
        loss, grad = check_sigmoid(sigmoid_backend, x, t, reduction=reduction, weight=weight)
        if sigmoid_backend != "reference" and not copied:
            assert grad.stride() == x.stride()
            assert reduction == "sum" or loss.stride() == x.stride()


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 80), (0, 5)], ids=str)
@pytest.mark.parametrize("layout", SLICES)
def test_sigmoid_focal_of_slices(sigmoid_backend, layout, shape):
    """The terms and the gradient are contiguous."""
    x = sliced(torch.randn(shape), layout)
    for t in (torch.rand(shape), sliced(torch.rand(shape), "classes from the second on"),
              sliced(torch.rand(shape) > 0.5, layout), torch.randint(-1, shape[-1], shape[:-1])):  # fmt: skip
        for reduction in ("none", "sum", "mean")[: 3 if x.numel() else 2]:
            loss, grad = check_sigmoid(sigmoid_backend, x, t, reduction=reduction, weight=torch.rand(shape[-1]))
            if sigmoid_backend != "reference":
                assert grad.is_contiguous() and loss.is_contiguous()


def test_sigmoid_focal_copies_no_permuted_or_sliced_logits(sigmoid_backend, monkeypatch):
    kernels = fastreg.losses._sigmoid_forward
    name = "cpu" if sigmoid_backend == ON_THE_HOST else sigmoid_backend
    if name not in kernels:
        pytest.skip("plain PyTorch walks the storage by itself")
    monkeypatch.setattr(fastreg.losses, "_SMALL", -1)
    seen, inner = [], kernels[name]
    monkeypatch.setitem(kernels, name, lambda *args: seen.append(args[:2]) or inner(*args))
    channels_last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    wide = torch.randn(2, 4, 7)
    for x in (channels_last, wide[..., 1:], wide[0, :, :-1], wide[:, 2]):
        t = torch.rand_like(x)
        for targets in (t, t > 0.5):
            with use(sigmoid_backend):
                sigmoid_focal_loss(x, targets, reduction="sum")
            logits, dense = seen.pop()
            assert logits.data_ptr() == x.data_ptr() and dense.data_ptr() == targets.data_ptr()
            assert logits.dim() == 2 and logits.stride(1) == dense.stride(1) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sigmoid_focal_targets_keep_their_digits(sigmoid_backend, dtype):
    """Soft targets of fp32 beside logits of 16 bits, where torchvision promotes: near 1, bf16 has but two digits. In a
    row of several vectors, with a rest, aligned and not."""
    x = (8 + torch.randn(3, 1001)).to(dtype)
    t = 1 - 1e-3 * torch.rand(3, 1001)
    for targets in (t, t.double(), with_layout(t, "offset"), t.to(torch.bfloat16)):
        check_sigmoid(sigmoid_backend, x, targets, reduction="sum")
        loss, _ = check_sigmoid(sigmoid_backend, x, targets)
        assert loss.dtype == dtype
    rounded = sigmoid_focal_loss(x.float(), t.to(dtype).float(), reduction="sum")
    assert (rounded / sigmoid_oracle(x, t, reduction="sum")[0] - 1).abs() > 0.01  # it shows


def test_sigmoid_focal_takes_indices_without_onehots(sigmoid_backend):
    x = torch.randn(2, 3, 5)
    y = torch.tensor([[0, 4, 5], [-1, 255, 2]])
    dense = torch.from_numpy(dense_targets(x, y).astype(np.float32))
    for dtype in (torch.int64, torch.int32):
        for options in ({}, {"reduction": "sum"}, {"weight": torch.rand(5)}):
            a, b = (serve(sigmoid_backend, lambda: sigmoid_focal_loss(x, t, **options)) for t in (y.to(dtype), dense))  # noqa: B023
            torch.testing.assert_close(a, b)
    nothing = serve(
        sigmoid_backend,
        lambda: sigmoid_focal_loss(x, torch.full((2, 3), -1), reduction="sum", normalizer=torch.tensor(0)),
    )
    assert nothing.isfinite()  # no positives: the sum itself


@pytest.mark.parametrize("targets", [torch.zeros(2, 0), torch.tensor([0, -1])], ids=["dense", "indices"])
def test_sigmoid_focal_of_no_classes(sigmoid_backend, targets):
    x = torch.randn(2, 0, requires_grad=True)
    assert serve(sigmoid_backend, lambda: sigmoid_focal_loss(x, targets)).shape == (2, 0)
    total = serve(sigmoid_backend, lambda: sigmoid_focal_loss(x, targets, reduction="sum"))
    total.backward()
    assert total == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_gradcheck(sigmoid_backend, gamma):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for t in (torch.tensor([0, 2, -1, 3]), torch.rand(4, 3, dtype=torch.float64)):
        loss = lambda x: serve(  # noqa: E731
            sigmoid_backend,
            lambda: sigmoid_focal_loss(x, t, gamma=gamma, reduction="sum", normalizer=3.0),  # noqa: B023
        )
        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)
    t.requires_grad_()
    loss = serve(sigmoid_backend, lambda: sigmoid_focal_loss(x.detach(), t, gamma=gamma).sum())
    assert torch.autograd.grad(loss, t)[0].isfinite().all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_sigmoid_focal_under_transforms_and_compile(dynamic):
    x, t = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    call = lambda x, t: sigmoid_focal_loss(x, t, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.vmap(call)(x, t), torch.stack([call(a, b) for a, b in zip(x, t)]))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x.requires_grad_()
    permuted = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    soft = torch.rand_like(permuted)
    slice_ = torch.randn(3, 4, 6)[..., 1:].requires_grad_()
    for logits, targets in ((x, t), (permuted, soft), (permuted, soft > 0.5), (slice_, t), (slice_, slice_ > 0)):
        a, b = compiled(logits, targets), call(logits, targets)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, logits)[0], torch.autograd.grad(b, logits)[0])


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (TypeError, "inputs must be a tensor", ([0.0], Y), {}),
        (TypeError, "inputs must have a dtype", (X.int(), Y), {}),
        (ValueError, "targets must have", (X, Y[:3]), {}),
        (TypeError, "targets with class indices", (X, Y.float()), {}),
        (TypeError, "targets of inputs' shape", (X, X.int()), {}),
        (ValueError, "reduction", (X, Y), {"reduction": "avg"}),
        (ValueError, "gamma", (X, Y), {"gamma": -1.0}),
        (ValueError, "alpha", (X, Y), {"alpha": 1.5}),
        (ValueError, "weight must have the shape", (X, Y), {"weight": torch.ones(4)}),
        (ValueError, "normalizer", (X, Y), {"normalizer": 2.0}),
        (ValueError, "normalizer", (X, Y), {"normalizer": torch.ones(2), "reduction": "sum"}),
        (ValueError, "normalizer", (X, Y), {"normalizer": -1.0, "reduction": "sum"}),
    ],
)
def test_sigmoid_focal_bad_arguments(error, match, args, options):
    with pytest.raises(error, match=match):
        sigmoid_focal_loss(*args, **options)


@pytest.mark.skipif(fastreg.backends()["cross_entropy"]["cpu"] != "usable", reason="the CPU kernels are not built")
def test_compiled_calls_are_served_by_the_kernels():
    """A forced backend cannot fall back: were the kernel refused while compiling, this would raise."""
    x, y = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, -100, 5])
    torch._dynamo.reset()
    with fastreg.use_backend("cpu"):
        loss = torch.compile(lambda x: cross_entropy(x, y, gamma=1.0), fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(loss, cross_entropy(x, y, gamma=1.0))


@pytest.mark.parametrize("classes", [5, 4097])
def test_nan_in_ignored_rows_stays_there_without_a_forced_backend(classes):
    x = torch.randn(4, classes)
    x[1] = float("nan")
    x.requires_grad_()
    fastreg.cross_entropy(x, torch.tensor([0, -100, 2, 3])).backward()
    assert x.grad[1].eq(0).all() and x.grad.isfinite().all()
