"""Max-norm: caps on the Lp norm of each row of a weight.

For a row w with norm n = ‖w‖_p and a cap c:

    n^τ > c:   w ← w · c / n^τ        else w stays as it is, bit for bit

τ = 1 is the projection of projected gradient descent (for p = 2 onto the ball, for other p along the ray). A row
is a slice along `dim`: `weight[i]` of a Linear or Conv layer for dim 0, all weights of one output unit.
Source: Alshammari et al., "Long-Tailed Recognition via Weight Balancing", CVPR 2022; τ-normalisation: Kang et al.,
"Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020.

Norms are sums in fp64, of values scaled by the row's largest one, so that nothing overflows or vanishes. Two such
sums of n terms, taken in different orders, differ by up to n/2 units of 2^-53: a row counts as over the cap if its
norm exceeds it by more than that. A row that is scaled is rounded to the nearest, its norm is taken again from the
rounded values, and if that is above the cap, the factor shrinks by twice the excess; rounding towards zero is the
last resort, which cannot fail. (In C++ a long row of fp32 aims lower by the 2^-24 that rounding can add to its norm.)

The kernels: csrc/max_norm.h for what is decided per row, csrc/cpu/max_norm.cpp, csrc/cuda/max_norm.cu,
tritonkernels/max_norm.py. One launch serves all rows of all tensors, reads each element once and writes rows over the
cap alone. What is written is read twice where a GPU's program cannot hold a row: in Triton one of more than 16,384
elements (8,192 of fp64, or of rows that do not begin at multiples of 16 bytes; 4,096 for other p than 1, 2 and inf, and
for the l1 ball), in CUDA of more than 64 KiB, or 112 where the GPU has the shared memory (sm_90, sm_100). For rows of
more than 32,768 elements two or three launches more share each among many programs. `max_norm` and `row_norms` are
differentiable and out of place: their kernels take a matrix of rows.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from . import _backends, _checks, _ops, _plan

_kernels = _ops.kernels("max_norm_rows")
_forward, _backward = _ops.kernels("max_norm_forward"), _ops.kernels("max_norm_backward")
_norms_forward, _norms_backward = _ops.kernels("row_norms"), _ops.kernels("row_norms_backward")
for _name in ("max_norm_", "max_norm", "project_lp_ball_", "tau_normalize_", "row_norms"):
    _backends.register(_name, kernels=("cpu", "cuda", "triton"))

Cap = float | Tensor
_ULP = 2.0**-53


# ---- public functions ------------------------------------------------------------------------------------


def max_norm_(
    tensors: Tensor | Iterable[Tensor],
    max_norm: Cap | Sequence[Cap],
    *,
    p: float = 2.0,
    dim: int = 0,
    tau: float = 1.0,
    decay: float | Tensor = 0.0,
) -> Tensor:
    """Scales, in place, every row whose norm to the power `tau` is above `max_norm` by max_norm / norm^tau.

    Args:
        tensors: one tensor or several, of any strides, dtypes fp16, bf16, fp32, fp64; none may be expanded. A DTensor
            is projected by the kernels where it lies: sharded by rows without communication, otherwise with one
            gathering of the norms of all tensors' parts. Rows are the slices along `dim`; in a tensor of one dimension
            or none, each element is a row. A tensor listed twice is projected once, under its first cap.
        max_norm: the cap, at least 0: a number, a 0-d tensor, a tensor with one cap per row, or a list with one of
            these per tensor. Caps in a CUDA tensor are not checked; a row whose cap is NaN or negative stays. For a
            DTensor, a plain tensor holds the caps of all rows, the same in every process.
        p: the norm's order, above 0; `inf` is the largest absolute value.
        tau: at least 0. Only tau = 1 bounds the norm by the cap.
        decay: decoupled weight decay in the same pass: every row is multiplied by 1 - decay (learning rate times
            weight decay) and rounded, before its norm is taken. A 0-d tensor on the tensors' device is not checked.

    Returns:
        How many rows were scaled down, a 0-d int64 tensor on the tensors' device; the host does not wait for it.

    With tau = 1, afterwards: each finite row's norm, taken in fp64 from the stored values, is at most max_norm; rows
    at or under the cap have the bits they had (with decay = 0); a second call changes nothing; a row with NaN or
    Inf is as it was and has harmed no other. (Sums in fp64 differ by their order; a norm above the cap by no more
    than that, (4 + n/2) · 2^-53 of it for rows of n and p = 2, counts as at the cap.)

    Raises TypeError or ValueError, before anything is written, for arguments outside of the above.
    """
    tensors = _listed(tensors)
    caps = _caps(tensors, max_norm, "max_norm", dim)
    _check_order(p)
    _checks.finite_at_least("tau", tau, 0.0)
    decay = _check_decay(decay)
    return _run("max_norm_", "cap", tensors, caps, p, dim, tau, decay)


def max_norm(input: Tensor, max_norm: Cap, *, p: float = 2.0, dim: int = 0, tau: float = 1.0) -> Tensor:
    """`max_norm_` out of place: a new tensor of input's shape and dtype, differentiable in `input` (as `torch.renorm`
    is) and in a tensor `max_norm`.

    With n = ‖w‖_p of a row over the cap, y = w · c / n^τ and an incoming gradient g:
    ∂w = c / n^τ · (g - τ · ⟨g, w⟩ / n · ∂n/∂w),  ∂n/∂w = sign(w) · (|w| / n)^(p-1);  ∂c = ⟨g, w⟩ / n^τ.
    For p = inf the elements of the largest absolute value share the derivative of the norm.
    Arguments and errors as in `max_norm_`.
    """
    _check_tensor("input", input)
    _rows_dim(input, dim, "input")
    (cap,) = _caps([input], max_norm, "max_norm", dim)
    _check_order(p)
    _checks.finite_at_least("tau", tau, 0.0)
    cap_grad = isinstance(cap, Tensor) and cap.requires_grad
    backend = _backends.choose("max_norm", input.device.type, _refuse_rows, input, cap)
    if backend == "reference" or not input.numel():
        return max_norm_reference(input, cap, p=p, dim=dim, tau=tau)
    if not isinstance(cap, Tensor):
        cap = _cap_tensor(cap, input.device)
    if torch.is_grad_enabled() and (input.requires_grad or cap_grad):
        return _backends.apply(_MaxNorm, input, cap, float(p), dim, tau, backend)
    rows, back = _as_rows(input, dim)
    return back(_forward[backend](rows, cap.double().reshape(-1), float(p), tau)[0])


def project_lp_ball_(
    tensors: Tensor | Iterable[Tensor], radius: Cap | Sequence[Cap], p: float = 2.0, *, dim: int = 0
) -> Tensor:
    """Moves, in place, every row outside the ball ‖w‖_p ≤ radius to the nearest point of the ball (Euclidean), for
    p = 1, 2 or inf.

    p = 1: w ← sign(w)·max(|w| - θ, 0) with the θ that brings the norm to the radius (Duchi et al., "Efficient
    Projections onto the l1-Ball", ICML 2008); p = 2: `max_norm_`; inf: w ← min(max(w, -radius), radius).
    Arguments, guarantees, errors and the returned count are those of `max_norm_` with tau = 1.

    Rows of DTensors that lie across processes are gathered for p = 1 and inf. On a GPU, p = 1 takes one program per
    row: the search for θ walks through a row some 5 to 13 times, and to share the row each walk would have to be a
    launch, of which the host cannot know how many there will be without waiting. So a few rows of millions of elements
    leave most of a GPU idle.
    """
    tensors = _listed(tensors)
    caps = _caps(tensors, radius, "radius", dim)
    if isinstance(p, bool) or p not in (1, 2, math.inf):
        raise ValueError(f"p must be 1, 2 or inf, got {p!r}")
    return _run("project_lp_ball_", _BALLS[p], tensors, caps, p, dim)


def tau_normalize_(
    tensors: Tensor | Iterable[Tensor], tau: float = 1.0, *, p: float = 2.0, dim: int = 0
) -> Tensor | list[Tensor]:
    """Divides, in place, every row by its norm to the power `tau` (τ-normalisation); returns what it was given.

    tau = 1 gives every row norm 1, tau = 0 changes nothing. Rows of zeros and rows with NaN or Inf stay as they are.
    DTensors whose rows lie across processes go through plain PyTorch.
    """
    given, tensors = tensors, _listed(tensors)
    _check_order(p)
    _checks.finite_at_least("tau", tau, 0.0)
    _run("tau_normalize_", "normalize", tensors, [math.inf] * len(tensors), p, dim, tau)
    return given if isinstance(given, Tensor) else tensors


def row_norms(tensor: Tensor, p: float = 2.0, dim: int = 0) -> Tensor:
    """The Lp norm of each slice along `dim`: summed in fp64, returned in fp32 (fp64 for fp64). Differentiable."""
    _check_tensor("tensor", tensor)
    _rows_dim(tensor, dim, "tensor")
    _check_order(p)
    backend = _backends.choose("row_norms", tensor.device.type, _refuse_rows, tensor)
    if backend == "reference" or not tensor.numel():
        return row_norms_reference(tensor, p, dim)
    rows, _ = _as_rows(tensor, dim)
    if torch.is_grad_enabled() and tensor.requires_grad:
        return _backends.apply(_RowNorms, rows, float(p), backend)
    return _norms_forward[backend](rows, float(p)).to(_norm_dtype(tensor))


def max_norm_threshold(tensor: Tensor, thresh: float, p: float = 2.0, dim: int = 0) -> Tensor:
    """min + thresh · (max - min) of the row norms, a 0-d tensor of the dtype of `row_norms`: the cap by which the
    paper's code sets a layer's max-norm. Rows with NaN or Inf are left out; without a finite row it is inf."""
    _check_tensor("tensor", tensor)
    _rows_dim(tensor, dim, "tensor")
    _check_order(p)
    _checks.finite_at_least("thresh", thresh, 0.0)
    return _threshold(tensor, thresh, p, dim).to(_norm_dtype(tensor))


def _refuse_rows(backend: str, tensor: Tensor, cap: Cap | None = None) -> str | None:
    return _backends.unusual(tensor, cap if isinstance(cap, Tensor) else None)


def _as_rows(tensor: Tensor, dim: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensor as a matrix of rows that lie one after the other, copied if need be, and the way back."""
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1).contiguous(), lambda rows: rows.reshape(tensor.shape)
    if tensor.dim() == 2 and dim in (0, -2):
        return tensor.contiguous(), lambda rows: rows
    moved = tensor.movedim(dim, 0)
    return moved.flatten(1).contiguous(), lambda rows: rows.reshape(moved.shape).movedim(0, dim)


