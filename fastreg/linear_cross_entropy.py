"""Linear layer and loss in one: loss = cross_entropy(input @ linear_weightᵀ + linear_bias, target, …).

The logits of all rows never exist at once. The rows are taken in chunks: their logits, their loss and its gradient to
the logits, and from that their part of the gradients to input, weight and bias, all in the forward, so that a chunk's
logits can go before the next come; the backward only scales, in place. Without a reduction the incoming gradient of
each row is still open: then, and in a second backward, the backward makes the logits of each chunk again.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import chain
from typing import Any, Literal, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backends, _checks, _ops
from .longtail import ClassStatistics
from .losses import (
    LossOptions,
    LossOutputs,
    Target,
    check_arguments,
    check_extra,
    choose_backend,
    cross_entropy,
    index_shares,
    kernel_arguments,
    mean_denominator,
    reference_of,
    row_counts,
    target_wants_gradient,
    with_extra,
)

_forward_extra = _ops.kernels("cross_entropy_forward_extra")
_backward = _ops.kernels("cross_entropy_backward")

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
            least 256. In memory are one chunk of logits, in whose place come their gradients (beside them for the
            reference and, in its backward, for "none"), and, where wanted, the gradients to input, linear_weight and
            linear_bias, the latter two summed in fp32 (fp64 for fp64). Beside that a few per cent.
        grad_in_forward: without effect on what is chunked, whose gradient is made there anyway.
        options: torch's `LinearCrossEntropyOptions`, of which `batch_chunk_size` counts, for want of a chunk_size.

    The remaining arguments, what is returned and what is raised are those of `cross_entropy`. Backward twice is right,
    and makes everything again. The plain composition, for which all N × C logits are in memory, serves torch.func
    transforms, second derivatives, batched gradients and, under torch.compile, the reference; and, being faster, up to
    2^20 logits for which no chunk_size is given, and inputs of one chunk without gradients. On a CPU that does not
    multiply 16-bit matrices their products are made in fp32.
    """
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(f"options must be a torch.nn.LinearCrossEntropyOptions, got {type(options).__name__}")
    if chunk_size is None and options is not None:
        chunk_size = options.batch_chunk_size
    _check_linear(input, linear_weight, linear_bias, chunk_size)
    loss_options = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "gamma": gamma,
        "alpha": alpha,
        "logit_adjustment": logit_adjustment,
        "margin": margin,
        "scale": scale,
        "z_loss": z_loss,
        "all_ignored": all_ignored,
    }
    classes = linear_weight.shape[0]
    chunk = chunk_size or max(256, _CHUNK // classes)
    tensors = (input, linear_weight, linear_bias)
    wanted = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    small = chunk_size is None and input.shape[0] * classes <= _SMALL
    compiling = torch.compiler.is_compiling()
    if (
        input.dim() == 1
        or linear_weight.dim() > 2
        or not len(input)
        or (len(input) <= chunk and (small or not any(wanted)))
        or _backends.unusual(input) is not None
        or _backends.unusual(linear_weight) is not None
        or target_wants_gradient(target)
        or (compiling and choose_backend(input, target) == "reference")
    ):
        return cross_entropy(
            _linear(*tensors),
            target,
            weight,
            grad_in_forward=grad_in_forward,
            outputs=outputs,
            statistics=statistics,
            **loss_options,
        )
    dtype = input.dtype
    if _ops.autocast_enabled(input.device.type):
        # What autocast would do to the linear layer in every chunk, once.
        half = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(None if tensor is None else tensor.to(half) for tensor in tensors)
        dtype = torch.promote_types(dtype, torch.float32)
    logits = tensors[0].new_empty(1).expand(len(input), classes)  # what a loss is told of them; they never exist
    targets = check_arguments(logits, target, weight, **loss_options)
    want = outputs or statistics is not None
    if grad_in_forward or want:
        check_extra(reduction, grad_in_forward, statistics, len(targets) == 1, logits)
    _, *args, _ = kernel_arguments(logits, target, weight, **loss_options)
    # Which gradients are wanted is said here: within, they are off in any case, and what requires one does so under
    # no_grad, too. For the reduction none they wait for the incoming one.
    made = [want_it and reduction != "none" for want_it in wanted]
    loss, *known = _backends.apply(
        _Compiled if compiling else _LinearCrossEntropy,
        *tensors,
        *args,
        chunk,
        choose_backend(logits, target),
        want,
        made,
    )
    loss = loss.to(dtype)
    return with_extra(loss, *known, targets, loss_options["ignore_index"], outputs, statistics) if want else loss


def _linear(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    bias = None if linear_bias is None else linear_bias.flatten()
    return F.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])


