"""Softmax losses, cross-entropy and its long-tail family, and the sigmoid focal loss.

For one row of logits x (C classes) with target class y, and z = scale·(x + logit_adjustment − margin_y·onehot(y)):

    log p = z − logsumexp(z)
    loss  = −Σ_c q_c · w_c · α_c · (1 − p_c)^γ · log p_c  +  z_loss · logsumexp(z)²

q is the smoothed target, (1 − ε)·onehot(y) + ε/C, w the class weights, α the focal balance. A class whose factor
q_c · w_c · α_c is 0 has no share in the loss, were its log p −∞. The plain call is
`torch.nn.functional.cross_entropy`, argument by argument.

The kernels: csrc/cpu/losses.cpp, csrc/cuda/losses.cu, tritonkernels/losses.py. They read the logits once in the
forward, and read and write them once in the backward; between the two only two or three numbers per row are kept.
Where a row is needed a second time, for a term of every class (probabilities, smoothing with γ) or the gradient in the
forward, it waits on the chip; what of a very long row finds no room there comes from the cache again.
"""

import itertools
import math
from numbers import Real
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _backends, _checks, _ops
from .longtail import ClassStatistics

_forward = _ops.kernels("cross_entropy_forward")
_forward_extra = _ops.kernels("cross_entropy_forward_extra")
_backward = _ops.kernels("cross_entropy_backward")
_scale_gradient = _ops.kernels("scale_gradient_")
_backends.register("cross_entropy", kernels=_ops.KERNEL_BACKENDS)

# A target is class indices, probabilities of the input's shape, or two index tensors and the share of the first.
Target = Tensor | tuple[Tensor, Tensor, float | Tensor]

# On the CPU the gradient of at most this many logits is made together with the loss, which saves a call and a read. The
# gradient that waits for the backward is at most 4 MiB of fp32.
_SMALL = 1 << 20
_small = _ops.kernels("cross_entropy_small")["cpu"]
_small = getattr(_small, "_op", _small)  # without the wrapper that Dynamo wants: a third of a microsecond
_with_gradient = _ops.kernels("cross_entropy_with_gradient")["cpu"]
_with_gradient = getattr(_with_gradient, "_op", _with_gradient)
_INT64, _FP16, _FP32, _FP64 = torch.int64, torch.float16, torch.float32, torch.float64
_is_autocast_enabled = torch.is_autocast_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled  # without a device to parse
_is_compiling = torch.compiler.is_compiling
_REDUCTION = {name: index for index, name in enumerate(_ops.REDUCTIONS)}


class LossOutputs(NamedTuple):
    """The loss, and what the pass over the logits knew besides. Only the loss has a gradient (`z_loss` is what
    penalises the log-sum-exp)."""

    loss: Tensor
    lse: Tensor
    """logsumexp(z) of each row, in the dtype of the computation; 0 in ignored rows."""
    argmax: Tensor
    """The class of the largest logit of each row, the lowest among equals, int64; −1 in ignored rows. It is taken of
    input, not of the adjusted z: the adjustment belongs to training, the prediction to the bare logits. NaN is not
    the largest, unlike in torch.argmax; a row of nothing else says some class."""
    correct: Tensor | None
    """Whether argmax is the target, False in ignored rows; None unless the target is class indices."""


