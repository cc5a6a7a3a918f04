"""GroupNorm, its activation and residual, on every backend against an fp64 oracle written from the formula."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg import group_norm, replace_modules
from fastreg.testing import DTYPES, assert_accurate, layouts_of
from tests.machine import device_of

ACTIVATIONS = [None, "relu", "silu", "gelu", "gelu_tanh"]
# Triton kernels take CPU tensors in the interpreter alone.
BACKENDS = [name for name, state in fastreg.backends()["group_norm"].items() if state == "usable"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """Every test runs on every backend, with new tensors on the device where that runs."""
    with fastreg.use_backend(request.param), torch.device(device_of(request.param)):
        yield request.param


# ---- the oracle --------------------------------------------------------------------------------------------


def activate(x, activation):
    """The activations from their definitions."""
    if activation == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x


def formula(x, num_groups, weight, bias, eps, activation, residual):
    groups = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    centred = groups - groups.mean(2, keepdim=True)
    y = (centred / torch.sqrt((centred * centred).mean(2, keepdim=True) + eps)).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.reshape(shape)
    if bias is not None:
        y = y + bias.reshape(shape)
    if residual is not None:
        y = y + residual
    return activate(y, activation)


def stock(x, num_groups, weight, bias, eps, activation, residual):
    """PyTorch's own operators on a contiguous copy: its channels_last kernel on the CPU loses all digits where
    the data have an offset."""
    if weight is None and bias is not None:  # whose backward PyTorch's kernel cannot do
        weight = torch.ones_like(bias)
    cast = [v if v is None else v.to(x.dtype) for v in (weight, bias)]
    y = torch.group_norm(x.contiguous(), num_groups, *cast, eps)
    if residual is not None:
        y = y + residual
    if activation is None:
        return y
    if activation.startswith("gelu"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return getattr(F, activation)(y)


def run(function, grad_out, x, num_groups, weight, bias, eps, activation, residual, to=None):
    """The output and the gradients to x, weight, bias and residual (None where there is none)."""
    leaves = [
        None if t is None else (t.detach().to(to) if to else t.detach().clone() if t is not x else t.detach())
        for t in (x, weight, bias, residual)
    ]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    x, weight, bias, residual = leaves
    y = function(x, num_groups, weight, bias, eps, activation, residual)
    given = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(y, given, grad_out.to(y.dtype)))
    return [y.detach()] + [None if t is None else next(grads) for t in leaves]


def ours(x, num_groups, weight, bias, eps, activation, residual):
    return group_norm(x, num_groups, weight, bias, eps, activation=activation, residual=residual)


RESULTS = ("output", "grad_input", "grad_weight", "grad_bias", "grad_residual")


def check(x, num_groups, weight=None, bias=None, eps=1e-5, activation=None, residual=None, grad_out=None):
    """Holds output and gradients to the accuracy rule; returns them."""
    if grad_out is None:
        grad_out = tensor(*x.shape, dtype=x.dtype, seed=7)
    args = (grad_out, x, num_groups, weight, bias, eps, activation, residual)
    mine = run(ours, *args)
    judge(mine, *args)
    for format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if has_format(x, format):
            assert has_format(mine[0], format)
    return mine


def judge(mine, grad_out, x, num_groups, weight, bias, eps, activation, residual):
    """Holds an output and its gradients (None: not asked for) to the accuracy rule."""
    args = (grad_out, x, num_groups, weight, bias, eps, activation, residual)
    theirs, exact = run(stock, *args), run(formula, *args, to=torch.float64)
    # A parameter's gradient is a sum over samples and positions of dz·x̂ with x̂ of size 1, each right to a few
    # roundings of its own and of the mean it is taken from; they add like a random walk, and so do the roundings of
    # the sums under way. The input's gradient has the means m1 and m2 of such terms in it, times an x̂ of up to 4.
    eps32 = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    walk, size = (x.numel() // x.shape[1]) ** 0.5, grad_out.double().square().mean().sqrt()
    deviation = (x.double().var(correction=0) + eps).sqrt()
    terms = 4 * eps32 * walk * size * (1 + x.double().mean().abs() / deviation)
    largest = 1 if weight is None else weight.double().abs().max()
    # Statistics are saved in fp32: half a unit of the mean is what x̂ may be off by, and stock PyTorch may be lucky in
    # that. The slopes of the activations are at most 1.13, those of their slopes 0.8, and next to nothing where what
    # they act on is above 2, which two roundings of its own may be off by.
    rounded_mean = eps32 / 2 * largest * x.double().mean().abs() / deviation
    curved = (rounded_mean + 2 * eps32) * grad_out.double().abs().max() if activation else 0
    means = 4 * eps32 * size * largest / deviation + curved * largest / deviation
    for name, a, s, e in zip(RESULTS, mine, theirs, exact):
        if a is None:
            continue
        if name.startswith("grad") and e is not None:
            slack = {"grad_input": means, "grad_residual": curved}.get(name, terms + eps32 * walk * e.abs())
            error = a.double() - e
            a = (a.double() - error.sign() * error.abs().minimum(torch.as_tensor(slack))).to(a.dtype)
        if e is not None:
            assert_accurate(a, s.to(a.dtype), e, name, noise=1.13 * rounded_mean if name == "output" else 0.0)


def has_format(x, format):
    ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}
    return x.dim() == ranks.get(format, x.dim()) and x.is_contiguous(memory_format=format)


def tensor(*shape, dtype=torch.float32, seed=0, mean=0.0):
    """The same values on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return torch.empty(shape, dtype=dtype).copy_(values + mean)


