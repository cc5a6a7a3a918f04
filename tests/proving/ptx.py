"""Runs what Triton's compiler made of a kernel, on the CPU: its PTX, instruction by instruction, turned into C++.

The interpreter runs a kernel's source; this runs the code that the GPU gets, with its layouts, its exchanges between
threads and its approximations: one fiber per thread, real barriers and shuffles (cudahost.h). With

    FASTREG_TEST_PTX=90 pytest tests/test_group_norm.py -k triton

every launch of a Triton kernel in these tests is compiled for sm_90 and run so, on CPU tensors. `run_sanitized` does
the same with TSan, which finds missing barriers, or ASan.

What it proves, beyond the interpreter: that the compiled code computes the right values with the worst errors that
PTX allows its approximations (ptx.h), that its wide accesses are aligned, that its threads need no barrier that is
not there. What it does not: what ptxas makes of PTX, the memory model between blocks, and speed.
"""

import ctypes
import functools
import hashlib
import os
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from . import cudahost
from .cubin import offline_driver

ARCHITECTURE = "FASTREG_TEST_PTX"  # environment variable: run Triton kernels compiled for sm_…
_TYPES = {"pred": "bool", "b8": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
_TYPES |= {
    f"{kind}{bits}": _TYPES[f"b{bits}"] for kind in "suf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)
}
_APPROXIMATIONS = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"}
_ROUNDINGS = {"rni": "nearest", "rzi": "zero", "rmi": "down", "rpi": "up", "rn": "nearest", "rz": "zero"}
_SYNONYMS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # of unsigned comparisons


@dataclass(frozen=True)
class Kernel:
    """One entry of a PTX module as C++."""

    name: str
    parameters: tuple[str, ...]  # their types
    source: str


@functools.cache
def translate(ptx: str) -> Kernel:
    """The C++ for the one kernel of a PTX module; NotImplementedError for instructions that ptx.h does not have."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    text = re.sub(r"^\s*\.(?:version|target|address_size|file|loc|pragma|maxntid|reqntid|minnctapersm|maxnreg)[^\n]*$",
                  "", text, flags=re.MULTILINE)  # fmt: skip
    text = text[: text.find(".section")] if ".section" in text else text
    lines, entry = ["using namespace ptx;"], None
    for found in re.finditer(r"\.global\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}", text):
        lines.append(f"alignas({found[1]}) static const uint8_t {_name(found[2])}[] = {{{found[3]}}};")
    for found in _HEAD.finditer(text):
        kind, name, parameters, end = found.groups()
        types = tuple(re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", parameters))
        given = [f"{_name(name)}_param_{i}" for i in range(len(types))]
        if kind == "entry":
            entry = (name, types)
            lines.append("static void kernel(const uint64_t* parameters) {")
            lines += [f"  const uint64_t {parameter} = parameters[{i}];" for i, parameter in enumerate(given)]
        elif name == "__assertfail":
            continue
        else:
            head = f"static uint64_t {_name(name)}({', '.join(f'uint64_t {parameter}' for parameter in given)})"
            if end == ";":
                lines.append(head + ";")
                continue
            lines += [f"{head} {{", "  uint64_t _func_retval0 = 0;"]
        leave = "return;" if kind == "entry" else "return _func_retval0;"
        lines += [f"  {line}" for line in _Body(_block(text, found.end()), leave).lines()]
        lines.append("}")
    return Kernel(*entry, "\n".join(lines) + _ENTRY)


_ENTRY = """
extern "C" __attribute__((visibility("default"))) const char* launch(
    const uint64_t* parameters, unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared) {
  static std::string message;
  try {
    ptx::shared_bytes = shared;
    cudahost::allowed[cudahost::address_of(kernel)] = shared;
    cudahost::launch(cudahost::address_of(kernel), dim3(x, y, z), dim3(threads), shared,
                     [=] { kernel(parameters); });
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
"""


def _name(name: str) -> str:
    return "_" + name.replace("$", "S").replace("%", "")


_HEAD = re.compile(r"\.(func|entry)\s*(?:\([^)]*\))?\s*([\w$]+)\s*\(([^)]*)\)\s*(?:\.noreturn)?\s*(;|\{)")


def _block(text: str, begin: int) -> str:
    """What stands from `begin`, behind an opening brace, to the closing one."""
    depth, end = 1, begin
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[begin : end - 1]


class _Body:
    """The statements of one function."""

    def __init__(self, text: str, leave: str) -> None:
        self.text, self.leave = text, leave
        self.tables = {
            name: [target.strip() for target in targets.split(",")]
            for name, targets in re.findall(r"([\w$]+):\s*\.branchtargets\s+([^;]*);", text)
        }
        self.text = re.sub(r"[\w$]+:\s*\.branchtargets\s+[^;]*;", "", self.text)

    def lines(self) -> Iterator[str]:
        for kind, prefix, _count in re.findall(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>;", self.text):
            used = {int(n) for n in re.findall(rf"%{prefix}(\d+)\b", self.text)}
            names = ", ".join(f"{_name(prefix)}{n} = {_TYPES[kind]}(~0ull)" for n in sorted(used))
            if names:
                yield f"{_TYPES[kind]} {names};"
        # Braces that hold registers of an instruction are no blocks.
        tokens = re.split(
            r"(;|(?<=[;{}\s])[\w$]+:(?!:)|(?<=[;{}\n])\s*[{}])", re.sub(r"\.reg[^;]*<\d+>;", "", self.text)
        )
        statement = ""
        for token in tokens:
            bare = token.strip()
            if bare == ";":
                if statement.strip():
                    yield from self.statement(statement.strip())
                statement = ""
            elif not statement.strip() and (bare in ("{", "}") or re.fullmatch(r"[\w$]+:", bare)):
                yield _name(bare) + ";" if bare.endswith(":") else bare
            else:
                statement += token

    def statement(self, text: str) -> Iterator[str]:
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
            yield f"[[maybe_unused]] {_TYPES[kind]} {', '.join(_name(n.strip()) for n in names.split(','))};"
            return
        if text.startswith(".param"):
            yield f"uint64_t {_name(text.split()[-1])};"
            return
        if text.startswith(".local"):
            align, name, size = re.fullmatch(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text).groups()
            yield f"alignas({align}) uint8_t {_name(name)}[{size}];"
            return
        guard, opcode, rest = re.fullmatch(r"(?:@(!?%?[\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.DOTALL).groups()
        code = self.instruction(opcode, [part.strip() for part in _split(rest)])
        if guard:
            not_, register = ("!", guard[1:]) if guard.startswith("!") else ("", guard)
            yield f"if ({not_}{_name(register)}) {{ {code} }}"
        else:
            yield code

    def instruction(self, opcode: str, operands: list[str]) -> str:
        op, *parts = opcode.replace("::", "__").split(".")
        kind = parts[-1] if parts else ""
        if op in ("ld", "ldu", "st"):
            return self.memory(op, parts, operands)
        if op == "mov":
            return self.move(kind, operands)
        if op == "cvta":
            return f"{_name(operands[0])} = {_value(operands[1])};"
        if op == "bra":
            return f"goto {_name(operands[0])};"
        if op == "brx":
            cases = " ".join(f"case {i}: goto {_name(to)};" for i, to in enumerate(self.tables[operands[1]]))
            return f"switch ({_value(operands[0])}) {{ {cases} }}"
        if op in ("ret", "exit"):
            return self.leave
        if op == "trap":
            return 'throw Error("trap" + cudahost::where());'
        if op == "call":
            function = next(operand for operand in operands if not operand.startswith("("))
            if function == "__assertfail":
                return 'throw Error("a device assertion failed" + cudahost::where());'
            returned, given = operands[0].strip("()"), operands[-1].strip("()")
            arguments = ", ".join(_name(name.strip()) for name in given.split(","))
            return f"{_name(returned)} = {_name(function)}({arguments});"
        if op == "bar" and parts == ["warp", "sync"]:
            return f"__syncwarp({_value(operands[0])});"
        if op in ("bar", "barrier"):
            if operands != ["0"]:
                raise NotImplementedError(f"{opcode} {', '.join(operands)}")
            return "__syncthreads();"
        if op in ("membar", "fence"):
            return "__threadfence();"
        if op in ("prefetch", "applypriority"):
            return ";"
        if op == "createpolicy":
            return f"{_name(operands[0])} = 0;"
        if op in ("ldmatrix", "stmatrix"):
            registers = next(operand for operand in operands if operand.startswith("{"))
            address = next(operand for operand in operands if operand.startswith("["))
            names = ", ".join(_name(name.strip()) for name in registers.strip("{}").split(","))
            return f"{op}<{str('trans' in parts).lower()}>({_address(address)}, {names});"
        if op == "shfl":
            return self.shuffle(parts[1], operands)
        if op == "redux":
            names = {"min": "extreme<false>(a, b, false)", "max": "extreme<true>(a, b, false)", "add": "a + b",
                     "or": "a | b", "and": "a & b", "xor": "a ^ b"}  # fmt: skip
            join = (
                f"[](uint64_t x, uint64_t y) {{ const auto a = {kind}::get(x), b = {kind}::get(y); "
                f"return {kind}::put({names[parts[1]]}); }}"
            )
            return f"{_name(operands[0])} = redux({_value(operands[2])}, {join}, {_value(operands[1])});"
        if op in ("atom", "red"):
            return self.atomic(op, parts, operands)
        if op == "setp":
            return self.compare(parts, operands)
        target, *given = operands
        return f"{_name(target)} = {self.value(op, parts, kind, [_value(operand) for operand in given])};"

    def value(self, op: str, parts: list[str], kind: str, given: list[str]) -> str:
        """An instruction that makes one value of others."""
        if op == "cvt":
            return self.convert(parts, given)
        if kind.endswith("16x2"):
            half = kind.removesuffix("x2")
            low = self.value(op, [*parts[:-1], half], half, [f"({a}) & 0xffff" for a in given])
            high = self.value(op, [*parts[:-1], half], half, [f"({a}) >> 16" for a in given])
            return f"(({low}) & 0xffff) | ({high}) << 16"
        if op == "selp":
            return f"{given[2]} ? {given[0]} : {given[1]}"
        ftz = "ftz" in parts
        if op == "fma" or (op == "mad" and kind.startswith("f")):
            return f"fma_ftz({', '.join(given)})" if ftz else f"fma<{kind}>({', '.join(given)})"
        if op in _APPROXIMATIONS or op == "div":
            if "approx" in parts or "full" in parts:
                how = "approx" if "approx" in parts else "full"
                double = "_f64" if kind == "f64" else ""
                arguments = ", ".join(f"{kind}::get({a})" for a in given)
                return f"{kind}::put({op}_{how}{'_ftz' * ftz}{double}({arguments}))"
            if op == "sqrt":
                return f"{kind}::put(std::sqrt({kind}::get({given[0]})))"
            if op == "rcp":
                return f"{kind}::put(1 / {kind}::get({given[0]}))"
        if op in ("shl", "shr"):
            return f"{op}<{kind}>({', '.join(given)})"
        if op == "bfe":
            return f"bfe<{kind}>({', '.join(given)})"
        if kind in ("b16", "b32", "b64", "pred"):
            sign = {"and": "&", "or": "|", "xor": "^"}.get(op)
            if sign:
                return f"({given[0]}) {sign} ({given[1]})"
            if op == "not":
                return f"!({given[0]})" if kind == "pred" else f"~({given[0]})"
            if op == "popc":
                return f"__builtin_popcountll({given[0]})"
            if op == "prmt" and len(parts) == 1:
                return f"prmt({', '.join(given)})"
        a, b, c = [*(self.get(kind, operand, ftz) for operand in given), "", "", ""][:3]
        if "wide" in parts:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            added = f" + {wide}::get({given[2]})" if op == "mad" else ""
            return f"{wide}::put(Value<{wide}>({a}) * Value<{wide}>({b}){added})"
        if op == "mul" and "hi" in parts:
            return f"mul_hi<{kind}>({given[0]}, {given[1]})"
        whole = kind[0] in "su"
        nan = str("NaN" in parts).lower()
        unsigned = f"std::make_unsigned_t<Value<{kind}>>" if whole else ""
        expressions = {
            "add": f"{unsigned}({a}) + {unsigned}({b})", "sub": f"{unsigned}({a}) - {unsigned}({b})",
            "mul": f"{unsigned}({a}) * {unsigned}({b})", "mad": f"{unsigned}({a}) * {unsigned}({b}) + {unsigned}({c})",
            "div": f"divided({a}, {b})", "rem": f"remainder({a}, {b})", "neg": f"-({a})",
            "abs": f"std::abs({a})",
            "max": f"extreme<true>({a}, {b}, {nan})", "min": f"extreme<false>({a}, {b}, {nan})",
        }  # fmt: skip
        if op not in expressions:
            raise NotImplementedError(f"{op}.{'.'.join(parts)}")
        out = expressions[op]
        if op in ("add", "sub", "mul") and {"rn", "rz"} & set(parts):
            out = f"alone({out})"
        if whole:
            out = f"Value<{kind}>({out})"
        return f"{kind}::put({f'flushed({out})' if ftz else out})"

    def get(self, kind: str, operand: str, ftz: bool) -> str:
        return f"flushed({kind}::get({operand}))" if ftz else f"{kind}::get({operand})"

    def convert(self, parts: list[str], given: list[str]) -> str:
        to, source = parts[-2], parts[-1]
        if "sat" in parts or "relu" in parts:
            raise NotImplementedError("cvt." + ".".join(parts))
        if to in ("bf16x2", "f16x2"):
            return f"cvt_pair<{to.removesuffix('x2')}>({given[0]}, {given[1]})"
        how = next((_ROUNDINGS[part] for part in parts if part in _ROUNDINGS), "nearest")
        to_whole = str(any(part in ("rni", "rzi", "rmi", "rpi") for part in parts)).lower()
        operand = f"f32::put(flushed(f32::get({given[0]})))" if "ftz" in parts and source == "f32" else given[0]
        return f"cvt<{to}, {source}, Round::{how}, {to_whole}>({operand})"

    def compare(self, parts: list[str], operands: list[str]) -> str:
        how, kind = _SYNONYMS.get(parts[0], parts[0]), parts[-1]
        a, b, *more = [_value(operand) for operand in operands[1:]]
        if kind in ("bf16x2", "f16x2"):
            half = kind.removesuffix("x2")
            low, high = (_name(part) for part in operands[0].split("|"))
            return (
                f"{low} = setp(Compare::{how}, {half}::get(({a}) & 0xffff), {half}::get(({b}) & 0xffff)); "
                f"{high} = setp(Compare::{how}, {half}::get(({a}) >> 16), {half}::get(({b}) >> 16));"
            )
        ftz = "ftz" in parts
        out = f"setp(Compare::{how}, {self.get(kind, a, ftz)}, {self.get(kind, b, ftz)})"
        if more:
            sign = {"and": "&&", "or": "||", "xor": "!="}[parts[1]]
            out = f"({out} {sign} {more[0]})"
        first, *second = operands[0].split("|")
        out = f"{_name(first)} = {out};"
        return out + (f" {_name(second[0])} = !{_name(first)};" if second else "")

    def move(self, kind: str, operands: list[str]) -> str:
        target, source = operands
        if target.startswith("{"):
            names = [name.strip() for name in target.strip("{}").split(",")]
            width = int(kind[1:]) // len(names)
            whole = f"uint64_t({_value(source)})"
            return " ".join(f"{_name(name)} = {whole} >> {i * width};" for i, name in enumerate(names) if name != "_")
        if source.startswith("{"):
            names = [_value(name.strip()) for name in source.strip("{}").split(",")]
            width = int(kind[1:]) // len(names)
            mask = (1 << width) - 1
            joined = " | ".join(f"(uint64_t({name}) & {mask:#x}) << {i * width}" for i, name in enumerate(names))
            return f"{_name(target)} = {joined};"
        return f"{_name(target)} = {_value(source)};"

    def memory(self, op: str, parts: list[str], operands: list[str]) -> str:
        kind = parts[-1]
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
        place, values = (operands[1], operands[0]) if op != "st" else (operands[0], operands[1])
        names = [value.strip() for value in values.strip("{}").split(",")]
        if "param" in parts:
            slot = _name(place.strip("[] "))
            if op == "st":
                return f"{slot} = {_value(names[0])};"
            wide = f"int64_t({kind}::get({slot}))" if kind[0] == "s" else slot
            return f"{_name(names[0])} = {wide};"
        space = "shared" if any(part.startswith("shared") for part in parts) else "global"
        pointer = f"{space}<Value<{kind}>, {count}>({_address(place)})"
        if op == "st":
            return f"store<{kind}>({pointer}, {', '.join(_value(name) for name in names)});"
        return f"load<{kind}>({pointer}, {', '.join(_name(name) for name in names)});"

    def shuffle(self, how: str, operands: list[str]) -> str:
        target, value, lane, clamp, mask = operands
        if clamp not in ("31", "0x1f") or "|" in target:
            raise NotImplementedError(f"shfl with {clamp}, {target}")
        source = {"bfly": f"cudahost::lane() ^ {lane}", "idx": lane}[how].replace("%", "_")
        return f"{_name(target)} = cudahost::shuffle({_value(mask)}, {_value(value)}, ({source}) & 31, true);"

    def atomic(self, op: str, parts: list[str], operands: list[str]) -> str:
        kind = parts[-1]
        name = next(part for part in parts if part in ("add", "exch", "cas", "min", "max", "or", "and"))
        target = operands.pop(0) if op == "atom" else None
        space = "shared" if any(part.startswith("shared") for part in parts) else "global"
        pointer = f"{space}<Value<{kind}>, 1>({_address(operands[0])})"
        a, b = [*(f"{kind}::get({_value(operand)})" for operand in operands[1:]), ""][:2]
        change = {
            "add": f"old + {a}", "exch": a, "cas": f"old == {a} ? {b} : old", "min": f"extreme<false>(old, {a}, false)",
            "max": f"extreme<true>(old, {a}, false)", "or": f"old | {a}", "and": f"old & {a}",
        }[name]  # fmt: skip
        out = f"cudahost::atomically({pointer}, [&](Value<{kind}> old) {{ return Value<{kind}>({change}); }})"
        # The order that an atomic makes is that of a fence here.
        fence = "__threadfence(); " if {"acq_rel", "acquire", "release"} & set(parts) else ""
        return fence + (f"{_name(target)} = {kind}::put({out});" if target and target != "_" else f"{out};") + fence


def _split(operands: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for character in operands:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if operands.strip() else []


_SPECIAL = {
    "%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ctaid.y": "blockIdx.y", "%ctaid.z": "blockIdx.z",
    "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x", "%nctaid.y": "gridDim.y", "%nctaid.z": "gridDim.z",
    "%laneid": "uint32_t(cudahost::lane())", "%warpid": "threadIdx.x / 32",
}  # fmt: skip


def _value(operand: str) -> str:
    if operand in _SPECIAL:
        return _SPECIAL[operand]
    if operand.startswith("%") or operand == "tmp":
        return _name(operand)
    if operand.startswith(("0f", "0F", "0d", "0D")) and len(operand) > 4:
        return f"0x{operand[2:]}ull"
    if re.fullmatch(r"-?\d+", operand):
        return f"uint64_t({operand}{'ll' if -(2**63) < int(operand) < 2**63 else 'ull'})"
    if re.fullmatch(r"0x[0-9a-fA-F]+U?", operand):
        return f"{operand.rstrip('U')}ull"
    if operand == "global_smem":
        return "uint64_t(0)"
    if operand.startswith("!%"):
        return f"!{_name(operand[1:])}"
    if re.fullmatch(r"[\w$]+", operand):
        return f"reinterpret_cast<uint64_t>({_name(operand)})"
    raise NotImplementedError(f"operand {operand}")


def _address(operand: str) -> str:
    base, _, offset = (part.strip() for part in operand.strip("[] ").partition("+"))
    return f"{_value(base)} + ({offset or 0})"


@functools.cache
def _precompiled(variant: tuple[str, ...]) -> list[str]:
    """The options that give a kernel's source its headers, compiled once."""
    source = cudahost.HERE / "ptx.h"
    command = [*cudahost._compiler(), *cudahost.COMPILE, *variant, f"-isystem{cudahost.cuda_home() / 'include'}"]
    content = hashlib.sha256(repr((command, sys.version)).encode())
    for path in (source, cudahost.HERE / "cudahost.h"):
        content.update(path.read_bytes())
    header = cudahost.BUILD / f"ptx-{content.hexdigest()[:16]}.h"
    cudahost._make(header.with_suffix(".h.gch"), [*command, "-x", "c++-header", str(source)], None)
    return ["-include", str(header)]


@functools.cache
def _library(source: str, sanitizer: str) -> ctypes.CDLL:
    variant = ("-Wno-unused", "-Wno-overflow")
    variant += (f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer") if sanitizer else ()
    made = cudahost._compile("ptx", source, [*variant, *_precompiled(variant)], [])
    library = ctypes.CDLL(str(cudahost._link(made, options=variant[2:])))
    library.launch.restype = ctypes.c_char_p
    library.launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 4, ctypes.c_size_t]
    return library


def _flat(types: object, values: object) -> Iterator[object]:
    """The arguments that the compiled kernel takes: those that are no constants, out of their tuples."""
    for kind, value in zip(types, values):
        if isinstance(kind, (tuple, list)):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield value


def launch(kernel: object, grid: tuple[int, int, int], arguments: list[object], variant: str = "") -> None:
    """Runs a kernel that Triton compiled."""
    made = translate(kernel.asm["ptx"])
    values = list(_flat(kernel.src.signature.values(), arguments))
    assert len(values) <= len(made.parameters) <= len(values) + 2, (made.name, len(values), made.parameters)
    slots = (ctypes.c_uint64 * max(len(made.parameters), 1))()  # scratch memory, which kernels here do not use, is null
    for i, (kind, value) in enumerate(zip(made.parameters, values)):
        value = value.data_ptr() if hasattr(value, "data_ptr") else value
        if kind in ("f32", "f64"):
            slots[i] = int.from_bytes(struct.pack({"f32": "<f", "f64": "<d"}[kind], value), "little")
        else:
            slots[i] = value & ((1 << int(kind[1:])) - 1)  # of whatever sign
    message = _library(made.source, variant).launch(
        slots, *grid, 32 * kernel.metadata.num_warps, kernel.metadata.shared
    )
    if message:
        raise RuntimeError(f"{made.name}: {message.decode()}")


def install(arch: int) -> None:
    """From now on Triton kernels are compiled for sm_`arch` and run here; call it before anything imports Triton."""
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.compiler import CompiledKernel

    from fastreg import _backends

    def load(kernel: CompiledKernel) -> None:
        def call(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
            launch(kernel, (x, y, z), arguments, os.environ.get(cudahost.SANITIZE, ""))

        kernel._run = call

    CompiledKernel._init_handles = load
    triton.runtime.driver.set_active(offline_driver(arch))
    _backends.interpreting = lambda: True  # that is, they take tensors of the CPU
