"""Everything that only a GPU can tell, in one run of at most nine minutes: `python -m benchmarks.gpu_check --out DIR`.

For a machine with an NVIDIA GPU, CUDA's toolkit, torch and triton, and no network. Builds both extensions in place,
runs the tests that need a GPU, runs small calls of every op under compute-sanitizer, and times every op beside its
peers. DIR gets report.md, results.csv and log.txt. A stage that fails or overruns its time is reported, and the others
go on. Exit status: 0 all well, 1 a stage failed, 2 no GPU.

`--dry-run` goes through the same motions on the CPU, with small cases and without what needs a GPU.

To add an op: a row in `OPS`.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional

import fastreg
from fastreg import _backends
from fastreg.losses import cross_entropy_reference, sigmoid_focal_loss_reference

from .bench_averaging import resnet50
from .bench_max_norm import RESNET50, by_sorting

ROOT = Path(__file__).parents[1]
BUDGET = 540.0  # seconds, for everything
HANGS = 75  # seconds, that a test may take, with all that Triton has to compile for it


# ---- what is checked, per op -----------------------------------------------------------------------------

Call = tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]


def agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Both in fp32, both sums of up to 10⁵ terms in an order of their own; of a half type, two roundings apart."""
    for a, b in zip(got, want, strict=True):
        bound = 2 * torch.finfo(b.dtype).eps if b.dtype in (torch.float16, torch.bfloat16) else 2e-5
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


def loss_and_gradient(loss, x: Tensor, *arguments: object, **options: object) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_()
    out = loss(leaf, *arguments, **options)
    return out.detach(), *torch.autograd.grad(out, leaf)


def long_tail(device: str) -> Iterator[Call]:
    """Every kind of target and of extra output, on short, long, odd, split and strided rows."""
    for shape in ((5, 10), (33, 1001), (2, 70000), (3, 7, 5)):
        x, classes = torch.randn(shape, device=device), shape[1]
        a, b = (torch.randint(0, classes, (shape[0], *shape[2:]), device=device) for _ in range(2))
        vectors = {
            name: torch.rand(classes, device=device) for name in ("weight", "alpha", "logit_adjustment", "margin")
        }
        calls = [
            (a, {"gamma": 2.0}),
            (a, {**vectors, "gamma": 1.5, "scale": 2.0, "z_loss": 0.01}),
            (a, {"gamma": 2.0, "label_smoothing": 0.1}),
            ((a, b, torch.rand(a.shape, device=device)), {**vectors, "gamma": 2.0}),
            (x.softmax(1), {**vectors, "label_smoothing": 0.1, "gamma": 2.0}),
        ]
        for target, options in calls:
            yield (
                partial(loss_and_gradient, fastreg.cross_entropy, x, target, **options),
                partial(loss_and_gradient, cross_entropy_reference, x, target, **options),
            )
            yield (
                partial(loss_and_gradient, fastreg.cross_entropy, x, target, grad_in_forward=True, **options),
                partial(loss_and_gradient, cross_entropy_reference, x, target, **options),
            )

        def counted(losses, x=x, target=a):
            return losses(x, target, gamma=2.0)

        yield partial(counted, seen_by_statistics), partial(counted, counted_by_hand)

        def known(loss, x=x, target=a):
            return loss(x, target)

        yield (
            partial(known, lambda x, y: tuple(fastreg.cross_entropy(x, y, outputs=True)[:3])),
            partial(known, lambda x, y: (functional.cross_entropy(x, y), x.logsumexp(1), x.argmax(1))),
        )


def seen_by_statistics(x: Tensor, target: Tensor, **options: object) -> tuple[Tensor, ...]:
    seen = fastreg.longtail.ClassStatistics(x.shape[1], x.device)
    fastreg.cross_entropy(x, target, statistics=seen, **options)
    return seen.count, seen.correct, seen.loss_sum


