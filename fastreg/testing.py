"""What every op's tests and benchmarks share: the accuracy rule and the input families.

The rule: against an fp64 oracle written from the formula, an error may be at most twice that of stock PyTorch
in the same dtype on the same input, plus one unit in the last place of the result.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ODD_SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1000, 1023, 1025)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "offset", "expanded")


def assert_accurate(actual: Tensor, stock: Tensor, oracle: Tensor, name: str = "result", noise: float = 0.0) -> None:
    """Holds `actual` to the rule. NaN and infinities must stand exactly where the oracle, rounded to the dtype
    of `actual`, has them. `noise` is an absolute error to allow besides, derived by the caller: on small tensors
    stock PyTorch can be right to the last digit by luck."""
    assert actual.dtype == stock.dtype, f"{name}: dtype {actual.dtype}, expected {stock.dtype}"
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if not oracle.numel():
        return
    rounded = oracle.to(actual.dtype).double()
    special = ~rounded.isfinite()
    ours = actual.detach().double()
    torch.testing.assert_close(ours[special], rounded[special], equal_nan=True, msg=lambda m: f"{name}: {m}")
    ours, theirs, exact = (t.detach().double()[~special] for t in (ours, stock, oracle))
    stock_error = (theirs - exact).abs()
    stock_error = stock_error[stock_error.isfinite()]
    allowed = 2 * (stock_error.max() if stock_error.numel() else 0.0) + noise
    info = torch.finfo(actual.dtype)
    excess = (ours - exact).abs() - (allowed + info.eps * exact.abs() + info.smallest_normal * info.eps)
    if not (excess <= 0).all():
        worst = excess.nan_to_num(float("inf")).argmax()
        raise AssertionError(
            f"{name}: {ours[worst].item():.9g}, exact {exact[worst].item():.9g}, stock {theirs[worst].item():.9g}; "
            f"largest stock error {float(allowed) / 2:.3g}, {int((~(excess <= 0)).sum())} of {exact.numel()} outside"
        )


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` in another memory layout; `expanded` repeats its first slice along dimension 0."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # rows with a gap between them
        wide = torch.cat([tensor, tensor], -1)
        return wide[..., : tensor.shape[-1]]
    if layout == "strided":  # no dimension has stride 1
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "offset":  # contiguous, but not aligned to a vector
        flat = torch.cat([tensor.reshape(-1)[:0], tensor.new_zeros(1), tensor.reshape(-1)])
        return flat[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def layouts_of(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for layout in LAYOUTS:
        yield layout, with_layout(tensor, layout)
