"""Weight averaging in Triton: every tensor and every average of a model in one launch. The formulas stand in
fastreg/averaging.py, the table's layout in csrc/averaging.h.

Bytes     each parameter read once, each average read and written once, whatever their number.
Launches  1. A program takes one chunk, branches on the row's dtypes, and computes the weights from the counter; the
          last program to finish advances the counter, so that no other can see it change.
Accesses  128 bits where all addresses of a row are multiples of 16 bytes; only other rows take narrower ones.
Numerics  fp32 (fp64 where either side is), one rounding; the weights in fp64.
"""
# ruff: noqa: RUF005, SIM102, SIM300

import struct

import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 1024
_kernel = triton.jit(do_not_specialize=["update_every", "start_step", "seed", "weight_bits"])


@triton.jit
def _weight(rule, n):
    """The weight of the parameters in update n, fp64: `weight_of` in csrc/averaging.h."""
    kind, a, b, c = tl.load(rule), tl.load(rule + 1), tl.load(rule + 2), tl.load(rule + 3)
    x = n.to(tl.float64)
    weight = a
    if kind == 1:
        weight = tl.maximum(a, 9.0 / (10.0 + x))
    elif kind == 2:
        weight = tl.maximum(a, libdevice.pow(1.0 + x / b, -c))
    elif kind == 3:
        weight = 1.0 / (x + 1.0)
    elif kind == 4:
        weight = a + 2.0 * b / (libdevice.exp(2.0 * x) + 1.0)
    elif kind == 5:
        weight = -libdevice.expm1(-a * libdevice.log1p(1.0 / x))
    return tl.where(n == 0, 1.0, weight)


@triton.jit
def _mix(h, part):
    h = (h ^ part.to(tl.uint64)) + 0x9E3779B97F4A7C15
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    return h ^ (h >> 31)


@triton.jit
def _rounding_key(seed, n, j, row, high):
    return _mix(_mix(_mix(_mix(seed.to(tl.uint64), n), j), row), high).to(tl.uint32)


