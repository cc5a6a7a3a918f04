"""Choosing a backend: automatic choice falls back and can say why, a forced one serves or fails with the reason."""

import ast
import os
import subprocess
import sys
from pathlib import Path

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


def test_the_table_may_be_read_in_part():
    """As `python -m fastreg | head -1` does."""
    program = [sys.executable, "-m", "fastreg"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as told:
        told.stdout.close()
        assert told.stderr.read() == ""


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


# ---- older Tritons ---------------------------------------------------------------------------------------------


def _refused_by_triton_3_6(function: ast.FunctionDef) -> list[str]:
    """What the Triton of torch 2.11 does not compile, though later ones do."""
    empty, found = set(), []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            if len(node.targets) > 1:
                found.append(f"line {node.lineno}: a = b = c")
            names, values = (x.elts if isinstance(x, ast.Tuple) else [x] for x in (node.targets[0], node.value))
            if len(names) == len(values):
                empty |= {n.id for n, v in zip(names, values) if isinstance(v, ast.Constant) and v.value is None}
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            for value in values:
                if getattr(value, "value", 0) is None or getattr(value, "id", None) in empty:
                    found.append(f"line {node.lineno}: returns None")
    return sorted(found)


def test_kernels_keep_to_the_oldest_triton():
    planted = ast.parse("def f(x):\n    y = None\n    a = b = x\n    if x:\n        return y, a\n    return None").body[
        0
    ]
    assert _refused_by_triton_3_6(planted) == ["line 3: a = b = c", "line 5: returns None", "line 6: returns None"]
    for path in sorted((Path(fastreg.__file__).parents[1] / "tritonkernels").glob("*.py")):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.decorator_list:
                assert not _refused_by_triton_3_6(function), (path.name, function.name)
