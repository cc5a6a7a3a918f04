"""Linear layer and loss in one: loss = cross_entropy(input @ linear_weightᵀ + linear_bias, target, …).

The logits of all rows never exist at once. The rows are taken in chunks: their logits, their loss and its gradient to
the logits, and from that their part of the gradients to input, weight and bias, all in the forward, so that a chunk's
logits can go before the next come; the backward only scales. Without a reduction the incoming gradient of each row is
still open: then the backward makes the logits of each chunk again.
"""

from collections.abc import Iterator
from typing import Any, Literal, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _backends, _checks, _ops
from .longtail import ClassStatistics
from .losses import (
    LossOptions,
    LossOutputs,
    Target,
    check_no_gradient,
    check_shapes,
    cross_entropy,
    index_shares,
    mean_denominator,
    row_counts,
    target_wants_gradient,
)

_CHUNK = 2**24  # logits in a chunk, unless it is told: 64 MB in fp32


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    outputs: Literal[True],
    chunk_size: int | None = None,
    options: Any = None,
    **loss_options: Unpack[LossOptions],
) -> LossOutputs: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    outputs: bool = False,
    chunk_size: int | None = None,
    options: Any = None,
    **loss_options: Unpack[LossOptions],
) -> Tensor: ...
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    all_ignored: str = "nan",
    grad_in_forward: bool | str = False,
    outputs: bool = False,
    statistics: ClassStatistics | None = None,
    chunk_size: int | None = None,
    options: Any = None,
) -> Tensor | LossOutputs:
    """`fastreg.cross_entropy` of a linear layer's output, with its options, without all logits in memory.

    A superset of `torch.nn.functional.linear_cross_entropy` (torch 2.13).

    Args:
        input: (in,) or (N, in).
        linear_weight: (C, in), or (C, d1, …, in) for targets (N, d1, …), which is not chunked.
        target: as for `cross_entropy` with logits of (C,), (N, C) or (N, C, d1, …).
        linear_bias: linear_weight's shape without the last dimension, or None.
        ignore_index: None is -100.
        chunk_size: rows whose logits are in memory at a time; None takes as many as make 2**24 logits, but at
            least 256. In memory are one chunk of logits, in whose place come their gradients (beside them where the
            kernels do not make them in one pass, and in fp16), and, where wanted, the gradients to input,
            linear_weight and linear_bias, the latter two summed in fp32 (fp64 for fp64).
        grad_in_forward: without effect on what is chunked, whose gradient is made there anyway.
        options: torch's `LinearCrossEntropyOptions`, of which `batch_chunk_size` counts, for want of a chunk_size.

    The remaining arguments, what is returned and what is raised are those of `cross_entropy`. Backward twice is right;
    second derivatives, torch.func transforms, torch.compile and inputs of one chunk take the plain composition.
    """
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options must be a torch.nn.LinearCrossEntropyOptions, got {type(options).__name__}")
    if chunk_size is None and options is not None:
        chunk_size = options.batch_chunk_size
    _check_linear(input, linear_weight, linear_bias, chunk_size)
    of_each_row = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "label_smoothing": label_smoothing,
        "gamma": gamma,
        "alpha": alpha,
        "logit_adjustment": logit_adjustment,
        "margin": margin,
        "scale": scale,
        "z_loss": z_loss,
    }
    classes = linear_weight.shape[0]
    chunk = chunk_size or max(256, _CHUNK // classes)
    parts = target if isinstance(target, tuple) else (target,)
    if (
        input.dim() == 1
        or linear_weight.dim() > 2
        or input.shape[0] <= chunk
        or torch.compiler.is_compiling()
        or _backends.unusual(input) is not None
        or _backends.unusual(linear_weight) is not None
        or any(isinstance(part, Tensor) and target_wants_gradient(part) for part in parts)
    ):
        return cross_entropy(
            _linear(input, linear_weight, linear_bias),
            target,
            weight,
            reduction=reduction,
            all_ignored=all_ignored,
            grad_in_forward=grad_in_forward,
            outputs=outputs,
            statistics=statistics,
            **of_each_row,
        )
    _checks.choice("reduction", reduction, _ops.REDUCTIONS)
    _checks.choice("all_ignored", all_ignored, ("nan", "zero"))
    logits = input.new_empty(1).expand(input.shape[0], classes)
    indices = check_shapes(logits, *parts)
    for name, vector in {"weight": weight, **of_each_row}.items():
        check_no_gradient(name, vector)
    if statistics is not None and indices:  # a wrong target is told before the rows of a chunk are counted
        index_shares(target, classes, of_each_row["ignore_index"])
    dtype = input.dtype
    if _ops.autocast_enabled(input.device.type):
        # What autocast would do to the linear layer in every chunk, once.
        half = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(half), linear_weight.to(half)
        linear_bias = None if linear_bias is None else linear_bias.to(half)
        dtype = torch.promote_types(dtype, torch.float32)
    extra = {"outputs": outputs, "statistics": statistics}
    # Said here: within, gradients are off in any case, and what requires one does so under no_grad, too.
    made = torch.is_grad_enabled() and reduction != "none"
    loss, *known = _LinearCrossEntropy.apply(
        input, linear_weight, linear_bias, target, weight, reduction, all_ignored, of_each_row, extra, chunk, made
    )
    loss = loss.to(dtype)
    return LossOutputs(loss, *known) if outputs else loss


def _linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])


