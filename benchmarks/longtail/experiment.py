"""Runs families of methods, a method and what starts from it, one after another or in processes of their own."""

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastreg import row_norms
from fastreg.longtail import split_accuracy

from . import data, training
from .methods import METHODS, Method
from .progress import progress

GROUPS = ("all", "many", "medium", "few")


@dataclass(frozen=True)
class Setting:
    """All that a worker process needs to know."""

    data: str
    root: Path | None
    imbalance: float
    epochs: int
    device: str
    judged_on: str  # "test" or "validation"
    methods: tuple[str, ...]  # that are reported

    def load(self) -> data.LongTailed:
        return data.load(self.data, self.root, self.imbalance).to(torch.device(self.device))


@dataclass
class Rows:
    """Rows of the three CSV files."""

    results: list[dict[str, str]] = field(default_factory=list)
    classes: list[dict[str, str]] = field(default_factory=list)
    curves: list[dict[str, str]] = field(default_factory=list)


def families(names: tuple[str, ...]) -> list[list[Method]]:
    """The methods of those names, each behind the one that it starts from."""
    members: dict[str, list[Method]] = {}
    for method in METHODS:
        members.setdefault(method.start or method.name, []).append(method)
    return [
        [method for method in family if method.name in names or method.name == first]
        for first, family in members.items()
        if any(method.name in names for method in family)
    ]


def run_family(
    setting: Setting, images: data.LongTailed, family: list[Method], seed: int, advance: Callable[[str], None]
) -> Rows:
    rows, done = Rows(), {}
    part = getattr(images, setting.judged_on)
    for method in family:
        step = partial(advance, f"seed {seed}: {method.title}")
        trained = training.run(method, done, images, seed=seed, epochs=setting.epochs, step=step)
        done[method.name] = trained
        if method.name not in setting.methods:
            continue
        mark = {"method": method.name, "seed": str(seed)}
        predicted = {name: training.predict(net, part.pixels) for name, net in trained.nets.items()}
        rows.results += [mark | row for row in judge(trained, predicted, part, images)]
        rows.classes += [mark | row for row in by_class(trained, predicted["last"], part, images)]
        for epoch, loss, accuracy in trained.curve:
            rows.curves.append(
                mark | {"epoch": str(epoch), "training_loss": f"{loss:.5f}", "validation_accuracy": f"{accuracy:.4f}"}
            )
    return rows


def judge(
    trained: training.Trained, predicted: dict[str, Tensor], part: data.Images, images: data.LongTailed
) -> Iterator[dict[str, str]]:
    """Accuracy per group of classes, for each kind of weights."""
    many, few = images.groups
    for weights, classes in predicted.items():
        accuracy = split_accuracy(classes, part.classes, images.counts, many=many, few=few)
        shares = {group: f"{float(accuracy[group]):.4f}" for group in GROUPS}
        counted = {"projected_rows": str(trained.projected), "projectable_rows": str(trained.projectable)}
        yield {"weights": weights} | shares | counted


def by_class(
    trained: training.Trained, predicted: Tensor, part: data.Images, images: data.LongTailed
) -> Iterator[dict[str, str]]:
    """Weight norm and accuracy of each class, with the last weights."""
    norms = row_norms(trained.nets["last"].classifier.weight.detach())
    for index, count in enumerate(images.counts.tolist()):
        right = predicted[part.classes == index] == index
        yield {
            "class": str(index),
            "train_count": str(count),
            "weight_norm": f"{norms[index].item():.5f}",
            "accuracy": f"{right.double().mean().item():.4f}",
        }


def run_all(setting: Setting, images: data.LongTailed, seeds: int, jobs: int) -> Rows:
    """Every family with every seed, `jobs` of them at a time; the results do not depend on `jobs`."""
    tasks = [(family, seed) for seed in range(seeds) for family in families(setting.methods)]
    steps = sum(training.steps_of(method, images, setting.epochs) for family, _ in tasks for method in family)
    with progress(steps) as advance:
        if jobs == 1:
            parts = [run_family(setting, images, family, seed, advance) for family, seed in tasks]
        else:
            parts = run_in_processes(setting, tasks, jobs, advance)
    rows = Rows()
    for part in parts:
        rows.results += part.results
        rows.classes += part.classes
        rows.curves += part.curves
    order = [method.name for method in METHODS]
    for kind in (rows.results, rows.classes, rows.curves):
        kind.sort(key=lambda row: (int(row["seed"]), order.index(row["method"])))
    return rows


def run_in_processes(
    setting: Setting, tasks: list[tuple[list[Method], int]], jobs: int, advance: Callable[[str], None]
) -> list[Rows]:
    """Small networks gain nothing from a second thread, and all from a second process."""
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    with ProcessPoolExecutor(min(jobs, len(tasks)), context, start_worker, (setting, steps)) as pool:
        # By names, since a method holds functions that cannot be sent.
        futures = [pool.submit(work, [method.name for method in family], seed) for family, seed in tasks]
        while wait(futures, timeout=0.1).not_done:
            if any(future.done() and future.exception() for future in futures):
                pool.shutdown(cancel_futures=True)
                break
            drain(steps, advance)
        drain(steps, advance)
        return [future.result() for future in futures]


def drain(steps: multiprocessing.Queue, advance: Callable[[str], None]) -> None:
    while True:
        try:
            advance(steps.get_nowait())
        except queue.Empty:
            return


def start_worker(setting: Setting, steps: multiprocessing.Queue) -> None:
    global worker
    torch.set_num_threads(1)
    parent = os.getppid()

    def advance(label: str) -> None:
        if os.getppid() != parent:  # it was killed, so that nobody waits for this worker any more
            os._exit(1)
        steps.put(label)

    worker = (setting, setting.load(), advance)


def work(names: list[str], seed: int) -> Rows:
    setting, images, advance = worker
    return run_family(setting, images, [method for method in METHODS if method.name in names], seed, advance)
