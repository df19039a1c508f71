"""Which registers an instruction reads and writes, and which of them wgmma uses while the program goes on."""

from __future__ import annotations

from collections.abc import Set

_WITHOUT_RESULT = frozenset(
    (
        "st",
        "red",
        "bra",
        "barrier",
        "cp",
        "exit",
        "ret",
        "trap",
        "fence",
        "no_effect",
        "stmatrix",
        "wgmma",
        "setmaxnreg",
    )
)
_MBARRIER_WITHOUT_RESULT = frozenset(("init", "inval", "expect_tx", "complete_tx"))


class Virtual(int):
    """The number of a virtual register or constant that has no row yet."""


def _n_results(operation: str) -> int:
    """How many operands, the first ones, the instruction writes."""
    words = operation.split(".")
    if words[0] in _WITHOUT_RESULT or words[:2] in (["bar", "sync"], ["bar", "arrive"], ["bar", "warp"]):
        return 0
    if words[0] == "mbarrier" and words[1] in _MBARRIER_WITHOUT_RESULT:
        return 0
    if words[0] == "unpack":
        return int(words[1])
    if words[0] in ("ld", "ldmatrix"):
        return next((int(word[1:]) for word in words if word in ("v2", "v4", "x2", "x4")), 1)
    if words[0] == "mma":
        return 4 if words[6] == "f32" else 2
    return 1


def _is_move(operation: str, operands: list[int], constants: Set[int]) -> bool:
    """Whether the instruction copies a register, a constant not being one."""
    return operation.startswith("mov.") and all(isinstance(n, Virtual) and n not in constants for n in operands)


def async_registers_of(operations: list[str], lowered: list[list[int]], constants: Set[int]) -> frozenset[int]:
    """Registers that some wgmma accumulates in or reads, and those that moves connect with them."""
    found: set[int] = set()
    moves: list[tuple[int, int]] = []
    for operation, operands in zip(operations, lowered, strict=False):
        if operation.startswith("wgmma.mma_async"):
            n_accumulators = int(operation.split(".")[4].split("n")[1].split("k")[0]) // 2
            n_operands = 4 if isinstance(operands[n_accumulators + 4], Virtual) else 0
            found.update(n for n in operands[: n_accumulators + n_operands] if isinstance(n, Virtual))
        elif _is_move(operation, operands, constants):
            moves.append((operands[0], operands[1]))
    grown = bool(found)
    while grown:
        before = len(found)
        for pair in moves:
            if found.intersection(pair):
                found.update(pair)
        grown = len(found) > before
    return frozenset(found)


def tracked_by(
    operation: str, operands: list[int], async_registers: frozenset[int]
) -> tuple[list[tuple[int, bool]], bool]:
    """The registers of an instruction that some wgmma uses, with whether it writes them; whether it is a move."""
    if not async_registers or operation.startswith("wgmma."):
        return [], False
    if operation.startswith("mov.") and all(isinstance(n, Virtual) and n in async_registers for n in operands):
        return [(operands[1], False), (operands[0], True)], True
    n_results = _n_results(operation)
    named = ((n, i < n_results) for i, n in enumerate(operands) if isinstance(n, Virtual))
    return [(n, written) for n, written in named if n in async_registers], False


def mentions_of(position: int, operation: str, operands: list[int], guarded: bool) -> list[tuple[int, int, bool]]:
    """Registers that an instruction names; the flag marks those that it overwrites without reading them."""
    n_results = _n_results(operation)
    read = {n for n in operands[n_results:] if isinstance(n, Virtual)}
    result: list[tuple[int, int, bool]] = [(position, n, False) for n in read]
    written = (n for n in operands[:n_results] if isinstance(n, Virtual) and n not in read)
    return result + [(position, n, not guarded) for n in written]
