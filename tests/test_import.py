"""`import fastreg` stays light: no triton, no CUDA, no compiler stack."""

import subprocess
import sys

import pytest


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["triton", "torch._dynamo", "torch._inductor", "matplotlib"])
def test_import_does_not_pull_in(module):
    before = python(f"import sys, torch; print({module!r} in sys.modules)")
    after = python(f"import sys, fastreg; print({module!r} in sys.modules)")
    assert before == after == "False\n"


def test_import_does_not_initialise_cuda():
    assert python("import torch, fastreg; print(torch.cuda.is_initialized())") == "False\n"


def test_works_with_triton_blocked():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, fastreg;"
        "print(fastreg.backends()['cross_entropy']['triton']);"
        "fastreg.cross_entropy(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))"
    )
    assert "triton is not installed" in python(program)


def test_works_with_the_native_kernels_blocked():
    program = (
        "import sys; sys.modules['fastreg._C_cpu'] = None; import torch, fastreg;"
        "print(fastreg.backends()['cross_entropy']['cpu']);"
        "x = torch.randn(4, 3); y = torch.tensor([0, 1, 2, 0]);"
        "torch.testing.assert_close(fastreg.cross_entropy(x, y), torch.nn.functional.cross_entropy(x, y))"
    )
    python(program)
