"""Every differentiable op inside everyday PyTorch code: transforms, hooks, checkpoints, fake tensors, refusals."""

import copy
import re

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastreg

ROWS, CLASSES = 6, 5


def target(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % CLASSES


OPS = {
    "cross_entropy": lambda x: fastreg.cross_entropy(x, target(x)),
    "focal_loss": lambda x: fastreg.focal_loss(x, target(x), label_smoothing=0.1, reduction="none"),
    "sigmoid_focal_loss": lambda x: fastreg.sigmoid_focal_loss(x, target(x)),
    "linear_cross_entropy": lambda x: fastreg.linear_cross_entropy(x, x.new_ones(3, CLASSES), target(x) % 3),
    "group_norm": lambda x: fastreg.group_norm(x, 1, activation="silu"),
    "max_norm": lambda x: fastreg.max_norm(x, 0.5),
    "row_norms": lambda x: fastreg.row_norms(x),
    "lp_penalty": lambda x: fastreg.lp_penalty([x]),
    "drop_path": lambda x: fastreg.drop_path(x, 1.0, residual=x),  # of which nothing is drawn
    "soft_threshold": lambda x: fastreg.soft_threshold(x, 0.3),
    "flood": lambda x: fastreg.flood(x[0, 0], 1.0),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(ROWS, CLASSES, dtype=dtype, requires_grad=True)


def gradient(op, x: Tensor) -> Tensor:
    out = op(x)
    return torch.autograd.grad(out, x, torch.ones_like(out))[0]


@every_op
def test_forward_derivatives(op):
    """torch.func.jvp and forward-mode AD agree with the gradient."""
    x, direction = logits(torch.float64), torch.randn(ROWS, CLASSES, dtype=torch.float64)
    want = (gradient(op, x) * direction).sum()
    _, along = torch.func.jvp(op, (x.detach(),), (direction,))
    torch.testing.assert_close(along.sum(), want)
    with forward_ad.dual_level():
        out = op(forward_ad.make_dual(x.detach(), direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent.sum(), want)


@every_op
def test_vmap(op):
    x = torch.randn(3, ROWS, CLASSES)
    torch.testing.assert_close(torch.func.vmap(op, randomness="same")(x), torch.stack([op(part) for part in x]))


@every_op
def test_many_gradients_at_once(op):
    """Both vmaps of PyTorch over a backward: that of torch.autograd.grad itself, and torch.func.vmap around it."""
    x = logits()
    out = op(x)
    grads = torch.stack([torch.ones_like(out), torch.randn_like(out)])
    want = torch.stack([torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads])
    many = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(many, want)
    many = torch.func.vmap(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0])(grads)
    torch.testing.assert_close(many, want)


@every_op
def test_checkpointing(op):
    x = logits()
    want = gradient(op, x)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(lambda x: op(x * 1), x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close(x.grad, want)


@every_op
def test_what_is_saved_may_be_kept_elsewhere(op):
    """Under saved-tensor hooks the backward works on what they give back, not on where it was."""
    x = logits()
    want = gradient(op, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        inner = x * 1
        out = op(inner)
    inner.data.fill_(0.125)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)


@every_op
def test_compiles_as_one_graph(op):
    x = logits()
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), op(x))
    torch.testing.assert_close(gradient(compiled, x), gradient(op, x))


@every_op
def test_compiled_autograd(op):
    """A graph of the backward must not leave out what a kernel writes by address."""
    x = logits()
    want = gradient(op, x)
    out = op(x).sum()
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        out.backward()
    torch.testing.assert_close(x.grad, want)


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
class TestCompiledByAddress:
    """What works on the addresses of parameters does it in compiled code too, in its turn."""

    @pytest.fixture(autouse=True)
    def model(self):
        torch._dynamo.reset()
        self.model = torch.nn.Sequential(torch.nn.Embedding(9, CLASSES), torch.nn.Linear(CLASSES, 4))
        self.x = torch.arange(8)

    def test_averages(self):
        averager = fastreg.WeightAverager(self.model, {"ema": fastreg.EMA(0.5)})
        averaged = fastreg.AveragedModel(self.model, fastreg.EMA(0.5))

        @torch.compile(backend="aot_eager")
        def step(add):
            with torch.no_grad():
                for param in self.model.parameters():
                    param.add_(add)
            averager.update()
            averaged.update_parameters(self.model)

        start = copy.deepcopy(self.model)
        step(0.0)
        step(1.0)
        copied = copy.deepcopy(start)
        torch.compile(lambda: averager.copy_to(copied, "ema"), backend="aot_eager")()
        for got in (copied, averaged.module):
            for param, old in zip(got.parameters(), start.parameters()):
                torch.testing.assert_close(param, old + 0.5)
        own = [param.clone() for param in self.model.parameters()]

        @torch.compile(backend="aot_eager")
        def evaluate():
            with averager.swapped("ema"):
                return self.model(self.x)

        torch.testing.assert_close(evaluate(), copied(self.x))
        assert all(map(torch.equal, self.model.parameters(), own))

    def test_fgm(self):
        fgm, table = fastreg.FGM(self.model, include="0."), self.model[0].weight
        self.model(self.x).square().sum().backward()
        old = table.detach().clone()
        for _ in range(2):
            torch.compile(fgm.attack, backend="aot_eager")()
            torch.testing.assert_close(table.detach(), old + table.grad / table.grad.norm())
            torch.compile(fgm.restore, backend="aot_eager")()
            assert torch.equal(table, old)

    @pytest.mark.parametrize("weight", [0.5, torch.tensor(0.5), 1.0])
    def test_average_in_one_graph(self, weight):
        def change(average, half, param):
            average.add_(1)
            fastreg.average_([average, half], [param, param], weight)
            return average * 1

        got, want = ([torch.zeros(3), torch.zeros(3).half()] for _ in range(2))
        returned = torch.compile(change, backend="aot_eager", fullgraph=True)(*got, torch.full((3,), 4.0))
        change(*want, torch.full((3,), 4.0))
        assert all(map(torch.equal, got, want)) and torch.equal(returned, want[0])


def test_a_tensor_that_comes_twice_compiles():
    x, weight = torch.randn(4, CLASSES, 3, requires_grad=True), torch.rand(CLASSES)
    calls = {
        "group_norm": lambda x: fastreg.group_norm(x, 1, residual=x, activation="relu"),
        "drop_path": lambda x: fastreg.drop_path(x, 1.0, residual=x),
        "cross_entropy": lambda x: fastreg.cross_entropy(x, torch.zeros(4, 3).long(), weight, alpha=weight),
    }
    for op in calls.values():
        torch._dynamo.reset()
        compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradient(compiled, x), gradient(op, x))


