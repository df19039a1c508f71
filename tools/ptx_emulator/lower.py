"""From parsed PTX to the interpreter's code: names and immediates become rows, labels become indices."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .build import native
from .errors import UnsupportedInstructionError
from .ptx import TYPE_BYTES, InstructionText, KernelText, ModuleText, Scope, Variable, split_operands
from .register_use import Virtual, async_registers_of, mentions_of, tracked_by
from .registers import assign_rows
from .signatures import (
    ADDRESS,
    INTEGER,
    LABEL,
    OPTIONAL,
    PREDICATE,
    TENSOR,
    VECTOR,
    WITH_PREDICATE,
    Signature,
    signature,
    warpgroup_multiply,
)

_SPECIAL = (
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid"),
    *("%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge"),
    *("%dynamic_smem_size", "%total_smem_size"),
)
# A launch has clusters of one block.
_CLUSTER = {f"%clusterid.{axis}": f"%ctaid.{axis}" for axis in "xyz"}
_CLUSTER |= {f"%nclusterid.{axis}": f"%nctaid.{axis}" for axis in "xyz"}
_CLUSTER |= {f"%cluster_ctaid.{axis}": "0" for axis in "xyz"} | {"%cluster_ctarank": "0"}
_CLUSTER |= {f"%cluster_nctaid.{axis}": "1" for axis in "xyz"} | {"%cluster_nctarank": "1"}
_CLOCKS = {"%clock": "clock.u32", "%clock64": "clock.u64", "%globaltimer": "clock.u64"}
_ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_TENSOR = re.compile(r"\[\s*([^,\]]+?)\s*,\s*(\{[^}]*\})\s*\]$")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_DECIMAL = re.compile(r"-?\d+\.\d*([eE][-+]?\d+)?$")
_NO_ROW = -1
ABSENT = "absent"
_SM_90A = re.compile(r"wgmma\.|setmaxnreg\.")
_SM_90 = re.compile(
    r"cp(\.reduce)?\.async\.bulk|barrier\.cluster|mapa\.|fence\.(proxy\.async|mbarrier_init)"
    r"|mbarrier\.(try_wait|expect_tx|complete_tx|arrive\.expect_tx)"
)
_REGISTER_FILE = 65536


@dataclass(frozen=True)
class Location:
    """Where an instruction comes from: a line of the PTX text, and `file:line` of the source under -lineinfo."""

    ptx_line: int
    source: str | None
    text: str


@dataclass
class LoweredKernel:
    name: str
    text: KernelText
    operations: list[str]
    code: NDArray[np.int32]
    locations: list[Location]
    static_shared_bytes: int
    local_bytes: int
    n_rows: int
    native: object = field(repr=False)


@dataclass(frozen=True)
class ModuleLayout:
    """Addresses of the module's constant and global variables."""

    addresses: dict[str, int]
    constants: bytes


def lay_out_module(module: ModuleText) -> ModuleLayout:
    constants = bytearray()
    addresses: dict[str, int] = {}
    n_global = 0
    for variable in module.variables.values():
        if variable.space == "const":
            constants += bytes(-len(constants) % variable.align)
            addresses[variable.name] = len(constants)
            constants += variable.initial or bytes(variable.size)
        elif variable.space == "global":
            addresses[variable.name] = native().variable_address(n_global)
            n_global += 1
    return ModuleLayout(addresses, bytes(constants))


def _fits(declared: str, type_name: str, widest: int) -> bool:
    """Whether a register of one type may stand where an instruction wants the other."""
    if declared == "pred" or type_name == "any":
        return type_name == "any" and declared != "pred"
    width, needed = TYPE_BYTES[declared], TYPE_BYTES[type_name]
    if widest:
        return width == needed or needed < width <= widest
    # Bits go with everything, signed with unsigned, floating point only with itself.
    mixed = {declared[0], type_name[0]} in ({"f", "s"}, {"f", "u"})
    return width == needed and not mixed


