"""The max-norm kernels for the GPU, without one: bytes, launches, races, stray accesses, spills, widths."""

from importlib import import_module

import pytest
import torch

import fastreg
from fastreg import _ops
from tests.machine import needs_cuda, needs_cudahost, needs_nvcc, no_sync
from tests.proving import cubin, cudahost

max_norm = import_module("fastreg.max_norm")  # the name in the package is the function


def max_norm_rows(table, chunks, chunk, caps, p, tau, decay, kind, behind=()):
    """The CUDA kernel on the host, called as the operator; `behind` are tensors at the table's addresses."""
    kernels = cudahost.load("csrc/cuda/max_norm.cu", ["fastreg::cuda::max_norm_rows"])
    count = torch.zeros((), dtype=torch.int64)
    kernels.max_norm_rows(table, chunks, len(chunks), caps, p, tau, decay, kind, count, *behind)
    return count


def project(tensors, cap, kind="cap", p=2.0, dim=0, tau=1.0, decay=0.0):
    values, places = max_norm._cap_values(max_norm._caps(tensors, cap, "cap", dim), torch.device("cpu"))
    plan = max_norm._build(tensors, dim, places)
    kind = _ops.ROW_KINDS.index(kind)
    return max_norm_rows(plan.table, plan.chunks, plan.chunk, values, p, tau, decay, kind, tensors)


# Rows that go to a warp and to a block, rows that do not fit on chip, and biases.
SHAPES = [(33, 50), (5, 300), (7, 3, 3, 3), (3, 2049), (9,), (2, 9001)]


@needs_cudahost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cuda_reads_once_and_writes_the_rows_over_the_cap_alone(dtype):
    from tests.proving.traffic import traffic

    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    rows = [w.flatten(1) if w.dim() > 1 else w[:, None] for w in tensors]
    norms = [w.double().norm(dim=1) for w in rows]
    caps = [n.median().item() for n in norms]
    before = [w.clone() for w in tensors]
    with traffic() as log:
        count = project(tensors, caps)
    assert len(log) == 1
    assert count.item() == sum(int((n > cap).sum()) for n, cap in zip(norms, caps))
    for old, new, cap, n in zip(before, tensors, caps, norms):
        over = (n > cap).reshape(-1, *[1] * (old.dim() - 1)).expand_as(old)
        held = new[0].numel() * new.element_size() <= 32 * 1024
        assert over.any() and torch.equal(new[~over], old[~over])
        assert torch.equal(log.writes(new), over.long())
        assert torch.equal(log.reads(new), 1 + over.long() * (not held))


@needs_cudahost
def test_cuda_accesses_are_wide_whatever_the_offset():
    from tests.proving.traffic import traffic

    for offset in (0, 1, 3):
        w = torch.randn(6 * 1001 + offset)[offset:].view(6, 1001)
        with traffic() as log:
            project([w], 1.0)
        assert log[0].writes(w).eq(1).all()
        # At most two vectors of a row, first and last, go by elements: 4 bytes at a time.
        wide = 6 * 1001 * 4 - log[0].stored
        assert wide == 0 and log[0].moved < 2.2 * w.nbytes


def cuda_calls():
    """What the sanitizers watch: every width of rows, kind and order, each with a rest."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        for p, kind in ((1.0, "cap"), (2.0, "cap"), (1.0, "l1_ball"), (float("inf"), "linf_ball"), (3.0, "normalize")):
            project([torch.randn(shape).to(dtype) for shape in SHAPES], 0.5, kind, p, decay=0.125)
    project([torch.randn(5, 7, 6, 2).transpose(1, 3)], torch.rand(6), dim=2, tau=1.5)


@needs_cudahost
@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "seed"), [("address", 0), ("thread", 0), ("thread", 1)])
def test_cuda_under_sanitizers(sanitizer, seed):
    assert cudahost.run_sanitized(sanitizer, "tests.test_max_norm_gpu:cuda_calls", seed=seed) == ""


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_do_not_spill():
    for facts in cubin.nvcc_facts("csrc/cuda/max_norm.cu"):
        assert facts.spills == 0, facts
        assert facts.loads.get(128) and facts.stores.get(128), facts


# ---- on a GPU --------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_projecting_does_not_sync(backend):
    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    with fastreg.use_backend(backend):
        constraint = fastreg.MaxNorm(tensors, 1.0)
        constraint.project()
        with no_sync():
            constraint.project()
