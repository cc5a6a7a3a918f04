"""The kernels of stochastic depth and soft-thresholding for the GPU, without one: bytes, launches, races, spills."""

import pytest
import torch

import fastreg
from fastreg import _plan, noise
from tests.machine import gpu_kernels, needs_cuda, needs_nvcc, needs_ptxas, no_sync
from tests.proving import cubin, cudahost

LAUNCHERS = ("drop_path", "soft_threshold", "soft_threshold_backward")


def kernels():
    return cudahost.load("csrc/cuda/noise.cu", [f"fastreg::cuda::{name}" for name in LAUNCHERS])


# The CUDA kernels on the host, called as the operators.
def drop_path(x, mask, p, residual):
    out = torch.empty_like(x)
    code = _plan.DTYPE_CODES[x.dtype]
    kernels().drop_path(code, x, mask, residual, out, x.numel(), mask.numel(), p)
    return out


def soft_threshold(x, tau, *runs):
    out = torch.empty_like(x)
    kernels().soft_threshold(_plan.DTYPE_CODES[x.dtype], x, tau, out, x.numel(), *runs)
    return out


def soft_threshold_backward(grad, x, tau, run, *rest):
    grad_x, sums = torch.empty_like(x), tau.new_empty(-(-x.numel() // run))
    code = _plan.DTYPE_CODES[x.dtype]
    kernels().soft_threshold_backward(code, grad, x, tau, grad_x, sums, x.numel(), run, *rest)
    return grad_x, sums


def put_on_host(monkeypatch):
    """The CUDA kernels in place of the C++ ones."""
    monkeypatch.setitem(noise._drop_path, "cpu", drop_path)
    monkeypatch.setitem(noise._shrink, "cpu", soft_threshold)
    monkeypatch.setitem(noise._shrink_backward, "cpu", soft_threshold_backward)


ours = gpu_kernels(put_on_host)


@pytest.mark.parametrize("shape", [(6, 3, 5, 7), (5, 9001), (40, 3)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_drop_path_reads_what_it_keeps(ours, shape, residual):
    from tests.proving.traffic import traffic

    x = torch.randn(shape)
    added = torch.randn(shape) if residual else None
    with traffic() as log:
        out = fastreg.drop_path(x, 0.5, residual=added)
    kept = ((out if added is None else out - added) != 0).flatten(1).any(1)
    assert len(log) == 1 and 0 < kept.sum() < len(kept)
    assert torch.equal(log.reads(x).flatten(1), kept.long()[:, None].expand(len(kept), x[0].numel()))
    assert log.writes(out).eq(1).all()
    assert added is None or log.reads(added).eq(1).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 2, 5001), (3, 2, 64)], ids=str)
@pytest.mark.parametrize("tau_shape", [(), (-1,), (0, -1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_threshold_reads_and_writes_once_each_way(ours, shape, tau_shape, dtype):
    from tests.proving.traffic import traffic

    x = torch.randn(shape).to(dtype)
    tau = torch.rand({(): (), (-1,): shape[1:2], (0, -1): shape[:2]}[tau_shape])
    leaf = x.requires_grad_()
    with traffic() as log:
        out = fastreg.soft_threshold(leaf, tau.requires_grad_())
    assert len(log) == 1 and log.reads(leaf).eq(1).all() and log.writes(out).eq(1).all()
    grad = torch.randn_like(out)
    with traffic() as log:
        grad_x, _ = torch.autograd.grad(out, (leaf, tau), grad)
    assert len(log) == 1 and log.reads(leaf).eq(1).all() and log.reads(grad).eq(1).all()
    assert log.writes(grad_x).eq(1).all()


def cuda_calls():
    """What the sanitizers watch."""
    patch = pytest.MonkeyPatch()
    put_on_host(patch)
    with fastreg.use_backend("cpu"):
        for dtype in (torch.float32, torch.float16, torch.float64):
            for shape in ((3, 2, 7, 7), (2, 3, 3001), (40, 5)):
                x = torch.randn(shape).to(dtype).requires_grad_()
                fastreg.drop_path(x, 0.5, residual=x).sum().backward()
                tau = torch.rand(shape[:2]).requires_grad_()
                (fastreg.soft_threshold(x, tau).sum() + fastreg.soft_threshold(x[1:], 0.5).sum()).backward()
    patch.undo()


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_do_not_spill():
    for facts in cubin.nvcc_facts("csrc/cuda/noise.cu"):
        assert facts.spills == 0, facts
        assert facts.loads.get(128) and facts.stores.get(128), facts


def compile_all():
    from tritonkernels import noise as triton_kernels

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(64, 64, 64, 64, dtype=dtype)
        triton_kernels.drop_path(x, torch.empty(64, dtype=dtype), 0.5, x)
        tau = torch.empty(64 * 64)
        triton_kernels.soft_threshold(x, tau, 4096, 64, 64, 1)
        triton_kernels.soft_threshold_backward(x, x, tau, 4096, 64, 64, 1)


@needs_ptxas
@pytest.mark.slow
def test_triton_kernels_do_not_spill():
    (launches,) = cubin.launch_facts("tests.test_noise_gpu:compile_all").values()
    for facts in launches:
        assert facts.spills == 0, facts
        assert facts.loads.get(128) and facts.stores.get(128), facts


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nothing_waits_for_the_device(backend):
    x = torch.randn(4, 3, 8, 8, device="cuda", requires_grad=True)
    tau = torch.rand(4, 3, device="cuda", requires_grad=True)

    def step():
        fastreg.soft_threshold(fastreg.drop_path(x, 0.5, residual=x), tau).sum().backward()

    with fastreg.use_backend(backend):
        step()
        with no_sync():
            step()
