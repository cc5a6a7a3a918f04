"""Lp penalties on the weights, and adversarial perturbation of them.

    lp_penalty:  Σ_t ‖w_t‖_p   or, squared,   Σ_t ‖w_t‖_p^p = Σ_t Σ_i |w_ti|^p
    FGM:         w ← w + ε · g / ‖g‖_2,  g the gradient of w

The gradients are sign(w)·(|w| / ‖w‖_p)^(p-1), zero for a tensor of zeros, and p·sign(w)·|w|^(p-1).
Source of FGM: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017.

Sums run in fp64 over values scaled, where need be, by the tensor's largest one; nothing overflows or vanishes on the
way. (In C++ up to 32 terms at a time are summed in fp32, where none of the tensors is fp64.) The kernels
(csrc/penalties.h, csrc/cpu/penalties.cpp, csrc/cuda/penalties.cu, tritonkernels/penalties.py) read the weights once
forward, and read and write them once backward, whatever the number of tensors in as many launches as for one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _functorch, _increment_version

from . import _backends, _checks, _ops, _plan
from .max_norm import _scaled_norms

_norms = _ops.kernels("lp_norms")
_backward = _ops.kernels("lp_penalty_backward")
_attack_kernels = _plan.kernels("fgm_attack")
_restore_kernels = _plan.kernels("fgm_restore")
for _name in ("lp_penalty", "lp_penalty_backward_", "FGM"):
    _backends.register(_name, kernels=("cpu", "cuda", "triton"))


def lp_penalty(tensors: Tensor | Iterable[Tensor], p: float = 2.0, *, squared: bool = False) -> Tensor:
    """Σ ‖w‖_p over the tensors, or with `squared` Σ ‖w‖_p^p; a differentiable 0-d tensor.

    Args:
        tensors: one tensor or several on one device, of any shapes and strides, fp16, bf16, fp32, fp64. A tensor
            listed twice counts twice.
        p: the order, at least 1; inf too, without `squared`.

    The result is fp32, or fp64 if one of the tensors is; without tensors it is 0. The gradient of a tensor of zeros
    is zero. Plain PyTorch, not the kernels, serves p = inf and DTensors. Raises TypeError or ValueError for anything
    else.
    """
    tensors = _check_tensors(tensors)
    _check_order(p, squared)
    if not tensors:
        return torch.zeros(())
    backend = _backends.choose("lp_penalty", tensors[0].device.type, _refuse, tensors, p)
    if backend == "reference":
        return lp_penalty_reference(tensors, p, squared=squared)
    # The kernels walk through memory; a tensor with gaps is packed first, differentiably.
    tensors = [tensor if _plan.is_dense(tensor) else tensor.contiguous() for tensor in tensors]
    return _backends.apply(_LpPenalty, backend, float(p), squared, *tensors)


def lp_penalty_backward_(
    tensors: Tensor | Iterable[Tensor], p: float = 2.0, *, weight: float | Tensor = 1.0, squared: bool = False
) -> Tensor:
    """Adds the gradient of weight · `lp_penalty` straight into the `.grad` of each tensor that requires one, and
    returns the penalty (not multiplied by weight), without a graph. A missing `.grad` is created.
    """
    tensors = _check_tensors(tensors)
    _check_order(p, squared)
    if isinstance(weight, Tensor) and weight.dim():
        raise ValueError(f"weight must be a number or a 0-d tensor, got shape {tuple(weight.shape)}")
    _checks.is_number("weight", weight)
    leaves = [tensor for tensor in dict.fromkeys(tensors) if tensor.requires_grad]
    for tensor in leaves:
        if not tensor.is_leaf:
            raise ValueError("tensors must be leaves of the graph: only those have a .grad to add to")
    device = tensors[0].device.type if tensors else "cpu"
    backend = _backends.choose("lp_penalty_backward_", device, _refuse_in_place, tensors, p)
    if backend != "reference" and tensors:
        return _backward_in_place(backend, tensors, float(p), weight, squared)
    with torch.enable_grad():
        penalty = lp_penalty_reference(tensors, p, squared=squared)
    if leaves:
        grads = torch.autograd.grad(penalty, leaves)
        with torch.no_grad():
            for tensor, grad in zip(leaves, grads):
                if tensor.grad is None:
                    tensor.grad = grad * weight
                elif tensor.grad.layout is torch.strided:
                    tensor.grad.add_(grad * weight)
                else:  # every row of a weight has a penalty
                    tensor.grad = grad * weight + tensor.grad
    return penalty.detach()


def _refuse(backend: str, tensors: list[Tensor], p: float) -> str | None:
    if p == math.inf:
        return "it has no kernel for p = inf"
    if torch.compiler.is_compiling():
        return "it works on addresses, which torch.compile does not see"
    return _backends.unusual(*tensors)


def _refuse_in_place(backend: str, tensors: list[Tensor], p: float) -> str | None:
    if len(set(map(id, tensors))) < len(tensors):
        return "a tensor is listed twice"
    for tensor in tensors:
        grad = tensor.grad if tensor.is_leaf else None
        if not _plan.is_dense(tensor) or (grad is not None and not _alike(tensor, grad)):
            return "a tensor or its gradient has gaps in memory, or their strides differ"
    return _refuse(backend, tensors, p)


def _alike(tensor: Tensor, grad: Tensor) -> bool:
    """Whether equal places in memory hold an element and its gradient."""
    return grad.layout is torch.strided and grad.dtype == tensor.dtype and grad.stride() == tensor.stride()


def _penalty_plan(tensors: list[Tensor]) -> _plan.Plan:
    def build() -> _plan.Plan:
        rows = [(t.numel(), _plan.DTYPE_CODES[t.dtype], t.data_ptr()) for t in tensors]
        columns = np.array(rows, np.int64).reshape(-1, 3)
        return _plan.Plan.make(columns, columns[:, 0], tensors[0].device)

    return _plan.plan_for("lp_penalty", tensors, build)


def _forward(backend: str, p: float, squared: bool, tensors: list[Tensor]) -> tuple[_plan.Plan, Tensor, Tensor]:
    plan = _penalty_plan(tensors)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return plan, *_norms[backend](plan.table, plan.chunks, plan.chunk, p, squared, wide)


def _addresses(tensors: list[Tensor | None], device: torch.device) -> Tensor:
    return _plan._to_device(np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64), device)


class _LpPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, p, squared, *tensors):
        _, penalty, norms = _forward(backend, p, squared, list(tensors))
        ctx.save_for_backward(norms, *tensors)
        ctx.backend, ctx.p, ctx.squared = backend, p, squared
        return penalty

    @staticmethod
    def backward(ctx, grad_penalty):
        norms, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        create_graph = torch.is_grad_enabled()  # a second derivative may be asked for
        # One gradient of many, under a vmap of either kind; traced, where addresses mean nothing.
        many = _functorch.is_legacy_batchedtensor(grad_penalty) or _backends.unusual(grad_penalty) is not None
        if create_graph or many or torch.compiler.is_compiling():
            with torch.enable_grad():
                penalty = lp_penalty_reference(tensors, ctx.p, squared=ctx.squared)
            needed = [tensor for tensor, needs in zip(tensors, wanted) if needs]
            made = iter(torch.autograd.grad(penalty, needed, grad_penalty, create_graph=create_graph))
            grads = [next(made) if needs else None for needs in wanted]
        else:
            grads = [torch.empty_like(tensor) if needs else None for tensor, needs in zip(tensors, wanted)]
            plan, outs = _penalty_plan(tensors), _addresses(grads, norms.device)
            grad = grad_penalty.double()
            _backward[ctx.backend](plan.table, plan.chunks, plan.chunk, outs, norms, grad, ctx.p, ctx.squared, False)
        return None, None, None, *grads


def _backward_in_place(backend: str, tensors: list[Tensor], p: float, weight: float | Tensor, squared: bool) -> Tensor:
    plan, penalty, norms = _forward(backend, p, squared, tensors)
    if isinstance(weight, Tensor):
        weight = weight.to(torch.float64)
    else:
        weight = torch.full((), weight, dtype=torch.float64, device=norms.device)
    present = [tensor.grad if tensor.requires_grad else None for tensor in tensors]
    created = [torch.empty_like(tensor) if tensor.requires_grad and tensor.grad is None else None for tensor in tensors]
    for grads, add in ((present, True), (created, False)):
        if any(grad is not None for grad in grads):
            outs = _addresses(grads, norms.device)
            _backward[backend](plan.table, plan.chunks, plan.chunk, outs, norms, weight, p, squared, add)
    torch.autograd.graph.increment_version([grad for grad in present if grad is not None])
    for tensor, grad in zip(tensors, created):
        if grad is not None:
            tensor.grad = grad
    return penalty


class Penalty:
    """The regularisation term of a module's weights: l1 · Σ ‖w‖_1 + l2 · Σ ‖w‖_2², to be added to the loss.

    Args:
        module: its parameters are looked up once, now.
        l1, l2: at least 0.
        include: which parameters: those whose name contains this string (or one of these strings), or for which
            `include(name, parameter)` is true. "weight" is looked for in what the parameter itself is called, whatever
            holds it: the default leaves biases out, that of a module called reweight too.

    Calling it gives the term as a 0-d tensor; `names` lists the parameters. `add_grad()` adds the term's gradient to
    the parameters' `.grad` without a graph and returns the term.
    """

    def __init__(
        self,
        module: nn.Module,
        l1: float = 0.0,
        l2: float = 0.0,
        include: str | Iterable[str] | Callable[[str, Tensor], bool] = "weight",
    ) -> None:
        _checks.in_range("l1", l1, 0.0)
        _checks.in_range("l2", l2, 0.0)
        chosen = _select(module, include)
        self.names, self.params, self.l1, self.l2 = list(chosen), list(chosen.values()), l1, l2

    def __repr__(self) -> str:
        return f"Penalty({_checks.counted(self.params, 'tensor')}, l1={self.l1}, l2={self.l2})"

    def _terms(self) -> list[tuple[float, float, bool]]:
        return [term for term in ((self.l1, 1.0, False), (self.l2, 2.0, True)) if term[0]]

    def __call__(self) -> Tensor:
        terms = [weight * lp_penalty(self.params, p, squared=squared) for weight, p, squared in self._terms()]
        return sum(terms[1:], terms[0]) if terms else lp_penalty([]).to(self.params[0].device)

    def add_grad(self) -> Tensor:
        terms = [
            weight * lp_penalty_backward_(self.params, p, weight=weight, squared=squared)
            for weight, p, squared in self._terms()
        ]
        return sum(terms[1:], terms[0]) if terms else lp_penalty([]).to(self.params[0].device)


class FGM:
    """Fast gradient method on a module's own weights: adversarial training of embeddings.

    Args:
        module: whose trainable parameters with `include` in their name (or chosen as in `Penalty`) are perturbed.
        epsilon: length of the step.

    After a backward pass, `attack()` adds epsilon · g / ‖g‖_2 to each of the parameters with a gradient g; a zero or
    non-finite gradient leaves its parameter alone. `restore()` puts back, bit for bit, what was there before;
    several attacks before it add up. The host never waits for the device. Sparse gradients are taken as they are.
    torch.compile ends its graph before either.

    Example:
        >>> loss(model(x)).backward()
        >>> fgm.attack(); loss(model(x)).backward(); fgm.restore()  # the gradients add up
        >>> optimizer.step()
    """

    def __init__(
        self,
        module: nn.Module,
        epsilon: float = 1.0,
        include: str | Iterable[str] | Callable[[str, Tensor], bool] = "emb",
    ) -> None:
        _checks.finite("epsilon", epsilon)
        self.module, self.epsilon, self.include = module, epsilon, include
        self._perturbation = Perturbation()
        self._chosen = _select(module, include)
        self._watch = _plan.Watch(module)

    def __repr__(self) -> str:
        return f"FGM({_checks.counted(self._chosen, 'tensor')}, epsilon={self.epsilon})"

    @_plan.eagerly
    def attack(self, epsilon: float | None = None) -> None:
        if not self._watch.unchanged():
            self._chosen = _select(self.module, self.include)
            self._watch = _plan.Watch(self.module)
        self._perturbation.attack(self._chosen, self.epsilon if epsilon is None else epsilon)

    @_plan.eagerly
    def restore(self) -> None:
        """Undoes the attacks since the last restore; without one it does nothing."""
        self._perturbation.restore()


_BLOCK = 64  # elements: what is backed up and put back at a time; csrc/penalties.h has the same


@dataclass
class _Backup:
    """What stood in a parameter before it was perturbed: all of it, or the blocks that are marked."""

    param: Tensor
    old: Tensor
    marks: Tensor | None = None

    def whole(self) -> Tensor:
        """All of it; the marks are gone then."""
        if self.marks is None:
            return self.old
        now = torch.empty_like(self.old).copy_(self.param)
        in_memory = [tensor.as_strided((tensor.numel(),), (1,)) for tensor in (self.old, now)]
        backed_up = self.marks.bool().repeat_interleave(_BLOCK)[: now.numel()]
        in_memory[1].copy_(torch.where(backed_up, *in_memory))
        self.marks.zero_()
        return now


def _marks(param: Tensor) -> Tensor:
    return torch.zeros(-(-param.numel() // _BLOCK), dtype=torch.uint8, device=param.device)


@dataclass
class _Ready:
    """All that an attack needs, for as long as parameters and gradients are where they were."""

    backend: str
    forced: str | None
    params: list[Tensor]
    backups: dict[str, _Backup]
    places: np.ndarray
    with_grads: np.ndarray  # the places of the gradients behind those
    plan: _plan.Plan
    wide: bool
    in_graph: bool  # made while a CUDA graph was captured: nothing of it can be used outside

    def serves(self, params: dict[str, Tensor]) -> bool:
        forced = self.forced == _backends.forced()
        return forced and _plan.unchanged_with_gradients(params, self.params, self.with_grads)

    def stands(self) -> bool:
        """Whether the parameters are where they were, whatever the gradients."""
        return self.forced == _backends.forced() and _plan.unchanged(self.params, self.places)


class Perturbation:
    """FGM's steps on given parameters, and the way back. The memory of the backups is kept for the next time. On the
    CPU, where the kernels have just emptied the caches, every line on the way to them takes twice its time."""

    def __init__(self) -> None:
        self.backups: dict[str, _Backup] = {}
        self._spare: dict[str, _Backup] = {}
        self._ready: _Ready | None = None
        self._epsilon: float | None = None  # the last one, which has been checked

    def attack(self, params: dict[str, Tensor], epsilon: float) -> None:
        if epsilon is not self._epsilon:
            _checks.finite("epsilon", epsilon)
            self._epsilon = epsilon
        ready = self._ready
        if ready is None or not ready.serves(params):
            if not (chosen := _plan.with_gradients(params)):
                return
            names = {id(param): name for name, param in params.items()}
            ready = self._ready = self._prepare({names[id(param)]: param for param in chosen}, epsilon)
            if ready is None:
                return
        if _plan.capturing(ready.plan.table.device):
            _plan.stays(ready)
        if self.backups is not ready.backups:  # attacked before, with other gradients or parameters
            self.backups = {**self.backups, **ready.backups} if self.backups else ready.backups
        plan = ready.plan
        _attack_kernels[ready.backend](plan.table, plan.chunks, plan.chunk, epsilon, ready.wide)
        _increment_version(ready.params)

    @torch.no_grad()
    def _prepare(self, chosen: dict[str, Tensor], epsilon: float) -> _Ready | None:
        """What the kernels need, or None if the attack is made, in plain PyTorch."""
        device = next(iter(chosen.values())).device
        backend = _backends.choose("FGM", device.type, _refuse_fgm, list(chosen.values()))
        attacked = {name: backup for name, backup in self.backups.items() if chosen.get(name) is backup.param}
        if backend == "reference":
            self.backups = dict(self.backups)
            for name, param in chosen.items():
                if name not in attacked or attacked[name].marks is not None:
                    self.backups[name] = _Backup(param, attacked[name].whole() if name in attacked else param.clone())
                fgm_reference_(param, param.grad, epsilon)
            return None
        backups = {}
        for name, param in chosen.items():
            backup = attacked.get(name) or self._spare.get(name)
            if backup is None or backup.marks is None or not _alike(param, backup.old) or backup.param is not param:
                fresh = _Backup(param, torch.empty_like(param), _marks(param))
                if name in attacked:  # in another way, or its parameter was converted since
                    fresh.old.copy_(backup.whole())
                    fresh.marks.fill_(1)
                backup = fresh
            backups[name] = backup
        self._spare |= backups
        params = list(chosen.values())
        with_grads = _plan.describe(params + [param.grad for param in params])
        plan = self._plan(list(backups.values()), True)
        wide = any(param.dtype == torch.float64 for param in params)
        places, in_graph = with_grads[: len(params)], _plan.capturing(device)
        return _Ready(backend, _backends.forced(), params, backups, places, with_grads, plan, wide, in_graph)

    def restore(self) -> None:
        ready, backups = self._ready, self.backups
        self.backups = {}
        if ready is not None and backups is ready.backups and ready.stands():
            plan = ready.plan  # restoring reads no gradient
            _restore_kernels[ready.backend](plan.table, plan.chunks, plan.chunk)
            _increment_version(ready.params)
        elif backups:
            self._restore(backups)
        if ready is not None and ready.in_graph:
            self._ready, self._spare = None, {}

    @torch.no_grad()
    def _restore(self, backups: dict[str, _Backup]) -> None:
        for name, backup in backups.items():
            if backup.param.shape != backup.old.shape:
                shapes = f"{tuple(backup.old.shape)} to {tuple(backup.param.shape)}"
                raise RuntimeError(f"restore: since the attack {name!r} has changed its shape, from {shapes}")
        device = next(iter(backups.values())).param.device
        backend = _backends.choose("FGM", device.type, lambda *_: None)
        marked = []
        for backup in backups.values():
            if backup.marks is None or backend == "reference" or not _alike(backup.param, backup.old):
                backup.param.copy_(backup.whole())
            else:
                marked.append(backup)
        if marked:
            plan = self._plan(marked, False)
            _restore_kernels[backend](plan.table, plan.chunks, plan.chunk)
            torch.autograd.graph.increment_version([backup.param for backup in marked])

    def _plan(self, backups: list[_Backup], with_grads: bool) -> _plan.Plan:
        places = [[b.param, *([b.param.grad] if with_grads else []), b.old, b.marks] for b in backups]

        def build() -> _plan.Plan:
            rows = []
            for row in places:
                addresses = [place.data_ptr() for place in row]
                if not with_grads:
                    addresses.insert(1, 0)
                rows.append([row[0].numel(), _plan.DTYPE_CODES[row[0].dtype], *addresses])
            columns = np.array(rows, np.int64)
            return _plan.Plan.make(columns, columns[:, 0], places[0][0].device)

        return _plan.plan_for(("FGM", with_grads), list(chain.from_iterable(places)), build)


def _refuse_fgm(backend: str, params: list[Tensor]) -> str | None:
    for param in params:
        if param.device != params[0].device:
            return "the parameters are on several devices"
        if param.grad.layout is not torch.strided:
            return "a gradient is sparse"
        if param.dtype not in _checks.FLOATS or not _plan.is_dense(param) or not _alike(param, param.grad):
            return "a parameter has gaps in memory, or its gradient other strides or another dtype"
    return _refuse(backend, params, 2.0)


def _select(module: nn.Module, include: str | Iterable[str] | Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """The module's parameters chosen by name; tied ones once."""
    _checks.is_module("module", module)
    if isinstance(include, bytes) or not (callable(include) or isinstance(include, Iterable)):
        raise TypeError(f"include must be strings or a function, got {type(include).__name__}")
    if not callable(include):
        parts = [include] if isinstance(include, str) else list(include)
        if odd := [part for part in parts if not isinstance(part, str)]:
            raise TypeError(f"include must be strings or a function, got {type(odd[0]).__name__}")
        chosen = {name: p for name, p in module.named_parameters() if any(_contains(name, part) for part in parts)}
    else:
        chosen = {name: param for name, param in module.named_parameters() if include(name, param)}
    if not chosen:
        names = [name for name, _ in module.named_parameters()]
        raise ValueError(f"include must match a parameter's name, got {include!r} for {names}")
    return chosen


