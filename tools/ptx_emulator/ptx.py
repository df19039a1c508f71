"""Parser of PTX text: modules, kernels, variables, and instructions with their scopes and source lines.

It reads what nvcc and hand-written inline assembly produce and refuses the rest. Names are resolved later, in
`lower`, through the scope that every instruction carries.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

from .errors import PtxSyntaxError

_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b([^\n]*)")
_FUNCTION = re.compile(r"((?:\.(?:visible|weak|extern|common)\s+)*)\.(entry|func)\b")
_VARIABLE = re.compile(
    r"((?:\.(?:visible|weak|extern|common)\s+)*)\.(shared|local|const|global|param)\b\s*"
    r"(?:\.align\s+(\d+)\s*)?(?:\.(v[24])\s+)?\.(\w+)\s+(?:\.ptr\b[^,;)]*?)?([\w$%]+)\s*((?:\[[^\]]*\])*)\s*(?:=(.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?\s+)?"
    r"([\w$%]+)\s*(?:\[(\d+)\])?$"
)
_REGISTER = re.compile(r"([\w$%]+)\s*(?:<(\d+)>)?$")
_LOCATION = re.compile(r"\s*(\d+)\s+(\d+)\s+(\d+)")
_INLINED_AT = re.compile(r"inlined_at\s+(\d+)\s+(\d+)")
_INSTRUCTION = re.compile(r"(?:@(!?)([\w$%]+)\s+)?([A-Za-z][\w.:]*)\s*(.*)$", re.DOTALL)

TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64) if (kind, bits) != ("f", 8)} | {
    "f16x2": 4,
    "bf16": 2,
    "bf16x2": 4,
    "tf32": 4,
    "pred": 4,
    "b128": 16,
}


@dataclass(frozen=True)
class SourceLocation:
    """`file` and `line` of the innermost source line, then the places it was inlined at."""

    file: int
    line: int
    inlined_at: tuple[int, int] | None = None


@dataclass
class Scope:
    """Registers (name → type), variables and labels (name → instruction index) of one `{ }` block."""

    parent: Scope | None
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


@dataclass(frozen=True)
class Variable:
    """A variable of a state space; `size` in bytes, 0 for an unsized `.extern` array."""

    name: str
    space: str
    align: int
    size: int
    extern: bool
    initial: bytes | None = None


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: `type` is a PTX type, `offset` and `size` are bytes within the parameter buffer."""

    name: str
    type: str
    align: int
    offset: int
    size: int


@dataclass
class InstructionText:
    opcode: str
    operands: list[str]
    guard: str | None
    guard_negated: bool
    scope: Scope
    line: int
    source: SourceLocation | None


@dataclass
class KernelText:
    name: str
    parameters: list[Parameter]
    directives: dict[str, tuple[int, ...]]
    instructions: list[InstructionText]


