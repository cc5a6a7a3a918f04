"""linear_cross_entropy: chunks against the plain composition and fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import fastreg
from fastreg import _backends, cross_entropy, linear_cross_entropy
from fastreg.losses import choose_backend
from fastreg.testing import assert_accurate
from tests.machine import needs_cuda, no_sync

N, IN, C = 37, 11, 13
OPTION_SETS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "focal": {"gamma": 2.0, "alpha": 0.5},
    "long tail": {
        "gamma": 0.5,
        "label_smoothing": 0.1,
        "logit_adjustment": -torch.linspace(0, 3, C),
        "margin": torch.linspace(0, 0.5, C),
        "scale": 2.0,
        "z_loss": 1e-3,
    },
}
TARGETS = ("indices", "probabilities", "shares")


def problem(dtype, kind="indices", bias=True):
    x = torch.randn(N, IN).to(dtype).requires_grad_()
    weight = (torch.randn(C, IN) / 3).to(dtype).requires_grad_()
    bias = torch.randn(C).to(dtype).requires_grad_() if bias else None
    y = torch.randint(C, (N,))
    y[5] = -100
    target = {"indices": y, "probabilities": torch.rand(N, C), "shares": (y, y.flip(0), torch.rand(N))}[kind]
    return x, weight, bias, target


needs_kernels = pytest.mark.skipif(
    choose_backend(torch.zeros(1, 1), torch.zeros(1)) == "reference",
    reason="torch.compile makes the reference's composition",
)


def composed(x, linear_weight, target, *, linear_bias=None, weight=None, **options):
    return cross_entropy(F.linear(x, linear_weight, linear_bias), target, weight, **options)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", OPTION_SETS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_composition(kind, name, reduction):
    options = {**OPTION_SETS[name], "weight": torch.rand(C), "reduction": reduction}
    for bias in (True, False):
        x, w, b, target = problem(torch.float64, kind, bias)
        inputs = (x, w, b) if bias else (x, w)
        ours = linear_cross_entropy(x, w, target, linear_bias=b, chunk_size=8, **options)
        theirs = composed(x, w, target, linear_bias=b, **options)
        torch.testing.assert_close(ours, theirs)
        grad = torch.randn(ours.shape, dtype=ours.dtype)
        expected = torch.autograd.grad(theirs, inputs, grad)
        for factor in (1, 2, 1):  # no backward spoils the next
            got = torch.autograd.grad(ours, inputs, factor * grad, retain_graph=True)
            for a, e in zip(got, expected, strict=True):
                torch.testing.assert_close(a, factor * e)
        graph = torch.autograd.grad(ours, inputs, grad, create_graph=True)
        for a, e in zip(graph, expected, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_as_accurate_as_the_composition(dtype, reduction):
    x, w, b, y = problem(dtype)
    grad = torch.rand(N if reduction == "none" else ()).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    results = []
    for inputs, call in (
        ((x, w, b), lambda x, w, b: linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, chunk_size=5)),
        ((x, w, b), lambda x, w, b: F.cross_entropy(F.linear(x, w, b), y, reduction=reduction)),
        (wide, lambda x, w, b: F.cross_entropy(F.linear(x, w, b), y, reduction=reduction)),
    ):
        loss = call(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs, grad.to(loss.dtype))])
    for ours, stock, exact, name in zip(*results, ("loss", "to input", "to weight", "to bias"), strict=True):
        # a sum over N rows or C classes in fp32 in another order: log2 of their number roundings of the largest
        noise = 8 * 2**-24 * float(exact.abs().max())
        assert_accurate(ours, stock, exact, name, noise=noise)


def test_weight_gradients_are_summed_in_fp32():
    """In bf16 a sum over many chunks stands still once it is 256 times its terms."""
    n, chunk = 4096, 4
    x = torch.ones(n, 1, dtype=torch.bfloat16)
    w = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.zeros(n, dtype=torch.int64), reduction="sum", chunk_size=chunk)
    (grad,) = torch.autograd.grad(loss, w)
    assert grad.flatten().tolist() == [-n / 2, n / 2]


def test_a_sum_that_fp16_cannot_hold_until_it_is_divided():
    x = torch.full((600, 1), 100.0, dtype=torch.float16)
    w = torch.tensor([[0.0], [2.0]], dtype=torch.float16)
    loss = linear_cross_entropy(x, w, torch.zeros(600, dtype=torch.int64), chunk_size=512)
    assert loss.item() == 200


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(reduction):
    x, w, b, y = problem(torch.float32)
    weight = torch.rand(C)
    options = {"weight": weight, "reduction": reduction, "linear_bias": b}
    ours = linear_cross_entropy(x, w, y, chunk_size=8, **options)
    theirs = F.linear_cross_entropy(x, w, y, **options)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(*(torch.autograd.grad(loss.sum(), (x, w, b)) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e)
    deep = torch.randn(C, 2, 3, IN)
    y = torch.randint(C, (N, 2, 3))
    torch.testing.assert_close(linear_cross_entropy(x, deep, y), F.linear_cross_entropy(x, deep, y))
    torch.testing.assert_close(
        linear_cross_entropy(x[0], w, y[0, 0, 0], ignore_index=None), F.linear_cross_entropy(x[0], w, y[0, 0, 0])
    )


def test_kept_rows_of_weight_0_have_the_gradient_of_a_quotient_by_0():
    """NaN, as without chunks; but 0 where no row is kept."""
    x, weight, zero = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0.0, 1, 1, 1, 1])
    for target, nan in ((torch.zeros(6, dtype=torch.int64), True), (torch.full((6,), -100), False)):
        for chunk_size in (2, 6, None):
            loss = linear_cross_entropy(x, weight, target, weight=zero, chunk_size=chunk_size)
            (grad,) = torch.autograd.grad(loss, x)
            assert loss.isnan() and (grad.isnan().all() if nan else (grad == 0).all())


def test_without_values():
    x, w = (torch.zeros(n, IN, device="meta", requires_grad=True) for n in (N, C))
    loss = linear_cross_entropy(x, w, torch.zeros(N, dtype=torch.int64, device="meta"), chunk_size=8)
    grads = torch.autograd.grad(loss, (x, w))
    assert [grad.shape for grad in grads] == [x.shape, w.shape] and loss.is_meta


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch 2.13 has them")
def test_takes_the_options_of_torch():
    x, weight, target = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    want = fastreg.linear_cross_entropy(x, weight, target)
    for options in (None, torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)):
        torch.testing.assert_close(fastreg.linear_cross_entropy(x, weight, target, options=options), want)


def test_gradient_in_the_forward_may_be_asked_for_with_any_number_of_chunks():
    x, weight, target = torch.randn(6, 4), torch.randn(5, 4), torch.arange(6) % 5
    one, three = (
        fastreg.linear_cross_entropy(x, weight, target, grad_in_forward=True, chunk_size=rows) for rows in (None, 2)
    )
    torch.testing.assert_close(one, three)


def test_nothing_kept():
    x, w, b, _ = problem(torch.float32)
    y = torch.full((N,), -100)
    for all_ignored in ("nan", "zero"):
        loss = linear_cross_entropy(x, w, y, linear_bias=b, all_ignored=all_ignored, chunk_size=8)
        assert loss.isnan() if all_ignored == "nan" else loss == 0
        assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, w, b)))


def test_only_wanted_gradients_are_made():
    x, w, b, y = problem(torch.float32)
    for wanted in (x, w, b):
        for tensor in (x, w, b):
            tensor.requires_grad_(tensor is wanted)
        loss = linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8)
        (grad,) = torch.autograd.grad(loss, wanted)
        (expected,) = torch.autograd.grad(composed(x, w, y, linear_bias=b), wanted)
        torch.testing.assert_close(grad, expected)
    with torch.no_grad():
        assert not linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8).requires_grad


class Products(TorchDispatchMode):
    """How many matrix products there are, and the addresses of those that are as large as the logits of a chunk."""

    def __init__(self, chunk):
        super().__init__()
        self.chunk, self.count, self.places = chunk, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::linear", "aten::addmm_"):
            self.count += 1
            if result.shape == (self.chunk, C):
                self.places.add(result.data_ptr())
        return result


@pytest.mark.parametrize("bias", [False, True])
def test_no_gradient_is_made_that_nobody_can_ask_for(bias):
    """What requires a gradient does so under no_grad, too; and all chunks' logits take one piece of memory."""
    x, w, b, y = problem(torch.float32, bias=bias)
    with Products(8) as made, torch.no_grad():
        linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8)
    assert made.count == 5 and len(made.places) == 1
    with Products(8) as made:
        linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8)
    assert made.count == 15 and len(made.places) == 1