class _MaxNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, cap, p, dim, tau, backend):
        rows, back = _as_rows(input, dim)
        output, norms = _forward[backend](rows, cap.double().reshape(-1), p, tau)
        ctx.save_for_backward(input, cap, norms)
        ctx.options = (p, dim, tau, backend)
        return back(output)

    @staticmethod
    def backward(ctx, grad_output):
        input, cap, norms = ctx.saved_tensors
        p, dim, tau, backend = ctx.options
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: a second derivative may be asked for
            output = max_norm_reference(input, cap, p=p, dim=dim, tau=tau)
            asked = [tensor for tensor, need in zip((input, cap), needed) if need]
            made = iter(torch.autograd.grad(output, asked, grad_output, create_graph=True))
            return *(next(made) if need else None for need in needed), None, None, None, None
        (rows, back), (grad_rows, _) = _as_rows(input, dim), _as_rows(grad_output, dim)
        grad, slopes = _backward[backend](grad_rows, rows, cap.double().reshape(-1), norms, p, tau)
        grad_cap = slopes.sum_to_size(cap.numel()).reshape(cap.shape).to(cap.dtype) if needed[1] else None
        return back(grad), grad_cap, None, None, None, None


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, p, backend):
        norms = _norms_forward[backend](rows, p)
        ctx.save_for_backward(rows, norms)
        ctx.p, ctx.backend = p, backend
        return norms.to(_norm_dtype(rows))

    @staticmethod
    def backward(ctx, grad):
        rows, norms = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            norms = _norms(_rows(rows, 0), ctx.p)
            return torch.autograd.grad(norms, rows, grad.double(), create_graph=True)[0], None, None
        return _norms_backward[ctx.backend](grad.double().contiguous(), rows, norms, ctx.p), None, None


# ---- constraints on a model's weights --------------------------------------------------------------------


