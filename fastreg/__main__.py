"""`python -m fastreg`: what is installed, what was built, which backend can run which op, and why not."""

import argparse
import os
import platform
import sys
import textwrap

import torch

import fastreg

from . import _native, _ops


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not available ({error})"
    return triton.__version__


def summary() -> str:
    """One line: what of fastreg can run fast here."""
    parts = [f"{kind} kernels {_native.missing[kind] or 'built'}" for kind in ("cpu", "cuda")]
    return "fastreg: " + "; ".join([*parts, f"triton {_triton_version()}"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastreg", description=__doc__)
    parser.add_argument("--summary", action="store_true", help="print one line and no table")
    if parser.parse_args().summary:
        print(summary())
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "fastreg": f"{fastreg.__version__} in {os.path.dirname(fastreg.__file__)}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _triton_version(),
        "CUDA device": device,
    }
    outcome = _native.build_outcome()
    for kind in ("cpu", "cuda"):
        reason = _native.missing[kind]
        facts[f"{kind} kernels"] = reason or f"loaded, {outcome.get(kind, 'origin unknown')}"
    if _native.missing["cpu"] is None:
        facts["instruction set"] = _ops.CAPABILITIES[torch.ops.fastreg.cpu_capability()]
    for name, value in facts.items():
        print(f"{name:<16} {value}")

    print()
    table = fastreg.backends()
    reasons: dict[str, int] = {}
    print(f"{'op':<24}" + "".join(f"{backend:<12}" for backend in fastreg.BACKENDS))
    for op, row in table.items():
        cells = []
        for backend in fastreg.BACKENDS:
            text = row[backend]
            cells.append("yes" if text == "usable" else f"no [{reasons.setdefault(text, len(reasons) + 1)}]")
        print(f"{op:<24}" + "".join(f"{cell:<12}" for cell in cells))
    for text, number in reasons.items():
        print(textwrap.fill(f"[{number}] {text}", 110, subsequent_indent="    "))


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; nor shall Python complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
