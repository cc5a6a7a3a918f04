"""Max-norm: the guarantees of the projection in every dtype, its edge cases, and the classes over it."""

import math
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastreg
from fastreg import _backends
from fastreg.testing import DTYPES, ODD_SIZES
from tests import test_max_norm_gpu
from tests.machine import HAS_CUDA, cudahost_missing, device_of

BACKENDS = [b for b in ("reference", "cpu") if _backends.missing("max_norm_", b) is None]
if _backends.interpreting() and _backends.missing("max_norm_", "triton") is None:
    BACKENDS.append("triton")
ON_HOST = "cuda on the host"  # the CUDA kernels, compiled for the CPU, in place of the C++ ones
if "cpu" in BACKENDS and cudahost_missing() is None:
    BACKENDS.append(ON_HOST)
if HAS_CUDA:
    BACKENDS += [b for b in ("cuda", "triton") if _backends.missing("max_norm_", b) is None]
# The backend is forced for a whole test, all examples of a property included.
SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


# Parameters that a run of the interpreter, a thousand times slower, may leave out.
LEFT_OUT = {"length": set(ODD_SIZES) - {1, 7, 129, 1000}, "layout": {"offset", "sliced"}, "dim": {1, 2, -1}}


# Tests, by the beginnings of their names, of ops that return what they make; not every backend has kernels for them.
FUNCTIONAL = {"test_functional": "max_norm", "test_row_norms": "row_norms"}


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    device = device_of(request.param)
    if request.param == "triton" and device == "cpu" and hasattr(request.node, "callspec"):
        for name, value in request.node.callspec.params.items():
            if name in LEFT_OUT and value in LEFT_OUT[name]:
                pytest.skip("left out in the interpreter")
    op = next((op for start, op in FUNCTIONAL.items() if request.node.name.startswith(start)), "max_norm_")
    if request.param != ON_HOST and (why := _backends.missing(op, request.param)) is not None:
        pytest.skip(why)
    if request.param == ON_HOST:
        test_max_norm_gpu.put_on_host(monkeypatch)
    # On a GPU, all that a test makes stands there.
    stands = torch.device(device) if device == "cuda" else nullcontext()
    with stands, fastreg.use_backend("cpu" if request.param == ON_HOST else request.param):
        yield request.param


def rows_of(tensor, dim=0):
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return rows.contiguous()  # so that the same sums are taken in the same order, whatever the layout


def norms64(tensor, p=2.0, dim=0):
    """The row norms in fp64 of the stored values, straight from the formula, scaled by a power of two."""
    rows = rows_of(tensor, dim).double()
    scale = torch.exp2(torch.frexp(rows.abs().amax(1)).exponent.clamp(-1000, 1000).double())
    return scale * torch.linalg.vector_norm(rows / scale[:, None], p, dim=1)


def bits(tensor):
    return tensor.detach().contiguous().view(INT[tensor.element_size()])


def assert_projected(before, after, cap, p=2.0, dim=0, count=None):
    """All guarantees of max_norm_ with tau = 1."""
    old, new = rows_of(before, dim), rows_of(after, dim)
    cap = torch.as_tensor(cap, dtype=torch.float64).expand(old.shape[0])
    finite = old.isfinite().all(1)
    norms = norms64(before, p, dim)
    over = finite & (norms > cap)
    # Rows within the last bits of fp64 above the cap: whether they are over depends on the order of the sum.
    undecided = over & (norms <= cap * (1 + (8 + old.shape[1]) * 2**-53 * max(1, 2 / p)))
    decided = finite & ~undecided
    assert (norms64(after, p, dim)[decided] <= cap[decided]).all()
    assert torch.equal(bits(new[~over]), bits(old[~over])), "a row that was not over the cap has changed"
    if count is not None:
        assert count.dtype == torch.int64 and count.dim() == 0
        assert int((over & ~undecided).sum()) <= count.item() <= int(over.sum())
    again = after.clone()
    assert fastreg.max_norm_(again, cap.clone(), p=p, dim=dim).item() == 0
    assert torch.equal(bits(again), bits(after))
    return over


# ---- the guarantees --------------------------------------------------------------------------------------

EXPONENTS = {torch.float16: 3, torch.bfloat16: 36, torch.float32: 36, torch.float64: 290}


@settings(max_examples=60, **SETTINGS)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    length=st.sampled_from([*range(1, 10), 17, 33, 64, 130, 1000]),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 7.3, math.inf]),
    spread=st.floats(-1, 1),
    kind=st.sampled_from(["normal", "constant", "integers", "sparse"]),
    at=st.sampled_from(["between", "a norm", "tiny"]),
)
def test_guarantees_hold_for_any_rows(seed, rows, length, dtype, p, spread, kind, at):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    if kind == "constant":
        w = w[:, :1].expand(rows, length) * (1 + 1e-4)
    elif kind == "integers":
        w = (w * 4).round()
    elif kind == "sparse":
        w = w * (torch.rand(rows, length, generator=generator) < 0.2)
    w = (w * 10.0 ** (spread * EXPONENTS[dtype])).to(dtype)
    norms = norms64(w, p)
    cap = {"between": norms.mean() * 0.9, "a norm": norms[seed % rows], "tiny": norms.max() * 1e-6}[at].item()
    if not math.isfinite(cap) or not w.isfinite().all():
        return
    after = w.clone()
    count = fastreg.max_norm_(after, cap, p=p)
    assert_projected(w, after, cap, p, count=count)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", ODD_SIZES)
def test_scaled_rows_are_close_to_the_exact_ones(dtype, length, p):
    w = torch.randn(23, length, dtype=torch.float64).to(dtype)
    cap = norms64(w, p).median().item() * 0.9
    exact = w.double() * (cap / norms64(w, p)).clamp(max=1).unsqueeze(1)
    after = w.clone()
    over = assert_projected(w, after, cap, p, count=fastreg.max_norm_(after, cap, p=p))
    assert over.any()
    # One rounding to the nearest, or one towards zero after it, or a factor lowered by a few roundings' excess; in
    # fp64 the margin for sums in another order.
    info = torch.finfo(dtype)
    error = (after.double() - exact).abs() - info.smallest_normal
    assert (error <= (3 if dtype != torch.float64 else 16 + 2 * length) * info.eps * exact.abs()).all()


