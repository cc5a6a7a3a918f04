"""Without a GPU, Triton kernels run in Triton's interpreter, mended so that they compute what a GPU computes; with
FASTREG_TEST_PTX=90, as what Triton compiles them to for sm_90 (tests/proving/ptx.py)."""

import os
import random
from importlib.util import find_spec
from zlib import crc32

import numpy as np
import pytest
import torch

# Triton decides at its own import which functions are interpreted, so this stands before anything imports it.
if os.environ.get("FASTREG_TEST_PTX"):  # run what they are compiled to, in place of their source
    from tests.proving import ptx

    ptx.install(int(os.environ["FASTREG_TEST_PTX"]))
elif find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1":
        from tests.proving import interpreter

        interpreter.mend()


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "sampled(n): of its cases, about one in n is not slow")
    config.addinivalue_line("markers", "xdist_group: with --dist loadgroup, the tests of a group go to one worker")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """A backend that a test leaves forced would be blamed on whichever test comes next."""
    from fastreg import _backends

    result = yield
    left, _backends._forced = _backends.forced(), os.environ.get("FASTREG_BACKEND") or None
    assert left == _backends.forced(), f"{item.nodeid} left the backend {left!r} forced"
    return result


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items) -> None:
    """Tests whose `device` is "cuda", or whose `backend` runs on one here, get the marker gpu; without a CUDA device,
    tests with that marker skip. Of a sampled test the first case of each backend and about one in n of the others are
    left, whichever the names choose: every n-th might always have the same value of a parameter. The rest are slow."""
    from tests.machine import device_of

    sampled = set()
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if (mark := item.get_closest_marker("sampled")) is not None:
            case = item.nodeid.partition("[")[0], str(parameters.get("backend"))
            if case in sampled and crc32(item.nodeid.encode()) % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            sampled.add(case)
        device = parameters.get("device")  # or, where a test takes both from one fixture, (backend, device)
        if "cuda" in (device, *(device if isinstance(device, tuple) else ())) or (
            device_of(str(parameters.get("backend"))) == "cuda"
        ):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device is present"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same state, whatever ran before it. The kept plans go: a tensor may stand where one of
    an earlier test stood, whose plan holds the kernel that served that test."""
    from fastreg import _plan

    _plan._plans.clear()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def gpu_is_there(request):
    """A kernel that goes astray takes the process's GPU with it: all later tests would fail as well, and hide which it
    was. A worker of xdist, which gets a successor, ends then, and without workers the run does."""
    yield
    if request.node.get_closest_marker("gpu"):
        leave_if_the_gpu_is_lost()


def leave_if_the_gpu_is_lost() -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process: {error}", returncode=1)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request) -> str:
    """Each device of this machine."""
    return request.param


@pytest.fixture(scope="session")
def sanitizers() -> None:
    """Skips where CUDA kernels cannot run on the host under ASan and TSan."""
    from tests.machine import cudahost_missing
    from tests.proving.cudahost import sanitizers_missing

    if (reason := cudahost_missing() or sanitizers_missing()) is not None:
        pytest.skip(reason)