class _Constraint(ABC):
    """A rule kept on a fixed list of weights, by hand (`project`) or after optimizer steps (`attach`)."""

    def __init__(
        self,
        params_or_module: nn.Module | Tensor | Iterable[Tensor],
        p: float,
        dim: int,
        names: Iterable[str] | None = None,
    ) -> None:
        if isinstance(params_or_module, nn.Module):
            named = dict(params_or_module.named_parameters())
            if names is None:
                self.params = [param for param in named.values() if param.dim() >= 2]
            else:
                absent = [name for name in names if name not in named]
                if absent:
                    raise ValueError(f"max_norm names {absent}, which are no parameters of the module: {list(named)}")
                self.params = [named[name] for name in names]
        else:
            self.params = _listed(params_or_module, "params_or_module")
        if not self.params:
            raise ValueError(
                "params_or_module holds no tensor to constrain (of a module: no parameter of 2 dimensions)"
            )
        _check_order(p)
        _check_written(self.params, dim, "params_or_module")
        self.p, self.dim, self.steps = p, dim, 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_checks.counted(self.params, 'tensor')}, p={self.p}, dim={self.dim})"

    @abstractmethod
    def project(self) -> Tensor | None:
        """Brings the weights to where the rule wants them."""

    def attach(self, optimizer: torch.optim.Optimizer, every: int = 1) -> torch.utils.hooks.RemovableHandle:
        """Projects after every `every`-th `optimizer.step()`; `.remove()` of the returned handle ends it."""
        _checks.is_integer("every", every)
        _checks.in_range("every", every, 1)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper, which has no hooks of its own
        if not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")

        def after_step(optimizer, args, kwargs):
            self.steps += 1
            self._after(optimizer, self.steps % every == 0)

        return optimizer.register_step_post_hook(after_step)

    def _after(self, optimizer: torch.optim.Optimizer, projects: bool) -> None:
        if projects:
            self.project()

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if absent := set(self.state_dict()) - set(state):
            raise ValueError(f"state must be that of a {type(self).__name__}: it misses {sorted(absent)}")
        self._load(state)
        self.steps = int(state["steps"])

    def _load(self, state: Mapping) -> None:  # noqa: B027
        """What there is besides the number of steps."""


class MaxNorm(_Constraint):
    """Keeps the row norms of a model's weights under caps.

    Args:
        params_or_module: a tensor, tensors, or a module, which stands for its parameters of two dimensions or more.
        max_norm: the cap, or a list with one cap per tensor, each as in `max_norm_`; for a module also a mapping of
            parameter names to caps, which then are the only ones constrained.
        thresh: instead of max_norm, fixes each tensor's cap now, from its present weights, as `max_norm_threshold`
            does, but from its rows' norms to the power `tau`, with which it is compared: 1 moves no row.
        p, dim, tau: as in `max_norm_`.
        weight_decay: decoupled weight decay after every step of an attached optimizer, in the same pass as the
            projection where there is one: w ← w · (1 - lr · weight_decay), lr the learning rate of w's parameter group
            (a number or a tensor). Leave the optimizer's own at 0 for these weights.

    Example:
        >>> constraint = fastreg.MaxNorm(model.fc, thresh=0.1)
        >>> handle = constraint.attach(optimizer)  # projects after every optimizer.step()

    `caps` holds the caps, `total` the number of rows scaled so far (a 0-d tensor on the weights' device).
    """

    def __init__(
        self,
        params_or_module: nn.Module | Tensor | Iterable[Tensor],
        max_norm: Cap | Sequence[Cap] | Mapping[str, Cap] | None = None,
        *,
        thresh: float | None = None,
        p: float = 2.0,
        dim: int = 0,
        tau: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        if (max_norm is None) == (thresh is None):
            raise ValueError(f"exactly one of max_norm and thresh must be given, got {max_norm!r} and {thresh!r}")
        _checks.finite_at_least("tau", tau, 0.0)
        _checks.finite_at_least("weight_decay", weight_decay, 0.0)
        named = isinstance(max_norm, Mapping)
        if named and not isinstance(params_or_module, nn.Module):
            raise TypeError("max_norm may map names to caps only where params_or_module is a module")
        super().__init__(params_or_module, p, dim, max_norm if named else None)
        self.tau, self.weight_decay = tau, weight_decay
        if thresh is not None:
            _checks.finite_at_least("thresh", thresh, 0.0)
            # Kept in fp64: with thresh = 1 the cap is the largest norm, and rounding it would move that row.
            self.caps: list[Cap] = [_threshold(param, thresh, p, dim, tau) for param in self.params]
        else:
            self.caps = _caps(self.params, list(max_norm.values()) if named else max_norm, "max_norm", dim)
        self.total = _no_rows(self.params)

    def project(self, decay: float | Tensor = 0.0) -> Tensor:
        """Projects now; returns how many rows were scaled down, as `max_norm_` does."""
        self._follow()
        return self._project(self.params, self.caps, _check_decay(decay))

    def _follow(self) -> None:
        """The weights may have been moved to another device since, or have other rows."""
        device = self.params[0].device
        if self.total.device != device:
            self.total = self.total.to(device)
            self.caps = [cap.to(device) if isinstance(cap, Tensor) else cap for cap in self.caps]
        for index, (param, cap) in enumerate(zip(self.params, self.caps)):
            if isinstance(cap, Tensor) and cap.dim():
                rows = param.shape[self.dim] if param.dim() else 1
                if rows != len(cap):
                    raise ValueError(f"tensor {index} has {rows} rows now, but there is one cap for each of {len(cap)}")

    def _project(self, params: list[Tensor], caps: list[Cap], decay: float | Tensor) -> Tensor:
        count = _run("max_norm_", "cap", params, caps, self.p, self.dim, self.tau, decay)
        if type(count) is Tensor:
            self.total += count  # in place: so every replay of a CUDA graph adds its own
        else:
            self.total = _as_shares(self.total, count) + count
        return count

    def _after(self, optimizer: torch.optim.Optimizer, projects: bool) -> None:
        if not self.weight_decay:
            super()._after(optimizer, projects)
            return
        self._follow()
        rates = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
        by_rate: dict[object, tuple[float | Tensor, list[int]]] = {}
        for index, param in enumerate(self.params):
            rate = rates.get(id(param), 0.0)  # that of a tensor is read where it lies: the host does not wait for it
            key = id(rate) if isinstance(rate, Tensor) else rate
            by_rate.setdefault((type(rate), key), (rate, []))[1].append(index)
        for rate, indices in by_rate.values():
            params, caps = [self.params[i] for i in indices], [self.caps[i] if projects else math.inf for i in indices]
            self._project(params, caps, rate * self.weight_decay)

    def state_dict(self) -> dict:
        """The caps, the number of steps seen and the number of rows scaled."""
        return {"caps": list(self.caps), "steps": self.steps, "total": self.total.clone()}

    def _load(self, state: Mapping) -> None:
        caps = state["caps"]
        if len(caps) != len(self.params):
            raise ValueError(f"the state holds {len(caps)} caps, but {len(self.params)} tensors are constrained")
        caps = [cap.to(param.device) if isinstance(cap, Tensor) else cap for cap, param in zip(caps, self.params)]
        self.caps = _caps(self.params, caps, "caps", self.dim)
        self.total = state["total"].to(self.params[0].device, copy=True)


class UnitNorm(_Constraint):
    """Keeps every row at norm 1 (the L2 normalisation that the weight-balancing paper compares with).

    Arguments and methods as in `MaxNorm`; rows of zeros and rows with NaN or Inf stay as they are.
    """

    def __init__(
        self, params_or_module: nn.Module | Tensor | Iterable[Tensor], *, p: float = 2.0, dim: int = 0
    ) -> None:
        super().__init__(params_or_module, p, dim)

    def project(self) -> None:
        tau_normalize_(self.params, 1.0, p=self.p, dim=self.dim)


# ---- checks ----------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object) -> None:
    _checks.is_tensor(name, value)
    _checks.dtype_in(name, value, _checks.FLOATS)


def _listed(tensors: Tensor | Iterable[Tensor], name: str = "tensors") -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a tensor or an iterable of tensors, got {type(tensors).__name__}")
    tensors = list(tensors)
    for index, tensor in enumerate(tensors):
        _checks.is_tensor(f"{name}[{index}]", tensor)
    return tensors


def _check_written(tensors: list[Tensor], dim: int, name: str = "tensors") -> None:
    """Whether rows along `dim` can be written to all of these in one call."""
    for index, tensor in enumerate(tensors):
        _checks.dtype_in(f"{name}[{index}]", tensor, _checks.FLOATS)
        _rows_dim(tensor, dim, name, index)
        if tensor.device != tensors[0].device:
            raise ValueError(f"{name} must be on one device, got {tensors[0].device} and {tensor.device}")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name}[{index}] must be a dense tensor, got one of layout {tensor.layout}")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
            raise ValueError(
                f"{name}[{index}] must not be expanded: it is written in place, and elements of shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()} share memory"
            )