def counted_by_hand(x: Tensor, target: Tensor, **options: object) -> tuple[Tensor, ...]:
    losses = cross_entropy_reference(x, target, reduction="none", **options).double()
    hits = x.argmax(1) == target
    return tuple(
        torch.zeros(x.shape[1], dtype=each.dtype, device=x.device).index_add_(0, target.flatten(), each.flatten())
        for each in (torch.ones_like(target), hits.long(), losses)
    )


def linear(device: str) -> Iterator[Call]:
    """Chunks of equal length, and a shorter last one; with and without a bias; ignored rows."""
    for rows, features, classes, chunk in ((33, 16, 1001, 8), (64, 32, 70000, 16)):
        x, weight = torch.randn(rows, features, device=device), torch.randn(classes, features, device=device)
        target = torch.randint(0, classes, (rows,), device=device)
        target[3] = -100
        for given in ((x, weight), (x, weight, torch.randn(classes, device=device))):
            for reduction in ("mean", "none"):

                def both(loss, given=given, target=target, reduction=reduction):
                    leaves = [tensor.detach().requires_grad_() for tensor in given]
                    out = loss(*leaves, target, reduction)
                    return out.detach(), *torch.autograd.grad(out.sum(), leaves)

                def ours(x, weight, *rest, chunk=chunk):
                    *bias, target, reduction = rest
                    bias = bias[0] if bias else None
                    return fastreg.linear_cross_entropy(
                        x, weight, target, linear_bias=bias, reduction=reduction, chunk_size=chunk
                    )

                def stock(x, weight, *rest):
                    *bias, target, reduction = rest
                    return functional.cross_entropy(functional.linear(x, weight, *bias), target, reduction=reduction)

                yield partial(both, ours), partial(both, stock)


def sigmoid_focal(device: str) -> Iterator[Call]:
    """Dense and index targets, one and many blocks, a rest behind the last vector."""
    for shape in ((3, 5), (4096, 80), (333, 91)):
        x = torch.randn(shape, device=device)
        for target in (torch.rand(shape, device=device), torch.randint(-1, shape[1], shape[:1], device=device)):
            options = {"reduction": "sum", "weight": torch.rand(shape[1], device=device)}
            yield (
                partial(loss_and_gradient, fastreg.sigmoid_focal_loss, x, target, **options),
                partial(loss_and_gradient, sigmoid_focal_loss_reference, x, target, **options),
            )


def cross_entropy(device: str) -> Iterator[Call]:
    """Short, long, odd, split and strided rows, each plain and with per-class vectors."""
    for shape in ((5, 10), (33, 1001), (2, 70000), (3, 7, 5)):
        x = torch.randn(shape, device=device)
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
        weight = torch.rand(shape[1], device=device)
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
            yield (
                partial(loss_and_gradient, fastreg.cross_entropy, x, target, **options),
                partial(loss_and_gradient, functional.cross_entropy, x, target, **options),
            )