def affine(channels, dtype=torch.float32):
    return tensor(channels, dtype=dtype, seed=1), tensor(channels, dtype=dtype, seed=2)


# ---- values and gradients ----------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_gradients_with_random_affine(dtype, activation, layout):
    x = tensor(3, 12, 5, 7, dtype=dtype)
    residual = tensor(3, 12, 5, 7, dtype=dtype, seed=3)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    check(x, 4, *affine(12, dtype), activation=activation)
    check(x, 4, *affine(12, dtype), activation=activation, residual=residual)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_far_from_zero(activation, dtype):
    """Where the exponential overflows and slopes are 0 or 1, and on the way there."""
    x, (weight, bias) = tensor(2, 6, 7, 9, dtype=dtype), affine(6, dtype)
    for size in (8, 40, 300):
        check(x, 2, weight * size, bias * size, activation=activation)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("per_group", [1, 2, 3, 5, 10, 12, 40])
def test_channels_per_group(per_group, layout):
    for groups in (1, 3, 32):
        x = tensor(2, groups * per_group, 3, 3)
        if layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        check(x, groups, *affine(groups * per_group), activation="silu")


@pytest.mark.parametrize("positions", [(1, 1), (2, 1), (7, 7), (49, 1), (1, 509), (33, 31)])
@pytest.mark.parametrize("groups", [1, 2, 6], ids=["one group", "two groups", "a group per channel"])
def test_positions(positions, groups):
    x = tensor(2, 6, *positions)
    check(x, groups, *affine(6), activation="gelu")
    check(x.to(memory_format=torch.channels_last), groups, *affine(6), activation="gelu")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(35, 16, 8, 8), (34, 12, 7, 7), (33, 8, 17, 1), (70, 96), (3, 2048), (33, 24, 3, 1)])
def test_small_groups_of_many_samples(shape, dtype, activation, backend):
    """Rows of whole vectors and of others, rows shorter than a vector, and rank 2."""
    if backend == "triton" and device_of(backend) == "cpu":
        shape = (3, *shape[1:])  # in the interpreter
    x = tensor(*shape, dtype=dtype, mean=3.0)
    for groups in (1, 2, shape[1] // 2):
        check(x, groups, *affine(shape[1], dtype), activation=activation)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("channels", [32, 48, 40])  # of two groups: one vector, whole vectors and others
def test_small_groups_with_channels_last(channels, activation):
    x = tensor(35, channels, 3, 2).to(memory_format=torch.channels_last)
    check(x, 2, *affine(channels), activation=activation)
    for samples in (35, 3):
        part = x[:samples, :, 1:]
        check(part, 2, *affine(channels), activation=activation, grad_out=tensor(*part.shape, seed=4))


def test_small_groups_give_each_gradient_alone():
    x, (w, b), grad = tensor(3, 8, 5, 5), affine(8), tensor(3, 8, 5, 5, seed=4)
    for activation in (None, "silu"):
        every = run(ours, grad, x, 4, w, b, 1e-5, activation, None)[1:]
        for i in range(3):
            leaves = [t.clone().requires_grad_(k == i) for k, t in enumerate((x, w, b))]
            y = group_norm(leaves[0], 4, *leaves[1:], activation=activation)
            (alone,) = torch.autograd.grad(y, leaves[i], grad)
            torch.testing.assert_close(alone, every[i], rtol=1e-6, atol=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("positions", [65_537, 2**18 + 1])
def test_many_positions(positions, backend):
    if backend == "triton":
        positions = positions // 8 + 1  # in the interpreter
    check(tensor(1, 4, positions), 2, *affine(4), activation="silu")
    check(tensor(1, 4, 1, positions).to(memory_format=torch.channels_last), 2, *affine(4), activation="silu")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_too_large_for_the_caches(layout, activation, backend):
    if backend != "cpu":
        pytest.skip("about the CPU kernels, which write large results past the caches")
    x = tensor(2, 72, 90, 90).to(memory_format=layout)
    assert x.nbytes >= 4 << 20
    check(x, 8, *affine(72), activation=activation)
    check(x.double(), 8, *affine(72), activation=activation)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "groups"), [((1, 8, 260, 300), 2), ((2, 320, 32, 32), 32)])
def test_gradients_kept_until_the_sums_are_known(shape, groups, layout, backend):
    """Units of 300,000 elements, as large as any whose dz is kept, in parts that threads share."""
    if backend != "cpu":
        pytest.skip("about the CPU kernels, which keep what the second step of the backward needs")
    x, threads, results = tensor(*shape).to(memory_format=layout), torch.get_num_threads(), []
    grad = tensor(*shape, seed=4).to(memory_format=layout)
    for count in (1, 5):
        torch.set_num_threads(count)
        try:
            results.append(run(ours, grad, x, groups, *affine(shape[1]), 1e-5, "silu", None))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:4], results[1][:4]))
    check(x, groups, *affine(shape[1]), activation="silu")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("shape", "groups"), [((2, 512, 56, 57), 32), ((1, 66, 220, 220), 3)])
