"""Runs the CUDA kernels on the CPU under pytest: builds a .cu file with g++ and cudahost.h as a Python module.

    kernels = cudahost.load("csrc/cuda/losses.cu", ["cross_entropy_forward"])
    kernels.cross_entropy_forward(logits, target, None, loss, rows, classes)

The functions named are launchers on raw pointers. Tensors and numpy arrays stand for pointers (CPU, any dtype),
None for a null pointer; the stream is left out. A CUDA error or an error of the harness raises RuntimeError.

`run_sanitized("address" | "thread", "module:function")` runs a function in a process of its own in which every
`load` builds with ASan (out of bounds, use after free) or TSan (missing barriers), and returns what was found.

What it proves: values, indices, barriers, warp operations and memory accesses of the very source that nvcc
compiles. What it does not: see cudahost.h.
"""

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from .cubin import ROOT, cuda_home

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cudahost"
COMPILE = ["-std=c++20", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
SANITIZE = "CUDAHOST_SANITIZE"  # environment variable: how load() builds in this process


class Kernels:
    """The launchers of one .cu file; each takes tensors or numpy arrays for pointers."""

    def __init__(self, launchers: dict[str, Callable]) -> None:
        self._launchers = launchers

    def __getattr__(self, name: str) -> Callable[..., None]:
        try:
            launcher = self._launchers[name]
        except KeyError:
            raise AttributeError(f"no launcher {name!r}; load() was given {', '.join(self._launchers)}") from None
        return lambda *args: launcher(*map(_as_array, args))


def _as_array(value: object) -> object:
    """A tensor's memory as numpy, whatever its dtype; other values as they are."""
    if not hasattr(value, "data_ptr"):
        return value
    import torch

    if value.device.type != "cpu":
        raise ValueError(f"the kernels run on the CPU here, and the tensor is on {value.device}")
    value = value.detach()
    return (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()


def load(source: str | Path, functions: Iterable[str], flags: Iterable[str] = ()) -> Kernels:
    """Builds `source` (relative to the repository's root), unless that very build exists, and opens it.

    `functions`: the launchers, with their namespaces ("fastreg::cuda::forward" becomes `.forward`). They take
    pointers, numbers and a stream, and return cudaError_t or nothing.
    """
    source, functions, sanitizer = (ROOT / source).resolve(), list(functions), os.environ.get(SANITIZE)
    options = [*flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-include", str(HERE / "cudahost.h")]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    entries = "".join(f'cudahost::describe("{name.rpartition("::")[2]}", &{name}), ' for name in functions)
    text = (
        f'#include "{source}"\n#include "cudahost_launchers.h"\n'
        'extern "C" __attribute__((visibility("default")))\n'
        f"const cudahost::Launcher cudahost_launchers[] = {{{entries}{{}}}};\n"
    )
    headers = [*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h")]
    library = _build(source.stem, text, options, [source, *sorted(headers)])
    return Kernels(_bridge().open(str(library)))


@functools.cache
def _bridge() -> ModuleType:
    """The pybind11 module through which Python calls launchers."""
    import pybind11

    source, name = HERE / "cudahost_bridge.cpp", "cudahost_bridge"
    options = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}", f"-I{HERE}", "-g0"]
    library = _build(name, source.read_text(), options, [HERE / "cudahost_launchers.h"])
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(name: str, text: str, options: list[str], depends: list[Path]) -> Path:
    """Compiles `text` to a shared library, named after all that it is made of."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *COMPILE, *options, f"-isystem{cuda_home() / 'include'}"]
    content = hashlib.sha256(repr((command, text, sys.version)).encode())
    for path in depends:
        content.update(path.read_bytes())
    library = BUILD / f"{name}-{content.hexdigest()[:16]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")  # renamed when whole: several processes may build at once
    done = subprocess.run([*command, "-x", "c++", "-", "-o", str(partial)], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not build {name} for the host:\n{done.stderr[:8000]}")
    partial.replace(library)
    return library


def run_sanitized(sanitizer: str, reference: str, *args: str, seed: int = 0) -> str:
    """Runs "module:function", with string arguments, under ASan ("address") or TSan ("thread").

    Returns "" if nothing was found, else the sanitizer's report or the exception's traceback. The function's
    module should not import torch where it can do without: numpy arrays serve, and start much faster.
    """
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    preload = [
        subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True).stdout.strip()
        for library in (runtime, "libstdc++.so")  # libstdc++ early: its __cxa_throw is what ASan intercepts
    ]
    environment = {
        **os.environ,
        SANITIZE: sanitizer,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        "CUDAHOST_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    code = "import sys; from tests.proving.cubin import call_reference; call_reference(*sys.argv[1:])"
    # TSan maps its shadow where address randomisation may have put a library; setarch turns that off.
    command = ["setarch", "-R"] if sanitizer == "thread" else []
    command += [sys.executable, "-c", code, reference, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"exit {done.returncode}"