@pytest.mark.parametrize("length", [16, 300])
def test_rows_whose_elements_all_round_alike_end_below_their_caps(length):
    """Nothing averages out in their sums and products."""
    for values in (torch.rand(250, 1), torch.rand(250, 2)):
        w = (0.5 + 3 * values).repeat(1, length // values.shape[1])
        caps = torch.rand(250) * norms64(w).float()
        after = w.clone()
        assert_projected(w, after, caps, count=fastreg.max_norm_(after, caps))


# Rows that the kernels for a GPU cut into pieces.
LONG = [(torch.float32, p) for p in (1.0, 2.0, 3.0, math.inf)]
LONG += [(torch.bfloat16, 1.0), (torch.bfloat16, 2.0), (torch.float16, 2.0), (torch.float64, 2.0), (torch.float64, 3.0)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype, p", LONG)
def test_long_rows(dtype, p):
    w = torch.randn(6, 40_001, dtype=torch.float64).to(dtype)
    w[1] *= 0.01
    w[2, 3], w[3, 39_000] = math.nan, math.inf
    w[4] = 1.01  # every element rounds the same way
    w[5] = w[5, 0]
    after = w.clone()
    cap = 0.4 * norms64(w[:1], p).item()
    assert_projected(w, after, cap, p, count=fastreg.max_norm_(after, cap, p=p))
    if p == 2:  # nothing is lost where squares of fp64 would overflow
        if dtype != torch.float16:
            w *= 1e300 if dtype == torch.float64 else 1e30
            after = w.clone()
            assert_projected(w, after, 1.0, count=fastreg.max_norm_(after, 1.0))
        halved, twice = w.clone(), w.clone()
        fastreg.max_norm_(twice.mul_(1 - 0.25), 100.0)
        fastreg.max_norm_(halved, 100.0, decay=0.25)
        finite = twice.isfinite().all(1)
        assert torch.equal(halved[finite], twice[finite])


def test_long_rows_have_the_same_bits_whatever_the_threads(backend):
    if backend != "cpu":
        pytest.skip("only the C++ kernels share work among torch's threads")
    rows, before, results = torch.randn(3, 200_001), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            w, ball = rows.clone(), rows.clone()
            assert fastreg.max_norm_(w, 100.0, p=3.0) == 0 < fastreg.max_norm_(w, 5.0, p=3.0)
            assert fastreg.project_lp_ball_(ball, 1000.0, 1) == 3
            results.append((w, ball))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_long_rows_of_any_strides():
    w = torch.randn(3, 7, 40_001).transpose(0, 1)  # rows of 3 · 40,001 elements, in three runs
    before = w.clone()
    count = fastreg.max_norm_(w, 100.0)
    assert assert_projected(before, w, 100.0, count=count).all()


def test_long_rows_normalized_and_clamped():
    w = torch.randn(2, 40_001)
    clamped = w.clone()
    assert fastreg.project_lp_ball_(clamped, 1.5, math.inf).item() == 2
    assert torch.equal(clamped, w.clamp(-1.5, 1.5))
    fastreg.tau_normalize_(w)
    torch.testing.assert_close(norms64(w), torch.ones(2, dtype=torch.float64), rtol=2**-22, atol=0)


# ---- the edge cases --------------------------------------------------------------------------------------


def test_one_row():
    w = torch.full((1, 8), 2.0)
    assert fastreg.max_norm_(w, 1.0).item() == 1
    assert fastreg.max_norm_(w, 1.0).item() == 0
    torch.testing.assert_close(w.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("scale, expected", [(10.0, 6), (0.01, 0), (None, 1)], ids=["all", "none", "one"])
def test_rows_over(scale, expected):
    w = nn.functional.normalize(torch.randn(6, 40), dim=1)
    if scale is None:
        w[3] *= 4
        w[[0, 1, 2, 4, 5]] *= 0.5
    else:
        w *= scale
    before = w.clone()
    assert fastreg.max_norm_(w, 1.0).item() == expected
    assert_projected(before, w, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_exactly_at_the_cap_stays(dtype):
    w = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=dtype)
    assert fastreg.max_norm_(w, 5.0).item() == 1
    assert w[0].tolist() == [3.0, 4.0]
    torch.testing.assert_close(w[1], torch.tensor([3.0, 4.0], dtype=dtype), rtol=2**-52 * 16, atol=0)


def test_row_at_a_cap_found_by_another_summation_stays():
    w = torch.randn(64, 5000)
    for cap in (torch.linalg.vector_norm(w.double(), dim=1), (w.double() ** 2).sum(1).sqrt()):
        before = w.clone()
        assert fastreg.max_norm_(w, cap).item() == 0
        assert torch.equal(w, before)


def test_zero_rows_and_negative_zeros_stay():
    w = torch.tensor([[0.0, -0.0], [-0.0, -0.0], [1.0, -0.0]])
    before = w.clone()
    assert fastreg.max_norm_(w, 0.5).item() == 1
    assert torch.equal(bits(w[:2]), bits(before[:2]))
    assert w[2].tolist() == [0.5, 0.0] and math.copysign(1, w[2, 1]) == -1


def test_cap_zero_clears_every_row_once():
    w = torch.randn(4, 5)
    w[2] = 0
    assert fastreg.max_norm_(w, 0.0).item() == 3
    assert not w.any()
    assert fastreg.max_norm_(w, 0.0).item() == 0


def test_cap_inf_never_binds():
    w = torch.randn(4, 5) * 1e37
    before = w.clone()
    assert fastreg.max_norm_(w, math.inf).item() == 0
    assert torch.equal(w, before)


@pytest.mark.parametrize("cap", [-1.0, math.nan, -math.inf])
def test_cap_negative_or_nan_is_refused(cap):
    w = torch.ones(2, 2)
    for bad in (cap, torch.tensor(cap), torch.tensor([1.0, cap])):
        with pytest.raises(ValueError, match="max_norm"):
            fastreg.max_norm_(w, bad)
    assert w.eq(1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.7, 1.0, 2.0, math.inf])
def test_nan_and_inf_rows_stay_and_harm_no_other(dtype, bad, p):
    w = torch.randn(5, 37).to(dtype) * 10
    w[2, 20] = bad
    before = w.clone()
    assert fastreg.max_norm_(w, 1.0, p=p).item() == 4
    assert torch.equal(bits(w[2]), bits(before[2]))
    assert_projected(before, w, 1.0, p)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype, size", [(d, s) for d in (torch.float32, torch.bfloat16) for s in (1e30, 1e-30)]
                         + [(torch.float64, 1e300), (torch.float64, 1e-300)])  # fmt: skip
def test_huge_and_tiny_rows_neither_overflow_nor_vanish(dtype, size, p):
    w = (torch.randn(6, 50, dtype=torch.float64) * size).to(dtype)
    before = w.clone()
    cap = norms64(w, p).min().item() / 3
    assert fastreg.max_norm_(w, cap, p=p).item() == 6
    assert_projected(before, w, cap, p)
    torch.testing.assert_close(norms64(w, p) / cap, torch.ones(6).double(), rtol=200 * torch.finfo(dtype).eps, atol=0)


def test_huge_rows_to_a_small_cap():
    w = torch.randn(6, 50) * 1e30
    before = w.clone()
    assert fastreg.max_norm_(w, 1e-3).item() == 6
    assert_projected(before, w, 1e-3)
    torch.testing.assert_close(norms64(w), torch.full((6,), 1e-3).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.01, 0.5, 1, 1.5, 2, 3, 100.0, 5000.0, math.inf])