class LossOptions(TypedDict, total=False):
    """The options of `cross_entropy` that the other softmax losses pass on, for type checkers."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    alpha: float | Tensor | None
    logit_adjustment: Tensor | None
    margin: Tensor | None
    scale: float
    z_loss: float
    all_ignored: str
    grad_in_forward: bool | str
    statistics: ClassStatistics | None


@overload
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    gamma: float = 0.0,
    outputs: Literal[True],
    **loss_options: Unpack[LossOptions],
) -> LossOutputs: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    gamma: float = 0.0,
    outputs: bool = False,
    **loss_options: Unpack[LossOptions],
) -> Tensor: ...
def cross_entropy(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
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
) -> Tensor | LossOutputs:
    """Cross-entropy and its long-tail family: every option combines with every other, in one pass.

    With the defaults this is `torch.nn.functional.cross_entropy`, argument by argument. The formula is at the top
    of this file; z and p below are its z and p.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, …), in fp16, bf16, fp32 or fp64, with any strides. Never modified.
            They are read as they lie where two strides span N, d1, …; of others, images cropped in width or, where the
            classes lie innermost, in height and width, a copy is made in the order of memory.
        target: one of
            class indices of input's shape without the class dimension, int64, int32 or uint8;
            probabilities of input's shape, in any floating dtype (a gradient to them, or to the share below, comes from
            the reference alone);
            (target_a, target_b, share), what mixup and cutmix make: two tensors of class indices and the share of
            the first, a float or a tensor, 0-d, (N,) or of target_a's shape. It means the probabilities
            share·onehot(a) + (1 − share)·onehot(b) without making them, with the rules of class indices for
            weight and ignore_index: a row with either target ignored is ignored, and its weight in the mean is
            share·w_a + (1 − share)·w_b.
        weight: (C,), scales the terms. With class indices the mean divides by the sum of the kept rows' w_y, with
            probabilities by N, as in PyTorch.
        ignore_index: rows with this target give 0 and get a gradient of exactly 0, whatever their logits hold. Not
            for probabilities.
        reduction: "mean", "sum" or "none".
        label_smoothing: ε in [0, 1].
        gamma: focal exponent γ ≥ 0 (Lin et al. 2017). The loss and its gradient are finite for every γ and p.
        alpha: a float or (C,), scales the terms and, unlike weight, leaves the mean's denominator alone.
        logit_adjustment: (C,), added to the logits: τ·log prior for logit adjustment (Menon et al. 2021) or, with
            τ = 1, balanced softmax (Ren et al. 2020). See `fastreg.longtail.log_prior`.
        margin: (C,), its target's entry is taken off the target's logit: LDAM (Cao et al. 2019). With probabilities
            or shares q, before smoothing, margin·q is taken off. See `fastreg.longtail.ldam_margins`.
        scale: multiplies the adjusted logits, > 0.
        z_loss: weight of logsumexp(z)² per kept row, ≥ 0.
        all_ignored: "nan", or "zero" for a mean of 0 where the mean divides by 0: an empty batch, no kept row, or
            kept rows of weight 0.
        grad_in_forward: make the gradient together with the loss, so that the logits are read once in all instead
            of twice; for "mean" and "sum", where it is wanted at all. An incoming gradient other than 1 costs the pass
            that was saved, and so does a second backward; both are right, and the host never waits to see.
            On a GPU some rows are read a second time after all, right after the first, so from its cache as far as
            that holds them. In Triton: rows of more than 16,384 classes, or of 1,024 strided ones (fp32: 2,048); half
            of that with terms of every class. In CUDA, on an H100 or H200: what of a row lies beyond 920,000 classes
            in 16 bits (fp32: 460,000; half of that with terms of every class), or beyond 13,000 strided ones (6,500).
            On GPUs without thread block clusters, an A100 for one: what lies beyond 82,000 classes (41,000), or 1,100
            strided ones (580); and few rows, which are dealt out to several multiprocessors each: up to as many as
            there are of those, if they have more than 4,096 classes in 16 bits (fp32: 2,048), or 32 times as many of
            more than 64 strided ones.
            Without a gradient in the forward, Triton reads rows of more than 8,192 classes twice in the forward where
            each has a term of its own: for probabilities, and smoothing with gamma.
            fp16 input is treated as without it: a gradient scaler's factor must come before the rounding. So is every
            input under torch.compile.
            "in_place" lets the gradient take the place of the logits, which are then spoilt: for logits that nobody
            else needs, not a leaf, and for one backward. Where the gradient is not made in the forward, they stay.
            On the CPU calls on up to 2^20 logits of (N, C) do so by themselves.
        outputs: return `LossOutputs`, what else the same pass knows, instead of the loss alone.
        statistics: a `fastreg.longtail.ClassStatistics`, to which this call's rows are added per target class.
            Only for class indices.

    Returns:
        The loss, 0-d or, for "none", of the rows' shape, in the dtype of input (fp32 under autocast, as in
        PyTorch), computed in fp32 (fp64 for fp64) and rounded once. With `outputs` the loss stands first in a
        named tuple.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range, or a gradient asked of weight,
            alpha, logit_adjustment or margin.
        IndexError: a target outside [0, C) that is not ignore_index, on the CPU. On CUDA it is a device-side
            assertion, as in PyTorch.

    Differentiable as often as wanted; a second derivative is taken of the reference.
    """
    try:
        if (
            (alpha is logit_adjustment is margin is statistics is None)
            and label_smoothing == gamma == z_loss == 0.0
            and scale == 1.0
            and not (label_smoothing is False or gamma is False or z_loss is False or scale is True)
            and type(ignore_index) is int
            and not (grad_in_forward or outputs)
            and (reduction == "mean" or reduction == "sum")
            and all_ignored == "nan"
            and type(input) is type(target) is Tensor
            and input.requires_grad
            and input.is_cpu
            and input.dim() == 2
            and (dtype := input.dtype) is not _FP16  # there a gradient waits for its scaler's factor
            and target.dtype is _INT64
            and input.numel() <= _SMALL
            and not _is_compiling()
            and torch.is_grad_enabled()
            and _backends.only_arguments_matter()
        ):
            widen = dtype is not _FP32 and _is_any_autocast_enabled() and _is_autocast_enabled("cpu")
            if weight is None:
                return _small_cross_entropy(input, target, (ignore_index, _REDUCTION[reduction], widen))
            if _fits(weight, input, target):
                told = ignore_index, _REDUCTION[reduction], 0.0, 0.0, 1.0, 1.0, 0.0, False, widen
                return _small_cross_entropy(input, target, told, (weight, None, None, None, None, None))
    except (RuntimeError, IndexError, TypeError):
        pass  # what is wrong is said below in this function's own words

    extra = grad_in_forward or outputs or statistics is not None
    options = {
        "ignore_index": ignore_index,
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
    targets = check_arguments(input, target, weight, **options)
    if extra:
        check_extra(reduction, grad_in_forward, statistics, len(targets) == 1, input)
    backend = choose_backend(input, target)
    if backend == "reference":
        if not extra:
            return cross_entropy_reference(input, target, weight, **options)
        found = _reference_with_extra(input, target, weight, **options)
        return with_extra(*found, targets, ignore_index, outputs, statistics)

    shape = input.shape
    if len(shape) > 3 and input.numel() and (groups := _groups_in_memory(input)):
        options |= {"grad_in_forward": grad_in_forward, "outputs": outputs, "statistics": statistics}
        return _as_it_lies(groups, input, target, weight, **options)
    args = (*kernel_arguments(input, target, weight, **options), backend)
    input, target = args[:2]
    if not extra:
        if input.requires_grad and torch.is_grad_enabled():
            if (
                backend == "cpu"
                and input.numel() <= _SMALL
                and input.dtype is not _FP16
                and reduction != "none"
                and len(shape) <= 2
                and not _is_compiling()
            ):
                return _small_cross_entropy(input, target, args[8:-1], args[2:8])
            loss = _backends.apply(_CrossEntropy, *args)
        else:
            loss, _, _ = _forward[backend](*args[:-1])
        return loss.reshape(_rows(shape)) if reduction == "none" else loss
    want = outputs or statistics is not None
    memory = None
    if grad_in_forward and input.requires_grad and torch.is_grad_enabled():
        memory = _memory_for_gradient(input, grad_in_forward)
    loss, *known = _backends.apply(_CrossEntropyExtra, *args, want, want, memory)
    if memory is not None and memory.data_ptr() == input.data_ptr() != 0:
        # Whoever saved the logits, this node too, must not use them any more.
        torch.autograd.graph.increment_version(input)
    loss = loss.reshape(_rows(shape)) if reduction == "none" else loss
    if not want:
        return loss
    known = [t.reshape(_rows(shape)) for t in known]
    return with_extra(loss, *known, targets, ignore_index, outputs, statistics)


@overload
def focal_loss(
    input: Tensor,
    target: Target,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    outputs: Literal[True],
    **loss_options: Unpack[LossOptions],
) -> LossOutputs: ...
@overload
def focal_loss(
    input: Tensor,
    target: Target,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    outputs: bool = False,
    **loss_options: Unpack[LossOptions],
) -> Tensor: ...
def focal_loss(
    input: Tensor,
    target: Target,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    all_ignored: str = "nan",
    grad_in_forward: bool | str = False,
    outputs: bool = False,
    statistics: ClassStatistics | None = None,
) -> Tensor | LossOutputs:
    """Softmax focal loss (Lin et al. 2017), −α_y · (1 − p_y)^γ · log p_y: `cross_entropy` with a gamma.

    p comes from the softmax of the logits alone; neither weight nor alpha enters it. Options, shapes, dtypes and
    errors are those of `cross_entropy`.
    """
    return cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        gamma=gamma,
        alpha=alpha,
        logit_adjustment=logit_adjustment,
        margin=margin,
        scale=scale,
        z_loss=z_loss,
        all_ignored=all_ignored,
        grad_in_forward=grad_in_forward,
        outputs=outputs,
        statistics=statistics,
    )


# ---- checks: attribute reads only, so that the call stays cheap -------------------------------------------


def check_arguments(
    input: Tensor, target: Target, weight: Tensor | None, *, ignore_index, reduction, label_smoothing, gamma, alpha,
    logit_adjustment, margin, scale, z_loss, all_ignored,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The targets that are class indices: one, two of which each has its share, or none where they are
    probabilities."""
    target, other_target, share = _unpack(target) if isinstance(target, tuple) else (target, None, None)
    indices = check_shapes(input, target, other_target, share)
    if weight is not None or logit_adjustment is not None or margin is not None or isinstance(alpha, Tensor):
        classes = input.shape[0 if input.dim() == 1 else 1]
        _check_vector("weight", weight, classes, input)
        _check_vector("logit_adjustment", logit_adjustment, classes, input)
        _check_vector("margin", margin, classes, input)
        if isinstance(alpha, Tensor):
            _check_vector("alpha", alpha.expand(classes) if alpha.dim() == 0 else alpha, classes, input)
    plain = type(label_smoothing) is type(gamma) is type(z_loss) is type(scale) is float and alpha is None
    plain = plain and label_smoothing == gamma == z_loss == 0.0 and scale == 1.0
    if not plain or all_ignored != "nan" or reduction not in _ops.REDUCTIONS:
        check_options(reduction, label_smoothing, gamma, alpha, scale, z_loss, all_ignored)
    if type(ignore_index) is not int and not isinstance(ignore_index, Tensor):
        _checks.is_integer("ignore_index", ignore_index)
    if not indices and ignore_index >= 0:
        raise ValueError(f"ignore_index must not be given with probabilities as target, got {ignore_index}")
    return () if not indices else (target,) if other_target is None else (target, other_target)


