"""`import fastreg` stays light: no triton, no CUDA, no compiler stack."""

import os
import subprocess
import sys

from tests.machine import needs_interpreter


def python(program: str, **environment: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


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


@needs_interpreter
def test_triton_kernels_run_in_the_interpreter_as_users_have_it():
    """Without what tests/proving adds to it."""
    program = """
import fastreg, torch
x, w, y = torch.randn(2, 8, 4, requires_grad=True), torch.randn(6, 7), torch.tensor([0, 1, 2, 0, 5, 6])
def calls():
    yield fastreg.group_norm(x, 2, activation="silu")
    yield fastreg.cross_entropy(w, y, label_smoothing=0.1)
    yield fastreg.max_norm_(w.clone(), 1.0)
    yield fastreg.lp_penalty([w])
    yield fastreg.soft_threshold(x, 0.1)
with fastreg.use_backend("triton"):
    found = list(calls())
with fastreg.use_backend("reference"):
    for one, other in zip(found, calls()):
        torch.testing.assert_close(one, other)
"""
    python(program, TRITON_INTERPRET="1", FASTREG_TEST_PTX="")
