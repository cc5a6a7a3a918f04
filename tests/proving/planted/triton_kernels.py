"""Triton kernels; which of them are wrong, and how, stands beside each."""

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def copy(x, y, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < n)
        tl.store(y + i, value.to(y.dtype.element_ty), mask=i < n)

    @triton.jit
    def copy_unmasked(x, y, n, BLOCK: tl.constexpr):  # loads past the end
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i), mask=i < n)

    @triton.jit
    def copy_strided(x, y, n, stride, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i * stride, mask=i < n), mask=i < n)

    @triton.jit
    def copy_row_int32(x, y, row, stride, BLOCK: tl.constexpr):  # row * stride overflows
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + row * stride + i, mask=row == 0))

    @triton.jit
    def store_numbers(out, plain, wide: tl.float64):
        tl.store(out, tl.full([], plain, tl.float64))
        tl.store(out + 1, tl.full([], wide, tl.float64))

    @triton.jit
    def add_up(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        tile = tl.load(x + row[:, None] * COLUMNS + column[None, :])
        tl.store(out + column, tl.sum(tile, 0))
        tl.store(out + COLUMNS, tl.sum(tile))

    @triton.jit
    def fused(a, b, c, out, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))

    @triton.jit
    def read_once(x, y, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(x + i, mask=i < n)
        tl.store(y + i, a + a, mask=i < n)

    @triton.jit
    def read_twice(x, y, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        a = tl.load(x + i, mask=i < n)
        b = tl.load(x + i, mask=i < n)
        tl.store(y + i, a + b, mask=i < n)

    @triton.jit
    def histogram(index, counts, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.atomic_add(counts + tl.load(index + i, mask=i < n, other=0), 1.0, mask=i < n)

    @triton.jit
    def race_to_sum(x, out, n, BLOCK: tl.constexpr):  # every program adds to one element
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out, tl.load(out) + tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))

    @triton.jit
    def running_sum(x, out, BLOCK: tl.constexpr):  # each program reads what the one before it wrote
        p = tl.program_id(0)
        tl.store(out + p + 1, tl.load(out + p) + tl.load(x + p))

    @triton.jit
    def sum_last_block(x, partial, ticket, total, COLUMNS: tl.constexpr, ROWS: tl.constexpr, ORDERED: tl.constexpr):
        """The program that arrives last adds the partial sums; unless ORDERED, program 0 does, arrived or not."""
        p = tl.program_id(0)
        tl.store(partial + p, tl.sum(tl.load(x + p * COLUMNS + tl.arange(0, COLUMNS)), 0))
        arrived = tl.atomic_add(ticket, 1) if ORDERED else (ROWS - 1 if p == ROWS - 1 else 0)
        if arrived == ROWS - 1:
            tl.store(total, tl.sum(tl.load(partial + tl.arange(0, ROWS)), 0))

    @triton.jit
    def arrival(order, ticket):
        tl.store(order + tl.program_id(0), tl.atomic_add(ticket, 1))

    @triton.jit
    def leaky_max(x, out, n, BLOCK: tl.constexpr):  # masked-off lanes enter the maximum
        i = tl.arange(0, BLOCK)
        tl.store(out, tl.max(tl.load(x + i, mask=i < n), 0))

    @triton.jit
    def bf16_arithmetic(a, b, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        a, b = tl.load(a + i), tl.load(b + i)
        tl.store(out + i, a + b)
        tl.store(out + BLOCK + i, a * b)
        tl.store(out + 2 * BLOCK + i, tl.maximum(a, -b))
        quotient = (a.to(tl.float32) / b.to(tl.float32)).to(tl.bfloat16)
        tl.store(out + 3 * BLOCK + i, tl.where(a < b, quotient, a - b))

    @triton.jit
    def bf16_dot(a, b, product, top, M: tl.constexpr, K: tl.constexpr):
        m, k = tl.arange(0, M), tl.arange(0, K)
        a = tl.load(a + m[:, None] * K + k[None, :])
        b = tl.load(b + k[:, None] * M + m[None, :])
        tl.store(product + m[:, None] * M + m[None, :], tl.dot(a, b))
        tl.store(top + m, tl.max(a, 1))

    @triton.jit
    def libdevice_functions(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x = tl.load(x + i)
        tl.store(out + i, libdevice.tanh(x))
        tl.store(out + BLOCK + i, libdevice.log1p(x))
        tl.store(out + 2 * BLOCK + i, libdevice.expm1(x))
        tl.store(out + 3 * BLOCK + i, libdevice.pow(x, 1.5))
        tl.store(out + 4 * BLOCK + i, tl.erf(x))
        tl.store(out + 5 * BLOCK + i, libdevice.rsqrt(x))
        tl.store(out + 6 * BLOCK + i, libdevice.lgamma(x))
        tl.store(out + 7 * BLOCK + i, libdevice.isnan(x).to(tl.float64))

    @triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128)], key=["n"])
    @triton.jit
    def autotuned_increment(x, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

    @triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128)], key=["n"])
    @triton.jit
    def autotuned_wrong_once(x, n, BLOCK: tl.constexpr):
        tl.device_assert(BLOCK != 64, "wrong with BLOCK=64")

    @triton.jit
    def checked(index, n):
        tl.device_assert(tl.load(index) < n, "class index out of range")

    @triton.jit
    def wide_row(x, y, BLOCK: tl.constexpr):  # a row that does not fit in registers
        i = tl.arange(0, BLOCK)
        a = tl.load(x + i)
        tl.store(y + i, a / tl.sum(a, 0))

    @triton.jit
    def transpose_and_sum(x, out, sums, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        a = tl.load(x + i[:, None] * SIZE + i[None, :])
        tl.store(out + i[:, None] * SIZE + i[None, :], tl.trans(a).to(tl.bfloat16))
        tl.store(sums + i, tl.sum(tl.exp(a), 1))

    @triton.jit
    def divide_and_exp2(x, out, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        a = tl.load(x + i)
        tl.store(out + i, 1 / (3 * a))
        tl.store(out + SIZE + i, tl.exp2(a))

    @triton.jit
    def take_mark(mark, out, BARRIER: tl.constexpr, SIZE: tl.constexpr):
        taken = tl.load(mark)
        if BARRIER:
            tl.debug_barrier()
        if taken != 0:
            tl.store(mark, 0)
            tl.store(out + tl.arange(0, SIZE), 1.0)

    @triton.jit
    def copy_claimed_aligned(address, y, BLOCK: tl.constexpr):  # which is so if the address is
        x = tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i))

    @triton.jit(debug=True)
    def assert_positive(x, SIZE: tl.constexpr):
        tl.device_assert(tl.load(x + tl.arange(0, SIZE)) > 0, "not positive")


def launch_aligned_then_odd():
    x, y = torch.empty(1 << 20), torch.empty(1 << 20)
    copy[(1024,)](x, y, 1 << 20, BLOCK=1024, num_warps=4)
    copy[(1024,)](x, y, (1 << 20) - 1, BLOCK=1024, num_warps=4)


def launch_with_too_many_registers():
    x = torch.empty(1 << 16)
    wide_row[(1,)](x, x, BLOCK=1 << 16, num_warps=4)