def test_orders(p):
    w = torch.randn(8, 30, dtype=torch.float64)
    norms = torch.linalg.vector_norm(w, p, dim=1) if p != 5000.0 else w.abs().amax(1)
    cap = norms.median().item()
    before = w.clone()
    fastreg.max_norm_(w, cap, p=p)
    exact = before * (cap / norms).clamp(max=1).unsqueeze(1)
    torch.testing.assert_close(w, exact, rtol=1e-11 if p != 5000.0 else 1e-3, atol=0)


@pytest.mark.parametrize("p", [0, -1.0, math.nan, "2", None])
def test_orders_refused(p):
    with pytest.raises(ValueError, match="p must be a number above 0"):
        fastreg.max_norm_(torch.ones(2, 2), 1.0, p=p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 100])
def test_half_rows_never_end_above_the_cap(dtype, length, backend):
    w = torch.randn(64 if backend == "triton" else 4000, length).to(dtype) * 3
    before = w.clone()
    fastreg.max_norm_(w, 1.0)
    assert_projected(before, w, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_long_rows_at_the_cap_of_any_size(dtype, size, backend):
    """Where a norm that is only estimated would decide wrongly."""
    if dtype == torch.float16 and size != 1:
        pytest.skip("fp16 has no such numbers")
    w = (torch.randn(24, 300) * size).to(dtype)
    w[1], w[2, :299] = size, 0  # all alike, and a single one
    norms = w.double().norm(dim=1)
    nearness = torch.tensor([0, 1e-12, -1e-12, 1e-8, -1e-8, 1e-7, -1e-7, 1e-6, -1e-6, 1e-3, -1e-3, -0.5])
    cap = norms * (1 + nearness.repeat(2))
    w[20, 5], w[21, 7] = math.nan, math.inf
    before = w.clone()
    count = fastreg.max_norm_(w, cap)
    over = (norms > cap * (1 + 5e-13)) & w.isfinite().all(1)
    assert count.item() == over.sum() and torch.equal(w[~over].view(torch.uint8), before[~over].view(torch.uint8))
    finite = before.isfinite().all(1)
    assert_projected(before[finite], w[finite], cap[finite])
    again = w.clone()
    assert fastreg.max_norm_(again, cap).item() == 0


def test_rows_and_elements_more_than_2_to_the_31_apart():
    """Memory that is never touched costs none: of these 4 GB a few pages are used."""
    w = torch.empty(2**31 + 1000, dtype=torch.float16).as_strided((2, 100), (2**31 + 7, 1))
    w.copy_(torch.randn(2, 100))
    before = w.clone()
    count = fastreg.max_norm_(w, 5.0)
    assert_projected(before, w.clone(), 5.0)
    assert count.item() == 2
    across = w.t()  # the same rows along the other dimension, elements of one row far apart
    across.copy_(before.t())
    norms = norms64(across)  # 100 rows of 2 elements, which lie 2^31 apart
    assert fastreg.max_norm_(across, 1.0).item() == int((norms > 1).sum())
    assert_projected(before.t(), across.clone(), 1.0)


def test_idempotent_in_every_dtype_and_order():
    for dtype in DTYPES:
        for p in (0.5, 1.0, 2.0, 3.0, math.inf):
            w = torch.randn(20, 300, dtype=torch.float64).to(dtype)
            assert fastreg.max_norm_(w, 1.0, p=p).item() == 20
            once = w.clone()
            assert fastreg.max_norm_(w, 1.0, p=p).item() == 0 and torch.equal(bits(w), bits(once))


def test_one_dimension_caps_each_element():
    bias = torch.tensor([-3.0, 0.5, 2.0, math.nan])
    assert fastreg.max_norm_(bias, 1.0).item() == 2
    assert bias[:3].tolist() == [-1.0, 0.5, 1.0] and bias[3].isnan()
    scalar = torch.tensor(-3.0)
    assert fastreg.max_norm_(scalar, 2.0).item() == 1
    assert scalar.item() == -2.0


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "sliced": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "strided": lambda w: torch.stack([w, w], -1)[..., 0],
    "offset": lambda w: torch.cat([w.new_zeros(1), w.reshape(-1)])[1:].view(w.shape),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_dims(layout, dim, dtype):
    w = torch.randn(6, 5, 3, 4).to(dtype)
    before = w.clone()
    w = LAYOUTS[layout](w.clone())
    strides, whole = w.stride(), w._base.clone() if w._base is not None else None
    cap = norms64(before, 2, dim).median().item()
    count = fastreg.max_norm_(w, cap, dim=dim)
    assert w.stride() == strides
    assert_projected(before, w, cap, dim=dim, count=count)
    if layout == "strided":  # what lies between the elements
        assert torch.equal(w._base[..., 1], whole[..., 1])
    if layout == "sliced":
        assert torch.equal(w._base[:, 5:], whole[:, 5:])


def test_expanded_and_sparse_are_refused():
    with pytest.raises(ValueError, match="expanded"):
        fastreg.max_norm_(torch.ones(3, 1).expand(3, 4), 1.0)
    with pytest.raises(ValueError, match=r"tensors\[0\] must be a dense tensor, got one of layout torch.sparse_coo"):
        fastreg.max_norm_(torch.eye(3).to_sparse(), 1.0)


def test_threshold_where_all_norms_are_equal():
    w = torch.eye(4)
    assert fastreg.max_norm_threshold(w, 0.3).item() == 1.0
    constraint = fastreg.MaxNorm(w, thresh=0.3)
    assert constraint.project().item() == 0 and torch.equal(w, torch.eye(4))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.9, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tau(tau, dtype):
    w = torch.randn(9, 20).to(dtype)
    before, norms = w.clone(), norms64(w)
    cap = (norms**tau).median().item() * 0.95
    count = fastreg.max_norm_(w, cap, tau=tau)
    over = norms**tau > cap
    assert count.item() == int(over.sum()) > 0
    exact = torch.where(over[:, None], before.double() * (cap / norms**tau)[:, None], before.double())
    torch.testing.assert_close(w.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(w[~over], before[~over])


def test_tau_out_of_range():
    for tau in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau"):
            fastreg.max_norm_(torch.ones(2, 2), 1.0, tau=tau)


def test_caps_per_row_per_tensor_and_as_tensors():
    a, b, c = torch.randn(4, 6), torch.randn(3, 6).bfloat16(), torch.randn(5, 2).double()
    before = [t.clone() for t in (a, b, c)]
    caps = [torch.tensor([0.1, 10.0, 1.0, 0.0]), torch.tensor(0.5), 0.25]
    count = fastreg.max_norm_([a, b, c], caps)
    over = [assert_projected(old, new, cap).sum() for old, new, cap in zip(before, (a, b, c), caps)]
    assert count.item() == int(sum(over))


def test_list_cap_shapes_are_checked():
    w = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"one cap per row, \(3,\), got shape \(4,\)"):
        fastreg.max_norm_(w, torch.ones(4))
    with pytest.raises(ValueError, match="one entry per tensor, 1, got 2"):
        fastreg.max_norm_(w, [1.0, 2.0])
    with pytest.raises(TypeError, match="max_norm must be a number or a tensor, got str"):
        fastreg.max_norm_(w, "1")
    with pytest.raises(TypeError, match="max_norm must have a dtype among"):
        fastreg.max_norm_(w, torch.ones(3, dtype=torch.int64))


def test_empty_list_and_empty_tensors():
    assert fastreg.max_norm_([], 1.0).item() == 0
    for shape in ((0,), (0, 4), (4, 0), (4, 0, 3)):
        assert fastreg.max_norm_(torch.empty(shape), 1.0).item() == 0
    w = torch.ones(2, 4)
    assert fastreg.max_norm_([torch.empty(0, 4), w, torch.empty(3, 0)], 1.0).item() == 2


def test_mixed_dtypes_in_one_list():
    tensors = [torch.randn(n, 30).to(dtype) for n, dtype in enumerate(DTYPES, 2)]
    before = [t.clone() for t in tensors]
    count = fastreg.max_norm_(tensors, 1.0)
    assert count.item() == sum(int(assert_projected(o, n, 1.0).sum()) for o, n in zip(before, tensors))


def test_mixed_devices_are_refused():
    w = torch.ones(2, 2)
    with pytest.raises(ValueError, match="one device"):
        fastreg.max_norm_([w, torch.ones(2, 2, device="meta")], 0.1)
    assert w.eq(1).all()


def test_tied_weights_count_once():
    w = nn.Parameter(torch.ones(3, 4))
    assert fastreg.max_norm_([w, w], 1.0).item() == 3


@pytest.mark.parametrize("other", [lambda w: w.view(2, 4), lambda w: nn.Parameter(w), lambda w: w[:]])
def test_the_same_memory_under_another_object_counts_once(other):
    w = torch.ones(2, 4)
    assert fastreg.max_norm_([w, other(w)], [100.0, 0.0], decay=0.5).item() == 0
    assert torch.equal(w, torch.full((2, 4), 0.5))


def test_leaf_parameter_is_written_without_a_graph_and_its_version_moves():
    w = nn.Parameter(torch.ones(3, 4))
    version = w._version
    fastreg.max_norm_(w, 1.0)
    assert w.requires_grad and w.grad_fn is None and w._version > version
    x = torch.ones(2, 4, requires_grad=True)
    out = nn.functional.linear(x, w)
    fastreg.max_norm_(w, 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bad_arguments_write_nothing():
    good, w = torch.ones(2, 2), torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"tensors\[1\] must have a dtype among"):
        fastreg.max_norm_([good, torch.ones(2, 2, dtype=torch.int32)], 0.1)
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a tensor, got str"):
        fastreg.max_norm_([good, "w"], 0.1)
    with pytest.raises(TypeError, match="tensors must be a tensor or an iterable"):
        fastreg.max_norm_(3, 0.1)
    with pytest.raises(IndexError, match="dim must be between -2 and 1"):
        fastreg.max_norm_([good, w], 0.1, dim=2)
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        fastreg.max_norm_(good, 0.1, decay=1.5)
    assert good.eq(1).all() and w.eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_in_the_same_pass_is_the_two_steps(dtype):
    w = torch.randn(20, 33).to(dtype)
    two = w * (1 - 0.01)
    expected = fastreg.max_norm_(two, 5.0)
    assert fastreg.max_norm_(w, 5.0, decay=0.01).item() == expected.item()
    assert torch.equal(w, two)


def test_compiles_without_a_graph_break(backend):
    if backend != "reference":
        pytest.skip("under torch.compile the reference serves, which the compiler fuses")
    w = torch.randn(8, 16)
    eager = w.clone()
    fastreg.max_norm_(eager, 1.0)
    torch.compile(lambda w: fastreg.max_norm_(w, 1.0), fullgraph=True, backend="aot_eager")(w)
    assert torch.equal(w, eager)


# ---- the Triton kernel's byte budget ---------------------------------------------------------------------


def needs_triton(backend):
    if backend != "triton":
        pytest.skip("counts what the Triton kernel moves")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_reads_once_and_writes_the_rows_over_the_cap_alone(dtype, backend):
    needs_triton(backend)
    from tests.proving.sanitizer import sanitize
    from tests.proving.traffic import traffic

    shapes = [(33, 50), (5, 300), (7, 3, 3, 3), (3, 2049), (9,), (2, 2000)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    caps = [norms64(w).median().item() for w in tensors]
    before = [w.clone() for w in tensors]
    with traffic() as log:
        fastreg.max_norm_(tensors, caps)
    assert len(log) == 1
    for old, new, cap in zip(before, tensors, caps):
        over = norms64(old) > cap
        assert over.any()
        assert log.reads(new).eq(1).all()
        assert torch.equal(rows_of(log.writes(new)), over[:, None].expand_as(rows_of(old)).long())
    with sanitize(also=tensors):
        fastreg.max_norm_(tensors, [cap / 2 for cap in caps])


# ---- beside what people use ------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
def test_against_torch_renorm(p):
    w = torch.randn(50, 64, dtype=torch.float64)
    cap = norms64(w, p).median().item()
    theirs = torch.renorm(w, p, 0, cap)
    fastreg.max_norm_(w, cap, p=p)
    torch.testing.assert_close(w, theirs, rtol=1.1e-7 / cap, atol=0)  # renorm adds 1e-7 to the norm


def test_where_renorm_fails():
    """Rows left above the cap, a second call that changes them again, a row of 1e30 turned into zeros."""
    w = torch.randn(1000, 512)
    theirs = torch.renorm(w, 2, 0, 5.0)
    assert (norms64(theirs) > 5.0).any() and not torch.equal(torch.renorm(theirs, 2, 0, 5.0), theirs)
    fastreg.max_norm_(w, 5.0)
    assert (norms64(w) <= 5.0).all()
    big = torch.full((1, 4), 1e30)
    assert not torch.renorm(big, 2, 0, 1.0).any()
    fastreg.max_norm_(big, 1.0)
    torch.testing.assert_close(big, torch.full((1, 4), 0.5))


# ---- the differentiable form -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1.0, 1.5])
def test_functional_form_has_the_values_of_the_one_in_place(dtype, tau):
    w = torch.randn(9, 4, 3).to(dtype)
    w[0, 0, 0], w[1, 0, 0] = math.nan, math.inf
    expected, version = w.clone(), w._version
    fastreg.max_norm_(expected, 1.5, tau=tau, dim=1)
    out = fastreg.max_norm(w, 1.5, tau=tau, dim=1)
    assert w._version == version
    if dtype == torch.float64:  # whose last bit depends on the order in which a row's squares are added
        torch.testing.assert_close(out, expected, rtol=2**-50, atol=0, equal_nan=True)
    else:
        assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
@pytest.mark.parametrize("cap", [1.0, (), (6,)])
def test_tensors_without_values(mode, cap, backend):
    if backend != "reference":
        pytest.skip("no kernel takes them")
    with mode(), torch.device("meta" if mode is nullcontext else "cpu"):
        w = torch.rand(6, 8)
        cap = cap if isinstance(cap, float) else torch.rand(cap)
        assert fastreg.max_norm_(w, cap).shape == () and fastreg.max_norm(w, cap).shape == (6, 8)
        assert fastreg.MaxNorm([w], cap).project().dtype == torch.int64


@pytest.mark.sampled(5)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.7, math.inf])
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_functional_gradient(p, tau):
    w = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    caps = (norms64(w.detach(), p) ** tau * torch.tensor([0.5, 2.0, 0.9, 3.0, 0.1])).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, c: fastreg.max_norm(w, c, p=p, tau=tau), (w, caps))
    assert torch.autograd.gradgradcheck(lambda w: fastreg.max_norm(w, caps.detach(), p=p, tau=tau), (w,))