@triton.jit
def _round_stochastically(x, key, index, TYPE: tl.constexpr):
    h = (index.to(tl.uint32) * 0x9E3779B1) ^ key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    random = h ^ (h >> 16)
    bits = x.to(tl.uint32, bitcast=True)
    if TYPE == tl.bfloat16:
        rounded = ((bits + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        normal = ((bits + (random & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        magnitude = tl.abs(x)  # below 2^-14 halves are multiples of 2^-24
        steps = tl.floor(magnitude * 16777216.0 + (random >> 8).to(tl.float32) * 5.9604644775390625e-08)
        small = (steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        rounded = tl.where(magnitude < 6.103515625e-05, small.to(tl.float32, bitcast=True), normal)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def _pointer(address, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE)) + first
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _block(row, at, mask, weights, copied, key, P: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr,
           K: tl.constexpr, first, STOCHASTIC: tl.constexpr):  # fmt: skip
    """One block of elements of one row: the parameter once, each average once in and once out."""
    COMPUTE: tl.constexpr = tl.float64 if P == tl.float64 or S == tl.float64 else tl.float32
    param = tl.load(_pointer(tl.load(row + 2), first, P, ALIGNED) + at, mask=mask)
    p = param.to(COMPUTE)
    for j in tl.static_range(K):
        weight = tl.where(copied, 1.0, weights[j])
        if weight != 0.0:
            pointer = _pointer(tl.load(row + 3 + j), first, S, ALIGNED) + at
            s = tl.load(pointer, mask=mask).to(COMPUTE)
            w = weight.to(COMPUTE)
            difference = p - s
            new = tl.where(w < 0.5, s + difference * w, p + difference * (w - 1.0))
            if STOCHASTIC and (S == tl.float16 or S == tl.bfloat16):
                new = _round_stochastically(new.to(tl.float32), key[j], first + at, S)
            tl.store(pointer, tl.where(weight == 1.0, param.to(S), new.to(S)), mask=mask)


@triton.jit
def _run(row, number, first, length, weights, copied, seed, n, P_CODE: tl.constexpr, S_CODE: tl.constexpr,
         ALIGNED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    P: tl.constexpr = (
        tl.float32 if P_CODE == 0 else tl.float16 if P_CODE == 1 else tl.bfloat16 if P_CODE == 2 else tl.float64
    )
    S: tl.constexpr = (
        tl.float32 if S_CODE == 0 else tl.float16 if S_CODE == 1 else tl.bfloat16 if S_CODE == 2 else tl.float64
    )
    if STOCHASTIC:
        key = (_rounding_key(seed, n, 0 * n, number, first >> 32),)
        for j in tl.static_range(1, K):
            key = key + (_rounding_key(seed, n, 0 * n + j, number, first >> 32),)
    else:
        key = None
    full = length // BLOCK * BLOCK
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, full, BLOCK):
        _block(row, begin + lanes, None, weights, copied, key, P, S, ALIGNED, K, first, STOCHASTIC)
    if full < length:
        at = full + lanes
        _block(row, at, at < length, weights, copied, key, P, S, ALIGNED, K, first, STOCHASTIC)


@triton.jit
def _copy_raw(row, first, length, ALIGNED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, length, BLOCK):
        at = begin + lanes
        value = tl.load(_pointer(tl.load(row + 2), first, tl.uint8, ALIGNED) + at, mask=at < length)
        for j in tl.static_range(K):
            tl.store(_pointer(tl.load(row + 3 + j), first, tl.uint8, ALIGNED) + at, value, mask=at < length)


@triton.jit
def _chunk(table, chunks, weights, seed, n, CHUNK: tl.constexpr, KINDS: tl.constexpr, K: tl.constexpr,
           BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    """This program's chunk. KINDS has a bit per kind of row in the table, and only these get code: parameter's dtype |
    average's dtype << 2 | aligned << 4, and 32 | aligned for raw rows."""
    place = chunks + 2 * tl.program_id(0).to(tl.int64)
    number, first = tl.load(place), tl.load(place + 1)
    row = table + number * (3 + K)
    length = tl.minimum(tl.load(row) - first, CHUNK).to(tl.int32)
    codes = tl.load(row + 1)
    aligned = (codes >> 9) & 1
    kind = tl.where((codes & 15) == 4, 32 | aligned, (codes & 3) | ((codes >> 4) & 3) << 2 | aligned << 4)
    copied = (codes & 256) != 0
    for i in tl.static_range(34):
        if (KINDS >> i) & 1:
            if kind == i:
                if i >= 32:
                    _copy_raw(row, first, length, i == 33, K, 4 * BLOCK)
                else:
                    _run(row, number, first, length, weights, copied, seed, n, i & 3, (i >> 2) & 3,
                         i >= 16, K, BLOCK, STOCHASTIC)  # fmt: skip


@_kernel
def _average_update(table, chunks, rules, n_averaged, calls, ticket, found_inf, update_every, start_step, seed,
                    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, KINDS: tl.constexpr, K: tl.constexpr,
                    BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr):  # fmt: skip
    n, call = tl.load(n_averaged), tl.load(calls)
    counted = True
    if found_inf is not None:
        counted = tl.load(found_inf) == 0
    due = counted & (call >= start_step) & ((call - start_step) % update_every == 0)
    if due:
        weights = (_weight(rules, n),)
        for j in tl.static_range(1, K):
            weights = weights + (_weight(rules + 4 * j, n),)
        if CHUNKS:
            _chunk(table, chunks, weights, seed, n, CHUNK, KINDS, K, BLOCK, STOCHASTIC)
    tl.debug_barrier()  # every warp has read the counters
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        if counted:
            tl.store(calls, call + 1)
        if due:
            tl.store(n_averaged, n + 1)


@_kernel
def _average_lerp(table, chunks, weight_tensor, weight_bits, CHUNK: tl.constexpr, KINDS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    if weight_tensor is not None:
        weight = tl.load(weight_tensor)
    else:
        weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if weight != 0.0:
        _chunk(table, chunks, (weight,), 0, 0, CHUNK, KINDS, 1, BLOCK, False)


@_kernel
def _average_swap(table, chunks, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    place = chunks + 2 * tl.program_id(0).to(tl.int64)
    row, first = table + tl.load(place) * 4, tl.load(place + 1)
    length = tl.minimum(tl.load(row) - first, CHUNK).to(tl.int32)
    if (tl.load(row + 1) & 512) != 0:
        _swap(row, first, length, True, BLOCK)
    else:
        _swap(row, first, length, False, BLOCK)


@triton.jit
def _swap(row, first, length, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    one = _pointer(tl.load(row + 2), first, tl.uint8, ALIGNED)
    other = _pointer(tl.load(row + 3), first, tl.uint8, ALIGNED)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        a, b = tl.load(one + at, mask=at < length), tl.load(other + at, mask=at < length)
        tl.store(one + at, b, mask=at < length)
        tl.store(other + at, a, mask=at < length)


# ---- launchers -----------------------------------------------------------------------------------------------


def average_update(table, chunks, chunk, kinds, rules, n_averaged, calls, ticket, found_inf, update_every,
                   start_step, rounding_seed):  # fmt: skip
    _average_update[(max(1, len(chunks)),)](
        table, chunks, rules, n_averaged, calls, ticket, found_inf,
        update_every, start_step, rounding_seed or 0, CHUNKS=len(chunks) > 0, CHUNK=chunk,
        KINDS=kinds, K=len(rules), BLOCK=BLOCK, STOCHASTIC=rounding_seed is not None,
    )  # fmt: skip


def average_lerp(table, chunks, chunk, kinds, weight, weight_tensor):
    if len(chunks):
        (bits,) = struct.unpack("q", struct.pack("d", weight))
        _average_lerp[(len(chunks),)](
            table, chunks, weight_tensor, bits, CHUNK=chunk, KINDS=kinds, BLOCK=BLOCK
        )  # fmt: skip


def average_swap(table, chunks, chunk):
    if len(chunks):
        _average_swap[(len(chunks),)](table, chunks, CHUNK=chunk, BLOCK=4 * BLOCK)
