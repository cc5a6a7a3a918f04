"""The plan: what lets one launch serve any number of tensors, of any mix of dtypes.

A plan is an int64 table with a row of addresses, sizes, strides and dtype codes per tensor (or per tuple of
tensors that belong together: a parameter and its averages), and a table of chunks, runs of elements of one row,
which the kernels share out among blocks or threads. Both stand on the tensors' device.

A plan holds addresses and no tensors, so it is only good as long as those tensors are where they were. `describe`
gives two numbers per tensor, its address and a hash of its dtype, shape and strides; `unchanged` compares
them with the present, before every use. `.data =`, `.to()`, `load_state_dict(assign=True)` and the like all show
there. `plan_for` keeps the plans of recent calls beside that description.
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from itertools import chain
from operator import is_
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import _ops
from ._native import missing

F = TypeVar("F", bound=Callable)


def eagerly(function: F) -> F:
    """For what makes plans: torch.compile is not to trace how, and calls the function as it is."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def _reader() -> ModuleType | None:
    """The native reader of tensors, if torch's are made as it knows them."""
    if missing["cpu"] is not None:
        return None
    native = importlib.import_module("fastreg._C_cpu")
    tensor = torch.empty(0)
    parameter = nn.Parameter(tensor)
    return native if native.recognise(tensor, tensor._cdata, parameter, parameter._cdata) else None


_native = _reader()


def kernels(name: str) -> dict[str, Callable]:
    """`_ops.kernels` of what works on addresses; that of the CPU past the dispatcher, where there is such a way."""
    return _ops.kernels(name) | ({"cpu": getattr(_native, name)} if hasattr(_native, name) else {})


def describe(tensors: list[Tensor]) -> np.ndarray:
    """(len(tensors), 2) int64: address, which tells the device too, and a hash of dtype, shape and strides."""
    if _native is not None:
        described = np.empty((len(tensors), 2), np.int64)
        if _native.describe_into(tensors, described):
            return described
    rows = [(t.data_ptr(), hash((t.dtype, t.device, t.shape, t.stride(), t.is_conj()))) for t in tensors]
    return np.array(rows, np.int64).reshape(-1, 2)


def unchanged(tensors: list[Tensor], rows: np.ndarray) -> bool:
    """Whether `describe(tensors)` still gives `rows`."""
    if _native is not None and _native.still_as(tensors, rows):
        return True
    strided = all(tensor.layout is torch.strided for tensor in tensors)
    return strided and len(tensors) == len(rows) and np.array_equal(describe(tensors), rows)


def with_gradients(params: dict[str, Tensor]) -> list[Tensor]:
    """Those that are trained, have elements and a gradient."""
    return [p for p in params.values() if p.requires_grad and p.grad is not None and p.numel()]


def unchanged_with_gradients(params: dict[str, Tensor], known: list[Tensor], rows: np.ndarray) -> bool:
    """Whether `with_gradients(params)` are `known`, and `describe` of them and their gradients still gives `rows`."""
    if _native is not None and _native.still_with_gradients(params, known, rows):
        return True
    chosen = with_gradients(params)
    same = len(chosen) == len(known) and all(map(is_, chosen, known))
    return same and unchanged(chosen + [param.grad for param in chosen], rows)


class Watch:
    """Notices that a module was given another parameter, buffer or submodule object."""

    def __init__(self, *modules: nn.Module) -> None:
        everything = [m for module in modules for m in module.modules()]
        self._dicts = [d for m in everything for d in (m._parameters, m._buffers, m._modules)]
        self._values = list(chain.from_iterable(d.values() for d in self._dicts))
        self._scripted = not all(isinstance(d, dict) for d in self._dicts)  # torch.jit's are made anew at every look

    def unchanged(self) -> bool:
        if self._scripted:
            return False
        if _native is not None:
            return _native.same_values(self._dicts, self._values)
        now = list(chain.from_iterable(map(dict.values, self._dicts)))
        return len(now) == len(self._values) and all(map(is_, now, self._values))