def group_norm(device: str) -> Iterator[Call]:
    """Groups that fit on chip and groups that do not, in both layouts, with and without a residual."""
    for shape, activation, added in (
        ((2, 32, 8, 8), "silu", False),
        ((3, 96, 7, 7), "gelu", True),
        ((2, 64, 96, 96), "silu", True),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, grad, residual = (
                torch.randn(shape, device=device).contiguous(memory_format=memory_format) for _ in range(3)
            )
            given = [x, *torch.randn(2, shape[1], device=device), *([residual] if added else [])]

            def both(norm, given=given, grad=grad):
                leaves = [tensor.detach().requires_grad_() for tensor in given]
                out = norm(*leaves)
                return out.detach(), *torch.autograd.grad(out, leaves, grad)

            def ours(x, weight, bias, residual=None, activation=activation):
                return fastreg.group_norm(x, 32, weight, bias, activation=activation, residual=residual)

            def stock(x, weight, bias, residual=0.0, activation=activation):
                return getattr(functional, activation)(functional.group_norm(x, 32, weight, bias) + residual)

            yield partial(both, ours), partial(both, stock)


def averaging(device: str) -> Iterator[Call]:
    """A list of every parameter's dtype at aligned and odd addresses; and two averages of a module with an integer
    buffer, updated twice and swapped in and out."""
    start, params = [], []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for size, offset in ((1, 0), (5000, 0), (700, 1)):
            start.append(torch.randn(size + offset, device=device)[offset:])
            params.append(torch.randn(size + offset, device=device).to(dtype)[offset:])

    def functional() -> tuple[Tensor, ...]:
        averages = [average.clone() for average in start]
        fastreg.average_(averages, params, 0.25)
        return tuple(averages)

    yield functional, lambda: tuple(torch.lerp(a, p.float(), 0.25) for a, p in zip(start, params))

    first, second = torch.randn(2, 3000, device=device)
    quarter = torch.lerp(first, second, 0.25)

    def module() -> tuple[Tensor, ...]:
        net = torch.nn.Module()
        net.weight, net.steps = torch.nn.Parameter(first.clone()), torch.nn.Buffer(torch.full((), 7, device=device))
        averager = fastreg.WeightAverager(net, {"ema": fastreg.EMA(0.75), "swa": fastreg.SWA()})
        averager.update()
        with torch.no_grad():
            net.weight.copy_(second)
        averager.update()
        seen = []
        for name in ("ema", "swa"):
            with averager.swapped(name):
                seen.append(net.weight.detach().clone())
        return *seen, net.weight.detach(), net.steps.float()

    yield module, lambda: (quarter, (first + second) / 2, second, torch.full((), 7.0, device=device))


# Rows for a warp, for a block, too long to be held, and in pieces; odd ones.
ROWS = ((33, 50), (5, 300), (7, 3, 3, 3), (3, 2049), (2, 9001), (2, 40001))


def in_place(fresh: list[Tensor], ours: Callable, stock: Callable) -> Call:
    """`ours` changes all tensors in one call, `stock` the rows of one tensor, of which it is given a wide copy."""
    weights = [w.clone() for w in fresh]

    def at_once() -> tuple[Tensor, ...]:
        torch._foreach_copy_(weights, fresh)
        ours(weights)
        return tuple(weights)

    def one_by_one() -> tuple[Tensor, ...]:
        return tuple(stock(w.flatten(1).double()).view_as(w).to(w.dtype) for w in fresh)

    return at_once, one_by_one


def lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def max_norm(device: str) -> Iterator[Call]:
    """All kinds of rows in one call; with weight decay, of half types, and with norms to a power."""
    fresh = [torch.randn(shape, device=device) for shape in ROWS]
    weights = [w.clone() for w in fresh]
    half = [w.to(dtype) for dtype in (torch.bfloat16, torch.float16) for w in fresh]
    yield in_place(
        half,
        lambda weights: fastreg.max_norm_(weights, 6.0, decay=0.25),
        lambda rows: torch.renorm(rows * 0.75, 2, 0, 6.0),
    )
    yield in_place(
        fresh,
        lambda weights: fastreg.max_norm_(weights, 20.0, tau=1.5),
        lambda rows: rows * (20 / lengths(rows) ** 1.5).clamp(max=1),
    )
    for cap, p in ((5.0, 2), (100.0, 1), (0.9, 2.5)):

        def projected(project, cap=cap, p=p):
            torch._foreach_copy_(weights, fresh)
            project(weights, cap, p)
            return tuple(weights)

        def renorm(weights, cap, p):
            for w in weights:
                w.renorm_(p, 0, cap)

        yield (
            partial(projected, lambda weights, cap, p: fastreg.max_norm_(weights, cap, p=p)),
            partial(projected, renorm),
        )
        for w in fresh:

            def out_of_place(project, norms, w=w):
                leaf = w.detach().requires_grad_()
                out = project(leaf), norms(leaf)
                return *(o.detach() for o in out), *torch.autograd.grad(out, leaf, [torch.ones_like(o) for o in out])

            yield (
                partial(
                    out_of_place,
                    partial(fastreg.max_norm, max_norm=cap, p=p),
                    partial(fastreg.row_norms, p=p),
                ),
                partial(
                    out_of_place,
                    partial(torch.renorm, p=p, dim=0, maxnorm=cap),
                    lambda w, p=p: torch.linalg.vector_norm(w.flatten(1), p, 1),
                ),
            )


def balls(device: str) -> Iterator[Call]:
    """The other changes of rows: onto the l1 and the l∞ ball, and to norms of their own to a power."""
    fresh = [torch.randn(shape, device=device) for shape in ROWS]
    yield in_place(
        fresh, lambda weights: fastreg.project_lp_ball_(weights, 41.0, 1), lambda rows: by_sorting(rows, 41.0)
    )
    yield in_place(
        fresh, lambda weights: fastreg.project_lp_ball_(weights, 2.5, float("inf")), lambda rows: rows.clamp(-2.5, 2.5)
    )
    yield in_place(
        fresh, lambda weights: fastreg.tau_normalize_(weights, 0.5), lambda rows: rows / lengths(rows) ** 0.5
    )


def lp_penalty(device: str) -> Iterator[Call]:
    """Empty, small and large tensors; the gradient straight into .grad."""
    weights = [torch.randn(n, device=device, requires_grad=True) for n in (1, 64, 1001, 300_000)]
    for w in weights:
        w.grad = torch.zeros_like(w)
    for p in (1, 2, 2.5):

        def in_place(p=p):
            torch._foreach_zero_([w.grad for w in weights])
            return fastreg.lp_penalty_backward_(weights, p), *(w.grad for w in weights)

        def by_autograd(p=p):
            penalty = sum(torch.linalg.vector_norm(w.double(), p) for w in weights)
            return penalty.detach().float(), *torch.autograd.grad(penalty, weights)

        yield in_place, by_autograd


def fgm(device: str) -> Iterator[Call]:
    """There and back, with rows that no gradient has touched."""
    module = torch.nn.ModuleDict({"emb": torch.nn.Embedding(100, 48, device=device)})
    weight = module["emb"].weight
    weight.grad = torch.randn_like(weight) * (torch.arange(100, device=device)[:, None] % 3 == 0)
    perturbation = fastreg.FGM(module)

    def ours():
        perturbation.attack()
        moved = weight.detach().clone()
        perturbation.restore()
        return moved, weight.detach().clone()

    def stock():
        kept = weight.detach()
        return kept + weight.grad / weight.grad.norm(), kept.clone()

    yield ours, stock


def drop_path(device: str) -> Iterator[Call]:
    """All branches dropped, and all kept: what else the generator draws is not known beforehand."""
    for shape in ((5, 7), (4, 33, 64, 64)):
        x, residual = torch.randn(2, *shape, device=device)
        for p in (1.0, 1e-12):
            for other in (None, residual):

                def ours(x=x, p=p, other=other):
                    return loss_and_gradient(lambda x: fastreg.drop_path(x, p, residual=other).square().sum(), x)

                def stock(x=x, p=p, other=other):
                    return loss_and_gradient(
                        lambda x: (x * float(p < 1) + (0 if other is None else other)).square().sum(), x
                    )

                yield ours, stock


def soft_threshold(device: str) -> Iterator[Call]:
    """A threshold for all, per channel, and per sample and channel; short and long runs."""
    for shape in ((3, 5, 7), (4, 33, 64, 64)):
        x = torch.randn(shape, device=device)
        for sizes in ((), shape[1:2], shape[:2]):
            tau = torch.rand(sizes, device=device)

            def both(shrink, x=x, tau=tau):
                leaves = [tensor.detach().requires_grad_() for tensor in (x, tau)]
                out = shrink(*leaves)
                return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

            def formula(x, tau):
                tau = tau.reshape([*tau.shape, *[1] * (x.dim() - 2)]) if tau.dim() else tau
                return x.sign() * (x.abs() - tau).relu()

            yield partial(both, fastreg.soft_threshold), partial(both, formula)


@dataclass(frozen=True)
class Op:
    """`calls(device)` yields a few small calls, which together go through all of the op's kernels: each a pair of
    functions, ours and plain PyTorch's, which return the same tensors. `cases` are what is timed instead of the cases
    of bench_<op>.py, which are made for CPUs; the most telling one first."""

    calls: Callable[[str], Iterator[Call]]
    cases: Mapping[str, object]
    registry: str = ""  # the op that has the kernels, if not the one of this name


OPS = {
    "cross_entropy": Op(
        cross_entropy,
        {
            "8192x1000": (8192, 1000),
            "65536x10": (65536, 10),
            "4096x32000": (4096, 32000),
            "512x1000": (512, 1000),
            "32x10": (32, 10),
            "4096x50257": (4096, 50257),
            "1024x262144": (1024, 262_144),
        },
    ),
    "focal_loss": Op(
        long_tail,
        {"8192x1000": (8192, 1000), "1024x8142": (1024, 8142), "4096x32000": (4096, 32000), "512x1000": (512, 1000)},
        registry="cross_entropy",
    ),
    "linear_cross_entropy": Op(
        linear,
        {"8192x2048x32000": (8192, 2048, 32000), "4096x1024x262144": (4096, 1024, 262_144)},
        registry="cross_entropy",
    ),
    "sigmoid_focal_loss": Op(
        sigmoid_focal, {"100000x80": (100_000, 80), "4096x80": (4096, 80), "8192x1000": (8192, 1000)}
    ),
    "group_norm": Op(
        group_norm,
        {
            f"{'x'.join(map(str, shape))} {layout} SiLU": (shape, layout, "silu")
            for shape in ((8, 320, 64, 64), (8, 64, 56, 56))
            for layout in ("NCHW", "NHWC")
        },
    ),
    "averaging": Op(
        averaging,
        {
            "100M, 4 averages": ([(4096, 1024)] * 24, 4),
            "100M": ([(4096, 1024)] * 24, 1),
            "1000x64": ([(64,)] * 1000, 1),
            "resnet50": (resnet50(), 1),
        },
    ),
    "max_norm": Op(
        max_norm,
        {"50257x4096": [(50257, 4096)], "8142x2048": [(8142, 2048)], "resnet50": RESNET50, "1000x2048": [(1000, 2048)]},
        registry="max_norm_",
    ),
    "l1_ball": Op(balls, {"8142x2048": [(8142, 2048)]}, registry="project_lp_ball_"),
    "lp_penalty": Op(lp_penalty, {"100M l2": (2, [(4096, 1024)] * 24), "1000x64 l2": (2, [(64,)] * 1000)}),
    "fgm": Op(fgm, {"30522x768 dense": (30522, 768, 1.0), "2000x128 dense": (2000, 128, 1.0)}, registry="FGM"),
    "drop_path": Op(
        drop_path,
        {
            "256x197x768 + residual": ((256, 197, 768), True),
            "64x256x14x14 + residual": ((64, 256, 14, 14), True),
            "8x32x7x7": ((8, 32, 7, 7), False),
        },
    ),
    "soft_threshold": Op(soft_threshold, {"256x64x56x56": (256, 64, 56, 56), "64x512x7x7": (64, 512, 7, 7)}),
}
SANITIZERS = ("memcheck", "racecheck")
GPU_BACKENDS = ("cuda", "triton")


# ---- stages ----------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One command with its time limit; what it printed goes to the log, its last lines to the report."""

    name: str
    limit: float
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    tail: int = 8
    outcome: str = "not run"
    seconds: float = 0.0
    output: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("ok", "not run") and not self.outcome.startswith("left out")

    def run(self, log: Path, deadline: float) -> None:
        limit = min(self.limit, deadline - time.monotonic())
        if limit < 1:
            self.outcome = "left out: no time left"
            return
        started = time.monotonic()
        with log.open("a+") as file:
            file.write(f"\n==== {self.name}: {' '.join(self.command)}\n")
            file.flush()
            begin = file.tell()
            try:
                process = subprocess.Popen(
                    self.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}, start_new_session=True,
                )  # fmt: skip
                code = process.wait(limit)
                self.outcome = "ok" if code == 0 else f"failed with exit status {code}"
            except FileNotFoundError as error:
                self.outcome = f"left out: {error.filename} is not installed"
            except subprocess.TimeoutExpired:
                stop(process)
                self.outcome = f"stopped after {limit:.0f} s"
            self.seconds = time.monotonic() - started
        with log.open(errors="replace") as file:
            file.seek(begin)
            self.output = file.read()
        print(f"{self.name}: {self.outcome} ({self.seconds:.0f} s)", flush=True)


