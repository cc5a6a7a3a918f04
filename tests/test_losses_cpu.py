"""The C++ cross-entropy kernels: accuracy on every instruction set, and what tests of the op cannot see."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import _backends, cross_entropy, sigmoid_focal_loss, use_backend
from fastreg.testing import DTYPES, LAYOUTS, assert_accurate, with_layout
from tests import test_losses

pytestmark = pytest.mark.skipif(_backends.missing("cross_entropy", "cpu") is not None, reason="no CPU kernels")
LEVELS = ("baseline", "avx2", "avx512")


@pytest.fixture(autouse=True)
def on_cpu():
    threads = torch.get_num_threads()
    with use_backend("cpu"):
        yield
    torch.set_num_threads(threads)


def check(x, target, weight=None, **options):
    """Loss and gradient against fp64, held to the error of PyTorch in the dtype of x."""
    results = []
    for input, w, loss_of in (
        (x.detach(), weight, cross_entropy),
        (x.detach().clone(), None if weight is None else weight.to(x.dtype), F.cross_entropy),
        (x.detach().double(), None if weight is None else weight.double(), F.cross_entropy),
    ):
        input.requires_grad_()
        loss = loss_of(input, target if loss_of is cross_entropy else target.long(), w, **options)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape) if loss.dim() else None
        loss.backward(None if upstream is None else upstream.to(loss.dtype))
        results.append((loss.detach(), input.grad))
    ours, stock, oracle = results
    if x.dtype == torch.float64:  # the oracle is no better than stock here
        torch.testing.assert_close(ours[0], oracle[0], rtol=1e-13, atol=1e-300, equal_nan=True)
        scale = float(oracle[1].abs().nan_to_num().max()) if x.numel() else 0.0
        torch.testing.assert_close(ours[1], oracle[1], rtol=1e-12, atol=1e-15 * scale, equal_nan=True)
    else:
        assert_accurate(ours[0], stock[0], oracle[0], "loss")
        assert_accurate(ours[1], stock[1], oracle[1], "gradient")
    return ours


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 2, 7, 16, 33, 1000, 4097, 9001])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_rows_are_accurate(dtype, num_classes, label_smoothing):
    torch.manual_seed(num_classes)
    x = (3 * torch.randn(5, num_classes)).to(dtype)
    target = torch.randint(num_classes, (5,))
    weight = torch.rand(num_classes) + 0.1
    for reduction in ("none", "mean", "sum"):
        check(x, target, weight, reduction=reduction, label_smoothing=label_smoothing)
        check(x, target, reduction=reduction, label_smoothing=label_smoothing, ignore_index=int(target[0]))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 37), (300, 5), (2, 19, 5), (2, 37, 300), (3, 1, 7)])
def test_layouts_are_accurate(dtype, layout, shape):
    torch.manual_seed(0)
    x = with_layout(torch.randn(shape).to(dtype), layout)
    target = with_layout(torch.randint(shape[1], (shape[0], *shape[2:])).to(torch.int32), layout)
    weight = with_layout(torch.rand(shape[1]).to(dtype), layout)
    check(x, target, weight, label_smoothing=0.1, ignore_index=0)
    check(x, target, reduction="none")
    if len(shape) == 3:  # classes last in memory
        check(x.permute(0, 2, 1).contiguous().permute(0, 2, 1), target)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [255, 256, 271, 1000, 4096, 9001])
def test_focal_terms_of_many_classes_are_accurate(dtype, num_classes):
    """Every class has one: of rows with a nearly certain class, with -inf in places and in whole blocks, with NaN."""
    torch.manual_seed(num_classes)
    x = 4 * torch.randn(7, num_classes)
    x[0] *= 10  # one class has all but a little
    x[1, 3:200:7] = -float("inf")
    x[2] += 300
    x[3, num_classes // 2 :] = -float("inf")  # a block of nothing else, of 9001
    x[4] = 0.0
    x[5, 7] = float("nan")
    y = torch.tensor([int(x[0].argmax()), 0, 1, 2, 3, 4, -100])
    for options in ({}, {"alpha": 0.5, "scale": 0.5, "logit_adjustment": -torch.rand(num_classes)}):
        options = {"gamma": 2.0, "label_smoothing": 0.1, "reduction": "none", **options}
        test_losses.check("cpu", x.to(dtype), y, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [100.0, 1e4, 1e8])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_keep_their_digits(dtype, magnitude, label_smoothing):
    magnitude = min(magnitude, 6e4) if dtype == torch.float16 else magnitude
    torch.manual_seed(0)
    x = torch.cat([torch.full((2, 50), magnitude), magnitude * torch.randn(6, 50).clamp(-1, 1)]).to(dtype)
    target = torch.arange(8)
    check(x, target, reduction="none", label_smoothing=label_smoothing)
    check(x.T[None].contiguous(), target[None], reduction="none", label_smoothing=label_smoothing)  # columns


@pytest.mark.parametrize("place", [0, 70, 500, 5000, 8999])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_is_never_negative(place, dtype):
    """Wherever the one large logit stands, its own exponential adds exactly 1 to the sum."""
    for logit in torch.arange(15, 60).add(0.37).to(dtype):
        x = torch.zeros(1, 9000, dtype=dtype)
        x[0, place] = logit
        loss = cross_entropy(x, torch.tensor([place])).double()
        exact = F.cross_entropy(x.double(), torch.tensor([place]))
        # The logarithm of a sum next to 1 has the digits of that sum, to which at most 9000 / 64 chunks are added.
        assert 0 <= loss <= exact + 160 * 2.0**-24 + torch.finfo(dtype).eps * exact


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_are_those_of_pytorch(dtype, columns):
    inf, nan, big = float("inf"), float("nan"), 65504.0
    rows = [[-inf] * 5, [inf, 0, 0, 0, 0], [0, inf, 0, 0, 0], [nan, 0, 0, 0, 0],
            [-inf, 0, 1, 2, 3], [0, -inf, 1, 2, 3], [-inf, -inf, -inf, -inf, 0], [big, -big, big, 0, 1],
            [nan] * 5, [-200.0] * 5]  # fmt: skip
    for label_smoothing in (0.0, 0.1):
        for tail in (0, 60):  # a row shorter than a vector; one of several
            x = torch.tensor(rows, dtype=dtype)
            x = torch.cat([x, x[:, :1].expand(-1, tail)], 1) if tail else x
            target = torch.zeros(len(rows), dtype=torch.int64)
            if columns:
                check(x.T[None].contiguous(), target[None], reduction="none", label_smoothing=label_smoothing)
            else:
                check(x, target, reduction="none", label_smoothing=label_smoothing)


def test_a_whole_block_of_minus_infinity():
    x = torch.randn(2, 9000)
    x[0, :4096] = -float("inf")
    x[1, 4096:] = -float("inf")
    check(x, torch.tensor([8000, 5]), reduction="none")


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_of_rows_of_minus_infinity_have_no_loss(dtype, columns):
    x, q = torch.full((2, 40), -float("inf"), dtype=dtype), torch.full((2, 40), 1 / 40)
    x[1] = 0
    if columns:
        x, q = x.T[None].contiguous(), q.T[None].contiguous()
    for reduction in ("none", "sum"):
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, q, reduction=reduction)
        assert loss.isnan().flatten().tolist() == ([True, False] if reduction == "none" else [True])
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert (grad[0, :, 0] if columns else grad[0]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_column_of_many_probabilities_keeps_their_sum(dtype):
    """A certain class's gradient is what that sum lacks of its digits, were they added one by one."""
    torch.manual_seed(0)
    x, q = torch.randn(1, 20000, 3).to(dtype), torch.rand(1, 20000, 3)
    x[:, 7] += 60
    test_losses.check("cpu", x, q / q.sum(1, True), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_is_read_and_every_rounding_is_right(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.stack([x, torch.zeros_like(x)], 1)
    for logits in (x, x.T[None].contiguous()):
        target = torch.zeros(2**16, dtype=torch.int64).reshape(logits.shape[0], *logits.shape[2:])
        loss = cross_entropy(logits, target, reduction="none")
        expected = F.cross_entropy(logits.double(), target, reduction="none")
        torch.testing.assert_close(loss, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=2.0**-23, equal_nan=True)
    # The gradient of equal logits is half the weight, rounded to the dtype.
    torch.manual_seed(0)
    weight = torch.randint(-(2**31), 2**31, (2, 2**16), dtype=torch.int64).to(torch.int32).view(torch.float32)
    weight[0, :4096] = torch.linspace(0, 2.0**-13, 4096)  # fp16's subnormal range
    weight[1, :4096] = torch.linspace(65400, 131200, 4096)  # and the end of its range
    for row in weight:
        logits = torch.zeros(2, len(row), dtype=dtype).T.contiguous().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # the loss, and so its gradient, stays in fp32
            loss = cross_entropy(logits, torch.zeros(len(row), dtype=torch.int64), reduction="none")
        loss.backward(row)
        torch.testing.assert_close(logits.grad[:, 1], (row / 2).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 262144), (3, 70001), (700, 1000), (4, 150, 4000), (4000, 150)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_threads_change_nothing(shape, dtype, gamma):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x = x.T.contiguous().T if shape == (4000, 150) else x
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    weight = torch.rand(shape[1])
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        leaf = x.detach().requires_grad_()
        loss = cross_entropy(leaf, target, None if gamma else weight, label_smoothing=0.1, gamma=gamma)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_a_row_does_not_depend_on_its_place():
    torch.manual_seed(0)
    row = torch.randn(5003)
    for count in (1, 2, 7):
        storage = torch.randn(count * 5003 + 1)
        for offset in (0, 1):
            x = storage[offset : offset + count * 5003].view(count, 5003)
            x[-1] = row
            leaf = x.detach().requires_grad_()
            loss = cross_entropy(leaf, torch.full((count,), 17), reduction="none", label_smoothing=0.1)
            (grad,) = torch.autograd.grad(loss.sum(), leaf)
            if count == 1 and offset == 0:
                first = loss[-1].item(), grad[-1].clone()
            assert loss[-1].item() == first[0] and torch.equal(grad[-1], first[1])


def test_longest_rows_are_accurate():
    torch.manual_seed(0)
    check(torch.randn(2, 262144), torch.tensor([262143, 0]), label_smoothing=0.1)
    check(torch.randn(3, 262143).bfloat16(), torch.tensor([262142, 0, -100]))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_empty_batches(shape):
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    for reduction in ("none", "mean", "sum"):
        check(torch.zeros(shape), target, reduction=reduction)


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 5)])
def test_ignored_rows_are_never_read(shape):
    x = torch.full(shape, float("nan"))
    x[0] = torch.randn(shape[1:])
    target = torch.full((shape[0], *shape[2:]), -100)
    target[0] = 3
    leaf = x.requires_grad_()
    loss = cross_entropy(leaf, target)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(x[:1].detach(), target[:1]))
    assert leaf.grad[1:].eq(0).all() and leaf.grad[0].ne(0).all()


