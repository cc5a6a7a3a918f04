"""The one place where operators are declared: schemas, fake kernels, and what torch.compile may assume.

An operator is declared once per backend that has a kernel, as an overload: `fastreg::name.cpu`,
`fastreg::name.cuda`, `fastreg::name.triton`. The public functions pick the overload (see _backends.py), so a
call goes straight from Python into the kernel. The C++ extensions register `.cpu` and `.cuda`; `.triton` is
the function of the same name in `tritonkernels`, imported at its first call.
"""

import hashlib
import importlib
from collections.abc import Callable

import torch

KERNEL_BACKENDS = ("cpu", "cuda", "triton")
_BY_ADDRESS = None
_declared: list[str] = []


def _define(
    name: str, schema: str, fake: Callable | None, module: str, backends: tuple[str, ...] = KERNEL_BACKENDS
) -> None:
    """`fake` is None (`_BY_ADDRESS`) for an operator that works on addresses. A graph knows nothing of what it reads
    and writes there, and would leave it out or move it: without a fake kernel torch.compile ends its graph before."""
    for backend in backends:
        overload = f"fastreg::{name}.{backend}"
        torch.library.define(overload, schema, tags=() if fake is None else (torch.Tag.pt2_compliant_tag,))
        _declared.append(overload + schema)
        if fake is not None:
            torch.library.register_fake(overload, fake)
        if backend == "triton":

            def launch(*args, **kwargs):
                kernels = importlib.import_module(f"tritonkernels.{module}")
                with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whatever its tensors' one
                    return getattr(kernels, name)(*args, **kwargs)

            torch.library.impl(overload, ("cpu", "cuda"))(launch)


def kernels(name: str) -> dict[str, Callable]:
    """Backend name -> the operator overload that runs there."""
    packet = getattr(torch.ops.fastreg, name)
    return {backend: getattr(packet, backend) for backend in packet.overloads()}


def autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


# ---- losses ----------------------------------------------------------------------------------------------
# input is (N, C) or (N, C, D); a row is one position over which classes are compared, (N) or (N, D) of them.
# target holds class indices, one per row, or probabilities of input's shape. With other_target (indices too)
# and share (one per row, fp32 or, for fp64 input, fp64), a row's target is share of the first and 1 − share of
# the other. Options are explained in losses.py.

REDUCTIONS = ("none", "mean", "sum")  # the operators take the index

_TENSORS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? alpha, Tensor? logit_adjustment, Tensor? margin, "
    "Tensor? other_target, Tensor? share"
)
_OPTIONS = (
    "int ignore_index, int reduction, float label_smoothing, float gamma, float alpha_scale, float scale, float z_loss"
)