def _unpack(target: tuple) -> tuple[Tensor, Tensor, float | Tensor]:
    if len(target) != 3:
        raise ValueError(f"target must be a tensor or (target_a, target_b, share), got {len(target)} values")
    _, other_target, share = target
    _checks.is_tensor("target[1]", other_target)
    if not isinstance(share, Tensor):
        _checks.in_range("target[2], the share,", share, 0.0, 1.0)
    return tuple(target)


def check_shapes(
    input: Tensor, target: Tensor, other_target: Tensor | None = None, share: float | Tensor | None = None
) -> bool:
    """Whether target holds class indices (else probabilities)."""
    _checks.is_tensor("input", input)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor or a tuple (target_a, target_b, share), got {type(target).__name__}")
    _checks.dtype_in("input", input, _checks.FLOATS)
    shape = input.shape
    if len(shape) == 2 and other_target is None and target.dtype == torch.int64 and target.shape == shape[:1]:
        indices = True  # what nearly every call is
    else:
        if not shape:
            raise ValueError("input must have a dimension of classes, got a 0-d tensor")
        indices = not target.dtype.is_floating_point
        rows = _rows(shape)
        if indices:
            if target.shape != rows:
                hint = "; probabilities must have a floating dtype" if target.shape == shape else ""
                raise ValueError(
                    f"target must have the shape {tuple(rows)} for input of shape {tuple(shape)}, "
                    f"got {tuple(target.shape)} of {target.dtype}{hint}"
                )
            _checks.dtype_in("target", target, _checks.INDICES)
        elif target.shape != shape:
            raise ValueError(
                f"target with probabilities must have input's shape {tuple(shape)}, got {tuple(target.shape)} "
                f"of {target.dtype}; class indices must have a dtype among int64, int32, uint8"
            )
        if other_target is not None:
            _check_pair(target, indices, other_target, share)
    if shape[0 if len(shape) == 1 else 1] == 0:
        raise ValueError(f"input must have at least one class, got shape {tuple(shape)}")
    if target.device != input.device:
        _checks.same_device("target", target, "input", input)
    return indices


def _check_pair(target: Tensor, indices: bool, other_target: Tensor, share: object) -> None:
    if not indices:
        raise TypeError(f"target[0] must hold class indices, got {target.dtype}")
    _checks.dtype_in("target[1]", other_target, _checks.INDICES)
    if other_target.shape != target.shape:
        raise ValueError(
            f"target[1] must have the shape of target[0], {tuple(target.shape)}, got {tuple(other_target.shape)}"
        )
    _checks.same_device("target[1]", other_target, "target[0]", target)
    if isinstance(share, Tensor):
        _checks.dtype_in("target[2], the share,", share, _checks.FLOATS)
        if share.shape not in (torch.Size(), target.shape[:1], target.shape):
            raise ValueError(
                f"target[2], the share, must be a float or have the shape (), {tuple(target.shape[:1])} or "
                f"{tuple(target.shape)}, got {tuple(share.shape)}"
            )
        _checks.same_device("target[2], the share,", share, "target[0]", target)


def _check_vector(name: str, vector: Tensor | None, classes: int, input: Tensor) -> Tensor | None:
    if vector is None:
        return None
    _checks.is_tensor(name, vector)
    _checks.dtype_in(name, vector, _checks.FLOATS)
    if vector.shape != (classes,):
        raise ValueError(f"{name} must have the shape ({classes},), one value per class, got {tuple(vector.shape)}")
    _checks.same_device(name, vector, "input", input)
    check_no_gradient(name, vector)
    return vector


def _fits(weight: object, input: Tensor, target: Tensor) -> bool:
    """Whether the kernels can have the weight as it is, and target, class indices, with it."""
    shape = input.shape
    return (
        type(weight) is Tensor
        and weight.dtype is _FP32
        and input.dtype is not _FP64
        and weight.is_cpu
        and not weight.requires_grad
        and weight.shape == shape[1:]
        and shape[1] > 0
        and target.is_cpu
        and target.shape == shape[:1]
    )


def check_no_gradient(name: str, vector: object) -> None:
    if isinstance(vector, Tensor) and vector.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient: the loss is not differentiated with respect to it")


def check_options(reduction, label_smoothing, gamma, alpha, scale, z_loss, all_ignored) -> None:
    _checks.choice("reduction", reduction, _ops.REDUCTIONS)
    _checks.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    _checks.finite_at_least("gamma", gamma, 0.0)
    _checks.finite_at_least("z_loss", z_loss, 0.0)
    if isinstance(alpha, Real):
        _checks.finite_at_least("alpha", alpha, 0.0)
    elif alpha is not None and not isinstance(alpha, Tensor):
        raise TypeError(f"alpha must be a number or a tensor of one per class, got {type(alpha).__name__}")
    _checks.above_zero("scale", scale)
    _checks.finite_at_least("scale", scale, 0.0)
    _checks.choice("all_ignored", all_ignored, ("nan", "zero"))


