"""The project's GPU kernels and the calls that stand for them: what the table (`python -m tests.proving`) shows.

To add an op: write a function that allocates its tensors and calls the launcher, of Triton or of CUDA on the host,
and list it in `CASES` with the arguments of a representative call, and those of a small one that goes through the same
kernels. It returns the tensor whose elements are the unit of "bytes per element".

The function must not compute on its tensors: the representative ones are large, and `torch.empty` costs nothing.
Integers that a kernel uses as indices are the exception. Triton kernels are compiled as the representative call
launches them, and metered in the small one; CUDA kernels are all compiled, whatever is listed here, and metered if a
small call launches them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`call(backend, *full)` is the representative call, `call(backend, *small)` the small one."""

    name: str
    call: Callable[..., Tensor]
    full: tuple
    small: tuple
    backends: tuple[str, ...] = ("triton", "cuda")


def _norms(backend: str, op: str) -> ModuleType:
    return import_module({"triton": f"tritonkernels.{op}", "cuda": f"tests.test_{op}_gpu"}[backend])


def _max_norm(backend: str, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    from fastreg.max_norm import _build

    w = torch.empty(rows, length, dtype=dtype)
    plan, caps = _build([w], 0, ((0, 0),)), torch.ones(1, dtype=torch.float64)
    behind = {"behind": [w]} if backend == "cuda" else {}
    _norms(backend, "max_norm").max_norm_rows(
        plan.table, plan.chunks, plan.chunk, caps, 2.0, 1.0, 0.0, None, 0, **behind
    )
    return w


def _max_norm_functional(backend: str, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    w, caps, kernels = (
        torch.empty(rows, length, dtype=dtype),
        torch.ones(1, dtype=torch.float64),
        _norms(backend, "max_norm"),
    )
    out, norms = kernels.max_norm_forward(w, caps, 2.0, 1.0)
    kernels.max_norm_backward(out, w, caps, norms, 2.0, 1.0)
    kernels.row_norms_backward(norms, w, kernels.row_norms(w, 2.0), 2.0)
    return w


def _lp_penalty(backend: str, elements: int, dtype: torch.dtype, p: float) -> Tensor:
    from fastreg.penalties import _addresses, _penalty_plan

    w, g, kernels = torch.empty(elements, dtype=dtype), torch.empty(elements, dtype=dtype), _norms(backend, "penalties")
    if backend == "cuda":
        kernels.behind[:] = [w, g]
    plan, one = _penalty_plan([w]), torch.ones((), dtype=torch.float64)
    _, norms = kernels.lp_norms(plan.table, plan.chunks, plan.chunk, p, False, dtype == torch.float64)
    outs = _addresses([g], w.device)
    kernels.lp_penalty_backward(plan.table, plan.chunks, plan.chunk, outs, norms, one, p, False, True)
    if backend == "cuda":
        kernels.behind.clear()
    return w


def _noise(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x, kernels = torch.empty(shape, dtype=dtype), _norms(backend, "noise")
    tau, run = torch.empty(shape[0] * shape[1]), x[0, 0].numel()
    kernels.drop_path(x, torch.ones(shape[0], dtype=dtype), 0.5, x)
    kernels.soft_threshold(x, tau, run, shape[1], shape[1], 1)
    kernels.soft_threshold_backward(x, x, tau, run, shape[1], shape[1], 1)
    return x


CASES: list[Case] = [
    Case("max_norm fp32 rows of 2,048", _max_norm, (8192, 2048, torch.float32), (5, 2048, torch.float32)),
    Case("max_norm bf16 rows of 768", _max_norm, (50257, 768, torch.bfloat16), (5, 768, torch.bfloat16)),
    Case("max_norm fp32 rows of 4,096", _max_norm, (512, 4096, torch.float32), (2, 4096, torch.float32)),
    Case("max_norm fp32 rows of 2^20", _max_norm, (4, 2**20, torch.float32), (1, 2**14, torch.float32)),
    Case(
        "max_norm, functional fp32 2,048", _max_norm_functional, (8192, 2048, torch.float32), (5, 2048, torch.float32)
    ),
    Case("max_norm, functional bf16 768", _max_norm_functional, (50257, 768, torch.bfloat16), (5, 768, torch.bfloat16)),
    Case("lp_penalty l2 fp32", _lp_penalty, (1 << 24, torch.float32, 2.0), (8192, torch.float32, 2.0)),
    Case("lp_penalty l1 bf16", _lp_penalty, (1 << 24, torch.bfloat16, 1.0), (8192, torch.bfloat16, 1.0)),
    Case("noise fp32", _noise, ((64, 64, 56, 56), torch.float32), ((2, 2, 56, 56), torch.float32)),
    Case("noise bf16 of 7x7", _noise, ((64, 512, 7, 7), torch.bfloat16), ((2, 8, 7, 7), torch.bfloat16)),
]


def run(name: str) -> None:
    """Makes the representative call of Triton's launcher; cubin.launch_facts calls this by name."""
    (case,) = (case for case in CASES if case.name == name)
    case.call("triton", *case.full)


# ---- losses ----------------------------------------------------------------------------------------------


def _losses(backend: str) -> ModuleType:
    return import_module({"triton": "tritonkernels.losses", "cuda": "tests.losses_cudahost"}[backend])


def _cross_entropy_forward(backend: str, rows: int, classes: int, dtype: torch.dtype, smoothing: float = 0.0) -> Tensor:
    x, target = torch.empty(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    numbers = (-100, 1, smoothing, 0.0, 1.0, 1.0, 0.0)
    _losses(backend).cross_entropy_forward(x, target, *[None] * 6, *numbers, False, False)
    return x


def _cross_entropy_backward(
    backend: str, rows: int, classes: int, dtype: torch.dtype, smoothing: float = 0.0
) -> Tensor:
    x, target = torch.empty(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    grad_loss, lse, one = (
        torch.empty((), dtype=dtype),
        torch.empty(2, rows, dtype=accumulate),
        torch.ones((), dtype=accumulate),
    )
    numbers = (-100, 1, smoothing, 0.0, 1.0, 1.0, 0.0)
    _losses(backend).cross_entropy_backward(grad_loss, x, target, *[None] * 6, lse, one, *numbers)
    return x


CASES += [
    Case(
        f"cross_entropy {name} {rows}×{classes} {str(dtype).removeprefix('torch.')}{' smoothed' if smoothing else ''}",
        call,
        full=(rows, classes, dtype, smoothing),
        small=(few, classes, dtype, smoothing),
    )
    for name, call in (("forward", _cross_entropy_forward), ("backward", _cross_entropy_backward))
    for rows, classes, dtype, smoothing, few in (
        (65536, 10, torch.float32, 0.0, 4096),
        (8192, 1000, torch.bfloat16, 0.0, 64),
        (8192, 1000, torch.bfloat16, 0.1, 64),
        (8192, 1001, torch.bfloat16, 0.0, 64),
        (8192, 1000, torch.float64, 0.0, 64),
        (1024, 8142, torch.float32, 0.0, 16),
        (4096, 32000, torch.bfloat16, 0.0, 16),
        (4096, 50257, torch.bfloat16, 0.0, 16),
    )
]


def _sigmoid_focal(
    backend: str, rows: int, classes: int, dtype: torch.dtype, dense: bool = False, backward: bool = False
) -> Tensor:
    x, kernels = torch.empty(rows, classes, dtype=dtype), _losses(backend)
    target = torch.empty_like(x) if dense else torch.zeros(rows, dtype=torch.int64)
    if backward:
        kernels.sigmoid_focal_backward(torch.empty((), dtype=dtype), x, target, None, None, 0.25, 2.0, True, 1.0)
    else:
        kernels.sigmoid_focal_forward(x, target, None, None, 0.25, 2.0, True, 1.0, False)
    return x


CASES += [
    Case(
        f"sigmoid_focal {'backward' if backward else 'forward'} {rows}×{classes} {str(dtype).removeprefix('torch.')}"
        f" {'dense' if dense else 'indices'}",
        _sigmoid_focal,
        full=(rows, classes, dtype, dense, backward),
        small=(64, classes, dtype, dense, backward),
    )
    for backward in (False, True)
    for rows, classes, dtype in ((4096, 80, torch.float32), (65536, 91, torch.bfloat16))
    for dense in (False, True)
]


def _gradient_in_forward(backend: str, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    x, target = torch.empty(rows, classes, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    numbers = (-100, 1, 0.0, 2.0, 1.0, 1.0, 0.0, False, False)
    _losses(backend).cross_entropy_forward_extra(x, target, *[None] * 6, *numbers, True, True, torch.empty_like(x))
    return x


CASES += [
    Case(
        f"focal_loss, gradient in the forward {rows}×{classes} {str(dtype).removeprefix('torch.')}",
        _gradient_in_forward,
        full=(rows, classes, dtype),
        small=(few, classes, dtype),
    )
    for rows, classes, dtype, few in (
        (8192, 1000, torch.bfloat16, 64),
        (1024, 8142, torch.float32, 16),
        (4096, 32000, torch.bfloat16, 16),
    )
]


# ---- GroupNorm -------------------------------------------------------------------------------------------


def _group_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> Tensor:
    kernels = import_module({"triton": "tritonkernels.group_norm", "cuda": "tests.group_norm_cudahost"}[backend])
    x = torch.empty(shape, dtype=dtype).to(memory_format=format).flatten(2)
    weight, bias = torch.empty(2, shape[1], dtype=dtype)
    _, stats = kernels.group_norm_forward(x, 32, weight, bias, 1e-5, 2, None, True)
    kernels.group_norm_backward(x, x, 32, weight, bias, 2, None, stats, 7)
    return x


CASES += [
    Case(
        f"group_norm + SiLU {'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {name}",
        _group_norm,
        full=(shape, dtype, format),
        small=((1, *shape[1:]), dtype, format),
    )
    for shape in ((8, 64, 16, 16), (8, 320, 32, 32), (2, 512, 64, 64))
    for dtype in (torch.bfloat16, torch.float32)
    for name, format in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last))
]


# ---- averaging -------------------------------------------------------------------------------------------


def _averaging(backend: str, elements: int, dtype: torch.dtype, averaged: torch.dtype, k: int, seed: int | None):
    from fastreg import EMA
    from fastreg.averaging import _split

    param, averages = torch.empty(elements, dtype=dtype), [torch.empty(elements, dtype=averaged) for _ in range(k)]
    (part,) = _split([param], [[average] for average in averages], [False], param.device)
    rules = torch.tensor([EMA(0.999)._row()] * k, dtype=torch.float64)
    counters = torch.tensor(3), torch.tensor(3), torch.zeros((), dtype=torch.int32)
    table, chunks, chunk = part.plan.table, part.plan.chunks, part.plan.chunk
    if backend == "triton":
        from tritonkernels.averaging import average_update

        average_update(table, chunks, chunk, part.kinds, rules, *counters, None, 1, 0, seed)
    else:
        from tests.proving import cudahost

        launch = cudahost.load(
            "csrc/cuda/averaging.cu", [f"fastreg::cuda::average_{n}" for n in ("update", "lerp", "swap")]
        ).average_update
        clock = (*counters, None, 1, 0, seed is not None, seed or 0)
        launch(table, chunks, len(chunks), chunk, k, rules, *clock, param, *averages)
    return param


CASES += [
    Case(
        f"averaging {k} × {str(dtype).removeprefix('torch.')} in {str(averaged).removeprefix('torch.')}"
        f"{' stochastic' if seed else ''}",
        _averaging,
        full=(1 << 20, dtype, averaged, k, seed),
        small=(8192, dtype, averaged, k, seed),
    )
    for dtype, averaged, k, seed in (
        (torch.float32, torch.float32, 1, None),
        (torch.bfloat16, torch.float32, 1, None),
        (torch.bfloat16, torch.float32, 4, None),
        (torch.bfloat16, torch.bfloat16, 1, 7),
    )
]