def test_functional_gradient_where_elements_share_the_largest_size():
    w = torch.tensor([[2.0, -2.0, 1.0, 0.0], [3.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 3)
    fastreg.max_norm(w, 1.0, p=math.inf).backward(grad)
    # ⟨g, w⟩ / n = (2 - 4 + 3) / 2 of the first row, (3 + 2 - 3) / 3 of the second
    expected = [[(1 - 0.25) / 2, (2 + 0.25) / 2, 1.5, 2.0], [(1 - 2 / 3) / 3, 2 / 3, 1.0, 4 / 3], [1.0, 2.0, 3.0, 4.0]]
    torch.testing.assert_close(w.grad, torch.tensor(expected))
    (norms_grad,) = torch.autograd.grad(fastreg.row_norms(w, math.inf).sum(), w)
    assert norms_grad.tolist() == [[0.5, -0.5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype, p", LONG)
def test_functional_form_of_long_rows(dtype, p):
    w = torch.randn(5, 40_001, dtype=torch.float64).to(dtype)
    w[1] *= 0.01
    w[2, 39_000], w[3, 7] = math.nan, math.inf
    w[4] = 1
    w.requires_grad_()
    cap = 0.6 * norms64(w.detach()[:1], p).item()
    expected = w.detach().clone()
    over = norms64(w.detach(), p) > cap
    over[2:4] = False
    assert fastreg.max_norm_(expected, cap, p=p).item() == over.sum()
    out = fastreg.max_norm(w, cap, p=p)
    assert torch.equal(bits(out[~over]), bits(expected[~over]))
    torch.testing.assert_close(out[over].detach(), expected[over], rtol=2 * torch.finfo(dtype).eps, atol=0)
    grad = torch.randn(5, 40_001, dtype=torch.float64).to(dtype)
    (ours,) = torch.autograd.grad(out, w, grad)
    (of_norms,) = torch.autograd.grad(fastreg.row_norms(w, p)[[0, 1, 4]].sum(), w)
    norms = fastreg.row_norms(w, p)
    assert norms[2].isnan() and norms[3] == math.inf
    with fastreg.use_backend("reference"):
        (theirs,) = torch.autograd.grad(fastreg.max_norm(w, cap, p=p), w, grad)
        (theirs_of_norms,) = torch.autograd.grad(fastreg.row_norms(w, p)[[0, 1, 4]].sum(), w)
    # Roundings, and in fp64 sums of 40,001 products in another order.
    tolerance = 4 * torch.finfo(dtype).eps + 40_001 * 2**-52
    assert torch.equal(ours[~over], grad[~over])
    torch.testing.assert_close(ours[over], theirs[over], rtol=tolerance, atol=tolerance * grad.abs().max().item())
    kept = [0, 1, 4]
    torch.testing.assert_close(of_norms[kept], theirs_of_norms[kept], rtol=tolerance, atol=0)


def test_functional_form_and_norms_of_one_dimension_with_gaps():
    """Each element is a row, wherever it lies."""
    x = torch.tensor([3.0, 9.0, -0.5, 9.0, 4.0, 9.0])[::2].requires_grad_()
    y = fastreg.max_norm(x, 1.0)
    y.backward(torch.ones(3))
    assert y.tolist() == [1.0, -0.5, 1.0] and x.grad.tolist() == [0.0, 1.0, 0.0]


def test_functional_form_after_a_call_in_inference_mode():
    x = torch.tensor([[3.0, 4.0]], requires_grad=True)
    with torch.inference_mode():
        fastreg.max_norm(x, 2.5)
    fastreg.max_norm(x, 2.5).sum().backward()  # saves the cap, of which one tensor is kept


def test_functional_gradient_of_renorm():
    w = torch.randn(7, 30, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(fastreg.max_norm(w, 5.0).sin().sum(), w)
    (theirs,) = torch.autograd.grad(torch.renorm(w, 2, 0, 5.0).sin().sum(), w)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_functional_gradient_passes_rows_that_stay():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]], requires_grad=True)
    fastreg.max_norm(w, 100.0).sum().backward()
    assert w.grad.eq(1).all()


# ---- projection onto the ball ----------------------------------------------------------------------------


def project_l1_by_sorting(row, radius):
    """Duchi et al. 2008, figure 1, in Python floats."""
    magnitudes = sorted((abs(v) for v in row), reverse=True)
    if sum(magnitudes) <= radius:
        return list(row)
    theta, total = 0.0, 0.0
    for k, value in enumerate(magnitudes, 1):
        total += value
        if value - (total - radius) / k > 0:
            theta = (total - radius) / k
    return [math.copysign(max(abs(v) - theta, 0.0), v) for v in row]


@settings(max_examples=50, **SETTINGS)
@given(
    seed=st.integers(0, 2**31),
    length=st.sampled_from([1, 2, 3, 7, 30, 200]),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([1.0, 2.0, math.inf]),
    share=st.floats(1e-3, 1.5),
    ties=st.booleans(),
)
def test_ball_guarantees(seed, length, dtype, p, share, ties):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, length, generator=generator, dtype=torch.float64)
    w = ((w * 2).round() if ties else w).to(dtype)
    radius = norms64(w, p).max().item() * share
    before = w.clone()
    count = fastreg.project_lp_ball_(w, radius, p)
    over = norms64(before, p) > radius
    assert count.item() == int(over.sum())
    assert (norms64(w, p) <= radius).all()
    assert torch.equal(bits(w[~over]), bits(before[~over]))
    again = w.clone()
    assert fastreg.project_lp_ball_(again, radius, p).item() == 0 and torch.equal(again, w)
    info = torch.finfo(dtype)
    if p == 1:
        exact = [project_l1_by_sorting(row, radius) for row in before.double().tolist()]
        exact = torch.tensor(exact, dtype=torch.float64)
        loss = (10 + 2 * length) * 2**-52 * radius + 2 * info.eps * radius + info.smallest_normal * info.eps
        loss += 2**-51 * before.double().abs().max().item()  # the oracle's own rounding of |x| - theta
        assert (w.double() - exact).abs().max() <= loss
    if p == math.inf:
        exact = before.double().clamp(-radius, radius)
        assert ((w.double() - exact).abs() <= info.eps * exact.abs() + info.smallest_normal).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ball_of_long_rows(dtype):
    w = torch.randn(2, 9001, dtype=torch.float64).to(dtype)
    before = w.clone()
    assert fastreg.project_lp_ball_(w, 500.0, 1).item() == 2
    exact = torch.tensor([project_l1_by_sorting(row, 500.0) for row in before.double().tolist()], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    # The shift of a norm above the cap after rounding is spread over the elements that are left.
    assert ((w.double() - exact).abs() <= 2 * eps * exact.abs() + 500 * eps / 100 + 2**-40).all()
    assert (norms64(w, 1.0) <= 500).all() and fastreg.project_lp_ball_(w, 500.0, 1).item() == 0


def test_ball_of_radius_one_for_huge_rows():
    w = torch.tensor([[1e30, -1e30, 1.0], [1e30, 0.0, 0.0], [3.0, math.nan, 1.0]])
    assert fastreg.project_lp_ball_(w, 1.0, 1).item() == 2
    assert w[:2].tolist() == [[0.5, -0.5, 0.0], [1.0, 0.0, 0.0]]
    assert w[2, 0] == 3.0


def test_ball_radius_zero_and_errors():
    w = torch.randn(3, 4)
    fastreg.project_lp_ball_(w, 0.0, 1)
    assert not w.any()
    with pytest.raises(ValueError, match="p must be 1, 2 or inf, got 3"):
        fastreg.project_lp_ball_(w, 1.0, 3)
    with pytest.raises(ValueError, match="radius"):
        fastreg.project_lp_ball_(w, -1.0, 1)


# ---- norms, thresholds, normalisation --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_row_norms(dtype, p, dim):
    w = torch.randn(5, 6, 7).to(dtype)
    norms = fastreg.row_norms(w, p, dim)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        norms, norms64(w, p, dim).to(norms.dtype), rtol=2e-15 if dtype == torch.float64 else 1e-7, atol=0
    )


def test_row_norms_of_one_dimension_with_gaps():
    assert fastreg.row_norms(torch.tensor([3.0, 9.0, -4.0])[::2]).tolist() == [3.0, 4.0]
    assert fastreg.row_norms(torch.tensor([-2.0]).expand(3)).tolist() == [2.0, 2.0, 2.0]


def test_row_norms_gradient():
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastreg.row_norms, (w,))
    zeros = torch.zeros(2, 3, requires_grad=True)
    fastreg.row_norms(zeros).sum().backward()
    assert zeros.grad.eq(0).all()