def test_outputs_and_statistics():
    x, w, b, y = problem(torch.float32)
    ours, theirs = fastreg.longtail.ClassStatistics(C), fastreg.longtail.ClassStatistics(C)
    found = linear_cross_entropy(x, w, y, linear_bias=b, outputs=True, statistics=ours, chunk_size=8)
    expected = composed(x, w, y, linear_bias=b, outputs=True, statistics=theirs)
    torch.testing.assert_close(tuple(found), tuple(expected))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    for part, whole in zip(torch.autograd.grad(found.loss, (x, w)), torch.autograd.grad(expected.loss, (x, w))):
        torch.testing.assert_close(part, whole)


def test_autocast():
    x, w, b, y = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8)
        theirs = F.cross_entropy(F.linear(x, w, b), y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(*(torch.autograd.grad(loss, (x, w, b)) for loss in (ours, theirs)), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2**-6, atol=1e-3)


def test_transforms_take_the_composition():
    x, w, _, y = problem(torch.float64, bias=False)
    call = lambda x, w: linear_cross_entropy(x, w, y, chunk_size=8)  # noqa: E731
    expected = torch.autograd.grad(call(x, w), (x, w))
    for a, e in zip(torch.func.grad(call, (0, 1))(x, w), expected, strict=True):
        torch.testing.assert_close(a, e)
    assert torch.autograd.gradgradcheck(lambda w: call(x.detach(), w), w)


COMPILED = {
    "mean": {"gamma": 2.0, "alpha": torch.rand(C), "weight": torch.rand(C)},
    "sum": {"label_smoothing": 0.1, "outputs": True},
    "none": {"margin": torch.rand(C), "z_loss": 1e-3, "outputs": True},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("reduction", COMPILED)
def test_compiled(reduction, kind):
    """In one graph, in chunks if a kernel serves the call, the gradients for whatever comes in."""
    options = COMPILED[reduction]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2**-7)):
        x, w, b, target = problem(dtype, kind)

        def call(x, w, b, target=target):
            found = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk_size=8, **options)
            return (found.loss, *found[1:3]) if options.get("outputs") else (found,)

        steps = []

        def backend(graph, inputs, steps=steps):
            graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
            steps.extend(str(node.target) for each in graphs for node in each.nodes if node.op == "call_function")
            return aot_eager(graph, inputs)

        torch._dynamo.reset()
        ours = torch.compile(call, fullgraph=True, backend=backend)
        (loss, *known), (expected, *others) = ours(x, w, b), call(x, w, b)
        torch.testing.assert_close([loss, *known], [expected, *others], rtol=tolerance, atol=tolerance)
        for factor in (1.0, 3.0):
            grad = factor * torch.rand_like(loss)
            got = torch.autograd.grad(loss, (x, w, b), grad, retain_graph=True)
            for a, e in zip(got, torch.autograd.grad(expected, (x, w, b), grad, retain_graph=True), strict=True):
                assert a.dtype == e.dtype
                torch.testing.assert_close(a, e, rtol=2 * tolerance, atol=tolerance * float(e.abs().max()))
        chunked = any("linear_cross_entropy" in step for step in steps)
        assert chunked == (choose_backend(x, target) != "reference")
        assert chunked != any("function linear" in step for step in steps)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_gradients_of_what_is_not_frozen(reduction):
    x, w, b, y = problem(torch.float64)

    def call(x, w, b):
        return linear_cross_entropy(x, w, y, linear_bias=b, reduction=reduction, chunk_size=8)

    for wanted in (x, w, b):
        for tensor in (x, w, b):
            tensor.requires_grad_(tensor is wanted)
        torch._dynamo.reset()
        ours, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w, b), call(x, w, b)
        for a, e in zip(*(torch.autograd.grad(loss.sum(), wanted) for loss in (ours, expected)), strict=True):
            torch.testing.assert_close(a, e)