@pytest.mark.parametrize("shape", [(3, 7), (3, 7, 5), (2, 70000)])
@pytest.mark.parametrize("bad", [-1, None, -101, 2**40])
def test_a_target_that_is_no_class_is_an_index_error(shape, bad):
    x = torch.randn(shape).requires_grad_()
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64)
    bad = shape[1] if bad is None else bad
    target.view(-1)[1] = bad
    with pytest.raises(IndexError, match=rf"target must hold .* got {bad} in row 1"):
        cross_entropy(x, target)
    good = torch.zeros_like(target)
    loss = cross_entropy(x, good, label_smoothing=0.1, reduction="none").sum()
    good.data.view(-1)[1] = bad  # behind autograd's back
    with pytest.raises(IndexError, match="target"):
        loss.backward()


def test_a_second_backward_gives_the_same():
    x = torch.randn(4, 9).requires_grad_()
    loss = cross_entropy(x, torch.arange(4))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, torch.tensor(2.0))
    assert torch.equal(2 * first, second)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    if "FASTREG_CPU_CAPABILITY" in os.environ:
        pytest.skip("already inside one")
    if LEVELS.index(level) > int(torch.ops.fastreg.cpu_capability()):
        pytest.skip(f"this processor has no {level}")
    if LEVELS.index(level) == int(torch.ops.fastreg.cpu_capability()):
        pytest.skip("the rest of this file runs on it")
    selected = "accurate or special or half or minus or digits or place"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected, __file__]
    done = subprocess.run(
        command, env=os.environ | {"FASTREG_CPU_CAPABILITY": level}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:]


