"""Finds in Triton kernels what a GPU would let pass: wrong addresses, races, undefined lanes, overflow.

Under `with sanitize():` every launch in Triton's interpreter is watched.

- An active lane that touches anything but an element of the launch's tensors raises `OutOfBounds`. The view that
  was passed counts, not its storage: a kernel given every second column may not touch the others.
- Two programs that touch one element, one of them writing, raise `Race`, whatever the order in which they ran.
  Atomics on the same element do not race with each other, and order what comes before and after them.
- Masked-off lanes of loads without `other` hold `poison` instead of zeros; padding that leaks into a result
  shows there. Try each of `POISONS`: a maximum hides -huge, a minimum hides huge.
- Programs run in an order shuffled by `seed`.
- int32 arithmetic that overflows raises (`overflow=False` where wrapping is meant).

What it does not see: races between the threads of one program (Triton's own barriers are its compiler's affair),
the memory model, and anything that depends on real concurrency, such as a spin lock.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .interpreter import lanes, patched

HUGE, NEGATIVE, NAN = 0x7F, 0xFE, 0xFF  # a byte that, repeated, is a huge, a hugely negative number, or NaN
POISONS = (HUGE, NEGATIVE, NAN)


class SanitizerError(RuntimeError):
    """A kernel did what it must not."""


class OutOfBounds(SanitizerError):
    """An active lane touched no element of the launch's tensors."""


class Race(SanitizerError):
    """Two programs of one launch touched one element, at least one of them writing."""


NOBODY, SEVERAL = -1, -2