def test_threshold():
    w = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
    assert fastreg.max_norm_threshold(w, 0.0).item() == 1.0
    assert fastreg.max_norm_threshold(w, 0.25).item() == 2.0
    assert fastreg.max_norm_threshold(w, 1.0).item() == 5.0
    w[1, 1] = math.nan
    assert fastreg.max_norm_threshold(w, 0.5).item() == 3.0
    assert fastreg.max_norm_threshold(w * math.nan, 0.5).item() == math.inf
    with pytest.raises(ValueError, match="thresh"):
        fastreg.max_norm_threshold(w, -0.1)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tau_normalize(tau, dtype):
    w = torch.randn(6, 20).to(dtype)
    w[1], w[2, 3], w[4] = 0, math.nan, w[4] * 1e-4
    before = w.clone()
    assert fastreg.tau_normalize_(w, tau) is w
    assert torch.equal(bits(w[1:3]), bits(before[1:3]))
    keep = [0, 3, 4, 5]
    exact = before[keep].double() / norms64(before[keep])[:, None] ** tau
    torch.testing.assert_close(w[keep].double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_calls_on_the_same_memory_are_told_apart():
    """What a call needs is kept for the next one on tensors in these places: under all that it depends on."""
    start = torch.randn(6, 5) * 2
    options = (
        {},
        {"max_norm": 0.5},
        {"p": 1},
        {"dim": 1},
        {"tau": 2.0},
        {"decay": 0.5},
        {"max_norm": torch.ones(6) / 4},
    )
    calls = [lambda w, given=given: fastreg.max_norm_(w, **{"max_norm": 1.0} | given) for given in options]
    calls += [lambda w, p=p: fastreg.project_lp_ball_(w, 1.0, p) for p in (1, math.inf)]
    calls += [fastreg.tau_normalize_, lambda w: (fastreg.max_norm_(w.t_(), 1.0), w.t_())]
    w, wanted = start.clone(), []
    for call in calls:
        with fastreg.use_backend("reference"):
            call(w.copy_(start))
        wanted.append(w.clone())
    assert len({tuple(want.flatten().tolist()) for want in wanted}) == len(calls) - 1  # the last is that along dim 1
    for call, want in [*zip(calls, wanted)] * 2:
        call(w.copy_(start))
        torch.testing.assert_close(w, want)


def test_unit_norm():
    layer = nn.Linear(10, 4)
    fastreg.UnitNorm(layer).project()
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4))