def _rows_dim(tensor: Tensor, dim: int, name: str, index: int | None = None) -> int:
    """`dim` counted from the front. `name`, with `index` of a list, is what the tensor is called."""
    if type(dim) is not int:
        _checks.is_integer("dim", dim)
    ndim = max(tensor.dim(), 1)
    if not -ndim <= dim < ndim:
        name = name if index is None else f"{name}[{index}]"
        raise IndexError(
            f"dim must be between {-ndim} and {ndim - 1} for {name} of shape {tuple(tensor.shape)}, got {dim}"
        )
    return dim % ndim


def _check_decay(decay: float | Tensor) -> float | Tensor:
    if not isinstance(decay, Tensor):
        _checks.in_range("decay", decay, 0.0, 1.0)
    elif decay.dim():
        raise ValueError(f"decay must be a number or a 0-d tensor, got shape {tuple(decay.shape)}")
    else:
        _checks.dtype_in("decay", decay, _checks.FLOATS)
    return decay


def _check_order(p: float) -> None:
    if not _checks.is_real(p) or not p > 0:
        raise ValueError(f"p must be a number above 0, or inf, got {p!r}")


def _caps(tensors: list[Tensor], caps: Cap | Sequence[Cap], name: str, dim: int) -> list[Cap]:
    """One cap per tensor, each a float, a 0-d tensor or a tensor of one cap per row."""
    if type(caps) is float or type(caps) is int:  # the everyday case, ahead of all that the others need
        _checks.in_range(name, caps, 0.0)
        for index, tensor in enumerate(tensors):
            _rows_dim(tensor, dim, "tensors", index)
        return [float(caps)] * len(tensors)
    if isinstance(caps, (list, tuple)):
        if len(caps) != len(tensors):
            raise ValueError(f"{name} must have one entry per tensor, {len(tensors)}, got {len(caps)}")
        labels = [f"{name}[{index}]" for index in range(len(caps))]
    else:
        labels, caps = [name] * len(tensors), [caps] * len(tensors)
    return [
        _check_cap(label, cap, tensor, tensor.shape[_rows_dim(tensor, dim, "tensors", index)] if tensor.dim() else 1)
        for index, (label, cap, tensor) in enumerate(zip(labels, caps, tensors))
    ]


def _check_cap(name: str, cap: Cap, tensor: Tensor, rows: int) -> Cap:
    if not isinstance(cap, Tensor):
        if not _checks.is_real(cap):
            raise TypeError(f"{name} must be a number or a tensor, got {type(cap).__name__}")
        _checks.in_range(name, cap, 0.0)
        return float(cap)
    _checks.dtype_in(name, cap, _checks.FLOATS)
    if cap.dim() and tuple(cap.shape) != (rows,):
        raise ValueError(f"{name} must have no dimension or one cap per row, ({rows},), got shape {tuple(cap.shape)}")
    has_values = type(cap) is Tensor or type(cap) is nn.Parameter  # those of a FakeTensor nobody knows
    if cap.device.type == "cpu" and has_values and not torch.compiler.is_compiling():
        low = cap.detach().min().item() if cap.numel() else 0.0  # NaN wins in min
        _checks.in_range(f"{name} (its smallest value)", low, 0.0)
        if not cap.dim() and tensor.device.type != "cpu":
            return cap.item()
    _checks.same_device(name, cap, "the tensor it belongs to", tensor)
    return cap


