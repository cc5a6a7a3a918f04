"""The proving ground catches planted bugs, and passes the same code without them."""

import re

import numpy as np
import pytest
import torch

from tests.machine import DEVICES, move, needs_cudahost, needs_interpreter, needs_nvcc, needs_ptxas, needs_sanitizers
from tests.proving import cubin, cudahost
from tests.proving.planted import cuda_cases
from tests.proving.planted import triton_kernels as planted
from tests.proving.traffic import traffic

pytestmark = []

if planted.triton is not None:
    from tests.proving.sanitizer import HUGE, NAN, NEGATIVE, OutOfBounds, Race, sanitize


# ---- interpreter -----------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64])
def test_casts_to_bf16_round_like_torch(source):
    """Every upper half of an fp32 with lower halves that fall on both sides of, and on, the tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = torch.from_numpy((upper | np.uint32(lower)).view(np.float32))
        if source in (torch.int32, torch.int64):
            x = torch.from_numpy((upper | np.uint32(lower)).view(np.int32))
        x = x.to(source)
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        planted.copy[(1,)](x, y, x.numel(), BLOCK=x.numel())
        want = x.to(torch.bfloat16)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num().view(torch.int16), want.nan_to_num().view(torch.int16))


@needs_interpreter
@pytest.mark.parametrize("target", [torch.float32, torch.float64, torch.float16, torch.int32])
def test_casts_from_bf16_are_exact(target):
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    if target == torch.int32:
        x = x[x.float().abs() < 2.0**31]
    y = torch.empty(x.shape, dtype=target)
    planted.copy[(1,)](x, y, x.numel(), BLOCK=1 << 16)
    torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


@needs_interpreter
def test_arithmetic_in_bf16_rounds_once_per_operation():
    a, b = torch.randn(2, 4096).bfloat16()
    out = torch.empty(4, 4096, dtype=torch.bfloat16)
    planted.bf16_arithmetic[(1,)](a, b, out, BLOCK=4096)
    for got, want in zip(out, (a + b, a * b, torch.maximum(a, -b), torch.where(a < b, a / b, a - b))):
        assert torch.equal(got, want)


@needs_interpreter
def test_reductions_and_products_of_bf16():
    a, b = torch.randn(16, 32).bfloat16(), torch.randn(32, 16).bfloat16()
    product, top = torch.empty(16, 16), torch.empty(16)
    planted.bf16_dot[(1,)](a, b, product, top, M=16, K=32)
    torch.testing.assert_close(product, a.float() @ b.float())
    assert torch.equal(top, a.float().amax(1))


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_trees(dtype):
    """One element after the other, all that comes after the first would be lost."""
    x = torch.ones(1024, 2, dtype=dtype)
    x[0] = 1 / torch.finfo(dtype).eps * 2
    out = torch.empty(3, dtype=dtype)
    planted.add_up[(1,)](x, out, ROWS=1024, COLUMNS=2)
    rest = out - x[0, 0] * torch.tensor([1, 1, 2], dtype=dtype)
    assert (rest[:2] - 1023).abs().max() <= 11 and (rest[2] - 2046).abs() <= 22  # a unit each time that it doubles


@needs_interpreter
def test_integers_add_up_exactly():
    x, out = torch.arange(2048, dtype=torch.int32).reshape(1024, 2), torch.empty(3, dtype=torch.int32)
    planted.add_up[(1,)](x, out, ROWS=1024, COLUMNS=2)
    assert out.tolist() == [*x.sum(0).tolist(), x.sum().item()]


@needs_interpreter
def test_fused_products_round_once():
    a = 1 + torch.randn(1024) / 1000
    out = torch.empty(1024)
    planted.fused[(1,)](a, a, -a * a, out, SIZE=1024)
    exact = a.double() * a.double() - (a * a).double()
    assert exact.abs().max() > 0 and torch.equal(out, exact.float())


@needs_interpreter
def test_libdevice():
    x = torch.rand(1024, dtype=torch.float64) * 3 + 0.1
    out = torch.empty(8, 1024, dtype=torch.float64)
    planted.libdevice_functions[(1,)](x, out, BLOCK=1024)
    want = (x.tanh(), x.log1p(), x.expm1(), x**1.5, torch.erf(x), x.rsqrt(), torch.lgamma(x), x.isnan().double())
    torch.testing.assert_close(out, torch.stack(want))


@needs_interpreter
def test_numbers_arrive_in_fp32_unless_declared_otherwise():
    out = torch.empty(2, dtype=torch.float64)
    planted.store_numbers[(1,)](out, 0.1, 0.1)
    assert out.tolist() == [torch.tensor(0.1).item(), 0.1]
    planted.store_numbers[(1,)](out, plain=0.1, wide=0.1)
    assert out.tolist() == [torch.tensor(0.1).item(), 0.1]


@needs_interpreter
def test_autotune_runs_every_configuration_from_the_same_state():
    x = torch.ones(1000)
    planted.autotuned_increment[lambda meta: (-(-1000 // meta["BLOCK"]),)](x, 1000)
    assert torch.equal(x, torch.full((1000,), 2.0))
    with pytest.raises(Exception, match="wrong with BLOCK=64"):
        planted.autotuned_wrong_once[(1,)](x, 64)


@needs_interpreter
def test_device_assert_raises():
    with pytest.raises(Exception, match="class index out of range"):
        planted.checked[(1,)](torch.tensor([7]), 5)


# ---- traffic ---------------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_traffic_sees_a_second_read(dtype):
    n = 1000
    x, y = torch.randn(n).to(dtype), torch.empty(n, dtype=dtype)
    with traffic() as log:
        planted.read_twice[(4,)](x, y, n, BLOCK=256)
        planted.read_once[(4,)](x, y, n, BLOCK=256)
    twice, once = log
    assert (twice.kernel, twice.loaded, twice.stored) == ("read_twice", 2 * x.nbytes, y.nbytes)
    assert (once.kernel, once.loaded, once.stored) == ("read_once", x.nbytes, y.nbytes)
    assert (twice.reads(x) == 2).all() and (once.reads(x) == 1).all()
    assert (once.writes(y) == 1).all() and (once.writes(x) == 0).all()
    assert log.moved == 5 * x.nbytes


@needs_interpreter
def test_traffic_counts_elements_of_views():
    """An element touched twice beside one never touched has the right mean, and the wrong counts."""
    storage = torch.randn(2000)
    x, y = storage[::2], torch.empty(999)
    with traffic() as log:
        planted.copy_strided[(4,)](x, y, 999, 2, BLOCK=256)
    assert log.reads(x).tolist() == [1] * 999 + [0]
    assert (log.reads(storage[1::2]) == 0).all()


@needs_interpreter
def test_traffic_counts_atomics():
    index, histogram = torch.randint(0, 10, (1000,)), torch.zeros(10)
    with traffic() as log:
        planted.histogram[(4,)](index, histogram, 1000, BLOCK=256)
    assert (log[0].loaded, log[0].stored, log[0].atomic) == (8000, 0, 4000)
    assert torch.equal(log.writes(histogram), torch.bincount(index, minlength=10))


# ---- sanitizer -------------------------------------------------------------------------------------------


@needs_interpreter
def test_sanitizer_passes_right_kernels():
    x, y = torch.randn(1000), torch.empty(1000)
    with sanitize():
        planted.copy[(4,)](x, y, 1000, BLOCK=256)
    assert torch.equal(x, y)
    rows, total = torch.randn(8, 16), torch.zeros(1)
    partial, ticket = torch.full((8,), float("nan")), torch.zeros(1, dtype=torch.int32)
    for seed in range(4):
        ticket.zero_()
        with sanitize(seed=seed):
            planted.sum_last_block[(8,)](rows, partial, ticket, total, COLUMNS=16, ROWS=8, ORDERED=True)
        torch.testing.assert_close(total[0], rows.sum())


@needs_interpreter
def test_sanitizer_finds_lanes_out_of_bounds():
    x, y = torch.randn(1000), torch.empty(1000)
    with sanitize(), pytest.raises(OutOfBounds, match=r"copy_unmasked.* 24 lanes out of bounds.* past"):
        planted.copy_unmasked[(4,)](x, y, 1000, BLOCK=256)


@needs_interpreter
def test_sanitizer_holds_a_kernel_to_the_view_it_was_given():
    storage, y = torch.randn(64, 2), torch.empty(64)
    with sanitize():
        planted.copy_strided[(1,)](storage[:, 0], y, 64, 2, BLOCK=64)
    with sanitize(), pytest.raises(OutOfBounds, match=r"32 lanes out of bounds, beside the elements of 'x'"):
        planted.copy_strided[(1,)](storage[:, 0], y, 64, 1, BLOCK=64)


@needs_interpreter
def test_sanitizer_finds_write_races():
    with sanitize(), pytest.raises(Race, match="race_to_sum"):
        planted.race_to_sum[(4,)](torch.randn(1000), torch.zeros(1), 1000, BLOCK=256)


@needs_interpreter
def test_sanitizer_finds_a_read_of_what_another_program_writes():
    """The order in which the interpreter happens to run programs hides this one: the sum comes out right."""
    x, out = torch.randn(9), torch.zeros(9)
    planted.running_sum[(8,)](x, out, BLOCK=1)
    torch.testing.assert_close(out[8], x[:8].sum())
    for seed in range(3):
        with sanitize(seed=seed), pytest.raises(Race, match="running_sum"):
            planted.running_sum[(8,)](x, torch.zeros(9), BLOCK=1)
    rows, total = torch.randn(8, 16), torch.zeros(1)
    partial, ticket = torch.empty(8), torch.zeros(1, dtype=torch.int32)
    with sanitize(), pytest.raises(Race, match="sum_last_block"):
        planted.sum_last_block[(8,)](rows, partial, ticket, total, COLUMNS=16, ROWS=8, ORDERED=False)


@needs_interpreter
def test_sanitizer_shuffles_programs():
    """Dependence on order through atomics alone is no race, yet no result to rely on."""
    got = set()
    for seed in range(4):
        order, ticket = torch.empty(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with sanitize(seed=seed):
            planted.arrival[(16,)](order, ticket)
        assert sorted(order.tolist()) == list(range(16))
        got.add(tuple(order.tolist()))
    assert len(got) > 1


@needs_interpreter
def test_poison_shows_padding_that_leaks():
    x, out = -torch.rand(100) - 1, torch.empty(1)
    got = {}
    for poison in (None, HUGE, NEGATIVE, NAN):
        with sanitize(poison=poison):
            planted.leaky_max[(1,)](x, out, 100, BLOCK=128)
        got[poison] = out.item()
    assert got[None] == 0.0 and got[HUGE] > 1e38 and got[NEGATIVE] == x.max().item()
    for dtype in (torch.bfloat16, torch.float64, torch.int32):
        with sanitize(poison=HUGE):
            planted.leaky_max[(1,)](-torch.ones(100).to(dtype), out, 100, BLOCK=128)
        assert out.item() > 1e9


@needs_interpreter
def test_sanitizer_finds_int32_overflow():
    x, y = torch.randn(4), torch.empty(4)
    with sanitize(), pytest.raises(Exception, match="int32 overflow"):
        planted.copy_row_int32[(1,)](x, y, 3, 1 << 30, BLOCK=4)
    with sanitize():
        planted.copy_row_int32[(1,)](x, y, 0, 1 << 30, BLOCK=4)
    assert torch.equal(x, y)


# ---- cubin -----------------------------------------------------------------------------------------------


@needs_ptxas
def test_cubin_facts_of_known_kernels():
    launches = "tests.proving.planted.triton_kernels:launch_aligned_then_odd"
    spilling = "tests.proving.planted.triton_kernels:launch_with_too_many_registers"
    found = cubin.launch_facts(launches, spilling, architectures=(80, 90))
    aligned80, aligned90, odd80, odd90 = found[launches]
    assert [facts.arch for facts in found[launches]] == [80, 90, 80, 90]
    for facts in (aligned80, aligned90):
        assert set(facts.loads) == set(facts.stores) == {128}
        assert facts.spills == facts.stack == 0 and 8 <= facts.registers <= 64 and facts.warps == 4
    for facts in (odd80, odd90):
        assert set(facts.loads) == set(facts.stores) == {32}
    assert all(facts.spills > 100 for facts in found[spilling])


@needs_nvcc
def test_nvcc_facts_of_known_kernels():
    facts = {f.kernel: f for f in cubin.nvcc_facts("tests/proving/planted/kernels.cu", architectures=(90,))}
    rowsum = facts["rowsum_kernel<0, float>"]
    assert set(rowsum.loads) == {32} and rowsum.stores == {32: 1} and rowsum.spills == rowsum.stack == 0
    assert rowsum.shared >= 128 and rowsum.barriers >= 1 and rowsum.shuffles == 10
    assert 16 in facts["rowsum_kernel<0, __nv_bfloat16>"].loads
    assert rowsum.issued is None  # no wide access


def test_instructions_of_the_innermost_loop_are_counted_per_wide_load():
    sass = """
