"""What Triton's compiler makes of the kernels for sm_90, run on the CPU (tests/proving/ptx.py) by tests of their ops:
with the worst errors that PTX allows its approximations, and under TSan, which finds barriers that are not there."""

import subprocess
import sys

import pytest

from tests.machine import needs_cudahost, needs_ptxas, needs_sanitizers
from tests.proving import cudahost, ptx

TESTS = {
    "group_norm": ("tests/test_group_norm.py", "random_affine or mean_far or one_element or parameters_of_another"),
    "losses": ("tests/test_losses.py", "label_smoothing or confident_rows or test_outputs or takes_indices"),
    "max_norm": ("tests/test_max_norm.py", "one_row or rows_over or renorm_fails or ball_of_radius or tau"),
    "penalties": ("tests/test_penalties.py", "fgm_step or into_grad"),
    "noise": ("tests/test_noise.py", "soft_threshold or torchvision_s_draws"),
    "averaging": ("tests/test_averaging.py", "weight_one or mixed or swapped_restores or first_call"),
}
RACES = {
    "group_norm": ("tests/test_group_norm.py", "random_affine and dtype2-silu"),
    "losses": ("tests/test_losses.py", "in_the_place_of_wide and dtype0-1001"),
    "penalties": ("tests/test_penalties.py", "fgm_step and dtype0"),
    "averaging": ("tests/test_averaging.py", "first_call or (weight_one and float32)"),
}

pytestmark = [pytest.mark.slow, needs_ptxas, needs_cudahost]


def run(path: str, chosen: str, sanitizer: str = "") -> str:
    prefix, environment = cudahost.sanitized(sanitizer)
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [path, "-k", f"triton and ({chosen})"]
    environment[ptx.ARCHITECTURE] = "90"
    done = subprocess.run(command, cwd=cudahost.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("op", TESTS)
def test_values(op):
    assert " passed" in run(*TESTS[op])


@needs_sanitizers
@pytest.mark.parametrize("op", RACES)
def test_no_races(op):
    assert " passed" in run(*RACES[op], "thread")