# ---- what else the pass makes ------------------------------------------------------------------------------

KINDS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"gamma": 2.0},
    "focal with smoothing": {"gamma": 1.5, "label_smoothing": 0.1},
    "adjusted": {"logit_adjustment": torch.linspace(-3, 0, 7001), "margin": torch.linspace(0, 1, 7001), "scale": 1.5},
}


@pytest.mark.parametrize("name", [*KINDS, "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_past_the_caches_does_not_depend_on_the_rows_place(dtype, name):
    """Of 4 MiB and more it is written so, in vectors that begin elsewhere in every row."""
    classes, rows = 1001, (4 << 20) // 1001 // dtype.itemsize + 1
    options = {k: v[:classes] if isinstance(v, torch.Tensor) else v for k, v in KINDS.get(name, {}).items()}
    if name == "weighted":
        options = {"weight": torch.rand(classes) + 0.1, "label_smoothing": 0.1}
    x, y = (3 * torch.randn(rows, classes)).to(dtype), torch.randint(classes, (rows,))

    def gradient(of):
        leaf = x[of].clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(leaf, y[of], reduction="none", **options).sum(), leaf)[0]

    whole = gradient(slice(None))
    for r in (*range(64), rows - 1):
        assert torch.equal(whole[r], gradient(slice(r, r + 1))[0]), r


class Calls(TorchDispatchMode):
    """The operators that see at least `least` elements: their names, and the strides of their first tensor."""

    def __init__(self, least):
        super().__init__()
        self.least, self.names, self.strides = least, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and a.numel() >= self.least for a in args):
            self.names.append(func._schema.name.split("::")[1])
            self.strides.append(args[0].stride())
        return func(*args, **(kwargs or {}))


