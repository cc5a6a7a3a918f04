"""`python -m benchmarks.longtail`: the methods of fastreg on long-tailed images, side by side."""

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

from fastreg import row_norms
from fastreg.longtail import split_accuracy

from .. import report
from . import data, plots, training
from .methods import BY_NAME, METHODS, with_starts
from .progress import progress

GROUPS = ("all", "many", "medium", "few")
EPOCHS = {"mnist5k": 20, "fashion-mnist": 5, "cifar10": 40, "cifar100": 40}
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
    parser.add_argument("--validate", action="store_true", help="judge on the validation set: to choose settings")
    parser.add_argument("--out", type=Path, default=Path("out/longtail"), help="folder for CSV files and plots")
    options = parser.parse_args(arguments)
    try:
        images = data.load(options.data, options.root, options.imbalance).to(torch.device(options.device))
    except data.MissingData as missing:
        parser.exit(2, f"{parser.prog}: {missing}\n")
    epochs = options.epochs or EPOCHS[options.data]
    judged_on = "validation" if options.validate else "test"
    part = getattr(images, judged_on)
    print(
        f"{images.name}: {len(images.train)} training images, {images.counts[0]} to {images.counts[-1]} of a class; "
        f"{len(images.validation)} for validation, {len(images.test)} for the test, both balanced\n"
        f"{options.seeds} seed(s), {epochs} epochs, {report.device_name(images.train.pixels.device.type)}"
    )

    started = time.perf_counter()
    methods = with_starts(options.methods)
    results, classes, curves = [], [], []
    steps = options.seeds * sum(training.steps_of(method, images, epochs) for method in methods)
    with progress(steps) as advance:
        for seed in range(options.seeds):
            done: dict[str, training.Trained] = {}
            for method in methods:
                label = f"seed {seed}: {method.title}"
                trained = training.run(
                    method, done, images, seed=seed, epochs=epochs, step=lambda label=label: advance(label)
                )
                done[method.name] = trained
                if method.name in options.methods:
                    mark = {"method": method.name, "seed": str(seed)}
                    predicted = {name: training.predict(net, part.pixels) for name, net in trained.nets.items()}
                    results += [mark | row for row in judge(trained, predicted, part, images)]
                    classes += [mark | row for row in by_class(trained, predicted["last"], part, images)]
                    curves += [
                        mark
                        | {"epoch": str(epoch), "training_loss": f"{loss:.5f}", "validation_accuracy": f"{acc:.4f}"}
                        for epoch, loss, acc in trained.curve
                    ]

    common = {
        "data": images.name,
        "imbalance": f"{options.imbalance:g}",
        "evaluated_on": judged_on,
        "epochs": str(epochs),
        "device": report.device_name(images.train.pixels.device.type),
        "versions": report.versions(),
        "commit": report.commit(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    results = [common | row for row in results]
    report.save(options.out / "results.csv", results, COLUMNS)
    report.save(options.out / "classes.csv", classes, tuple(classes[0]))
    if curves:
        report.save(options.out / "curves.csv", curves, tuple(curves[0]))
    show(results, judged_on)
    print(f"\n{options.out}: results.csv, classes.csv, curves.csv; {plots.draw(options.out, classes, curves)}")
    print(f"{time.perf_counter() - started:.0f} s")


def judge(
    trained: training.Trained, predicted: dict[str, Tensor], part: data.Images, images: data.LongTailed
) -> list[dict[str, str]]:
    """Accuracy per group of classes, one row for each kind of weights."""
    many, few = images.groups
    rows = []
    for weights, classes in predicted.items():
        accuracy = split_accuracy(classes, part.classes, images.counts, many=many, few=few)
        shares = {group: f"{float(accuracy[group]):.4f}" for group in GROUPS}
        counted = {"projected_rows": str(trained.projected), "projectable_rows": str(trained.projectable)}
        rows.append({"weights": weights} | shares | counted)
    return rows


def by_class(
    trained: training.Trained, predicted: Tensor, part: data.Images, images: data.LongTailed
) -> list[dict[str, str]]:
    """Weight norm and accuracy of each class, with the last weights."""
    norms = row_norms(trained.nets["last"].classifier.weight.detach())
    return [
        {
            "class": str(index),
            "train_count": str(int(count)),
            "weight_norm": f"{norms[index].item():.5f}",
            "accuracy": f"{(predicted[part.classes == index] == index).double().mean().item():.4f}",
        }
        for index, count in enumerate(images.counts)
    ]


def show(results: list[dict[str, str]], judged_on: str) -> None:
    methods = list(dict.fromkeys(row["method"] for row in results))

    def cell(method: str, weights: str, group: str) -> str:
        values = [100 * float(r[group]) for r in results if (r["method"], r["weights"]) == (method, weights)]
        return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"

    def projected(method: str) -> str:
        rows = [row for row in results if (row["method"], row["weights"]) == (method, "last")]
        done, seen = (sum(int(row[name]) for row in rows) for name in ("projected_rows", "projectable_rows"))
        return f"{done} of {seen}" if seen else "-"

    report.show_table(
        f"Accuracy in % on the balanced {judged_on} set, last weights, mean ± standard deviation over the seeds",
        ("method", *GROUPS, "rows projected"),
        ([BY_NAME[m].title, *(cell(m, "last", group) for group in GROUPS), projected(m)] for m in methods),
    )
    report.show_table(
        "Accuracy over all classes with averaged weights of the same run",
        ("method", *training.WEIGHTS),
        ([BY_NAME[m].title, *(cell(m, weights, "all") for weights in training.WEIGHTS)] for m in methods),
    )


if __name__ == "__main__":
    main()
