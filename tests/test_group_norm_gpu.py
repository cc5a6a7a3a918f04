"""What the GPU kernels of GroupNorm move, what the compilers make of them, and the CUDA kernels' values on the host;
Triton's values: test_group_norm.py."""

import math

import pytest
import torch

import fastreg
from fastreg import _backends
from fastreg.testing import DTYPES
from tests import group_norm_cudahost
from tests.machine import needs_cuda, needs_cudahost, needs_interpreter, needs_nvcc, needs_ptxas
from tests.proving import cubin
from tests.test_group_norm import ACTIVATIONS, affine, judge, tensor

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Groups that fit on chip, one and several to a program; then larger ones, in few and many chunks.
WHOLE = [(2, 32, 8, 8, 8), (1, 64, 7, 7, 32), (2, 20, 16, 16, 2), (3, 30, 4, 4, 3)]
LARGE = [(1, 8, 192, 192, 2), (1, 16, 96, 96, 8)]


def call(x, groups, activation, residual=None, wanted=7):
    from tritonkernels import group_norm as kernels

    weight, bias = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    y, stats = kernels.group_norm_forward(x, groups, weight, bias, 1e-5, activation, residual, True)
    grads = kernels.group_norm_backward(
        torch.ones_like(x), x, groups, weight, bias, activation, residual if activation else None, stats, wanted
    )
    return y, stats, *grads


@needs_interpreter
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", WHOLE + LARGE, ids=str)
def test_bytes(case, format):
    from tests.proving.traffic import traffic

    *shape, groups = case
    x = torch.randn(shape).to(memory_format=FORMATS[format])
    with traffic() as log:
        call(x, groups, 2)
    forward = [launch for launch in log if launch.kernel in ("_forward_whole", "_moments", "_merge_moments", "_apply")]
    backward = [launch for launch in log if launch not in forward]
    whole = case in WHOLE
    assert len(log) == (3 if whole else 7)
    # Parameters and statistics are read once per program: few bytes where programs are large.
    small = 0 if not whole else 16 * sum(shape[:2]) * shape[0]
    total = sum(launch.loaded + launch.stored for launch in forward)
    assert total <= 1.02 * (2 if whole else 3) * x.nbytes + small
    total = sum(launch.loaded + launch.stored for launch in backward)
    assert total <= 1.02 * (3 if whole else 5) * x.nbytes + 2 * small
    assert (log.reads(x) == (2 if whole else 4)).all() and (log.writes(x) == 0).all()


@pytest.mark.sampled(2)
@needs_interpreter
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", [(2, 12, 5, 7, 4), (1, 30, 3, 3, 10), (1, 6, 70, 71, 2), (1, 1100, 4, 4, 1)], ids=str)
def test_addresses_races_and_padding(case, format):
    from tests.proving.sanitizer import POISONS, sanitize

    *shape, groups = case
    x = torch.randn(shape).to(memory_format=FORMATS[format])
    residual = torch.randn(shape)
    for activation in (2, 0):
        torch.manual_seed(1)
        want = call(x, groups, activation, residual, 15 if activation else 7)
        for seed, poison in enumerate(POISONS):
            torch.manual_seed(1)
            with sanitize(seed=seed, poison=poison):
                got = call(x, groups, activation, residual, 15 if activation else 7)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@needs_interpreter
def test_triton_launches_on_the_device_of_the_input(monkeypatch):
    """What the operator of any kernel does: it asks for the device of its first tensor, current or not."""
    asked, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: asked.append(tensor.data_ptr()) or device_of(tensor))
    x = torch.randn(2, 4, 5)
    torch.ops.fastreg.group_norm_forward.triton(x, 2, None, None, 1e-5, 0, None, False)
    assert asked == [x.data_ptr()]


def compile_aligned():
    for dtype in (torch.bfloat16, torch.float32):
        for *shape, groups in ((8, 64, 32, 32, 32), (8, 320, 64, 64, 32), (2, 512, 64, 64, 32), (8, 256, 64, 64, 32)):
            for format in FORMATS.values():
                call(torch.empty(shape, dtype=dtype).to(memory_format=format), groups, 2)


def compile_odd():
    for *shape, groups in ((8, 96, 7, 7, 32), (4, 30, 57, 57, 3), (64, 40, 1, 1, 4), (1, 3072, 14, 14, 1)):
        for format in FORMATS.values():
            for activation in (1, 3, 4):
                x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=format)
                call(x, groups, activation, torch.empty_like(x), 15)


def compile_plain():
    for shape in ((2, 32, 8, 8), (2, 64, 96, 96)):  # on chip, and in pieces
        call(torch.empty(shape), 32, 0)


