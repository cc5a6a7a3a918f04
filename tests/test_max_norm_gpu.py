"""The max-norm kernels for the GPU, without one: bytes, launches, races, stray accesses, spills, widths."""

import math
from importlib import import_module

import pytest
import torch

import fastreg
from fastreg import _ops, _plan
from tests.machine import gpu_kernels, needs_cuda, needs_cudahost, needs_nvcc, needs_ptxas, no_sync
from tests.proving import cubin, cudahost

max_norm = import_module("fastreg.max_norm")  # the name in the package is the function


LAUNCHERS = ("max_norm_rows", "max_norm_forward", "max_norm_backward", "row_norms", "row_norms_backward")


SHARED = 99 << 10  # bytes that a block may have, of sm_120; of others more


def kernels():
    return cudahost.load("csrc/cuda/max_norm.cu", [f"fastreg::cuda::{name}" for name in LAUNCHERS])


# The CUDA kernels on the host, called as the operators; `behind` are tensors at the table's addresses.
def max_norm_rows(table, chunks, traits, caps, p, tau, decay, decay_tensor, kind, behind=()):
    count, pieces = torch.zeros((), dtype=torch.int64), traits >> 20
    mends = kind == 0 and tau == 1 and traits & 7 != 0
    rest = decay, decay_tensor, kind, torch.empty(4 * pieces, dtype=torch.float64), count, SHARED
    vectors = traits >> 12 & 255
    kernels().max_norm_rows(table, chunks, len(chunks), pieces, vectors, mends, caps, p, tau, *rest, *behind)
    return count


