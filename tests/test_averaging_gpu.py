"""The averaging kernels for the GPU, without one: bytes, launches, races, stray accesses, spills, widths."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import fastreg
from fastreg import EMA, SWA, AveragedModel, PowerEMA, TanhEMA, WeightAverager, average_, averaging
from tests.machine import (
    needs_cpu_kernels,
    needs_cuda,
    needs_cudahost,
    needs_interpreter,
    needs_nvcc,
    needs_ptxas,
    no_sync,
)
from tests.proving import cubin, cudahost

RULES = {"ema": EMA(0.9), "swa": SWA(), "tanh": TanhEMA(), "power": PowerEMA(0.1)}


def model(sizes, dtype=torch.float32):
    return nn.ParameterList([nn.Parameter(torch.randn(n).to(dtype)) for n in sizes])


def resnet50(width):
    """ResNet-50's 161 parameters and 159 buffers; `width` is 64 in the original."""
    layers, channels = [nn.Conv2d(3, width, 7, bias=False), nn.BatchNorm2d(width)], width
    for narrow, blocks in ((width, 3), (2 * width, 4), (4 * width, 6), (8 * width, 3)):
        for block in range(blocks):
            for out, into, kernel in ((narrow, channels, 1), (narrow, narrow, 3), (4 * narrow, narrow, 1)):
                layers += [nn.Conv2d(into, out, kernel, bias=False), nn.BatchNorm2d(out)]
            if block == 0:
                layers += [nn.Conv2d(channels, 4 * narrow, 1, bias=False), nn.BatchNorm2d(4 * narrow)]
            channels = 4 * narrow
    return nn.ModuleList([*layers, nn.Linear(channels, 1000 * width // 64)])


def assert_exact_traffic(launch, link, tables):
    """Every parameter read once, every average read and written once, what is copied read once and written once, and
    nothing else but the tables and counters that tell the kernel so."""
    moved = launch.moved - sum(int((launch.reads(t).sum() + launch.writes(t).sum()) * t.element_size()) for t in tables)
    exact = 0
    for i, (source, copied) in enumerate(zip(link.sources, link.copied)):
        exact += source.nbytes + sum(column[i].nbytes * (1 if copied else 2) for column in link.averages)
        if len(link.sources) < 10 and not copied:
            assert (launch.reads(source) == 1).all() and (launch.writes(source) == 0).all()
            for column in link.averages:
                assert (launch.reads(column[i]) == 1).all() and (launch.writes(column[i]) == 1).all()
    assert moved == exact


MODELS = {
    "odd fp32": (lambda: model([3 * 4096, 1, 1001, 0, 64]), None),
    "odd bf16 to fp32": (lambda: model([3 * 4096, 1, 1001, 0, 64], torch.bfloat16), torch.float32),
    "resnet50": (lambda: resnet50(4), None),
    "1000 tensors": (lambda: model([3] * 1000), None),
}


THOUSAND = pytest.param("1000 tensors", 4, marks=pytest.mark.slow)
CALLS_OF_MODELS = pytest.mark.parametrize(
    ("name", "k"), [("odd fp32", 1), ("odd fp32", 4), ("odd bf16 to fp32", 2), ("resnet50", 4), THOUSAND]
)


@needs_interpreter
@CALLS_OF_MODELS
def test_triton_takes_one_launch_and_moves_no_byte_more_than_it_must(name, k):
    from tests.proving.traffic import traffic

    make, dtype = MODELS[name]
    net = make()
    net.register_buffer("count", torch.tensor([3, 4]))
    with fastreg.use_backend("triton"):
        averager = WeightAverager(net, dict(list(RULES.items())[:k]), dtype=dtype, buffers="average")
        averager._clock.n_averaged += 3
        with traffic() as log:
            averager.update()
    assert len(log) == 1
    (part,), clock = averager._link._parts, averager._clock
    tables = part.plan.table, part.plan.chunks, part.rules, part.ticket, clock.n_averaged, clock.calls
    assert_exact_traffic(log[0], averager._link, tables)


def as_moved(tensor):
    """Integers are copied as bytes, and counted so."""
    return tensor if tensor.is_floating_point() else tensor.reshape(-1).view(torch.uint8)


@needs_cudahost
@CALLS_OF_MODELS
def test_cuda_takes_one_launch_and_moves_no_byte_more_than_it_must(name, k):
    from tests.proving.traffic import traffic

    make, dtype = MODELS[name]
    net = make()
    net.register_buffer("count", torch.tensor([3, 4]))
    chosen = dict(list(RULES.items())[:k])
    link = WeightAverager(net, chosen, dtype=dtype, buffers="average")._current_link()
    (part,) = averaging._split(link.sources, link.averages, link.copied, torch.device("cpu"))
    rules = torch.tensor([rule._row() for rule in chosen.values()], dtype=torch.float64)
    counters = torch.tensor(3), torch.tensor(3), torch.zeros((), dtype=torch.int32)
    table, chunks = part.plan.table, part.plan.chunks
    with traffic() as log:
        cuda().average_update(
            table, chunks, len(chunks), part.plan.chunk, k, rules, *counters, None, 1, 0, False, 0,
            *map(as_moved, link.sources), *(as_moved(t) for column in link.averages for t in column),
        )  # fmt: skip
    assert len(log) == 1 and counters[0] == 4
    assert_exact_traffic(log[0], link, (table, chunks, rules, *counters))


@needs_interpreter
@pytest.mark.parametrize("name, launches", [("resnet50", 1), ("odd bf16 to fp32", 3)])
def test_swapping_takes_one_launch_or_three_where_dtypes_differ(name, launches):
    """Three: the model's own values aside, the average into the model, and what has one dtype swapped."""
    from tests.proving.traffic import traffic

    make, dtype = MODELS[name]
    net = make()
    net.register_buffer("count", torch.tensor([3, 4]))
    with fastreg.use_backend("triton"):
        averager = WeightAverager(net, {"ema": EMA(0.5)}, dtype=dtype)
        with traffic() as log, averager.swapped("ema"):
            assert len(log) == launches


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_stray_access_and_no_race_at_any_size_or_offset(dtype):
    from tests.proving.sanitizer import sanitize

    base, other = torch.randn(40000).to(dtype), torch.randn(40000).to(dtype)
    spans = [(0, 0), (1, 65), (66, 1090), (1100, 1101), (2048, 4096), (4099, 4099 + 8193), (20000, 40000)]
    averages, params = [base[a:b] for a, b in spans], [other[a:b] for a, b in spans]
    expected = [torch.lerp(a.double(), p.double(), 0.25).to(dtype) for a, p in zip(averages, params)]
    before = base.clone()
    with fastreg.use_backend("triton"), sanitize(also=[base, other]):
        average_(averages, params, 0.25)
    for a, e in zip(averages, expected):
        torch.testing.assert_close(a, e)
    for (_, end), (begin, _) in pairwise(spans):
        assert torch.equal(base[end:begin], before[end:begin])


def _launch(dtype, average_dtype, k, seed=None):
    net = nn.ParameterList([nn.Parameter(torch.empty(1 << 20, dtype=dtype))])
    averages = [[torch.empty(1 << 20, dtype=average_dtype)] for _ in range(k)]
    from tritonkernels import averaging as kernels

    rows = [averaging._row_of(net[0].detach(), [column[0] for column in averages], False)]
    plan = averaging._make_plan(rows, 3 + k, torch.device("cpu"))
    rules = torch.tensor([rule._row() for rule in list(RULES.values())[:k]], dtype=torch.float64)
    n, calls, ticket = torch.tensor(3), torch.tensor(3), torch.zeros((), dtype=torch.int32)
    kernels.average_update(
        plan.table, plan.chunks, plan.chunk, averaging._kinds(rows), rules, n, calls, ticket, None, 1, 0, seed
    )


def compile_fp32():
    _launch(torch.float32, torch.float32, 1)


def compile_bf16_to_fp32():
    _launch(torch.bfloat16, torch.float32, 4)


def compile_bf16():
    _launch(torch.bfloat16, torch.bfloat16, 2, seed=7)


CALLS = [f"tests.test_averaging_gpu:{call.__name__}" for call in (compile_fp32, compile_bf16_to_fp32, compile_bf16)]


@needs_ptxas
@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100, 120))])
def test_nothing_spills_and_accesses_are_wide(arch):
    for launches in cubin.launch_facts(*CALLS, architectures=(arch,)).values():
        for facts in launches:
            assert facts.spills == 0, facts
            assert facts.loads.get(128) and facts.stores.get(128), facts