@needs_ptxas
def test_statistics_are_rounded_to_the_nearest():
    """Triton's fp32 quotients and roots are not, unless asked to be, but those of the interpreter are."""
    (launches,) = cubin.launch_facts("tests.test_group_norm_gpu:compile_plain", architectures=[90]).values()
    assert {"_forward_whole", "_merge_moments", "_merge_sums"} <= {facts.kernel for facts in launches}
    for facts in launches:
        assert facts.approximations == 0, facts


@needs_ptxas
@pytest.mark.slow
@pytest.mark.parametrize("calls", ["compile_aligned", pytest.param("compile_odd", marks=pytest.mark.slow)])
def test_no_spills_and_wide_accesses(calls):
    (launches,) = cubin.launch_facts(f"tests.test_group_norm_gpu:{calls}").values()
    for facts in launches:
        assert facts.spills == 0, facts
        if calls == "compile_aligned" and facts.kernel not in ("_merge_moments", "_merge_sums", "_parameter_gradients"):
            assert facts.loads.get(128, 0) >= 1, facts
        if calls == "compile_aligned" and facts.kernel in ("_forward_whole", "_apply", "_apply_backward"):
            assert facts.stores.get(128, 0) >= 1, facts


# ---- autocast on a GPU -----------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_autocast_on_cuda_is_fp32(backend, dtype):
    """PyTorch's policy for group_norm: a result of fp32, gradients in the dtypes of what was given."""
    if (reason := _backends.missing("group_norm", backend)) is not None:
        pytest.skip(reason)
    x = torch.randn(2, 8, 5, 5, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(8, device="cuda", requires_grad=True)
    with fastreg.use_backend(backend), torch.autocast("cuda", dtype=dtype):
        y = fastreg.group_norm(x, 4, weight)
        stock = torch.nn.functional.group_norm(x, 4, weight)
    assert y.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(y, stock)
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), (x, weight)) for out in (y * y, stock * stock))):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


# ---- CUDA on the host ------------------------------------------------------------------------------------