class _LinearCrossEntropy(torch.autograd.Function):
    """Returns the loss in the dtype of the computation and, where wanted, each row's log-sum-exp, loss and argmax."""

    @staticmethod
    def forward(ctx, *args):
        *args, want, made = args
        loss, *known, ctx.sums = _Call(*args).forward(want, made)
        # What the backward reads must be noticed if it is modified meanwhile.
        ctx.save_for_backward(*args[:10])
        ctx.rest = args[10:]
        ctx.mark_non_differentiable(*known)
        ctx.set_materialize_grads(False)
        return loss, *known

    @staticmethod
    def backward(ctx, grad_loss, *_):
        nothing = (None,) * 19
        if grad_loss is None:
            return None, None, None, *nothing
        sums, ctx.sums = ctx.sums, None  # handed over once; a second backward makes its own
        call, needed = _Call(*ctx.saved_tensors, *ctx.rest), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or _backends.many_at_once(grad_loss):
            return *call.differentiable(needed, grad_loss), *nothing
        return *call.gradients(needed, grad_loss, sums), *nothing


class _Compiled(torch.autograd.Function):
    """The same in two operators for a graph. The gradients are rounded before they are multiplied by the incoming one,
    which is nearly always 1."""

    @staticmethod
    def forward(ctx, *args):
        loss, *known, to_input, to_weight, to_bias = torch.ops.fastreg.linear_cross_entropy(*args)
        ctx.save_for_backward(*args[:10], to_input, to_weight, to_bias)
        ctx.rest = args[10:-2]
        ctx.mark_non_differentiable(*known)
        return loss, *known

    @staticmethod
    def backward(ctx, grad_loss, *_):
        args, needed = (*ctx.saved_tensors[:10], *ctx.rest), ctx.needs_input_grad[:3]
        call = _Call(*args)
        if call.reduction == "none":
            grads = torch.ops.fastreg.linear_cross_entropy_backward(grad_loss, *args, list(needed))
        else:
            kept, _ = call.rows()
            whole = _unless_none_is_kept(grad_loss, kept)
            to_input, to_weight, to_bias = ctx.saved_tensors[10:]  # empty where nobody wants them
            if needed[0]:
                to_input = _zero_where_ignored(to_input * grad_loss, kept)
            grads = to_input, to_weight * whole, to_bias * whole
        return *(grad if want else None for grad, want in zip(grads, needed)), *(None,) * 19


@torch.library.impl("fastreg::linear_cross_entropy", "default")
def _forward_operator(*args):
    *args, want, made = args
    call = _Call(*args)
    loss, *known, sums = call.forward(want, made)
    grads = call.gradients(made, None, sums) if any(made) else (None,) * 3
    return loss, *known, *_or_empty(grads, args[0])


@torch.library.impl("fastreg::linear_cross_entropy_backward", "default")
def _backward_operator(grad_loss, *args):
    *args, made = args
    return _or_empty(_Call(*args).gradients(made, grad_loss), args[0])


def _or_empty(grads: tuple[Tensor | None, ...], input: Tensor) -> tuple[Tensor, ...]:
    return tuple(input.new_empty(0) if grad is None else grad for grad in grads)