def check_extra(reduction, grad_in_forward, statistics, indices: bool, input: Tensor) -> None:
    if grad_in_forward and reduction == "none":
        raise ValueError(
            "grad_in_forward needs reduction 'mean' or 'sum': with 'none' the gradient of a row is still open"
        )
    if not isinstance(grad_in_forward, bool) and grad_in_forward != "in_place":
        raise ValueError(f"grad_in_forward must be True, False or 'in_place', got {grad_in_forward!r}")
    if grad_in_forward == "in_place" and input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        raise ValueError("input must not be a leaf for grad_in_forward='in_place': its values would be lost")
    if statistics is None:
        return
    if not isinstance(statistics, ClassStatistics):
        raise TypeError(f"statistics must be a ClassStatistics, got {type(statistics).__name__}")
    if not indices:
        raise ValueError("statistics are per target class: target must be class indices")
    classes = input.shape[0 if input.dim() == 1 else 1]
    if len(statistics.count) != classes:
        raise ValueError(f"statistics must be for the {classes} classes of input, got {len(statistics.count)}")
    _checks.same_device("statistics", statistics.count, "input", input)


def _as_dtype(vector: object, dtype: torch.dtype) -> object:
    return vector.to(dtype) if isinstance(vector, Tensor) and vector.dtype != dtype else vector


# ---- kernels ---------------------------------------------------------------------------------------------


def choose_backend(input: Tensor, target: Target) -> str:
    return _backends.choose("cross_entropy", input.device.type, _refuse, input, target)


def kernel_arguments(
    input: Tensor, target: Target, weight: Tensor | None, *, ignore_index, reduction, label_smoothing, gamma, alpha,
    logit_adjustment, margin, scale, z_loss, all_ignored,
) -> tuple:  # fmt: skip
    """What the operators take, in their order: eight tensors, seven options, zero_if_empty, fp32_loss."""
    compute = _ops.accumulator(input)
    other_target = share = None
    if isinstance(target, tuple):
        target, other_target, share = target
        share = _share_per_row(share, target, compute)
    vectors = isinstance(alpha, Tensor)
    if vectors and alpha.dim() == 0:
        alpha = alpha.expand(input.shape[0 if input.dim() == 1 else 1])
    if input.dim() != 2:
        input, target, other_target, share = _as_kernels_know(input, target, other_target, share)
    return (
        input,
        target,
        _as_dtype(weight, compute),
        _as_dtype(alpha, compute) if vectors else None,
        _as_dtype(logit_adjustment, compute),
        _as_dtype(margin, compute),
        other_target,
        share,
        ignore_index,
        _REDUCTION[reduction],
        label_smoothing,
        gamma,
        1.0 if alpha is None or vectors else alpha,
        scale,
        z_loss,
        all_ignored == "zero",
        # Under autocast PyTorch computes this loss in fp32; the kernels do so anyway and only widen the result.
        _ops.autocast_enabled(input.device.type),
    )


def _refuse(backend: str, input: Tensor, target: Target) -> str | None:
    if target_wants_gradient(target):
        return "the target's probabilities want a gradient, which only the reference gives"
    return _backends.unusual(input)


def target_wants_gradient(target: Target) -> bool:
    parts = target if isinstance(target, tuple) else (target,)
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts) and torch.is_grad_enabled()


def _rows(shape: torch.Size) -> torch.Size:
    """The shape of the rows of logits of this shape."""
    return shape[:1] + shape[2:] if len(shape) > 1 else shape[1:]


