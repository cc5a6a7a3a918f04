"""Facts about compiled kernels, for any architecture, with no GPU: registers, spills, access widths.

Triton kernels are compiled by their own launchers. `launch_facts("tests.proving.catalog:some_function")` calls
that function in a fresh process in which every jit launch compiles for the asked architectures instead of
running. The launcher sees ordinary CPU tensors, so Triton specialises (divisible by 16, equal to 1, dtypes) on
just the arguments that it would get on a GPU. A fresh process, because where TRITON_INTERPRET=1 is set, Triton's
own library functions are interpreted functions, which cannot be compiled.

CUDA kernels come from nvcc: `nvcc_facts("csrc/cuda/losses.cu")`.

What it proves: the code the hardware will run keeps its values in registers and moves memory in wide accesses.
What it does not: how fast that is, or how often each instruction runs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100, 120)


@dataclass
class Facts:
    """One kernel compiled for one architecture."""

    kernel: str
    arch: int
    registers: int
    stack: int  # bytes of local memory per thread
    spills: int  # instructions that access local memory
    shared: int  # bytes per block; for CUDA kernels the static part
    warps: int | None = None
    loads: dict[int, int] = field(default_factory=dict)  # width in bits -> instructions that load global memory
    stores: dict[int, int] = field(default_factory=dict)
    atomics: int = 0
    shuffles: int = 0
    barriers: int = 0
    issued: float | None = None  # instructions per 128-bit load of global memory, in the innermost loop with the fewest
    unguarded: int = 0  # Triton: single bytes stored with no barrier ahead in their basic block of PTX
    approximations: int = 0  # Triton: quotients and roots of PTX that are not rounded to the nearest


# ---- reading a cubin -------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"\b(LDG|LD|STG|ST|LDL|STL|LDGSTS|RED|REDG|ATOM|ATOMG|SHFL|REDUX|BAR)((?:\.[A-Z0-9_]+)*)\s", re.ASCII
)
_WIDTH = re.compile(r"[US]?(8|16|32|64|128|256)")
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")


def _tool(name: str) -> str:
    """A disassembler, from the toolkit if it is complete, else from Triton's package."""
    places = [home / "bin" for home in _toolkits()]
    if (spec := find_spec("triton")) is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / name).exists():
            return str(place / name)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, places))}, nor on the PATH")
    return found


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _memory(sass: str) -> dict[str, Counter]:
    found: dict[str, Counter] = {}
    for name, modifiers in _INSTRUCTION.findall(sass):
        width = next((int(m[1]) for part in modifiers.split(".") if (m := _WIDTH.fullmatch(part))), 32)
        found.setdefault(name, Counter())[width] += 1
    return found


