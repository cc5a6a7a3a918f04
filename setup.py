"""Builds fastreg's two optional native extensions: `fastreg._C_cpu` and `fastreg._C_cuda`.

Each is an abi3 module on libtorch's stable ABI, so one binary serves every torch >= 2.11 and Python >= 3.11.
FASTREG_BUILD_CPU and FASTREG_BUILD_CUDA: unset builds what can be built, 0 builds nothing, 1 fails the
install when the build fails. The outcome goes to fastreg/_build.json, which `python -m fastreg` prints.
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Semaphore

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# 2.11 is the first torch whose stable ABI holds all that the kernels call (parallel_for, new_empty, streams).
STABLE_ABI = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DTORCH_STABLE_ONLY",
    "-DPy_LIMITED_API=0x030b0000",
]
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
             "-fopenmp-simd", "-Wall", "-Wno-psabi"]  # fmt: skip
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
JOBS = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
a_job = Semaphore(JOBS)


def wish(name: str) -> str:
    """'auto', 'off' or 'must', from FASTREG_BUILD_<name>."""
    value = os.environ.get(f"FASTREG_BUILD_{name}", "")
    try:
        return {"": "auto", "0": "off", "1": "must"}[value]
    except KeyError:
        raise SystemExit(f"FASTREG_BUILD_{name} must be 0, 1 or unset, not {value!r}") from None


def find_torch():
    """The torch to build against. Under pip's build isolation that is the one of the environment being
    installed into, which isolation hides from sys.path."""
    try:
        import torch
    except ImportError:
        outer = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        sys.path += [path for path in dict.fromkeys(outer) if (Path(path) / "torch").is_dir()]
        try:
            import torch
        except ImportError as error:
            raise RuntimeError(f"torch is not installed where fastreg is being built ({error})") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise RuntimeError(f"torch {torch.__version__} is too old: the stable ABI needs 2.11")
    return torch


@cache
def operators() -> str:
    """What an extension bears, so that it never serves operators that are declared otherwise."""
    return runpy.run_path(str(ROOT / "fastreg" / "_ops.py"))["DIGEST"]


def naming(extension: str, source: str) -> list[str]:
    if not source.endswith("module.cpp"):
        return []
    return [f"-DFASTREG_MODULE={extension.rpartition('.')[2]}", f"-DFASTREG_OPERATORS={operators()}"]


def run(command: list[str]) -> None:
    try:
        with a_job:
            print(shlex.join(command), flush=True)
            done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"no {command[0]} on the PATH") from None
    sys.stderr.write(done.stderr)
    if done.returncode:
        head = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise RuntimeError(f"{command[0]} failed: {head[:300]}")


def compile_all(commands: list[list[str]]) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run, commands))


def arch_flags() -> list[str]:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    return flags


def cuda_home() -> Path:
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if (nvcc := shutil.which("nvcc")) is not None:  # perhaps a link or a script: it knows where its toolkit is
        said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        candidates += re.findall(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    candidates.append("/usr/local/cuda")
    for home in filter(None, candidates):
        if (Path(home) / "bin" / "nvcc").exists():
            return Path(home).resolve()
    raise RuntimeError("no nvcc: set CUDA_HOME to a CUDA toolkit")


class BuildNative(build_ext):
    """Compiles with plain command lines: the same flags everywhere, the CPU build of torch is enough to build
    CUDA kernels, and nothing but libtorch's stable C interface is linked."""

    def run(self) -> None:
        # A build left over from other sources must not outlive a failure now.
        self.outcome: dict[str, str] = {}
        kinds = {extension.name.rsplit("_", 1)[1]: extension for extension in self.extensions}
        for extension in kinds.values():
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        # Together, for the largest file of each takes minutes, and longer than all others.
        with ThreadPoolExecutor(max(1, len(kinds))) as pool:
            told = {kind: pool.submit(self.attempt, extension, kind.upper()) for kind, extension in kinds.items()}
            self.outcome |= {kind: future.result() for kind, future in told.items()}
        folder = ROOT / "fastreg" if self.inplace else Path(self.build_lib) / "fastreg"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.outcome, indent=1) + "\n")
        said = "; ".join(f"{kind} kernels {text}" for kind, text in self.outcome.items())
        print(f"fastreg: {said}", file=sys.stderr, flush=True)

    def attempt(self, extension: Extension, kind: str) -> str:
        if wish(kind) == "off":
            return f"not built: FASTREG_BUILD_{kind}=0"
        try:
            return self.build_native(extension, kind)
        except Exception as error:
            if wish(kind) == "must":
                raise RuntimeError(f"FASTREG_BUILD_{kind}=1, but {error}") from error
            return f"not built: {error}"

    def build_native(self, extension: Extension, kind: str) -> str:
        torch = find_torch()
        told = f"built against torch {torch.__version__}"
        site = Path(torch.__file__).parent
        objects_dir = Path(self.build_temp).resolve() / kind.lower()
        objects_dir.mkdir(parents=True, exist_ok=True)
        include = [f"-I{site}/include", f"-I{site}/include/torch/csrc/api/include", f"-I{ROOT}/csrc"]
        python = [f"-I{sysconfig.get_path('include')}"]
        link = [f"-L{site}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
        commands, objects = [], []
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        if kind == "CUDA":
            home = cuda_home()
            if torch.version.cuda is None and wish(kind) != "must":
                raise RuntimeError(f"torch {torch.__version__} is a build without CUDA")
            told += f" with the CUDA toolkit in {home}"
            include.append(f"-I{home}/include")
            link += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        for source in extension.sources:
            target = str(objects_dir / (Path(source).name + ".o"))
            objects.append(target)
            if source.endswith(".cu"):
                commands.append([str(home / "bin" / "nvcc"), "-c", source, "-o", target, "-O3", "-std=c++20",
                                 "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden",
                                 f"--threads={JOBS}", f"-Xptxas=-split-compile={JOBS}", f"-I{ROOT}/csrc",
                                 *arch_flags()])  # fmt: skip
            else:
                commands.append(
                    [
                        *cxx,
                        "-c",
                        source,
                        "-o",
                        target,
                        *CXX_FLAGS,
                        *STABLE_ABI,
                        *naming(extension.name, source),
                        *include,
                        *python,
                        *extra,
                    ]
                )
        compile_all(commands)
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        strip = [] if "-g" in extra else ["-s"]
        run([*cxx, "-shared", "-o", str(out), *objects, *link, "-Wl,--as-needed", *strip, *extra])
        return told

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class InPlace(Distribution):
    """Takes nothing from pyproject.toml, for `build_ext --inplace`: setuptools before 77 cannot read its licence."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        pass


def sources(kind: str) -> list[str]:
    paths = [*(ROOT / "csrc" / kind).glob("*.c*"), ROOT / "csrc" / "module.cpp"]
    paths.sort(key=lambda path: (-path.stat().st_size, path))  # those that take longest first
    return [str(path.relative_to(ROOT)) for path in paths]


if platform.system() == "Linux":
    native = [Extension(f"fastreg._C_{kind}", sources(kind), py_limited_api=True) for kind in ("cpu", "cuda")]
else:  # The command lines above are those of GCC and Clang on Linux; elsewhere the plain PyTorch path serves.
    native = []
    (ROOT / "fastreg" / "_build.json").write_text(
        json.dumps({kind: f"not built: {platform.system()} is not supported" for kind in ("cpu", "cuda")})
    )

setup(
    ext_modules=native,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if native else {},
    distclass=InPlace if {"build_ext", "--inplace"} <= set(sys.argv) else Distribution,
)
