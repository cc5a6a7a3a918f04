"""Runs the CUDA kernels on the CPU under pytest: builds a .cu file with g++ and cudahost.h as a Python module.

    kernels = cudahost.load("csrc/cuda/losses.cu", ["cross_entropy_forward"])
    kernels.cross_entropy_forward(logits, target, None, loss, rows, classes)

The functions named are launchers on raw pointers. Tensors and numpy arrays stand for pointers (CPU, any dtype),
None for a null pointer, an array of one record for a pointer to a struct; the stream is left out. Arrays past a
launcher's own arguments are not passed, but metered: those whose addresses stand in a table or a struct. A CUDA error
or an error of the harness raises RuntimeError.

Inside `with traffic():` (see traffic.py) every load and store of global memory is counted, and two blocks that touch
one element, one of them writing, raise RuntimeError.

`run_sanitized("address" | "thread", "module:function")` runs a function in a process of its own in which every
`load` builds with ASan (out of bounds, use after free) or TSan (missing barriers), and returns what was found.

What it proves: values, indices, barriers, warp operations and memory accesses of the very source that nvcc
compiles. What it does not: see cudahost.h. Keep kernels in an anonymous namespace: only there does ASan see the
end of a static shared array of a template.
"""

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .cubin import ROOT, cuda_home, output, short

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cudahost"
COMPILE = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
_CPU = Path("/proc/cpuinfo")
if _CPU.exists() and " fma " in _CPU.read_text():  # a product and a sum are one instruction, as nvcc makes them
    COMPILE += ["-mfma", "-ffp-contract=fast", "-fexpensive-optimizations"]
SANITIZE = "CUDAHOST_SANITIZE"  # environment variable: how load() builds in this process


_on_launch: list[Callable[..., None]] = []  # who wants to know what kernels load and store


@contextmanager
def metering(on_launch: Callable[..., None]) -> Iterator[None]:
    """Inside the block every load and store of the kernels is counted; traffic.traffic() is made of this."""
    _on_launch.append(on_launch)
    try:
        yield
    finally:
        _on_launch.remove(on_launch)


class Kernels:
    """The launchers of one .cu file; each takes tensors or numpy arrays for pointers."""

    def __init__(self, build: Callable[[str], Path]) -> None:
        self._build = functools.cache(build)
        self._open = functools.cache(lambda variant: _bridge().open(str(self._build(variant))))
        self._open(os.environ.get(SANITIZE, ""))  # errors of the compiler come now

    def __getattr__(self, name: str) -> Callable[..., None]:
        variant = "meter" if _on_launch else os.environ.get(SANITIZE, "")
        launchers = self._open(variant)
        if name not in launchers:
            raise AttributeError(f"no launcher {name!r}; load() was given {', '.join(launchers)}")

        def launch(*args: object) -> None:
            counted = launchers[name](*map(_as_array, args))
            for offset, *counts in counted or ():
                for on_launch in _on_launch:
                    on_launch(_kernel_names(self._build(variant))[offset], *counts)

        return launch