def test_gradients_before_the_activation_made_twice(shape, groups, activation, backend):
    """Of more than 12 MiB in fp32 by positions, for a gelu alone written and read again."""
    if backend != "cpu":
        pytest.skip("about the CPU kernels, to which writing costs more than computing")
    x, threads, results = tensor(*shape).to(memory_format=torch.channels_last), torch.get_num_threads(), []
    assert x.nbytes > 12 << 20
    grad = tensor(*shape, seed=4).to(memory_format=torch.channels_last)
    for count in (1, 5):
        torch.set_num_threads(count)
        try:
            results.append(run(ours, grad, x, groups, *affine(shape[1]), 1e-5, activation, None))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:4], results[1][:4]))
    check(x, groups, *affine(shape[1]), activation=activation)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(22, 256, 196), (44, 512, 49), (6, 64, 3249), (1, 64, 17689)])
def test_vectors_that_belong_to_two_channels(shape, activation, backend):
    """The bits are those of channels that lie apart, whichever thread writes a channel."""
    if backend != "cpu":
        pytest.skip("about the CPU kernels, which write large results past the caches in whole vectors")
    x, groups, parameters, results = tensor(*shape), 2 if shape[0] == 1 else 32, affine(shape[1]), []
    assert x.nbytes >= 4 << 20
    apart = [tensor(*shape[:2], shape[2] + 1, seed=seed)[..., 1:] for seed in (1, 2)]
    together, threads = [t.contiguous() for t in apart], torch.get_num_threads()
    for count, (grad, residual) in ((1, together), (5, together), (1, apart)):
        torch.set_num_threads(count)
        try:
            results.append(run(ours, grad, x, groups, *parameters, 1e-5, activation, residual))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    check(x, groups, *parameters, activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(layout, backend):
    """Many samples, one that repeats: 2 bytes a result, 4 GiB, and no more for the input."""
    if backend == "reference" or (backend == "triton" and device_of(backend) == "cpu"):
        pytest.skip("about the kernels' indices; the interpreter would take a day")
    sample, grad = tensor(1, 8, 64, 128, dtype=torch.bfloat16), tensor(1, 8, 64, 128, dtype=torch.bfloat16, seed=4)
    if layout == "channels_last":
        sample, grad = sample.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    samples = 2**31 // sample.numel() + 3
    weight, bias = affine(8)
    y, dx, dweight, dbias, _ = run(ours, grad, sample, 2, weight, bias, 1e-5, "silu", None)
    leaves = [t.detach().requires_grad_() for t in (sample.expand(samples, -1, -1, -1), weight, bias)]
    many = group_norm(leaves[0], 2, *leaves[1:], activation="silu")
    assert many.numel() > 2**31
    for n in (0, 1, samples // 2, samples - 2, samples - 1):
        torch.testing.assert_close(many[n], y[0], rtol=2**-7, atol=1e-5)  # a unit: kernels may cut the call otherwise
    gradients = torch.autograd.grad(many, leaves, grad.expand_as(many))
    del many
    for n in (0, 1, samples // 2, samples - 2, samples - 1):
        torch.testing.assert_close(gradients[0][n], dx[0], rtol=2**-7, atol=1e-4)
    for all_samples, one in zip(gradients[1:], (dweight, dbias)):
        torch.testing.assert_close(all_samples, one * samples, rtol=1e-5, atol=1e-5 * samples)


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_group_of_more_than_two_to_the_31_elements(last, backend):
    """One group of 4 channels, the same values over and over along the positions."""
    if backend == "reference" or (backend == "triton" and device_of(backend) == "cpu"):
        pytest.skip("about the kernels' indices; the interpreter would take a day")
    few = tensor(1, 4, 1, 2**15, dtype=torch.bfloat16)
    positions = 2**29 + 2**15
    times = positions // few.shape[3]
    shape, weight, bias = (1, 4, times, few.shape[3]), *affine(4)
    if last:
        x = few.permute(0, 2, 3, 1).contiguous().expand(1, times, -1, -1).contiguous().permute(0, 3, 1, 2)
    else:
        x = few.expand(shape).contiguous()
    assert x.numel() > 2**31
    y = group_norm(x, 1, weight, bias, activation="silu")
    del x
    expected = group_norm(few, 1, weight, bias, activation="silu")
    for at in (0, 1, times // 2, times - 1):
        torch.testing.assert_close(y[:, :, at], expected[:, :, 0], rtol=2**-8, atol=1e-5)


def test_many_samples(backend):
    samples = 65_536 if backend != "triton" else 100  # in the interpreter a program takes milliseconds
    check(tensor(samples, 4, 2), 2, *affine(4), activation="silu")
    check(tensor(samples, 4, 2, 1).to(memory_format=torch.channels_last), 2, *affine(4), activation="silu")


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 5), (3, 6, 5, 4), (3, 6, 5, 4, 3)])
def test_ranks(shape):
    check(tensor(*shape), 2, *affine(6), activation="silu", residual=tensor(*shape, seed=5))


def test_channels_last_3d():
    x = tensor(2, 6, 3, 4, 5).to(memory_format=torch.channels_last_3d)
    y = check(x, 3, *affine(6), activation="gelu_tanh")[0]
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_each_optional(weight, bias):
    w, b = affine(6)
    for x in (tensor(2, 6, 5, 3), tensor(2, 6, 5, 3).to(memory_format=torch.channels_last)):
        check(x, 2, w if weight else None, b if bias else None, activation="silu")


@pytest.mark.parametrize("params", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(dtype, params):
    x = tensor(2, 6, 5, 3, dtype=dtype)
    mine = check(x, 2, *affine(6, params), activation="silu")
    assert mine[0].dtype == mine[1].dtype == dtype
    assert mine[2].dtype == mine[3].dtype == params
    check(x, 2, affine(6, params)[0], affine(6)[1])


# ---- layouts -----------------------------------------------------------------------------------------------


def test_layouts_of_input():
    x = tensor(3, 8, 6, 5)
    for _, laid_out in layouts_of(x):
        check(laid_out, 2, *affine(8), activation="silu")
        check(laid_out.to(memory_format=torch.channels_last), 2, *affine(8), activation="silu")


def test_slices_along_samples_and_channels():
    wide = tensor(6, 16, 5, 4)
    for format in (torch.contiguous_format, torch.channels_last):
        x = wide.to(memory_format=format)
        for part in (x[::2], x[:, 3:11], x[:, ::2], x[1:, :, 1:3], x[..., 1:], x.transpose(2, 3), x.transpose(0, 1)):
            check(part, 2, *affine(part.shape[1]), activation="silu")


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (2, 1, 4, 5), (1, 6, 4, 1), (1, 1, 1, 1), (2, 6, 1, 5)])
def test_ambiguous_strides(shape):
    x = tensor(*shape)
    for format in (torch.contiguous_format, torch.channels_last):
        check(x.to(memory_format=format), 1, *affine(shape[1]), activation="silu")