class _Call:
    """A call, its loss told as the operators of cross_entropy take it."""

    def __init__(self, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *args: Any) -> None:
        self.tensors = input, linear_weight, linear_bias
        *args, self.zero_if_empty, self.chunk, self.backend = args
        self.told, self.options = args[:7], args[7:]
        self.reduction = _ops.REDUCTIONS[self.options[1]]
        self.compute = _ops.accumulator(input)
        self.memory: Tensor | None = None  # one for the logits of all chunks: a fresh one is entered page by page

    def forward(self, want: bool, made: Sequence[bool]) -> tuple[Any, ...]:
        """The loss, each row's log-sum-exp, loss and argmax (empty unless wanted), the gradients of the loss's sum."""
        sums = _Gradients(*self.tensors, made)
        losses, *known = zip(*self._chunks(sums, want))
        known = [torch.cat(part) for part in known]
        if self.reduction == "none":
            return torch.cat(losses), *known, None
        loss = torch.stack(losses).sum()
        if self.reduction == "mean":
            loss = loss / self._denominator(*self.rows())
        return loss, *known, sums if sums.wanted else None

    def gradients(
        self, wanted: Sequence[bool], grad_loss: Tensor | None, sums: "_Gradients | None" = None
    ) -> tuple[Tensor | None, ...]:
        """Those of the loss times grad_loss (None is 1), out of those of its sum where these are there."""
        by_row = grad_loss if self.reduction == "none" else None
        if sums is None:
            sums = _Gradients(*self.tensors, wanted)
            self._chunks(sums, False, by_row)
        if by_row is not None:
            return sums.scaled(None, None)
        kept, shares = self.rows()
        if self.reduction == "mean":
            grad_loss = (1.0 if grad_loss is None else grad_loss) / self._denominator(kept, shares)
        return sums.scaled(grad_loss, kept)

    def differentiable(self, needed: Sequence[bool], grad_loss: Tensor) -> list[Tensor | None]:
        """Those of the plain composition, which can be differentiated again, and taken for many incoming ones at
        once."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            loss = reference_of((F.linear(*self.tensors), *self.told), self.options, self.zero_if_empty)
        wanted = [tensor for tensor, want in zip(self.tensors, needed) if want]
        grads = iter(torch.autograd.grad(loss, wanted, grad_loss.to(loss.dtype), create_graph=create_graph))
        return [next(grads) if want else None for want in needed]

    def rows(self) -> tuple[Tensor | None, list[tuple[Tensor, float | Tensor]]]:
        """As `index_shares`; nothing of probabilities."""
        target, other_target, share = self.told[0], *self.told[-2:]
        if target.is_floating_point():
            return None, []
        both = target if other_target is None else (target, other_target, share)
        return index_shares(both, len(self.tensors[1]), self.options[0])

    def _denominator(self, kept: Tensor | None, shares: list) -> Tensor:
        input, weight = self.tensors[0], self.told[1]
        all_ignored = "zero" if self.zero_if_empty else "nan"
        denominator = mean_denominator(row_counts(kept, shares, weight, self.compute), len(input), all_ignored)
        if isinstance(denominator, Tensor):
            return denominator.to(self.compute)
        return torch.full((), denominator, dtype=self.compute, device=input.device)

    def _chunks(self, sums: "_Gradients", want: bool, grad: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """Chunk by chunk the loss (the sum of its rows' unless the reduction is none), log-sum-exps, losses, argmax;
        their gradients, times grad, go into the sums."""
        found, device = [], self.tensors[0].device.type
        # The products below are in the dtypes of their tensors.
        with torch.autocast(device, enabled=False) if _ops.autocast_enabled(device) else nullcontext():
            for rows in _slices(len(self.tensors[0]), self.chunk):
                found.append(self._one_chunk(rows, sums, want, None if grad is None else grad[rows]))
        self.memory = None
        return found

    def _one_chunk(
        self, rows: slice, sums: "_Gradients", want: bool, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A function, so that what a chunk has beside its logits is gone before those of the next are made."""
        logits = self._logits(self.tensors[0][rows])
        target, *vectors, other_target, share = self.told
        told = target[rows], *vectors, *(None if t is None else t[rows] for t in (other_target, share))
        by_row = self.reduction == "none"
        ignore_index, _, *others = self.options
        options = ignore_index, _ops.REDUCTIONS.index("none" if by_row else "sum"), *others
        if self.backend == "reference":
            found, d = _by_reference(logits, told, options, sums.wanted, want, grad)
        else:
            in_place = sums.wanted and not by_row
            loss, lse, denominator, *of_rows = _forward_extra[self.backend](
                logits, *told, *options, False, True, want, want, logits if in_place else None
            )
            found = loss, lse[0] + lse[1] if want else lse.new_empty(0), *of_rows
            d = logits
            if sums.wanted and by_row:
                d = _backward[self.backend](grad, logits, *told, lse, denominator, *options)
        if sums.wanted:
            sums.add(d, rows)
        return found

    def _logits(self, input: Tensor) -> Tensor:
        _, weight, bias = self.tensors
        if self.memory is None:  # the first chunk is the longest
            self.memory = input.new_empty(len(input), len(weight))
        logits = self.memory[: len(input)]
        if _in_pieces(input):
            dtype = _multiplied(input.dtype)
            for rows in _slices(len(input), _ROWS):
                x = input[rows].to(dtype)
                for piece in _slices(len(weight), _piece(len(weight))):
                    of_piece = None if bias is None else bias[piece].to(dtype)
                    logits[rows, piece] = F.linear(x, weight[piece].to(dtype), of_piece)
            return logits
        if bias is None:
            return torch.mm(input, weight.t(), out=logits)
        return torch.addmm(bias, input, weight.t(), out=logits)


def _by_reference(
    logits: Tensor, told: tuple, options: tuple, wanted: bool, want: bool, grad: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    # Under autocast the loss comes unrounded, in fp32.
    narrow = logits.dtype in (torch.float16, torch.bfloat16) and not logits.is_meta
    wide = torch.autocast(logits.device.type, torch.bfloat16) if narrow else nullcontext()
    with torch.set_grad_enabled(wanted), wide:
        logits = logits.detach().requires_grad_(wanted)
        found = reference_of((logits, *told), options, False, extra=want)
    loss, *known = found if want else (found, *[logits.new_empty(0)] * 3)
    (d,) = torch.autograd.grad(loss, logits, grad) if wanted else (None,)
    return (loss.detach(), *known), d


def _unless_none_is_kept(factor: Tensor, kept: Tensor | None) -> Tensor:
    """The factor, 0 where no row is kept, were it infinite."""
    return factor if kept is None else torch.where(kept.any(), factor, 0.0)


def _zero_where_ignored(to_input: Tensor, kept: Tensor | None) -> Tensor:
    return to_input if kept is None else to_input.masked_fill_(~kept.unsqueeze(1), 0.0)


class _Gradients:
    """The gradients of the sum of the losses to input, weight and bias, chunk by chunk."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, want: Sequence[bool]) -> None:
        compute = _ops.accumulator(input)
        self.tensors = input, weight, bias
        self.to_input = torch.empty_like(input) if want[0] else None
        self.to_weight = _Sum(weight, compute) if want[1] else None
        self.to_bias = torch.zeros_like(bias, dtype=compute) if want[2] else None
        self.wanted = any(want)

    def add(self, d: Tensor, rows: slice) -> None:
        input, weight, _ = self.tensors
        if self.to_input is not None:
            _product(d, weight, self.to_input[rows])
        if self.to_weight is not None:
            self.to_weight.add_product(d, input[rows])
        if self.to_bias is not None:
            self.to_bias += d.sum(0, dtype=self.to_bias.dtype)

    def scaled(self, factor: Tensor | None, kept: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients times the factor, in place: for one backward. Rows that are not kept stay 0, and where none is
        kept all does."""
        whole = None if factor is None else _unless_none_is_kept(factor, kept)
        if self.to_input is not None and factor is not None:
            _zero_where_ignored(self.to_input.mul_(factor), kept)
        if self.to_bias is not None:
            if whole is not None:
                self.to_bias *= whole
            self.to_bias = self.to_bias.to(self.tensors[2].dtype)
        return self.to_input, None if self.to_weight is None else self.to_weight.scaled(whole), self.to_bias


# A product of 16-bit matrices on a CPU takes memory in fp32 for the whole result, and on many CPUs several times as
# long as one in fp32. There the products are made of so many rows and pieces of the classes at a time, in what the CPU
# multiplies.
_ROWS = 256


def _in_pieces(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def _piece(classes: int) -> int:
    return max(classes // 32, 128)


@cache
def _multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which this CPU multiplies matrices of a 16-bit dtype."""
    has = torch.cpu.get_capabilities()
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    able = has.get("architecture") != "x86_64" or has.get(f"avx512_{kind}") or has.get(f"amx_{kind}")
    return dtype if able else torch.float32


def _product(d: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = d · weight."""
    if not _in_pieces(d) or _multiplied(d.dtype) == d.dtype:
        torch.mm(d, weight, out=out)
        return
    for rows in _slices(len(d), _ROWS):
        total = out.new_zeros(out[rows].shape, dtype=torch.float32)
        for piece in _slices(len(weight), _piece(len(weight))):
            total.addmm_(d[rows, piece].float(), weight[piece].float())
        out[rows] = total


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


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
        piece = max(classes // 16, 2**22 // max(features, 1)) if d.is_cuda else _piece(classes)
        for rows in _slices(len(d), len(d) if d.is_cuda else _ROWS):
            x, first = input[rows] if d.is_cuda else input[rows].to(self.parts[0].dtype), 0
            for part in chain.from_iterable(half.split(piece) for half in self.parts):
                columns = d[rows, first : first + len(part)].t()
                if d.is_cuda:
                    part += torch.mm(columns, x, out_dtype=part.dtype)
                else:
                    part.addmm_(columns.to(part.dtype), x)
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