class _LinearCrossEntropy(torch.autograd.Function):
    """Returns the loss in the dtype of the computation and, where wanted, the rest of LossOutputs."""

    @staticmethod
    def forward(
        ctx, input, linear_weight, linear_bias, target, weight, reduction, all_ignored, options, extra, chunk, made
    ):
        compute = _ops.accumulator(input)
        # What the backward reads must be noticed if it is modified meanwhile, wherever it stands.
        told, ctx.spec = tree_flatten((target, weight, options))
        ctx.save_for_backward(input, linear_weight, linear_bias, *(t if isinstance(t, Tensor) else None for t in told))
        ctx.told = [None if isinstance(t, Tensor) else t for t in told]
        ctx.reduction, ctx.all_ignored, ctx.chunk = reduction, all_ignored, chunk
        ctx.set_materialize_grads(False)
        ctx.sums = _Gradients(input, linear_weight, linear_bias, ctx.needs_input_grad[:3] if made else (False,) * 3)
        found = []
        for rows in _chunks(len(input), chunk):
            found.append(ctx.sums.add_chunk(rows, _rows_of(target, rows), weight, reduction, options, extra))
        ctx.sums.memory = None
        losses, *known = zip(*((f if extra["outputs"] else (f,)) for f in found))
        known = [None if part[0] is None else torch.cat(part) for part in known]
        ctx.mark_non_differentiable(*(part for part in known if part is not None))
        if reduction == "none":
            return torch.cat(losses).to(compute), *known
        loss = torch.stack(losses).sum().to(compute)
        if reduction == "mean":
            counts, indices = 1.0, isinstance(target, tuple) or not target.is_floating_point()
            ctx.kept = None
            if indices:
                ctx.kept, shares = index_shares(target, len(linear_weight), options["ignore_index"])
                counts = row_counts(ctx.kept, shares, weight, compute)
            denominator = mean_denominator(counts, len(input), all_ignored)
            if not isinstance(denominator, Tensor):
                denominator = loss.new_full((), denominator)
            ctx.denominator = denominator.to(compute)
            loss = loss / ctx.denominator
        return loss, *known

    @staticmethod
    def backward(ctx, grad_loss, *_):
        nothing = (None,) * 8
        if grad_loss is None:
            return None, None, None, *nothing
        input, linear_weight, linear_bias, *saved = ctx.saved_tensors
        told = [value if tensor is None else tensor for value, tensor in zip(ctx.told, saved)]
        target, weight, options = tree_unflatten(told, ctx.spec)
        if torch.is_grad_enabled():
            options = {**options, "reduction": ctx.reduction, "all_ignored": ctx.all_ignored}
            tensors = (input, linear_weight, linear_bias)
            return *_differentiable(tensors, ctx.needs_input_grad, target, weight, options, grad_loss), *nothing
        if ctx.reduction == "none":
            sums = _Gradients(input, linear_weight, linear_bias, ctx.needs_input_grad[:3])
            for rows in _chunks(len(input), ctx.chunk):
                sums.add_chunk(rows, _rows_of(target, rows), weight, "none", options, {}, grad_loss[rows])
            return *sums.scaled(None), *nothing
        factor = grad_loss
        if ctx.reduction == "mean":
            factor = grad_loss / ctx.denominator
            if ctx.kept is not None:  # where no row is kept the sums are 0, and stay so
                factor = torch.where(ctx.kept.any(), factor, 0.0)
        return *ctx.sums.scaled(factor), *nothing


