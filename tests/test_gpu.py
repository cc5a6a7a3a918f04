"""What holds for every op on a CUDA device, whatever it computes. `benchmarks.gpu_check.OPS` lists the calls."""

import subprocess
import sys

import pytest
import torch

import fastreg
from benchmarks.gpu_check import GPU_BACKENDS, OPS, agree
from fastreg import _backends
from tests.machine import needs_cuda, no_sync

pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def skip_what_is_missing(op, backend):
    if (reason := _backends.missing(OPS[op].registry or op, backend)) is not None:
        pytest.skip(reason)


every_kernel = pytest.mark.parametrize(
    ("op", "backend"),
    [pytest.param(o, b, marks=pytest.mark.xdist_group(f"{o} {b}")) for o in OPS for b in GPU_BACKENDS],
)


def copies(tensors):
    """What a call in place returns is what the next one writes."""
    return [tensor.clone() for tensor in tensors]


@every_kernel
def test_agrees_with_plain_pytorch(op, backend):
    for ours, stock in OPS[op].calls("cuda"):
        with fastreg.use_backend(backend):
            got = ours()
        agree(got, stock())


@every_kernel
def test_same_input_same_bits(op, backend):
    for ours, _ in OPS[op].calls("cuda"):
        with fastreg.use_backend(backend):
            first, second = copies(ours()), ours()
        for a, b in zip(first, second):
            assert torch.equal(a, b)


@every_kernel
def test_never_waits_for_the_device(op, backend):
    for ours, _ in OPS[op].calls("cuda"):
        with fastreg.use_backend(backend):
            ours()  # compiles
            with no_sync():
                ours()


@every_kernel
def test_runs_on_the_current_stream(op, backend):
    """The inputs are made on a side stream that is busy: a kernel on any other stream would not see them."""
    for ours, _ in OPS[op].calls("cuda"):
        with fastreg.use_backend(backend):
            ours()  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        results = []
        for ours, stock in OPS[op].calls("cuda"):
            with fastreg.use_backend(backend):
                results.append((ours(), stock()))
    stream.synchronize()
    for got, want in results:
        agree(got, want)


@every_kernel
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors(op, backend):
    """Which need not be the current one."""
    for ours, stock in OPS[op].calls("cuda:1"):
        with fastreg.use_backend(backend):
            got = ours()
        assert all(tensor.get_device() == 1 for tensor in got)
        agree(got, stock())


@every_kernel
def test_can_be_captured_in_a_graph(op, backend):
    for ours, _ in OPS[op].calls("cuda"):
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # what the calls read is made on another stream
        with torch.cuda.stream(stream), fastreg.use_backend(backend):
            want = copies(ours())
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                got = ours()
        for tensor in got:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@every_kernel
def test_can_be_captured_in_a_graph_before_it_ever_ran_and_run_outside_then(op, backend):
    """On these tensors, that is: kernels are compiled, but tables of addresses are made in the graph."""
    for (compiles, _), (ours, stock) in zip(OPS[op].calls("cuda"), OPS[op].calls("cuda"), strict=True):
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # what the calls read is made on another stream
        with torch.cuda.stream(stream), fastreg.use_backend(backend):
            compiles()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                got = ours()
            outside = copies(ours())
        stream.synchronize()
        want = copies(stock())
        agree(outside, want)
        graph.replay()
        agree(got, want)


@pytest.mark.parametrize("op", ["cross_entropy"])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_target_out_of_range_is_an_assertion(op, backend):
    """In a process of its own, which has no use of the GPU afterwards."""
    program = (
        "import sys, torch, fastreg; x, y = torch.randn(4, 10, device='cuda'), torch.arange(4, device='cuda') + 7\n"
        "with fastreg.use_backend(sys.argv[1]): fastreg.cross_entropy(x, y)\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program, backend], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr
