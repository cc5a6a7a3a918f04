"""The benchmark driver: what it records, what it refuses, what it says."""

import csv
import os
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import fastreg
from benchmarks import report
from benchmarks.__main__ import benches, main
from benchmarks.timing import Bench, LeftOut, Run, differentiable, measure_case, nbytes, other_load


def tiny_bench() -> Bench:
    bench = Bench("tiny", {"8x4": (8, 4)}, dtypes=(torch.float32,), registry="cross_entropy")

    @bench.inputs
    def inputs(shape, dtype, device):
        logits = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        return SimpleNamespace(logits=logits, target=torch.arange(8, device=device) % 4)

    @bench.bytes
    def least_bytes(data):
        return {"forward": nbytes(data.logits), "backward": 2 * nbytes(data.logits)}

    @bench.ours
    def ours(data):
        return differentiable(lambda: fastreg.cross_entropy(data.logits, data.target), data.logits)

    @bench.peer("torch eager")
    def eager(data):
        return differentiable(lambda: F.cross_entropy(data.logits, data.target), data.logits)

    return bench


def test_every_declared_benchmark_is_complete():
    for bench in benches().values():
        assert bench.registry in fastreg.backends() or bench.op == "flood"  # which is plain PyTorch
        assert set(bench.quick) <= set(bench.cases)
        assert bench.peers and bench._ours and bench._inputs and bench._bytes


def test_driver_writes_the_schema_and_names_the_peers(tmp_path, capsys):
    main(["--op", "cross_entropy", "--quick", "--case", "32x10", "--device", "cpu", "--out", str(tmp_path)])
    with (tmp_path / "cross_entropy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    measured = {(row["dtype"], row["provider"], row["mode"]) for row in rows if row["median_us"]}
    for dtype in ("float32", "bfloat16"):
        for mode in ("forward", "backward", "both"):
            assert (dtype, "torch eager", mode) in measured
            assert (dtype, "fastreg reference", mode) in measured
    for row in rows:
        if row["median_us"]:
            assert float(row["q20_us"]) <= float(row["median_us"]) <= float(row["q80_us"])
            assert row["fastest_peer"] == "torch eager"
            assert row["device"] and row["versions"] and row["timestamp"] and row["contended"] in ("yes", "no")
            logits = 32 * 10 * (4 if row["dtype"] == "float32" else 2)
            least = {"forward": 1, "backward": 2, "both": 3}[row["mode"]] * logits
            # Both columns are rounded to a thousandth.
            assert float(row["gb_per_s"]) == pytest.approx(least / float(row["median_us"]) / 1e3, rel=1e-2, abs=6e-4)
        elif row["provider"] != "copy":
            assert row["note"], "a provider without numbers says why"
    if find_spec("matplotlib"):
        assert (tmp_path / "cross_entropy.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "left out: liger-kernel: runs on cuda only" in said
    assert "behind the fastest peer in" in said


def test_results_of_the_same_case_are_replaced_and_others_kept(tmp_path):
    row = dict.fromkeys(report.COLUMNS, "x")
    path = tmp_path / "op.csv"
    report.merge(path, [row | {"case": "a", "median_us": "1"}, row | {"case": "b", "median_us": "2"}])
    merged = report.merge(path, [row | {"case": "a", "median_us": "3"}])
    assert {(one["case"], one["median_us"]) for one in merged} == {("a", "3"), ("b", "2")}
    assert merged == report.load(path)


def test_a_peer_that_computes_something_else_is_left_out():
    bench = tiny_bench()

    @bench.peer("wrong")
    def wrong(data):
        return differentiable(lambda: 2 * F.cross_entropy(data.logits, data.target), data.logits)

    @bench.peer("broken")
    def broken(data):
        raise RuntimeError("no such kernel\nand a long trace")

    @bench.peer("unwilling")
    def unwilling(data):
        raise LeftOut("even row counts only")

    @bench.peer("absent", needs="a_module_that_is_not_there")
    def absent(data):
        raise AssertionError

    result = measure_case(bench, "8x4", torch.float32, "cpu", quick=True)
    assert "differs from the first peer's" in result.left_out["wrong"]
    assert result.left_out["broken"] == "failed: RuntimeError: no such kernel"
    assert result.left_out["unwilling"] == "even row counts only"
    assert result.left_out["absent"] == "a_module_that_is_not_there is not installed"
    assert {task.provider for task in result.measured} >= {"torch eager", "fastreg reference"}


def test_before_runs_ahead_of_every_timed_call_and_is_not_timed():
    bench = Bench("slow reset", {"only": None}, dtypes=(torch.float32,), registry="cross_entropy", compare=False)
    state = SimpleNamespace(ready=False, tensor=torch.zeros(4))
    bench.inputs(lambda case, dtype, device: state)
    bench.bytes(lambda data: {"update": nbytes(data.tensor)})

    def reset():
        time.sleep(1e-4)
        state.ready = True

    def update():
        assert state.ready, "called without its reset"
        state.ready = False

    bench.ours(lambda data: {"update": Run(update, before=reset)})
    bench.peer("peer")(lambda data: {"update": Run(update, before=reset)})
    result = measure_case(bench, "only", torch.float32, "cpu", quick=True)
    assert {task.provider for task in result.measured} >= {"peer", "fastreg reference"}
    assert all(task.median < 5e-5 for task in result.measured)


def test_peak_memory_is_what_the_call_holds_at_once():
    bench = tiny_bench()

    @bench.peer("hungry")
    def hungry(data):
        def call():
            first = torch.zeros(1 << 18)
            del first
            return F.cross_entropy(data.logits, data.target) + torch.zeros(1 << 16).sum()

        return differentiable(call, data.logits)

    result = measure_case(bench, "8x4", torch.float32, "cpu", quick=True)
    peak = {(task.provider, task.mode): task.peak_bytes for task in result.measured}
    assert 1 << 20 <= peak["hungry", "forward"] < (1 << 20) + (1 << 14)
    assert peak["torch eager", "forward"] < 1 << 14


def test_own_work_is_not_taken_for_other_load():
    with other_load() as load:
        started, own = time.perf_counter(), time.process_time()
        while time.perf_counter() - started < 0.3:
            torch.randn(1000).exp()
        own = (time.process_time() - own) / (time.perf_counter() - started)
    # Whatever else runs on the machine, the share this process had of it is not counted; the slack is clock ticks.
    assert load.busy <= os.cpu_count() - own + 0.1