@pytest.mark.parametrize("mine", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last])
def test_gradient_and_residual_in_the_other_layout(mine, other):
    x = tensor(2, 6, 5, 4).to(memory_format=mine)
    grad = tensor(2, 6, 5, 4, seed=4).to(memory_format=other)
    residual = tensor(2, 6, 5, 4, seed=5).to(memory_format=other)
    check(x, 2, *affine(6), activation="silu", residual=residual, grad_out=grad)
    check(x, 2, *affine(6), activation="relu", residual=residual[:1].expand(2, 6, 5, 4), grad_out=grad)


def test_gradient_expanded_or_zero():
    x = tensor(2, 6, 5, 4)
    for grad in (torch.ones(()).expand_as(x), torch.zeros_like(x), tensor(2, 6, 1, 1).expand_as(x)):
        check(x, 3, *affine(6), activation="silu", grad_out=grad)


def test_unaligned_storage():
    for dtype in DTYPES:
        x = tensor(2 * 6 * 5 * 4 + 1, dtype=dtype)[1:].view(2, 6, 5, 4)
        check(x, 3, *affine(6), activation="silu")


# ---- hard values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_far_from_zero(mean, layout):
    x = tensor(2, 8, 32, 32, mean=mean)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    y = check(x, 4, *affine(8), activation="silu")[0]
    if mean <= 1e4:  # the rounded mean alone is worth eps·|mean| standard deviations; twice that is allowed
        exact = formula(x.double(), 4, *(v.double() for v in affine(8)), 1e-5, "silu", None)
        largest_weight = affine(8)[0].abs().max().item()
        assert (y - exact).abs().max() <= 1.2 * largest_weight * 2 * torch.finfo(torch.float32).eps * mean + 2e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_mean_and_deviation_of_each_group(mean, layout):
    """The result's own statistics, which a correlation with the right result would not see."""
    x = (tensor(3, 12, 13, 11) * torch.arange(1.0, 4.0).reshape(3, 1, 1, 1) + mean).to(memory_format=layout)
    groups = group_norm(x, 4, eps=0.0).double().reshape(3, 4, -1)
    # The saved mean is rounded to fp32: eps/2·|mean|; then a rounding or two of each element, of size up to 4.
    eps = torch.finfo(torch.float32).eps
    assert groups.mean(2).abs().max() <= eps * (mean + 1)
    assert (groups.std(2, correction=0) - 1).abs().max() <= 4 * eps


@pytest.mark.parametrize("scale", [1e19, 1e30])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_scale_whose_square_overflows(scale, layout):
    unit = tensor(2, 8, 6, 6)
    if layout == "channels_last":
        unit = unit.to(memory_format=torch.channels_last)
    weight, bias = affine(8)
    y = group_norm(unit * scale, 4, weight, bias)
    torch.testing.assert_close(y, group_norm(unit, 4, weight, bias, 0.0), rtol=1e-5, atol=1e-5)


