"""`import fastreg` stays light: no triton, no CUDA, no compiler stack."""

import subprocess
import sys


def python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_import_stays_light():
    heavy = {"triton", "torch._dynamo", "torch._inductor", "matplotlib"}
    program = f"import sys, torch, fastreg; print({heavy} & set(sys.modules), torch.cuda.is_initialized())"
    assert python(program) == "set() False\n"


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
