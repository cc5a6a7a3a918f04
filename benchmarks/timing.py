"""How the benchmarks measure.

All providers of a case are timed in one process, interleaved: each round takes one sample of every provider and mode,
in an order that rotates from round to round, so that a slow spell of the machine falls on everybody. A sample is as
many calls as fill a millisecond. Reported are the median and the 20 % and 80 % quantiles over the rounds; the speed-up
over the fastest peer is the median over the rounds of the ratio of the two samples of that round.

A plain copy of a buffer as large as the case's largest input is timed in the same rounds. A provider's share of the
copy bandwidth is (least bytes of the mode / its time) / (bytes of the copy / its time), each at its median.

CPU: with the number of threads fixed, and caches as the previous sample left them. One thread is timed by the
processor time of the process, which is the wall clock's less the time in which something else ran. Several threads
are timed by the wall clock, and there any other busy process means that a barrier waits for a whole scheduler quantum:
/proc/stat is read to see how many processors others kept busy during a case, and where those and our threads are more
than there are, the numbers are marked as contended.
CUDA: the calls are replayed from a CUDA graph where they can be captured, events around each replay, and the L2 cache
is overwritten before it. Host time is that of the call itself, from an empty queue until it returns.
"""

import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastreg

SAMPLE_SECONDS = 1e-3


class LeftOut(Exception):
    """Raised by a provider that cannot take part in a case; its text says why."""


@dataclass
class Run:
    """A call to time. `before` runs ahead of each timed call, untimed."""

    call: Callable[[], object]
    before: Callable[[], object] | None = None
    context: AbstractContextManager = field(default_factory=nullcontext)


def largest_input(data: object) -> int:
    """Bytes of the largest input; a list of tensors counts as one."""
    groups = [value if isinstance(value, list | tuple) else [value] for value in vars(data).values()]
    return max(1, *(nbytes(*(part for part in group if isinstance(part, Tensor))) for group in groups))


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def differentiable(call: Callable[[], Tensor], *leaves: Tensor) -> dict[str, Run]:
    """forward, backward and both of a call, with respect to `leaves`. A scalar result gets the gradient 1, any other
    a fixed random one."""
    grad: list[Tensor | None] = [None]
    kept: list[Tensor] = []

    def gradients(out: Tensor, retain: bool) -> tuple[Tensor, ...]:
        if grad[0] is None:
            # An expanded scalar would be a layout that no real network hands back.
            grad[0] = torch.ones_like(out)
            if out.dim():  # the same values for every provider, whose results are compared
                generator = torch.Generator(out.device).manual_seed(0)
                grad[0].copy_(torch.randn(out.shape, generator=generator, device=out.device))
        return torch.autograd.grad(out, leaves, grad[0], retain_graph=retain)

    def backward() -> tuple[Tensor, ...]:
        if not kept:
            kept.append(call())
        return gradients(kept[0], True)

    def both() -> tuple[Tensor, ...]:
        out = call()
        return out.detach(), *gradients(out, False)

    return {"forward": Run(call), "backward": Run(backward), "both": Run(both)}


@dataclass
class Provider:
    name: str
    make: Callable[[object], Mapping[str, Run]]
    backend: str | None = None  # of ours, or "auto"
    needs: str | None = None
    devices: tuple[str, ...] | None = None
    compiled: bool = False

    def build(self, op: str, data: object, device: str, quick: bool) -> dict[str, Run]:
        if self.devices and device not in self.devices:
            raise LeftOut(f"runs on {' and '.join(self.devices)} only")
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise LeftOut(f"{self.needs} is not installed")
        if self.compiled:
            if quick:
                raise LeftOut("--quick leaves the compile time out")
            torch._dynamo.reset()
            # The backward alone is timed again and again from one forward.
            torch._functorch.config.donated_buffer = False
        if self.backend in (None, "auto"):
            return {mode: as_run(run) for mode, run in self.make(data).items()}
        reason = fastreg.backends()[op][self.backend]
        if reason != "usable":
            raise LeftOut(reason)
        with fastreg.use_backend(self.backend):
            runs = {mode: as_run(run) for mode, run in self.make(data).items()}
        for run in runs.values():
            run.context = forced(self.backend)
        return runs


def as_run(run: Run | Callable[[], object]) -> Run:
    return run if isinstance(run, Run) else Run(run)


class forced(AbstractContextManager):
    """`fastreg.use_backend`, but it can be entered again and again."""

    def __init__(self, backend: str):
        self.backend = backend

    def __enter__(self):
        self.inner = fastreg.use_backend(self.backend)
        self.inner.__enter__()

    def __exit__(self, *error):
        return self.inner.__exit__(*error)


