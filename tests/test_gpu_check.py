"""The run for machines with a GPU, on a machine without: its plumbing, and how it treats stages that go wrong."""

import csv
import sys
import time

import pytest
import torch

import fastreg
from benchmarks import gpu_check
from benchmarks.gpu_check import OPS, Stage, agree, main
from fastreg import _backends
from tests.conftest import leave_if_the_gpu_is_lost
from tests.machine import needs_interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_dry_run_writes_report_and_times(tmp_path):
    assert (
        main(["--dry-run", "--out", str(tmp_path), "--only", "machine", "timing cross_entropy", "memcheck cross"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "report.md", "results.csv"]
    report = (tmp_path / "report.md").read_text()
    for stage in ("machine", "timing cross_entropy", "memcheck cross_entropy reference"):
        assert f"| {stage} | ok |" in report
    assert "### cross_entropy: median µs" in report and "torch eager" in report
    with (tmp_path / "results.csv").open(newline="") as file:
        modes = {row["mode"] for row in csv.DictReader(file) if row["provider"] == "torch eager"}
    assert modes == {"forward", "backward", "both"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.slow  # it waits on the clock, which a busy machine upsets
def test_a_stage_that_fails_or_overruns_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    orphan = tmp_path / "orphan"
    # The overrunning stage starts a process of its own, which must end with it.
    child = f"import time; time.sleep(3); open({str(orphan)!r}, 'w')"
    overrun = [*python("import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"), child]
    todo = [
        Stage("good", 30, python("print('fine')")),
        Stage("bad", 30, python("raise SystemExit('broken kernel')")),
        Stage("slow", 1, overrun),
        Stage("deaf", 1, python("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)")),
        Stage("absent", 30, ["no-such-program"]),
        Stage("last", 30, python("import os; print(os.environ['COLOUR'])"), {"COLOUR": "blue"}),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda dry, scratch: todo)
    assert main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    assert [stage.outcome for stage in todo] == [
        "ok", "failed with exit status 1", "stopped after 1 s", "stopped after 1 s",
        "left out: no-such-program is not installed", "ok"
    ]  # fmt: skip
    report = (tmp_path / "out" / "report.md").read_text()
    assert "broken kernel" in report and "blue" in report
    assert "broken kernel" in (tmp_path / "out" / "log.txt").read_text()
    time.sleep(2.5)
    assert not orphan.exists()


def test_keeps_to_its_budget(tmp_path, monkeypatch):
    todo = [Stage("first", 60, python("import time; time.sleep(60)")), Stage("second", 60, python("pass"))]
    monkeypatch.setattr(gpu_check, "stages", lambda dry, scratch: todo)
    started = time.monotonic()
    assert main(["--dry-run", "--out", str(tmp_path), "--budget", "3"]) == 1
    assert time.monotonic() - started < 20
    assert todo[0].outcome == "stopped after 3 s" and todo[1].outcome == "left out: no time left"


@pytest.fixture
def no_copies_of_numbers(monkeypatch):
    """Within the library and the checks, torch.tensor(number, device="cuda") is an error: it copies from the host, and
    waits for that."""

    def guarded(make):
        def call(*args, **options):
            caller = sys._getframe(1).f_globals["__name__"]
            assert not caller.startswith(("fastreg", "tritonkernels", "benchmarks.gpu_check")), caller
            return make(*args, **options)

        return call

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, guarded(getattr(torch, name)))


def test_every_op_has_a_benchmark_and_calls_that_run_here(no_copies_of_numbers):
    from benchmarks.__main__ import benches

    for op, checked in OPS.items():
        assert op in benches() and checked.cases
        for ours, stock in checked.calls("cpu"):
            agree(ours(), stock())


def test_the_loss_of_a_linear_layer_copies_no_number(no_copies_of_numbers):
    x, weight = torch.randn(9, 5), torch.randn(4, 5)
    for target in (torch.randint(0, 4, (9,)), torch.rand(9, 4)):
        fastreg.linear_cross_entropy(x, weight, target, chunk_size=4)


@needs_interpreter
def test_no_default_device_gets_the_numbers_that_kernels_take():
    from tritonkernels.max_norm import _bits

    with torch.device("meta"):  # which, as a GPU, is not asked for a value
        assert _bits(1.0) == 0x3FF0000000000000


def test_stages_on_a_gpu(monkeypatch, tmp_path):
    """The commands that a machine with a GPU runs, in order, without running them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    stages = gpu_check.stages(False, tmp_path)
    names = [stage.name for stage in stages]
    tests = ["tests of every op", "tests of cuda", "tests of triton"]
    assert names[:6] == ["machine", "build", "backends", *tests]
    assert "timing cross_entropy 65536x10" in names and "racecheck cross_entropy triton" in names
    firsts = [f"timing {op} {next(iter(checked.cases))}" for op, checked in OPS.items()]
    assert names[6 : 6 + len(OPS)] == firsts
    for op in OPS:
        for backend in gpu_check.GPU_BACKENDS:
            assert (f"memcheck {op} {backend}" in names) == (backend in _backends._kernels[OPS[op].registry or op])
    build = stages[1].environment
    assert build["FASTREG_BUILD_CUDA"] == build["FASTREG_BUILD_CPU"] == "1" and build["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert sum(stage.limit for stage in stages[:6]) < gpu_check.BUDGET
    for stage in stages[3:6]:
        assert f"faulthandler_timeout={gpu_check.HANGS}" in stage.command and stage.limit >= gpu_check.HANGS


def test_a_lost_gpu_ends_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    leave_if_the_gpu_is_lost()

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        leave_if_the_gpu_is_lost()
