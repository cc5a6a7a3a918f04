"""Counts what kernels load and store, exactly: Triton's in the interpreter, CUDA's on the host (see cudahost.py).

What it proves: how many bytes a launch moves between the kernel and memory, masked lanes left out, and how
often each element is touched, so that a test can hold a kernel to its byte budget without noise.
What it does not: caches (a second read that hits L2 counts as a read), sectors (a strided access moves more
than it asks for), the GPU's access widths (see cubin.py).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import cudahost
from .cubin import triton_missing


@dataclass
class Launch:
    """One launch: `loaded`, `stored` and `atomic` bytes, counted over every active lane of every program."""

    kernel: str
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    # Each maps (address, bytes per element, number of elements) of a piece of memory to how often each was touched.
    _loads: list[Callable[[int, int, int], np.ndarray]] = field(default_factory=list, repr=False)
    _stores: list[Callable[[int, int, int], np.ndarray]] = field(default_factory=list, repr=False)

    @property
    def moved(self) -> int:
        return self.loaded + self.stored + self.atomic

    def reads(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was loaded, in the tensor's shape."""
        return _count(self._loads, tensor)

    def writes(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor` was stored or atomically updated, in the tensor's shape."""
        return _count(self._stores, tensor)


class Log(list[Launch]):
    """The launches inside a `with traffic()` block, and their sums."""

    loaded = property(lambda self: sum(launch.loaded for launch in self))
    stored = property(lambda self: sum(launch.stored for launch in self))
    moved = property(lambda self: sum(launch.moved for launch in self))
    kernels = property(lambda self: [launch.kernel for launch in self])

    def reads(self, tensor: Tensor) -> Tensor:
        return sum((launch.reads(tensor) for launch in self), torch.zeros(tensor.shape, dtype=torch.int64))

    def writes(self, tensor: Tensor) -> Tensor:
        return sum((launch.writes(tensor) for launch in self), torch.zeros(tensor.shape, dtype=torch.int64))


def _count(accesses: list[Callable[[int, int, int], np.ndarray]], tensor: Tensor) -> Tensor:
    storage, size = tensor.untyped_storage(), tensor.element_size()
    length = storage.nbytes() // size
    counts = np.zeros(length, np.int64)
    for access in accesses:
        counts += access(storage.data_ptr(), size, length)
    return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _of_addresses(addresses: np.ndarray) -> Callable[[int, int, int], np.ndarray]:
    def counts(start: int, size: int, length: int) -> np.ndarray:
        # Addresses are unsigned: one below `start` wraps to a huge index, and is left out like one above.
        index = (addresses - np.uint64(start)) // np.uint64(size)
        return np.bincount(index[index < length].astype(np.int64), minlength=length)

    return counts


def _of_array(address: int, unit: int, touched: np.ndarray) -> Callable[[int, int, int], np.ndarray]:
    def counts(start: int, size: int, length: int) -> np.ndarray:
        out = np.zeros(length, np.int64)
        first = (address - start) // size
        if unit == size and 0 <= first < length:
            out[first : first + touched.size] = touched[: length - first]
        return out

    return counts


def _of_cuda(kernel, loaded, stored, atomic, load_widths, store_widths, arrays) -> Launch:
    loads = [_of_array(address, unit, loads) for address, unit, loads, _ in arrays]
    stores = [_of_array(address, unit, stores) for address, unit, _, stores in arrays]
    return Launch(kernel, loaded, stored, atomic, loads, stores)


@contextmanager
def traffic() -> Iterator[Log]:
    """Collects one `Launch` per kernel launch inside the block, in order.

    Example::

        with traffic() as log:
            fastreg.cross_entropy(x, target).backward()
        assert log[0].loaded == x.nbytes + target.nbytes
        assert (log.reads(x) == 1).all()
    """
    log = Log()
    triton = _triton_traffic(log) if triton_missing() is None else nullcontext()
    with cudahost.metering(lambda *counted: log.append(_of_cuda(*counted))), triton:
        yield log


@contextmanager
def _triton_traffic(log: Log) -> Iterator[None]:
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    from .interpreter import lanes, patched

    builder = InterpreterBuilder
    old_load, old_store = builder.create_masked_load, builder.create_masked_store
    old_update, old_swap, old_launch = builder.create_atomic_rmw, builder.create_atomic_cas, GridExecutor.__call__

    def note(kind, book, pointers, mask):
        addresses, size = lanes(pointers, mask)
        setattr(log[-1], kind, getattr(log[-1], kind) + addresses.size * size)
        getattr(log[-1], book).append(_of_addresses(addresses))

    def load(self, pointers, mask, *rest, **options):
        note("loaded", "_loads", pointers, mask)
        return old_load(self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        note("stored", "_stores", pointers, mask)
        return old_store(self, pointers, value, mask, *rest, **options)

    def update(self, operation, pointers, value, mask, *rest):
        note("atomic", "_stores", pointers, mask)
        return old_update(self, operation, pointers, value, mask, *rest)

    def swap(self, pointers, *rest):
        note("atomic", "_stores", pointers, None)
        return old_swap(self, pointers, *rest)

    def launch(self, *args, **kwargs):
        log.append(Launch(self.fn.__name__))
        return old_launch(self, *args, **kwargs)

    with (
        patched(builder, create_masked_load=load, create_masked_store=store, create_atomic_rmw=update,
                create_atomic_cas=swap),
        patched(GridExecutor, __call__=launch),
    ):  # fmt: skip
        yield
