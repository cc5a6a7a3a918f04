"""Lp penalties on the weights, and adversarial perturbation of them.

    lp_penalty:  Σ_t ‖w_t‖_p   or, squared,   Σ_t ‖w_t‖_p^p = Σ_t Σ_i |w_ti|^p
    FGM:         w ← w + ε · g / ‖g‖_2,  g the gradient of w

The gradients are sign(w)·(|w| / ‖w‖_p)^(p-1), zero for a tensor of zeros, and p·sign(w)·|w|^(p-1).
Source of FGM: Miyato et al., "Adversarial Training Methods for Semi-Supervised Text Classification", ICLR 2017.

Sums run in fp64 over values scaled by the tensor's largest one; nothing overflows or vanishes on the way.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import _backends, _checks
from .max_norm import _scaled_norms

for _name in ("lp_penalty", "fgm"):
    _backends.register(_name)


def lp_penalty(tensors: Tensor | Iterable[Tensor], p: float = 2.0, *, squared: bool = False) -> Tensor:
    """Σ ‖w‖_p over the tensors, or with `squared` Σ ‖w‖_p^p; a differentiable 0-d tensor.

    Args:
        tensors: one tensor or several on one device, of any shapes and strides, fp16, bf16, fp32, fp64. A tensor
            listed twice counts twice.
        p: the order, at least 1; inf too, without `squared`.

    The result is fp32, or fp64 if one of the tensors is; without tensors it is 0. The gradient of a tensor of zeros
    is zero. Raises TypeError or ValueError for anything else.
    """
    tensors = _check_tensors(tensors)
    _check_order(p, squared)
    return lp_penalty_reference(tensors, p, squared=squared)


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
    leaves = [tensor for tensor in dict.fromkeys(tensors) if tensor.requires_grad]
    for tensor in leaves:
        if not tensor.is_leaf:
            raise ValueError("tensors must be leaves of the graph: only those have a .grad to add to")
    with torch.enable_grad():
        penalty = lp_penalty_reference(tensors, p, squared=squared)
    if leaves:
        grads = torch.autograd.grad(penalty, leaves)
        with torch.no_grad():
            for tensor, grad in zip(leaves, grads):
                if tensor.grad is None:
                    tensor.grad = grad * weight
                else:
                    tensor.grad.add_(grad * weight)
    return penalty.detach()


class Penalty:
    """The regularisation term of a module's weights: l1 · Σ ‖w‖_1 + l2 · Σ ‖w‖_2², to be added to the loss.

    Args:
        module: its parameters are looked up once, now.
        l1, l2: at least 0.
        include: which parameters: those whose name contains this string (or one of these strings), or for which
            `include(name, parameter)` is true. The default leaves biases out.

    Calling it gives the term as a 0-d tensor; `names` lists the parameters. `add_grad()` adds the term's gradient to
    the parameters' `.grad` without a graph and returns the term.
    """

    def __init__(
        self,
        module: nn.Module,
        l1: float = 0.0,
        l2: float = 0.0,
        include: str | Iterable[str] | Callable[[str, Tensor], bool] = "weight",
    ):
        _checks.in_range("l1", l1, 0.0)
        _checks.in_range("l2", l2, 0.0)
        chosen = _select(module, include)
        self.names, self.params, self.l1, self.l2 = list(chosen), list(chosen.values()), l1, l2

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
    ):
        self.module, self.epsilon, self.include = module, epsilon, include
        self.backup: dict[str, Tensor] = {}
        _select(module, include)

    @torch.no_grad()
    def attack(self, epsilon: float | None = None) -> None:
        epsilon = self.epsilon if epsilon is None else epsilon
        _attack(_select(self.module, self.include), epsilon, self.backup)

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes the attacks since the last restore; without one it does nothing."""
        _restore(dict(self.module.named_parameters()), self.backup)


def _attack(params: dict[str, Tensor], epsilon: float, backup: dict[str, Tensor]) -> None:
    """FGM's step for the parameters with a gradient; their old values go to `backup`, unless there are some."""
    if not math.isfinite(epsilon):
        raise ValueError(f"epsilon must be finite, got {epsilon}")
    for name, param in params.items():
        if param.requires_grad and param.grad is not None:
            if name not in backup:
                backup[name] = param.clone()
            fgm_reference_(param, param.grad, epsilon)


def _restore(params: dict[str, Tensor], backup: dict[str, Tensor]) -> None:
    for name, old in backup.items():
        params[name].copy_(old)
    backup.clear()


def _select(module: nn.Module, include: str | Iterable[str] | Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """The module's parameters chosen by name; tied ones once."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not callable(include):
        parts = [include] if isinstance(include, str) else list(include)
        chosen = {name: param for name, param in module.named_parameters() if any(part in name for part in parts)}
    else:
        chosen = {name: param for name, param in module.named_parameters() if include(name, param)}
    if not chosen:
        names = [name for name, _ in module.named_parameters()]
        raise ValueError(f"include must match a parameter's name, got {include!r} for {names}")
    return chosen


def _check_tensors(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(tensors, (Tensor, Iterable)):
        raise TypeError(f"tensors must be a tensor or an iterable of tensors, got {type(tensors).__name__}")
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for index, tensor in enumerate(tensors):
        _checks.is_tensor(f"tensors[{index}]", tensor)
        _checks.dtype_in(f"tensors[{index}]", tensor, _checks.FLOATS)
        _checks.same_device(f"tensors[{index}]", tensor, "tensors[0]", tensors[0])
    return tensors


def _check_order(p: float, squared: bool) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"p must be a number of at least 1, got {p!r}")
    if squared and p == math.inf:
        raise ValueError("p must be finite where squared is set: ‖w‖_p^p has no meaning for p = inf")


# ---- reference -------------------------------------------------------------------------------------------


def _flat(tensor: Tensor) -> Tensor:
    """(1, numel), in the widest dtype of the device."""
    return tensor.reshape(1, -1).to(torch.float32 if tensor.device.type == "mps" else torch.float64)


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
