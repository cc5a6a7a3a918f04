"""Choosing a backend: automatic choice falls back and can say why, a forced one serves or fails with the reason."""

import os
import subprocess
import sys

import pytest
import torch

import fastreg
from fastreg import _backends

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


def test_every_op_has_a_reference_and_every_no_has_a_reason():
    table = fastreg.backends()
    assert "cross_entropy" in table
    for op, row in table.items():
        assert tuple(row) == fastreg.BACKENDS
        assert row["reference"] == "usable", op
        assert all(row.values())


def test_unknown_name_is_refused():
    with (
        pytest.raises(ValueError, match="must be one of reference, cpu, cuda, triton, not 'gpu'"),
        fastreg.use_backend("gpu"),
    ):
        pass


def test_forced_backend_never_falls_back():
    with fastreg.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' is forced but cannot serve this call"):
        fastreg.cross_entropy(X, Y)


def test_force_ends_with_the_block_even_after_an_error():
    with pytest.raises(ZeroDivisionError), fastreg.use_backend("cuda"):
        raise ZeroDivisionError
    assert _backends._forced is None
    fastreg.cross_entropy(X, Y)


def test_blocks_nest():
    with fastreg.use_backend("cuda"):
        with fastreg.use_backend("reference"):
            fastreg.cross_entropy(X, Y)
        assert _backends._forced == "cuda"


@pytest.mark.parametrize(
    ("name", "answer"),
    [("reference", ""), ("cuda", "cannot serve this call"), ("nonsense", "FASTREG_BACKEND must be one of")],
)
def test_environment_variable(name, answer):
    program = "import torch, fastreg; fastreg.cross_entropy(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))"
    env = {**os.environ, "FASTREG_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == (not answer)
    assert answer in done.stderr


def test_choice_asks_in_order_and_explains(monkeypatch):
    monkeypatch.setitem(_backends._kernels, "probe", ("cpu", "cuda", "triton"))
    for backend in ("cpu", "cuda", "triton"):
        monkeypatch.setitem(_backends._missing, backend, None)
    asked = []

    def refuse(backend, size):
        asked.append(backend)
        return "too small" if size < 10 else None

    assert _backends.choose("probe", "cuda", refuse, 5) == "reference"
    assert asked == ["cuda", "triton"]
    assert _backends.choose("probe", "cuda", refuse, 50) == "cuda"
    assert _backends.choose("probe", "cpu", refuse, 50) == "cpu"
    assert _backends.choose("probe", "mps", refuse, 50) == "reference"
    why = _backends.explain("probe", "cuda", refuse, 5)
    assert why["reference"] == "usable" and why["cuda"] == why["triton"] == "too small" and "not cuda" in why["cpu"]


def test_command_line_table_names_every_reason():
    done = subprocess.run([sys.executable, "-m", "fastreg"], capture_output=True, text=True, check=True)
    for op in fastreg.backends():
        assert f"\n{op} " in done.stdout
    if "no [1]" in done.stdout:
        assert "\n[1] " in done.stdout


def test_command_line_summary_is_one_line():
    done = subprocess.run([sys.executable, "-m", "fastreg", "--summary"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