def test_scale_gradient_shrinks_in_proportion():
    unit, grad = tensor(2, 8, 6, 6), tensor(2, 8, 6, 6, seed=4)
    small = run(ours, grad, unit, 4, *affine(8), 0.0, "silu", None)
    large = run(ours, grad, unit * 2.0**80, 4, *affine(8), 0.0, "silu", None)
    torch.testing.assert_close(large[1] * 2.0**80, small[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(large[2], small[2], rtol=1e-5, atol=1e-5)


def test_fp16_values_whose_square_overflows():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (tensor(2, 8, 6, 6) * 10_000).half().to(memory_format=layout)
        check(x, 4, *affine(8, torch.float16), activation="silu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_subnormal_results(layout):
    """Which an instruction that rounds to bf16 takes for zeros."""
    x = tensor(2, 64, 8, 8, dtype=torch.bfloat16).to(memory_format=layout)
    y, gx, *_ = check(x, 8, torch.full((64,), 2e-39))
    assert (y != 0).double().mean() > 0.9 and (gx != 0).double().mean() > 0.9


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps(eps, dtype):
    # Deviations of 1e-3 in fp16, where an eps of 1e-12 rounded to fp16 would be 0 and 1e-6 off by a percent.
    x = (tensor(2, 8, 6, 6) * 1e-3).to(dtype)
    check(x, 4, *affine(8), eps=eps)


def test_constant_input():
    for value in (0.0, 3.0, -1000.1):
        x = torch.full((2, 8, 5, 5), value)
        weight, bias = affine(8)
        y, gx, *_ = run(ours, torch.randn_like(x), x, 4, weight, bias, 1e-5, None, None)
        # The sum of 50 equal numbers may round: an ulp of the value, times rstd = 1/sqrt(eps).
        slack = 1.2e-7 * abs(value) * 317 * weight.abs().max() + 1e-7
        assert (y - bias.reshape(1, 8, 1, 1)).abs().max() <= slack
        assert gx.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_in_its_group(bad, layout):
    x = tensor(2, 8, 5, 5).to(memory_format=layout)
    clean = run(ours, torch.ones_like(x), x, 4, *affine(8), 1e-5, "silu", None)
    x[1, 3, 2, 2] = bad
    dirty = run(ours, torch.ones_like(x), x, 4, *affine(8), 1e-5, "silu", None)
    for a, b in zip(clean[:2], dirty[:2]):
        inside = torch.zeros(2, 8, dtype=torch.bool)
        inside[1, 2:4] = True
        assert torch.equal(a[~inside], b[~inside])
        assert b[inside].isnan().all()


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 1, 1)])
def test_one_element_per_group_gives_the_bias(shape):
    x = tensor(*shape)
    weight, bias = affine(6)
    y, gx, gw, gb, _ = run(ours, torch.ones_like(x), x, 6, weight, bias, 1e-5, None, None)
    assert torch.equal(y, bias.reshape([1, 6] + [1] * (x.dim() - 2)).expand_as(x))
    assert (gx == 0).all() and (gw == 0).all()
    assert torch.equal(gb, torch.full((6,), 5.0))


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0), (2, 6, 0, 3), (0, 6, 0)])
def test_empty(shape):
    x = torch.randn(shape)
    y, gx, gw, gb, gr = run(ours, torch.ones_like(x), x, 3, *affine(6), 1e-5, "silu", torch.randn(shape))
    assert y.shape == gx.shape == gr.shape == shape
    assert (gw == 0).all() and (gb == 0).all() and gw.shape == gb.shape == (6,)


def test_empty_with_gaps():
    for x in (torch.randn(1, 6, 4, 5)[:0, :, :, :2], torch.empty_strided((2, 6, 2, 0, 3), (60, 10, 5, 5, 1))):
        y, gx, gw, gb, _ = run(ours, torch.ones_like(x), x, 3, *affine(6), 1e-5, "silu", None)
        assert y.shape == gx.shape == x.shape and (gw == 0).all() and (gb == 0).all()


# ---- what autograd, autocast and the compiler ask ----------------------------------------------------------


def test_gradcheck_and_gradgradcheck(backend):
    for activation in ACTIVATIONS if backend != "triton" else ["silu"]:
        x, r = tensor(2, 4, 3, dtype=torch.float64), tensor(2, 4, 3, dtype=torch.float64, seed=3)
        inputs = [t.requires_grad_() for t in (x, *affine(4, torch.float64), r)]

        def function(x, w, b, r, activation=activation):
            return group_norm(x, 2, w, b, activation=activation, residual=r)

        assert torch.autograd.gradcheck(function, inputs)
        if backend != "triton":  # the second derivative is the reference's
            assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_only_where_asked():
    x, (w, b), r = tensor(2, 4, 3), affine(4), tensor(2, 4, 3, seed=3)
    for asked in range(1, 16):
        leaves = [t.clone().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate((x, w, b, r))]
        group_norm(leaves[0], 2, leaves[1], leaves[2], activation="silu", residual=leaves[3]).sum().backward()
        assert [t.grad is not None for t in leaves] == [bool(asked >> i & 1) for i in range(4)]


def test_backward_twice_with_retain_graph():
    x = tensor(2, 4, 3).requires_grad_()
    y = group_norm(x, 2, activation="silu").square().sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_bitwise_repeatable():
    x = tensor(4, 64, 14, 14)
    for format in (torch.contiguous_format, torch.channels_last):
        args = (tensor(4, 64, 14, 14, seed=4), x.to(memory_format=format), 32, *affine(64), 1e-5, "silu", None)
        first = run(ours, *args)
        for _ in range(3):
            for a, b in zip(first[:4], run(ours, *args)[:4]):
                assert torch.equal(a, b)


