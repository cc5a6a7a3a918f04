"""Weight averaging: EMA, SWA and their kin over a whole model, any number of averages at once.

Update n (n = 0, 1, …) of an average s with the parameter p is

    s ← lerp(s, p, w_n) = s + w_n·(p − s)     computed as p − (p − s)·(1 − w_n) from w_n = 1/2 on

in fp32 at least, rounded once. The weight w_n = 1 − decay comes from the rule, `EMA`, `SWA`, `TanhEMA` or
`PowerEMA`; w_0 is 1. A weight of 1 copies the parameter bit for bit and a weight of 0 leaves the average as it is,
by selection, whatever either of them holds. n is counted in a tensor beside the averages and never read back from
a device.

The kernels, one launch for all tensors and all averages: csrc/averaging.h (the formulas), csrc/cpu/averaging.cpp,
csrc/cuda/averaging.cu, tritonkernels/averaging.py. What they cannot take, a pair of tensors with elements in
different order for one, goes through plain PyTorch beside them.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property
from itertools import accumulate
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _backends, _checks, _ops, _plan

_backends.register("averaging", kernels=_ops.KERNEL_BACKENDS)
_update_op = _ops.kernels("average_update")
_lerp_op = _ops.kernels("average_lerp")
_swap_op = _ops.kernels("average_swap")


# ---- rules -----------------------------------------------------------------------------------------------
class Rule(ABC):
    """How much of the parameters goes into an average: `weight(n)` in update n = 1, 2, …; update 0 copies."""

    @abstractmethod
    def weight(self, n: Tensor) -> Tensor:
        """w_n = 1 − decay for a 0-d fp64 tensor n."""

    def _row(self) -> tuple[float, ...] | None:
        """The rule for the kernels: which of `weight_of` in csrc/averaging.h, and its constants."""
        return None


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: decay·average + (1 − decay)·parameter.

    `warmup` lowers the decay of early updates: "linear" caps it at (1 + n)/(10 + n), "power" at
    1 − (1 + n/warmup_gamma)^−warmup_power, as timm's ModelEmaV3 does.
    """

    decay: float = 0.999
    _: KW_ONLY
    warmup: str | None = None
    warmup_gamma: float = 1.0
    warmup_power: float = 2 / 3

    def __post_init__(self) -> None:
        _checks.in_range("decay", self.decay, 0.0, 1.0)
        _checks.choice("warmup", self.warmup, (None, "linear", "power"))
        for name in ("warmup_gamma", "warmup_power"):
            _checks.above_zero(name, getattr(self, name))

    def weight(self, n: Tensor) -> Tensor:
        weight = torch.full_like(n, 1 - self.decay)
        if self.warmup == "linear":
            return torch.maximum(weight, 9 / (10 + n))
        if self.warmup == "power":
            return torch.maximum(weight, (1 + n / self.warmup_gamma) ** -self.warmup_power)
        return weight

    def _row(self) -> tuple[float, ...]:
        kind = (None, "linear", "power").index(self.warmup)
        return kind, 1 - self.decay, self.warmup_gamma, self.warmup_power


@dataclass(frozen=True)
class SWA(Rule):
    """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407): the equal mean of all updates."""

    def weight(self, n: Tensor) -> Tensor:
        return 1 / (n + 1)

    def _row(self) -> tuple[float, ...]:
        return 3, 0, 0, 0


@dataclass(frozen=True)
class TanhEMA(Rule):
    """T-ADEMA: an EMA whose decay alpha·tanh(n) grows to alpha within a few updates."""

    alpha: float = 0.99

    def __post_init__(self) -> None:
        _checks.in_range("alpha", self.alpha, 0.0, 1.0)

    def weight(self, n: Tensor) -> Tensor:
        return (1 - self.alpha) + 2 * self.alpha / (torch.exp(2 * n) + 1)  # 1 − tanh n, without cancellation

    def _row(self) -> tuple[float, ...]:
        return 4, 1 - self.alpha, self.alpha, 0


@dataclass(frozen=True)
class PowerEMA(Rule):
    """The power-function average of EDM2 (Karras et al., arXiv 2312.02696), whose width grows with the training
    run: `std` is its standard deviation as a share of the run, above 0 and at most 12^−1/2 (an equal mean). The
    decay is (1 − 1/(n + 1))^(gamma + 1), where gamma solves std² = (gamma + 1)/((gamma + 2)²·(gamma + 3)).
    """

    std: float

    def __post_init__(self) -> None:
        _checks.is_number("std", self.std)
        if not 0 < self.std <= 12**-0.5 + 1e-9:
            raise ValueError(f"std must be above 0 and at most {12**-0.5:.6f} (12^-1/2), got {self.std}")

    @cached_property
    def gamma(self) -> float:
        inverse = self.std**-2
        return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))

    def weight(self, n: Tensor) -> Tensor:
        return -torch.expm1(-(self.gamma + 1) * torch.log1p(1 / n))

    def _row(self) -> tuple[float, ...]:
        return 5, self.gamma + 1, 0, 0


# ---- the functional form ---------------------------------------------------------------------------------
def average_(averages: Sequence[Tensor], params: Sequence[Tensor], weight: float | Tensor) -> None:
    """averages ← lerp(averages, params, weight), for a whole list at once, in place.

    `weight` is a float in [0, 1], or a 0-d floating-point tensor on the averages' device, which is not read back.
    An average and its parameter have one shape and device; their dtypes may differ. Computed in fp32 at least and
    rounded once; weight 1 copies bit for bit, weight 0 changes nothing. Integer and bool tensors are copied where
    the weight is not 0. Raises TypeError or ValueError, before anything is written, for lists that do not match,
    dtypes that cannot be averaged, and averages that share memory with each other or with themselves.
    """
    averages, params = _list("averages", averages), _list("params", params)
    if len(averages) != len(params):
        raise ValueError(f"averages and params must be of one length, got {len(averages)} and {len(params)}")
    if isinstance(weight, Tensor):
        if weight.dim() or not weight.is_floating_point():
            raise ValueError(
                f"weight must be a float or a 0-d floating-point tensor, got {weight.dtype} {tuple(weight.shape)}"
            )
    else:
        _checks.in_range("weight", weight, 0.0, 1.0)
        weight = float(weight)
    if not averages:
        return
    with torch.no_grad():
        _checks.is_tensor("averages[0]", averages[0])
        device = averages[0].device
        if isinstance(weight, Tensor) and weight.device != device:
            if weight.device.type != "cpu":
                raise ValueError(f"weight must be on the device of averages, {device}, got {weight.device}")
            weight = float(weight)
        if _backends.choose("averaging", device.type, _refuse_traced) == "reference":
            return average_reference_(*_checked(averages, params), weight)
        for part in _plan.plan_for("average", averages + params, lambda: _pair_parts(*_checked(averages, params))):
            if (backend := part.backend()) == "reference":
                _must_not_fall_back(part.reason)
                average_reference_(*_checked(*([side[i] for i in part.entries] for side in (averages, params))), weight)
                continue
            here = weight.to(part.device, torch.float64, non_blocking=True) if isinstance(weight, Tensor) else None
            value = 0.0 if here is not None else weight
            _lerp_op[backend](part.plan.table, part.plan.chunks, part.plan.chunk, part.kinds, value, here)
        _increment_versions(averages)