class Bench:
    """The declaration of one op's benchmark: see the package's docstring."""

    def __init__(
        self,
        op: str,
        cases: Mapping[str, object],
        *,
        dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
        quick: Iterable[str] = (),
        registry: str | None = None,
        compare: bool = True,
    ):
        """`op` names the results' files; `registry` is the op's name in `fastreg.backends()` where that differs. What
        is not there is plain PyTorch: nothing of ours can be forced.
        `quick` names the cases that --quick keeps (default: the first). `compare=False` where peers may differ."""
        self.op, self.cases, self.dtypes, self.compare = op, dict(cases), tuple(dtypes), compare
        self.quick = tuple(quick) or tuple(self.cases)[:1]
        self.registry = registry or op
        self.peers: list[Provider] = []

    def inputs(self, make: Callable) -> Callable:
        self._inputs = make
        return make

    def bytes(self, count: Callable) -> Callable:
        self._bytes = count
        return count

    def ours(self, make: Callable) -> Callable:
        self._ours = make
        return make

    def peer(
        self, name: str, *, needs: str | None = None, devices: tuple[str, ...] | None = None, compiled: bool = False
    ) -> Callable:
        """`needs`: a module that must be installed. `compiled`: the first calls take torch.compile's time."""

        def add(make: Callable) -> Callable:
            self.peers.append(Provider(name, make, needs=needs, devices=devices, compiled=compiled))
            return make

        return add

    def providers(self) -> list[Provider]:
        backends = sorted(fastreg.backends().get(self.registry, ()), key="reference".__eq__)  # that one last
        forced = [Provider(f"fastreg {name}", self._ours, name) for name in backends]
        # What a user gets who forces no backend, which for a tiny call may be another than the kernels.
        return [Provider("fastreg", self._ours, "auto"), *forced, *self.peers]

    def least_bytes(self, data: object) -> dict[str, int]:
        counts = dict(self._bytes(data))
        if "forward" in counts and "backward" in counts:
            counts.setdefault("both", counts["forward"] + counts["backward"])
        return counts


@dataclass
class Measured:
    """The samples, in seconds per call, of one provider and mode."""

    provider: str
    ours: bool
    mode: str
    seconds: list[float]
    host_seconds: float
    peak_bytes: int
    timer: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[round(share * (len(ordered) - 1))]


@dataclass
class CaseResult:
    measured: list[Measured]
    left_out: dict[str, str]
    least_bytes: dict[str, int]
    copy_bandwidth: float  # bytes per second
    other_cpu: float  # processors that other processes kept busy meanwhile
    contended: bool