@dataclass(frozen=True)
class Plan:
    table: Tensor  # int64 (rows, columns); the columns are the op's
    chunks: Tensor  # int64 (chunks, 2): row, first element
    chunk: int  # elements in a chunk, the last one of a row may be shorter

    @classmethod
    def make(cls, columns: np.ndarray, sizes: np.ndarray, device: torch.device) -> "Plan":
        """`columns` (rows, columns) is the table, `sizes` (rows) the number of elements to share out per row."""
        chunk = chunk_size(int(sizes.sum()), device)
        counts = -(-sizes // chunk)
        row = np.repeat(np.arange(len(sizes), dtype=np.int64), counts)
        first = np.arange(len(row), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(
            _to_device(np.ascontiguousarray(columns, np.int64), device),
            _to_device(np.stack([row, first * chunk], 1), device),
            chunk,
        )


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    if device.type != "cuda":
        return host.to(device)
    # From pinned memory the copy is queued and the host goes on; torch keeps the block until it is done.
    return _pinned(host).to(device, non_blocking=True)


_captured: list[object] = []


def capturing(device: torch.device) -> bool:
    """Whether the work for this device goes into a CUDA graph instead of running now. What it writes then is garbage
    until a replay, and must not be remembered; what it reads must stay, for every replay reads it: see `stays`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stays(what: object) -> None:
    """Keeps what a graph has the addresses of; nothing tells when a graph is gone."""
    _captured.append(what)


def _pinned(host: Tensor) -> Tensor:
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        stays(pinned)
    return pinned


@cache
def _parallelism(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 16


def chunk_size(total: int, device: torch.device) -> int:
    """Elements per chunk: enough chunks for eight per multiprocessor, none under 2,048 or over 65,536 elements.
    A power of two, so that a chunk starts aligned where its tensor does."""
    wanted = total // (8 * _parallelism(device))
    return 1 << min(max(wanted, 2048).bit_length() - 1, 16)


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors of one shape hold their elements in the same order."""
    return all(n == 1 or a == b for n, a, b in zip(one.shape, one.stride(), other.stride()))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, each place once, in whatever order of dimensions."""
    if tensor.layout is not torch.strided:
        return False
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted((st, n) for n, st in zip(tensor.shape, tensor.stride()) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


T = TypeVar("T")
_plans: OrderedDict[tuple, tuple[np.ndarray, Any]] = OrderedDict()
_KEPT = 64


def plan_for(op: Hashable, tensors: Sequence[Tensor], build: Callable[[], T]) -> T:
    """What `build` made for an earlier call on tensors in the same places, or else makes now: a plan, with what else
    the op keeps beside it, or a sentence why there can be none. No tensor is kept alive. `op` names what the table
    means, and whatever else `build` depends on."""
    if not isinstance(tensors, list):
        tensors = list(tensors)
    in_graph = bool(tensors) and capturing(tensors[0].device)
    try:
        key = (op, len(tensors), tensors[0].data_ptr(), tensors[-1].data_ptr()) if tensors else (op,)
        kept = _plans.get(key)
        if kept is not None and unchanged(tensors, kept[0]):
            _keep(key, kept)
            if in_graph:
                stays(kept[1])
            return kept[1]
        rows = describe(tensors)
    except (RuntimeError, BufferError, TypeError, AttributeError):  # one without memory of its own, such as a DTensor
        return build()
    plan = build()
    if in_graph:
        return plan
    _keep(key, (rows, plan))
    return plan


def _keep(key: tuple, entry: tuple[np.ndarray, Any]) -> None:
    """As the most recent one. Another thread may be dropping it just now."""
    _plans.pop(key, None)
    _plans[key] = entry
    if len(_plans) > _KEPT:
        _plans.popitem(last=False)