def _checked(averages: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors to work on, once everything about them is right."""
    for name, tensors in (("averages", averages), ("params", params)):
        for i, tensor in enumerate(tensors):
            _checks.is_tensor(f"{name}[{i}]", tensor)
    averages, params = [_local(t) for t in averages], [_local(t) for t in params]
    for i, (average, param) in enumerate(zip(averages, params)):
        _check_pair(f"averages[{i}]", average, f"params[{i}]", param)
        _checks.same_device(f"averages[{i}]", average, f"params[{i}]", param)
    if not torch.compiler.is_compiling():  # it looks at addresses
        _refuse_overlap(averages)
    return averages, params


def _list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, list):
        return tensors
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(tensors).__name__}")
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _check_pair(name: str, average: Tensor, other: str, param: Tensor) -> None:
    if average.shape != param.shape:
        raise ValueError(f"{name} must have the shape of {other}, {tuple(param.shape)}, got {tuple(average.shape)}")
    for tensor_name, tensor in ((name, average), (other, param)):
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError(f"{tensor_name} must be a dense tensor with data, got {_kind(tensor)}")
        if tensor.is_floating_point() and tensor.dtype not in _checks.FLOATS:
            raise TypeError(f"{tensor_name} has dtype {tensor.dtype}, which cannot be averaged")
    if average.is_floating_point() != param.is_floating_point():
        raise TypeError(f"{name} has dtype {average.dtype}, {other} {param.dtype}: only one of them is floating point")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {tensor.layout}, {tensor.device.type}"


def _refuse_overlap(tensors: Iterable[Tensor]) -> None:
    """No place in memory may be averaged twice."""
    for reason in _overlapping(tensors).values():
        raise ValueError(reason)


def _overlapping(tensors: Iterable[Tensor]) -> dict[int, str]:
    """The numbers of the tensors that share memory with each other or with themselves, and how."""
    found, spans = {}, []
    for i, tensor in enumerate(tensors):
        if not tensor.numel():
            continue
        reach = 0
        for stride, size in sorted((stride, n) for n, stride in zip(tensor.shape, tensor.stride()) if n > 1):
            if stride <= reach:
                strides = tensor.stride()
                found[i] = f"an average must not overlap itself, got {tuple(tensor.shape)} with strides {strides}"
            reach += (size - 1) * stride
        dense = reach + 1 == tensor.numel()
        spans.append((tensor.data_ptr(), (reach + 1) * tensor.element_size(), dense, i))
    end, solid, last = 0, False, 0  # of the memory seen so far; two that are not solid may interleave
    for start, size, dense, i in sorted(spans):
        if start < end and (dense or solid):
            for one in (last, i):
                found.setdefault(one, "two averages share memory: each place may be averaged only once")
        if start + size > end:
            end, solid, last = start + size, dense, i
    return found


_MOST_IN_CUDA = 64  # averages; kMaxAverages in csrc/cuda/averaging_launch.h


def _refuse(backend: str, rules: Sequence[Rule]) -> str | None:
    if backend == "cuda" and len(rules) > _MOST_IN_CUDA:
        return f"it takes at most {_MOST_IN_CUDA} averages at once, not {len(rules)}"
    for rule in rules:
        if rule._row() is None:
            return f"it has no kernel for the rule {rule}"
    return None


def _refuse_traced(backend: str) -> str | None:
    return "it works on addresses, which torch.compile does not see" if torch.compiler.is_compiling() else None


def _must_not_fall_back(reason: str | None) -> None:
    if reason is not None and _backends.forced() not in (None, "reference"):
        raise RuntimeError(f"fastreg.averaging: backend {_backends.forced()!r} is forced but cannot serve: {reason}")


_COPIED, _ALIGNED, _RAW = 1 << 8, 1 << 9, 4  # as in csrc/averaging.h


def _row_of(param: Tensor, averages: Sequence[Tensor], copied: bool) -> tuple[int, ...] | str:
    """A row of the plan, see csrc/averaging.h, or why there is none."""
    for average in averages:
        if average.device != param.device:
            return f"an average on {average.device} of a parameter on {param.device}"
        if not (_plan.is_dense(param) and _plan.is_dense(average) and _plan.same_layout(param, average)):
            return f"strides {param.stride()} and {average.stride()}: parameter and average differ in memory layout"
    addresses = [param.data_ptr(), *(average.data_ptr() for average in averages)]
    dtypes = {average.dtype for average in averages}
    if len(dtypes) != 1:
        return f"averages of one parameter in {dtypes}"
    (dtype,) = dtypes
    elements = param.numel()
    if dtype == param.dtype and (copied or dtype not in _plan.DTYPE_CODES):
        codes, elements = _RAW, elements * param.element_size()
    elif dtype in _plan.DTYPE_CODES and param.dtype in _plan.DTYPE_CODES:
        codes = _plan.DTYPE_CODES[param.dtype] | _plan.DTYPE_CODES[dtype] << 4 | (_COPIED if copied else 0)
    else:
        return f"{param.dtype} copied to {dtype}"
    if all(address % 16 == 0 for address in addresses):
        codes |= _ALIGNED
    return elements, codes, *addresses


def _make_plan(rows: Sequence[tuple[int, ...]], columns: int, device: torch.device) -> _plan.Plan:
    table = np.array(rows, np.int64).reshape(-1, columns)
    return _plan.Plan.make(table, table[:, 0], device)


def _kinds(rows: Iterable[tuple[int, ...]]) -> int:
    """A bit per kind of row: parameter's dtype | average's dtype << 2 | aligned << 4, or 32 | aligned for raw rows."""
    kinds = 0
    for _, codes, *_ in rows:
        aligned = int(codes & _ALIGNED != 0)
        kinds |= 1 << (32 | aligned if codes & 15 == _RAW else codes & 3 | (codes >> 4 & 3) << 2 | aligned << 4)
    return kinds


@dataclass
class _Part:
    """What one launch does for the tensors numbered `entries`, or, with a reason, what plain PyTorch does instead."""

    device: torch.device
    entries: Sequence[int]
    plan: _plan.Plan | None = None
    kinds: int = 0
    reason: str | None = None
    rules: Tensor | None = None
    ticket: Tensor | None = None

    def backend(self, rules: Sequence[Rule] = ()) -> str:
        return "reference" if self.plan is None else _backends.choose("averaging", self.device.type, _refuse, rules)


def _split(
    params: Sequence[Tensor], columns: Sequence[Sequence[Tensor]], copied: Sequence[bool], last: torch.device
) -> list[_Part]:
    """First what goes through plain PyTorch, then a launch for every device, that for `last` at the end, even if it
    has nothing to do there. Parameter i has its averages at columns[…][i]."""
    rows: dict[torch.device, dict[int, tuple[int, ...]]] = {last: {}}
    apart, reason = [], None
    for i, (param, alone) in enumerate(zip(params, copied)):
        row = _row_of(param, [column[i] for column in columns], alone)
        if isinstance(row, str):
            apart.append(i)
            reason = f"tensor {i}: {row}"
        else:
            rows.setdefault(param.device, {})[i] = row
    rows[last] = rows.pop(last)
    parts = [] if reason is None else [_Part(last, apart, reason=reason)]
    for device, here in rows.items():
        plan = _make_plan(list(here.values()), 3 + len(columns), device)
        parts.append(_Part(device, list(here), plan, _kinds(here.values())))
    return parts


def _pair_parts(averages: Sequence[Tensor], params: Sequence[Tensor]) -> list[_Part]:
    copied = [not average.is_floating_point() for average in averages]
    return _split(params, [averages], copied, averages[0].device)


def _increment_versions(tensors: list[Tensor]) -> None:
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def average_reference_(averages: Sequence[Tensor], params: Sequence[Tensor], weight: float | Tensor) -> None:
    """The formula in plain PyTorch, on any device."""
    if isinstance(weight, Tensor) and weight.device.type == "cpu" and not torch.compiler.is_compiling():
        weight = float(weight)
    if isinstance(weight, Tensor):
        for average, param in zip(averages, params):
            new = _lerp(average, param, weight) if average.is_floating_point() else param.to(average.dtype)
            _select(average, param, new, weight)
    elif weight:
        alike: list[tuple[Tensor, Tensor]] = []
        for average, param in zip(averages, params):
            if weight == 1 or not average.is_floating_point():
                average.copy_(param)
            elif average.dtype == param.dtype:
                alike.append((average, param))
            else:
                average.copy_(_lerp(average, param, weight))
        if alike:
            torch._foreach_lerp_([a for a, _ in alike], [p for _, p in alike], weight)


def _lerp(average: Tensor, param: Tensor, weight: float | Tensor, dtype: torch.dtype | None = None) -> Tensor:
    compute = torch.float64 if torch.float64 in (average.dtype, param.dtype) else torch.float32
    if isinstance(weight, Tensor):
        weight = weight.to(compute)
    return torch.lerp(average.to(compute), param.to(compute), weight).to(dtype or average.dtype)


def _select(average: Tensor, param: Tensor, new: Tensor, weight: Tensor) -> None:
    """average ← new, but the parameter itself at weight 1 and nothing at weight 0."""
    new = torch.where(weight == 1, param.to(average.dtype), new)
    average.copy_(torch.where(weight == 0, average, new))


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    if all(target.device == source.device for target, source in zip(targets, sources)):
        return average_(targets, sources, 1.0)
    for target, source in zip(targets, sources):
        target.copy_(source)


def _copy_one_by_one(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """For targets that share memory, with each other or, expanded, with themselves."""
    for target, source in zip(targets, sources):
        for dim, stride in enumerate(target.stride()):
            if stride == 0 and target.shape[dim]:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        target.copy_(source)


def _swap_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Both tensors of each pair get the other's values, in one launch per device and without a copy."""
    by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for pair in pairs:
        for side, tensor in zip(by_device.setdefault(pair[0].device, ([], [])), pair):
            side.append(tensor)
    for device, (ones, others) in by_device.items():
        alike = all(one.dtype == other.dtype for one, other in zip(ones, others))  # bytes cannot change places else
        if not alike or _backends.choose("averaging", device.type, _refuse, ()) == "reference":
            _swap_reference(ones, others)
            continue
        for part in _split(ones, [others], [True] * len(ones), device):
            if (backend := part.backend()) == "reference":
                _must_not_fall_back(part.reason)
                _swap_reference([ones[i] for i in part.entries], [others[i] for i in part.entries])
            else:
                _swap_op[backend](part.plan.table, part.plan.chunks, part.plan.chunk)
        _increment_versions(ones + others)


def _swap_reference(ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for one, other in zip(ones, others):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


# ---- names and tensors of a model ------------------------------------------------------------------------
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers by name, without what wrappers put in the names, tied ones under each name."""
    model = _unwrap(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if len({_clean(name) for name in (*params, *buffers)}) < len(params) + len(buffers):
        return params, buffers  # here a name of a wrapper is a name of the model's own
    return ({_clean(name): t for name, t in named.items()} for named in (params, buffers))


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves whole parameters in a model's root between a forward and the next backward; what is averaged,
    and what a forward gathers again, are the shards."""
    for module in filter(_is_fully_sharded, model.modules()):
        module.reshard()


def _is_fully_sharded(module: nn.Module) -> bool:
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _shard(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, which while autograd is on would take a dispatch."""
    with torch.no_grad():
        return tensor.to_local()


def _local(tensor: Tensor) -> Tensor:
    """What the kernels work on: without autograd, this process's shard of a DTensor, complex numbers as pairs."""
    tensor = (_shard(tensor) if hasattr(tensor, "to_local") else tensor).detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check_averageable(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for kind, named in (("parameter", params), ("buffer", buffers)):
        for name, tensor in named.items():
            if nn.parameter.is_lazy(tensor):
                raise ValueError(f"{kind} {name!r} is not initialised yet: run the model once before averaging it")
            _check_pair(f"{kind} {name!r}", local := _local(tensor), "itself", local)


def _owned_twice(tensors: Sequence[Tensor]) -> Any:
    """While C++ owns a tensor too, torch need not hand it from Python to C++ and back to increment its version, which
    is two thirds of the time that this takes."""
    return getattr(torch._C, "ScriptList", list)(list(tensors))


class _Link:
    """The tensors of a model beside the averages of them, matched by name: what an update reads and writes.

    `averages` holds per average a mapping of names to tensors, which are those of the module `owner` if there is
    one; `averaged` the names that follow the rules, all others are copied. `fresh` says whether model and averages
    still are what they were. `written` are the tensors whose versions to increment, the averages unless given.
    """

    def __init__(
        self,
        model: nn.Module,
        averages: Sequence[Mapping[str, Tensor]],
        averaged: set[str],
        owner: nn.Module | None = None,
        written: Sequence[Tensor] = (),
    ) -> None:
        params, buffers = _tensors_of(model)
        present, known = params | buffers, averages[0]
        if present.keys() != known.keys():
            raise ValueError(
                "model does not have the parameters and buffers that are being averaged: "
                f"missing {sorted(known.keys() - present.keys())}, extra {sorted(present.keys() - known.keys())}"
            )
        self._watch = _plan.Watch(model, *([] if owner is None else [owner]))
        self.names: list[str] = []
        self.copied: list[bool] = []
        self.sources: list[Tensor] = []
        self.averages: list[list[Tensor]] = [[] for _ in averages]
        source_of: dict[Tensor, Tensor] = {}
        for name, tensor in present.items():
            first, source = known[name], _local(tensor)
            if first in source_of:  # tied: averaged once, twice would be wrong
                if source_of[first].data_ptr() != source.data_ptr():
                    raise ValueError(f"{name!r} shares its average with a tensor that it no longer shares values with")
                continue
            source_of[first] = source
            self.names.append(name)
            self.copied.append(name not in averaged)
            self.sources.append(source)
            for column, named in zip(self.averages, averages):
                column.append(target := _local(named[name]))
                _check_pair(f"the average of {name!r}", target, f"{name!r} of the model", source)
        _refuse_overlap([target for column in self.averages for target in column])
        # A caller can move what is in a module; what belongs to a WeightAverager stays where it is.
        within_reach = [*present.values(), *([] if owner is None else known.values())]
        everything = list({id(t): t for t in within_reach}.values())
        self._plain = [t for t in everything if not hasattr(t, "to_local")]
        self._sharded = [t for t in everything if hasattr(t, "to_local")]
        self._rows = _plan.describe(self._watched())
        self._written = written or [target for column in self.averages for target in column]
        self._held = _owned_twice(self._written)
        self._parts: list[_Part] | None = None
        self._rules: Sequence[Rule] = ()
        self.staging: _Staging | None = None

    def _watched(self) -> list[Tensor]:
        return self._plain + [_shard(t) for t in self._sharded] if self._sharded else self._plain

    @cached_property
    def overlapping(self) -> set[int]:
        """The numbers of the model's tensors that share memory: views of one another, expanded ones."""
        return set(_overlapping(self.sources))

    def write(self, targets: list[Tensor], values: list[Tensor], numbers: Iterable[int] | None = None) -> None:
        """Copies values to tensors of the model, to all of them or to those of the given numbers."""
        numbers = range(len(targets)) if numbers is None else list(numbers)
        apart = [at for at, i in enumerate(numbers) if i in self.overlapping]
        alone = [at for at, i in enumerate(numbers) if i not in self.overlapping]
        _copy_all([targets[at] for at in alone], [values[at] for at in alone])
        _copy_one_by_one([targets[at] for at in apart], [values[at] for at in apart])

    def fresh(self) -> bool:
        return self._watch.unchanged() and _plan.unchanged(self._watched(), self._rows)

    def update(
        self, rules: Sequence[Rule], clock: "_Clock", found_inf: Tensor | None, rounding_seed: int | None
    ) -> None:
        home = clock.n_averaged.device
        if _backends.choose("averaging", home.type, _refuse, rules) == "reference":
            _update_reference(self, range(len(self.names)), rules, clock, found_inf, rounding_seed)
            return clock.advance(found_inf)
        parts, in_graph = self._parts, _plan.capturing(home)
        if parts is None or not all(map(is_, self._rules, rules)):
            parts = self._parts_for(rules, home)
            if not in_graph:
                self._parts, self._rules = parts, rules
        if in_graph:
            _plan.stays(parts)
        for part in parts:
            if (backend := part.backend(rules)) == "reference":
                _must_not_fall_back(part.reason)
                _update_reference(self, part.entries, rules, clock, found_inf, rounding_seed)
                continue
            # The launch on the counters' own device, the last one, advances them.
            counters = (clock.n_averaged, clock.calls) if part.device == home else clock.copies(part.device)
            _update_op[backend](
                part.plan.table,
                part.plan.chunks,
                part.plan.chunk,
                part.kinds,
                part.rules,
                *counters,
                part.ticket,
                None if found_inf is None else found_inf.reshape(()).float().to(part.device, non_blocking=True),
                clock.update_every,
                clock.start_step,
                rounding_seed,
            )
        _increment_versions([clock.n_averaged, clock.calls])
        _increment_versions(self._written)

    def _parts_for(self, rules: Sequence[Rule], home: torch.device) -> list[_Part]:
        constants = np.array([rule._row() for rule in rules], np.float64)
        parts = _split(self.sources, self.averages, self.copied, home)
        for part in parts:
            part.rules = _plan._to_device(constants, part.device)
            part.ticket = torch.zeros((), dtype=torch.int32, device=part.device)
        return parts


@torch.no_grad()
def _update_reference(
    link: _Link,
    entries: Iterable[int],
    rules: Sequence[Rule],
    clock: "_Clock",
    found_inf: Tensor | None,
    rounding_seed: int | None,
) -> None:
    """The update of some entries in plain PyTorch, on any device; the counters stay."""
    due, n = clock.due(found_inf), clock.n_averaged
    for j, (rule, column) in enumerate(zip(rules, link.averages)):
        weight = torch.where(due, torch.where(n == 0, 1.0, rule.weight(n.double())), 0.0)
        kinds: dict[tuple[torch.device, bool], list[int]] = {}
        for i in entries:
            average, value = column[i], due.double() if link.copied[i] else weight
            if rounding_seed is not None and average.dtype in _DROPPED_BITS and not link.copied[i]:
                seed = _rounding_key(rounding_seed, n, j, i).to(average.device)
                source, value = link.sources[i].to(average.device), value.to(average.device)
                exact = _lerp(average, source, value, torch.float32)
                _select(average, source, _round_stochastically(exact, average.dtype, seed), value)
            else:
                kinds.setdefault((average.device, link.copied[i]), []).append(i)
        for (device, copied), chosen in kinds.items():
            value = (due.double() if copied else weight).to(device, non_blocking=True)
            average_reference_([column[i] for i in chosen], [link.sources[i].to(device) for i in chosen], value)


# ---- stochastic rounding: the same bits as the kernels give, csrc/averaging.h --------------------------------
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def _rounding_key(seed: int, n: Tensor, j: int, row: int) -> Tensor:
    """splitmix64 over (seed, update, average, row), in int64 arithmetic that wraps; its low 32 bits."""

    def mixed(h: Tensor, shift: int, factor: int) -> Tensor:
        return (h ^ (h >> shift & (1 << 64 - shift) - 1)) * (factor - (1 << 64))

    h = torch.full_like(n, seed)
    for part in (n, j, row, 0):
        h = (h ^ part) + (0x9E3779B97F4A7C15 - (1 << 64))
        h = mixed(mixed(h, 30, 0xBF58476D1CE4E5B9), 27, 0x94D049BB133111EB)
        h = h ^ (h >> 31 & (1 << 33) - 1)
    return h & 0xFFFFFFFF


def _round_stochastically(exact: Tensor, dtype: torch.dtype, key: Tensor) -> Tensor:
    """`exact` (fp32) to one of its two neighbours in `dtype`, the nearer one more often."""
    index = torch.empty_like(exact, dtype=torch.int64)
    index.as_strided([exact.numel()], [1]).copy_(torch.arange(exact.numel(), device=exact.device))
    h = index * 0x9E3779B1 & 0xFFFFFFFF ^ key
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ h >> shift) * factor & 0xFFFFFFFF
    random = (h ^ h >> 16).int()
    mask = (1 << _DROPPED_BITS[dtype]) - 1
    rounded = (exact.view(torch.int32) + (random & mask) & ~mask).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 halves are multiples of 2^-24
        steps = (exact.abs() * 2**24 + (random >> 8 & 0xFFFFFF).float() * 2**-24).floor()
        rounded = torch.where(exact.abs() < 2**-14, torch.copysign(steps * 2**-24, exact), rounded)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)


@dataclass
class _Clock:
    """When updates are due: `calls` counts calls, `n_averaged` the updates among them, both 0-d int64 tensors."""

    n_averaged: Tensor
    calls: Tensor
    update_every: int
    start_step: int

    def due(self, found_inf: Tensor | None) -> Tensor:
        since = self.calls - self.start_step
        due = (since >= 0) & (since % self.update_every == 0)
        return due if found_inf is None else due & (found_inf.reshape(()) == 0)

    def advance(self, found_inf: Tensor | None) -> None:
        update = self.due(found_inf)
        self.calls += 1 if found_inf is None else found_inf.reshape(()) == 0
        self.n_averaged += update

    def copies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.n_averaged.to(device, non_blocking=True), self.calls.to(device, non_blocking=True)


def _check_numbers(update_every: int, start_step: int, rounding_seed: int | None) -> None:
    for name, value, low in (("update_every", update_every, 1), ("start_step", start_step, 0)):
        _checks.is_integer(name, value)
        _checks.in_range(name, value, low)
    if rounding_seed is not None:
        _checks.is_integer("rounding_seed", rounding_seed)


def _check_found_inf(found_inf: Tensor | None, clock: _Clock | None) -> None:
    """`clock` is that whose device the flag must be on, if it must."""
    if found_inf is None:
        return
    _checks.is_tensor("found_inf", found_inf)
    if found_inf.numel() != 1:
        raise ValueError(f"found_inf must hold one element, got shape {tuple(found_inf.shape)}")
    if clock is not None:
        _checks.same_device("found_inf", found_inf, "the averages' counter", clock.n_averaged)


# ---- averages on the host of a model on a GPU --------------------------------------------------------------
def _crosses(source: Tensor, average: Tensor) -> bool:
    return source.is_cuda and average.device.type == "cpu"


def _buffers(device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """As many bytes on the device, and in pinned memory."""
    return (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
    )


class _Transfer:
    """Copies of one GPU's tensors in pinned memory, made while the GPU and the host go on with other work."""

    def __init__(self, tensors: list[Tensor]) -> None:
        starts = list(accumulate((-(-t.nbytes // 16) * 16 for t in tensors), initial=0))
        self._tensors = tensors
        self._aside, self._pinned = _buffers(tensors[0].device, starts[-1])
        self._snapshots = [_place(self._aside, start, t) for start, t in zip(starts, tensors)]
        self.copies = [_place(self._pinned, start, t) for start, t in zip(starts, tensors)]
        self._open()

    def _open(self) -> None:
        self._stream, self._done = torch.cuda.Stream(self._aside.device), torch.cuda.Event()

    def start(self) -> None:
        """`copies` will hold what the tensors hold once the work queued so far is done. They may change at once: one
        launch takes them aside, and a side stream fetches them from there."""
        average_(self._snapshots, self._tensors, 1.0)
        self._stream.wait_stream(torch.cuda.current_stream(self._aside.device))
        with torch.cuda.stream(self._stream):
            self._pinned.copy_(self._aside, non_blocking=True)
            self._done.record()
        self._aside.record_stream(self._stream)

    def finish(self) -> None:
        self._done.synchronize()


def _place(flat: Tensor, start: int, like: Tensor) -> Tensor:
    place = flat[start : start + like.nbytes].view(like.dtype)
    return place.as_strided(like.shape, like.stride()) if _plan.is_dense(like) else place.view(like.shape)


@cache
def _worker() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fastreg-averaging")


class _Staging:
    """Updates a link whose averages are on the host from parameters on GPUs, in the background."""

    def __init__(self, link: _Link, crossing: Sequence[int]) -> None:
        self._link, self._transfers = link, []
        by_device: dict[torch.device, list[int]] = {}
        for i in crossing:
            by_device.setdefault(link.sources[i].device, []).append(i)
        for device, entries in by_device.items():
            self._flag = torch.zeros((), device=device)  # room for found_inf; that on the last device is used
            self._transfers.append(transfer := _Transfer([self._flag, *(link.sources[i] for i in entries)]))
            for i, copy in zip(entries, transfer.copies[1:]):
                link.sources[i] = copy

    def update(
        self, rules: Sequence[Rule], clock: "_Clock", found_inf: Tensor | None, rounding_seed: int | None
    ) -> Future | None:
        elsewhere = found_inf is not None and _crosses(found_inf, clock.n_averaged)
        if not elsewhere and not clock.due(found_inf):
            return clock.advance(found_inf)
        if elsewhere:
            self._flag.copy_(found_inf.reshape(()), non_blocking=True)
            found_inf = self._transfers[-1].copies[0]
        for transfer in self._transfers:
            transfer.start()
        return _worker().submit(self._finish, rules, clock, found_inf, rounding_seed)

    def _finish(self, *args: Any) -> None:
        for transfer in self._transfers:
            transfer.finish()
        self._link.update(*args)


# ---- one average, a module -------------------------------------------------------------------------------
class AveragedModel(nn.Module):
    """A copy of `model` whose parameters are an average of the model's over the updates.

    `torch.optim.swa_utils.AveragedModel` with a `rule` in place of its functions; state dicts go both ways (those of
    timm and ema-pytorch through `fastreg.averaging.convert_state_dict`), and `torch.optim.swa_utils.update_bn` works
    on it. Call `update_parameters(model)` after each optimizer step.

    Args:
        rule: `SWA()` if None.
        device: where the average lives; the model's devices if None. With "cpu" for a model on a GPU, updates go on
            in the background: a copy of the model on its GPU, pinned memory, a stream and a thread keep the training
            from waiting. Whatever goes through this object waits for the last update; with tensors taken from it
            earlier, call `synchronize()` first.
        dtype: of the averaged floating-point tensors; the model's dtypes if None. An fp32 average of a bf16 model
            keeps moving where one in bf16 stalls.
        use_buffers: average floating-point buffers too; otherwise they are copied, as integer buffers always are.
        update_every, start_step: call number c = 0, 1, … is an update if c ≥ start_step and
            (c − start_step) % update_every == 0; other calls change nothing. Counting calls that are not updates
            adds an entry `calls` to the state dict.
        rounding_seed: an integer rounds averages in fp16 and bf16 stochastically, the same way for the same seed,
            so that they follow small changes in the mean where rounding to nearest would stop.

    Parameters are matched by name, wrappers' `module.` and `_orig_mod.` left out. `update_parameters` raises
    ValueError, before anything is written, if one is missing, new or resized. DTensor parameters are averaged shard
    by shard; a model after `fully_shard`, which cannot be copied, is one for `WeightAverager`. torch.compile ends its
    graph before an update, which works on addresses.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        use_buffers: bool = False,
        update_every: int = 1,
        start_step: int = 0,
        rounding_seed: int | None = None,
    ) -> None:
        super().__init__()
        _checks.is_module("model", model)
        self.rule = _check_rule("rule", SWA() if rule is None else rule)
        _check_numbers(update_every, start_step, rounding_seed)
        _check_dtype(dtype)
        _check_averageable(dict(model.named_parameters()), dict(model.named_buffers()))
        if any(map(_is_fully_sharded, model.modules())):
            raise ValueError(
                "model cannot be copied once fully_shard was applied to it: WeightAverager averages its shards"
            )
        self.module = deepcopy(_unwrap(model)).to(device=device)
        if dtype is not None:  # nn.Module.to would make complex tensors real
            self.module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if any(stride == 0 and n > 1 for n, stride in zip(tensor.shape, tensor.stride())):
                tensor.data = tensor.data.contiguous()  # an expanded tensor has one place for many elements
        self.use_buffers, self.rounding_seed = use_buffers, rounding_seed
        self.update_every, self.start_step = update_every, start_step
        home = next((p.device for p in (*self.module.parameters(), *self.module.buffers())), device)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64, device=home))
        counts_calls = update_every != 1 or start_step != 0
        self.register_buffer("calls", torch.zeros_like(self.n_averaged), persistent=counts_calls)
        self._links: weakref.WeakKeyDictionary[nn.Module, _Link] = weakref.WeakKeyDictionary()
        self._pending: Future | None = None  # an update in the background
        self.register_state_dict_pre_hook(_settle)
        self.register_load_state_dict_pre_hook(_adapt_state_dict)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @_plan.eagerly
    def update_parameters(self, model: nn.Module, *, found_inf: Tensor | None = None) -> None:
        """Takes the model's present parameters into the average.

        `found_inf` is a tensor of one element, such as GradScaler's: where it is not 0 the call does nothing and is
        not counted.
        """
        _checks.is_module("model", model)
        self.synchronize()
        counters = self._buffers  # by way of `__getattr__` they take twenty times as long
        clock = _Clock(counters["n_averaged"], counters["calls"], self.update_every, self.start_step)
        link = self._links.get(model)
        if link is None or not link.fresh():
            link = self._links[model] = self._make_link(model)
        _check_found_inf(found_inf, clock if link.staging is None else None)
        if link.staging is None:
            link.update([self.rule], clock, found_inf, self.rounding_seed)
        else:
            self._pending = link.staging.update([self.rule], clock, found_inf, self.rounding_seed)

    def synchronize(self) -> None:
        """Waits for an update that is under way in the background."""
        pending = self.__dict__["_pending"]
        if pending is not None:
            self._pending = None
            pending.result()

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_pending") is not None and name in ("module", "n_averaged", "calls"):
            self.synchronize()
        return super().__getattr__(name)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self.synchronize()  # parameters, buffers and the like all pass here
        return super().named_modules(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> "AveragedModel":
        self.synchronize()
        return super()._apply(*args, **kwargs)

    def _make_link(self, model: nn.Module) -> _Link:
        params, buffers = _tensors_of(self.module)
        link = _Link(model, [params | buffers], _follows_rule(params, buffers if self.use_buffers else {}), self)
        crossing = [i for i, source in enumerate(link.sources) if _crosses(source, link.averages[0][i])]
        link.staging = _Staging(link, crossing) if crossing else None
        return link

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return self.__dict__ | {"_links": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._links = weakref.WeakKeyDictionary()

    def extra_repr(self) -> str:
        return f"rule={self.rule}, use_buffers={self.use_buffers}"


def _follows_rule(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> set[str]:
    averageable = (*_checks.FLOATS, torch.complex64, torch.complex128)
    return {name for name, t in (*params.items(), *buffers.items()) if t.dtype in averageable}


def _settle(module: AveragedModel, *_: Any) -> None:
    module.synchronize()


def _adapt_state_dict(module: AveragedModel, state_dict: dict, prefix: str, *_: Any) -> None:
    """Takes names as a wrapped model's average has them, and a state dict that does not count calls."""
    inner = f"{prefix}module."
    own = {inner + name: inner + _clean(name) for name in module.module.state_dict(keep_vars=True)}
    clean = {short: name for name, short in own.items()}
    for name in [name for name in state_dict if name.startswith(inner) and name not in own]:
        wanted = clean.get(inner + _clean(name.removeprefix(inner)))
        if wanted is not None and wanted not in state_dict:
            state_dict[wanted] = state_dict.pop(name)
    n = state_dict.get(f"{prefix}n_averaged")
    if n is not None and f"{prefix}calls" not in state_dict:
        calls = torch.where(n > 0, module.start_step + n * module.update_every, 0)
        module.calls.copy_(calls)
        if "calls" not in module._non_persistent_buffers_set:
            state_dict[f"{prefix}calls"] = calls


def convert_state_dict(state_dict: Mapping[str, Tensor], n_averaged: int = 1) -> dict[str, Tensor]:
    """The state dict of another library's average as `AveragedModel.load_state_dict` takes it.

    Knows timm's ModelEma, ModelEmaV2 and ModelEmaV3 (`module.*`), ema-pytorch's EMA (`ema_model.*`) and
    torch.optim.swa_utils.AveragedModel. timm keeps no count of its updates: give it as `n_averaged`. Raises
    ValueError for anything else.
    """
    if any(name.startswith("ema_model.") for name in state_dict):
        inner = {name.removeprefix("ema_model."): t for name, t in state_dict.items() if name.startswith("ema_model.")}
        started = state_dict.get("initted", torch.tensor(True)).reshape(()).bool()
        # ema-pytorch counts calls; its first average is a copy, as with us.
        count = torch.where(started, state_dict.get("step", torch.tensor(n_averaged)).reshape(()), 0)
    elif state_dict and all(name == "n_averaged" or name.startswith("module.") for name in state_dict):
        inner = {name.removeprefix("module."): t for name, t in state_dict.items() if name != "n_averaged"}
        count = state_dict.get("n_averaged", torch.tensor(n_averaged))
    else:
        raise ValueError(
            f"state_dict must be that of torch's AveragedModel, timm's ModelEmaV3 or ema-pytorch's EMA, got names such "
            f"as {sorted(state_dict)[:3]}"
        )
    return {"n_averaged": count.to(torch.int64), **{f"module.{name}": t for name, t in inner.items()}}


def _check_rule(name: str, rule: object) -> Rule:
    if not isinstance(rule, Rule):
        raise TypeError(f"{name} must be a rule such as EMA(0.999), SWA(), TanhEMA() or PowerEMA(0.1), got {rule!r}")
    return rule


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _checks.FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


# ---- several averages, no module -------------------------------------------------------------------------
class WeightAverager:
    """Several averages of one model, made in one pass over its parameters, without a copy of the module.

        averager = WeightAverager(model, {"ema": EMA(0.999), "swa": SWA()})
        for batch in data:
            ...
            optimizer.step()
            averager.update()
        with averager.swapped("ema"):
            evaluate(model)

    Args:
        rules: name → rule.
        dtype: of the averages of floating-point tensors; the model's dtypes if None.
        buffers: "copy" keeps floating-point buffers equal to the model's at the last update, "average" averages
            them; integer buffers are always copied.
        update_every, start_step, rounding_seed: as in `AveragedModel`.

    The averages start as copies of the model, on its devices; for an average on the host of a model on a GPU there is
    `AveragedModel(model, rule, device="cpu")`. DTensor parameters (FSDP2) are averaged shard by shard. As there,
    torch.compile ends its graph before an update or a swap.
    """

    def __init__(
        self,
        model: nn.Module,
        rules: Mapping[str, Rule],
        *,
        dtype: torch.dtype | None = None,
        buffers: str = "copy",
        update_every: int = 1,
        start_step: int = 0,
        rounding_seed: int | None = None,
    ) -> None:
        _checks.is_module("model", model)
        if not isinstance(rules, Mapping) or not rules:
            raise ValueError(f"rules must map at least one name to a rule, got {rules!r}")
        self.rules = {name: _check_rule(f"rules[{name!r}]", rule) for name, rule in rules.items()}
        _check_numbers(update_every, start_step, rounding_seed)
        _check_dtype(dtype)
        _checks.choice("buffers", buffers, ("copy", "average"))
        _reshard(model)
        params, other = _tensors_of(model)
        _check_averageable(params, other)
        self._follows = _follows_rule(params, other if buffers == "average" else {})
        self._versions: dict[torch.device, Tensor] = {}  # whose version counters the averages share
        self._averages = {name: self._copy(params | other, dtype) for name in rules}
        home = next((t.device for t in self._averages[next(iter(rules))].values()), None)
        zero = torch.zeros((), dtype=torch.int64, device=home)
        self._clock = _Clock(zero, zero.clone(), update_every, start_step)
        self._model, self.rounding_seed = model, rounding_seed
        self._link: _Link | None = None
        self._swapped: str | None = None
        self._inside: _Link | None = None  # what has been swapped
        self._aside: dict[int, Tensor] = {}  # of the model's own values, what has not changed places meanwhile

    def __repr__(self) -> str:
        return f"WeightAverager({_checks.counted(self._follows, 'tensor')}, {self.rules})"

    def _copy(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A tensor of its own per name; names that share memory share the copy."""
        made: dict[tuple, Tensor] = {}
        copies = {}
        for name, tensor in tensors.items():
            local = (_shard(tensor) if hasattr(tensor, "to_local") else tensor).detach()
            key = (local.data_ptr(), local.shape, local.stride(), local.dtype) if local.numel() else (name,)
            if key not in made:
                wanted = dtype if dtype is not None and name in self._follows and not local.is_complex() else None
                # All averages of a device share one version counter: a single increment serves them all.
                version = self._versions.setdefault(local.device, torch.empty(0, device=local.device))
                made[key] = version.detach()
                made[key].data = torch.empty_like(local, dtype=wanted).copy_(local)
            copies[name] = made[key]
        return copies

    @property
    def n_averaged(self) -> Tensor:
        """The number of updates made, a 0-d int64 tensor."""
        return self._clock.n_averaged

    @_plan.eagerly
    def update(self, *, found_inf: Tensor | None = None) -> None:
        """Takes the model's present parameters into every average. `found_inf` as in `AveragedModel`."""
        self._refuse_inside("update")
        _check_found_inf(found_inf, self._clock)
        self._current_link().update(list(self.rules.values()), self._clock, found_inf, self.rounding_seed)

    @_plan.eagerly
    @torch.no_grad()
    def copy_to(self, model: nn.Module, name: str) -> None:
        """Writes the average `name` into `model`: this model, or another with the same names and shapes."""
        _checks.is_module("model", model)
        self._refuse_inside("copy_to")
        link = _Link(model, [self._named(name)], self._follows)
        link.write(link.sources, link.averages[0])

    @contextmanager
    def swapped(self, name: str) -> Iterator[nn.Module]:
        """The model holds the average `name` inside the block, and its own values, to the bit, after it, whatever
        happens inside. Nesting, `update` and `load_state_dict` raise RuntimeError inside; `state_dict` there is right.

        Where dtypes are alike the two change places, so nothing is copied aside and what the block does to the model
        (`update_bn`, say) stays in the average. Where they differ the model's own values are kept aside, a temporary
        copy of the model. It cannot be spared: as many as 65,537 fp32 numbers round to one bf16 number, so the 16 bits
        that an fp32 average could lend while the model shows its rounded value do not tell which one it was. So are
        those of tensors that share memory. What the block puts in a tensor's place, in another shape, stays there."""
        self._refuse_inside("swapped")
        self._named(name)
        self._swap_in(name)
        try:
            yield self._model
        finally:
            self._swap_out()

    @contextmanager
    def _swapped_back(self) -> Iterator[None]:
        """Inside `swapped`: the model holds its own values for a while."""
        name = self._swapped
        self._swap_out()
        try:
            yield
        finally:
            self._swap_in(name)

    @_plan.eagerly
    @torch.no_grad()
    def _swap_in(self, name: str) -> None:
        link = self._current_link()
        averages = self._column(link, name)
        differ = {i for i, source in enumerate(link.sources) if source.dtype != averages[i].dtype}
        kept = sorted(differ | link.overlapping)
        aside = {i: torch.empty_like(link.sources[i]) for i in kept}
        _copy_all(list(aside.values()), [link.sources[i] for i in kept])
        link.write([link.sources[i] for i in kept], [averages[i] for i in kept], kept)
        _swap_all([pair for i, pair in enumerate(zip(link.sources, averages)) if i not in aside])
        self._swapped, self._inside, self._aside = name, link, aside

    @_plan.eagerly
    @torch.no_grad()
    def _swap_out(self) -> None:
        if (link := self._inside) is None:
            return
        averages, aside = self._column(link, self._swapped), self._aside
        sources = link.sources
        if not link.fresh():
            _reshard(self._model)  # after which it may be fresh again
            sources = sources if link.fresh() else self._still_there(link)
        link.write([sources[i] for i in aside], list(aside.values()), aside)
        _swap_all([pair for i, pair in enumerate(zip(sources, averages)) if i not in aside])
        self._swapped, self._inside, self._aside = None, None, {}

    def _still_there(self, link: _Link) -> list[Tensor]:
        """The model's present tensors in the places of the link's, but of those that are gone or have another shape the
        old ones, which give the averages back what is theirs."""
        params, buffers = _tensors_of(self._model)
        now = {name: _local(tensor) for name, tensor in (params | buffers).items()}
        pairs = [(now.get(name), old) for name, old in zip(link.names, link.sources)]
        return [old if tensor is None or tensor.shape != old.shape else tensor for tensor, old in pairs]

    def _column(self, link: _Link, name: str) -> list[Tensor]:
        return link.averages[list(self._averages).index(name)]

    def _named(self, name: str) -> dict[str, Tensor]:
        if name not in self._averages:
            raise ValueError(f"name must be one of {', '.join(map(repr, self._averages))}, got {name!r}")
        return self._averages[name]

    def _refuse_inside(self, what: str) -> None:
        if self._swapped is not None:
            raise RuntimeError(f"{what}: the model holds the average {self._swapped!r}; leave swapped() first")

    def _current_link(self) -> _Link:
        if self._link is None or not self._link.fresh():
            _reshard(self._model)  # after which it may be fresh again
            if self._link is None or not self._link.fresh():
                self._link = _Link(
                    self._model, list(self._averages.values()), self._follows, None, list(self._versions.values())
                )
        return self._link

    def state_dict(self) -> dict[str, Any]:
        """{"n_averaged", "calls", "averages": {name: {tensor name: tensor}}}, by reference as in a module's; shards
        of DTensor parameters come as DTensors. Inside `swapped` the tensors that changed places are copies."""
        self._current_link()  # raises where the model's tensors are no longer those that are averaged
        params, buffers = _tensors_of(self._model)
        return {
            "n_averaged": self._clock.n_averaged.clone(),
            "calls": self._clock.calls.clone(),
            "averages": {
                name: {
                    key: _outward(average, (params | buffers)[key], name == self._swapped)
                    for key, average in named.items()
                }
                for name, named in self._averages.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copies a state dict in. Raises ValueError, before anything is written, if its names or shapes differ, and
        TypeError for what is no state dict."""
        self._refuse_inside("load_state_dict")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        if absent := {"n_averaged", "calls", "averages"} - set(state_dict):
            raise ValueError(f"state_dict must be that of a WeightAverager: it misses {sorted(absent)}")
        counts = {name: torch.as_tensor(state_dict[name]) for name in ("n_averaged", "calls")}
        for name, count in counts.items():
            if count.dim():
                raise ValueError(f"state_dict: {name!r} must be 0-d, got shape {tuple(count.shape)}")
        averages = state_dict["averages"]
        if averages.keys() != self._averages.keys():
            raise ValueError(f"state_dict holds averages {sorted(averages)}, expected {sorted(self._averages)}")
        pairs = []
        for name, named in self._averages.items():
            saved = averages[name]
            if saved.keys() != named.keys():
                raise ValueError(
                    f"state_dict: average {name!r} misses {sorted(named.keys() - saved.keys())} and has "
                    f"{sorted(saved.keys() - named.keys())} in excess"
                )
            for key, average in named.items():
                _checks.is_tensor(f"state_dict: {key!r} of average {name!r}", saved[key])
                value = saved[key].to_local() if hasattr(saved[key], "to_local") else saved[key]
                if value.shape != average.shape:
                    raise ValueError(
                        f"state_dict: {key!r} of average {name!r} must have shape {tuple(average.shape)}, "
                        f"got {tuple(value.shape)}"
                    )
                pairs.append((average, value))
        for average, value in pairs:
            average.copy_(value)
        self._clock.n_averaged.copy_(counts["n_averaged"])
        self._clock.calls.copy_(counts["calls"])


def _outward(average: Tensor, present: Tensor, swapped: bool) -> Tensor:
    """What a state dict shows of an average: itself, or its value where it stands in the model now; as a DTensor if
    the model's tensor is one."""
    sharded = hasattr(present, "to_local")
    if swapped and average.dtype == present.dtype:
        average = (present.detach().to_local() if sharded else present.detach()).clone()
    if not sharded:
        return average
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        average, present.device_mesh, present.placements, run_check=False, shape=present.shape, stride=present.stride()
    )