def stop(process: subprocess.Popen) -> None:
    """Ends a process and all that it started; asked first, pytest still says what failed so far."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(8)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def this(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", *arguments]


def stages(dry: bool, scratch: Path) -> list[Stage]:
    python = sys.executable
    found = [Stage("machine", 15, ["nvidia-smi"] if not dry else [python, "--version"], tail=0)]
    if not dry:
        major, minor = torch.cuda.get_device_capability()
        build = {
            "FASTREG_BUILD_CPU": "1",
            "FASTREG_BUILD_CUDA": "1",
            # Only this GPU's architecture: the others would cost the time that the measurements need.
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}"),
        }
        found.append(Stage("build", 210, [python, "setup.py", "build_ext", "--inplace"], build, tail=1))
    found.append(Stage("backends", 30, [python, "-m", "fastreg"], tail=100))
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    # A kernel that never ends: its worker does, which names the test, and the others go on.
    tests += ["-o", f"faulthandler_timeout={HANGS}", "-o", "faulthandler_exit_on_timeout=true"]
    if importlib.util.find_spec("xdist"):
        # An op's kernels are compiled once, where one worker has all of its tests.
        tests += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "loadgroup"]
    if dry:
        tests.append("--collect-only")
    # First a little of everything; last what waits for Triton's compiler, of which there may be too much for the time.
    every_op, others = "tests/test_gpu.py", ["--ignore", "tests/test_gpu.py"]
    found.append(Stage("tests of every op", 90, [*tests, every_op], tail=12))
    found.append(Stage("tests of cuda", 80, [*tests, *others, "-k", "not triton"], tail=12))
    found.append(Stage("tests of triton", 110, [*tests, *others, "-k", "triton"], tail=12))
    device = "cpu" if dry else "cuda"
    cases = [(op, [""] if dry else list(checked.cases)) for op, checked in OPS.items()]
    for turn in range(max(len(of_op) for _, of_op in cases)):  # every op's most telling case first
        for op, case in [(op, of_op[turn]) for op, of_op in cases if turn < len(of_op)]:
            # A process per case: an illegal access costs the process its GPU, and should cost one case only.
            command = this("--time", op, "--case", case, "--device", device, "--out", str(scratch))
            found.append(Stage(f"timing {op} {case}".strip(), 60, command, tail=0))
    for backend in ("reference",) if dry else GPU_BACKENDS:  # there may not be time for all: every op comes first
        for tool in SANITIZERS:
            for op, checked in OPS.items():
                if not dry and backend not in _backends._kernels[checked.registry or op]:
                    continue  # it has no such kernel
                wrapper = [] if dry else [compute_sanitizer(), "--tool", tool, "--error-exitcode", "9"]
                # Every tensor its own allocation, so that memcheck sees where it ends.
                environment = {"FASTREG_BACKEND": backend, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                command = [*wrapper, *this("--small", op, "--device", device)]
                found.append(Stage(f"{tool} {op} {backend}", 60, command, environment, tail=3))
    return found


def compute_sanitizer() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), "compute-sanitizer")


def time_case(op: str, case: str, device: str, out: Path) -> None:
    """Times one case in all dtypes into <op>.csv; on the CPU, the op's smallest."""
    from . import __main__ as driver

    bench = driver.benches()[op]
    if device == "cuda":
        bench.cases = dict(OPS[op].cases)
    driver.benches = lambda: {op: bench}
    case = case or bench.quick[0]
    for dtype in bench.dtypes:
        arguments = ["--op", op, "--case", case, "--dtype", str(dtype).removeprefix("torch."), "--device", device]
        driver.main([*arguments, "--out", str(out), *([] if device == "cuda" else ["--quick"])])