def accumulator(input):
    """The dtype in which a loss is computed, and which per-class vectors have when they reach a kernel."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def every_class_has_a_share(target, label_smoothing, gamma):
    """Whether each class of a row has a term of its own in the loss, and not the target classes alone."""
    return target.is_floating_point() or (label_smoothing != 0 and gamma != 0)


def _cross_entropy_forward(input, *args):
    target, reduction, label_smoothing, gamma, fp32_loss = args[0], *args[8:11], args[-1]
    rows = [input.shape[0], *input.shape[2:]]
    accumulate = accumulator(input)
    loss = input.new_empty(rows if reduction == 0 else [], dtype=accumulate if fp32_loss else input.dtype)
    known = 2 + every_class_has_a_share(target, label_smoothing, gamma)
    return loss, input.new_empty([known, *rows], dtype=accumulate), input.new_empty([], dtype=accumulate)


def _cross_entropy_forward_extra(input, *args):
    *args, want_losses, want_argmax, _ = args
    loss, lse, denominator = _cross_entropy_forward(input, *args)
    losses = lse.new_empty(lse.shape[1:] if want_losses else 0)
    argmax = lse.new_empty(lse.shape[1:] if want_argmax else 0, dtype=torch.int64)
    return loss, lse, denominator, losses, argmax


_define(
    "cross_entropy_forward",
    # Returns the loss; the log-sum-exp of each row; what the sum of the losses was divided by (1 unless the
    # reduction is mean; in the place of 0 stands inf with zero_if_empty, else NaN: see losses.mean_denominator). The
    # log-sum-exp comes as two numbers per row, lse[0] the largest z and lse[1] the log of the sum of exp(z - lse[0]),
    # because their sum, rounded, has no digits left where the logits are large: log p is (z - lse[0]) - lse[1]. Where
    # every class has a share in the loss, lse[2] is what the backward would otherwise have to read the whole row for:
    # the sum over the classes of their shares times the slopes of their terms, S in tritonkernels/losses.py.
    f"({_TENSORS}, {_OPTIONS}, bool zero_if_empty, bool fp32_loss) -> (Tensor loss, Tensor lse, Tensor denominator)",
    _cross_entropy_forward,
    "losses",
)
_define(
    "cross_entropy_forward_extra",
    # The same, and from the same pass: each row's loss before reduction and the index of the largest of its
    # input (the lowest among equals), where wanted, else empty tensors; and into grad_input, which may be input
    # itself, the gradient of the loss (of the sum of the losses for reduction none).
    f"({_TENSORS}, {_OPTIONS}, bool zero_if_empty, bool fp32_loss, bool want_losses, bool want_argmax, "
    "Tensor(a!)? grad_input) -> (Tensor loss, Tensor lse, Tensor denominator, Tensor losses, Tensor argmax)",
    _cross_entropy_forward_extra,
    "losses",
)
_define(
    "cross_entropy_backward",
    f"(Tensor grad_loss, {_TENSORS}, Tensor lse, Tensor denominator, {_OPTIONS}) -> Tensor grad_input",
    lambda grad_loss, input, *rest: torch.empty_like(input),
    "losses",
)
_define(
    "cross_entropy_with_gradient",
    # The loss and its gradient, for the reductions mean and sum.
    f"({_TENSORS}, {_OPTIONS}, bool zero_if_empty, bool fp32_loss) -> (Tensor loss, Tensor grad)",
    lambda input, *args: (_cross_entropy_forward(input, *args)[0], torch.empty_like(input)),
    "losses",
    backends=("cpu",),
)
_define(
    "cross_entropy_small",
    # The same without options, for input (N, C) and target (N), with few arguments: each costs time, which shows where
    # the batch is small.
    "(Tensor input, Tensor target, int ignore_index, int reduction, bool fp32_loss) -> (Tensor loss, Tensor grad)",
    lambda input, target, ignore_index, reduction, fp32_loss: (
        input.new_empty([], dtype=accumulator(input) if fp32_loss else input.dtype),
        torch.empty_like(input),
    ),
    "losses",
    backends=("cpu",),
)
_define(
    "scale_gradient_",
    # grad *= factor (0-d), without touching memory where factor is 1 and without the host looking at it.
    "(Tensor(a!) grad, Tensor factor) -> ()",
    lambda grad, factor: None,
    "losses",
)

# The linear layer and loss by chunks, where a graph must hold them as one step; whatever the backend, it is Python that
# calls the operators above (see linear_cross_entropy.py). Per row what `want` asks of the rows (log-sum-exp, loss,
# argmax; else empty), and of the reduced loss the gradients that `made` asks for (else empty): for the reduction none
# those come of the backward, which makes the logits again.
_LINEAR = (
    f"Tensor input, Tensor linear_weight, Tensor? linear_bias, {_TENSORS.removeprefix('Tensor input, ')}, {_OPTIONS}, "
    "bool zero_if_empty, SymInt chunk, str backend"
)
_LINEAR_GRADIENTS = "Tensor grad_input, Tensor grad_weight, Tensor grad_bias"


def _linear_gradients(tensors, made):
    return (
        torch.empty_like(tensor) if wanted else tensors[0].new_empty(0) for tensor, wanted in zip(tensors[:3], made)
    )


def _linear_cross_entropy(*args):
    *args, want, made = args
    input, reduction = args[0], args[11]
    loss = input.new_empty(len(input) if reduction == 0 else [], dtype=accumulator(input))
    lse, losses, argmax = (loss.new_empty(len(input) if want else 0) for _ in range(3))
    return loss, lse, losses, argmax.to(torch.int64), *_linear_gradients(args, made)


for _name, _schema, _fake in (
    (
        "linear_cross_entropy",
        f"({_LINEAR}, bool want, bool[] made) -> "
        f"(Tensor loss, Tensor lse, Tensor losses, Tensor argmax, {_LINEAR_GRADIENTS})",
        _linear_cross_entropy,
    ),
    (
        "linear_cross_entropy_backward",
        f"(Tensor grad_loss, {_LINEAR}, bool[] made) -> ({_LINEAR_GRADIENTS})",
        lambda grad_loss, *args: tuple(_linear_gradients(args, args[-1])),
    ),
):
    torch.library.define(f"fastreg::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastreg::{_name}", _fake)


# input is (N, C); target is (N, C), of its dtype or of the computation's, or holds one class index per row (N), where
# any value outside [0, C) makes the whole row negative. weight is (C,). With reduce the result is 0-d: the sum · scale,
# divided by the 0-d normalizer where there is one (a normalizer of 0 counts as 1).
def _sigmoid_focal_forward(input, target, weight, normalizer, alpha, gamma, reduce, scale, fp32_loss):
    return input.new_empty([] if reduce else input.shape, dtype=accumulator(input) if fp32_loss else input.dtype)


_define(
    "sigmoid_focal_forward",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? normalizer, float alpha, float gamma, bool reduce, "
    "float scale, bool fp32_loss) -> Tensor loss",
    _sigmoid_focal_forward,
    "losses",
)
_define(
    "sigmoid_focal_small",
    # The same, and the gradient of the loss; for reduce false, that of each term by its own logit.
    "(Tensor input, Tensor target, Tensor? weight, Tensor? normalizer, float alpha, float gamma, bool reduce, "
    "float scale, bool fp32_loss) -> (Tensor loss, Tensor grad_input)",
    lambda input, *rest: (_sigmoid_focal_forward(input, *rest), torch.empty_like(input)),
    "losses",
    backends=("cpu",),
)
_define(
    "sigmoid_focal_backward",
    "(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor? normalizer, float alpha, float gamma, "
    "bool reduce, float scale) -> Tensor grad_input",
    lambda grad_loss, input, *rest: torch.empty_like(input),
    "losses",
)

# ---- max-norm --------------------------------------------------------------------------------------------
# A plan's table with a row per tensor, see csrc/max_norm.h, and the caps in fp64. kind is an index of ROW_KINDS. The
# tensors behind the addresses are written: these operators are called outside of any graph. decay_tensor, fp64 and 0-d,
# stands for decay where there is one. Returns how many rows changed, 0-d int64.
ROW_KINDS = ("cap", "normalize", "l1_ball", "linf_ball")

_define(
    "max_norm_rows",
    "(Tensor table, Tensor chunks, int traits, Tensor caps, float p, float tau, float decay, Tensor? decay_tensor, "
    "int kind) -> Tensor",
    _BY_ADDRESS,
    "max_norm",
)


# Rows that lie one after the other, (rows, length), out of place. caps is fp64, one per row or one for all. norms is
# fp64: of max_norm_forward the norm of each row that was scaled, -1 for the others. slopes is what a cap's gradient
# has for each row.
def _rows_vector(input):
    return input.new_empty(input.shape[:1], dtype=torch.float64)


_define(
    "max_norm_forward",
    "(Tensor input, Tensor caps, float p, float tau) -> (Tensor output, Tensor norms)",
    lambda input, caps, p, tau: (torch.empty_like(input), _rows_vector(input)),
    "max_norm",
)
_define(
    "max_norm_backward",
    "(Tensor grad_output, Tensor input, Tensor caps, Tensor norms, float p, float tau) -> "
    "(Tensor grad_input, Tensor slopes)",
    lambda grad_output, input, *rest: (torch.empty_like(input), _rows_vector(input)),
    "max_norm",
)
_define("row_norms", "(Tensor input, float p) -> Tensor norms", lambda input, p: _rows_vector(input), "max_norm")
_define(
    "row_norms_backward",
    "(Tensor grad, Tensor input, Tensor norms, float p) -> Tensor grad_input",
    lambda grad, input, norms, p: torch.empty_like(input),
    "max_norm",
)

# ---- GroupNorm ---------------------------------------------------------------------------------------------
# activation is an index into ACTIVATIONS. stats holds mean and rstd, (2, N, G), in fp32 (fp64 for fp64), and is
# empty unless asked for. wanted is a sum of 1 (input), 2 (weight), 4 (bias), 8 (residual); a gradient that is not
# wanted is an empty tensor. Without an activation the gradient of the residual is grad_output: never wanted.

ACTIVATIONS = (None, "relu", "silu", "gelu", "gelu_tanh")


def _group_norm_forward(input, num_groups, weight, bias, eps, activation, residual, save_stats):
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    stats = input.new_empty((2, input.shape[0], num_groups) if save_stats else (0,), dtype=accumulate)
    return torch.empty_like(input), stats


def _group_norm_backward(grad_output, input, num_groups, weight, bias, activation, residual, stats, wanted):
    return tuple(
        torch.empty_like(like) if wanted & bit else input.new_empty((0,))
        for bit, like in ((1, input), (2, weight), (4, bias), (8, input))
    )


_define(
    "group_norm_forward",
    "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, int activation, Tensor? residual, "
    "bool save_stats) -> (Tensor output, Tensor stats)",
    _group_norm_forward,
    "group_norm",
)
_define(
    "group_norm_backward",
    "(Tensor grad_output, Tensor input, int num_groups, Tensor? weight, Tensor? bias, int activation, "
    "Tensor? residual, Tensor stats, int wanted) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
    _group_norm_backward,
    "group_norm",
)

# ---- penalties -------------------------------------------------------------------------------------------
# Plans with a row (elements, codes, addresses…) per tensor, see csrc/penalties.h. norms is fp64 (tensors, 2): scale
# and s, the norm being scale · s. `outs` are the addresses of the gradients, 0 for none; `add` adds to what is there.
# `wide`: whether one of the tensors is fp64. fgm_attack takes the norms of the gradients itself.
_define(
    "lp_norms",
    "(Tensor table, Tensor chunks, int chunk, float p, bool squared, bool wide) -> (Tensor penalty, Tensor norms)",
    _BY_ADDRESS,
    "penalties",
)
_define(
    "lp_penalty_backward",
    "(Tensor table, Tensor chunks, int chunk, Tensor outs, Tensor norms, Tensor grad, float p, bool squared, bool add)"
    " -> ()",
    _BY_ADDRESS,
    "penalties",
)
_define(
    "fgm_attack",
    "(Tensor table, Tensor chunks, int chunk, float epsilon, bool wide) -> ()",
    _BY_ADDRESS,
    "penalties",
)
_define("fgm_restore", "(Tensor table, Tensor chunks, int chunk) -> ()", _BY_ADDRESS, "penalties")


# ---- noise -----------------------------------------------------------------------------------------------
# drop_path: x is dense, its samples one after the other in memory; mask holds zeros and others, one per sample or one
# for all; residual lies as x does. soft_threshold: x and grad are contiguous runs of `run` elements (the last may be
# shorter), of which run r has the threshold tau[r // channels * sample_step + r % channels * channel_step]; tau is
# fp32, or fp64 for fp64 x, and so are sums, the gradient of tau run by run.
_define(
    "drop_path",
    "(Tensor x, Tensor mask, float p, Tensor? residual) -> Tensor",
    lambda x, *rest: torch.empty_like(x),
    "noise",
)
_RUNS = "Tensor tau, int run, int channels, int sample_step, int channel_step"
_define("soft_threshold", f"(Tensor x, {_RUNS}) -> Tensor", lambda x, *rest: torch.empty_like(x), "noise")
_define(
    "soft_threshold_backward",
    f"(Tensor grad, Tensor x, {_RUNS}) -> (Tensor grad_x, Tensor sums)",
    lambda grad, x, tau, run, *rest: (torch.empty_like(x), tau.new_empty((x.numel() + run - 1) // run)),
    "noise",
)

# ---- averaging -------------------------------------------------------------------------------------------
# `table`, `chunks` and `chunk` are a plan's; a row is (elements, codes, address of the parameter, addresses of its
# averages), see csrc/averaging.h. What the kernels write stands behind those addresses: these operators are called
# outside of any graph. `rules` is fp64 (averages, 4); n_averaged and calls are 0-d int64 counters, and ticket is a
# 0-d int32 that is 0 between launches. A raw row's elements are bytes. `kinds` has a bit per kind of row, for the
# kernels that are compiled for them: see averaging._kinds.
_PLAN = "Tensor table, Tensor chunks, int chunk"

_define(
    "average_update",
    f"({_PLAN}, int kinds, Tensor rules, Tensor(a!) n_averaged, Tensor(b!) calls, Tensor(c!) ticket, "
    "Tensor? found_inf, int update_every, int start_step, int? rounding_seed) -> ()",
    _BY_ADDRESS,
    "averaging",
)
_define("average_lerp", f"({_PLAN}, int kinds, float weight, Tensor? weight_tensor) -> ()", _BY_ADDRESS, "averaging")
_define("average_swap", f"({_PLAN}) -> ()", _BY_ADDRESS, "averaging")

# ---- what was built --------------------------------------------------------------------------------------
CAPABILITIES = ("baseline", "AVX2", "AVX-512")
torch.library.define("fastreg::cpu_capability", "() -> int")

DIGEST = hashlib.sha256("\n".join(_declared).encode()).hexdigest()[:16]
"""Of every declaration above. An extension bears that of the declarations it was built for: see _native.py."""