def measure_case(bench: Bench, case: str, dtype: torch.dtype, device: str, *, quick: bool = False) -> CaseResult:
    """Times every provider of one case, interleaved."""
    torch.manual_seed(0)
    data = bench._inputs(bench.cases[case], dtype, torch.device(device))
    timer = CudaTimer() if device == "cuda" else CpuTimer()
    tasks: list[tuple[Measured, Run]] = []
    left_out: dict[str, str] = {}
    expected = None
    for provider in sorted(bench.providers(), key=lambda provider: provider.backend is not None):
        try:
            runs = provider.build(bench.registry, data, device, quick)
            for run in runs.values():
                with run.context:
                    timer.warm(run)
            if bench.compare and "both" in runs:
                with runs["both"].context:
                    result = runs["both"].call()
                expected = check(result, expected, dtype)
        except LeftOut as reason:
            left_out[provider.name] = str(reason)
            continue
        except Exception as error:  # A peer that breaks on a case must not end the run.
            left_out[provider.name] = (
                f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        for mode, run in runs.items():
            with run.context:
                host, peak = timer.host_seconds(run), timer.peak_bytes(run)
            kind, run = timer.prepare(run)
            tasks.append(
                (Measured(provider.name, provider.name.startswith("fastreg"), mode, [], host, peak, kind), run)
            )
    counts = bench.least_bytes(data)
    size = largest_input(data)
    source, sink = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = Measured("copy", False, "copy", [], 0.0, 0, timer.kind)
    tasks.append((copy, Run(lambda: sink.copy_(source))))
    with other_load() as load:
        interleave(tasks, timer, budget=0.4 if quick else 4.0, least=3 if quick else 7)
    measured = [task for task, _ in tasks if task is not copy]
    measured.sort(key=lambda task: not task.ours)
    contended = torch.get_num_threads() + load.busy > os.cpu_count() * 1.05
    return CaseResult(measured, left_out, counts, 2 * size / copy.median, load.busy, contended)


def interleave(tasks: list[tuple[Measured, Run]], timer: "CpuTimer", budget: float, least: int) -> None:
    counts = []
    for _, run in tasks:
        with run.context:
            timer.sample(run, 1)
            counts.append(max(1, int(SAMPLE_SECONDS / max(timer.sample(run, 2), 1e-9))))
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for round_number in range(1000):
            for index in range(len(tasks)):
                measured, run = tasks[(index + round_number) % len(tasks)]
                with run.context:
                    measured.seconds.append(timer.sample(run, counts[(index + round_number) % len(tasks)]))
            if round_number + 1 >= least and time.perf_counter() - started > budget:
                break
    finally:
        gc.enable()


def check(result: object, expected: list[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """Every provider computes the same thing, or it is left out. Loose: the tests hold the accuracy, this only
    finds a benchmark that compares different things."""
    tensors = [part.detach().float() for part in (result if isinstance(result, tuple) else (result,))]
    if expected is None:
        return tensors
    bound = {torch.float64: 1e-5, torch.float32: 1e-3}.get(dtype, 4e-2)
    for got, want in zip(tensors, expected, strict=True):
        error = (got - want).abs().max().item() if got.numel() else 0.0
        if not error <= bound * max(want.abs().max().item(), 1e-30):
            raise LeftOut(f"its result differs from the first peer's by {error:.3g}")
    return expected


@contextmanager
def silenced_stderr():
    """Some builds of torch's profiler report every start and stop there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


class CpuTimer:
    def __init__(self):
        alone = torch.get_num_threads() == 1
        self.clock = time.process_time if alone else time.perf_counter
        self.kind = "processor time" if alone else "wall clock"

    def warm(self, run: Run) -> None:
        started = time.perf_counter()
        for count in range(1000):
            if run.before:
                run.before()
            run.call()
            if count >= 2 and time.perf_counter() - started > 0.02:
                break

    def sample(self, run: Run, calls: int) -> float:
        """Seconds per call over `calls` calls."""
        call, before, clock = run.call, run.before, self.clock
        if before is None:
            started = clock()
            for _ in range(calls):
                call()
            return (clock() - started) / calls
        total = 0.0
        for _ in range(calls):
            before()
            started = clock()
            call()
            total += clock() - started
        return total / calls

    def prepare(self, run: Run) -> tuple[str, Run]:
        return self.kind, run

    def host_seconds(self, run: Run) -> float:
        return 0.0  # A call on the CPU returns when it is done: the time is the host time.

    def peak_bytes(self, run: Run) -> int:
        """Most bytes that the call held at one time beyond what was there before, from the allocator's own log."""
        if run.before:
            run.before()
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with silenced_stderr(), profiler as profile:
            run.call()
        held = peak = 0
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak


class CudaTimer:
    kind = "cuda graph"

    def __init__(self):
        # Larger than any L2 cache; writing it also keeps the device busy while the host enqueues the next call.
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        # A backward runs on its forward's stream, and only a side stream can be captured.
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # the inputs are made on another stream
        torch.cuda.set_stream(self.stream)

    def warm(self, run: Run) -> None:
        CpuTimer().warm(run)
        torch.cuda.synchronize()

    def prepare(self, run: Run) -> tuple[str, Run]:
        try:
            graph = torch.cuda.CUDAGraph()
            with run.context, torch.cuda.graph(graph, stream=self.stream):
                run.call()
        except Exception:
            torch.cuda.synchronize()
            return "cuda events", run
        return self.kind, Run(graph.replay, run.before)

    def sample(self, run: Run, calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in pairs:
            if run.before:
                run.before()
            self.flush.zero_()
            start.record()
            run.call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e-3

    def host_seconds(self, run: Run) -> float:
        taken = []
        for _ in range(20):
            if run.before:
                run.before()
            torch.cuda.synchronize()
            started = time.perf_counter()
            run.call()
            taken.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        return statistics.median(taken)

    def peak_bytes(self, run: Run) -> int:
        if run.before:
            run.before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Load:
    busy: float = 0.0


@contextmanager
def other_load():
    """Measures how many processors other processes kept busy, or the hypervisor took, during the block."""
    load = Load()
    before = cpu_seconds()
    yield load
    after = cpu_seconds()
    if before and after:
        elapsed, busy, own = (late - early for late, early in zip(after, before))
        load.busy = max(0.0, busy - own) / max(elapsed, 1e-9)


def cpu_seconds() -> tuple[float, float, float] | None:
    """(now, all processors' busy time, this process's), in seconds; None where the system does not say."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:2])


def ratio(ours: Measured, peer: Measured) -> float:
    """How many times faster `ours` is: the median over the rounds."""
    return statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, peer.seconds))


def fastest_peers(result: CaseResult) -> dict[str, Measured]:
    """By mode."""
    best: dict[str, Measured] = {}
    for measured in result.measured:
        if not measured.ours and (measured.mode not in best or measured.median < best[measured.mode].median):
            best[measured.mode] = measured
    return best