def _contains(name: str, part: str) -> bool:
    if part == "weight":  # not in the name of a module; parametrised, it is called <module>.parametrizations.weight.…
        path = name.split(".")
        name = path[path.index("parametrizations") + 1] if "parametrizations" in path else path[-1]
    return part in name


def _check_tensors(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(tensors, (Tensor, Iterable)):
        raise TypeError(f"tensors must be a tensor or an iterable of tensors, got {type(tensors).__name__}")
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, Tensor) and tensor.dtype in _checks.FLOATS and tensor.device == tensors[0].device:
            continue  # before a name is made for each
        _checks.is_tensor(f"tensors[{index}]", tensor)
        _checks.dtype_in(f"tensors[{index}]", tensor, _checks.FLOATS)
        _checks.same_device(f"tensors[{index}]", tensor, "tensors[0]", tensors[0])
    return tensors


def _check_order(p: float, squared: bool) -> None:
    if not _checks.is_real(p) or not p >= 1:
        raise ValueError(f"p must be a number of at least 1, got {p!r}")
    if squared and p == math.inf:
        raise ValueError("p must be finite where squared is set: ‖w‖_p^p has no meaning for p = inf")


# ---- reference -------------------------------------------------------------------------------------------


def _flat(tensor: Tensor) -> Tensor:
    """(1, numel), in the widest dtype of the device; of a DTensor, whose parts may differ in size, (1, *shape)."""
    rows = tensor.unsqueeze(0) if hasattr(tensor, "to_local") and tensor.dim() else tensor.reshape(1, -1)
    return rows.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def lp_penalty_reference(tensors: list[Tensor], p: float, *, squared: bool = False) -> Tensor:
    """`lp_penalty` in plain PyTorch."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    total = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=_device(tensors))
    for tensor in tensors:
        if tensor.numel():
            scale, s = _scaled_norms(_flat(tensor), p)
            term = scale**p * s**p if squared else scale * s
        else:  # a sum of nothing, which keeps the tensor in the graph
            term = tensor
        total = total + term.sum().to(total.dtype)
    return total


def _device(tensors: list[Tensor]) -> torch.device | None:
    return tensors[0].device if tensors else None


def fgm_reference_(param: Tensor, grad: Tensor, epsilon: float) -> None:
    """One parameter's step of FGM, in plain PyTorch."""
    if grad.is_sparse:
        grad = grad.coalesce()
        values, rows = grad.values(), grad.indices()
        step = _step(values, epsilon).to(param.dtype)
        if grad.sparse_dim() == 1:
            param.index_add_(0, rows[0], step)
        else:
            param.index_put_(tuple(rows), step, accumulate=True)
    elif grad.numel():
        # Where nothing is to be added, adding a zero would still turn -0.0 into 0.0.
        step = _step(grad, epsilon)
        moved = (param.to(step.dtype) + step).to(param.dtype)
        param.copy_(torch.where(step != 0, moved, param))


def _step(grad: Tensor, epsilon: float) -> Tensor:
    """epsilon · g / ‖g‖ in the widest dtype; zeros where that is undefined."""
    flat = _flat(grad)
    scale, s = _scaled_norms(flat, 2)
    works = s.isfinite() & (s > 0)
    step = torch.where(works, flat / scale * (epsilon / s), 0)
    return step.reshape(grad.shape)