def _issued(sass: str) -> float | None:
    """What bounds a kernel besides the memory: in the time in which an H200 moves 16 bytes (4.8 TB/s), its 132
    multiprocessors issue 99 instructions (four warps each, at 1.755 GHz): 12 per element of bf16 that is read only."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", line):
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(instructions) + 1))
            instructions.append(instruction[1])
    found = []
    for begin, end in loops:
        if any(begin <= first and last <= end and (first, last) != (begin, end) for first, last in loops):
            continue
        wide = sum(bool(re.search(r"\bLDG\.\S*\b128\b", text)) for text in instructions[begin:end])
        found += [(end - begin) / wide] if wide else []
    return min(found, default=None)


def cubin_facts(path: Path | str, arch: int) -> list[Facts]:
    """The facts of every kernel in a cubin file."""
    usage = output(_tool("cuobjdump"), "-res-usage", str(path))
    sections = {}
    for part in output(_tool("nvdisasm"), "-c", str(path)).split(".section\t.text.")[1:]:
        sections[re.match(r"[\w$.]+", part)[0]] = part
    out = []
    for name, text in re.findall(r"Function ([^\s:]+):\s*\n\s*(REG:.*)", usage):
        use = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        memory = _memory(sections.get(name, ""))

        def widths(names, memory=memory):
            return dict(sorted(sum((memory.get(n, Counter()) for n in names), Counter()).items()))

        def count(*names, memory=memory):
            return sum(memory.get(n, Counter()).total() for n in names)

        out.append(
            Facts(
                kernel=name,
                arch=arch,
                registers=use["REG"],
                stack=use["STACK"],
                spills=count("LDL", "STL"),
                shared=use["SHARED"],
                loads=widths(_GLOBAL_LOADS),
                stores=widths(_GLOBAL_STORES),
                atomics=count("RED", "REDG", "ATOM", "ATOMG"),
                shuffles=count("SHFL", "REDUX"),
                barriers=count("BAR"),
                issued=_issued(sections.get(name, "")),
            )
        )
    return out


def unguarded_bytes(ptx: str) -> int:
    count, guarded = 0, False
    for line in ptx.splitlines():
        if line.startswith("$L__BB") or re.search(r"\bbra(\.uni)?\b|\bld\.global\.b8\b", line):
            guarded = False
        elif "bar.sync" in line:
            guarded = True
        elif re.search(r"\bst\.global\.b8\b", line):
            count += not guarded
    return count


# ---- Triton ----------------------------------------------------------------------------------------------


def triton_missing() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    return None


def launch_facts(*references: str, architectures: Iterable[int] = ARCHITECTURES) -> dict[str, list[Facts]]:
    """For each reference ("module:function" or "module:function:argument"): the facts of all launches it makes.

    One entry per launch and architecture, in the order of the launches.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    request = json.dumps({"references": references, "architectures": list(architectures)})
    done = subprocess.run(
        [sys.executable, "-m", "tests.proving.cubin"],
        input=request, capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling the launches of {', '.join(references)} failed:\n{done.stderr[-6000:]}")
    answer = json.loads(done.stdout.rpartition("\n\x1e")[2])
    return {reference: [_from_json(item) for item in items] for reference, items in answer.items()}


def _from_json(item: dict) -> Facts:
    for name in ("loads", "stores"):
        item[name] = {int(width): count for width, count in item[name].items()}
    return Facts(**item)


def call_reference(reference: str, *arguments: str) -> None:
    """Calls "module:function" with `arguments`; one may stand in the reference, "module:function:argument"."""
    module, name, *first = reference.split(":", 2)
    getattr(import_module(module), name)(*first, *arguments)


def offline_driver(arch: int) -> object:
    """For Triton, a GPU of the given compute capability that has no memory and runs nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class OfflineDriver(DriverBase):
        def __init__(self, arch):
            self.arch, self.binary_ext = arch, "cubin"

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self):
            return self.arch  # jit functions cache what they compiled per device

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=0):
            return 0

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            return None

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_empty_cache_for_benchmark(self):
            return None

        def clear_cache(self, cache):
            pass

    return OfflineDriver(arch)


def _record_launches(references: list[str], architectures: list[int]) -> dict[str, list[dict]]:
    """Runs in the fresh process: compiles instead of launching."""
    import triton
    from triton.runtime import autotuner, jit

    drivers = [offline_driver(arch) for arch in architectures]
    found: list[Facts] = []
    old_run = jit.JITFunction.run

    def run(self, *args, grid, warmup=False, **kwargs):
        for driver in drivers:
            triton.runtime.driver.set_active(driver)
            kernel = old_run(self, *args, grid=grid, warmup=True, **kwargs)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                (facts,) = cubin_facts(file.name, driver.arch)
            facts.shared, facts.warps = kernel.metadata.shared, kernel.metadata.num_warps
            facts.unguarded = unguarded_bytes(kernel.asm["ptx"])
            facts.approximations = len(re.findall(r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt)", kernel.asm["ptx"]))
            found.append(facts)

    def run_every_config(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    jit.JITFunction.run = run
    autotuner.Autotuner.run = run_every_config
    triton.runtime.driver.set_active(drivers[0])
    out = {}
    for reference in references:
        found.clear()
        call_reference(reference)
        out[reference] = [asdict(facts) for facts in found]
    return out


# ---- CUDA ------------------------------------------------------------------------------------------------


def _toolkits() -> list[Path]:
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return [Path(place) for place in places if place]


def cuda_home() -> Path:
    """The CUDA toolkit: $CUDA_HOME, $CUDA_PATH or /usr/local/cuda, whichever first has an nvcc."""
    for home in _toolkits():
        if (home / "bin" / "nvcc").exists():
            return home
    raise FileNotFoundError("no nvcc in CUDA_HOME, CUDA_PATH or /usr/local/cuda")


def nvcc_missing() -> str | None:
    """Why CUDA kernels cannot be compiled here, or None."""
    try:
        cuda_home()
        _tool("nvdisasm")
    except FileNotFoundError as error:
        return str(error)
    if shutil.which("g++") is None:
        return "nvcc needs g++, which is not on the PATH"
    return None


def nvcc_facts(
    source: Path | str, architectures: Iterable[int] = ARCHITECTURES, flags: Iterable[str] = ()
) -> list[Facts]:
    """The facts of every kernel in a .cu file, compiled with the flags of setup.py, per architecture."""
    nvcc = cuda_home() / "bin" / "nvcc"

    def compile_for(arch: int) -> list[Facts]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / f"{arch}.cubin"
            output(str(nvcc), "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++20", "--expt-relaxed-constexpr",
                    f"-I{ROOT / 'csrc'}", *flags, "-o", str(cubin), str(source))  # fmt: skip
            return cubin_facts(cubin, arch)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        per_arch = list(pool.map(compile_for, architectures))
    everything = [facts for found in per_arch for facts in found]
    if shutil.which("c++filt"):
        names = output("c++filt", *(facts.kernel for facts in everything)).splitlines() if everything else []
        for facts, name in zip(everything, names):
            facts.kernel = short(name)
    return everything


def short(name: str) -> str:
    """A demangled kernel's name without return type, namespaces and parameters."""
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            end = i
            break
    return re.sub(r"\b(?:\w+::)+", "", name[:end])


if __name__ == "__main__":
    request = json.load(sys.stdin)
    answer = _record_launches(request["references"], request["architectures"])
    print("\n\x1e" + json.dumps(answer))