def _no_rows(tensors: list[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)


def _as_shares(total: Tensor, count: Tensor) -> Tensor:
    """The number of rows as a DTensor that is summed like `count`. As a plain tensor some versions of torch would sum
    the count at once, by a collective, and others divide the total among the processes, which makes it a float."""
    if type(total) is not Tensor:
        return total
    mesh, placements = count.device_mesh, count.placements
    others = [at for at, placement in zip(mesh.get_coordinate(), placements) if placement.is_partial()]
    return type(count).from_local(total * (not any(others)), mesh, placements, run_check=False)


# ---- one launch for all rows of all tensors --------------------------------------------------------------

_BALLS = {1: "l1_ball", 2: "cap", math.inf: "linf_ball"}
_INNER = 4  # dimensions of a row's box of elements that the kernels know
_WIDTHS = (128, 512, 2048, 4096, 8192, 16384)  # elements of the rows that Triton's kernels hold in registers
_LAP = 2048  # bytes of one vector for each thread of a CUDA block
_CHUNK = 8192  # elements of the rows that a chunk holds, if it holds more than one
_SPLIT = 32768  # elements of a row, from which on it is cut into pieces, on a GPU
_PIECE, _PIECES = 8192, 1024  # elements of a piece, at least; pieces of a row, at most


def _run(
    op: str,
    kind: str,
    tensors: list[Tensor],
    caps: list[Cap],
    p: float,
    dim: int,
    tau: float = 1.0,
    decay: float | Tensor = 0.0,
) -> Tensor:
    """Changes the rows of all tensors as `kind` says, and counts them. The caps are checked already."""
    if not tensors:
        return _no_rows(tensors)
    if hasattr(tensors[0], "to_local") and (shards := _shards(tensors, caps, dim, kind)) is not None:
        if shards.gather is None:
            count = _run(op, kind, shards.local, shards.caps, p, dim, tau, decay)
        else:
            count = _run_across(op, tensors, shards, p, dim, tau, decay)
        torch.autograd.graph.increment_version(tensors)
        return shards.of_all(count)
    if kind in ("l1_ball", "linf_ball") and (wholes := _with_whole_rows(tensors, dim)) is not None:
        count = _run(op, kind, wholes, caps, p, dim)
        for tensor, whole in zip(tensors, wholes):
            tensor.detach().to_local().copy_(whole.redistribute(placements=tensor.placements).to_local())
        torch.autograd.graph.increment_version(tensors)
        return count
    if isinstance(decay, Tensor) or decay or set(map(type, caps)) != {float} or _refuse_any(*tensors) is not None:
        launch = _launch(op, kind, tensors, caps, p, dim, tau, decay)
    else:  # all that it depends on has a key
        call = (op, kind, tuple(caps), p, dim, tau, _backends.forced())
        launch = _plan.plan_for(call, tensors, lambda: _launch(op, kind, tensors, caps, p, dim, tau, decay))
    if launch is None:
        _check_written(tensors, dim)
        count = _no_rows(tensors)
        with torch.no_grad():
            for index in _each_once(tensors):
                count = count + _REFERENCES[kind](tensors[index], caps[index], p=p, dim=dim, tau=tau, decay=decay)
        return count
    count = launch()
    torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
    return count


def _launch(
    op: str,
    kind: str,
    tensors: list[Tensor],
    caps: list[Cap],
    p: float,
    dim: int,
    tau: float,
    decay: float | Tensor,
) -> Callable[[], Tensor] | None:
    """The kernel with all its arguments; None if plain PyTorch serves the call."""
    device = tensors[0].device
    backend = _backends.choose(op, device.type, _refuse, tensors, dim)
    if backend == "reference":
        return None
    values, places = _cap_values(caps, device)
    split = backend != "cpu" and kind != "l1_ball"  # the C++ kernels share long rows among the threads themselves
    plan = _plan.plan_for((op, dim, places, split), tensors, lambda: _build(tensors, dim, places, split))
    decay_tensor = None
    if isinstance(decay, Tensor):
        if decay.device == device:  # the host does not wait for its value
            decay, decay_tensor = 0.0, decay.detach().to(torch.float64)
        else:
            decay = decay.item()
    rest = (values, float(p), tau, decay, decay_tensor, _ops.ROW_KINDS.index(kind))
    return functools.partial(_kernels[backend], plan.table, plan.chunks, plan.chunk, *rest)


@dataclass
class _Shards:
    """What this process holds of DTensors, and the caps of the rows that are here."""

    local: list[Tensor]
    caps: list[Cap]
    of_all: Callable[[Tensor], Tensor]  # from the count of the rows here to that of all processes
    gather: Callable[[Tensor], Tensor] | None  # where rows lie across processes: the same vector of each, one a row


def _shards(tensors: list[Tensor], caps: list[Cap], dim: int, kind: str) -> _Shards | None:
    """None for tensors on several meshes or placed differently, and for what needs whole rows where they are not."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, placements = tensors[0].device_mesh, tensors[0].placements
    if torch.compiler.is_compiling() or not all(type(placement) in (Shard, Replicate) for placement in placements):
        return None
    for tensor in tensors:
        if not isinstance(tensor, DTensor) or tensor.device_mesh != mesh or tensor.placements != placements:
            return None
    ndim = max(tensors[0].dim(), 1)
    if any(max(tensor.dim(), 1) != ndim for tensor in tensors):
        return None
    rows = _rows_dim(tensors[0], dim, "tensors[0]")
    by_row = [placement.is_shard() and placement.dim % ndim == rows for placement in placements]
    across = [index for index, placement in enumerate(placements) if placement.is_shard() and not by_row[index]]
    if across and kind != "cap":
        return None
    here: list[Cap] = []
    for cap in caps:
        if isinstance(cap, Tensor) and cap.dim() and not isinstance(cap, DTensor):  # of all rows, in each process
            cap = DTensor.from_local(cap.detach(), mesh, [Replicate()] * len(placements), run_check=False)
        if isinstance(cap, DTensor):
            places = [Shard(0) if sharded else Replicate() for sharded in by_row]
            cap = cap.redistribute(mesh, places).to_local() if cap.dim() else cap.full_tensor()
        here.append(cap)
    counted = [Partial() if sharded else Replicate() for sharded in by_row]
    parts = [Shard(0) if index in across else Replicate() for index in range(len(placements))]
    processes = math.prod(mesh.size(index) for index in across)

    def gather(values: Tensor) -> Tensor:
        size = torch.Size((processes, len(values)))
        of_all = DTensor.from_local(values[None], mesh, parts, run_check=False, shape=size, stride=(len(values), 1))
        return of_all.redistribute(mesh, [Replicate()] * len(placements)).to_local()

    return _Shards(
        [tensor.detach().to_local() for tensor in tensors],
        here,
        lambda count: DTensor.from_local(count, mesh, counted, run_check=False),
        gather if across else None,
    )


def _with_whole_rows(tensors: list[Tensor], dim: int) -> list[Tensor] | None:
    """DTensors of which some lie in parts of rows, gathered so that none does; None if there is nothing to gather."""
    if torch.compiler.is_compiling() or not all(hasattr(tensor, "to_local") for tensor in tensors):
        return None
    from torch.distributed.tensor import Replicate

    placements = [
        [
            Replicate() if placement.is_shard() and placement.dim != _rows_dim(tensor, dim, "tensors") else placement
            for placement in tensor.placements
        ]
        for tensor in tensors
    ]
    if all(list(tensor.placements) == wanted for tensor, wanted in zip(tensors, placements)):
        return None
    return [tensor.detach().redistribute(placements=wanted) for tensor, wanted in zip(tensors, placements)]


def _run_across(
    op: str, tensors: list[Tensor], shards: _Shards, p: float, dim: int, tau: float, decay: float | Tensor
) -> Tensor:
    """`_run` for the caps of rows that lie across processes. The norms of what each holds are gathered once, of all
    tensors; then each part of a row has a cap of its own, its share of the row's: the factor times its norm."""
    if isinstance(decay, Tensor) or decay:
        _run(op, "cap", shards.local, [math.inf] * len(tensors), p, dim, 1.0, decay)
    here = [_wide_norms(part, p, dim) for part in shards.local]
    of_all = shards.gather(torch.cat(here))
    largest = of_all.amax(0)
    scales = torch.where(largest.isfinite() & (largest > 0), largest, 1)
    sums = torch.linalg.vector_norm(of_all / scales, p, dim=0)
    sizes = [len(norms) for norms in here]
    own, over_all = [], []
    for tensor, cap, part, scale, s in zip(tensors, shards.caps, here, scales.split(sizes), sums.split(sizes)):
        length, caps = tensor.numel() // max(tensor.shape[dim], 1), _cap_column(cap, part)
        if tau == 1:
            over = s.isfinite() & (s > caps * (1 + _slack(length, p)[0]) / scale)
            share = part / scale * (_aim(caps, length, p)[1] / s)
        else:
            over, log_factor = _over_by_logs(scale, s, caps, length, p, tau)
            over &= s.isfinite()
            share = part * torch.exp2(log_factor)
        own.append(torch.where(over, share, math.inf))
        over_all.append(over)
    _run(op, "cap", shards.local, own, p, dim)
    return torch.cat(over_all).sum()


def _refuse_any(*tensors: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "it works on addresses, which torch.compile does not see"
    return _backends.unusual(*tensors)


def _refuse(backend: str, tensors: list[Tensor], dim: int) -> str | None:
    if reason := _refuse_any(*tensors):
        return reason
    for tensor in tensors:
        if tensor.dim() > _INNER + 1 and len(_box(tensor, dim)) > _INNER:
            return f"a row of a tensor with strides {tensor.stride()} spans more than {_INNER} dimensions of memory"
        if backend == "cuda" and tensor.numel() >= 2**32 and not tensor.is_contiguous():
            return "rows that are no run of memory may have up to 2^32 elements"
    return None


def _box(tensor: Tensor, dim: int) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions within a row, innermost first, those that run on merged into one."""
    dim = dim % max(tensor.dim(), 1)
    dims = [(stride, size) for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())) if d != dim]
    box: list[tuple[int, int]] = []
    if tensor.dim() < 2:
        return box
    for stride, size in sorted(dims):
        if size == 1:
            continue
        if box and box[-1][0] * box[-1][1] == stride:
            box[-1] = (box[-1][0] * size, box[-1][1])
        else:
            box.append((size, stride))
    return box


def _each_once(tensors: list[Tensor]) -> list[int]:
    """The indices of those with elements, of several that are the same memory in the same way the first."""
    first: dict[object, int] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            known = _refuse_any(tensor) is None  # else it may have no address
            where = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if known else id(tensor)
            first.setdefault(where, index)
    return list(first.values())


def _piece(length: int) -> int:
    """Elements of the pieces of a row: a power of two."""
    return max(_PIECE, 1 << (-(-length // _PIECES) - 1).bit_length())


def _build(tensors: list[Tensor], dim: int, places: tuple[tuple[int, int], ...], split: bool = True) -> _plan.Plan:
    """A chunk is a run of short rows or, after all of those, a piece of a row of more than `_SPLIT` elements."""
    _check_written(tensors, dim)
    table, whole, pieces, longest, vectors = [], [], [], 0, 0
    for index in _each_once(tensors):
        tensor, (cap, step) = tensors[index], places[index]
        rows = tensor.shape[dim] if tensor.dim() else 1
        stride = tensor.stride(dim) if tensor.dim() else 1
        length = tensor.numel() // rows
        box = (_box(tensor, dim) + [(1, 1)] * _INNER)[:_INNER]
        code = _plan.DTYPE_CODES[tensor.dtype]
        if split and length > _SPLIT:
            per_chunk = _piece(length)
            firsts, chunks = np.arange(rows * -(-length // per_chunk), dtype=np.int64), pieces
        else:
            per_chunk = max(1, _CHUNK // length)
            firsts, chunks = np.arange(0, rows, per_chunk, dtype=np.int64), whole
            longest = max(longest, length)
            size = tensor.element_size()
            shift = 16 - size if tensor.data_ptr() % 16 or stride * size % 16 else 0  # of the first element, at most
            vectors = max(vectors, -(-(length * size + shift) // _LAP))
        chunks.append(np.stack([np.full_like(firsts, len(table)), firsts], 1))
        table.append([tensor.data_ptr(), code, rows, stride, length, *sum(box, ()), per_chunk, cap, step])
    device = tensors[0].device
    columns = np.array(table, np.int64).reshape(len(table), 8 + 2 * _INNER)
    entries = np.concatenate([np.empty((0, 2), np.int64), *whole, *pieces])
    traits = _traits(columns, longest) | min(vectors, 255) << 12 | sum(map(len, pieces)) << 20
    return _plan.Plan(_plan._to_device(columns, device), _plan._to_device(entries, device), traits)


def _traits(table: np.ndarray, longest: int) -> int:
    """What the Triton kernel is compiled for: bits 0 to 3 the dtypes' codes, 4 whether elements of a row lie apart, 5
    whether all rows are multiples of 16 bytes, 8 to 11 the number of widths that the longest row reaches of those that
    are not cut. For the CUDA kernels bits 12 to 19 hold how many vectors of such a row a thread has; the bits above,
    for both, the number of chunks that are pieces of rows.

    One tensor whose rows are no multiples of 16 bytes (a first convolution, a bias) makes Triton access all rows of the
    plan of up to 4,096 elements one by one, which coalesces but takes more instructions: a launch for those that are
    would be a second one of what is promised to be one. Of longer rows, and in CUDA, the kernels decide row by row."""
    if not len(table):
        return 0
    address, code, stride, length, inner = (table[:, i] for i in (0, 1, 3, 4, 5))
    apart = (length > 1) & ((inner != length) | (table[:, 6] != 1))
    aligned = (address % 16 == 0) & (stride % 8 == 0) & (length % 8 == 0)
    widths = 1 + int(np.searchsorted(_WIDTHS, longest))
    return int(np.bitwise_or.reduce(1 << code)) | bool(apart.any()) << 4 | bool(aligned.all()) << 5 | widths << 8


def _cap_values(caps: list[Cap], device: torch.device) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """All caps in one fp64 tensor, and per tensor where its caps begin and the step from row to row."""
    if not any(isinstance(cap, Tensor) for cap in caps):
        return _constants(tuple(caps), device)
    parts, places, at = [], [], 0
    for cap in caps:
        if isinstance(cap, Tensor):
            part = cap.detach().to(torch.float64).reshape(-1)
        else:
            part = torch.full((1,), cap, dtype=torch.float64, device=device)
        parts.append(part)
        places.append((at, int(isinstance(cap, Tensor) and cap.dim() > 0)))
        at += part.numel()
    return torch.cat(parts), tuple(places)


def _cap_tensor(cap: float, device: torch.device) -> Tensor:
    """One cap for all rows, (1,)."""
    if torch.compiler.is_compiling():
        return torch.full((1,), cap, dtype=torch.float64, device=device)
    return _constants((cap,), device)[0]


def _constants(caps: tuple[float, ...], device: torch.device) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    return (_new_constants if _plan.capturing(device) else _kept_constants)(caps, device)


def _new_constants(caps: tuple[float, ...], device: torch.device) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    if len(set(caps)) == 1:
        return _plan._to_device(np.array(caps[:1]), device), ((0, 0),) * len(caps)
    return _plan._to_device(np.array(caps), device), tuple((index, 0) for index in range(len(caps)))


@functools.lru_cache(16)
@torch.inference_mode(False)  # a later call may save them for its backward
def _kept_constants(caps: tuple[float, ...], device: torch.device) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    return _new_constants(caps, device)


# ---- reference -------------------------------------------------------------------------------------------


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """(rows, length), in the widest dtype of the device."""
    return _narrow_rows(tensor, dim).to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _narrow_rows(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


def _write_rows(tensor: Tensor, which: Tensor, rows: Tensor, dim: int) -> None:
    """Writes those of `rows`. The others are copied in their own dtype, which alone keeps the bits of a NaN."""
    rows = torch.where(which.unsqueeze(1), rows, _narrow_rows(tensor, dim))
    moved = tensor.movedim(dim, 0) if tensor.dim() > 1 else tensor
    moved.copy_(rows.reshape(moved.shape))


def _scaled_norms(rows: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """(scale, s), one each per row, of however many dimensions: the norm is scale · s, and s neither overflows nor
    vanishes. A row with NaN or Inf has such an s; a row of zeros has s = 0."""
    within = tuple(range(1, rows.dim()))
    largest = rows.detach().abs().amax(within)
    usable = largest.isfinite() & (largest > 0)
    if p == math.inf:
        return torch.ones_like(largest), rows.abs().amax(within)
    if p in (1, 2):  # a power of two scales exactly; DTensors have no frexp before torch 2.12
        scale = torch.exp2(largest.log2().floor().clamp(-1021, 1023))
    else:
        scale = largest
    scale = torch.where(usable, scale, 1)
    return scale, torch.linalg.vector_norm(rows / scale.reshape(-1, *(1 for _ in within)), p, dim=within)


def _slack(length: int, p: float) -> tuple[float, float]:
    """How far above the cap a norm counts as at the cap, and how far below it a rounded row's norm has to be, so
    that no other way of summing in fp64 finds it above. Relative to the cap."""
    if p == math.inf:
        return 0.0, 0.0
    wider = max(1.0, 2.0 / p) * _ULP  # the root of a sum has 1/p of the sum's relative error
    orders = length // 2 * wider
    if p not in (1, 2):
        return 6 * wider + orders, 2 * wider + orders  # powers are not exact
    return 4 * wider + orders, orders if length >= 64 else 0.0


def _cap_column(cap: Cap, rows: Tensor) -> Tensor:
    """The caps as (rows,) or (), in the rows' dtype; NaN and negative ones never bind."""
    if not isinstance(cap, Tensor):
        return torch.full((), cap, dtype=rows.dtype, device=rows.device)
    cap = cap.to(rows.dtype)
    return torch.where(cap >= 0, cap, math.inf)


def _toward_zero(exact: Tensor, rounded: Tensor) -> Tensor:
    """`exact` rounded towards zero, given it rounded to the nearest: where that went up, one step back."""
    went_up = rounded.to(exact.dtype).abs() > exact.abs()
    if rounded.element_size() == 2:  # Inductor would take the step in fp32
        back = (rounded.view(torch.int16) - 1).view(rounded.dtype)
    else:  # in torch 2.11 vmap has no rule for view(dtype)
        back = torch.nextafter(rounded.detach(), torch.zeros_like(rounded))
    return torch.where(went_up, back, rounded)


def _norms(rows: Tensor, p: float) -> Tensor:
    scale, s = _scaled_norms(rows, p)
    return scale * s


def _is_over(rows: Tensor, scale: Tensor, s: Tensor, cap: Tensor, p: float) -> Tensor:
    slack, _ = _slack(rows.shape[1], p)
    return _finite(rows) & (s > cap * (1 + slack) / scale)


def _finite(rows: Tensor) -> Tensor:
    return rows.detach().abs().amax(1).isfinite()


def _settle(attempt: Callable[[Tensor], Tensor], target: Tensor, bound: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Rows of `dtype` whose norm is at most `bound`: those of `attempt(target)` rounded to the nearest, or where
    that rounds above the bound, aimed lower by twice the excess, or where even that fails, rounded towards zero."""
    exact = attempt(target)
    rounded = exact.to(dtype)
    if dtype == exact.dtype:
        return rounded  # the target is far enough below the bound for this rounding
    ratio = _norms(rounded.to(exact.dtype), p) / bound
    lower = attempt(target / (2 * ratio - 1)).to(dtype)
    fails = _norms(lower.to(exact.dtype), p) > bound
    lower = torch.where(fails.unsqueeze(1), _toward_zero(exact, rounded), lower)
    return torch.where((ratio > 1).unsqueeze(1), lower, rounded)


def _capped(rows: Tensor, cap: Tensor, p: float, tau: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows scaled to their caps and rounded to dtype, which of them were over); rows not over hold anything."""
    scale, s = _scaled_norms(rows, p)
    unit = rows / scale.unsqueeze(1)
    if tau != 1:
        over, log_factor = _over_by_logs(scale, s, cap, rows.shape[1], p, tau)
        factor = torch.exp2(log_factor + torch.log2(scale))
        return (unit * factor.unsqueeze(1)).to(dtype), over & _finite(rows)
    bound, target = _aim(cap, rows.shape[1], p)
    new = _settle(lambda aim: unit * (aim / s).unsqueeze(1), target, bound, p, dtype)
    return new, _is_over(rows, scale, s, cap, p)


def _over_by_logs(scale: Tensor, s: Tensor, cap: Tensor, length: int, p: float, tau: float) -> tuple[Tensor, Tensor]:
    """(whether norm^tau is above the cap, log2 of cap / norm^tau) where the norm is scale · s."""
    log_norm, log_cap = torch.log2(scale) + torch.log2(s), torch.log2(cap)
    slack = 2 * tau * _slack(length, p)[0] + 16 * _ULP * (1 + log_cap.abs().clamp(max=1100))
    return tau * log_norm > log_cap + slack, log_cap - tau * log_norm


def _aim(cap: Tensor, length: int, p: float) -> tuple[Tensor, Tensor]:
    """The largest norm to accept after rounding, and the one to aim at before it."""
    _, below = _slack(length, p)
    return cap * (1 - below), cap * (1 - 2 * below - 8 * _ULP * max(1.0, 2.0 / p))


def max_norm_reference_(
    tensor: Tensor, cap: Cap, *, p: float = 2.0, dim: int = 0, tau: float = 1.0, decay: float | Tensor = 0.0
) -> Tensor:
    """`max_norm_` of one tensor in plain PyTorch; returns the count."""
    if isinstance(decay, Tensor) or decay:
        tensor.mul_(1 - decay)
    rows = _rows(tensor, dim)
    new, over = _capped(rows, _cap_column(cap, rows), p, tau, tensor.dtype)
    _write_rows(tensor, over, new, dim)
    return over.sum()


def max_norm_reference(input: Tensor, cap: Cap, *, p: float = 2.0, dim: int = 0, tau: float = 1.0) -> Tensor:
    """`max_norm` in plain PyTorch: the values of `max_norm_`, the derivatives of the formula."""
    if not input.numel():
        return input.clone()
    rows = _rows(input, dim)
    caps = _cap_column(cap, rows)
    with torch.no_grad():
        values, over = _capped(rows, caps, p, tau, input.dtype)
    over = over.unsqueeze(1)
    # Rows that stay must not reach the formula: their derivative is that of the identity, whatever they hold.
    moving = torch.where(over, rows, 1)
    scale, s = _scaled_norms(moving, p)
    formula = moving / scale.unsqueeze(1) * (caps * scale ** (1 - tau) / s**tau).unsqueeze(1)
    formula = formula + (values.to(rows.dtype) - formula).detach()
    out = torch.where(over, formula.to(input.dtype), _narrow_rows(input, dim))
    if input.dim() < 2:
        return out.reshape(input.shape)
    return out.reshape(input.movedim(dim, 0).shape).movedim(0, dim)


def project_lp_ball_reference_(tensor: Tensor, radius: Cap, *, p: float = 2.0, dim: int = 0) -> Tensor:
    """`project_lp_ball_` of one tensor in plain PyTorch; returns the count."""
    if p == 2:
        return max_norm_reference_(tensor, radius, dim=dim)
    rows = _rows(tensor, dim)
    cap = _cap_column(radius, rows).expand(rows.shape[:1])
    over = _is_over(rows, *_scaled_norms(rows, p), cap, p)
    magnitude = rows.abs()
    bound, target = _aim(cap, rows.shape[1], p)
    if p == math.inf:
        rounded = bound.to(tensor.dtype)
        bound = _toward_zero(bound, rounded).to(rows.dtype)
        new = torch.minimum(magnitude, bound.unsqueeze(1)).to(tensor.dtype)
    else:
        # Relative to the row's largest value all that matters is of the radius' size, so nothing cancels.
        gap = magnitude - magnitude.amax(1, keepdim=True)
        gaps = gap.sort(1, descending=True).values
        sums = gaps.cumsum(1)
        counts = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)

        def soft_threshold(radius: Tensor) -> Tensor:
            thetas = (sums - radius.unsqueeze(1)) / counts
            kept = (gaps > thetas).sum(1, keepdim=True).clamp(min=1)
            return (gap - thetas.gather(1, kept - 1)).clamp(min=0)

        new = _settle(soft_threshold, target, bound, p, tensor.dtype)
    new = torch.copysign(new, rows.to(new.dtype))
    _write_rows(tensor, over, new, dim)
    return over.sum()


def tau_normalize_reference_(tensor: Tensor, tau: float = 1.0, *, p: float = 2.0, dim: int = 0) -> Tensor:
    """`tau_normalize_` of one tensor in plain PyTorch; returns how many rows were divided."""
    rows = _rows(tensor, dim)
    scale, s = _scaled_norms(rows, p)
    factor = 1 / s if tau == 1 else torch.exp2((1 - tau) * torch.log2(scale) - tau * torch.log2(s))
    new = (rows / scale.unsqueeze(1) * factor.unsqueeze(1)).to(tensor.dtype)
    moves = _finite(rows) & (s > 0)
    _write_rows(tensor, moves, new, dim)
    return moves.sum()


def row_norms_reference(tensor: Tensor, p: float = 2.0, dim: int = 0) -> Tensor:
    """`row_norms` in plain PyTorch."""
    rows = _rows(tensor, dim)
    norms = _norms(rows, p) if rows.numel() else rows.sum(1)
    return norms.to(_norm_dtype(tensor))


def _wide_norms(tensor: Tensor, p: float, dim: int) -> Tensor:
    """The row norms in fp64, not differentiable."""
    if not tensor.numel():
        return torch.zeros(tensor.shape[dim] if tensor.dim() else 1, dtype=torch.float64, device=tensor.device)
    backend = _backends.choose("row_norms", tensor.device.type, _refuse_rows, tensor)
    if backend == "reference":
        return _norms(_rows(tensor, dim), p)
    return _norms_forward[backend](_as_rows(tensor, dim)[0], float(p))


def _threshold(tensor: Tensor, thresh: float, p: float, dim: int, tau: float = 1.0) -> Tensor:
    """min + thresh · (max - min) of norm^tau, in the widest dtype."""
    tensor = tensor.detach()
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    if not tensor.numel():
        return torch.full((), math.inf, dtype=wide, device=tensor.device)
    norms = _wide_norms(tensor, p, dim)
    finite = norms.isfinite()
    norms = norms**tau
    low, high = torch.where(finite, norms, math.inf).amin(), torch.where(finite, norms, 0).amax()
    return torch.where(finite.any(), torch.lerp(low, high, thresh), math.inf)


_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "cap": max_norm_reference_,
    "normalize": lambda tensor, cap, *, tau, p, dim, decay: tau_normalize_reference_(tensor, tau, p=p, dim=dim),
    "l1_ball": lambda tensor, cap, *, p, dim, **_: project_lp_ball_reference_(tensor, cap, p=p, dim=dim),
    "linf_ball": lambda tensor, cap, *, p, dim, **_: project_lp_ball_reference_(tensor, cap, p=p, dim=dim),
}