@every_op
def test_fake_tensors(op):
    with FakeTensorMode():
        x = logits()
        out = op(x)
        assert gradient(op, x).shape == x.shape
    assert out.shape == op(logits()).shape


@every_op
def test_symbolic_traces(op):
    """torch.fx, as torchvision and timm take features out of models, makes one step of a call."""
    x = logits()
    op = {  # what needs more than the stand-in for x gets it from here
        OPS["cross_entropy"]: lambda x: fastreg.cross_entropy(x, TARGET),
        OPS["focal_loss"]: lambda x: fastreg.focal_loss(x, TARGET, label_smoothing=0.1),
        OPS["sigmoid_focal_loss"]: lambda x: fastreg.sigmoid_focal_loss(x, TARGET),
        OPS["linear_cross_entropy"]: lambda x: fastreg.linear_cross_entropy(x, torch.eye(CLASSES), TARGET),
    }.get(op, op)
    traced = torch.fx.symbolic_trace(op)
    assert sum(getattr(node.target, "__module__", "").startswith("fastreg") for node in traced.graph.nodes) == 1
    torch.testing.assert_close(copy.deepcopy(traced)(x), op(x))


TARGET = torch.arange(ROWS) % CLASSES


class Deployed(torch.nn.Module):
    """Every module that a model keeps when it is deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = fastreg.nn.GroupNorm(2, 8, activation="silu")
        self.drop = fastreg.nn.DropPath(0.5)
        self.shrink = fastreg.nn.ChannelShrinkage(8)
        self.last = fastreg.nn.GroupNorm(4, 8, activation="gelu", dtype=torch.bfloat16)
        self.double()
        self.last.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.last(self.shrink(h + self.drop(h)), x)


class TestDeployment:
    @pytest.fixture
    def model(self) -> Deployed:
        return Deployed().eval()

    def test_symbolic_trace(self, model):
        x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_jit_trace(self, model):
        """The trace is PyTorch's own operators, serves other shapes, and can be loaded without this package."""
        traced = torch.jit.trace(model, torch.randn(2, 8, 3, 5, dtype=torch.float64))
        assert not re.search("fastreg::|PythonOp", str(traced.inlined_graph))
        x = torch.randn(3, 8, 7, 2, dtype=torch.float64)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-3, atol=1e-3)  # parameters rounded to bf16

    @pytest.mark.parametrize("strict", [False, True])
    def test_torch_export(self, model, strict):
        """Likewise, with a batch of any size; it is what torch.onnx.export starts from."""
        x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
        batch = ({0: torch.export.Dim("batch", min=2)},)
        exported = torch.export.export(model, (x,), strict=strict, dynamic_shapes=batch)
        assert "fastreg" not in str(exported.graph)
        assert "aten.group_norm" in str(exported.graph)  # for which there are kernels everywhere
        x = torch.randn(5, 8, 3, 5, dtype=torch.float64)
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-3, atol=1e-3)


@every_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(op, dtype):
    with pytest.raises(TypeError, match=rf"must have a dtype among float16, bfloat16, float32, float64, got {dtype}"):
        op(torch.ones(ROWS, CLASSES).to(dtype))


@every_op
def test_what_was_modified_since_is_noticed(op):
    """A backward either needs nothing of what was modified in place, and is right, or raises PyTorch's error."""
    x = logits()
    want = gradient(op, x)
    inner = x * 1
    out = op(inner)
    with torch.no_grad():
        inner.fill_(0.125)
    try:
        got = torch.autograd.grad(out.sum(), x)[0]
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, want)