def test_inputs_are_not_modified():
    x, (w, b), r = tensor(2, 4, 3, 3), affine(4), tensor(2, 4, 3, 3, seed=3)
    before = [t.clone() for t in (x, w, b, r)]
    run(ours, torch.ones_like(x), x, 2, w, b, 1e-5, "relu", r)
    assert all(torch.equal(a, t) for a, t in zip(before, (x, w, b, r)))


def test_autocast_keeps_the_dtype_on_the_cpu(backend):
    if device_of(backend) != "cpu":
        pytest.skip("autocast on CUDA is another policy: test_group_norm_gpu.py")
    module = fastreg.nn.GroupNorm(2, 4, activation="silu")
    x = tensor(2, 4, 5, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == nn.GroupNorm(2, 4)(x).dtype == torch.bfloat16
        assert module(x, residual=x.float()).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiles_as_one_graph_and_with_dynamic_shapes(layout, backend):
    module = fastreg.nn.GroupNorm(2, 8, activation="silu")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (4, 5, 7):
        x = tensor(2, 8, size, size).to(memory_format=layout).requires_grad_()
        y, expected = compiled(x), module(x)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        (g,), (e,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(g, e, rtol=0, atol=0 if backend == "cpu" else 1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductor_keeps_values_and_strides(layout, backend):
    """Between kernels of its own, whose layouts it is free to choose."""
    if backend == "reference" or (backend == "triton" and device_of(backend) == "cpu"):
        pytest.skip("one kernel's operators stand for those of the others")
    module = fastreg.nn.GroupNorm(2, 8, activation="silu")

    def network(x):
        return module(x * 2) + 1

    x = tensor(2, 8, 6, 5).to(memory_format=layout).requires_grad_()
    y, expected = torch.compile(network, fullgraph=True)(x), network(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride() == x.stride()
    wanted, grad = (x, module.weight, module.bias), torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad)
    torch.testing.assert_close(ours, theirs)
    assert ours[0].stride() == x.stride()


def test_operators_keep_their_promises(backend):
    """opcheck: schemas, fake kernels with their strides, and that nothing is modified."""
    if backend == "reference":
        return
    w, b = affine(6)
    for x in (tensor(2, 6, 4, 5), tensor(2, 6, 4, 5).to(memory_format=torch.channels_last), tensor(2, 9, 4, 5)[:, 3:],
              tensor(2, 6, 4, 5).transpose(2, 3), tensor(2, 6), tensor(6, 2, 4).transpose(0, 1)):  # fmt: skip
        forward, back = (
            getattr(getattr(torch.ops.fastreg, f"group_norm_{d}"), backend) for d in ("forward", "backward")
        )
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(forward, (x, 2, w, b, 1e-5, 2, None, True), test_utils=tests)
        torch.library.opcheck(forward, (x, 2, None, b, 1e-5, 1, x, False), test_utils=tests)
        stats = forward(x, 2, w, b, 1e-5, 2, None, True)[1]
        for wanted in (1, 7, 15):
            torch.library.opcheck(back, (x, x, 2, w, b, 2, x, stats, wanted), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(1, 64, 40, 40), (67, 64, 5, 3), (100, 64, 8, 8)]
)  # the others: many groups at a time
def test_number_of_threads_changes_no_bit(shape, format, dtype, backend):
    if backend != "cpu":
        pytest.skip("about the threads of the CPU kernels")
    x, grad = (tensor(*shape, dtype=dtype, seed=seed).to(memory_format=format) for seed in (0, 4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([run(ours, grad, x, groups, *affine(64), 1e-5, "silu", None)[:4] for groups in (1, 32)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert all(torch.equal(p, q) for p, q in zip(a, b))


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_every_instruction_set(level, backend):
    if backend != "cpu" or "FASTREG_CPU_CAPABILITY" in os.environ:
        pytest.skip("about the CPU kernels, once")
    chosen = (
        "cpu and not twice and (activation or per_group or positions or mean or overflows or nan or slices"
        " or two_channels or small)"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__]
    done = subprocess.run(
        command, env=os.environ | {"FASTREG_CPU_CAPABILITY": level}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_func_transforms():
    x, (w, b) = tensor(3, 4, 5), affine(4)

    def loss(w, x):
        return group_norm(x[None], 2, w, b, activation="silu").sum()

    with fastreg.use_backend("reference"):
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
    for i in range(3):
        leaf = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, x[i]), leaf)
        torch.testing.assert_close(per_sample[i], expected)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input must be a tensor, got list", {"input": [1.0]}),
        (TypeError, "input must have a dtype among .*, got torch.int64", {"input": torch.ones(2, 6, dtype=torch.long)}),
        (ValueError, r"input must have at least 2 dimensions.*got shape \(6,\)", {"input": torch.ones(6)}),
        (ValueError, "num_groups must be positive and divide the 6 channels of input, got 4", {"num_groups": 4}),
        (ValueError, "num_groups must be positive .* got 0", {"num_groups": 0}),
        (TypeError, "num_groups must be an integer, got float", {"num_groups": 2.0}),
        (ValueError, r"weight must have shape \(6,\), got \(5,\)", {"weight": torch.ones(5)}),
        (ValueError, r"bias must have shape \(6,\), got \(6, 1\)", {"bias": torch.ones(6, 1)}),
        (TypeError, "bias must have a dtype among .*, got torch.int64", {"bias": torch.ones(6, dtype=torch.long)}),
        (
            ValueError,
            r"weight must be on the device of input, \w+(:\d)?, got meta",
            {"weight": torch.ones(6, device="meta")},
        ),
        (ValueError, "eps must be at least 0, got -1", {"eps": -1.0}),
        (ValueError, "eps must be at least 0, got nan", {"eps": math.nan}),
        (ValueError, "activation must be one of .* got 'swish'", {"activation": "swish"}),
        (ValueError, r"residual must have the shape of input, .* got \(6,\)", {"residual": torch.ones(6)}),
        (TypeError, "residual must have the dtype of input.*float16", {"residual": torch.ones(2, 6, 4).half()}),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    arguments = {"input": torch.ones(2, 6, 4), "num_groups": 2} | arguments
    with pytest.raises(error, match=message):
        group_norm(**arguments)


# ---- the module and replace_modules ------------------------------------------------------------------------


def test_module_is_interchangeable_with_torch():
    theirs = nn.GroupNorm(2, 6, eps=1e-3)
    nn.init.normal_(theirs.weight)
    mine = fastreg.nn.GroupNorm(2, 6, eps=1e-3)
    mine.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(mine.state_dict())
    x = tensor(2, 6, 5, 5)
    torch.testing.assert_close(mine(x), theirs(x))
    assert repr(mine) == repr(theirs)
    assert "activation=silu" in repr(fastreg.nn.GroupNorm(2, 6, activation="silu"))
    assert fastreg.nn.GroupNorm(2, 6, affine=False).weight is None
    without = fastreg.nn.GroupNorm(2, 6, bias=False, activation="relu")
    assert list(without.state_dict()) == ["weight"]
    torch.testing.assert_close(without(x), F.group_norm(x, 2).relu())
    assert fastreg.nn.GroupNorm(2, 6, device="meta", dtype=torch.float16).weight.dtype == torch.float16
    with pytest.raises(ValueError, match="activation must be one of"):
        fastreg.nn.GroupNorm(2, 6, activation="tanh")


def randomise(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def same_model(model, replaced, *inputs):
    """Outputs and all gradients agree within what fp32 loses, and the state dicts have the same keys."""
    assert list(model.state_dict()) == list(replaced.state_dict())
    results = []
    for m in (model, replaced):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = m(*leaves)
        results.append([y, *torch.autograd.grad((y * y).mean(), [*leaves, *m.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-5 * max(1.0, a.abs().max().item()))


class BasicBlock(nn.Module):
    """Of a ResNet with GroupNorm: activations as attributes, used more than once."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.GroupNorm(8, out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(8, out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.GroupNorm(8, out))

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x):
        return x + self.mlp(self.norm(self.dwconv(x)))


class Bottleneck(nn.Module):
    """Of torchvision's ResNet with norm_layer=GroupNorm."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(4, width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, bias=False), nn.GroupNorm(4, channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


class ConvNormActivation(nn.Sequential):
    """torchvision's block of that name: a subclass of Sequential with its forward."""

    def __init__(self, channels, out, activation):
        super().__init__(
            nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.GroupNorm(4, out), activation(inplace=True)
        )


class PoolFormerBlock(nn.Module):
    """Of timm's MetaFormer: one group, layer scales, a token mixer that is a pooling."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.GELU(), nn.Conv2d(2 * channels, channels, 1))
        self.scale = nn.Parameter(torch.ones(2, channels, 1, 1))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.scale[0] * (self.pool(y) - y)
        return x + self.scale[1] * self.mlp(self.norm2(x))


class ResnetBlock2D(nn.Module):
    """Of diffusers: one SiLU module for both norms and the time embedding, called in forward."""

    def __init__(self, channels, out, embedding):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels, eps=1e-6), nn.Conv2d(channels, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out)
        self.norm2, self.dropout = nn.GroupNorm(8, out, eps=1e-6), nn.Dropout(0.0)
        self.conv2, self.conv_shortcut = nn.Conv2d(out, out, 3, padding=1), nn.Conv2d(channels, out, 1)
        self.nonlinearity = nn.SiLU()

    def forward(self, x, embedding):
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.time_emb_proj(self.nonlinearity(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        return (self.conv_shortcut(x) + h) / 1.5


class Attention(nn.Module):
    """Of diffusers' autoencoder: GroupNorm of (N, C, positions)."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(8, channels, eps=1e-6)
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x):
        y = self.group_norm(x.flatten(2)).transpose(1, 2)
        y = F.scaled_dot_product_attention(*self.to_qkv(y).chunk(3, -1))
        return x + self.to_out(y).transpose(1, 2).reshape(x.shape)


class UNetBlock(nn.Module):
    """Of a diffusion model: GroupNorm + SiLU + convolution twice, a shift by the time embedding between."""

    def __init__(self, channels, out, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x, embedding):
        h = self.in_layers(x) + self.emb_layers(embedding)[:, :, None, None]
        return self.skip(x) + self.out_layers(h)


MODELS = {
    "resnet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(inplace=True),
            BasicBlock(16, 32, 2), BasicBlock(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        ),
        [(2, 3, 16, 16)], {"relu": 1, None: 6},
    ),
    "convnext": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GroupNorm(1, 24), ConvNeXtBlock(24), ConvNeXtBlock(24)),
        [(2, 3, 32, 32)], {None: 3},
    ),
    "unet": (lambda: UNetBlock(64, 96, 16), [(2, 64, 8, 8), (2, 16)], {"silu": 2}),
    "bottleneck": (lambda: nn.Sequential(Bottleneck(16, 8), Bottleneck(16, 8)), [(2, 16, 7, 7)], {None: 6}),
    "conv norm activation": (
        lambda: nn.Sequential(ConvNormActivation(3, 8, nn.ReLU), ConvNormActivation(8, 12, nn.SiLU)),
        [(2, 3, 9, 9)], {"relu": 1, "silu": 1},
    ),
    "poolformer": (lambda: nn.Sequential(PoolFormerBlock(12), PoolFormerBlock(12)), [(2, 12, 7, 7)], {None: 4}),
    "diffusers": (lambda: ResnetBlock2D(16, 32, 12), [(2, 16, 8, 8), (2, 12)], {None: 2}),
    "attention": (lambda: Attention(16), [(2, 16, 5, 5)], {None: 1}),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_replace_modules_keeps_outputs_gradients_and_state(name, channels_last):
    build, shapes, expected = MODELS[name]
    model = randomise(build())
    replaced = copy.deepcopy(model)
    report = replace_modules(replaced)
    counts = {act: list(report.group_norm.values()).count(act) for act in set(report.group_norm.values())}
    assert counts == expected and not report.kept
    assert all(type(m) is fastreg.nn.GroupNorm for m in replaced.modules() if isinstance(m, nn.GroupNorm))
    inputs = [tensor(*shape, seed=i) for i, shape in enumerate(shapes)]
    if channels_last:
        inputs[0] = inputs[0].to(memory_format=torch.channels_last)
        replaced = replaced.to(memory_format=torch.channels_last)
    same_model(model, replaced, *inputs)


def test_replace_modules_without_fusion():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    assert replace_modules(model, group_norm=False).group_norm == {} and type(model[0]) is nn.GroupNorm
    assert replace_modules(model, fuse_activation=False).group_norm == {"0": None}
    assert type(model[1]) is nn.ReLU
    assert replace_modules(model).group_norm == {"0": "relu"}  # a second call fuses what the first left
    assert type(model[1]) is nn.Identity
    assert replace_modules(model).group_norm == {}


def test_replace_modules_on_a_bare_module_and_on_nonsense():
    norm = nn.GroupNorm(2, 4)
    assert str(replace_modules(norm)) == ": GroupNorm" and type(norm) is fastreg.nn.GroupNorm
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        replace_modules([norm])


def test_replace_modules_leaves_unknown_subclasses_alone():
    class Doubled(nn.GroupNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(2, 4), nn.ReLU())
    report = replace_modules(model)
    assert type(model[0]) is Doubled and type(model[1]) is nn.ReLU
    assert "may compute something else" in report.kept["0"] and "left alone" in str(report)


def test_replace_modules_keeps_shared_modules_and_hooks_right():
    shared = nn.GroupNorm(2, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared)
    expected = copy.deepcopy(model)
    replace_modules(model)
    assert model[0] is model[3] is shared and shared.activation is None
    same_model(expected, model, tensor(2, 4, 3, 3))

    seen = []
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    assert replace_modules(model).group_norm == {"0": None}
    model(tensor(2, 4, 3, 3))
    assert seen[0] < -0.5  # before the activation


def test_replace_modules_leaves_forwards_of_an_instance_alone():
    """accelerate, for one, sets a forward on the instance, around that of the class."""

    def wrap(module, change=lambda out: out):
        module.forward = lambda *args, inner=module.forward: change(inner(*args))

    for at in (None, 0, 1):
        model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
        wrap(model if at is None else model[at], lambda out: out + 1)
        x = tensor(2, 4, 3, 3)
        expected = model(x)
        report = replace_modules(model)
        assert report.group_norm == ({} if at == 0 else {"0": None})
        assert list(report.kept) == (["0"] if at == 0 else [])
        torch.testing.assert_close(model(x), expected)


def test_replace_modules_keeps_the_mode():
    for training in (True, False):
        model = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU()).train(training)
        replace_modules(model)
        assert [module.training for module in model.modules()] == [training] * 3


def test_replace_modules_with_gelu_variants():
    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.GELU(), nn.GroupNorm(2, 4), nn.GELU(approximate="tanh"), nn.GroupNorm(2, 4), nn.Tanh()
    )
    expected = copy.deepcopy(model)
    assert replace_modules(model).group_norm == {"0": "gelu", "2": "gelu_tanh", "4": None}
    same_model(expected, model, tensor(2, 4, 3, 3))