@dataclass
class ModuleText:
    target: str
    files: dict[int, str]
    variables: dict[str, Variable]
    kernels: dict[str, KernelText]


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of `{}`, `[]` and `()`."""
    parts: list[str] = []
    depth = 0
    start = 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    tail = text[start:].strip()
    return [*parts, tail] if tail else parts


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _align_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment


def _initial_bytes(text: str, type_name: str, size: int, line: int) -> bytes:
    width = TYPE_BYTES[type_name]
    values = [item for item in re.split(r"[{},\s]+", text) if item]
    packed = bytearray()
    for value in values:
        if value.startswith(("0f", "0F", "0d", "0D")):
            packed += int(value[2:], 16).to_bytes(width, "little")
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", value):
            packed += (int(value.rstrip("U"), 0) % (1 << 8 * width)).to_bytes(width, "little")
        else:
            raise PtxSyntaxError(f"PTX line {line}: initial value {value!r} is not a number")
    return bytes(packed.ljust(size, b"\0"))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", _blank, text, flags=re.DOTALL)
        self.newlines = [match.start() for match in re.finditer("\n", self.text)]
        self.position = 0
        self.files: dict[int, str] = {}
        self.target = ""
        self.module_scope = Scope(None)
        self.kernels: dict[str, KernelText] = {}

    def line(self) -> int:
        return bisect.bisect_left(self.newlines, self.position) + 1

    def error(self, message: str) -> PtxSyntaxError:
        return PtxSyntaxError(f"PTX line {self.line()}: {message}")

    def skip_space(self) -> bool:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.position < len(self.text)

    def take(self, terminators: str) -> tuple[str, str]:
        """The text up to the first of `terminators`, and which one it was; the position moves behind it."""
        ends = [found for found in (self.text.find(mark, self.position) for mark in terminators) if found >= 0]
        if not ends:
            raise self.error(f"expected one of {terminators!r}")
        end = min(ends)
        taken = self.text[self.position : end]
        self.position = end + 1
        return taken.strip(), self.text[end]

    def skip_block(self) -> None:
        """Move behind the `}` that closes the block whose `{` was just taken."""
        depth = 1
        while depth:
            _, mark = self.take("{}")
            depth += 1 if mark == "{" else -1

    def line_directive(self) -> tuple[str, str] | None:
        match = _LINE_DIRECTIVE.match(self.text, self.position)
        if not match:
            return None
        self.position = match.end()
        kind, rest = match.group(1), match.group(2).strip()
        if kind == "target":
            self.target = rest.split(",")[0].strip()
        elif kind == "file":
            number, name = rest.split(None, 1)
            self.files[int(number)] = name.split('"')[1]
        return kind, rest

    def variable(self, statement: str, scope: Scope) -> None:
        match = _VARIABLE.match(statement)
        if not match:
            raise self.error(f"cannot read the declaration {statement!r}")
        linkage, space, align, vector, type_name, name, dimensions, initial = match.groups()
        if type_name not in TYPE_BYTES:
            raise self.error(f"type {type_name!r} of {name!r} is unknown")
        width = TYPE_BYTES[type_name] * (int(vector[1]) if vector else 1)
        size = width
        for extent in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
            size *= int(extent) if extent else 0
        data = None if initial is None else _initial_bytes(initial, type_name, size, self.line())
        size = max(size, len(data) if data else 0)
        scope.variables[name] = Variable(name, space, int(align or width), size, "extern" in linkage, data)

    def registers(self, statement: str, scope: Scope) -> None:
        type_name, names = statement.removeprefix(".reg").strip().removeprefix(".").split(None, 1)
        if type_name not in TYPE_BYTES:
            raise self.error(f"register type {type_name!r} is unknown")
        for item in names.split(","):
            match = _REGISTER.match(item.strip())
            if not match:
                raise self.error(f"cannot read the register {item!r}")
            name, count = match.groups()
            for full in [name] if count is None else [f"{name}{index}" for index in range(int(count))]:
                scope.registers[full] = type_name

    def header(self) -> tuple[str, list[Parameter], dict[str, tuple[int, ...]], str]:
        text, mark = self.take("{;")
        match = re.match(r"([\w$]+)\s*(?:\((.*?)\))?(.*)$", text, re.DOTALL)
        if not match:
            raise self.error(f"cannot read the kernel header {text!r}")
        name, parameter_text, rest = match.groups()
        parameters: list[Parameter] = []
        end = 0
        for item in split_operands(parameter_text or ""):
            found = _PARAMETER.match(item)
            if not found:
                raise self.error(f"cannot read the parameter {item!r}")
            align, type_name, parameter_name, count = found.groups()
            width = TYPE_BYTES[type_name]
            alignment = int(align or width)
            offset = _align_up(end, alignment)
            size = width * int(count or 1)
            parameters.append(Parameter(parameter_name, type_name, alignment, offset, size))
            end = offset + size
        directives = {
            key: tuple(int(value) for value in re.findall(r"\d+", values))
            for key, values in re.findall(r"\.(\w+)([\s\d,]*)", rest)
        }
        return name, parameters, directives, mark

    def body(self) -> list[InstructionText]:
        instructions: list[InstructionText] = []
        scope: Scope | None = Scope(self.module_scope)
        location: SourceLocation | None = None
        while scope is not self.module_scope:
            if scope is None or not self.skip_space():
                raise self.error("the kernel's body has no end")
            character = self.text[self.position]
            if character == "{":
                self.position += 1
                scope = Scope(scope)
            elif character == "}":
                self.position += 1
                scope = scope.parent
            elif directive := self.line_directive():
                if directive[0] == "loc" and (match := _LOCATION.match(directive[1])):
                    file, line = int(match.group(1)), int(match.group(2))
                    outer = _INLINED_AT.search(directive[1])
                    inlined_at = (int(outer.group(1)), int(outer.group(2))) if outer else None
                    location = SourceLocation(file, line, inlined_at) if line else location
            elif label := _LABEL.match(self.text, self.position):
                scope.labels[label.group(1)] = len(instructions)
                self.position = label.end()
            else:
                line_number = self.line()
                statement, _ = self.take(";")
                if statement.startswith(".reg"):
                    self.registers(statement, scope)
                elif statement.startswith(".pragma") or not statement:
                    continue
                elif statement.startswith("."):
                    self.variable(statement, scope)
                else:
                    instructions.append(self.instruction(statement, scope, line_number, location))
        return instructions

    def instruction(self, statement: str, scope: Scope, line: int, location: SourceLocation | None) -> InstructionText:
        match = _INSTRUCTION.match(statement)
        if not match:
            raise PtxSyntaxError(f"PTX line {line}: cannot read the instruction {statement!r}")
        negation, guard, opcode, operands = match.groups()
        return InstructionText(opcode, split_operands(operands), guard, negation == "!", scope, line, location)

    def parse(self) -> ModuleText:
        while self.skip_space():
            if self.line_directive():
                continue
            if self.text.startswith(".section", self.position):
                self.take("{")
                self.skip_block()
            elif match := _FUNCTION.match(self.text, self.position):
                self.position = match.end()
                if match.group(2) == "func":
                    _, mark = self.take("{;")
                    if mark == "{":
                        self.skip_block()
                    continue
                self.skip_space()
                name, parameters, directives, mark = self.header()
                if mark == "{":
                    self.kernels[name] = KernelText(name, parameters, directives, self.body())
            else:
                statement, _ = self.take(";")
                if statement.startswith("."):
                    self.variable(statement, self.module_scope)
                elif statement:
                    raise self.error(f"unexpected statement {statement!r}")
        return ModuleText(self.target, self.files, self.module_scope.variables, self.kernels)


def parse(text: str) -> ModuleText:
    """Parse one PTX module. Raises PtxSyntaxError with the line where the text is not understood."""
    return _Parser(text).parse()