def test_whatever_is_wanted_takes_one_operator():
    x, y = torch.randn(40, 30, requires_grad=True), torch.randint(30, (40,))
    statistics = fastreg.longtail.ClassStatistics(30)
    with Calls(x.numel()) as calls:
        found = cross_entropy(x, y, outputs=True, statistics=statistics, grad_in_forward=True, label_smoothing=0.1)
    assert calls.names.count("cross_entropy_forward_extra") == 1
    assert set(calls.names) <= {"cross_entropy_forward_extra", "empty_like", "detach", "alias"}
    with Calls(x.numel()) as calls:
        found.loss.backward()
    assert not any(name.startswith("cross_entropy") for name in calls.names)


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
def test_no_order_of_the_dimensions_is_copied(order):
    x = torch.randn(4, 5, 6, 7).permute(order)
    y = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
    with Calls(x.numel()) as calls:
        cross_entropy(x, y, gamma=1.0)
        cross_entropy(x, torch.rand_like(x), gamma=1.0)
    assert set(calls.names) <= {"cross_entropy_forward", "permute", "view", "rand_like"}


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
def test_a_crop_is_copied_once_and_not_transposed(order):
    x = torch.randn(4, 5, 6, 7).permute(order)[:, :, 1:, 1:]
    y = torch.randint(x.shape[1], x.shape[:1] + x.shape[2:])
    with Calls(x.numel()) as calls:
        cross_entropy(x, y, gamma=1.0)
    copies = [strides for name, strides in zip(calls.names, calls.strides) if name == "clone"]
    assert set(calls.names) <= {"cross_entropy_forward", "permute", "view", "clone"}
    assert len(copies) <= 1 and all(list(strides) == sorted(strides, reverse=True) for strides in copies)


def targets_of(kind, rows, classes):
    y, other = torch.randint(classes, (2, *rows))
    y.view(-1)[0] = -100
    if kind == "pair":
        return y, other, torch.rand(rows)
    return torch.rand(rows[0], classes, *rows[1:]) if kind == "probabilities" else y


