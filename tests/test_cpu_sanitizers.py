"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by the tests of their ops."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastreg import _native

ROOT = Path(__file__).parent.parent
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=vptr"
TESTS = {
    "losses": ("tests/test_losses_cpu.py", "not instruction_set and not compiles"),
    "group_norm": ("tests/test_group_norm.py", "cpu and not triton and not compile"),
    "max_norm": ("tests/test_max_norm.py", "cpu and not triton and not compile and not sharded"),
    "penalties": ("tests/test_penalties.py", "cpu and not triton and not compile"),
    "noise": ("tests/test_noise.py", "not triton and not compile"),
    "averaging": ("tests/test_averaging.py", "cpu and not triton and not compile"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_native.missing["cpu"] is not None, reason=f"cpu kernels: {_native.missing['cpu']}"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the project with its CPU kernels built for the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized") / "fastreg"
    skip = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", ".git", ".venv", "build", "out", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=skip)
    env = {**os.environ, "FASTREG_BUILD_CPU": "1", "FASTREG_BUILD_CUDA": "0", "CXXFLAGS": f"-O1 -g {SANITIZE}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def library(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("op", TESTS)
def test_clean_under_sanitizers(checkout, op):
    env = {
        **os.environ,
        # The C++ library too, or the sanitizer does not find the throw that it intercepts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python and torch leave memory to the end of the process, and torch's containers are not instrumented.
        "ASAN_OPTIONS": "detect_leaks=0:detect_container_overflow=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "FASTREG_BACKEND": "",
    }
    path, chosen = TESTS[op]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, "-k", chosen]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-5000:])
    assert " passed" in done.stdout


def test_no_instruction_set_leaks_into_shared_functions(checkout):
    """A function that several objects have, of which the linker keeps any one, must run on every processor."""
    seen = 0
    for built in sorted(checkout.glob("build/temp*/cpu/*.o")):
        names = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True).stdout
        shared = {line.split(" ", 2)[2] for line in names.splitlines() if re.match(r"[0-9a-f]+ [WVu] ", line)}
        shared = {name for name in shared if not re.search(r"fastreg::avx(2|512)::", name)}
        seen += len(shared)
        code = subprocess.run(
            ["objdump", "-dC", "--no-show-raw-insn", built], capture_output=True, text=True, check=True
        )
        function = ""
        for line in code.stdout.splitlines():
            if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                function = start[1]
            elif function in shared:
                assert not re.search(r"%[yz]mm|%k[0-7]|\tv[a-z]", line), (built.name, function, line)
    assert seen > 100