.L_x_1:
        /*0000*/                   MOV R0, R1 ;
.L_x_2:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.STRONG.CTA R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   FADD R0, R0, R4 ;
        /*0040*/              @P0  BRA `(.L_x_2) ;
        /*0050*/              @P1  BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
"""
    assert cubin._issued(sass) == 2


# ---- cudahost --------------------------------------------------------------------------------------------


@needs_cudahost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "threads"), [(1, 32), (33, 64), (1000, 256), (1025, 1024)])
def test_cudahost_runs_a_right_kernel(dtype, columns, threads):
    x, out = torch.randn(5, columns).to(dtype), torch.full((5,), float("nan"))
    cuda_cases.kernels().rowsum(0, x, out, 5, columns, dtype == torch.bfloat16, threads)
    torch.testing.assert_close(out, x.float().sum(1), rtol=1e-5, atol=1e-4)


@needs_cudahost
@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        (2, r"divergence: a warp operation never completes in block \(0, 0, 0\), thread 0: mask ffffffff"),
        (3, "outside its mask in block .* thread 15|not in its own mask in block .* thread 16"),
    ],
)
def test_cudahost_finds_divergence(bug, complaint):
    with pytest.raises(RuntimeError, match=complaint):
        cuda_cases.rowsum(str(bug))


@needs_cudahost
def test_cudahost_finds_deadlocks():
    with pytest.raises(RuntimeError, match=r"never completes in block .* mask 0001ffff, running lanes ffffffff"):
        cuda_cases.kernels().deadlock(np.zeros(32, np.float32), 32)


@needs_cudahost
def test_cudahost_refuses_what_no_gpu_launches():
    with pytest.raises(RuntimeError, match="1 to 1024 threads, not 1056"):
        cuda_cases.rowsum("0", threads="1056")
    with pytest.raises(RuntimeError, match="rowsum returned CUDA error 1"):
        cuda_cases.rowsum("17")


@needs_cudahost
def test_cudahost_lets_each_block_start_with_nan_in_shared_memory():
    out = np.zeros(64, np.float32)
    cuda_cases.kernels().read_uninitialised(out, 64, False)
    assert np.isnan(out).all()


@needs_cudahost
@pytest.mark.parametrize("blocks", ["1", "2", "8"])
def test_cudahost_runs_clusters(blocks):
    with traffic():
        cuda_cases.cluster_sum("0", blocks=blocks)


@needs_cudahost
def test_cudahost_finds_what_is_wrong_with_clusters():
    with traffic(), pytest.raises(RuntimeError, match=r"race: block number 3 stores to element 1 .*, which .* 0 read"):
        cuda_cases.cluster_sum("1", blocks="2")
    for bug in ("2", "3"):
        with pytest.raises(RuntimeError, match="deadlock in block"):
            cuda_cases.cluster_sum(bug)
    with pytest.raises(RuntimeError, match="a cluster has 1 to 8 blocks"):
        cuda_cases.cluster_sum(blocks="9")


@needs_cudahost
def test_cudahost_checks_what_is_passed_for_pointers():
    rowsum = cuda_cases.kernels().rowsum
    x, out = np.zeros((2, 8), np.float32), np.zeros(2, np.float32)
    for wrong, complaint in (
        ((0, x, out.astype(np.float64), 2, 8, False, 32), "points to 4-byte elements"),
        ((0, x, out, 2, 8, False), "takes 7 arguments, not 6"),
        ((0, 3, out, 2, 8, False, 32), "is a pointer"),
    ):
        with pytest.raises(TypeError, match=complaint):
            rowsum(*wrong)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        rowsum(0, x, out, 2, 8, False, 32)


@needs_cudahost
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_counts_what_cuda_kernels_load_and_store(dtype):
    x, out = torch.randn(7, 1000).to(dtype), torch.zeros(7)
    with traffic() as log:
        cuda_cases.kernels().rowsum(0, x, out, 7, 1000, dtype == torch.bfloat16, 256)
    (launch,) = log
    assert launch.kernel == f"rowsum_kernel<0, {'float' if dtype == torch.float32 else '__nv_bfloat16'}>"
    assert (launch.loaded, launch.stored, launch.atomic) == (x.nbytes, out.nbytes, 0)
    assert (launch.reads(x) == 1).all() and (launch.writes(out) == 1).all() and not launch.writes(x).any()
    torch.testing.assert_close(out, x.float().sum(1), rtol=1e-5, atol=1e-4)


@needs_cudahost
def test_traffic_sees_what_a_cuda_kernel_reads_too_often():
    x, y, total = torch.randn(1024), torch.empty(1024), torch.zeros(1)
    with traffic() as log:
        cuda_cases.kernels().neighbours(x, y, 1024)
        cuda_cases.kernels().count(total, 1000, 128)
    stencil, counting = log
    assert stencil.loaded == 2 * x.nbytes and (stencil.reads(x) == 2).all() and (stencil.writes(y) == 1).all()
    assert (counting.loaded, counting.stored, counting.atomic) == (0, 0, 4000) and total == 1000
    torch.testing.assert_close(y, x + x.roll(-1))


@needs_cudahost
def test_traffic_counts_a_broadcast_to_a_warp_once():
    x, y = torch.randn(64), torch.empty(64)
    for times in (1, 3):
        with traffic() as log:
            cuda_cases.kernels().broadcast(x, y, 64, times)
        assert log.loaded == 2 * 4 * times and log.reads(x)[::32].tolist() == [times, times]
        torch.testing.assert_close(y, times * x[::32].repeat_interleave(32))


@needs_cudahost
def test_traffic_finds_races_between_blocks_of_cuda_kernels():
    rows, partial, ticket, total = torch.randn(8, 32), torch.empty(8), torch.zeros(1, dtype=torch.int32), torch.zeros(1)

    def sum_last_block(*args):
        cuda_cases.kernels().sum_last_block(*args)

    with traffic():
        sum_last_block(rows, partial, ticket, total, 8, True)
        torch.testing.assert_close(total[0], rows.sum())
        with pytest.raises(RuntimeError, match=r"race: block number 7 loads element 0 of argument 1, which block"):
            sum_last_block(rows, partial, ticket, total, 8, False)
    sum_last_block(rows, partial, ticket, total, 8, False)  # unmetered, the order of the blocks hides it


@needs_sanitizers
def test_address_sanitizer_finds_accesses_out_of_bounds():
    cases = "tests.proving.planted.cuda_cases"
    assert cudahost.run_sanitized("address", f"{cases}:rowsum", "0") == ""
    assert "heap-buffer-overflow" in cudahost.run_sanitized("address", f"{cases}:rowsum", "4")
    assert "global-buffer-overflow" in cudahost.run_sanitized("address", f"{cases}:rowsum", "5")
    assert "heap-buffer-overflow" in cudahost.run_sanitized("address", f"{cases}:past_shared_memory")


@needs_sanitizers
def test_thread_sanitizer_finds_missing_barriers():
    cases = "tests.proving.planted.cuda_cases"
    assert cudahost.run_sanitized("thread", f"{cases}:rowsum", "0") == ""
    assert "data race" in cudahost.run_sanitized("thread", f"{cases}:rowsum", "1")
    assert cudahost.run_sanitized("thread", f"{cases}:sum_warps", "0") == ""
    assert cudahost.run_sanitized("thread", f"{cases}:cluster_sum", "0") == ""
    assert "data race" in cudahost.run_sanitized("thread", f"{cases}:cluster_sum", "1")
    assert "data race" in cudahost.run_sanitized("thread", f"{cases}:sum_warps", "1")
    assert "data race" in cudahost.run_sanitized("thread", f"{cases}:sum_warps", "2")


# ---- compiled Triton kernels -----------------------------------------------------------------------------

PTX = "tests.proving.planted.ptx_cases"
RARER = [pytest.param(case, marks=pytest.mark.slow) for case in ("approximations", "assertion:0")]


@needs_ptxas
@needs_cudahost
@pytest.mark.parametrize("case", ["values", "misaligned", "assertion:1", *RARER])
def test_compiled_kernels_run(case):
    assert cudahost.run_sanitized("", f"{PTX}:{case}") == ""


@pytest.mark.slow
@needs_ptxas
@needs_sanitizers
def test_sanitizers_see_into_compiled_kernels():
    assert cudahost.run_sanitized("thread", f"{PTX}:values") == ""
    assert cudahost.run_sanitized("thread", f"{PTX}:clear_marks:1") == ""
    assert "data race" in cudahost.run_sanitized("thread", f"{PTX}:clear_marks:0")
    assert cudahost.run_sanitized("address", f"{PTX}:out_of_bounds:1024") == ""
    assert "heap-buffer-overflow" in cudahost.run_sanitized("address", f"{PTX}:out_of_bounds:1000")


def test_an_instruction_that_is_not_there_is_named():
    from tests.proving import ptx

    text = ".visible .entry f(\n.param .u64 f_param_0\n)\n{\n.reg .b32 %r<2>;\nsin.approx.f32 %r1, %r1;\nret;\n}"
    with pytest.raises(NotImplementedError, match=r"sin\.approx\.f32"):
        ptx.translate(text)


# ---- machine ---------------------------------------------------------------------------------------------


LAYOUTS = (
    lambda: torch.randn(4, 6)[:, ::2],
    lambda: torch.randn(5).expand(3, 5),
    lambda: torch.randn(9)[1:],
    lambda: torch.tensor(2.0),
    lambda: torch.randn(3, 4).t().requires_grad_(),
    lambda: torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
)


@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("device", ["meta", *DEVICES[1:]])
def test_move_keeps_the_layout(make, device):
    x = make()
    moved = move(x, device)
    assert moved.device.type == device and moved.requires_grad == x.requires_grad
    assert (moved.shape, moved.stride(), moved.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
    if device != "meta":
        assert torch.equal(moved.cpu(), x)


# ---- the table -------------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles every CUDA kernel
@needs_ptxas
@needs_cudahost
def test_table_shows_what_was_compiled_and_what_it_moves(capsys):
    from tests.proving.__main__ import main

    assert main(["--arch", "90", "--only", "cross_entropy backward 8192×1001 bfloat16"]) == 0
    header, _, *rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    rows = [dict(zip(header, row)) for row in rows]
    launched = [row for row in rows if row["call"] == "cross_entropy backward 8192×1001 bfloat16"]
    assert [row["kernel"].partition("<")[0] for row in launched] == ["_backward", "backward_rows"]
    for row in launched:
        assert (row["sm"], row["spills"]) == ("90", "0") and "×128" in row["loads"] and "×128" in row["stores"]
        loaded, stored = map(float, row["bytes/element"].split(" + "))
        assert 2 <= loaded < 2.1 and stored == 2


@pytest.mark.slow
@needs_ptxas
@needs_nvcc
def test_no_kernel_spills():
    from tests.proving.__main__ import main

    assert main([]) == 0