class _Gradients:
    """The gradients of the sum of the losses to input, weight and bias, chunk by chunk."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, want: tuple[bool, ...]) -> None:
        compute = _ops.accumulator(input)
        self.tensors = input, weight, bias
        self.memory: Tensor | None = None  # one for the logits of all chunks: a fresh one is entered page by page
        self.sums: list[Tensor | None] = [
            torch.empty_like(input) if want[0] else None,
            torch.zeros_like(weight, dtype=compute) if want[1] else None,
            torch.zeros_like(bias, dtype=compute) if want[2] else None,
        ]

    def add_chunk(
        self, rows: slice, target: Target, weight: Tensor | None, reduction: str, options: dict, extra: dict,
        grad: Tensor | None = None,
    ) -> Tensor | LossOutputs:  # fmt: skip
        """The loss of these rows, their sum unless reduction is none. A function, so that what a chunk has beside its
        logits is gone before those of the next are made."""
        input, linear_weight, _ = self.tensors
        logits = self._logits(input[rows])
        want = any(g is not None for g in self.sums)
        if reduction != "none":
            reduction, extra = "sum", {**extra, "grad_in_forward": want and "in_place"}
        # Under autocast the loss comes unrounded, in fp32.
        wide = torch.autocast(
            logits.device.type, torch.bfloat16, enabled=logits.dtype in (torch.float16, torch.bfloat16)
        )
        with torch.set_grad_enabled(want), wide:
            logits.requires_grad_(want)
            # A view is no leaf: it may be overwritten.
            found = cross_entropy(logits.view_as(logits), target, weight, reduction=reduction, **options, **extra)
        if not want:
            return found
        loss = found.loss if isinstance(found, LossOutputs) else found
        (d,) = torch.autograd.grad(loss, logits, grad)
        del logits
        to_input, to_weight, to_bias = self.sums
        if to_input is not None:
            torch.mm(d, linear_weight, out=to_input[rows])
        if to_weight is not None:
            _add_product(to_weight, d, input[rows])
        if to_bias is not None:
            to_bias += d.sum(0, dtype=to_bias.dtype)
        return found._replace(loss=loss.detach()) if isinstance(found, LossOutputs) else loss.detach()

    def _logits(self, input: Tensor) -> Tensor:
        _, weight, bias = self.tensors
        if self.memory is None:  # the first chunk is the longest
            self.memory = F.linear(input, weight, bias)
            return self.memory.detach()
        logits = self.memory[: len(input)]
        if bias is None:
            return torch.mm(input, weight.t(), out=logits)
        return torch.addmm(bias, input, weight.t(), out=logits)

    def scaled(self, factor: Tensor | None) -> Iterator[Tensor | None]:
        for tensor, total in zip(self.tensors, self.sums):
            if total is None:
                yield None
            elif factor is None:
                yield total.to(tensor.dtype)
            else:  # a new tensor: another backward may follow
                yield torch.mul(total, factor, out=torch.empty_like(tensor))


def _add_product(total: Tensor, d: Tensor, input: Tensor) -> None:
    """total += dᵀ · input, in total's precision."""
    if total.dtype == d.dtype:
        total.addmm_(d.t(), input)
    elif d.is_cuda:
        total += torch.mm(d.t(), input, out_dtype=total.dtype)
    else:  # widened in pieces, so that no wide copy of a whole chunk is made
        input = input.to(total.dtype)
        for part, columns in zip(total.split(4096), d.split(4096, 1)):
            part.addmm_(columns.to(total.dtype).t(), input)


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))


def _rows_of(target: Target, rows: slice) -> Target:
    if not isinstance(target, tuple):
        return target[rows]
    return tuple(part[rows] if isinstance(part, Tensor) and part.dim() else part for part in target)


def _differentiable(
    tensors: tuple, needed: tuple[bool, ...], target: Target, weight: Tensor | None, options: dict, grad_loss: Tensor
) -> list[Tensor | None]:
    """The plain composition, whose gradient can be differentiated again."""
    loss = cross_entropy(F.linear(*tensors), target, weight, **options)
    wanted = [tensor for tensor, want in zip(tensors, needed) if want]
    grads = iter(torch.autograd.grad(loss, wanted, grad_loss.to(loss.dtype), create_graph=True))
    return [next(grads) if want else None for want in needed[:3]]


def _check_linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, chunk_size: int | None) -> None:
    named = {"input": input, "linear_weight": linear_weight}
    if linear_bias is not None:
        named["linear_bias"] = linear_bias
    for name, tensor in named.items():
        _checks.is_tensor(name, tensor)
        _checks.dtype_in(name, tensor, _checks.FLOATS)
        _checks.same_device(name, tensor, "input", input)
        if tensor.dtype != input.dtype and not _ops.autocast_enabled(input.device.type):
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
    if input.dim() not in (1, 2):
        raise ValueError(f"input must have the shape (in,) or (N, in), got {tuple(input.shape)}")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must have the shape (C, …, {input.shape[-1]}) for input of shape {tuple(input.shape)}, "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise ValueError(f"input must be (N, in) for linear_weight of shape {tuple(linear_weight.shape)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"linear_bias must have the shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if chunk_size is not None:
        _checks.is_integer("chunk_size", chunk_size)
        _checks.in_range("chunk_size", chunk_size, 1)
