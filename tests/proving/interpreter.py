"""Mends Triton's interpreter (TRITON_INTERPRET=1), so that a kernel computes there what it does on the GPU.

As it comes, the interpreter truncates fp32 to bf16 instead of rounding, computes garbage from arithmetic on
bf16, knows no libdevice function, times autotuned kernels (which it cannot), lets `tl.device_assert` pass,
keeps all digits of numbers that reach a GPU in fp32, adds up a tile one element after the other, rounds twice in
`tl.fma`, and evaluates `erf` element by element. `mend()` repairs all of these, once; tests/conftest.py calls it.

What it proves: a test that passes computes the right values with the kernel's own masks, indices and casts.
What it does not: a sum is a tree, but not the GPU's own; a product and a sum are fused where the kernel says so alone;
the last bits of exp and log are numpy's; programs run one after another (see sanitizer.py); tensor cores are not
modelled.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import autotuner, interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_ROUND_TO_ZERO = getattr(interpreter._ir.ROUNDING_MODE, "RTZ", None)


def mend() -> None:
    """Applies the mend to the running process; calling it again changes nothing."""
    if getattr(InterpreterBuilder, "_mended", False):
        return
    InterpreterBuilder._mended = True
    _fuse_and_sum_like_hardware()
    _round_bf16_like_hardware()
    _provide_libdevice()
    _run_autotuned_kernels()
    _launch_like_hardware()


# ---- sums ------------------------------------------------------------------------------------------------


def _fused(a, b, c):
    """a·b + c, rounded once for fp32 and less."""
    wide = np.result_type(a, b, c)
    return (np.asarray(a, np.float64) * b + c).astype(wide)


def _fuse_and_sum_like_hardware() -> None:
    def fma(self, x, y, z):
        return TensorHandle(_fused(x.data, y.data, z.data), z.dtype.scalar)

    def total(self, input):
        """A tree's sum: one element after the other, the error would grow with their number, and not its logarithm."""
        axis = range(input.handle.data.ndim) if self.axis is None else [self.axis]
        data = input.handle.data
        for dimension in axis:
            data = np.moveaxis(data, dimension, 0)
            while len(data) > 1:  # lengths of tiles are powers of two
                data = data[: len(data) // 2] + data[len(data) // 2 :]
            data = np.moveaxis(data, 0, dimension)
        if not self.keep_dims:
            data = data.squeeze(self.axis)
        return self.to_tensor(data, input.dtype)

    InterpreterBuilder.create_fma = fma
    interpreter.ReduceOps.sum = total


# ---- bf16 ------------------------------------------------------------------------------------------------
# The interpreter keeps bf16 as uint16 bits. Arithmetic widens to fp32 and rounds the result, as the GPU does.


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Any numbers to bf16 bits, rounded to nearest even."""
    values = np.ascontiguousarray(values)
    bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(values.shape)


def _is_bf16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _in_fp32(operation):
    """`operation` with bf16 operands widened, and a result in fp32 rounded back to bf16."""

    @functools.wraps(operation)
    def wrapped(self, *args):
        if not any(map(_is_bf16, args)):
            return operation(self, *args)
        result = operation(self, *map(_widen, args))
        return result if result.data.dtype == np.bool_ else TensorHandle(to_bf16(result.data), tl.bfloat16)

    return wrapped


def _round_bf16_like_hardware() -> None:
    builder = InterpreterBuilder
    old_cast, old_convert, old_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    ieee = (tl.float16, tl.bfloat16, tl.float32, tl.float64)

    def cast(self, source, dtype):
        was_bf16, dtype = _is_bf16(source), dtype.scalar
        source = _widen(source)
        if dtype == tl.bfloat16:
            return TensorHandle(to_bf16(source.data), dtype)
        if was_bf16:
            return TensorHandle(source.data.astype(interpreter._get_np_dtype(dtype)), dtype)
        return old_cast(self, source, dtype)

    def convert(self, source, dtype, rounding):
        if source.dtype.scalar not in ieee or dtype.scalar not in ieee:
            return old_convert(self, source, dtype, rounding)
        if rounding == _ROUND_TO_ZERO and dtype.scalar == tl.bfloat16:
            bits = _widen(source).data.astype(np.float32).view(np.uint32) >> np.uint32(16)
            return TensorHandle(bits.astype(np.uint16), tl.bfloat16)
        if rounding == _ROUND_TO_ZERO:
            return old_convert(self, source, dtype, rounding)
        return cast(self, source, dtype)

    def dot(self, a, b, accumulator, *rest):
        return old_dot(self, _widen(a), _widen(b), accumulator, *rest)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, convert, dot
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt"):
        setattr(builder, name, _in_fp32(getattr(builder, name)))


# ---- libdevice -------------------------------------------------------------------------------------------


def _from_torch(function):
    return lambda *arrays: function(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)).numpy()


_AS_IN_NUMPY = (
    "tanh", "sinh", "cosh", "log1p", "expm1", "exp2", "cbrt", "rint", "trunc", "floor", "ceil", "sqrt", "exp", "log",
    "log2", "log10", "sin", "cos", "tan", "hypot", "fmod", "isnan", "isinf", "copysign", "nextafter", "ldexp",
)  # fmt: skip
_LIBDEVICE = {
    **{name: getattr(np, name) for name in _AS_IN_NUMPY},
    **{f"a{name}": getattr(np, f"arc{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")},
    **{name: _from_torch(getattr(torch, name)) for name in ("erf", "erfc", "erfinv", "lgamma")},
    "abs": np.abs,
    "pow": np.power,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp_rn": lambda a: 1 / a,
    "sqrt_rn": np.sqrt,
    "div_rn": np.divide,
    "fma": _fused,
    "llrint": lambda a: np.rint(a).astype(np.int64),
    "finitef": np.isfinite,
    "isfinited": np.isfinite,
    "signbit": np.signbit,
    "fast_expf": np.exp,
    "fast_logf": np.log,
    "fast_log2f": np.log2,
    "fast_sinf": np.sin,
    "fast_cosf": np.cos,
    "fast_tanhf": np.tanh,
    "fast_powf": np.power,
    "fast_dividef": np.divide,
}  # fmt: skip


def _libdevice_function(function):
    def call(*args, _semantic=None, **_):
        args = [interpreter.interpreter_semantic.to_tensor(arg) for arg in args]
        data = function(*(arg.handle.data for arg in args))
        like = next((arg for arg in args if arg.type.is_block()), args[0])
        dtype = {np.bool_: tl.int32, np.int64: tl.int64}.get(data.dtype.type, like.dtype)
        handle = TensorHandle(data.astype(interpreter._get_np_dtype(dtype)), dtype)
        return tl.tensor(handle, tl.block_type(dtype, list(data.shape)) if like.type.is_block() else dtype)

    return call


def _provide_libdevice() -> None:
    for name, function in _LIBDEVICE.items():
        for module in (libdevice, cuda_libdevice):
            setattr(module, name, _libdevice_function(function))

    def erf(self, x):
        return TensorHandle(_LIBDEVICE["erf"](x.data), x.dtype.scalar)

    InterpreterBuilder.create_erf = erf


# ---- autotune and launches -------------------------------------------------------------------------------


def _run_autotuned_kernels() -> None:
    def run(self, *args, **kwargs):
        """Runs every configuration from the same state of the arguments: each of them is tested.

        What the last one wrote stays.
        """
        self.nargs = dict(zip(self.arg_names, args))
        configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
        tensors = [arg for arg in [*args, *kwargs.values()] if isinstance(arg, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors] if len(configs) > 1 else []
        for config in configs:
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
            if config.pre_hook is not None:
                config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
            result = self.fn.run(*args, **kwargs, **config.all_kwargs())
        self.best_config = configs[-1]
        return result

    autotuner.Autotuner.run = run


def _launch_like_hardware() -> None:
    old_launch, old_patch = GridExecutor.__call__, interpreter._patch_lang
    patched_for: dict[int, dict] = {}  # keeps the modules alive, so that no id comes twice

    def narrowed(self, name, value):
        if not isinstance(value, float):
            return value
        declared = str(inspect.get_annotations(self.fn).get(name))  # the interpreter's rewriting leaves their text
        return value if "constexpr" in declared or "float64" in declared else float(np.float32(value))

    def launch(self, *args, **kwargs):
        # A number arrives in fp32, unless its parameter is declared as tl.float64.
        args = [narrowed(self, name, value) for name, value in zip(self.arg_names, args, strict=False)]
        kwargs = {name: narrowed(self, name, value) for name, value in kwargs.items()}
        # The GPU raises no floating-point exceptions, and its max and min drop NaN silently.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return old_launch(self, *args, **kwargs)

    def patch_language(function):
        # The interpreter exchanges the functions of triton.language at every call of a jit function, which takes
        # 2 ms. Once per module is enough, in a process that only ever interprets.
        if id(function.__globals__) not in patched_for:
            patched_for[id(function.__globals__)] = function.__globals__
            old_patch(function)
        return interpreter._LangPatchScope()

    GridExecutor.__call__ = launch
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_language
    if hasattr(interpreter, "InterpreterOptions"):  # tl.device_assert raises
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)


# ---- what the instruments in traffic.py and sanitizer.py share -------------------------------------------


def lanes(pointers: TensorHandle, mask: TensorHandle | None) -> tuple[np.ndarray, int]:
    """The addresses that the active lanes of an access touch, and the bytes at each."""
    addresses = np.asarray(pointers.data)
    if mask is not None:
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]  # a scalar's is int32
    return addresses.ravel(), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def patched(owner: type, **members: Callable) -> Iterator[None]:
    """Replaces methods of `owner` inside the block."""
    before = {name: getattr(owner, name) for name in members}
    for name, member in members.items():
        setattr(owner, name, member)
    try:
        yield
    finally:
        for name, member in before.items():
            setattr(owner, name, member)
