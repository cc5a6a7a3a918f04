"""What the GPU kernels of GroupNorm move, and what the compilers make of them; their values: test_group_norm.py."""

import pytest
import torch

from tests.machine import needs_interpreter, needs_ptxas
from tests.proving import cubin

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Groups that fit on chip, one and several to a program; then larger ones, in few and many chunks.
WHOLE = [(2, 32, 8, 8, 8), (1, 64, 7, 7, 32), (2, 20, 16, 16, 2), (3, 30, 4, 4, 3)]
LARGE = [(1, 8, 192, 192, 2), (1, 64, 96, 96, 32)]


def call(x, groups, activation, residual=None, wanted=7):
    from tritonkernels import group_norm as kernels

    weight, bias = torch.randn(x.shape[1]), torch.randn(x.shape[1])
    y, stats = kernels.group_norm_forward(x, groups, weight, bias, 1e-5, activation, residual, True)
    grads = kernels.group_norm_backward(
        torch.ones_like(x), x, groups, weight, bias, activation, residual if activation else None, stats, wanted
    )
    return y, stats, *grads


@needs_interpreter
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", WHOLE + LARGE, ids=str)
def test_bytes(case, format):
    from tests.proving.traffic import traffic

    *shape, groups = case
    x = torch.randn(shape).to(memory_format=FORMATS[format])
    with traffic() as log:
        call(x, groups, 2)
    forward = [launch for launch in log if launch.kernel in ("_forward_whole", "_moments", "_merge_moments", "_apply")]
    backward = [launch for launch in log if launch not in forward]
    whole = case in WHOLE
    assert len(log) == (3 if whole else 7)
    # Parameters and statistics are read once per program: few bytes where programs are large.
    small = 0 if not whole else 16 * sum(shape[:2]) * shape[0]
    total = sum(launch.loaded + launch.stored for launch in forward)
    assert total <= 1.02 * (2 if whole else 3) * x.nbytes + small
    total = sum(launch.loaded + launch.stored for launch in backward)
    assert total <= 1.02 * (3 if whole else 5) * x.nbytes + 2 * small
    assert (log.reads(x) == (2 if whole else 4)).all() and (log.writes(x) == 0).all()


@needs_interpreter
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", [(2, 12, 5, 7, 4), (1, 30, 3, 3, 10), (1, 6, 70, 71, 2), (1, 1100, 4, 4, 1)], ids=str)
def test_addresses_races_and_padding(case, format):
    from tests.proving.sanitizer import POISONS, sanitize

    *shape, groups = case
    x = torch.randn(shape).to(memory_format=FORMATS[format])
    residual = torch.randn(shape)
    for activation in (2, 0):
        torch.manual_seed(1)
        want = call(x, groups, activation, residual, 15 if activation else 7)
        for seed, poison in enumerate(POISONS):
            torch.manual_seed(1)
            with sanitize(seed=seed, poison=poison):
                got = call(x, groups, activation, residual, 15 if activation else 7)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


def compile_aligned():
    for dtype in (torch.bfloat16, torch.float32):
        for *shape, groups in ((8, 64, 32, 32, 32), (8, 320, 64, 64, 32), (2, 512, 64, 64, 32), (8, 256, 64, 64, 32)):
            for format in FORMATS.values():
                call(torch.empty(shape, dtype=dtype).to(memory_format=format), groups, 2)


def compile_odd():
    for *shape, groups in ((8, 96, 7, 7, 32), (4, 30, 57, 57, 3), (64, 40, 1, 1, 4), (1, 3072, 14, 14, 1)):
        for format in FORMATS.values():
            for activation in (1, 3, 4):
                x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=format)
                call(x, groups, activation, torch.empty_like(x), 15)


@needs_ptxas
@pytest.mark.slow
@pytest.mark.parametrize("calls", ["compile_aligned", pytest.param("compile_odd", marks=pytest.mark.slow)])
def test_no_spills_and_wide_accesses(calls):
    (launches,) = cubin.launch_facts(f"tests.test_group_norm_gpu:{calls}").values()
    for facts in launches:
        assert facts.spills == 0, facts
        if calls == "compile_aligned" and facts.kernel not in ("_merge_moments", "_merge_sums", "_parameter_gradients"):
            assert facts.loads.get(128, 0) >= 1, facts
        if calls == "compile_aligned" and facts.kernel in ("_forward_whole", "_apply", "_apply_backward"):
            assert facts.stores.get(128, 0) >= 1, facts