# ---- CUDA on the host ------------------------------------------------------------------------------------
def cuda():
    return cudahost.load("csrc/cuda/averaging.cu", [f"fastreg::cuda::average_{n}" for n in ("update", "lerp", "swap")])


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def every_pair(k):
    """Parameters and k averages of every pair of dtypes, at aligned and other addresses, and an integer buffer."""
    params, averages = [], [[] for _ in range(k)]
    for dtype in FLOATS:
        for average_dtype in FLOATS:
            for size, offset in ((1, 0), (2500, 0), (700, 1)):
                params.append(torch.randn(size + offset).to(dtype)[offset:])
                for column in averages:
                    column.append(torch.randn(size + offset).to(average_dtype)[offset:])
    params.append(torch.tensor([3, 4, 5]))
    for column in averages:
        column.append(torch.zeros(3, dtype=torch.int64))
    return params, averages


@needs_cudahost
@pytest.mark.parametrize("seed", [None, 5])
def test_cuda_kernel_equals_the_reference_for_every_pair_of_dtypes(seed):
    kernels, k = cuda(), len(RULES)
    params, averages = every_pair(k)
    rows = [averaging._row_of(p, [c[i] for c in averages], p.dtype == torch.int64) for i, p in enumerate(params)]
    plan = averaging._make_plan(rows, 3 + k, torch.device("cpu"))
    rules = torch.tensor([rule._row() for rule in RULES.values()], dtype=torch.float64)
    n, calls, ticket = torch.tensor(0), torch.tensor(4), torch.zeros((), dtype=torch.int32)
    expected = [[a.clone() for a in column] for column in averages]
    arguments = (plan.table, plan.chunks, len(plan.chunks), plan.chunk, k, rules, n, calls, ticket)
    for found_inf in (0.0, 1.0, 0.0, 0.0, 0.0):
        link = _Fake(params, expected)
        clock = averaging._Clock(n.clone(), calls.clone(), 2, 4)
        averaging._update_reference(
            link, range(len(params)), list(RULES.values()), clock, torch.tensor(found_inf), seed
        )
        clock.advance(torch.tensor(found_inf))
        kernels.average_update(*arguments, torch.tensor(found_inf), 2, 4, seed is not None, seed or 0)
        assert (n, calls, ticket) == (clock.n_averaged, clock.calls, 0)
    assert n == 2
    for column, exact in zip(averages, expected):
        for ours, theirs in zip(column, exact):
            if seed is not None and ours.dtype in (torch.float16, torch.bfloat16):
                assert (ours != theirs).sum() <= ours.numel() / 50  # one rounding of fp32 may move the sixteen bits
            else:
                torch.testing.assert_close(ours, theirs)


