"""README tells the truth: its Python snippets run, its commands exist, its table of backends is today's."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, capsys):
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})


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
