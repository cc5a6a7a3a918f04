"""What this machine can run, for parametrising and skipping tests: devices, backends, tools.

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("backend", "device"), backends("cross_entropy"))
@needs_interpreter   # Triton kernels on CPU tensors: traffic(), sanitize()
@needs_ptxas         # cubin.launch_facts
@needs_nvcc          # cubin.nvcc_facts
@needs_cudahost      # cudahost.load
@needs_cpu_kernels   # fastreg.use_backend("cpu")
"""

import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fastreg import _native
from tests.proving import cubin

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if HAS_CUDA else ["cpu"]


def _interpreter_missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET is not 1, so Triton kernels run on the GPU alone"
    return None


def cudahost_missing() -> str | None:
    if shutil.which("g++") is None:
        return "g++ is not on the PATH"
    if find_spec("pybind11") is None:
        return "pybind11 is not installed"
    try:
        cubin.cuda_home()
    except FileNotFoundError as error:
        return f"the CUDA toolkit's headers are needed: {error}"
    return None


def _skip(reason: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(reason is not None, reason=reason or "")


needs_cuda = pytest.mark.gpu
needs_interpreter = _skip(_interpreter_missing())
needs_ptxas = _skip(cubin.triton_missing())
needs_nvcc = _skip(cubin.nvcc_missing())
needs_cudahost = _skip(cudahost_missing())
needs_cpu_kernels = _skip(_native.missing["cpu"])
needs_sanitizers = pytest.mark.usefixtures("sanitizers")


def gpu_kernels(put_on_host: Callable[[pytest.MonkeyPatch], None]) -> Callable:
    """A fixture: the kernels for a GPU that run here without one, Triton's in its interpreter, and CUDA's on the host,
    which `put_on_host` puts in the place of the C++ ones."""

    @pytest.fixture(
        params=[pytest.param("triton", marks=needs_interpreter), pytest.param("cuda on the host", marks=needs_cudahost)]
    )
    def ours(request, monkeypatch):
        from fastreg import use_backend

        if request.param != "triton":
            put_on_host(monkeypatch)
        with use_backend("triton" if request.param == "triton" else "cpu"):
            yield request.param

    return ours


def backends(op: str) -> list:
    """Parameters (backend, device) for every backend of `op`; those that cannot run here skip with the reason."""
    from fastreg import _backends

    params = []
    for backend in _backends.BACKENDS:
        for device in ("cpu", "cuda"):
            reason = _backends._against(backend, op, device, lambda _: None)
            if backend == "triton" and device == "cuda" and _backends.interpreting():
                reason = "triton kernels are interpreted in this process"
            if device == "cuda" and not HAS_CUDA:
                continue
            if reason is None or device == ("cuda" if backend == "cuda" else "cpu"):
                params.append(pytest.param(backend, device, id=f"{backend}-{device}", marks=_skip(reason)))
    return params


def device_of(backend: str) -> str:
    """Where tests of this backend keep their tensors: on the GPU, if it is a GPU's backend and there is one."""
    from fastreg import _backends

    on_gpu = backend == "cuda" or (backend == "triton" and not _backends.interpreting())
    return "cuda" if on_gpu and HAS_CUDA else "cpu"


def move(value, device: str):
    """`value` on `device`; tensors keep strides, offset and overlap, where `.to` would make them compact."""
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    storage = value.untyped_storage()
    flat = value.new_empty(0).set_(storage, 0, (storage.nbytes() // value.element_size(),), (1,))
    moved = flat.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    return moved.requires_grad_(value.requires_grad)


@contextmanager
def no_sync():
    """Where the host waits for the GPU, it raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