def workspace(matrix):
    return torch.empty(4 * len(matrix) * (matrix.shape[1] // max_norm._PIECE + 1), dtype=torch.float64)


def max_norm_forward(input, caps, p, tau):
    output, norms = torch.empty_like(input), torch.empty(len(input), dtype=torch.float64)
    rest = caps, int(len(caps) > 1), norms, *input.shape, p, tau, workspace(input), SHARED
    kernels().max_norm_forward(_plan.DTYPE_CODES[input.dtype], input, output, *rest)
    return output, norms


def max_norm_backward(grad_output, input, caps, norms, p, tau):
    grad, slopes = torch.empty_like(input), torch.empty_like(norms)
    rest = caps, int(len(caps) > 1), norms, slopes, *input.shape, p, tau, workspace(input), SHARED
    kernels().max_norm_backward(_plan.DTYPE_CODES[input.dtype], grad_output, input, grad, *rest)
    return grad, slopes


def row_norms(input, p):
    norms = torch.empty(len(input), dtype=torch.float64)
    kernels().row_norms(_plan.DTYPE_CODES[input.dtype], input, norms, *input.shape, p, workspace(input), SHARED)
    return norms


def row_norms_backward(grad, input, norms, p):
    out = torch.empty_like(input)
    rest = norms, *input.shape, p, workspace(input), SHARED
    kernels().row_norms_backward(_plan.DTYPE_CODES[input.dtype], grad, input, out, *rest)
    return out


def put_on_host(monkeypatch):
    """The CUDA kernels in place of the C++ ones."""
    for attribute, kernel in (
        ("_kernels", max_norm_rows), ("_forward", max_norm_forward), ("_backward", max_norm_backward),
        ("_norms_forward", row_norms), ("_norms_backward", row_norms_backward),
    ):  # fmt: skip
        monkeypatch.setitem(getattr(max_norm, attribute), "cpu", kernel)


def project(tensors, cap, kind="cap", p=2.0, dim=0, tau=1.0, decay=0.0):
    values, places = max_norm._cap_values(max_norm._caps(tensors, cap, "cap", dim), torch.device("cpu"))
    plan = max_norm._build(tensors, dim, places, kind != "l1_ball")
    kind = _ops.ROW_KINDS.index(kind)
    return max_norm_rows(plan.table, plan.chunks, plan.chunk, values, p, tau, decay, None, kind, tensors)


# Rows that go to a warp and to a block, rows that do not fit on chip, and biases.
SHAPES = [(33, 50), (5, 300), (7, 3, 3, 3), (3, 2049), (9,), (2, 9001)]
ours = gpu_kernels(put_on_host)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_are_read_once_and_those_over_the_cap_written(ours, dtype, p):
    """Rows that do not fit on chip are read once more to be written. One plan, aligned rows beside others."""
    from tests.proving.traffic import traffic

    def held(length):
        if ours != "triton":
            return length * dtype.itemsize <= 64 << 10
        return length <= (4096 if p == 3.0 else 8192 if length % 8 or dtype == torch.float64 else 16_384)

    shapes = [*SHAPES, (2, 4000), (2, 512, 3, 3), (2, 4_609), (2, 5000), (2, 8192), (2, 16_384), (2, 20_000)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    rows = [w.flatten(1) if w.dim() > 1 else w[:, None] for w in tensors]
    norms = [w.double().norm(p, dim=1) for w in rows]
    caps = [n.median().item() for n in norms]
    before = [w.clone() for w in tensors]
    with traffic() as log:
        count = fastreg.max_norm_(tensors, caps, p=p) if ours == "triton" else project(tensors, caps, p=p)
    assert len(log) == 1
    assert count.item() == sum(int((n > cap).sum()) for n, cap in zip(norms, caps))
    for old, new, cap, n in zip(before, tensors, caps, norms):
        over = (n > cap).reshape(-1, *[1] * (old.dim() - 1)).expand_as(old)
        assert over.any() and torch.equal(new[~over], old[~over])
        assert torch.equal(log.writes(new), over.long())
        assert torch.equal(log.reads(new), 1 + over.long() * (not held(new[0].numel())))
    with fastreg.use_backend("reference"):
        fastreg.max_norm_(before, caps, p=p)
    torch.testing.assert_close(tensors, before, rtol=4 * torch.finfo(dtype).eps + 2.0**-38, atol=0)


@needs_cudahost
@pytest.mark.parametrize(("kilobytes", "length"), [(99, 16_384), (163, 20_000), (227, 28_000)])
@pytest.mark.parametrize("offset", [0, 1])
def test_cuda_holds_as_long_rows_as_the_device_has_room_for(monkeypatch, kilobytes, length, offset):
    from tests.proving.traffic import traffic

    monkeypatch.setattr(f"{__name__}.SHARED", kilobytes << 10)
    w, short = torch.randn(3 * length + offset)[offset:].view(3, length), torch.randn(40, 30)
    w[1] *= 0.01
    with traffic() as log:
        assert project([w, short], [0.9 * w[0].norm().item(), 0.0]).item() >= 41
    assert len(log) == 1 and log.reads(w).eq(1).all() and log.reads(short).eq(1).all()
    assert log.writes(w).amax(1).tolist()[:2] == [1, 0]


@pytest.mark.parametrize("mixed", [False, True])
def test_decay_writes_every_row_once_whatever_the_dtypes(ours, mixed):
    from tests.proving.traffic import traffic

    tensors = [torch.randn(3, 4608), torch.randn(3, 4608).to(torch.bfloat16 if mixed else torch.float32)]
    with traffic() as log:
        if ours == "triton":
            fastreg.max_norm_(tensors, 60.0, decay=0.125)
        else:
            project(tensors, 60.0, decay=0.125)
    for w in tensors:
        assert log.writes(w).eq(1).all() and log.reads(w).eq(1).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [4608, 8200])
def test_every_rule_for_long_rows_on_chip(ours, dtype, length):
    """Rows that stay, of NaN and inf, huge and tiny; elements side by side and apart."""
    far = 2.0**600 if dtype == torch.float64 else 2.0**90
    w = torch.randn(7, length, dtype=torch.float64) * torch.tensor([1, 1, 1, 1, far, 1 / far, 0])[:, None]
    w[2, 4500], w[3, 17] = torch.nan, -torch.inf
    w = w.to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps + length * 2.0**-52

    def check(call):
        for old in (w, w.t().contiguous().t()):
            new, expected = old.clone(), w.clone()
            call(new)
            with fastreg.use_backend("reference"):
                call(expected)
            torch.testing.assert_close(new, expected, rtol=tolerance, atol=0, equal_nan=True)

    for p in (1.0, 2.0, float("inf")):
        caps = torch.linalg.vector_norm(w.double(), p, dim=1) * torch.tensor([0.5, 2, 1, 1, 0.5, 0.5, 1])
        caps = caps.nan_to_num(1.0, 1.0)
        check(lambda x, p=p, caps=caps: fastreg.max_norm_(x, caps, p=p))
    check(lambda x: fastreg.max_norm_(x, caps, decay=0.125))
    check(lambda x: fastreg.max_norm_(x, caps, tau=1.5))
    check(lambda x: fastreg.tau_normalize_(x))
    check(lambda x: fastreg.project_lp_ball_(x, 0.75, p=float("inf")))
    out, expected = fastreg.max_norm(w, caps, p=1.0), w.clone()
    with fastreg.use_backend("reference"):
        fastreg.max_norm_(expected, caps, p=1.0)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=0, equal_nan=True)


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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_long_rows_are_shared_among_programs_and_read_once_to_measure_and_once_to_write(ours, dtype):
    from tests.proving.traffic import traffic

    w, short = torch.randn(3, 40_001).to(dtype), torch.randn(5, 30).to(dtype)
    w[1] *= 0.01
    before, norms = w.clone(), w.double().norm(dim=1)
    cap = 0.9 * norms[0].item()
    over = norms > cap
    plan = max_norm._build([w, short], 0, ((0, 0),) * 2)
    pieces = plan.chunk >> 20
    assert pieces == 3 * 5 and len(plan.chunks) == pieces + 1
    with traffic() as log:
        if ours == "triton":
            fastreg.max_norm_([w, short], cap)
        else:
            project([w, short], cap)
    assert len(log) == (3 if dtype == torch.float64 else 4)
    assert over.tolist() == [True, False, True] and torch.equal(w[1], before[1])
    assert torch.equal(log.reads(w), (1 + over.long())[:, None].expand_as(w))
    assert torch.equal(log.writes(w), over.long()[:, None].expand_as(w))
    grad = torch.randn_like(w)
    leaf = before.clone().requires_grad_()
    with traffic() as log:
        out = fastreg.max_norm(leaf, cap)
        out.backward(grad)
    assert log.writes(out).eq(1).all() and log.writes(leaf.grad).eq(1).all()
    assert log.reads(leaf)[0].eq(4).all() and log.reads(leaf)[1].eq(2).all()


def test_a_row_has_at_most_1024_pieces():
    for length in (32_769, 1 << 23, (1 << 23) + 1, 10_000_000, 1 << 33):
        piece = max_norm._piece(length)
        assert piece & (piece - 1) == 0 and (piece == 8192 or 512 < -(-length // piece) <= 1024)


def test_rows_in_pieces_widen_no_tile():
    tensors = [torch.randn(64, 100), torch.randn(2, 40_000)]
    assert [max_norm._build(tensors, 0, ((0, 0),) * 2, split).chunk >> 8 & 15 for split in (True, False)] == [1, 7]


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(33, 50), (5, 300), (3, 2049)], ids=str)
def test_out_of_place_reads_and_writes_once_each_way(ours, shape, p):
    from tests.proving.traffic import traffic

    w = torch.randn(shape).requires_grad_()
    norms = torch.linalg.vector_norm(w.detach().double(), p, dim=1)
    over = norms > norms.median()
    with traffic() as log:
        out = fastreg.max_norm(w, norms.median().item(), p=p)
    assert len(log) == 1
    assert log.reads(w).eq(1).all() and log.writes(w).eq(0).all() and log.writes(out).eq(1).all()
    assert torch.equal(out[~over], w[~over])
    grad = torch.randn(shape)
    with traffic() as log:
        out.backward(grad)
    assert len(log) == 1
    assert torch.equal(log.reads(w), over.long()[:, None].expand(shape))  # a row that stayed passes its gradient on
    assert log.reads(grad).eq(1).all() and log.writes(w.grad).eq(1).all()


@pytest.mark.parametrize("length", [4609, 16_384])
@pytest.mark.parametrize("p", [2.0, float("inf")])
def test_out_of_place_reads_long_rows_once(ours, length, p):
    from tests.proving.traffic import traffic

    w = torch.randn(3, length)
    norms = torch.linalg.vector_norm(w.double(), p, dim=1)
    with traffic() as log:
        out = fastreg.max_norm(w, norms.median().item(), p=p)
    assert len(log) == 1 and log.reads(w).eq(1).all() and log.writes(out).eq(1).all()
    assert torch.equal((out != w).any(1), norms > norms.median())
    torch.testing.assert_close(fastreg.row_norms(w, p=p).double(), norms, rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", [(33, 50), (5, 300), (3, 2049), (2, 9001)], ids=str)
def test_norms_take_one_read(ours, shape):
    from tests.proving.traffic import traffic

    w = torch.randn(shape).requires_grad_()
    with traffic() as log:
        norms = fastreg.row_norms(w)
    assert len(log) == 1 and log.reads(w).eq(1).all() and log.writes(w).eq(0).all()
    with traffic() as log:
        norms.sum().backward()
    assert len(log) == 1 and log.reads(w).eq(1).all() and log.writes(w.grad).eq(1).all()


# Every number of lanes that share a row, unaligned rows, rows that do not fit on chip.
MATRICES = [(300, 1), (200, 3), (100, 9), (70, 27), (40, 64), (9, 300), (5, 1025), (3, 2049), (3, 4100), (2, 20001)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_values_and_gradients_of_matrices(ours, shape, dtype):
    whole = torch.randn(shape[0] * shape[1] + 1, dtype=torch.float64).to(dtype)
    w = whole[1:].view(shape).requires_grad_()
    caps = torch.linalg.vector_norm(w.detach().double(), dim=1) * torch.tensor([0.5, 2.0]).repeat(shape[0])[: shape[0]]
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = fastreg.max_norm(w, caps.requires_grad_())
    ours = out, *torch.autograd.grad(out, (w, caps), grad)
    with fastreg.use_backend("reference"):
        out = fastreg.max_norm(w, caps)
        theirs = out, *torch.autograd.grad(out, (w, caps), grad)
    # Roundings, and in fp64 sums in another order; the two terms of a gradient may cancel: relative to the first.
    eps, order = torch.finfo(dtype).eps, shape[1] * 2**-52
    for a, b in zip(ours, theirs):
        largest = max(b.abs().max().item(), grad.abs().max().item())
        assert (a - b).abs().max() <= (4 * eps + order) * largest
    norms, (grads,) = fastreg.row_norms(w), torch.autograd.grad(fastreg.row_norms(w).sum(), w)
    exact = torch.linalg.vector_norm(w.detach().double(), dim=1)
    torch.testing.assert_close(norms.double(), exact, rtol=2**-23 if dtype != torch.float64 else eps + order, atol=0)
    torch.testing.assert_close(grads.double(), w.detach().double() / exact[:, None], rtol=2 * eps + order, atol=0)


@needs_cudahost
def test_few_elements_per_row_fill_the_lanes():
    """Rows of 27 fp32 elements: 8 vectors, which 4 lanes of a warp share, so that a block treats 32 rows at a time."""
    w = torch.randn(1000, 27)
    before = w.clone()
    count = project([w], 5.0)
    assert count.item() == int((before.double().norm(dim=1) > 5).sum())


def cuda_calls():
    """What the sanitizers watch: every width of rows, kind and order, each with a rest."""
    for shape in [*MATRICES, (1, 33_001)]:
        for dtype, p in ((torch.float32, 2.0), (torch.float16, 1.0), (torch.float64, 3.0)):
            w, caps = torch.randn(shape).to(dtype), torch.rand(shape[0], dtype=torch.float64)
            out, norms = max_norm_forward(w, caps, p, 1.5)
            max_norm_backward(out, w, caps, norms, p, 1.5)
            row_norms_backward(caps, w, row_norms(w, p), p)
    for dtype in (torch.float32, torch.float16, torch.float64):
        for p, kind in ((1.0, "cap"), (2.0, "cap"), (1.0, "l1_ball"), (float("inf"), "linf_ball"), (3.0, "normalize")):
            project([torch.randn(shape).to(dtype) for shape in SHAPES], 0.5, kind, p, decay=0.125)
    project([torch.randn(5, 7, 6, 2).transpose(1, 3)], torch.rand(6), dim=2, tau=1.5)
    project([torch.ones(1, 40_001).bfloat16(), torch.randn(3, 2, 11_000).transpose(0, 1)], 0.5)


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_do_not_spill():
    for facts in cubin.nvcc_facts("csrc/cuda/max_norm.cu"):
        assert facts.spills == 0, facts
        assert facts.loads.get(128) and facts.stores.get(128), facts


def compile_all():
    from tritonkernels import max_norm as triton_kernels

    for dtype in (torch.float32, torch.bfloat16):
        for length in (64, 1000, 4096, 1 << 15, 1 << 16):
            w, caps = torch.empty(64, length, dtype=dtype), torch.ones(1, dtype=torch.float64)
            _, norms = triton_kernels.max_norm_forward(w, caps, 2.0, 1.0)
            triton_kernels.max_norm_backward(w, w, caps, norms, 2.0, 1.0)
            triton_kernels.row_norms_backward(norms, w, triton_kernels.row_norms(w, 3.0), 3.0)
    mixed = [torch.empty(64, 1000), torch.empty(2, 1 << 16), torch.empty(3, 40001, dtype=torch.bfloat16)]
    plan = max_norm._build(mixed, 0, ((0, 0),) * 3)
    for p, decay in ((2.0, 0.0), (3.0, 0.1)):
        triton_kernels.max_norm_rows(plan.table, plan.chunks, plan.chunk, caps, p, 1.0, decay, None, 0)
    for length in (100, 4095):
        two = [torch.empty(64, length), torch.empty(64, length, dtype=torch.bfloat16)]
        plan = max_norm._build(two, 0, ((0, 0),) * 2)
        triton_kernels.max_norm_rows(plan.table, plan.chunks, plan.chunk, caps, 3.0, 1.0, 0.1, None, 0)
    two = [torch.empty(512, 512, 3, 3), torch.empty(64, 5000, dtype=torch.bfloat16)]
    plan = max_norm._build(two, 0, ((0, 0),) * 2)
    triton_kernels.max_norm_rows(plan.table, plan.chunks, plan.chunk, caps, 2.0, 1.0, 0.0, None, 0)
    plan = max_norm._build([torch.empty(64, 1 << 16)], 0, ((0, 0),), False)
    triton_kernels.max_norm_rows(plan.table, plan.chunks, plan.chunk, caps, 1.0, 1.0, 0.0, None, 2)  # the l1 ball


def compile_held():
    from tritonkernels import max_norm as triton_kernels

    caps = torch.ones(1, dtype=torch.float64)
    triton_kernels.max_norm_forward(torch.empty(64, 16_384), caps, 2.0, 1.0)
    tensors = [torch.empty(64, 3, 7, 7), torch.empty(512, 512, 3, 3), torch.empty(64, 16_384)]
    plan = max_norm._build(tensors, 0, ((0, 0),) * 3)  # of which the first is not aligned
    for p, kind in ((2.0, "cap"), (math.inf, "linf_ball")):
        kind = _ops.ROW_KINDS.index(kind)
        triton_kernels.max_norm_rows(plan.table, plan.chunks, plan.chunk, caps, p, 1.0, 0.1, None, kind)


@needs_ptxas
@pytest.mark.slow
def test_triton_kernels_do_not_spill():
    names = ("compile_all", "compile_held")
    launches, held = cubin.launch_facts(*(f"tests.test_max_norm_gpu:{name}" for name in names)).values()
    for facts in launches + held:
        assert facts.spills == 0, facts
        assert facts.loads.get(128) or facts.kernel in ("_max_norm_rows", "_pieces"), facts
        if facts.kernel == "_matrix_gradients" and facts.stores != {64: 2}:  # the sums of a piece are two numbers
            assert facts.stores.get(128), facts
    for facts in held:  # each of 16,384 elements once; in the plan those of 8,192 as well
        assert facts.loads[128] == (16 if facts.kernel == "_matrix_rows" else 24), facts


# ---- on a GPU --------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_projecting_does_not_sync(backend):
    tensors = [torch.randn(shape, device="cuda") for shape in SHAPES]
    rate = torch.full((), 0.01, device="cuda")

    def step(constraint, w):
        constraint.project(rate)
        (fastreg.max_norm(w, 1.0) + fastreg.row_norms(w)[:, None]).sum().backward()

    with fastreg.use_backend(backend):
        constraint, w = fastreg.MaxNorm(tensors, 1.0), torch.randn(33, 50, device="cuda", requires_grad=True)
        step(constraint, w)
        with no_sync():
            step(constraint, w)