class _Fake:
    """What `_update_reference` needs of a link."""

    def __init__(self, params, averages):
        self.sources, self.averages, self.copied = params, averages, [p.dtype == torch.int64 for p in params]


@needs_cudahost
def test_cuda_swap_and_lerp():
    kernels = cuda()
    ones, others = [torch.randn(n)[o:] for n, o in ((5, 0), (3000, 0), (99, 1))], None
    others = [torch.randn(t.numel() + 1)[1:] if i == 2 else torch.randn(t.shape) for i, t in enumerate(ones)]
    before = [t.clone() for t in ones], [t.clone() for t in others]
    plan = averaging._make_plan([averaging._row_of(a, [b], True) for a, b in zip(ones, others)], 4, torch.device("cpu"))
    kernels.average_swap(plan.table, plan.chunks, len(plan.chunks), plan.chunk)
    for now, then in zip((others, ones), before):
        assert all(torch.equal(a, b) for a, b in zip(now, then))
    rows = [averaging._row_of(a, [b], False) for a, b in zip(ones, others)]
    plan = averaging._make_plan(rows, 4, torch.device("cpu"))
    expected = [torch.lerp(b, a, 0.7) for a, b in zip(ones, others)]
    kernels.average_lerp(
        plan.table, plan.chunks, len(plan.chunks), plan.chunk, 0.0, torch.tensor(0.7, dtype=torch.float64)
    )
    for now, then in zip(others, expected):
        torch.testing.assert_close(now, then)