# ---- the constraint object -------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 1))


def test_a_module_stands_for_its_parameters_of_two_dimensions():
    net = model()
    constraint = fastreg.MaxNorm(net, 0.1)
    assert [tuple(p.shape) for p in constraint.params] == [(4, 3, 3, 3), (1, 4)]
    assert constraint.project().item() == 5 and constraint.total.item() == 5
    assert all((norms64(p) <= 0.1).all() for p in constraint.params)


def test_caps_by_name_and_per_layer():
    net = model()
    constraint = fastreg.MaxNorm(net, {"3.weight": 0.2, "1.weight": 0.5})
    assert [tuple(p.shape) for p in constraint.params] == [(1, 4), (4,)]
    assert constraint.project().item() == 5
    assert net[1].weight.tolist() == [0.5] * 4
    with pytest.raises(ValueError, match="no parameters of the module"):
        fastreg.MaxNorm(net, {"fc.weight": 1.0})


def test_caps_follow_weights_to_another_device():
    constraint = fastreg.MaxNorm([torch.ones(2, 3)], [torch.ones(2)])
    constraint.params = [torch.ones(2, 3, device="meta")]  # to a GPU a parameter moves as it is
    with fastreg.use_backend("reference"):
        constraint.project()
    assert constraint.caps[0].is_meta and constraint.total.is_meta


