"""`python -m benchmarks.longtail`: the methods of fastreg on long-tailed images, side by side."""

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch

from .. import report
from . import data, plots, training
from .experiment import GROUPS, Setting, run_all
from .methods import BY_NAME, METHODS

EPOCHS = {"mnist5k": 30, "fashion-mnist": 4, "cifar10": 40, "cifar100": 40}
COLUMNS = (
    "data", "imbalance", "method", "weights", "seed", "evaluated_on", *GROUPS,
    "projected_rows", "projectable_rows", "epochs", "device", "versions", "commit", "timestamp",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.longtail", description=__doc__)
    parser.add_argument("--data", choices=data.SOURCES, default="mnist5k")
    parser.add_argument("--root", type=Path, help="folder of the data, where they are not bundled")
    parser.add_argument("--imbalance", type=float, default=100.0, help="images of the first class per one of the last")
    parser.add_argument("--methods", nargs="+", choices=BY_NAME, default=list(BY_NAME), metavar="METHOD",
                        help=", ".join(f"{method.name} ({method.title})" for method in METHODS))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--epochs", type=int, help="of training from scratch; a second stage takes half")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="processes at a time; by default one per CPU core, and one on a GPU")
    parser.add_argument("--validate", action="store_true", help="judge on the validation set: to choose settings")
    parser.add_argument("--out", type=Path, default=Path("out/longtail"), help="folder for CSV files and plots")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    setting = Setting(
        data=options.data,
        root=options.root,
        imbalance=options.imbalance,
        epochs=options.epochs or EPOCHS[options.data],
        device=options.device,
        judged_on="validation" if options.validate else "test",
        methods=tuple(options.methods),
    )
    device = report.device_name(torch.device(options.device).type)
    if options.jobs is None:
        options.jobs = torch.get_num_threads() if options.device == "cpu" else 1
    try:
        images = setting.load()
    except data.MissingData as missing:
        parser.exit(2, f"{parser.prog}: {missing}\n")
    print(
        f"{images.name}: {len(images.train)} training images, {images.counts[0]} to {images.counts[-1]} of a class; "
        f"{len(images.validation)} for validation, {len(images.test)} for the test, both balanced\n"
        f"{options.seeds} seed(s), {setting.epochs} epochs, {device}, {options.jobs} at a time"
    )
    rows = run_all(setting, images, options.seeds, options.jobs)

    common = {
        "data": images.name,
        "imbalance": f"{options.imbalance:g}",
        "evaluated_on": setting.judged_on,
        "epochs": str(setting.epochs),
        "device": device,
        "versions": report.versions(),
        "commit": report.commit(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows.results = [common | row for row in rows.results]
    report.save(options.out / "results.csv", rows.results, COLUMNS)
    for name, kind in (("classes", rows.classes), ("curves", rows.curves)):
        if kind:
            report.save(options.out / f"{name}.csv", kind, tuple(kind[0]))
    tables = summaries(rows.results, setting.judged_on)
    for table in tables:
        report.show_table(*table)
    (options.out / "table.md").write_text("\n".join(report.markdown(*table) for table in tables))
    drawn = plots.draw(options.out, rows.classes, rows.curves)
    print(f"\n{options.out}: table.md, results.csv, classes.csv, curves.csv; {drawn}")
    print(f"{time.perf_counter() - started:.0f} s")


def summaries(results: list[dict[str, str]], judged_on: str) -> list[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, header and rows of the two tables."""
    methods = list(dict.fromkeys(row["method"] for row in results))

    def cell(method: str, weights: str, group: str) -> str:
        values = [100 * float(r[group]) for r in results if (r["method"], r["weights"]) == (method, weights)]
        return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"

    def projected(method: str) -> str:
        rows = [row for row in results if (row["method"], row["weights"]) == (method, "last")]
        done, seen = (sum(int(row[name]) for row in rows) for name in ("projected_rows", "projectable_rows"))
        return f"{done} of {seen}" if seen else "-"

    groups = (
        f"Accuracy in % on the balanced {judged_on} set, last weights, mean ± standard deviation over the seeds",
        ("method", *GROUPS, "rows projected"),
        [[BY_NAME[m].title, *(cell(m, "last", group) for group in GROUPS), projected(m)] for m in methods],
    )
    averages = (
        "Accuracy over all classes with averaged weights of the same run",
        ("method", *training.WEIGHTS),
        [[BY_NAME[m].title, *(cell(m, weights, "all") for weights in training.WEIGHTS)] for m in methods],
    )
    return [groups, averages]


if __name__ == "__main__":
    main()