@functools.cache
def _kernel_names(library: Path) -> dict[int, str]:
    """Offset in the library -> the function's name, as cubin.nvcc_facts has it."""
    symbols = output("nm", "-C", "--defined-only", str(library)).splitlines()
    return {int(address, 16): short(name) for address, _, name in (line.split(" ", 2) for line in symbols)}


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
    source, functions = (ROOT / source).resolve(), list(functions)
    entries = "".join(f'cudahost::describe("{name.rpartition("::")[2]}", &{name}), ' for name in functions)
    text = (
        f'#include "{source}"\n#include "cudahost_launchers.h"\n'
        'extern "C" __attribute__((visibility("default")))\n'
        f"const cudahost::Launcher cudahost_launchers[] = {{{entries}{{}}}};\n"
    )
    options = [*flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-include", str(HERE / "cudahost.h")]
    headers = [source, *sorted(HERE.glob("*.h")), *sorted((ROOT / "csrc").rglob("*.h"))]

    def build(variant: str) -> Path:
        if variant == "meter":
            metered = _compile(source.stem, text, [*options, "-DCUDAHOST_METER", "-fsanitize=thread"], headers)
            return _link(metered, _meter())  # in place of TSan's runtime
        sanitizer = [f"-fsanitize={variant}", "-fno-omit-frame-pointer"] if variant else []
        return _link(_compile(source.stem, text, [*options, *sanitizer], headers), options=sanitizer)

    return Kernels(build)


def _meter() -> Path:
    source = HERE / "cudahost_meter.cpp"
    return _compile("cudahost_meter", source.read_text(), [f"-I{HERE}"], [HERE / "cudahost_meter.h"])


@functools.cache
def _bridge() -> ModuleType:
    """The pybind11 module through which Python calls launchers."""
    import pybind11

    source, name = HERE / "cudahost_bridge.cpp", "cudahost_bridge"
    options = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}", f"-I{HERE}", "-g0"]
    library = _link(_compile(name, source.read_text(), options, sorted(HERE.glob("cudahost_*.h"))))
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(name: str, text: str, options: list[str], depends: list[Path]) -> Path:
    """Compiles `text` to an object file, named after all that it is made of, unless it is there."""
    command = [*_compiler(), *COMPILE, *options, f"-isystem{cuda_home() / 'include'}"]
    content = hashlib.sha256(repr((command, text, sys.version)).encode())
    for path in depends:
        content.update(path.read_bytes())
    return _make(BUILD / f"{name}-{content.hexdigest()[:16]}.o", [*command, "-c", "-x", "c++", "-"], text)


def _link(*objects: Path, options: Iterable[str] = ()) -> Path:
    library = BUILD / f"{'+'.join(path.stem for path in objects)}.so"
    return _make(library, [*_compiler(), "-shared", *map(str, objects), *options, "-ldl"])


def _make(target: Path, command: list[str], text: str | None = None) -> Path:
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{os.getpid()}-{target.name}")  # renamed when whole: several processes may build
    done = subprocess.run([*command, "-o", str(partial)], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ could not make {target.name}:\n{done.stderr[:8000]}")
    return partial.replace(target)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def run_sanitized(sanitizer: str, reference: str, *args: str, seed: int = 0) -> str:
    """Runs "module:function", with string arguments, under ASan ("address"), TSan ("thread") or neither ("").

    Returns "" if nothing was found, else the sanitizer's report or the exception's traceback. The function's
    module should not import torch where it can do without: numpy arrays serve, and start much faster.
    """
    prefix, environment = sanitized(sanitizer)
    code = "import sys; from tests.proving.cubin import call_reference; call_reference(*sys.argv[1:])"
    command = [*prefix, sys.executable, "-c", code, reference, *args]
    environment["CUDAHOST_SEED"] = str(seed)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip() or f"exit {done.returncode}"


def sanitized(sanitizer: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """For a Python whose kernels are to run under a sanitizer, or none (""): what to put before its command, and its
    environment."""
    return _fixed_addresses(), {
        **os.environ,
        **(_preload(sanitizer) if sanitizer else {}),
        SANITIZE: sanitizer,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def sanitizers_missing() -> str | None:
    """Why programs cannot run under the sanitizers here, or None."""
    for sanitizer in ("address", "thread"):
        try:
            prefix, environment = sanitized(sanitizer)
        except FileNotFoundError as error:
            return str(error)
        done = subprocess.run([*prefix, "true"], capture_output=True, text=True, env=environment)
        if done.returncode or done.stderr:
            return f"the {sanitizer} sanitizer does not start here: {(done.stderr.strip() or '?').splitlines()[0]}"
    return None


@functools.cache
def _preload(sanitizer: str) -> dict[str, str]:
    """The sanitizer's runtime, for a Python that was built without; libstdc++ early, for ASan intercepts its throw."""
    paths = []
    for library in ({"address": "libasan.so", "thread": "libtsan.so"}[sanitizer], "libstdc++.so"):
        command = [*_compiler(), f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not os.path.isabs(paths[-1]):
            raise FileNotFoundError(f"g++ comes without {library}")
    return {"LD_PRELOAD": " ".join(paths)}


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """A prefix that turns address randomisation off, where that is allowed: TSan wants its shadow's addresses free."""
    command = ("setarch", "-R")
    allowed = shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if allowed else ()