def laid_out(x, layout):
    """(N, C, S) as it is, or as rows of positions."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "last" else x


def run_cuda(x, groups, weight, bias, activation=None, residual=None, grad_out=None, eps=1e-5, wanted=15):
    """The output and the gradients."""
    index = ACTIVATIONS.index(activation)
    y, stats = group_norm_cudahost.group_norm_forward(x, groups, weight, bias, eps, index, residual, True)
    wanted &= (1 << 0) | (weight is not None) << 1 | (bias is not None) << 2
    wanted |= 8 if residual is not None and index else 0
    residual = residual if index else None
    grads = group_norm_cudahost.group_norm_backward(grad_out, x, groups, weight, bias, index, residual, stats, wanted)
    return [y, *grads]


def check_cuda(shape, groups, layout, dtype=torch.float32, activation="silu", residual=False, params=None, mean=0.0):
    x, grad_out = tensor(*shape, dtype=dtype, mean=mean), tensor(*shape, dtype=dtype, seed=7)
    x, grad_out = laid_out(x, layout), laid_out(grad_out, layout)
    residual = laid_out(tensor(*shape, dtype=dtype, seed=3), layout) if residual else None
    weight, bias = affine(shape[1], params or dtype)
    mine = run_cuda(x, groups, weight, bias, activation, residual, grad_out)
    judge(mine, grad_out, x, groups, weight, bias, 1e-5, activation, residual)
    return mine


def small_gpu(monkeypatch, shared_bytes, capability=80):
    """Of many multiprocessors with little shared memory: calls are cut into slabs, as many as there can be, or shared
    by clusters where there are any (capability 90)."""
    monkeypatch.setenv("CUDAHOST_SHARED_BYTES", str(shared_bytes))
    monkeypatch.setattr(group_norm_cudahost, "MULTIPROCESSORS", 1000)
    monkeypatch.setattr(group_norm_cudahost, "SHARED_BYTES", shared_bytes)
    monkeypatch.setattr(group_norm_cudahost, "CAPABILITY", capability)


layouts = pytest.mark.parametrize("layout", ["first", "last"])
# (shape, groups): vectors and single elements, several groups to a block and one, groups that share a vector, teams
# of lanes from one to a block, one position, one element per group.
SHAPES = [
    ((2, 12, 35), 4), ((2, 64, 64), 8), ((1, 40, 49), 4), ((3, 6, 1), 6), ((2, 320, 16), 32), ((1, 96, 8), 1),
    ((2, 6, 1031), 2), ((1, 3, 2), 3), ((5, 32, 9), 32),
]  # fmt: skip
# The same for groups that are cut: into pieces of channels, of positions, and both.
CUT = [((1, 6, 9000), 2), ((2, 24, 1200), 2), ((1, 700, 33), 1), ((1, 40, 2056), 4)]


@pytest.mark.sampled(2)
@needs_cudahost
@layouts
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_cuda_groups_on_chip(case, layout):
    check_cuda(*case, layout)
    check_cuda(*case, layout, torch.bfloat16, residual=True)


@pytest.mark.sampled(2)
@needs_cudahost
@layouts
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CUT, ids=str)
def test_cuda_larger_groups(case, capability, layout, monkeypatch):
    small_gpu(monkeypatch, 40 << 10, capability)
    check_cuda(*case, layout, residual=True)
    check_cuda(*case, layout, torch.bfloat16)


@needs_cudahost
@layouts
def test_cuda_clusters_are_as_large_as_the_gpu_wants(layout, monkeypatch):
    """Blocks of more than 64 KB give every multiprocessor one; where eight blocks to a group are less than a quarter of
    them, the groups are cut."""

    def blocks(multiprocessors, capability, *shape):  # of a group
        monkeypatch.setattr(group_norm_cudahost, "MULTIPROCESSORS", multiprocessors)
        monkeypatch.setattr(group_norm_cudahost, "CAPABILITY", capability)
        size = group_norm_cudahost.workspace(laid_out(tensor(*shape), layout), 1, False, layout == "last").size
        return (size - 16) // 24 if size else 1  # three numbers each, and the statistics

    assert [blocks(n, 90, 1, 64, 2241) for n in (1, 4, 8, 32)] == [4, 4, 8, 8]  # 560 KB
    assert blocks(33, 90, 1, 64, 2241) > 8 and blocks(4, 80, 1, 64, 2241) > 8
    assert [blocks(n, 90, 1, 64, 561) for n in (1, 2)] == [1, 2]  # 140 KB
    assert [blocks(n, 80, 1, 64, 561) for n in (1, 4)] == [1, 1]


@needs_cudahost
@layouts
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_activations_and_dtypes(dtype, activation, layout):
    check_cuda((2, 12, 40), 3, layout, dtype, activation, residual=True)
    check_cuda((2, 6, 33), 2, layout, dtype, activation, params=torch.float32)


@needs_cudahost
@layouts
def test_cuda_optional_tensors(layout):
    x, grad_out = laid_out(tensor(2, 8, 20), layout), laid_out(tensor(2, 8, 20, seed=7), layout)
    weight, bias = affine(8, torch.bfloat16)
    for w, b in ((weight, None), (None, bias), (None, None)):
        judge(run_cuda(x, 2, w, b, "gelu", None, grad_out), grad_out, x, 2, w, b, 1e-5, "gelu", None)
    for wanted in (1, 2, 4, 6, 8, 9, 14):
        index, residual = 2, x
        _, stats = group_norm_cudahost.group_norm_forward(x, 2, weight, bias, 1e-5, index, residual, True)
        args = (grad_out, x, 2, weight, bias, index, residual, stats)
        some, every = (group_norm_cudahost.group_norm_backward(*args, which) for which in (wanted, 15))
        for i in range(4):
            assert some[i] is None if not wanted >> i & 1 else torch.equal(some[i], every[i])


@needs_cudahost
@layouts
def test_cuda_strided_and_unaligned(layout):
    weight, bias = affine(8)
    wide = laid_out(tensor(4, 16, 24), layout)
    for x in (wide[::2, 4:12], wide[1:, 3:11], wide[:, :8]):
        grad_out = torch.randn(x.shape)
        grad_out = laid_out(grad_out, layout)
        judge(run_cuda(x, 2, weight, bias, "silu", x, grad_out), grad_out, x, 2, weight, bias, 1e-5, "silu", x)


@needs_cudahost
@layouts
@pytest.mark.parametrize("capability", [None, 80, 90], ids=["on chip", "cut", "cluster"])
def test_cuda_hard_values(layout, capability, monkeypatch):
    """A mean far from zero, squares that overflow, NaN and infinity that stay in their group, equal elements."""
    if capability:
        small_gpu(monkeypatch, 40 << 10, capability)
    shape, groups = ((1, 8, 4100), 2) if capability else ((2, 8, 48), 2)
    for mean in (1e2, 1e4, 1e6):
        check_cuda(shape, groups, layout, mean=mean)
    weight, bias = affine(8)
    x, grad_out = laid_out(tensor(*shape), layout), laid_out(tensor(*shape, seed=7), layout)
    unit = run_cuda(x, groups, weight, bias, "silu", None, grad_out, eps=0.0)
    for scale in (2.0**63, 2.0**100):
        large = run_cuda(x * scale, groups, weight, bias, "silu", None, grad_out)
        torch.testing.assert_close(large[0], unit[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(large[1] * scale, unit[1], rtol=1e-5, atol=1e-5)
    clean = run_cuda(x, groups, weight, bias, "silu", None, grad_out)
    for bad in (math.nan, math.inf):
        dirty = x.clone(memory_format=torch.preserve_format)
        dirty[-1, 5, 7] = bad
        got = run_cuda(dirty, groups, weight, bias, "silu", None, grad_out)
        for a, b in zip(clean[:2], got[:2]):
            assert b[-1, 4:].isnan().all()
            assert torch.equal(a[-1, :4], b[-1, :4]) and torch.equal(a[:-1], b[:-1])
    y = run_cuda(torch.full_like(x, 3.0), groups, weight, bias, None, None, grad_out)[0]
    assert (y - bias[:, None]).abs().max() <= 1e-6


@needs_cudahost
@layouts
def test_cuda_one_element_per_group(layout):
    x = laid_out(tensor(3, 6, 1), layout)
    weight, bias = affine(6)
    y, dx, dweight, dbias, _ = run_cuda(x, 6, weight, bias, None, None, torch.ones_like(x))
    assert torch.equal(y, bias[:, None].expand_as(y))
    assert (dx == 0).all() and (dweight == 0).all() and torch.equal(dbias, torch.full((6,), 3.0))


@needs_cudahost
@layouts
@pytest.mark.parametrize("kind", ["on chip", "cluster", "cut"])
def test_cuda_bytes(kind, layout, monkeypatch):
    """On chip x once and y once, then x and dy once and dx once; larger groups x twice, then x and dy twice."""
    from tests.proving.traffic import traffic

    shape, groups = ((2, 64, 64), 8) if kind == "on chip" else ((1, 40, 8224), 4)
    if kind == "cluster":  # 330 KB
        monkeypatch.setattr(group_norm_cudahost, "CAPABILITY", 90)
    elif kind == "cut":
        small_gpu(monkeypatch, 24 << 10)
        monkeypatch.setattr(group_norm_cudahost, "MULTIPROCESSORS", 4)  # slabs as large as they get
    x, grad_out = (laid_out(tensor(*shape, seed=i), layout) for i in (0, 7))
    with traffic() as log:
        y, dx, *_ = run_cuda(x, groups, *affine(shape[1]), "silu", None, grad_out)
    times = 2 if kind == "cut" else 1
    assert len(log) == (7 if kind == "cut" else 3)
    forward, backward = log[: 2 * times - 1], log[2 * times - 1 :]
    for read, launches in ((x, forward), (x, backward), (grad_out, backward)):
        reads = sum(launch.reads(read) for launch in launches)
        # A slab's first element stands for its mean until that is known: each block reads it more than once.
        assert reads.min() == times and (reads > times).double().mean() <= 0.005
    assert (log.writes(y) == 1).all() and (log.writes(dx) == 1).all()
    small = 0.25 if kind == "on chip" else 0.05  # parameters and statistics, once a block: much where x is small
    assert sum(launch.moved for launch in forward) <= (times + 1 + small) * x.nbytes
    assert sum(launch.moved for launch in backward) <= (2 * times + 1 + small) * x.nbytes


def cuda_calls():
    """What the sanitizers watch: every kernel of the file, with and without vectors."""
    for layout in ("first", "last"):
        for shared_bytes, capability, (shape, groups) in (
            *((227 << 10, 80, case) for case in SHAPES),
            *((24 << 10, 80, case) for case in CUT),
            *((40 << 10, 90, case) for case in CUT),
        ):
            group_norm_cudahost.MULTIPROCESSORS = 4 if shared_bytes > 100 << 10 else 1000
            group_norm_cudahost.SHARED_BYTES, group_norm_cudahost.CAPABILITY = shared_bytes, capability
            x = laid_out(tensor(*shape, dtype=torch.bfloat16), layout)
            run_cuda(x, groups, *affine(shape[1]), "silu", x, x)
    run_cuda(tensor(2, 12, 40) * 1e30, 3, *affine(12), "gelu", None, tensor(2, 12, 40))


@needs_nvcc
@pytest.mark.slow
def test_cuda_has_no_spills_and_wide_accesses():
    for facts in cubin.nvcc_facts("csrc/cuda/group_norm.cu"):
        assert facts.spills == 0, facts
        if facts.kernel.startswith(("forward", "backward", "slab", "apply")):
            assert facts.loads.get(128, 0) >= 1, facts
        if facts.kernel.startswith(("forward", "backward", "apply")):
            assert facts.stores.get(128, 0) >= 1, facts