# ---- the report ------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def timing_tables(rows: list[dict[str, str]]) -> list[str]:
    """Per op: a line per case, dtype and mode with the median time of each provider in microseconds."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        here = [row for row in rows if row["op"] == op and row["median_us"]]
        providers = list(dict.fromkeys(row["provider"] for row in here))
        body = []
        for key in dict.fromkeys((row["case"], row["dtype"], row["mode"]) for row in here):
            of = {row["provider"]: row for row in here if (row["case"], row["dtype"], row["mode"]) == key}
            ours = [row for name, row in of.items() if name.startswith("fastreg") and row["speedup"]]
            best = max(ours, key=lambda row: float(row["speedup"]), default=None)
            body.append(
                [*key, *(f"{float(of[name]['median_us']):.1f}" if name in of else "–" for name in providers)]
                + ([best["copy_share"], best["host_us"], best["speedup"], best["fastest_peer"]] if best else ["–"] * 4)
            )
        header = ["case", "dtype", "mode", *providers, "share of copy", "host µs", "speed-up", "over"]
        lines += [f"### {op}: median µs", "", *table(header, body), ""]
        left_out = dict.fromkeys(f"{row['provider']}: {row['note']}" for row in rows if row["op"] == op and row["note"])
        lines += [f"- left out: {text}" for text in left_out]
        copies = [row for row in rows if row["op"] == op and row["provider"] == "copy"]
        lines += [f"- copy, {row['case']} {row['dtype']}: {row['gb_per_s']} GB/s" for row in copies] + [""]
    return lines


def write_report(out: Path, done: list[Stage], rows: list[dict[str, str]], started: float) -> None:
    from . import report

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (dry run)"
    lines = [f"# GPU check: {device}", "", f"{report.versions()}, commit {report.commit() or 'unknown'}", ""]
    lines += table(
        ["stage", "outcome", "seconds"], [[stage.name, stage.outcome, f"{stage.seconds:.0f}"] for stage in done]
    )
    lines += ["", f"{time.monotonic() - started:.0f} s in all; everything that was printed is in log.txt.", ""]
    if rows:
        lines += ["## Times", "", "`share of copy`, `host µs`, `speed-up` are those of fastreg's fastest backend.", ""]
        lines += timing_tables(rows)
    for stage in done:
        count = 40 if stage.failed else stage.tail
        text = stage.output.strip().splitlines()[-count:] if count else []
        if text:
            lines += [f"## {stage.name}", "", "```", *text, "```", ""]
    (out / "report.md").write_text("\n".join(lines))


def collect(scratch: Path, out: Path) -> list[dict[str, str]]:
    from . import report

    rows = [row for path in sorted(scratch.glob("*.csv")) for row in report.load(path)]
    if rows:
        report.save(out / "results.csv", rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check"))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="the same motions on the CPU")
    parser.add_argument("--only", nargs="+", help="only stages whose name contains one of these")
    parser.add_argument("--time", choices=OPS, help=argparse.SUPPRESS)  # these four are what the stages run
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    parser.add_argument("--small", choices=OPS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.time:
        time_case(options.time, options.case, options.device, options.out)
        return 0
    if options.small:
        for ours, _ in OPS[options.small].calls(options.device):
            ours()
        if options.device == "cuda":
            torch.cuda.synchronize()
        return 0
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here; --dry-run goes through the motions on the CPU")
        return 2

    started = time.monotonic()
    deadline = started + options.budget
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        todo = stages(options.dry_run, scratch)
        if options.only:
            todo = [stage for stage in todo if any(text in stage.name for text in options.only)]
        for count, stage in enumerate(todo, 1):
            stage.run(out / "log.txt", deadline)
            write_report(out, todo[:count], collect(scratch, out), started)  # now, in case the next one is the last
    print(f"{out / 'report.md'}")
    return 1 if any(stage.failed for stage in todo) else 0


if __name__ == "__main__":
    sys.exit(main())
