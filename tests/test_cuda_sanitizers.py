"""Every CUDA kernel, compiled for the CPU, under AddressSanitizer and ThreadSanitizer. Each op's test_<op>_gpu.py says
in `cuda_calls` what is run."""

import pytest

from tests.machine import needs_sanitizers
from tests.proving import cudahost


@needs_sanitizers
@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "seed"), [("address", 0), ("thread", 0), ("thread", 1)])
@pytest.mark.parametrize("op", ["averaging", "group_norm", "losses", "max_norm", "noise", "penalties"])
def test_no_stray_access_and_no_race(op, sanitizer, seed):
    assert cudahost.run_sanitized(sanitizer, f"tests.test_{op}_gpu:cuda_calls", seed=seed) == ""
