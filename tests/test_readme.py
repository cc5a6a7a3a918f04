"""README tells the truth: its Python snippets run, its commands exist, its table of backends is today's, its times are
those of the committed results."""

import csv
import doctest
import importlib
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import fastreg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, capsys):
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


@pytest.mark.parametrize("name", ["max_norm", "penalties"])
def test_examples_in_docstrings_run(name):
    model = nn.Sequential(OrderedDict(emb=nn.Embedding(5, 4), fc=nn.Linear(4, 3)))
    given = {
        "fastreg": fastreg,
        "model": model,
        "x": torch.tensor([0, 2, 4]),
        "loss": lambda output: fastreg.cross_entropy(output, torch.tensor([0, 1, 2])),
        "fgm": fastreg.FGM(model),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    module = importlib.import_module(f"fastreg.{name}")
    tried = doctest.testmod(module, extraglobs=given, optionflags=doctest.ELLIPSIS)
    assert tried.attempted > 0 and tried.failed == 0


def test_every_named_file_exists():
    for name in set(re.findall(r"`((?:csrc|fastreg|tritonkernels|tests|benchmarks)/[\w./]+)`", README)):
        assert (ROOT / name).exists(), name


def test_every_named_module_exists():
    for name in set(re.findall(r"python -m ([\w.]+)", README)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_table_of_ops_names_every_registered_op_and_its_backends():
    """One row per op: | `op` | reference | cpu | cuda | triton | …; a tick says that a kernel exists."""
    from fastreg import _backends

    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|((?:[^|\n]*\|){4})", README, re.MULTILINE))
    for op, kernels in _backends._kernels.items():
        assert op in rows, f"README has no row for {op}"
        ticks = [cell.strip() for cell in rows[op].split("|")[:4]]
        said = tuple(backend for backend, tick in zip(_backends.BACKENDS, ticks) if tick == "✓")
        assert said == ("reference", *(b for b in _backends.BACKENDS if b in kernels)), op


def times_of_readme() -> list[tuple[str, ...]]:
    """(op, case, time, unit, speed-up, fastest peer) of each row."""
    number = r"([\d.]+)"
    return re.findall(rf"^\| (\w+) \| (.+?) \| {number} (µs|ms|s) \| {number} \| (.+?) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("row", times_of_readme(), ids=lambda row: f"{row[0]} {row[1]}")
def test_times_are_those_of_the_committed_results(row):
    op, case, time, unit, speedup, peer = row
    with (ROOT / "benchmarks" / "results" / "cpu" / f"{op}.csv").open(newline="") as file:
        rows = [
            r for r in csv.DictReader(file) if (r["case"], r["dtype"], r["provider"]) == (case, "float32", "fastreg")
        ]
    measured = next(r for mode in ("both", "forward") for r in rows if r["mode"] == mode)
    scale = {"µs": 1, "ms": 1e3, "s": 1e6}[unit]

    def is_rounded(shown: str, value: float) -> bool:
        digits = len(shown.partition(".")[2])
        return abs(float(shown) - value) <= 0.5001 * 10**-digits

    assert is_rounded(time, float(measured["median_us"]) / scale), measured["median_us"]
    assert is_rounded(speedup, float(measured["speedup"])), measured["speedup"]
    assert peer == measured["fastest_peer"]
    assert measured["threads"] == "1" and measured["contended"] == "no"


def test_a_time_stands_in_the_table():
    assert len(times_of_readme()) > 20