class _Storage:
    """What is known about one storage during one launch, per unit of its smallest element."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.start = name, tensor.untyped_storage().data_ptr()
        self.nbytes = tensor.untyped_storage().nbytes()
        self.unit = tensor.element_size()
        self.allowed = np.zeros(self.nbytes // self.unit, bool)
        self.allow(tensor)
        self.writer = np.full(self.allowed.size, NOBODY, np.int32)
        self.reader = np.full(self.allowed.size, NOBODY, np.int32)
        self.atomic = np.zeros(self.allowed.size, bool)

    def allow(self, tensor: Tensor) -> None:
        per_element = tensor.element_size() // self.unit
        shape, stride = [*tensor.shape, per_element], [s * per_element for s in tensor.stride()] + [1]
        index = torch.arange(self.allowed.size).as_strided(shape, stride, tensor.storage_offset() * per_element)
        self.allowed[index.numpy()] = True


class _Watch:
    """One launch under watch."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self.kernel = kernel
        self.storages: list[_Storage] = []
        self.acquired: defaultdict[int, set[int]] = defaultdict(set)  # program -> programs it is ordered after
        self.released: defaultdict[int, set[int]] = defaultdict(set)  # address -> programs released through it
        self.program, self.grid_index = 0, (0, 0, 0)
        by_storage: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in tensors.items():
            if tensor.numel():
                by_storage[tensor.untyped_storage().data_ptr()].append((name, tensor))
        for group in by_storage.values():
            group.sort(key=lambda item: item[1].element_size())
            storage = _Storage(*group[0])
            for _, tensor in group[1:]:
                storage.allow(tensor)
            self.storages.append(storage)

    def find(self, addresses: np.ndarray, size: int, what: str) -> Iterator[tuple[_Storage, np.ndarray]]:
        """Splits addresses by storage, as indices of units; raises OutOfBounds for those in none."""
        left = addresses
        for storage in self.storages:
            offset = left - np.uint64(storage.start)  # unsigned: below the storage is far above it
            inside = offset < storage.nbytes
            if not inside.any():
                continue
            index = (offset[inside] // np.uint64(storage.unit)).astype(np.int64)
            if size > storage.unit:
                index = (index[:, None] + np.arange(size // storage.unit)).ravel()
            legal = np.zeros(index.shape, bool)
            within = index < storage.allowed.size
            legal[within] = storage.allowed[index[within]]
            if not legal.all():
                where = sorted(set(index[~legal].tolist()))
                raise OutOfBounds(
                    f"{self.describe()} {what} {int((~legal).sum())} lanes out of bounds, beside the elements of "
                    f"{storage.name!r} (at {where[0]} to {where[-1]} of its storage)"
                )
            yield storage, np.unique(index)
            left = left[~inside]
        if left.size:
            raise OutOfBounds(
                f"{self.describe()} {what} {left.size} lanes out of bounds, in none of the launch's tensors: "
                + self.nearest(int(left[0]))
            )

    def nearest(self, address: int) -> str:
        def distance(storage):
            return max(storage.start - address, address - (storage.start + storage.nbytes - 1), 0)

        if not self.storages:
            return f"address {address:#x}"
        storage = min(self.storages, key=distance)
        side = "before" if address < storage.start else "past"
        return f"the first is {distance(storage)} bytes {side} {storage.name!r}"

    def describe(self) -> str:
        return f"{self.kernel}, program {self.grid_index}:"

    def conflict(self, owners: np.ndarray) -> np.ndarray:
        """Which of these owners are programs that this one is not ordered after."""
        mine = (owners == NOBODY) | (owners == self.program)
        for other in self.acquired.get(self.program, ()):
            mine |= owners == other
        return ~mine

    def check(self, storage: _Storage, index: np.ndarray, owners: np.ndarray, did: str, other_did: str) -> None:
        bad = self.conflict(owners[index])
        if bad.any():
            at = index[bad][0]
            who = "several programs" if owners[at] == SEVERAL else f"program number {owners[at]}"
            raise Race(
                f"race: {self.describe()} {did} unit {at} of {storage.name!r}, which {who} {other_did} in this launch"
            )

    def load(self, addresses: np.ndarray, size: int) -> None:
        for storage, index in self.find(addresses, size, "loads"):
            self.check(storage, index, storage.writer, "loads", "wrote")
            seen = storage.reader[index]
            storage.reader[index] = np.where((seen == NOBODY) | (seen == self.program), self.program, SEVERAL)

    def store(self, addresses: np.ndarray, size: int) -> None:
        for storage, index in self.find(addresses, size, "stores"):
            self.check(storage, index, storage.writer, "stores to", "wrote")
            self.check(storage, index, storage.reader, "stores to", "read")
            storage.writer[index] = self.program

    def update(self, addresses: np.ndarray, size: int) -> None:
        for storage, index in self.find(addresses, size, "atomically updates"):
            plain = index[~storage.atomic[index]]
            self.check(storage, plain, storage.writer, "atomically updates", "wrote")
            self.check(storage, plain, storage.reader, "atomically updates", "read")
            storage.atomic[index] = True
            storage.writer[index] = self.program
        for address in np.unique(addresses).tolist():
            self.acquired[self.program] |= self.released[address]
            self.released[address] |= self.acquired[self.program] | {self.program}


def _tensors(names: Iterable[str], args: Iterable[object], kwargs: dict, also: Iterable[Tensor]) -> dict[str, Tensor]:
    named = [*zip(names, args), *kwargs.items(), *((f"also[{i}]", tensor) for i, tensor in enumerate(also))]
    found = {}
    for name, value in named:
        for i, item in enumerate(value if isinstance(value, tuple | list) else (value,)):
            if isinstance(item, Tensor):
                found[f"{name}[{i}]" if isinstance(value, tuple | list) else name] = item
    return found


@contextmanager
def sanitize(
    *, seed: int = 0, poison: int | None = NAN, overflow: bool = True, also: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Watches every Triton launch inside the block; see the module's text.

    `also`: tensors that kernels reach through a table of addresses rather than as arguments.
    """
    also = tuple(also)
    builder, executor = InterpreterBuilder, GridExecutor
    old_load, old_store, old_grid = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    old_update, old_swap = builder.create_atomic_rmw, builder.create_atomic_cas
    old_launch, old_init = executor.__call__, executor._init_args_hst
    watch: _Watch | None = None
    order: list[int] = []

    def init(self, args, kwargs):
        nonlocal watch
        args, kwargs = old_init(self, args, kwargs)
        watch = _Watch(self.fn.__name__, _tensors(self.arg_names, args, kwargs, also))
        order.clear()
        return args, kwargs

    def grid_index(self, x, y, z):
        nx, ny, nz = self.grid_dim
        if not order:
            order.extend(random.Random(seed).sample(range(nx * ny * nz), nx * ny * nz))
        number = order[(x * ny + y) * nz + z]
        watch.program, watch.grid_index = number, (number // (ny * nz), number // nz % ny, number % nz)
        old_grid(self, *watch.grid_index)

    def load(self, pointers, mask, other, *rest, **options):
        watch.load(*lanes(pointers, mask))
        if other is None and poison is not None:
            dtype = pointers.get_element_ty()
            size = max(1, dtype.primitive_bitwidth // 8)
            fill = np.full((*np.shape(pointers.data), size), poison, np.uint8)
            other = TensorHandle(fill.view(interpreter._get_np_dtype(dtype))[..., 0], dtype)
        return old_load(self, pointers, mask, other, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        watch.store(*lanes(pointers, mask))
        return old_store(self, pointers, value, mask, *rest, **options)

    def update(self, operation, pointers, value, mask, *rest):
        watch.update(*lanes(pointers, mask))
        return old_update(self, operation, pointers, value, mask, *rest)

    def swap(self, pointers, *rest):
        watch.update(*lanes(pointers, None))
        return old_swap(self, pointers, *rest)

    def launch(self, *args, **kwargs):
        try:
            return old_launch(self, *args, **kwargs)
        except InterpreterError as error:
            cause = error
            while cause is not None and not isinstance(cause, SanitizerError):
                cause = cause.__cause__
            if cause is not None:
                raise cause from None
            raise

    instance, options = interpreter.interpreter_builder, interpreter.interpreter_builder.options
    if overflow and hasattr(interpreter, "InterpreterOptions"):
        instance.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=True)
    try:
        with (
            patched(builder, create_masked_load=load, create_masked_store=store, create_atomic_rmw=update,
                    create_atomic_cas=swap, set_grid_idx=grid_index),
            patched(executor, __call__=launch, _init_args_hst=init),
        ):  # fmt: skip
            yield
    finally:
        instance.options = options