@needs_kernels
def test_compiled_infinite_gradients_leave_ignored_rows_0():
    x, w, _, y = problem(torch.float32)
    torch._dynamo.reset()
    loss = torch.compile(lambda: linear_cross_entropy(x, w, y, chunk_size=8), fullgraph=True, backend="aot_eager")()
    grad, _ = torch.autograd.grad(loss, (x, w), torch.tensor(float("inf")))
    assert (grad[5] == 0).all() and not grad[:5].isfinite().any()


@needs_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators(reduction):
    *leaves, target = problem(torch.float32, "shares")
    x, w, b = (leaf.detach() for leaf in leaves)
    told = (*target[:1], None, None, None, None, *target[1:], -100, ("none", "mean").index(reduction), 0.1, 2.0, 1.0)
    args = (x, w, b, *told, 1.0, 1e-3, False, 8, "cpu")
    ops = torch.ops.fastreg
    torch.library.opcheck(ops.linear_cross_entropy, (*args, True, [reduction == "mean", False, reduction == "mean"]))
    grad = torch.rand(N if reduction == "none" else ())
    torch.library.opcheck(ops.linear_cross_entropy_backward, (grad, *args, [True, False, True]))


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "linear_weight must have the dtype", {"linear_weight": torch.zeros(C, IN).double()}),
        (ValueError, "linear_weight must have the shape", {"linear_weight": torch.zeros(C, IN + 1)}),
        (ValueError, "linear_bias must have the shape", {"linear_bias": torch.zeros(C + 1)}),
        (ValueError, "input must have the shape", {"input": torch.zeros(2, 2, IN)}),
        (ValueError, "chunk_size", {"chunk_size": 0}),
        (ValueError, "target must have the shape", {"target": torch.zeros(N - 1, dtype=torch.int64)}),
        (ValueError, "reduction", {"reduction": "avg"}),
        (ValueError, "gamma", {"gamma": -1.0}),
        (IndexError, "13", {"target": torch.full((N,), C)}),
        (ValueError, "weight must not require", {"weight": torch.ones(C, requires_grad=True)}),
    ],
)
def test_bad_arguments(error, match, change):
    args = {
        "input": torch.zeros(N, IN),
        "linear_weight": torch.zeros(C, IN, requires_grad=True),
        "target": torch.zeros(N, dtype=torch.int64),
        "chunk_size": 8,
    }
    with pytest.raises(error, match=match):
        linear_cross_entropy(**{**args, **change})


