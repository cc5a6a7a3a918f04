"""`python -m benchmarks`: fastreg beside its peers, on this machine."""

import argparse
import importlib
import pkgutil
from pathlib import Path

import torch

import benchmarks

from . import report
from .timing import Bench, measure_case


def benches() -> dict[str, Bench]:
    """Every op's benchmark, by name, from the files `bench_*.py`."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name.startswith("bench_"):
            contents = vars(importlib.import_module(f"benchmarks.{module.name}"))
            found |= {value.op: value for value in contents.values() if isinstance(value, Bench)}
    return found


def main(arguments: list[str] | None = None) -> None:
    known = benches()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=known, default=list(known), metavar="OP", help=", ".join(known))
    parser.add_argument("--case", nargs="+", help="only these cases")
    parser.add_argument("--dtype", nargs="+", help="only these, for example float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds, no torch.compile")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for <op>.csv and <op>.png")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    print(f"{report.device_name(options.device)}, {options.threads} CPU thread(s)\n{report.versions()}")

    everything = []
    for op in options.op:
        bench, rows, path = known[op], [], options.out / f"{op}.csv"
        for case in bench.cases if not options.quick or options.case else bench.quick:
            for dtype in bench.dtypes:
                wanted = (not options.case or case in options.case) and (
                    not options.dtype or str(dtype).removeprefix("torch.") in options.dtype
                )
                if wanted:
                    result = measure_case(bench, case, dtype, options.device, quick=options.quick)
                    rows += (new := report.rows_of(op, case, dtype, options.device, result))
                    report.show_case(new)
                    merged = report.merge(path, new)  # case by case, so that a run cut short keeps what it has
        if rows:
            print()
            report.show_left_out(rows)
            print(f"{path}; {report.plot(path.with_suffix('.png'), merged)}")
            everything += rows
    report.show_losses(everything)


if __name__ == "__main__":
    main()
