"""Which operation an opcode names, and which operands it takes.

An operand is described by one character class: a PTX type for a register or an immediate, or one of the words of
`Kind`. Whether the interpreter knows the operation is the registry's to say, not this table's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import UnsupportedInstructionError
from .ptx import TYPE_BYTES

ADDRESS = "address"
LABEL = "label"
PREDICATE = "pred"
# `d|p`: a register or predicate, then a predicate; either may be absent.
WITH_PREDICATE = "with predicate"
# [address, {coordinates}]: a tensor map and where in the tensor; the number of coordinates follows.
TENSOR = "tensor "
# A literal integer.
INTEGER = "integer"
# An operand that may be left out at the end.
OPTIONAL = "optional "
# { } of registers; the type follows.
VECTOR = "vector "

_CACHE_HINTS = re.compile(
    r"(ca|cg|cs|lu|cv|wb|wt|nc|weak|cta|cluster|gpu|sys|L1::(?!cache)\w+|L2::(64B|128B|256B|evict_\w+))$"
)
_SHARED = frozenset(("shared", "shared::cta", "shared::cluster"))
_RELAXED_OR_SCOPE = frozenset(("relaxed", "cta", "cluster", "gpu", "sys"))
_ORDERS = frozenset(("acquire", "release", "acq_rel"))
_FENCE = re.compile(r"membar\.(cta|gl|sys)|fence(\.(sc|acq_rel|acquire|release))?\.(cta|cluster|gpu|sys)")
_PROXY_FENCE = re.compile(r"fence\.proxy\.async(\.shared::(cta|cluster)|\.global)?")
_NO_EFFECT = re.compile(
    r"(prefetchu?|cp\.async\.bulk\.prefetch|createpolicy)\.[\w.:]+|nanosleep\.u32"
    r"|griddepcontrol\.(wait|launch_dependents)"
)
_UNARY = frozenset(
    ("mov", "neg", "abs", "not", "cnot", "brev", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
)
_TERNARY = frozenset(("fma", "mad", "madc", "sad"))


@dataclass(frozen=True)
class Signature:
    """`operation` is the interpreter's name; `operands` one class per operand.

    `widest`: bytes of the widest register that may hold a narrower operand type.
    """

    operation: str
    operands: tuple[str, ...]
    widest: int = 0


def _widened(type_name: str) -> str:
    return f"{type_name[0]}{2 * int(type_name[1:])}"


def _without_hints(parts: list[str]) -> list[str]:
    # Of a cluster of one block.
    spaces = {"shared::cta": "shared", "shared::cluster": "shared", "param::entry": "param", "volatile": "relaxed"}
    return [spaces.get(part, part) for part in parts if not _CACHE_HINTS.match(part)]


def _memory(opcode: str, parts: list[str]) -> Signature:
    words = _without_hints(parts[1:])
    # The assembler takes the order and the space in any order.
    kept = sorted(words, key=lambda word: word not in (*_ORDERS, "relaxed"))
    value = kept[-1]
    if any(part in ("v2", "v4") for part in kept):
        value = VECTOR + value
    operation = ".".join(["st" if opcode == "st" else "ld", *kept])
    return Signature(operation, (ADDRESS, value) if opcode == "st" else (value, ADDRESS), widest=8)


def _atomic(opcode: str, parts: list[str]) -> Signature:
    words = ["shared" if part in _SHARED else part for part in parts[1:] if part not in _RELAXED_OR_SCOPE]
    # The assembler takes the order and the space in any order.
    kept = [*(w for w in words if w in _ORDERS), *(w for w in words if w not in _ORDERS)]
    type_name = kept[-1]
    sources = (type_name, type_name) if "cas" in kept else (type_name,)
    result = (type_name,) if opcode == "atom" else ()
    return Signature(".".join([opcode, *kept]), (*result, ADDRESS, *sources))


def _barrier(parts: list[str]) -> Signature:
    if parts[:2] == ["bar", "warp"]:
        return Signature("bar.warp.sync", ("b32",))
    kept = [part for part in parts[1:] if part not in ("cta", "aligned")]
    operation = ".".join(["bar", *kept])
    count = OPTIONAL + "u32"
    if kept[0] == "red":
        return Signature(operation, ("u32" if kept[-1] == "u32" else PREDICATE, "u32", count, PREDICATE))
    return Signature(operation, ("u32", count))


def _copy_async(opcode: str, parts: list[str]) -> Signature:
    if parts[2] == "commit_group" or parts[2] == "wait_all":
        return Signature(opcode, ())
    if parts[2] == "wait_group":
        return Signature(opcode, ("u32",))
    kept = ["shared" if part == "shared::cta" else part for part in parts if not re.match(r"L2::(64|128|256)B$", part)]
    return Signature(".".join(kept), (ADDRESS, ADDRESS, "u32", OPTIONAL + "u32"))


def _mbarrier(opcode: str, parts: list[str]) -> Signature:
    dropped = ("release", "acquire", "cta", "cluster")
    kept = [part for part in parts if part not in dropped and part not in _SHARED and part not in ("relaxed", "b64")]
    order = ["relaxed"] if "relaxed" in parts else []
    space = ["shared"] if _SHARED.intersection(parts) else []
    operation = ".".join([*kept, *order, *space, "b64"])
    kind = kept[1]
    if kind in ("init", "expect_tx", "complete_tx"):
        return Signature(operation, (ADDRESS, "u32"))
    if kind == "inval":
        return Signature(operation, (ADDRESS,))
    if kind == "arrive":
        return Signature(operation, ("b64", ADDRESS, "u32" if "expect_tx" in kept else OPTIONAL + "u32"))
    if kind in ("test_wait", "try_wait"):
        return Signature(operation, (PREDICATE, ADDRESS, "u32" if "parity" in kept else "b64", OPTIONAL + "u32"))
    raise UnsupportedInstructionError(f"unsupported instruction {opcode}")


def _bulk_copy(opcode: str, parts: list[str]) -> Signature:
    if parts[-1] == "commit_group":
        return Signature(opcode, ())
    if "wait_group" in parts:
        return Signature(opcode, ("u32",))
    reduces = parts[1] == "reduce"
    words = parts[(4 if reduces else 3) :]
    spaces = [part for part in words if part in _SHARED or part == "global"]
    tensor = words[0] == "tensor"
    kept = [
        part
        for part in words
        if part not in (*spaces, "tile", "bulk_group", "mbarrier::complete_tx::bytes", "L2::cache_hint")
    ]
    hint = (OPTIONAL + "b64",) if "L2::cache_hint" in parts else ()
    loads = spaces[0] != "global"
    completion = "mbarrier::complete_tx::bytes" if loads else "bulk_group"
    if len(spaces) != 2 or completion not in parts or (loads and spaces[1] != "global"):
        raise UnsupportedInstructionError(f"unsupported instruction {opcode}")
    prefix = "cp.reduce.async.bulk" if reduces else "cp.async.bulk"
    operation = ".".join([prefix, *kept, *(() if reduces else ("load" if loads else "store",))])
    if tensor:
        box = TENSOR + kept[1].removesuffix("d")
        return Signature(operation, (ADDRESS, box, ADDRESS, *hint) if loads else (box, ADDRESS, *hint))
    operands = (ADDRESS, ADDRESS, "u32", ADDRESS) if loads else (ADDRESS, ADDRESS, "u32")
    return Signature(operation, (*operands, *hint))


def warpgroup_multiply(opcode: str, a_in_registers: bool) -> Signature:
    """wgmma.mma_async, whose operand A is four registers or a descriptor."""
    transposes = not opcode.endswith(".tf32.tf32")
    integers = 2 + (0 if not transposes else 1 if a_in_registers else 2)
    a = VECTOR + "b32" if a_in_registers else "b64"
    return Signature(opcode, (VECTOR + "f32", a, "b64", PREDICATE, *(INTEGER,) * integers))


def _matrix_operation(parts: list[str]) -> str:
    """Name of an ldmatrix or stmatrix: the assembler takes the shape, the number and .trans in any order."""
    order = ("m8n8", "x1", "x2", "x4", "trans")
    middle = sorted((part for part in parts[3:-2] if part in order), key=order.index)
    others = [part for part in parts[3:-2] if part not in order]
    return ".".join([*parts[:3], *middle, *others, "shared" if parts[-2] == "shared::cta" else parts[-2], parts[-1]])


def _matrix_multiply(opcode: str, parts: list[str]) -> Signature:
    kinds = {"f16": "f16x2", "bf16": "bf16x2", "tf32": "b32", "f32": "f32"}
    if any(part not in kinds for part in parts[-4:]):
        raise UnsupportedInstructionError(f"unsupported instruction {opcode}")
    return Signature(opcode, tuple(VECTOR + kinds[part] for part in parts[-4:]))


def _arithmetic(opcode: str, parts: list[str]) -> Signature:
    base, last = parts[0], parts[-1]
    if last not in TYPE_BYTES:
        raise UnsupportedInstructionError(f"unsupported instruction {opcode}")
    operands: tuple[str, ...]
    if "wide" in parts:
        wide = _widened(last)
        operands = (wide, last, last, wide) if base == "mad" else (wide, last, last)
    elif base in ("shl", "shr"):
        operands = (last, last, "u32")
    elif base == "bfe":
        operands = (last, last, "u32", "u32")
    elif base == "bfi":
        operands = (last, last, last, "u32", "u32")
    elif base in ("popc", "clz", "bfind"):
        operands = ("u32", last)
    elif base == "slct":
        operands = (parts[-2], parts[-2], parts[-2], last)
    elif base == "selp":
        operands = (last, last, last, PREDICATE)
    elif base == "set":
        operands = (parts[-2], last, last, OPTIONAL + PREDICATE)
    elif base == "setp":
        operands = (WITH_PREDICATE, last, last, OPTIONAL + PREDICATE)
    elif base == "testp":
        operands = (PREDICATE, last)
    elif base == "dp4a":
        operands = ("b32", "b32", "b32", "b32")
    elif base == "lop3":
        operands = ("b32", "b32", "b32", "b32", "u32")
    elif base == "cvt":
        return Signature(opcode, (parts[-2], last, OPTIONAL + last), widest=4)
    else:
        operands = (last,) * (2 if base in _UNARY else 4 if base in _TERNARY else 3)
    return Signature(opcode, operands)


def signature(opcode: str) -> Signature:
    """The operation and operands of a PTX opcode. Raises UnsupportedInstructionError."""
    parts = opcode.split(".")
    base = parts[0]
    if _NO_EFFECT.fullmatch(opcode):
        return Signature("no_effect", (OPTIONAL + "any", OPTIONAL + "any"))
    if _FENCE.fullmatch(opcode):
        return Signature("fence", ())
    if _PROXY_FENCE.fullmatch(opcode):
        return Signature(re.sub("::(cta|cluster)", "", opcode), ())
    if opcode == "fence.mbarrier_init.release.cluster":
        return Signature("fence.mbarrier_init", ())
    if base == "mbarrier":
        return _mbarrier(opcode, parts)
    if base == "setmaxnreg" or opcode.startswith("wgmma.wait_group"):
        return Signature(opcode, ("u32",))
    if base == "wgmma":
        return Signature(opcode, ())
    if base == "cp" and "bulk" in parts[1:4]:
        return _bulk_copy(opcode, parts)
    if base in ("ld", "ldu", "st"):
        return _memory(base, parts)
    if base in ("atom", "red"):
        return _atomic(base, parts)
    if parts[:2] == ["barrier", "cluster"]:
        return Signature(".".join(part for part in parts if part not in ("aligned", "release", "acquire")), ())
    if base in ("bar", "barrier"):
        return _barrier(parts)
    if base == "mapa":
        return Signature(f"mapa.{parts[-1]}", (parts[-1], parts[-1], "u32"))
    if base == "cp" and parts[1:2] == ["async"] and len(parts) > 2:
        return _copy_async(opcode, parts)
    if base == "mma":
        return _matrix_multiply(opcode, parts)
    if base == "bra":
        return Signature("bra", (LABEL,))
    if opcode in ("ret", "ret.uni", "exit", "trap"):
        return Signature(base, ())
    if base in ("ldmatrix", "stmatrix"):
        operands = (VECTOR + "b32", ADDRESS)
        return Signature(_matrix_operation(parts), operands if base == "ldmatrix" else operands[::-1])
    if base == "movmatrix":
        return Signature(opcode, ("b32", "b32"))
    if base == "shfl":
        return Signature(opcode, (WITH_PREDICATE, "b32", "b32", "b32", "b32"))
    if base == "vote":
        return Signature(opcode, (PREDICATE if parts[-1] == "pred" else "b32", PREDICATE, "b32"))
    if base == "match":
        result = WITH_PREDICATE if parts[1] == "all" else "b32"
        return Signature(opcode, (result, parts[-1], "b32"))
    if base == "redux":
        return Signature(opcode, (parts[-1], parts[-1], "b32"))
    if opcode == "elect.sync":
        return Signature(opcode, (WITH_PREDICATE, "b32"))
    if base in ("shf", "prmt"):
        return Signature(opcode, ("b32",) * 4)
    if opcode == "activemask.b32":
        return Signature(opcode, ("b32",))
    if base == "cvta":
        return Signature(opcode, ("u64", "u64"))
    return _arithmetic(opcode, parts)