def test_gradients_to_the_target_and_to_no_vector():
    x, w, bias, _ = problem(torch.float32)
    share, q = torch.rand(N, requires_grad=True), torch.rand(N, C, requires_grad=True)
    y = torch.randint(C, (N,))
    for target, leaf in ((q, q), ((y, y.flip(0), share), share)):
        grads = [
            torch.autograd.grad(loss(x, w, target, linear_bias=bias, **chunk), leaf)[0]
            for loss, chunk in ((linear_cross_entropy, {"chunk_size": 8}), (composed, {}))
        ]
        torch.testing.assert_close(*grads)
    for reduction in ("mean", "none"):
        for name in ("weight", "alpha", "margin", "logit_adjustment"):
            options = {name: torch.rand(C, requires_grad=True), "reduction": reduction}
            with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
                linear_cross_entropy(x, w, y, chunk_size=8, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_backward_reads_must_not_be_modified(reduction):
    x, w, _, y = problem(torch.float32)
    q, share, margin = torch.rand(N, C), torch.rand(N), torch.rand(C)
    for target, changed in ((y, y), (q, q), ((y, y.flip(0), share), share), (y, margin)):
        loss = linear_cross_entropy(x, w, target, chunk_size=8, reduction=reduction, margin=margin)
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


def test_a_wrong_target_is_told_before_anything_is_counted():
    x, w, _, y = problem(torch.float32)
    y[-1], statistics = C, fastreg.longtail.ClassStatistics(C)
    with pytest.raises(IndexError, match="target"):
        linear_cross_entropy(x, w, y, chunk_size=8, statistics=statistics)
    assert not statistics.count.any()


@pytest.mark.skipif(
    _backends.missing("cross_entropy", "cpu") is not None, reason="without kernels the loss of a chunk has temporaries"
)
@pytest.mark.parametrize(
    ("dtype", "n", "features", "classes", "chunk"),
    [
        (torch.float32, 256, 8, 3000, 16),
        (torch.float32, 256, 8, 3000, 64),
        (torch.float32, 64, 8, 3000, 64),
        (torch.float32, 64, 512, 3000, 16),
        # Where a chunk's logits are few beside the sums: PyTorch's product takes fp32 for them on some CPUs.
        (torch.bfloat16, 64, 512, 3001, 16),
        (torch.bfloat16, 256, 256, 30000, 16),
    ],
    ids=str,
)
def test_peak_memory_is_a_chunk_of_logits_and_the_sums(dtype, n, features, classes, chunk):
    one_pass = fastreg.backends()["cross_entropy"]["cpu"] == "usable"  # else their gradients come on top
    x = torch.randn(n, features, dtype=dtype, requires_grad=True)
    w = torch.randn(classes, features, dtype=dtype, requires_grad=True)
    y = torch.randint(classes, (n,))

    def step():
        loss = linear_cross_entropy(x, w, y, chunk_size=chunk)
        return torch.autograd.grad(loss, (x, w))

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    ideal = dtype.itemsize * ((1 if one_pass else 2) * chunk * classes + x.numel()) + 4 * w.numel()
    assert 0.9 * ideal <= peak <= 1.1 * ideal  # below it nothing was measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("classes", [1, 2, 601, 1300])
def test_sums_in_the_memory_of_their_gradient(dtype, classes):
    """Of every number of classes, in one piece and in several."""
    x = torch.randn(9, 3).to(dtype)
    w = torch.randn(classes, 3).to(dtype).requires_grad_()
    b = torch.zeros(classes, dtype=dtype, requires_grad=True)
    y = torch.randint(classes, (9,))
    wide = [t.detach().double().requires_grad_() for t in (w, b)]
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=4, reduction=reduction)
        exact = composed(x.double(), wide[0], y, linear_bias=wide[1], reduction=reduction)
        got = torch.autograd.grad(loss.sum(), (w, b))
        for a, e in zip(got, torch.autograd.grad(exact.sum(), wide), strict=True):
            assert a.dtype == dtype and a.is_contiguous()
            torch.testing.assert_close(a.double(), e, rtol=0, atol=16 * torch.finfo(dtype).eps * float(e.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_belong_to_their_receiver(dtype):
    """What he does to them must not show in those of a second backward."""
    x, w, b, y = problem(dtype)
    loss = linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8)
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    for again, grad in zip(torch.autograd.grad(loss, (x, w, b)), kept, strict=True):
        assert torch.equal(again, grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_incoming_gradients_at_once(reduction):
    x, w, b, y = problem(torch.float64)
    grads = torch.randn(3, *((N,) if reduction == "none" else ()), dtype=torch.float64)
    loss = linear_cross_entropy(x, w, y, linear_bias=b, chunk_size=8, reduction=reduction)
    got = torch.autograd.grad(loss, (x, w, b), grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(loss, (x, w, b), grad, retain_graph=True) for grad in grads]
    for a, e in zip(got, zip(*each), strict=True):
        torch.testing.assert_close(a, torch.stack(e))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_stay_0_under_an_infinite_gradient(reduction):
    x, w, b, y = problem(torch.float32)
    for target in (y, torch.full_like(y, -100)):
        loss = linear_cross_entropy(x, w, target, linear_bias=b, chunk_size=8, reduction=reduction)
        grads = torch.autograd.grad(loss, (x, w, b), torch.full_like(loss, float("inf")))
        assert (grads[0][target < 0] == 0).all() and not grads[0][target >= 0].isfinite().any()
        assert all((grad == 0).all() != (target >= 0).any() for grad in grads)


@needs_cuda
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_without_waiting_for_it(dtype, kind):
    """Where products of 16-bit matrices come in fp32."""
    x, w, b, target = problem(dtype, kind)
    leaves = [leaf.detach().to("cuda").requires_grad_() for leaf in (x, w, b)]
    there = tuple(t.cuda() for t in target) if isinstance(target, tuple) else target.cuda()

    def step():
        loss = linear_cross_entropy(leaves[0], leaves[1], there, linear_bias=leaves[2], chunk_size=8)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    step()
    with no_sync():
        got = step()
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, w, b)]
    loss = composed(exact[0], exact[1], target, linear_bias=exact[2])
    eps = torch.finfo(dtype).eps  # of the logits and of their gradients, each rounded
    for ours, theirs in zip(got, (loss.detach(), *torch.autograd.grad(loss, exact)), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=0, atol=16 * eps * theirs.abs().max().item())