def _lookup(scope: Scope | None, table: str, name: str) -> tuple[int, str | int | Variable] | None:
    """What `name` is in the innermost scope that declares it, with that scope's identity."""
    while scope is not None:
        found = getattr(scope, table).get(name)
        if found is not None:
            return id(scope), found
        scope = scope.parent
    return None


def _float_bits(value: float, width: int) -> int:
    return int.from_bytes(struct.pack("<d" if width == 64 else "<f", value), "little")


def _immediate_bits(text: str, type_name: str) -> int | None:
    """The bits of an immediate operand, or None if the text is not one."""
    width = 8 * TYPE_BYTES[type_name]
    if text == "WARP_SZ":
        return 32
    if _INTEGER.match(text):
        digits = text.rstrip("U")
        value = int(digits, 8 if re.match(r"-?0[0-7]+$", digits) else 0)
        return _float_bits(value, width) if type_name in ("f32", "f64") else value % (1 << width)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        bits = int(text[2:], 16)
        return _float_bits(struct.unpack("<f", struct.pack("<I", bits))[0], 64) if width == 64 else bits
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        bits = int(text[2:], 16)
        return bits if width == 64 else _float_bits(struct.unpack("<d", struct.pack("<Q", bits))[0], 32)
    return _float_bits(float(text), width) if _DECIMAL.match(text) else None