def _share_per_row(share: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(share, Tensor):
        share = torch.full((), share, dtype=dtype, device=target.device)
    elif share.dim() == 1:
        share = share.reshape([-1, *([1] * (target.dim() - 1))])
    return share.to(dtype).expand(target.shape)


def _by_stride(tensor: Tensor) -> list[int]:
    """The dimensions, that of the largest stride first."""
    order: list[int] = []  # torch.compile cannot sort by a key that it does not know
    for dim, stride in enumerate(tensor.stride()):
        order.insert(sum(1 for other in order if tensor.stride(other) >= stride), dim)
    return order


def _undoing(order: list[int]) -> list[int]:
    """The order that brings dimensions permuted by `order` back."""
    return [order.index(dim) for dim in range(len(order))]


def _groups_in_memory(input: Tensor) -> list[list[int]] | None:
    """The dimensions of the rows, 0 and 2, 3, …, as they lie in memory, those together that one stride spans; None if
    one spans 2, 3, … as they come."""
    sizes, strides = input.shape, input.stride()
    long = [dim for dim in range(2, input.dim()) if sizes[dim] > 1]
    if all(strides[dim] == sizes[inner] * strides[inner] for dim, inner in itertools.pairwise(long)):
        return None
    groups: list[list[int]] = []
    for dim in _by_stride(input):
        if dim == 1 or sizes[dim] == 1:
            continue
        if groups and strides[groups[-1][-1]] == sizes[dim] * strides[dim]:
            groups[-1].append(dim)
        else:
            groups.append([dim])
    anywhere = [dim for dim in range(input.dim()) if dim != 1 and sizes[dim] == 1]
    return [anywhere + groups[0], *groups[1:]]


def _as_it_lies(groups: list[list[int]], input: Tensor, target: Target, weight: Tensor | None, **options):
    """`cross_entropy` of the rows, which are independent, in the order of memory: (outer, C, inner) or (rows, C). What
    more than two strides span, as of a crop, is copied first, in the order of memory too."""
    if len(groups) > 2:
        order = _by_stride(input)
        copy = input.permute(order).contiguous().permute(_undoing(order))
        return cross_entropy(copy, target, weight, **options)
    outer, inner = groups if len(groups) == 2 else (groups[0], [])
    if not inner and input.stride(1) > input.stride(outer[-1]):
        outer, inner = inner, outer
    of_rows = [max(dim - 1, 0) for dim in (*outer, *inner)]  # of a tensor without the classes
    sizes = [[input.shape[dim] for dim in dims] for dims in (outer, inner)]
    rows = [math.prod(sizes[0]), *([math.prod(sizes[1])] if inner else [])]

    def moved(tensor: Tensor) -> Tensor:
        if tensor.dim() < input.dim():
            return tensor.permute(of_rows).reshape(rows)
        return tensor.permute([*outer, 1, *inner]).reshape([rows[0], input.shape[1], *rows[1:]])

    if isinstance(target, tuple):
        a, b, share = target
        if isinstance(share, Tensor) and share.dim():
            share = moved(_share_per_row(share, a, share.dtype))
        target = moved(a), moved(b), share
    else:
        target = moved(target)
    found = cross_entropy(moved(input), target, weight, **options)

    def back(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dim() == 0:
            return tensor
        return tensor.reshape(sizes[0] + sizes[1]).permute(_undoing(of_rows))

    return LossOutputs(*map(back, found)) if options["outputs"] else back(found)


def _as_kernels_know(input: Tensor, target: Tensor, *per_row: Tensor | None) -> tuple[Tensor | None, ...]:
    """(N, C) or (N, C, D)."""
    if input.dim() == 1:
        return tuple(None if t is None else t.unsqueeze(0) for t in (input, target, *per_row))
    if input.dim() == 3:
        return input, target, *per_row
    target = target.flatten(2) if target.dim() == input.dim() else target.flatten(1)
    return input.flatten(2), target, *(None if t is None else t.flatten(1) for t in per_row)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *args, zero_if_empty, fp32_loss, backend = args
        tensors, options = args[:8], args[8:]
        loss, lse, denominator = _forward[backend](*tensors, *options, zero_if_empty, fp32_loss)
        ctx.save_for_backward(*tensors, lse, denominator)
        ctx.options, ctx.zero_if_empty, ctx.backend = options, zero_if_empty, backend
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: a second derivative may be asked for
            grad = _differentiable_backward(grad_loss, ctx.saved_tensors[:8], ctx.options, ctx.zero_if_empty)
        else:
            grad = _backward[ctx.backend](grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, *([None] * 17)


class _SmallCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, options, vectors=()):
        """Without `vectors`, a call without options, of which only ignore_index, the reduction and fp32_loss are told;
        else all that the operators take behind target."""
        loss, ctx.made = (_with_gradient if vectors else _small)(input, target, *vectors, *options)
        ctx.save_for_backward(input, target, *vectors)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad, ctx.made = ctx.made, None  # handed over once; a second backward makes its own
        try:
            factor = grad_loss.item()
        except RuntimeError:
            factor = None  # one of many, under vmap
        if factor == 1.0 and grad is not None and not torch.is_grad_enabled():
            return grad, None, None, None
        input, target, *vectors = ctx.saved_tensors
        tensors = input, target, *(vectors or [None] * 6)
        told = ctx.options if vectors else (*ctx.options[:2], 0.0, 0.0, 1.0, 1.0, 0.0, False, False)
        *options, zero_if_empty, _ = told
        if torch.is_grad_enabled():  # create_graph: a second derivative may be asked for
            grad = _differentiable_backward(grad_loss, tensors, options, zero_if_empty)
        elif factor is not None and not math.isfinite(factor):  # times an exact 0 it would be NaN
            _, *softmax = _forward["cpu"](*tensors, *options, zero_if_empty, False)
            grad = _backward["cpu"](grad_loss, *tensors, *softmax, *options)
        else:
            if grad is None:
                _, grad = (_with_gradient if vectors else _small)(input, target, *vectors, *ctx.options)
            grad = _scaled(grad, grad_loss, "cpu") if factor is None else grad.mul_(factor)
        return grad, None, None, None


_small_cross_entropy = super(torch.autograd.Function, _SmallCrossEntropy).apply  # see _backends.apply


class _CrossEntropyExtra(torch.autograd.Function):
    """Returns the loss and, per row, the log-sum-exp, the loss before reduction and the argmax."""

    @staticmethod
    def forward(ctx, *args):
        *args, zero_if_empty, fp32_loss, backend, want_losses, want_argmax, grad = args
        tensors, options = args[:8], args[8:]
        loss, lse, denominator, losses, argmax = _forward_extra[backend](
            *tensors, *options, zero_if_empty, fp32_loss, want_losses, want_argmax, grad
        )
        ctx.save_for_backward(*tensors, lse, denominator)
        ctx.options, ctx.zero_if_empty, ctx.backend, ctx.made = options, zero_if_empty, backend, grad
        ctx.set_materialize_grads(False)
        whole = lse[0] + lse[1]
        ctx.mark_non_differentiable(whole, losses, argmax)
        return loss, whole, losses, argmax

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 21
        made, ctx.made = ctx.made, None  # handed over once; a second backward makes its own
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = _differentiable_backward(grad_loss, ctx.saved_tensors[:8], ctx.options, ctx.zero_if_empty)
        elif made is not None:
            grad = _scaled(made, grad_loss, ctx.backend)
        else:
            grad = _backward[ctx.backend](grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, *([None] * 20)


def _scaled(made: Tensor, factor: Tensor, backend: str) -> Tensor:
    """made · factor, in place where that can be. An exact 0, that of an ignored row for one, stays 0 if the factor is
    infinite."""
    if _backends.many_at_once(factor) or (backend == "cpu" and not math.isfinite(factor.item())):
        return torch.where(made == 0, made, made * factor)
    _scale_gradient[backend](made, factor)
    return made


def _memory_for_gradient(input: Tensor, wanted: bool | str) -> Tensor | None:
    """Where the forward writes the gradient, or None if it shall not make it."""
    if input.dtype == torch.float16 or _is_compiling():
        return None
    if wanted == "in_place" and torch._debug_has_internal_overlap(input) == 0:
        return input.detach()
    return torch.empty_like(input)


def with_extra(
    loss: Tensor,
    lse: Tensor,
    losses: Tensor,
    argmax: Tensor,
    targets: tuple[Tensor, ...],
    ignore_index: int,
    outputs: bool,
    statistics: ClassStatistics | None,
) -> Tensor | LossOutputs:
    """Finishes what a kernel or the reference found per row; until here ignored rows hold anything."""
    correct = None
    if targets:
        targets = [target.to(torch.int64) for target in targets]
        kept = targets[0] != ignore_index
        for target in targets[1:]:
            kept = kept & (target != ignore_index)
        lse, argmax = torch.where(kept, lse, 0.0), torch.where(kept, argmax, -1)
    if len(targets) == 1:
        correct = kept & (argmax == targets[0])
    if statistics is not None:
        statistics.update(torch.where(kept, targets[0], -1), losses, correct)
    return LossOutputs(loss, lse, argmax, correct) if outputs else loss


def _differentiable_backward(grad_loss: Tensor, tensors: tuple, options: tuple, zero_if_empty: bool) -> Tensor:
    return _differentiable_gradient(reference_of(tensors, options, zero_if_empty), tensors[0], grad_loss)


def reference_of(tensors: tuple, options: tuple, zero_if_empty: bool, extra: bool = False) -> Any:
    """The reference's loss of what the operators take; with `extra` what `_reference_with_extra` returns."""
    input, target, weight, alpha, logit_adjustment, margin, other_target, share = tensors
    ignore_index, reduction, label_smoothing, gamma, alpha_scale, scale, z_loss = options
    return (_reference_with_extra if extra else cross_entropy_reference)(
        input,
        target if other_target is None else (target, other_target, share),
        weight,
        ignore_index=ignore_index,
        reduction=_ops.REDUCTIONS[reduction],
        label_smoothing=label_smoothing,
        gamma=gamma,
        alpha=alpha_scale if alpha is None else alpha * alpha_scale,
        logit_adjustment=logit_adjustment,
        margin=margin,
        scale=scale,
        z_loss=z_loss,
        all_ignored="zero" if zero_if_empty else "nan",
    )


def _differentiable_gradient(loss: Tensor, input: Tensor, grad_loss: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, input, grad_loss.to(loss.dtype), create_graph=True)
    return grad


# ---- reference -------------------------------------------------------------------------------------------


def cross_entropy_reference(
    input: Tensor,
    target: Target,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    all_ignored: str = "nan",
    **options: Any,
) -> Tensor:
    """The formula in plain PyTorch, differentiable as often as wanted, on any device and for any subclass."""
    losses, counts, _ = _row_losses(input, target, weight, **options)
    return _reduce(losses, counts, reduction, all_ignored, input)


def _reference_with_extra(
    input: Tensor, target: Target, weight: Tensor | None, *, reduction: str, all_ignored: str, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and per row the log-sum-exp, the loss before reduction and the argmax."""
    losses, counts, z = _row_losses(input, target, weight, **options)
    dim = 0 if input.dim() == 1 else 1
    known = (
        torch.logsumexp(z.detach(), dim),
        losses.detach(),
        input.detach().masked_fill(input.isnan(), -math.inf).argmax(dim),
    )
    return _reduce(losses, counts, reduction, all_ignored, input), *known


def _row_losses(
    input: Tensor,
    target: Target,
    weight: Tensor | None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float | Tensor | None = None,
    logit_adjustment: Tensor | None = None,
    margin: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor | float, Tensor]:
    """Each row's loss; what each row counts in a mean, or 1 if all count 1; z."""
    dim = 0 if input.dim() == 1 else 1  # of the classes
    classes = input.shape[dim]
    compute = _ops.accumulator(input)
    x = input.to(compute)

    def per_class(vector: Tensor) -> Tensor:
        return vector.to(compute).reshape([-1, *([1] * (input.dim() - 1 - dim))])

    probabilities, kept, shares = None, None, []  # kept None: every row counts
    if isinstance(target, Tensor) and target.is_floating_point():
        probabilities = target.to(compute)
    else:
        kept, shares = index_shares(target, classes, ignore_index)
    if kept is not None:
        # Whatever an ignored row holds, NaN included, must reach neither the loss nor the gradient.
        x = x.masked_fill(~kept.unsqueeze(dim), 0.0)
    if logit_adjustment is not None:
        x = x + per_class(logit_adjustment)
    if margin is not None and probabilities is not None:
        x = x - per_class(margin) * probabilities
    elif margin is not None:
        for y, share in shares:
            taken = _at(margin.to(compute), y) * share
            x = x.scatter_add(dim, y.unsqueeze(dim), -taken.unsqueeze(dim))
    z = x if scale == 1.0 else x * scale

    factor, alpha_scale = None, 1.0  # of each class; of all
    if weight is not None:
        factor = weight.to(compute)
    if isinstance(alpha, Tensor) and alpha.dim():
        factor = alpha.to(compute) if factor is None else factor * alpha.to(compute)
    elif alpha is not None:
        alpha_scale = alpha
    plain = gamma == 0 and factor is None and probabilities is None and len(shares) == 1 and label_smoothing < 1
    if plain and input.dim() <= 2:  # PyTorch's own, in fewer calls
        losses = F.cross_entropy(z, shares[0][0], reduction="none", label_smoothing=label_smoothing)
    else:
        log_p = torch.log_softmax(z, dim)
        factors = 1.0 if factor is None else per_class(factor)
        if probabilities is not None:
            q = probabilities
            if label_smoothing:
                q = (1 - label_smoothing) * q + label_smoothing / classes
            losses = _product(q, _product(factors, _focal(log_p, gamma))).sum(dim)
        else:
            losses = 0.0
            for y, share in shares:
                terms = _focal(log_p.gather(dim, y.unsqueeze(dim)).squeeze(dim), gamma)
                losses = losses + _product(share, _product(1.0 if factor is None else _at(factor, y), terms))
            if label_smoothing:
                spread = _product(factors, _focal(log_p, gamma)).sum(dim)
                losses = _product(1 - label_smoothing, losses) + label_smoothing / classes * spread
        losses = -losses
    losses = _product(alpha_scale, losses)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(z, dim) ** 2
    if kept is not None:
        losses = losses.masked_fill(~kept, 0.0)
    return losses, row_counts(kept, shares, weight, compute), z


def row_counts(
    kept: Tensor | None, shares: list[tuple[Tensor, float | Tensor]], weight: Tensor | None, compute: torch.dtype
) -> Tensor | float:
    """What each row counts in a mean, or 1 if all count 1."""
    if weight is None or not shares:
        return 1.0 if kept is None else kept.to(compute)
    counts = sum(_product(share, _at(weight.to(compute), y)) for y, share in shares)
    return counts if kept is None else counts.masked_fill(~kept, 0.0)


def _at(vector: Tensor, y: Tensor) -> Tensor:
    """vector[y]; with a single index, 0-d, that would read it on the host."""
    return vector[y.unsqueeze(0)].squeeze(0)


def mean_denominator(counts: Tensor | float, rows: int, all_ignored: str) -> Tensor | float:
    """What the sum of the losses is divided by. In the place of 0 stands what makes the mean 0, or, as in PyTorch, NaN,
    also where the sum is not 0: smoothing and z_loss give kept rows of weight 0 a loss."""
    nothing = math.inf if all_ignored == "zero" else math.nan
    if not isinstance(counts, Tensor):
        return rows or nothing
    denominator = counts.sum()
    return denominator.masked_fill(denominator == 0, nothing)


def _reduce(losses: Tensor, counts: Tensor | float, reduction: str, all_ignored: str, input: Tensor) -> Tensor:
    dtype = losses.dtype if _ops.autocast_enabled(input.device.type) else input.dtype
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / mean_denominator(counts, losses.numel(), all_ignored)
    return total.to(dtype)


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    """(1 − p)^γ · log p, with finite derivatives of every order at p = 0 and p = 1."""
    if gamma == 0:
        return log_p
    # Where p is far below the last digit of 1 the power is 1; kept apart so that no derivative meets 0·inf.
    far = log_p < -100.0
    near = torch.where(far, -1.0, log_p)
    # 1 − p from expm1 keeps its digits where p is near 1.
    return torch.where(far, log_p, near * _power(-torch.expm1(near), gamma))


def _power(u: Tensor, gamma: float) -> Tensor:
    """u^γ for 0 <= u <= 1; held above a floor whose square has a finite reciprocal, for the derivatives' sake."""
    return u.clamp(min=torch.finfo(u.dtype).tiny ** 0.5) ** gamma


def _product(factor: Tensor | float, terms: Tensor) -> Tensor:
    """factor · terms, where a factor of 0 gives 0 even if the term is infinite (NaN stays, as everywhere)."""
    if isinstance(factor, Tensor):
        return factor * torch.where((factor == 0) & terms.isinf(), 0.0, terms)
    if factor == 1:
        return terms
    return factor * (terms if factor else torch.where(terms.isinf(), 0.0, terms))


def index_shares(
    target: Target, classes: int, ignore_index: int
) -> tuple[Tensor | None, list[tuple[Tensor, float | Tensor]]]:
    """Which rows count (None: all), and the target classes with their shares."""
    if isinstance(target, Tensor):
        kept, (y,) = _kept_rows((target,), classes, ignore_index)
        return kept, [(y, 1.0)]
    a, b, share = target
    if isinstance(share, Tensor) and share.dim() == 1:
        share = share.reshape([-1, *([1] * (a.dim() - 1))])
    kept, (a, b) = _kept_rows((a, b), classes, ignore_index)
    return kept, [(a, share), (b, 1 - share)]


def _kept_rows(targets: tuple[Tensor, ...], classes: int, ignore_index: int) -> tuple[Tensor | None, list[Tensor]]:
    """Which rows count, None if all do, and the class indices as int64 with 0 in rows that do not count."""
    targets = [target.to(torch.int64) for target in targets]
    if _readable(targets[0]):
        if all(_all_inside(target, classes, ignore_index) for target in targets):
            return None, targets
        for target in targets:
            _checks.in_bounds("target", target, classes, ignore_index)
    kept = targets[0] != ignore_index
    for target in targets[1:]:
        kept = kept & (target != ignore_index)
    return kept, [target.masked_fill(~kept, 0) for target in targets]


def _all_inside(target: Tensor, classes: int, ignore_index: int) -> bool:
    if target.numel() == 0:
        return True
    low, high = (int(bound) for bound in target.aminmax())
    return low >= 0 and high < classes and not low <= ignore_index <= high


def _readable(tensor: Tensor) -> bool:
    """Whether the host can look at values for free: an ordinary CPU tensor that nobody traces."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and _get_current_dispatch_mode() is None
    )


# ---- sigmoid focal loss ----------------------------------------------------------------------------------

_sigmoid_forward = _ops.kernels("sigmoid_focal_forward")
_sigmoid_backward = _ops.kernels("sigmoid_focal_backward")
_sigmoid_small = _ops.kernels("sigmoid_focal_small")["cpu"]
_backends.register("sigmoid_focal_loss", kernels=_ops.KERNEL_BACKENDS)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), `torchvision.ops.sigmoid_focal_loss` argument by argument.

    For one logit x with target t in [0, 1] and p = sigmoid(x):

        loss = α_t · (1 − p_t)^γ · (−t·log p − (1 − t)·log(1 − p))
        p_t  = t·p + (1 − t)·(1 − p),    α_t = t·α + (1 − t)·(1 − α), or 1 if alpha is negative

    Args:
        inputs: logits of any shape, in fp16, bf16, fp32 or fp64. Permuted ones are read as they lie, and so are dense
            targets permuted alike; and so are rows of classes, the last dimension, at equal distances, as of
            logits[:, 1:] or logits[..., :80], and dense targets that lie so. A copy is made of other logits and targets
            that do not lie in one piece of memory, and of permuted logits whose classes must be known, for weight or
            class indices, and do not lie next to each other.
        targets: t, of inputs' shape and any floating dtype (which is not rounded to that of inputs) or bool; or class
            indices of inputs' shape without its last dimension, int64, int32 or uint8: 1 for that class and 0 for the
            others, which are never made. An index outside [0, C) is background: 0 for every class.
        alpha: weight of the positives, 1 − alpha that of the negatives; any negative value turns both off.
        gamma: exponent γ >= 0. The loss and its gradient are finite for every γ and x.
        reduction: "none", "mean" or "sum".
        weight: (C,) for the last dimension of inputs, scales the terms; without a gradient.
        normalizer: a float or 0-d tensor (without a gradient) by which a sum is divided, usually the number of
            positives. 0 counts as 1, so that a batch without positives is not divided by 0. Only for "sum".

    Returns:
        The loss, 0-d or, for "none", of inputs' shape, in inputs' dtype (fp32 under autocast), computed in fp32
        (fp64 for fp64) and rounded once. On the CPU the gradient of up to 2^20 logits is made together with it.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range.
    """
    _check_sigmoid(inputs, targets, alpha, gamma, reduction, weight, normalizer)
    backend = _backends.choose("sigmoid_focal_loss", inputs.device.type, _refuse_sigmoid, inputs, targets)
    classes = inputs.shape[-1] if inputs.dim() else 1
    if backend == "reference" or not classes:
        return sigmoid_focal_loss_reference(inputs, targets, alpha, gamma, reduction, weight, normalizer)
    compute = _ops.accumulator(inputs)
    dense = targets.shape == inputs.shape
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    elif dense and targets.dtype != inputs.dtype:
        targets = targets.to(compute)
    shape = inputs.shape
    order = _order_in_memory(inputs, classes_last=not dense or weight is not None)
    if order is not None:
        inputs, targets = inputs.permute(order), targets.permute(order if dense else order[:-1])
        classes = inputs.shape[-1]
    scale = 1.0
    if reduction == "mean":
        scale = 1 / inputs.numel() if inputs.numel() else float("nan")
    elif normalizer is not None and not isinstance(normalizer, Tensor):
        scale, normalizer = 1 / (normalizer or 1), None
    small = (
        backend == "cpu"
        and inputs.requires_grad
        and inputs.numel() <= _SMALL
        and inputs.dtype is not _FP16  # there a gradient waits for its scaler's factor
        and torch.is_grad_enabled()
        and not _is_compiling()
    )
    loss = _backends.apply(
        _SmallSigmoidFocal if small else _SigmoidFocal,
        inputs.reshape(-1, classes),
        targets.reshape(-1, classes) if dense else targets.reshape(-1),
        _as_dtype(weight, compute),
        _as_dtype(normalizer, compute),
        alpha,
        gamma,
        reduction != "none",
        scale,
        _ops.autocast_enabled(inputs.device.type),
        backend,
    )
    if reduction != "none":
        return loss.reshape(())
    if order is None:
        return loss.reshape(shape)
    return loss.reshape(inputs.shape).permute(_undoing(order))


def _order_in_memory(inputs: Tensor, classes_last: bool) -> list[int] | None:
    """The order of dimensions in which permuted logits are contiguous; None if they are so as they come, or if none
    will do."""
    if inputs.is_contiguous():
        return None
    order = _by_stride(inputs)
    if (classes_last and order[-1] != inputs.dim() - 1) or not inputs.permute(order).is_contiguous():
        return None
    return order


def _check_sigmoid(inputs, targets, alpha, gamma, reduction, weight, normalizer) -> None:
    _checks.is_tensor("inputs", inputs)
    _checks.is_tensor("targets", targets)
    _checks.dtype_in("inputs", inputs, _checks.FLOATS)
    check_sigmoid_options(alpha, gamma, reduction)
    if targets.shape == inputs.shape:
        if not targets.is_floating_point():
            _checks.dtype_in("targets of inputs' shape", targets, (torch.bool, *_checks.FLOATS))
    elif targets.shape == inputs.shape[:-1]:
        _checks.dtype_in("targets with class indices", targets, _checks.INDICES)
    else:
        raise ValueError(
            f"targets must have inputs' shape {tuple(inputs.shape)}, or for class indices "
            f"{tuple(inputs.shape[:-1])}, got {tuple(targets.shape)}"
        )
    _checks.same_device("targets", targets, "inputs", inputs)
    if weight is not None:
        _check_vector("weight", weight, inputs.shape[-1] if inputs.dim() else 1, inputs)
    if normalizer is not None:
        if reduction != "sum":
            raise ValueError(f"normalizer divides a sum: it needs reduction='sum', got {reduction!r}")
        if isinstance(normalizer, Tensor):
            if normalizer.dim():
                raise ValueError(f"normalizer must be a float or a 0-d tensor, got shape {tuple(normalizer.shape)}")
            _checks.same_device("normalizer", normalizer, "inputs", inputs)
            if normalizer.requires_grad and torch.is_grad_enabled():
                raise ValueError("normalizer must not require a gradient")
        else:
            _checks.finite_at_least("normalizer", normalizer, 0.0)


def check_sigmoid_options(alpha, gamma, reduction) -> None:
    _checks.choice("reduction", reduction, _ops.REDUCTIONS)
    _checks.finite_at_least("gamma", gamma, 0.0)
    _checks.is_number("alpha", alpha)
    if not alpha <= 1:
        raise ValueError(f"alpha must be at most 1 (negative: no balance), got {alpha}")


def _refuse_sigmoid(backend: str, inputs: Tensor, targets: Tensor) -> str | None:
    if targets.requires_grad and torch.is_grad_enabled():
        return "the targets want a gradient, which only the reference gives"
    return _backends.unusual(inputs)


class _SigmoidFocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *args, fp32_loss, backend = args
        ctx.save_for_backward(*args[:4])
        ctx.options, ctx.backend = args[4:], backend
        return _sigmoid_forward[backend](*args, fp32_loss)

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad = _differentiable_sigmoid_backward(ctx, grad_loss)
        else:
            grad = _sigmoid_backward[ctx.backend](grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, *([None] * 9)


class _SmallSigmoidFocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *args, fp32_loss, _ = args
        loss, ctx.made = _sigmoid_small(*args, fp32_loss)
        ctx.save_for_backward(*args[:4])
        ctx.options = args[4:]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        made, ctx.made = ctx.made, None  # handed over once; a second backward makes its own
        if torch.is_grad_enabled():  # create_graph: a second derivative may be asked for
            grad = _differentiable_sigmoid_backward(ctx, grad_loss)
        elif made is None:
            grad = _sigmoid_backward["cpu"](grad_loss, *ctx.saved_tensors, *ctx.options)
        else:
            try:
                grad = made if grad_loss.dim() == 0 and grad_loss.item() == 1.0 else made.mul_(grad_loss)
            except RuntimeError:  # one of many, under vmap
                grad = made * grad_loss
        return grad, *([None] * 9)


def _differentiable_sigmoid_backward(ctx, grad_loss: Tensor) -> Tensor:
    inputs, targets, weight, normalizer = ctx.saved_tensors
    alpha, gamma, reduce, scale = ctx.options
    reduction = "sum" if reduce else "none"
    loss = scale * sigmoid_focal_loss_reference(inputs, targets, alpha, gamma, reduction, weight, normalizer)
    return _differentiable_gradient(loss, inputs, grad_loss)


def sigmoid_focal_loss_reference(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The formula in plain PyTorch, differentiable as often as wanted, with respect to dense targets too."""
    compute = _ops.accumulator(inputs)
    x = inputs.to(compute)
    if targets.shape == inputs.shape:
        t = targets.to(compute)
        losses = _product(t, -F.logsigmoid(x)) + _product(1 - t, -F.logsigmoid(-x))
        if gamma:
            near = x.clamp(-100.0, 100.0)  # beyond, the power stands still, and its derivative is 0 and not 0·inf
            u = t * torch.sigmoid(-near) + (1 - t) * torch.sigmoid(near)
    else:
        t = torch.arange(inputs.shape[-1], device=x.device) == targets.unsqueeze(-1)
        wrong = torch.where(t, -x, x)  # the logit of being wrong
        losses = -F.logsigmoid(-wrong)
        if gamma:
            u = torch.sigmoid(wrong.clamp(-100.0, 100.0))
    if gamma:
        losses = losses * _power(u, gamma)
    if alpha >= 0:
        t = t.to(compute)
        losses = _product(t * alpha + (1 - t) * (1 - alpha), losses)
    if weight is not None:
        losses = _product(weight.to(compute), losses)
    dtype = compute if _ops.autocast_enabled(inputs.device.type) else inputs.dtype
    if reduction == "none":
        return losses.to(dtype)
    loss = losses.mean() if reduction == "mean" else losses.sum()
    if isinstance(normalizer, Tensor):
        loss = loss / normalizer.masked_fill(normalizer == 0, 1)
    elif normalizer:
        loss = loss / normalizer
    return loss.to(dtype)