def test_caps_per_row_do_not_serve_a_weight_of_other_rows():
    weight = nn.Parameter(torch.ones(4, 3))
    constraint = fastreg.MaxNorm(weight, torch.full((4,), 0.5))
    constraint.project()
    weight.data = torch.ones(5, 3)
    with pytest.raises(ValueError, match="tensor 0 has 5 rows now, but there is one cap for each of 4"):
        constraint.project()
    assert (weight == 1).all()


def test_exactly_one_of_max_norm_and_thresh():
    with pytest.raises(ValueError, match="exactly one"):
        fastreg.MaxNorm(model())
    with pytest.raises(ValueError, match="exactly one"):
        fastreg.MaxNorm(model(), 1.0, thresh=0.5)
    with pytest.raises(ValueError, match="no tensor to constrain"):
        fastreg.MaxNorm(nn.ReLU(), 1.0)


def test_thresh_fixes_the_caps_from_the_present_weights():
    net = model()
    constraint = fastreg.MaxNorm(net, thresh=0.5)
    norms = norms64(net[0].weight)
    torch.testing.assert_close(constraint.caps[0], (norms.min() + norms.max()) / 2)
    assert constraint.caps[1].item() == norms64(net[3].weight).item()
    assert fastreg.MaxNorm(net, thresh=1.0).project().item() == 0  # the largest row is at its cap, bit for bit
    with torch.no_grad():
        net[0].weight.mul_(100)
    assert constraint.project().item() == 4


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.9, 2.0, 5.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_thresh_is_one_of_the_norms_to_the_power_tau(tau, p):
    w = torch.randn(5, 30) * 2
    before, powers = w.clone(), norms64(w, p) ** tau
    assert fastreg.MaxNorm(w, thresh=1.0, p=p, tau=tau).project().item() == 0 and torch.equal(w, before)
    constraint = fastreg.MaxNorm(w, thresh=0.3, p=p, tau=tau)
    cap = powers.min() + 0.3 * (powers.max() - powers.min())
    torch.testing.assert_close(constraint.caps[0], cap)
    assert constraint.project().item() == int((powers > cap).sum())
    want = norms64(before, p) * torch.where(powers > cap, cap / powers, 1)
    torch.testing.assert_close(norms64(w, p), want, rtol=2**-20, atol=0)


def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 3, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("every", [1, 3])
def test_attach_projects_after_steps(every):
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    constraint = fastreg.MaxNorm(net, 0.1)
    handle = constraint.attach(optimizer, every=every)
    train(net, optimizer, every - 1)
    assert constraint.total.item() == 0
    train(net, optimizer, 1)
    assert constraint.total.item() > 0 and (norms64(net[0].weight) <= 0.1).all()
    seen = constraint.total.item()
    handle.remove()
    train(net, optimizer, every)
    assert constraint.total.item() == seen and (norms64(net[0].weight) > 0.1).any()
    with pytest.raises(ValueError, match="every"):
        constraint.attach(optimizer, every=0)