@needs_cudahost
def test_cuda_offsets_beyond_two_to_the_32_elements():
    """The first and the last chunk of a huge tensor, whose memory between them is never touched."""
    size = 2**32 + 5
    param, average = torch.empty(size, dtype=torch.float32), torch.empty(size, dtype=torch.bfloat16)
    for t, value in ((param, 4.0), (average, 2.0)):
        t[:3] = t[-3:] = value
    row = averaging._row_of(param, [average], False)
    plan = averaging._make_plan([row], 4, torch.device("cpu"))
    chunks = plan.chunks[[0, -1]].contiguous()
    assert chunks[-1].tolist() == [0, 2**32]
    rules = torch.tensor([EMA(0.5)._row()], dtype=torch.float64)
    counters = torch.tensor(3), torch.tensor(3), torch.zeros((), dtype=torch.int32)
    cuda().average_update(plan.table, chunks, 2, 8, 1, rules, *counters, None, 1, 0, False, 0)
    assert average[:3].tolist() == average[-3:].tolist() == [3.0] * 3
    cuda().average_lerp(plan.table, chunks, 2, 8, 0.5, None)
    assert average[:3].tolist() == average[-3:].tolist() == [3.5] * 3
    row = averaging._row_of(average, [param.view(torch.bfloat16)[:size]], True)
    plan = averaging._make_plan([row], 4, torch.device("cpu"))
    halves = param.view(torch.bfloat16)[size - 3 : size]
    halves[:] = 1.0
    last = plan.chunks[[-1]].contiguous()
    assert last[0, 1] > 2**32
    cuda().average_swap(plan.table, last, 1, plan.chunk)
    assert (average[-3:].tolist(), halves.tolist()) == ([1.0] * 3, [3.5] * 3)


def cuda_calls():
    """What the sanitizers watch."""
    for seed in (None, 5):
        test_cuda_kernel_equals_the_reference_for_every_pair_of_dtypes(seed)
    test_cuda_swap_and_lerp()


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_do_not_spill():
    for facts in cubin.nvcc_facts("csrc/cuda/averaging.cu"):
        assert facts.spills == 0, facts
        if "lerp" in facts.kernel or "update" in facts.kernel:
            assert facts.loads.get(128) and facts.stores.get(128), facts


