"""The three pictures, drawn from the same rows that the CSV files hold."""

import importlib.util
from pathlib import Path
from statistics import mean

from .methods import BY_NAME, PANELS

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")

Rows = list[dict[str, str]]


def draw(folder: Path, classes: Rows, curves: Rows) -> str:
    """Draws what can be drawn into `folder`; returns in words what it did."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots: matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9}
    names = []
    for name, figure in (
        ("weight_norms", weight_norms(pyplot, classes)),
        ("class_accuracy", class_accuracy(pyplot, classes)),
        ("training_curves", training_curves(pyplot, curves)),
    ):
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
            pyplot.close(figure)
            names.append(f"{name}.png")
    return f"plots: {', '.join(names)}" if names else "no plots: nothing was trained"


def methods_in(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def per_class(rows: Rows, method: str, column: str) -> list[float]:
    """Means over the seeds, classes by falling frequency."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            values.setdefault(int(row["class"]), []).append(float(row[column]))
    return [mean(values[index]) for index in sorted(values)]


def grid(pyplot, count: int, columns: int, width: float, height: float, **options):
    lines = -(-count // columns)
    size = (width * columns, height * lines + 0.5)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for panel in panels.flat[count:]:
        panel.set_visible(False)
    return figure, panels


def weight_norms(pyplot, rows: Rows):
    """First line: the five panels of the article. Below: the other methods."""
    present = methods_in(rows)
    order = [name for name in PANELS if name in present] + [name for name in present if name not in PANELS]
    if not order:
        return None
    figure, panels = grid(pyplot, len(order), 5, 2.6, 2.1)
    for panel, method in zip(panels.flat, order):
        norms = per_class(rows, method, "weight_norm")
        panel.bar(range(len(norms)), norms, color=COLOURS[0] if method in PANELS else COLOURS[7], width=0.85)
        panel.set_title(BY_NAME[method].title)
        panel.set_ylim(0, 1.15 * max(norms))
        few_ticks(panel, len(norms))
    figure.suptitle("Norm of each class's classifier weights (blue: the article's five; each panel has its own scale)")
    figure.supxlabel("class, from frequent to rare")
    figure.supylabel("weight norm")
    return figure


def class_accuracy(pyplot, rows: Rows):
    order = methods_in(rows)
    if not order:
        return None
    baseline = per_class(rows, "ce", "accuracy") if "ce" in order else None
    counts = per_class(rows, order[0], "train_count")
    figure, panels = grid(pyplot, len(order), 5, 2.6, 2.1, sharey=True)
    for panel, method in zip(panels.flat, order):
        accuracy = per_class(rows, method, "accuracy")
        panel.bar(range(len(accuracy)), accuracy, color=COLOURS[2], width=0.85)
        if baseline and method != "ce":
            panel.step([i - 0.5 for i in range(len(baseline) + 1)], [*baseline, baseline[-1]], where="post",
                       color="black", linewidth=1)  # fmt: skip
        panel.set_title(BY_NAME[method].title)
        panel.set_ylim(0, 1)
        few_ticks(panel, len(accuracy))
    figure.suptitle(f"Accuracy per class ({counts[0]:g} to {counts[-1]:g} training images); black line: cross-entropy")
    figure.supxlabel("class, from frequent to rare")
    figure.supylabel("accuracy")
    return figure


def few_ticks(panel, count: int) -> None:
    panel.set_xticks(range(0, count, max(1, count // 10)))
    panel.tick_params(labelsize=7)


def training_curves(pyplot, rows: Rows):
    order = methods_in(rows)
    if not order:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, method in enumerate(order):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--")[index // len(COLOURS)]}
        for panel, column in zip(panels, ("training_loss", "validation_accuracy")):
            values: dict[int, list[float]] = {}
            for row in rows:
                if row["method"] == method:
                    values.setdefault(int(row["epoch"]), []).append(float(row[column]))
            panel.plot(
                list(values),
                [mean(column) for column in values.values()],
                marker=".",
                label=BY_NAME[method].title,
                **style,
            )
    panels[0].set_yscale("log")
    for panel, title in zip(panels, ("training loss (each method's own)", "validation accuracy")):
        panel.set_title(title)
        panel.set_xlabel("epoch (of the second stage, where there are two)")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure
