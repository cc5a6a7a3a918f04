"""What long-tailed recognition needs around the losses: class weights, priors and margins from class counts, a
long-tailed set of counts, and accuracy over head, middle and tail.

Wherever counts enter, a class without samples is taken as a class with one, so that nothing here is ever infinite
or NaN. Counts are a sequence or tensor of whole numbers; results are on the counts' device, in the default dtype,
computed in fp64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import _checks, _plan

Counts = Sequence[int] | Tensor


def effective_number_weights(counts: Counts, beta: float = 0.9999) -> Tensor:
    """Class weights by the effective number of samples, w_c ∝ (1 − β) / (1 − β^n_c), with Σ w_c = C.

    β = 0 gives all ones, β = 1 the limit, w_c ∝ 1/n_c. Source: Cui et al., Class-Balanced Loss Based on Effective
    Number of Samples, CVPR 2019.
    """
    _checks.in_range("beta", beta, 0.0, 1.0)
    n = _at_least_one(counts)
    if beta == 1:
        weights = 1 / n
    else:
        # −expm1(n·log β) keeps its digits where β^n is near 1.
        log_beta = torch.tensor(beta, dtype=torch.float64, device=n.device).log()
        weights = -1 / torch.expm1(n * log_beta)
    return (weights * (len(n) / weights.sum())).to(torch.get_default_dtype())


def log_prior(counts: Counts, tau: float = 1.0) -> Tensor:
    """τ·log(n_c / Σ n), the logit adjustment that makes the loss balanced.

    Source: Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021; τ = 1 is the balanced softmax of Ren
    et al., NeurIPS 2020. τ = 0 gives zeros.
    """
    _checks.finite("tau", tau)
    n = _at_least_one(counts)
    return (tau * (n.log() - n.sum().log()) + 0.0).to(torch.get_default_dtype())


def ldam_margins(counts: Counts, max_margin: float = 0.5) -> Tensor:
    """Margins m_c ∝ n_c^(−1/4), the largest of them max_margin.

    Source: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
    """
    _checks.finite_at_least("max_margin", max_margin, 0.0)
    n = _at_least_one(counts)
    return (max_margin * (n.min() / n) ** 0.25).to(torch.get_default_dtype())


def long_tailed_counts(n_max: int, num_classes: int, imbalance: float) -> Tensor:
    """Counts that fall off exponentially from n_max to n_max / imbalance: ⌊n_max · imbalance^(−c / (C − 1))⌋, at
    least 1. int64, (C,). Source: Cui et al., CVPR 2019, where CIFAR-100-LT has imbalance 100.
    """
    _checks.is_integer("n_max", n_max)
    _checks.in_range("n_max", n_max, 1)
    _checks.is_integer("num_classes", num_classes)
    _checks.in_range("num_classes", num_classes, 1)
    _checks.is_number("imbalance", imbalance)
    if not 1 <= imbalance < float("inf"):
        raise ValueError(f"imbalance must be the largest count over the smallest, at least 1, got {imbalance}")
    place = torch.arange(num_classes, dtype=torch.float64) / max(num_classes - 1, 1)
    # The tiny factor keeps an exact quotient such as 500 / 100 from being cut to the number below.
    return (n_max * imbalance**-place * (1 + 1e-12)).floor().clamp(min=1).to(torch.int64)


class ClassStatistics(nn.Module):
    """Per class: how many rows had it as target, how many of them were predicted right, and the sum of their losses.

    Give it to a loss, `fastreg.cross_entropy(logits, target, statistics=statistics)`, and it grows with every call,
    on the device, without a sync and bit for bit the same on every run. The losses are those before reduction,
    weights included. What it holds are buffers, all of them sums: for several processes, add them up.

    Attributes: count and correct, (C,) int64; loss_sum, (C,) fp64.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        _checks.is_integer("num_classes", num_classes)
        _checks.in_range("num_classes", num_classes, 1)
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.register_buffer("correct", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.register_buffer("loss_sum", torch.zeros(num_classes, dtype=torch.float64, device=device))

    def _apply(self, *args, **kwargs) -> "ClassStatistics":
        loss_sum = self.loss_sum
        super()._apply(*args, **kwargs)
        if not loss_sum.is_meta:
            self.loss_sum = loss_sum.to(self.count.device)  # sums stay fp64, whatever the model becomes
        return self

    @torch.no_grad()
    def update(self, target: Tensor, losses: Tensor, correct: Tensor) -> None:
        """Adds rows; those with a negative target are left out."""
        target, losses, correct = target.flatten(), losses.flatten(), correct.flatten()
        kept = target >= 0
        slot = torch.where(kept, target, 0)
        self.count.index_add_(0, slot, kept.to(torch.int64))
        self.correct.index_add_(0, slot, (kept & correct).to(torch.int64))
        losses = torch.where(kept, losses, 0.0).to(torch.float64)
        if losses.is_cuda:  # it sorts; index_add_ would add in any order
            self.loss_sum.index_put_((slot,), losses, accumulate=True)
        else:
            self.loss_sum.index_add_(0, slot, losses)

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def accuracy(self) -> Tensor:
        """(C,) fp64; 0 for a class without rows."""
        return self.correct.double() / self.count.clamp(min=1)

    def mean_loss(self) -> Tensor:
        """(C,) fp64; 0 for a class without rows."""
        return self.loss_sum / self.count.clamp(min=1)

    def split(self, train_counts: Counts, many: int = 100, few: int = 20) -> dict[str, Tensor]:
        """`split_accuracy` of what has been seen so far."""
        counts = _counts_on(self.count.device, train_counts)
        if counts.shape != self.count.shape:
            raise ValueError(f"train_counts must have one number for each of {len(self.count)} classes")
        return self._split(counts, many, few)

    def _split(self, counts: Tensor, many: int, few: int) -> dict[str, Tensor]:
        if not few <= many + 1:
            raise ValueError(f"few must be at most many + 1, got few {few} and many {many}")

        def mean_over(classes: Tensor) -> Tensor:
            classes = classes & (self.count > 0)
            return (self.accuracy() * classes).sum() / classes.sum().clamp(min=1)

        return {
            "all": self.correct.sum().double() / self.count.sum().clamp(min=1),
            "many": mean_over(counts > many),
            "medium": mean_over((counts <= many) & (counts >= few)),
            "few": mean_over(counts < few),
        }

    def extra_repr(self) -> str:
        return f"num_classes={len(self.count)}"


def split_accuracy(
    pred: Tensor, target: Tensor, train_counts: Counts, many: int = 100, few: int = 20
) -> dict[str, Tensor]:
    """Accuracy overall and over the classes with many, a medium number of, and few training samples.

    Args:
        pred: class indices of target's shape, or scores (…, C) whose largest counts.
        target: class indices; values outside [0, C) are left out.
        train_counts: (C,) training samples per class.
        many, few: a class with more than `many` samples is in "many", with fewer than `few` in "few".

    Returns:
        {"all", "many", "medium", "few"} → 0-d tensors on target's device, for which the host does not wait (unless
        train_counts are on a GPU, and have to be checked): for "all" the share of right samples, for the others the
        mean of their classes' accuracies, over the classes that occur in target. 0 where none does. Source of the
        split: Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.
    """
    _checks.is_tensor("pred", pred)
    _checks.is_tensor("target", target)
    counts = _counts_on(target.device, train_counts)
    if pred.shape == (*target.shape, len(counts)) and pred.is_floating_point():
        pred = pred.argmax(-1)
    if pred.shape != target.shape:
        raise ValueError(
            f"pred must have target's shape {tuple(target.shape)}, or be scores {(*target.shape, len(counts))}, "
            f"got {tuple(pred.shape)} of {pred.dtype}"
        )
    statistics = ClassStatistics(len(counts), target.device)
    target = target.to(torch.int64)
    known = (target >= 0) & (target < len(counts))
    statistics.update(torch.where(known, target, -1), torch.zeros(target.shape, device=target.device), pred == target)
    return statistics._split(counts, many, few)


def _counts_on(device: torch.device, counts: Counts) -> Tensor:
    counts = check_counts(counts)
    return _plan._to_device(counts.numpy(), device) if counts.device.type == "cpu" else counts.to(device)


def check_counts(counts: Counts) -> Tensor:
    """One whole number >= 0 per class, as int64."""
    try:
        given = torch.as_tensor(np.ascontiguousarray(counts) if isinstance(counts, np.ndarray) else counts)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"counts must be a sequence or tensor of numbers, got {type(counts).__name__}") from None
    if given.dim() != 1 or not len(given):
        raise ValueError(f"counts must be one number per class, got shape {tuple(given.shape)}")
    if given.dtype == torch.bool or given.is_complex():
        raise TypeError(f"counts must be whole numbers, got {given.dtype}")
    whole = given.to(torch.int64)
    if given.is_meta:
        return whole
    if given.is_floating_point() and not (whole == given).all():
        raise ValueError(f"counts must be whole numbers, got {float(given[whole != given][0]):g}")
    if (whole < 0).any():
        raise ValueError(f"counts must not be negative, got {int(whole.min())}")
    return whole


def _at_least_one(counts: Counts) -> Tensor:
    return check_counts(counts).clamp(min=1).double()
