"""Linear layer and loss in one: loss = cross_entropy(input @ linear_weightᵀ + linear_bias, target, …).

The logits of all rows never exist at once. The rows are taken in chunks: their logits, their loss and its gradient to
the logits, and from that their part of the gradients to input, weight and bias, all in the forward, so that a chunk's
logits can go before the next come; the backward only scales, in place. Without a reduction the incoming gradient of
each row is still open: then, and in a second backward, the backward makes the logits of each chunk again.
"""

from collections.abc import Iterator
from itertools import chain
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
    cross_entropy_reference,
    index_shares,
    mean_denominator,
    row_counts,
    target_wants_gradient,
)

_CHUNK = 2**24  # logits in a chunk, unless it is told: 64 MB in fp32
_SMALL = 2**20  # up to here the plain composition is faster, half a millisecond on a CPU


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
            linear_weight and linear_bias, the latter two summed in fp32 (fp64 for fp64). Beside that a few per cent;
            and what PyTorch's product of 16-bit matrices takes on a CPU that has none: a chunk of logits in fp32.
        grad_in_forward: without effect on what is chunked, whose gradient is made there anyway.
        options: torch's `LinearCrossEntropyOptions`, of which `batch_chunk_size` counts, for want of a chunk_size.

    The remaining arguments, what is returned and what is raised are those of `cross_entropy`. Backward twice is right,
    and makes everything again. The plain composition, for which all N × C logits are in memory, serves torch.compile
    (`torch.compiler.disable` leaves the call out of what is compiled), torch.func transforms, second derivatives and
    batched gradients; and, being faster, up to 2^20 logits for which no chunk_size is given, and inputs of one chunk
    without gradients.
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
    tensors = (input, linear_weight, linear_bias)
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    small = chunk_size is None and input.shape[0] * classes <= _SMALL
    if (
        input.dim() == 1
        or linear_weight.dim() > 2
        or not len(input)
        or (len(input) <= chunk and (small or not wanted))
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
    made = wanted and reduction != "none"
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
        sums = _Gradients(input, linear_weight, linear_bias, ctx.needs_input_grad[:3] if made else (False,) * 3)
        losses, known = sums.add(target, weight, reduction, options, extra, chunk)
        ctx.sums = sums if made else None
        ctx.mark_non_differentiable(*(part for part in known if part is not None))
        if reduction == "none":
            return torch.cat(losses).to(compute), *known
        loss = torch.stack(losses).sum().to(compute)
        ctx.kept, shares = None, []
        if isinstance(target, tuple) or not target.is_floating_point():
            ctx.kept, shares = index_shares(target, len(linear_weight), options["ignore_index"])
        if reduction == "mean":
            denominator = mean_denominator(row_counts(ctx.kept, shares, weight, compute), len(input), all_ignored)
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
        sums, ctx.sums = ctx.sums, None  # handed over once; a second backward makes its own
        input, linear_weight, linear_bias, *saved = ctx.saved_tensors
        tensors = input, linear_weight, linear_bias
        told = [value if tensor is None else tensor for value, tensor in zip(ctx.told, saved)]
        target, weight, options = tree_unflatten(told, ctx.spec)
        if torch.is_grad_enabled() or _backends.many_at_once(grad_loss):
            options = {**options, "reduction": ctx.reduction, "all_ignored": ctx.all_ignored}
            return *_differentiable(tensors, ctx.needs_input_grad, target, weight, options, grad_loss), *nothing
        rows = grad_loss if ctx.reduction == "none" else None
        if sums is None:
            sums = _Gradients(*tensors, ctx.needs_input_grad[:3])
            sums.add(target, weight, ctx.reduction, options, {}, ctx.chunk, rows)
        if rows is not None:
            return *sums.scaled(None, None), *nothing
        factor = grad_loss / ctx.denominator if ctx.reduction == "mean" else grad_loss
        return *sums.scaled(factor, ctx.kept), *nothing


class _Gradients:
    """The gradients of the sum of the losses to input, weight and bias, chunk by chunk."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, want: tuple[bool, ...]) -> None:
        compute = _ops.accumulator(input)
        self.tensors = input, weight, bias
        self.memory: Tensor | None = None  # one for the logits of all chunks: a fresh one is entered page by page
        self.to_input = torch.empty_like(input) if want[0] else None
        self.to_weight = _Sum(weight, compute) if want[1] else None
        self.to_bias = torch.zeros_like(bias, dtype=compute) if want[2] else None
        self.wanted = any(want)

    def add(
        self, target: Target, weight: Tensor | None, reduction: str, options: dict, extra: dict, chunk: int,
        grad: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:  # fmt: skip
        """The losses of the chunks, each their sum unless reduction is none, and what else `extra` asks of the rows."""
        found = []
        for rows in _chunks(len(self.tensors[0]), chunk):
            above = None if grad is None else grad[rows]
            found.append(self._add_chunk(rows, _rows_of(target, rows), weight, reduction, options, extra, above))
        self.memory = None
        losses, *known = zip(*(f if isinstance(f, LossOutputs) else (f,) for f in found))
        return losses, [None if part[0] is None else torch.cat(part) for part in known]

    def _add_chunk(
        self, rows: slice, target: Target, weight: Tensor | None, reduction: str, options: dict, extra: dict,
        grad: Tensor | None,
    ) -> Tensor | LossOutputs:  # fmt: skip
        """A function, so that what a chunk has beside its logits is gone before those of the next are made."""
        input, linear_weight, _ = self.tensors
        logits = self._logits(input[rows])
        if reduction != "none":
            reduction, extra = "sum", {**extra, "grad_in_forward": self.wanted and "in_place"}
        # Under autocast the loss comes unrounded, in fp32.
        wide = torch.autocast(
            logits.device.type, torch.bfloat16, enabled=logits.dtype in (torch.float16, torch.bfloat16)
        )
        with torch.set_grad_enabled(self.wanted), wide:
            logits.requires_grad_(self.wanted)
            # A view is no leaf: it may be overwritten.
            found = cross_entropy(logits.view_as(logits), target, weight, reduction=reduction, **options, **extra)
        if not self.wanted:
            return found
        loss = found.loss if isinstance(found, LossOutputs) else found
        (d,) = torch.autograd.grad(loss, logits, grad)
        del logits
        if self.to_input is not None:
            torch.mm(d, linear_weight, out=self.to_input[rows])
        if self.to_weight is not None:
            self.to_weight.add_product(d, input[rows])
        if self.to_bias is not None:
            self.to_bias += d.sum(0, dtype=self.to_bias.dtype)
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

    def scaled(self, factor: Tensor | None, kept: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients times the factor, in place: for one backward. Rows that are not kept stay 0, and where none is
        kept all does, were the factor infinite."""
        whole = factor
        if factor is not None and kept is not None:
            whole = torch.where(kept.any(), factor, 0.0)
        if self.to_input is not None and factor is not None:
            self.to_input *= factor
            if kept is not None:
                self.to_input.masked_fill_(~kept.unsqueeze(1), 0.0)
        if self.to_bias is not None:
            if whole is not None:
                self.to_bias *= whole
            self.to_bias = self.to_bias.to(self.tensors[2].dtype)
        return self.to_input, None if self.to_weight is None else self.to_weight.scaled(whole), self.to_bias


class _Sum:
    """A sum of products, of the shape of `like`, which becomes a gradient of its dtype. In a wider dtype the first half
    of its rows lies where that gradient will, so that the two never take more memory than the sum alone."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        if like.dtype == dtype:
            self.gradient = torch.zeros_like(like)
            self.parts = [self.gradient]
        else:
            rows, columns = like.shape
            self.gradient = like.new_empty(rows, columns)
            first = self.gradient[: rows // 2 * 2].view(-1).view(dtype).view(rows // 2, columns)
            self.parts = [first.zero_(), like.new_zeros(rows - rows // 2, columns, dtype=dtype)]

    def add_product(self, d: Tensor, input: Tensor) -> None:
        """Adds dᵀ · input, in the sum's precision; in pieces, so that nothing wide is made of all classes at once."""
        if d.dtype == self.parts[0].dtype:
            self.gradient.addmm_(d.t(), input)
            return
        classes, features = self.gradient.shape
        input = input if d.is_cuda else input.to(self.parts[0].dtype)
        piece = max(classes // 16, 2**22 // max(features, 1)) if d.is_cuda else max(classes // 32, 512)
        first = 0
        for part in chain.from_iterable(half.split(piece) for half in self.parts):
            columns = d[:, first : first + len(part)].t()
            if d.is_cuda:
                part += torch.mm(columns, input, out_dtype=part.dtype)
            else:
                part.addmm_(columns.to(part.dtype), input)
            first += len(part)

    def scaled(self, factor: Tensor | None) -> Tensor:
        if self.parts[0] is self.gradient:
            return self.gradient if factor is None else self.gradient.mul_(factor)
        first, piece = 0, max(len(self.gradient) // 32, 1)
        for part in chain.from_iterable(half.split(piece) for half in self.parts):
            # From the front: what the copy is written over has been read.
            self.gradient[first : first + len(part)] = part.clone() if factor is None else part * factor
            first += len(part)
        return self.gradient


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, min(first + chunk, rows)) for first in range(0, rows, chunk))


def _rows_of(target: Target, rows: slice) -> Target:
    if not isinstance(target, tuple):
        return target[rows]
    return tuple(part[rows] if isinstance(part, Tensor) and part.dim() else part for part in target)


def _differentiable(
    tensors: tuple, needed: tuple[bool, ...], target: Target, weight: Tensor | None, options: dict, grad_loss: Tensor
) -> list[Tensor | None]:
    """The plain composition, whose gradient can be differentiated again, and taken for many incoming ones at once."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = cross_entropy_reference(F.linear(*tensors), target, weight, **options)
    wanted = [tensor for tensor, want in zip(tensors, needed) if want]
    grads = iter(torch.autograd.grad(loss, wanted, grad_loss.to(loss.dtype), create_graph=create_graph))
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