# ---- on a GPU --------------------------------------------------------------------------------------------
@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_cuda_graph_replays_a_changing_decay_without_a_sync(backend):
    net = model([3000, 7]).cuda()
    with fastreg.use_backend(backend):
        averager = WeightAverager(net, RULES)
        averager.update()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            averager.update()
        exact = {name: [p.detach().double() for p in net] for name in RULES}
        with no_sync():
            for n in range(1, 20):
                with torch.no_grad():
                    for p in net:
                        p.normal_()
                graph.replay()
                count = torch.full((), n, dtype=torch.float64)
                for name, rule in RULES.items():
                    w = float(rule.weight(count))
                    exact[name] = [e + w * (p.detach().double() - e) for e, p in zip(exact[name], net)]
    assert averager.n_averaged.item() == 20
    for name, tensors in exact.items():
        for ours, e in zip(averager.state_dict()["averages"][name].values(), tensors):
            torch.testing.assert_close(ours.double(), e, rtol=1e-5, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_gets_one_launch_for_a_whole_model_and_four_averages(backend):
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    net = resnet50(16).cuda()
    with fastreg.use_backend(backend):
        averager = WeightAverager(net, RULES, buffers="average")
        averager.update()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            averager.update()
            torch.cuda.synchronize()
    assert len([event for event in profiled.events() if event.device_type == DeviceType.CUDA]) == 1


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_updates_and_swaps_do_not_sync(backend):
    net = model([3000, 7]).cuda()
    with fastreg.use_backend(backend):
        averager = WeightAverager(net, RULES)
        averager.update()
        with averager.swapped("ema"):
            pass
        with no_sync():
            averager.update(found_inf=torch.zeros((), device="cuda"))
            with averager.swapped("ema"):
                pass


@needs_cuda
def test_an_average_on_the_host_follows_a_model_on_the_gpu_without_a_sync():
    net = model([3000, 7, 1 << 20]).cuda()
    averaged, exact = AveragedModel(net, EMA(0.5), device="cpu"), None
    for n in range(5):
        with torch.no_grad():
            for p in net:
                p.normal_()
        now = [p.detach().double().cpu() for p in net]
        exact = now if n == 0 else [torch.lerp(e, p, 0.5) for e, p in zip(exact, now)]
        torch.cuda.synchronize()
        with no_sync():
            averaged.update_parameters(net, found_inf=torch.zeros((), device="cuda"))
            with torch.no_grad():
                for p in net:
                    p.fill_(float("nan"))  # the next step, which is not to reach the average
    assert averaged.n_averaged.item() == 5
    for ours, e in zip(averaged.module, exact):
        torch.testing.assert_close(ours.double(), e, rtol=1e-5, atol=1e-5)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_whichever_is_current():
    net = nn.Sequential(nn.Linear(9, 9).to("cuda:0"), nn.Linear(9, 9).to("cuda:1"))
    averager = WeightAverager(net, {"ema": EMA(0.5)})
    exact = None
    for n in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.normal_()
        now = [p.detach().double().cpu() for p in net.parameters()]
        exact = now if n == 0 else [torch.lerp(e, p, 0.5) for e, p in zip(exact, now)]
        with torch.cuda.device(n % 2):
            averager.update()
    with averager.swapped("ema"):
        for p, e in zip(net.parameters(), exact):
            torch.testing.assert_close(p.detach().double().cpu(), e, rtol=1e-5, atol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("warm", [True, False])
def test_the_tables_of_a_graph_are_not_used_outside_and_those_that_it_uses_stay(warm, monkeypatch):
    captured, launches = False, []
    run = averaging._update_op["cpu"]
    monkeypatch.setitem(averaging._update_op, "cpu", lambda *args: launches.append(args[0]) if captured else run(*args))
    monkeypatch.setattr(averaging._plan, "capturing", lambda device: captured)
    monkeypatch.setattr(averaging._plan, "_captured", [])
    net = model([5])
    with fastreg.use_backend("cpu"):
        averager = WeightAverager(net, {"ema": EMA(0.5)})
        if warm:
            averager.update()
        captured = True
        averager.update()
        captured = False
        averager.update()
    ((part,),) = averaging._plan._captured
    assert part.plan.table is launches[0]
    assert (averager._link._parts[0] is part) == warm