def test_attach_to_a_wrapped_optimizer():
    """As accelerate wraps one: an Optimizer by class that is not initialised as such."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    layer = nn.Linear(4, 3)
    optimizer = Wrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    constraint = fastreg.MaxNorm(layer, 0.1)
    constraint.attach(optimizer)
    optimizer.step()
    assert constraint.total.item() == 3


def test_attach_leaves_the_optimizer_state_alone():
    states = []
    for attached in (False, True):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if attached:
            fastreg.MaxNorm(net, 0.1).attach(optimizer)
        torch.manual_seed(1)
        train(net, optimizer, 1)
        states.append([state["momentum_buffer"] for state in optimizer.state.values()])
    for without, with_ in zip(*states):
        assert torch.equal(without, with_)


def test_decay_in_a_tensor():
    w = torch.randn(20, 33)
    expected = w.clone()
    fastreg.max_norm_(expected, 5.0, decay=0.25)
    fastreg.max_norm_(w, 5.0, decay=torch.tensor(0.25))
    assert torch.equal(w, expected)
    with pytest.raises(ValueError, match=r"decay must be a number or a 0-d tensor, got shape \(1,\)"):
        fastreg.max_norm_(w, 5.0, decay=torch.tensor([0.25]))
    with pytest.raises(TypeError, match="decay must have a dtype among"):
        fastreg.max_norm_(w, 5.0, decay=torch.tensor(1))


def test_weight_decay_with_the_group_s_learning_rate():
    a, b, c = (nn.Parameter(torch.ones(2, 4)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}], lr=0.0)
    constraint = fastreg.MaxNorm([a, b, c], 100.0, weight_decay=0.5)
    constraint.attach(optimizer)
    for parameter in (a, b):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(a.detach(), torch.full((2, 4), 0.95)) and torch.equal(b.detach(), torch.full((2, 4), 0.9))
    assert c.eq(1).all()


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_weight_decay_acts_at_every_step_whatever_the_number_of_projections(rate):
    """Beside the decoupled decay of torch.optim, which without gradients is all that AdamW does."""
    a, b, small = (nn.Parameter(torch.ones(2, 4)) for _ in range(3))
    constraint = fastreg.MaxNorm([a, small], [100.0, 0.5], weight_decay=0.5)
    ours, theirs = torch.optim.SGD([a, small], lr=rate), torch.optim.AdamW([b], lr=rate, weight_decay=0.5)
    constraint.attach(ours, every=3)
    for parameter in (a, b, small):
        parameter.grad = torch.zeros_like(parameter)
    for step in range(1, 6):
        ours.step(), theirs.step()
        torch.testing.assert_close(a, b)
        if step < 3:
            torch.testing.assert_close(small, b)
            assert constraint.total.item() == 0
    assert constraint.total.item() == 2
    torch.testing.assert_close(small, torch.full((2, 4), 0.25 * 0.95**2))


def test_weight_decay_with_a_learning_rate_in_a_tensor():
    a, b = (nn.Parameter(torch.ones(2, 4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD([a, b], lr=rate)
    constraint = fastreg.MaxNorm([a, b], 1.5, weight_decay=0.5)
    constraint.attach(optimizer)
    for parameter in (a, b):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2, 4), 0.75))  # 0.95, and then down to the cap
    torch.testing.assert_close(b.detach().float(), torch.full((2, 4), 0.75))
    with torch.no_grad():
        rate.fill_(1.0)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((2, 4), 0.375))


def test_state_dict_round_trip(tmp_path):
    net = model()
    constraint = fastreg.MaxNorm(net, thresh=0.5)
    constraint.project()
    torch.save(constraint.state_dict(), tmp_path / "state.pt")
    other = fastreg.MaxNorm(model(), thresh=0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other.caps == constraint.caps and other.total == constraint.total
    with pytest.raises(ValueError, match="2 caps, but 1"):
        fastreg.MaxNorm(net[3], 1.0).load_state_dict(constraint.state_dict())


# ---- sharded weights -------------------------------------------------------------------------------------


def project_sharded(rank, world, path, whole, thresh):
    """In each process: the projection of a DTensor under every placement gives what the whole tensor gives."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    module = import_module("fastreg.max_norm")
    launches, kernels = [], {}
    for name, kernel in module._kernels.items():
        kernels[name] = lambda *args, kernel=kernel: launches.append(args) or kernel(*args)
    module._kernels = kernels
    expected = whole.clone()
    constraint = fastreg.MaxNorm(expected, thresh=thresh)
    with torch.no_grad():
        expected.mul_(1.5)
    rows = constraint.project()
    layouts = [(mesh, (placement,)) for placement in (Shard(0), Shard(1), Replicate())]
    if world == 4:
        layouts.append((init_device_mesh("cpu", (2, 2)), (Shard(0), Shard(1))))
    for mesh, placements in layouts:
        shards = [distribute_tensor(whole.clone(), mesh, placements) for _ in range(2)]
        constraint = fastreg.MaxNorm(shards, thresh=thresh)
        with torch.no_grad():
            for shard in shards:
                shard.mul_(1.5)
        launches.clear()
        version = shards[0]._version
        with CommDebugMode() as communication:
            count = constraint.project()
        assert communication.get_total_counts() == (Shard(1) in placements)
        if _backends.missing("max_norm_", "cpu") is None:  # one launch for what this process holds of all tensors
            assert len(launches) == 1
        for shard, cap in zip(shards, constraint.caps):
            assert shard.placements == placements and shard._version > version
            torch.testing.assert_close(shard.full_tensor(), expected, rtol=1e-6, atol=0)
            assert (norms64(shard.full_tensor()) <= cap.full_tensor()).all()
        assert count.full_tensor().item() == 2 * rows.item() > 0
        assert not constraint.total.dtype.is_floating_point
        assert constraint.total.full_tensor().item() == 2 * rows.item()
    caps = torch.arange(1.0, 8.0)
    for mesh, placements in layouts:
        by_row = [Shard(0) if placement == Shard(0) else Replicate() for placement in placements]
        for options in ({"p": 1.5}, {"p": math.inf, "decay": 0.25}, {"tau": 1.7, "decay": torch.tensor(0.25)}):
            rows = whole.clone()
            rows[0, 0], rows[1], rows[2, 9] = math.inf, 0, math.nan
            shards, expected = distribute_tensor(rows.clone(), mesh, placements), rows
            count = fastreg.max_norm_(shards, distribute_tensor(caps, mesh, by_row) / 3, **options)
            assert count.full_tensor().item() == fastreg.max_norm_(expected, caps / 3, **options).item() > 0
            torch.testing.assert_close(shards.full_tensor(), expected, rtol=1e-6, atol=0, equal_nan=True)
        for p, radius in ((1, 2.0), (1, caps / 2), (2, 1.0), (2, caps / 3), (math.inf, 0.5)):
            shards, expected = distribute_tensor(whole.clone(), mesh, placements), whole.clone()
            count = fastreg.project_lp_ball_(shards, radius, p)
            assert count.full_tensor().item() == fastreg.project_lp_ball_(expected, radius, p).item() > 0
            torch.testing.assert_close(shards.full_tensor(), expected, rtol=1e-6, atol=0)
            assert shards.placements == placements
            weights = distribute_tensor(whole.clone(), mesh, placements).requires_grad_()
            penalty = fastreg.lp_penalty(weights, p)
            penalty.backward()
            torch.testing.assert_close(penalty.full_tensor(), torch.linalg.vector_norm(whole, p))
            assert weights.grad.full_tensor().ne(0).any()
        halves = distribute_tensor(whole.bfloat16(), mesh, placements)
        fastreg.max_norm_(halves, 1.0)
        assert (norms64(halves.full_tensor()) <= 1).all() and fastreg.max_norm_(halves, 1.0).full_tensor().item() == 0
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_rows_and_columns(world, tmp_path, backend):
    if backend != "reference":
        pytest.skip("the processes choose their backends themselves")
    whole = torch.randn(7, 10)
    torch.multiprocessing.spawn(project_sharded, (world, str(tmp_path / "store"), whole, 0.3), nprocs=world)


def test_rows_are_counted_in_place():
    """So that each replay of a CUDA graph adds its own; what a state dict holds stays."""
    constraint = fastreg.MaxNorm([torch.ones(3, 4)], 1.0)
    total = constraint.total
    constraint.project()
    state = constraint.state_dict()
    constraint.load_state_dict(state)
    constraint.params[0].fill_(1.0)
    constraint.project()
    assert total.item() == 3 and state["total"].item() == 3 and constraint.total.item() == 6