@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_place_of_the_input(name, kind, dtype):
    """The operator may write the gradient over its input: rows, columns, and rows so long that they are cut."""
    for shape, order in (((5, 301), (0, 1)), ((2, 37, 300), (0, 1, 2)), ((2, 60, 9), (0, 2, 1)), ((2, 7001), (0, 1))):
        torch.set_num_threads(2)
        rows, classes = shape[:1] + shape[2:], shape[1]
        options = {k: v[:classes] if isinstance(v, torch.Tensor) else v for k, v in KINDS[name].items()}
        target = targets_of(kind, rows, classes)
        both = target if isinstance(target, tuple) else (target, None, None)
        memory = torch.randn([shape[k] for k in order]).to(dtype)  # order is its own inverse
        x = memory.permute(order)
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, target, **options)
        loss.backward()
        vectors = [options.get(k) for k in ("logit_adjustment", "margin")]
        args = (both[0], None, None, *vectors, *both[1:], -100, 1, options.get("label_smoothing", 0.0),
                options.get("gamma", 0.0), 1.0, options.get("scale", 1.0), 0.0, False, False)  # fmt: skip
        argmax = x.argmax(1)
        found = torch.ops.fastreg.cross_entropy_forward_extra.cpu(x, *args, True, True, x)
        assert torch.equal(found[0], loss)
        kept = both[0] != -100 if kind != "probabilities" else torch.ones(rows, dtype=torch.bool)
        assert torch.equal(found[4][kept], argmax[kept])
        # The same but for the rounding of one of two products before their difference.
        torch.testing.assert_close(x, leaf.grad, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
@pytest.mark.parametrize("name", ["focal", "focal with smoothing"])
def test_the_gradient_of_a_long_row_is_the_same_in_place_and_on_every_number_of_threads(name, kind):
    """What all of its parts need, the targets' logits and sums over the row, is there before the first is written."""
    x = torch.randn(2, 90001)
    x[:, 5], x[:, 90000] = 13.0, 12.0
    y, other = torch.tensor([5, 90000]), torch.tensor([90000, 5])
    target = {"index": y, "pair": (y, other, 0.4), "probabilities": torch.rand(2, 90001).softmax(1)}[kind]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for in_forward in (False, "in_place"):
            leaf = x.clone().requires_grad_()
            loss = cross_entropy(leaf * 1, target, grad_in_forward=in_forward, **KINDS[name])
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_scaling_a_gradient(dtype, layout):
    for shape in ((3, 70), (2, 5, 9), (7, 20001)):
        grad = with_layout(torch.randn(shape).to(dtype), layout)
        expected = grad * torch.tensor(0.3, dtype=torch.float64).to(dtype if dtype == torch.float64 else torch.float32)
        torch.ops.fastreg.scale_gradient_.cpu(grad, torch.tensor(0.3, dtype=torch.float64))
        torch.testing.assert_close(grad, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


# ---- sigmoid focal loss ------------------------------------------------------------------------------------


def check_sigmoid(x, target, **options):
    results = []
    reference = fastreg.losses.sigmoid_focal_loss_reference
    weight = options.pop("weight", None)
    for loss_of, dtype in ((sigmoid_focal_loss, x.dtype), (reference, x.dtype), (reference, torch.float64)):
        leaf = x.detach().to(dtype).requires_grad_()
        t = target.to(dtype) if target.is_floating_point() and target.dtype != dtype else target
        loss = loss_of(leaf, t, weight=None if weight is None else weight.to(dtype), **options)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape) if loss.dim() else None
        (grad,) = torch.autograd.grad(loss, leaf, None if upstream is None else upstream.to(loss.dtype))
        results.append((loss.detach(), grad))
    ours, stock, oracle = results
    if x.dtype == torch.float64:
        torch.testing.assert_close(ours[0], oracle[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours[1], oracle[1], rtol=1e-12, atol=1e-14)
    else:
        assert_accurate(ours[0], stock[0], oracle[0], "loss")
        assert_accurate(ours[1], stock[1], oracle[1], "gradient")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("kind", ["hard", "soft", "index"])
def test_sigmoid_focal_is_accurate(dtype, gamma, kind):
    torch.manual_seed(0)
    for rows, classes in ((7, 80), (300, 1), (5, 33), (2, 5000), (3, 20000)):
        x = (4 * torch.randn(rows, classes)).to(dtype)
        target = torch.rand(rows, classes).to(dtype)
        target = target.round() if kind == "hard" else target
        target = torch.randint(-1, classes + 1, (rows,)) if kind == "index" else target
        for reduction in ("none", "sum", "mean") if rows > 3 else ("none",):
            check_sigmoid(x, target, gamma=gamma, reduction=reduction)
        check_sigmoid(x, target, gamma=gamma, alpha=-1, weight=torch.rand(classes), reduction="sum", normalizer=3.0)


@pytest.fixture(params=["together", "apart"])
def loss_and_gradient(request, monkeypatch):
    """Made together, as of a small batch, or each by itself."""
    if request.param == "apart":
        monkeypatch.setattr(fastreg.losses, "_SMALL", 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigmoid_focal_layouts_are_accurate(dtype, layout, loss_and_gradient):
    x = with_layout(torch.randn(9, 37).to(dtype), layout)
    for target in (with_layout(torch.rand(9, 37).to(dtype), layout), torch.arange(9, dtype=torch.int32)):
        for reduction in ("none", "sum"):
            check_sigmoid(x, target, reduction=reduction, weight=with_layout(torch.rand(37), layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sigmoid_focal_rows_of_few_classes_together_or_alone(dtype, layout, loss_and_gradient):
    """The same bits, of more rows than are taken at a time."""
    x, dense = with_layout(torch.randn(170, 29).to(dtype), layout), with_layout(torch.rand(170, 29), layout)
    weight = with_layout(torch.rand(29), layout)

    def both(x, target):
        leaf = x.detach().requires_grad_()
        loss = sigmoid_focal_loss(leaf, target, weight=weight)
        return loss.detach(), *torch.autograd.grad(loss, leaf, torch.full_like(loss, 3))

    for target in (dense.to(dtype), dense > 0.5, torch.arange(170, dtype=torch.int32)):
        together = both(x, target)
        for row in (0, 1, 69, 70, 71, 139, 140, 169):
            alone = both(x[row : row + 1], target[row : row + 1])
            assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_focal_is_finite_for_every_logit(dtype, loss_and_gradient):
    x = torch.tensor([-6e4, -1e3, -104.0, -88.5, -17.0, 0.0, 17.0, 88.5, 104.0, 1e3, 6e4], dtype=dtype)
    x = x[None].expand(3, -1).contiguous()
    target = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)[:, None].expand_as(x)
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        check_sigmoid(x, target, gamma=gamma)


def test_sigmoid_focal_of_infinite_logits(loss_and_gradient):
    x = torch.tensor([float("inf"), -float("inf")])[None].expand(2, 2).contiguous().requires_grad_()
    loss = sigmoid_focal_loss(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), alpha=-1)
    assert loss.tolist() == [[float("inf"), 0.0], [0.0, float("inf")]]
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert grad.tolist() == [[1.0, 0.0], [0.0, -1.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sigmoid_focal_made_together_or_apart(dtype, reduction, monkeypatch):
    """The same bits, a rounding of bf16 to that type before the factor excepted; again in a second backward."""
    x, t = torch.randn(5, 33).to(dtype), torch.rand(5, 33).round().to(dtype)
    t[0] = 0.3
    grads = []
    for most in (1 << 20, 0):
        monkeypatch.setattr(fastreg.losses, "_SMALL", most)
        leaf = x.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, t, reduction=reduction)
        factor = torch.full_like(loss, -3.7)
        factors = (factor, factor, factor / -3.7)
        grads.append([torch.autograd.grad(loss, leaf, f, retain_graph=True)[0] for f in factors])
        (penalty,) = torch.autograd.grad(loss, leaf, factor, create_graph=True)
        torch.testing.assert_close(penalty.detach(), grads[0][0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.autograd.grad(penalty.float().sum(), leaf)[0].isfinite().all()
    twice = dtype == torch.bfloat16
    for together, apart in zip(*grads, strict=True):
        torch.testing.assert_close(together, apart, rtol=2**-7 if twice else 0, atol=0)
    assert torch.equal(grads[1][0], grads[1][1])


def test_sigmoid_focal_takes_batches_of_gradients(loss_and_gradient):
    x = torch.randn(4, 3, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([0, 2, -1, 1]), reduction="sum")
    factors = torch.tensor([1.0, 2.0, -3.0])
    (batch,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(batch, factors[:, None, None] * one)


def test_hard_targets_among_soft_ones_keep_their_bits():
    """A vector of which some targets are neither 0 nor 1 takes another way; the others must not show it."""
    x, hard = torch.randn(64), torch.rand(64).round()
    mixed = hard.clone()
    mixed[::3] = 0.4
    kept = mixed == hard
    whole, some = (sigmoid_focal_loss(x, t) for t in (hard, mixed))
    assert torch.equal(whole[kept], some[kept])


def test_threads_change_nothing_for_sigmoid_focal():
    x, target = torch.randn(4096, 80), torch.randint(-1, 80, (4096,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        loss = sigmoid_focal_loss(leaf, target, reduction="sum")
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


# ---- small batches: the gradient is made together with the loss -------------------------------------------
def small_and_large(dtype=torch.float32):
    """The same logits, as a batch that counts as small and, behind a dimension, as one that does not."""
    x, target = torch.randn(6, 7, dtype=dtype), torch.tensor([0, 6, -100, 3, 3, 1])
    return (x.clone().requires_grad_(), target), (x.clone()[..., None].requires_grad_(), target[:, None])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("factor", (1.0, -0.375, 0.0, float("inf"), float("nan")))
def test_small_batches_under_any_incoming_gradient(dtype, reduction, factor):
    (x, target), (y, wide_target) = small_and_large(dtype)
    loss, other = (cross_entropy(i, t, reduction=reduction) for i, t in ((x, target), (y, wide_target)))
    assert type(loss.grad_fn) is not type(other.grad_fn)  # two ways
    torch.testing.assert_close(loss, other, rtol=4 * torch.finfo(dtype).eps, atol=0)
    for each in (loss, other):
        each.backward(torch.tensor(factor, dtype=dtype), retain_graph=True)
        each.backward(torch.tensor(factor, dtype=dtype))  # a second time, onto the first
    # Each way rounds an exponential, a sum, a logarithm or a quotient, and the product with the factor.
    tolerance = 8 * torch.finfo(dtype).eps * y.grad[..., 0].abs().nan_to_num(posinf=0, neginf=0)
    same = (x.grad == y.grad[..., 0]) | (x.grad.isnan() & y.grad[..., 0].isnan())
    assert (same | ((x.grad - y.grad[..., 0]).abs() <= tolerance)).all()
    assert (x.grad[2] == 0).all()  # the ignored row


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("classes", (1, 2, 15, 16, 17, 32, 33, 100, 1000, 4096, 5000))
def test_small_batches_are_accurate(dtype, classes):
    rows = 37 if classes <= 32 else 9  # of few classes a vector holds 4 to 16 rows
    for layout in ("contiguous", "sliced", "transposed"):
        x = with_layout((5 * torch.randn(rows, classes)).to(dtype), layout)
        target = torch.randint(classes, (rows,))
        check(x, target)
        target[4] = -100
        check(x, target, reduction="sum")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_rows_of_few_classes_do_not_depend_on_their_neighbours(dtype):
    x, target = (5 * torch.randn(37, 10)).to(dtype), torch.randint(10, (37,))

    def gradient(x, target):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(leaf, target, reduction="sum"), leaf)
        return grad

    whole = gradient(x, target)
    for rows in (slice(0, 1), slice(3, 20), slice(30, 37)):
        assert torch.equal(gradient(x[rows], target[rows]), whole[rows])
    x[5], target[5] = float("nan"), -100
    kept = torch.arange(37) != 5
    assert torch.equal(gradient(x, target)[kept], whole[kept])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("classes", (3, 40))  # both ways to lay rows in vectors
def test_small_batches_of_extreme_logits(dtype, classes):
    inf, nan = float("inf"), float("nan")
    rows = [
        [0, -inf, 3],
        [-inf, -inf, -inf],
        [inf, 0, 1],
        [nan, 0, 1],
        [3e38, -3e38, 0],
        [1e4, 1e4, -1e4],
        [nan, inf, 0],
    ]
    x = F.pad(torch.tensor(rows, dtype=dtype), (0, classes - 3), value=-inf)
    target = torch.tensor([0, 1, 0, 0, 0, 1, -100])
    for row in range(6):
        results = []
        for loss_of in (cross_entropy, F.cross_entropy):
            leaf = x[row : row + 1].clone().requires_grad_()
            loss = loss_of(leaf, target[row : row + 1], reduction="sum")
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        torch.testing.assert_close(*results, equal_nan=True)
    leaf = x.clone().requires_grad_()
    cross_entropy(leaf, target).backward()
    assert (leaf.grad[6] == 0).all()  # ignored, whatever it holds


def test_threads_change_nothing_for_small_batches():
    x, target = torch.randn(700, 300), torch.randint(300, (700,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        loss = cross_entropy(leaf, target)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_small_batches_differentiate_twice():
    (x, target), _ = small_and_large(torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, target), x)


def test_small_batches_take_batches_of_gradients():
    (x, target), _ = small_and_large()
    loss = cross_entropy(x, target)
    factors = torch.tensor([1.0, 2.0, -3.0])
    (batch,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(batch, factors[:, None, None] * one)


def test_small_batches_pass_opcheck():
    (x, target), _ = small_and_large()
    for fp32_loss in (False, True):
        torch.library.opcheck(torch.ops.fastreg.cross_entropy_small.cpu, (x.detach(), target, -100, 1, fp32_loss))


def options_of(name, classes):
    if name == "weight":
        return {"weight": torch.linspace(0.1, 1, classes)}
    if name == "weighted":
        return {"weight": torch.linspace(0.1, 1, classes), "label_smoothing": 0.1, "alpha": torch.rand(classes)}
    if name == "odd weights":
        return {"weight": torch.arange(classes) % 3 * 0.5, "label_smoothing": 0.1}
    if name == "z loss":
        return {"z_loss": 1e-2, "gamma": 0.5, "alpha": 0.3, "all_ignored": "zero"}
    return {k: v[:classes] if isinstance(v, torch.Tensor) else v for k, v in KINDS[name].items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["index", "pair", "probabilities"])
@pytest.mark.parametrize("name", [*KINDS, "weight", "weighted", "odd weights", "z loss"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_small_batches_with_options(dtype, name, kind, monkeypatch):
    """Together with the loss the gradient is what it is apart, whatever comes in, a second time, and for a penalty."""
    for classes, layout in (
        (7, "contiguous"),
        (100, "sliced"),
        (4096, "contiguous"),
        (4097, "contiguous"),
    ):
        torch.manual_seed(classes)
        x, options = with_layout((3 * torch.randn(5, classes)).to(dtype), layout), options_of(name, classes)
        target = targets_of(kind, (5,), classes)
        found = []
        for most in (1 << 20, 0):
            monkeypatch.setattr(fastreg.losses, "_SMALL", most)
            leaf = x.detach().requires_grad_()
            loss = cross_entropy(leaf, target, **options)
            ways = [torch.autograd.grad(loss, leaf, factor, retain_graph=True)[0]
                    for factor in (None, torch.tensor(-2.5, dtype=dtype), None)]  # fmt: skip
            (penalty,) = torch.autograd.grad(loss, leaf, create_graph=True)
            found.append([loss.detach(), *ways, penalty.detach()])
            assert (loss.grad_fn.name() == "_SmallCrossEntropyBackward") == (most > 0)
            assert torch.equal(ways[0], ways[2])
        together, apart = found
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(together[0], apart[0], rtol=max(eps, 2.0**-22), atol=0)
        for mine, theirs in zip(together[1:], apart[1:], strict=True):
            # An exponential or a quotient rounded in another order; p and what is taken from it may cancel.
            largest = theirs.abs().max().item()
            torch.testing.assert_close(mine, theirs, rtol=2 * eps, atol=16 * min(eps, 2.0**-24) * largest)


def test_small_batches_with_options_take_batches_of_gradients_and_infinite_ones():
    x, y = torch.randn(6, 7, requires_grad=True), torch.tensor([0, 6, -100, 3, 3, 1])
    loss = cross_entropy(x, y, label_smoothing=0.1)
    factors = torch.tensor([1.0, 2.0, -3.0])
    (batch,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(batch, factors[:, None, None] * one)
    (infinite,) = torch.autograd.grad(loss, x, torch.tensor(float("inf")))
    assert (infinite[2] == 0).all() and not infinite[[0, 1, 3, 4, 5]].isfinite().any()
    args = (x.detach(), y, torch.rand(7), *[None] * 5, -100, 1, 0.1, 2.0, 1.0, 1.0, 0.0, False, False)
    torch.library.opcheck(torch.ops.fastreg.cross_entropy_with_gradient.cpu, args)


def test_small_batches_with_a_weight_that_fits_go_straight_to_the_kernel(monkeypatch):
    class Checked(Exception):
        pass

    def check_shapes(*args):
        raise Checked

    monkeypatch.setattr(fastreg.losses, "check_shapes", check_shapes)
    x, y, weight = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, -100, 1]), torch.rand(3)
    torch.testing.assert_close(cross_entropy(x, y, weight), F.cross_entropy(x, y, weight))
    for misfit in (torch.rand(4), torch.rand(1, 3), weight.double(), weight.clone().requires_grad_(), [1, 1, 1]):
        with pytest.raises(Checked):
            cross_entropy(x, y, misfit)
    for target in (y[:3], y.clamp(min=3), y[:, None]):
        with pytest.raises(Checked):
            cross_entropy(x, target, weight)


def test_small_batches_leave_fp16_to_its_scaler():
    """A gradient of 1e-9 is 0 in fp16 unless the factor that scales it comes first."""
    x, target = torch.zeros(4, 3, dtype=torch.float16), torch.tensor([0, 1, 2, 0])
    x[:, 0] = -16
    x.requires_grad_()
    cross_entropy(x, target).mul(2.0**15).backward()
    assert x.grad[1, 0] != 0


def test_a_gradient_that_waits_is_not_the_callers_to_change():
    (x, target), _ = small_and_large()
    (first,) = torch.autograd.grad(loss := cross_entropy(x, target), x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(kept, second)
    first.zero_()
    (third,) = torch.autograd.grad(cross_entropy(x, target), x)
    assert torch.equal(kept, third)