class _Lowering:
    def __init__(self, module: ModuleText, layout: ModuleLayout, kernel: KernelText) -> None:
        self.module = module
        self.kernel = kernel
        self.symbols = dict(layout.addresses)
        self.symbols.update({parameter.name: parameter.offset for parameter in kernel.parameters})
        self.registers: dict[tuple[int, str], int] = {}  # virtual register → number
        self.wide: list[bool] = []  # by number: 64 bits
        self.predicates: dict[tuple[int, str], int] = {}
        self.constants: dict[tuple[int, int], int] = {}  # (bits, width) → number
        self.local_bytes = 0
        self.current: InstructionText = kernel.instructions[0]
        self.static_shared_end = self.lay_out_variables()

    def fail(self, message: str) -> UnsupportedInstructionError:
        operands = ", ".join(self.current.operands)
        return UnsupportedInstructionError(
            f"{message} in {self.current.opcode} {operands} (kernel {self.kernel.name}, PTX line {self.current.line})"
        )

    def lay_out_variables(self) -> int:
        """Addresses of the shared and local variables that the kernel mentions; returns the end of static memory."""
        mentioned: dict[str, Variable] = {}
        for instruction in self.kernel.instructions:
            for name in re.findall(r"[A-Za-z_$][\w$]*", " ".join(instruction.operands)):
                found = _lookup(instruction.scope, "variables", name)
                if found is not None and isinstance(found[1], Variable):
                    mentioned[name] = found[1]
        end: int = native().SHARED_BASE
        for variable in mentioned.values():
            if variable.space == "shared" and not variable.extern:
                end = -(-end // variable.align) * variable.align
                self.symbols[variable.name] = end
                end += variable.size
            elif variable.space == "local":
                self.local_bytes = -(-self.local_bytes // variable.align) * variable.align
                self.symbols[variable.name] = self.local_bytes
                self.local_bytes += variable.size
        dynamic = [v for v in mentioned.values() if v.space == "shared" and v.extern]
        for variable in dynamic:
            end = -(-end // variable.align) * variable.align
        for variable in dynamic:
            self.symbols[variable.name] = end
        return end

    def new_register(self, wide: bool) -> int:
        self.wide.append(wide)
        return Virtual(len(self.wide) - 1)

    def constant(self, bits: int, width: int) -> int:
        width = max(width, 32)
        key = (bits, width)
        if key not in self.constants:
            self.constants[key] = self.new_register(width == 64)
        return self.constants[key]

    def predicate(self, text: str) -> int:
        negated = text.startswith("!")
        name = text.lstrip("!").strip()
        flag = native().NEGATED_PREDICATE if negated else 0
        if name in ("0", "1", "-1"):
            return int(name != "0") | flag
        found = _lookup(self.current.scope, "registers", name)
        if found is None or found[1] != "pred":
            raise self.fail(f"{name!r} is not a predicate")
        # Predicate 0 is false and predicate 1 is true.
        return self.predicates.setdefault((found[0], name), len(self.predicates) + 2) | flag

    def register(self, text: str, type_name: str, widest: int) -> int:
        """Number of the virtual register, special register or constant that `text` names."""
        if text == "_":
            return _NO_ROW
        if text.startswith("{") and "," not in text:  # a vector of one
            text = text[1:-1].strip()
        text = _CLUSTER.get(text, text)
        if text in _SPECIAL:
            return _SPECIAL.index(text)
        found = _lookup(self.current.scope, "registers", text)
        if found is not None:
            declared = str(found[1])
            if not _fits(declared, type_name, widest):
                raise self.fail(f"register {text} of type .{declared} as .{type_name}")
            key = (found[0], text)
            if key not in self.registers:
                self.registers[key] = self.new_register(TYPE_BYTES[declared] == 8)
            return self.registers[key]
        if text in self.symbols:
            return self.constant(self.symbols[text], 8 * TYPE_BYTES[type_name])
        bits = _immediate_bits(text, "u32" if type_name == "any" else type_name)
        if bits is None:
            raise self.fail(f"unknown operand {text!r}")
        return self.constant(bits, 8 * TYPE_BYTES.get(type_name, 4))

    def address(self, text: str) -> list[int]:
        match = _ADDRESS.match(text)
        if not match:
            raise self.fail(f"cannot read the address {text!r}")
        base, offset_text = match.groups()
        offset = int(offset_text, 0) if offset_text else 0
        found = _lookup(self.current.scope, "registers", base)
        type_name = str(found[1]) if found else "u64"
        if type_name not in ("b32", "u32", "s32", "b64", "u64", "s64"):
            raise self.fail(f"address register {base} of type .{type_name}")
        return [self.register(base, type_name, 0), int(TYPE_BYTES[type_name] == 8), offset]

    def tensor(self, text: str, rank: int) -> list[int]:
        match = _TENSOR.match(text)
        if not match:
            raise self.fail(f"cannot read the tensor coordinates {text!r}")
        if "+" in match.group(1):
            raise self.fail("an offset from the address of a tensor map")
        coordinates = self.vector(match.group(2), "s32", 0)
        if len(coordinates) != rank:
            raise self.fail(f"{len(coordinates)} coordinates for {rank} dimensions")
        return [*self.address(f"[{match.group(1)}]"), *coordinates]

    def integer(self, text: str) -> int:
        if not _INTEGER.match(text):
            raise self.fail(f"{text!r} is not an integer")
        return int(text, 0)

    def vector(self, text: str, type_name: str, widest: int) -> list[int]:
        parts = split_operands(text.strip()[1:-1]) if text.startswith("{") else [text]
        return [self.register(part, type_name, widest) for part in parts]

    def with_predicate(self, text: str, of_setp: bool) -> list[int]:
        first, _, second = (part.strip() for part in text.partition("|"))
        if of_setp:
            head = _NO_ROW if first == "_" else self.predicate(first)
        else:
            head = self.register(first, "b32", 0)
        return [head, _NO_ROW if second in ("", "_") else self.predicate(second)]

    def move(self, instruction: InstructionText) -> tuple[str, list[str], tuple[str, ...]]:
        """mov packs, unpacks, reads clocks, or moves."""
        type_name = instruction.opcode.split(".")[-1]
        destination, source = instruction.operands
        if source in _CLOCKS:
            return _CLOCKS[source], [destination], ("any",)
        if type_name == "pred":
            return "mov.pred", instruction.operands, (PREDICATE, PREDICATE)
        bits = 8 * TYPE_BYTES.get(type_name, 0)
        for whole, parts, name in ((source, destination, "unpack"), (destination, source, "pack")):
            if parts.startswith("{"):
                count = len(split_operands(parts[1:-1]))
                part_type = f"b{bits // count}"
                if name == "unpack":
                    return f"unpack.{count}.b{bits}", [parts, whole], (VECTOR + part_type, type_name)
                return f"pack.{count}.b{bits}", [whole, parts], (type_name, VECTOR + part_type)
        return instruction.opcode, instruction.operands, (type_name, type_name)

    def operands(self, texts: list[str], sig: Signature) -> list[int]:
        classes = list(sig.operands)
        needed = sum(not kind.startswith(OPTIONAL) for kind in classes)
        if not needed <= len(texts) <= len(classes):
            raise self.fail(f"{len(texts)} operands")
        # The optional operand need not be the last.
        while len(texts) < len(classes):
            position = max(i for i, kind in enumerate(classes) if kind.startswith(OPTIONAL))
            texts = [*texts[:position], "_", *texts[position:]]
            classes[position] = ABSENT
        result: list[int] = []
        for kind, text in zip(classes, texts, strict=True):
            plain = kind.removeprefix(OPTIONAL)
            if plain == ABSENT:
                result.append(_NO_ROW)
            elif plain == ADDRESS:
                result += self.address(text)
            elif plain.startswith(TENSOR):
                result += self.tensor(text, int(plain.removeprefix(TENSOR)))
            elif plain == INTEGER:
                result.append(self.integer(text))
            elif plain == PREDICATE:
                result.append(self.predicate(text))
            elif plain == WITH_PREDICATE:
                result += self.with_predicate(text, sig.operation.startswith("setp"))
            elif plain.startswith(VECTOR):
                result += self.vector(text, plain.removeprefix(VECTOR), sig.widest)
            else:
                result.append(self.register(text, plain, sig.widest))
        return result

    def target(self, text: str) -> int:
        found = _lookup(self.current.scope, "labels", text)
        if found is None or not isinstance(found[1], int):
            raise self.fail(f"unknown label {text!r}")
        return found[1]

    def require_target(self, opcode: str) -> None:
        """sm_90a code is for that architecture alone, which the letter says."""
        target = self.module.target
        if _SM_90A.match(opcode) and target != "sm_90a":
            raise self.fail(f"target {target} in place of sm_90a")
        if _SM_90.match(opcode) and int(re.sub(r"\D", "", target)) < 90:
            raise self.fail(f"target {target} older than sm_90")

    def instruction(self, instruction: InstructionText) -> tuple[str, list[int], int]:
        """Operation, operands (Virtual where they are registers) and branch target."""
        self.current = instruction
        texts = instruction.operands
        self.require_target(instruction.opcode)
        if instruction.opcode.split(".")[0] == "mov":
            operation, texts, classes = self.move(instruction)
            sig = Signature(operation, classes)
        elif instruction.opcode.startswith("wgmma.mma_async") and len(texts) > 2:
            sig = warpgroup_multiply(instruction.opcode, texts[1].startswith("{"))
        else:
            try:
                sig = signature(instruction.opcode)
            except UnsupportedInstructionError:
                raise self.fail("unsupported instruction") from None
        if sig.operation not in _operations():
            raise self.fail("unsupported instruction")
        if sig.operands == (LABEL,):
            return sig.operation, [], self.target(texts[0])
        if sig.operation == "no_effect":
            return sig.operation, [], 0
        operands = self.operands(texts, sig)
        if sig.operation.startswith("setmaxnreg"):
            count = self.integer(texts[0])
            if count % 8 or not 24 <= count <= 256:
                raise self.fail(f"register count {count}, which must be a multiple of 8 from 24 to 256,")
        if sig.operation in ("cp.async.ca.shared.global", "cp.async.cg.shared.global"):
            sizes = (16,) if ".cg." in sig.operation else (4, 8, 16)
            if self.integer(texts[2]) not in sizes:
                raise self.fail(f"copy size {texts[2]}")
        if len(operands) > native().MAX_OPERANDS:
            raise self.fail("too many operands")
        return sig.operation, operands, 0

    def location(self, instruction: InstructionText) -> Location:
        source = None
        if instruction.source is not None:
            where = instruction.source
            source = f"{self.module.files.get(where.file, '?')}:{where.line}"
            if where.inlined_at is not None:
                file, line = where.inlined_at
                source += f" (inlined at {self.module.files.get(file, '?')}:{line})"
        return Location(instruction.line, source, f"{instruction.opcode} {', '.join(instruction.operands)}".strip())

    def run(self) -> LoweredKernel:
        columns = 4 + native().MAX_OPERANDS
        body = self.kernel.instructions
        code = np.full((len(body) + 1, columns), _NO_ROW, dtype=np.int32)
        operations: list[str] = []
        lowered: list[list[int]] = []
        mentions: list[tuple[int, int, bool]] = []
        loops: list[tuple[int, int]] = []
        skips: list[tuple[int, int]] = []
        for position, instruction in enumerate(body):
            operation, operands, target = self.instruction(instruction)
            guard = _NO_ROW
            if instruction.guard is not None:
                guard = self.predicate(("!" if instruction.guard_negated else "") + instruction.guard)
            wide = sum(1 << i for i, n in enumerate(operands[:31]) if isinstance(n, Virtual) and self.wide[n])
            code[position, :4] = guard, target, wide, len(operands)
            operations.append(operation)
            lowered.append(operands)
            mentions += mentions_of(position, operation, operands, instruction.guard is not None)
            if operation == "bra" and target <= position:
                loops.append((target, position))
            elif operation == "bra":
                skips.append((position, target))
        constants = frozenset(self.constants.values())
        async_registers = async_registers_of(operations, lowered, constants)
        # A register that wgmma uses may be in use long after its last mention.
        permanent = sorted(constants | async_registers)
        rows, n_rows = assign_rows(mentions, self.wide, permanent, loops, skips, native().SPECIAL_ROWS)
        for position, operands in enumerate(lowered):
            code[position, 4 : 4 + len(operands)] = [rows[n] if isinstance(n, Virtual) else n for n in operands]
        # Text that ends without a return ends the thread.
        code[-1, :4] = _NO_ROW, 0, 0, 0
        operations.append("exit")
        locations = [self.location(instruction) for instruction in body]
        locations.append(Location(body[-1].line, None, "end of kernel"))
        by_width: dict[int, list[tuple[int, int]]] = {32: [], 64: []}
        for (bits, width), number in self.constants.items():
            by_width[width].append((rows[number], bits))
        tracked: list[int] = []
        tracked_ends: list[int] = []
        moves: list[bool] = []
        for operation, operands in zip(operations, [*lowered, []], strict=True):
            entries, is_move = tracked_by(operation, operands, async_registers)
            tracked += [rows[n] << 1 | written for n, written in entries]
            tracked_ends.append(len(tracked))
            moves.append(is_move)
        built = native().Kernel(
            operations, code, tracked, tracked_ends, moves, n_rows, len(self.predicates) + 2, self.static_shared_end,
            self.local_bytes, _registers_per_thread(self.kernel), by_width[32], by_width[64],
        )  # fmt: skip
        static_bytes = self.static_shared_end - native().SHARED_BASE
        return LoweredKernel(
            self.kernel.name, self.kernel, operations, code, locations, static_bytes, self.local_bytes, n_rows, built
        )


def _registers_per_thread(kernel: KernelText) -> int:
    """What the launch bounds let the assembler use, 0 when there are none."""
    if "maxnreg" in kernel.directives:
        return kernel.directives["maxnreg"][0]
    threads = kernel.directives.get("reqntid") or kernel.directives.get("maxntid")
    if not threads:
        return 0
    blocks = kernel.directives.get("minnctapersm", (1,))[0]
    return min(_REGISTER_FILE // (int(np.prod(threads)) * blocks) // 8 * 8, 255)


@cache
def _operations() -> frozenset[str]:
    return frozenset(native().operations())


def lower(module: ModuleText, layout: ModuleLayout, kernel: KernelText) -> LoweredKernel:
    """Lower one kernel. Raises UnsupportedInstructionError for anything that the interpreter does not implement."""
    return _Lowering(module, layout, kernel).run()
