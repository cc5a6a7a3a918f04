"""Which backend serves which call, and why the others do not.

A backend is `reference` (plain PyTorch, any device), `cpu` (C++), `cuda` (C++/CUDA) or `triton`. Every op
registers the backends that have kernels for it. A call is served by the first backend, in the order of
`_PREFERENCE` for its device, that is available and does not refuse the call; `reference` never refuses.
A forced backend serves the call or the call fails with the reason.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native

BACKENDS = ("reference", "cpu", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

_kernels: dict[str, tuple[str, ...]] = {}
_missing: dict[str, str | None] = {}  # backend -> why nothing of it can run on this machine
_forced: str | None = None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def register(op: str, kernels: tuple[str, ...] = ()) -> None:
    """Declares a public op and the backends besides `reference` that have kernels for it."""
    _kernels[op] = kernels


def missing(op: str, backend: str) -> str | None:
    """Why `backend` cannot run `op` here, whatever the arguments; None if it can."""
    if backend == "reference":
        return None
    if backend not in _kernels[op]:
        return f"no {backend} kernel has been written for it"
    if backend not in _missing:
        _missing[backend] = _triton_missing() if backend == "triton" else _native.missing[backend]
    return _missing[backend]


def _wrong_device(backend: str, device: str) -> str | None:
    if device in _DEVICES[backend] or (backend == "triton" and interpreting()):
        return None
    hint = " (set TRITON_INTERPRET=1 to run it in Triton's interpreter)" if backend == "triton" else ""
    return f"it serves {' and '.join(_DEVICES[backend])} tensors, not {device}{hint}"


def recorded() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace records the call, to be run where this package is
    not: torch.compile is another matter."""
    # Not torch.compiler.is_exporting(), which torch 2.11 takes for true wherever torch.compile traces.
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def unusual(*tensors: Tensor | None) -> str | None:
    """Why no kernel can take these: one is no ordinary tensor, or a transform is under way."""
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"an argument is a tensor subclass, {type(tensor).__name__}"
    if torch._C._functorch.maybe_current_level() is not None:  # this one torch.compile can answer
        return "the call is inside a torch.func transform"
    if forward_ad._current_level >= 0:
        return "the call is inside forward-mode differentiation"
    if recorded():
        return "the call is being exported, as PyTorch's own operators"
    return None


def many_at_once(grad: Tensor) -> bool:
    """Whether a backward is asked for many incoming gradients in one call: `is_grads_batched`, or torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)


def only_arguments_matter() -> bool:
    """Whether nothing but its arguments can keep a call from the CPU kernels: what `choose` and `unusual` find, without
    their calls, which would be two microseconds of forty."""
    return (
        (_forced is None or _forced == "cpu")
        and _native.missing["cpu"] is None
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def apply(function: type[torch.autograd.Function], *args: object) -> Any:
    """`function.apply(*args)` of a call that a kernel serves, also where torch.compile traces it, which wants no tensor
    to come twice. Elsewhere without the look around for torch.func transforms, which no kernel serves: 3 µs."""
    if torch.compiler.is_compiling():
        tensors: list[Tensor] = []
        args = list(args)
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                args[i] = arg.view_as(arg) if any(arg is other for other in tensors) else arg
                tensors.append(arg)
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def forced() -> str | None:
    """The backend that `use_backend` or FASTREG_BACKEND forces."""
    return _forced


def _against(backend: str, op: str, device: str, refuse: Callable[..., str | None], *args: object) -> str | None:
    """Why `backend` cannot serve this call, or None if it can."""
    if backend == "reference":
        return None
    return missing(op, backend) or _wrong_device(backend, device) or refuse(backend, *args)


def choose(op: str, device: str, refuse: Callable[..., str | None], *args: object) -> str:
    """The backend that serves this call of `op` on tensors of device type `device`.

    `refuse(backend, *args)` says why a backend other than `reference` cannot take these arguments, or None.
    """
    if _forced is not None:
        if (reason := _against(_forced, op, device, refuse, *args)) is not None:
            raise RuntimeError(f"fastreg.{op}: backend {_forced!r} is forced but cannot serve this call: {reason}")
        return _forced
    for backend in _PREFERENCE.get(device, ()):
        if missing(op, backend) is None and refuse(backend, *args) is None:
            return backend
    return "reference"


def explain(op: str, device: str, refuse: Callable[..., str | None], *args: object) -> dict[str, str]:
    """For one call: per backend "usable" or the reason against it."""
    return {backend: _against(backend, op, device, refuse, *args) or "usable" for backend in BACKENDS}


def backends() -> dict[str, dict[str, str]]:
    """For each op and backend: "usable" or the reason why not, on this machine.

    Example: ``fastreg.backends()["cross_entropy"]["cuda"]``.
    """

    def state(op: str, backend: str) -> str:
        reason = missing(op, backend)
        needs_gpu = backend == "cuda" or (backend == "triton" and not interpreting())
        if reason is None and needs_gpu and not torch.cuda.is_available():
            reason = "no CUDA device is present"
        return reason or "usable"

    return {op: {backend: state(op, backend) for backend in BACKENDS} for op in _kernels}


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, not {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every call inside the block, in the whole process.

    A call that the backend cannot serve raises RuntimeError with the reason; nothing falls back silently.
    The environment variable FASTREG_BACKEND does the same from the start of the process.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = before


if os.environ.get("FASTREG_BACKEND"):
    _forced = _check_name(os.environ["FASTREG_BACKEND"], "FASTREG_BACKEND")
