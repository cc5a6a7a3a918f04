"""Prints what the compilers made of every kernel: `python -m tests.proving [--arch 90] [--only cross_entropy]`.

One line per kernel and architecture: registers, spill instructions, shared memory in bytes, instructions that load
and store global memory by width in bits, and the bytes that one element costs (loaded + stored) in the call named.
Which calls stand for which kernels is listed in catalog.py. The exit status is 1 if anything spills.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from . import cubin
from .catalog import CASES, Case
from .cubin import ARCHITECTURES, ROOT, Facts
from .traffic import traffic

HEADER = ("kernel", "call", "sm", "registers", "spills", "shared", "loads", "stores", "bytes/element")


def widths(counts: dict[int, int]) -> str:
    """{128: 4, 32: 1} -> "4×128 1×32"."""
    return " ".join(f"{count}×{width}" for width, count in sorted(counts.items(), reverse=True)) or "–"


def row(facts: Facts, call: str, bytes_per_element: str) -> tuple[str, ...]:
    numbers = (facts.arch, facts.registers, facts.spills, facts.shared)
    return (facts.kernel, call, *map(str, numbers), widths(facts.loads), widths(facts.stores), bytes_per_element)


def bytes_per_element(case: Case, backend: str) -> dict[str, str]:
    """Per kernel: what one element of the case's tensor costs, as "loaded + stored"."""
    with traffic() as log:
        elements = case.call(backend, *case.small).numel()
    out = {}
    for kernel in dict.fromkeys(log.kernels):
        launches = [launch for launch in log if launch.kernel == kernel]
        loaded = sum(launch.loaded for launch in launches) / elements
        stored = sum(launch.stored + launch.atomic for launch in launches) / elements
        out[kernel] = f"{loaded:.2f} + {stored:.2f}"
    return out


def triton_rows(cases: Iterable[Case], architectures: Iterable[int]) -> list[tuple[str, ...]]:
    references = {f"tests.proving.catalog:run:{case.name}": case for case in cases}
    found = cubin.launch_facts(*references, architectures=architectures) if references else {}
    rows = []
    for reference, case in references.items():
        cost = bytes_per_element(case, "triton")
        rows += [row(facts, case.name, cost.get(facts.kernel, "–")) for facts in found[reference]]
    return rows


def cuda_rows(cases: Iterable[Case], sources: Iterable[Path], architectures: Iterable[int]) -> list[tuple[str, ...]]:
    cost: dict[str, tuple[str, str]] = {}  # kernel -> the first call that launches it, and what it costs there
    for case in cases:
        for kernel, price in bytes_per_element(case, "cuda").items():
            cost.setdefault(kernel, (case.name, price))
    rows = []
    for source in sources:
        facts = sorted(cubin.nvcc_facts(source, architectures), key=lambda f: (f.kernel, f.arch))
        rows += [row(f, *cost.get(f.kernel, (source.name, "–"))) for f in facts]
    return rows


def show(rows: list[tuple[str, ...]]) -> None:
    lengths = [max(map(len, column)) for column in zip(HEADER, *rows)]
    for line in (HEADER, tuple("-" * length for length in lengths), *rows):
        print("  ".join(text.ljust(length) for text, length in zip(line, lengths)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.proving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, like 90")
    parser.add_argument("--only", default="", help="only calls (see catalog.py) and .cu files with this in their name")
    options = parser.parse_args(arguments)

    cases = [case for case in CASES if options.only in case.name]
    rows = []
    if (reason := cubin.triton_missing()) is None:
        os.environ["TRITON_INTERPRET"] = "1"
        from . import interpreter

        interpreter.mend()
        rows += triton_rows([case for case in cases if "triton" in case.backends], options.arch)
    else:
        print(f"Triton kernels left out: {reason}")
    if (reason := cubin.nvcc_missing()) is None:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        on_host = [case for case in cases if "cuda" in case.backends]
        sources = [source for source in sources if options.only in source.name or on_host]
        rows += cuda_rows(on_host, sources, options.arch)
    else:
        print(f"CUDA kernels left out: {reason}")
    show(rows)
    spilling = sorted({line[0] for line in rows if line[4] != "0"})
    if spilling:
        print(f"\nspilling: {', '.join(spilling)}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
