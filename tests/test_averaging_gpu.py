"""The averaging kernels for the GPU, without one: bytes, launches, races, stray accesses, spills, widths."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import fastreg
from fastreg import EMA, SWA, PowerEMA, TanhEMA, WeightAverager, average_, averaging
from tests.machine import needs_cuda, needs_cudahost, needs_interpreter, needs_nvcc, needs_ptxas
from tests.proving import cubin, cudahost

RULES = {"ema": EMA(0.9), "swa": SWA(), "tanh": TanhEMA(), "power": PowerEMA(0.1)}


def model(sizes, dtype=torch.float32):
    return nn.ParameterList([nn.Parameter(torch.randn(n).to(dtype)) for n in sizes])


def bytes_of(net, averager):
    """Parameters once, every average in and out, whatever is copied only out."""
    sources = dict((*net.named_parameters(), *net.named_buffers()))
    moved = sum(t.nbytes for t in sources.values())
    for named in averager._averages.values():
        moved += sum(t.nbytes * (2 if name in averager._follows else 1) for name, t in named.items())
    return moved


def table_bytes(launch_count, columns):
    """What the table and the counters cost a chunk at most."""
    return launch_count * (8 * columns * 8 + 256)


@needs_interpreter
@pytest.mark.parametrize("dtype, average_dtype", [(torch.float32, None), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_traffic_is_the_parameters_once_and_the_averages_twice(dtype, average_dtype, k):
    from tests.proving.traffic import traffic

    net = model([3 * 4096, 1, 1001, 64], dtype)
    net.register_buffer("count", torch.tensor(3))
    with fastreg.use_backend("triton"):
        averager = WeightAverager(net, dict(list(RULES.items())[:k]), dtype=average_dtype)
        averager.update()
        with traffic() as log:
            averager.update()
    assert len(log) == 1
    exact = bytes_of(net, averager)
    overhead = log[0].moved - exact
    chunks = len(averager._link._parts[0].plan.chunks)
    assert 0 < overhead <= table_bytes(chunks, 3 + k)
    link = averager._link
    for i, (source, copied) in enumerate(zip(link.sources, link.copied)):
        count = source.element_size() if copied else 1  # what is copied moves byte by byte
        assert (log[0].reads(source) == count).all() and (log[0].writes(source) == 0).all()
        for column in link.averages:
            assert (log[0].reads(column[i]) == (0 if copied else 1)).all()
            assert (log[0].writes(column[i]) == count).all()


@needs_interpreter
def test_one_launch_for_a_thousand_tensors_and_four_averages():
    from tests.proving.traffic import traffic

    with fastreg.use_backend("triton"):
        averager = WeightAverager(model([1] * 1000), RULES)
        with traffic() as log:
            averager.update()
        assert len(log) == 1
        with traffic() as log, averager.swapped("swa"):
            assert len(log) == 1
        assert len(log) == 2


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
        torch.cuda.set_sync_debug_mode("error")
        try:
            for n in range(1, 20):
                with torch.no_grad():
                    for p in net:
                        p.normal_()
                graph.replay()
                count = torch.full((), n, dtype=torch.float64)
                for name, rule in RULES.items():
                    w = float(rule.weight(count))
                    exact[name] = [e + w * (p.detach().double() - e) for e, p in zip(exact[name], net)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert averager.n_averaged.item() == 20
    for name, tensors in exact.items():
        for ours, e in zip(averager.state_dict()["averages"][name].values(), tensors):
            torch.testing.assert_close(ours.double(), e, rtol=1e-5, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_updates_and_swaps_do_not_sync(backend):
    net = model([3000, 7]).cuda()
    with fastreg.use_backend(backend):
        averager = WeightAverager(net, RULES)
        averager.update()
        with averager.swapped("ema"):
            pass
        torch.cuda.set_sync_debug_mode("error")
        try:
            averager.update(found_inf=torch.zeros((), device="cuda"))
            with averager.swapped("ema"):
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
