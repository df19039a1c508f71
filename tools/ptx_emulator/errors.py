"""What an emulated program can do wrong."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base of every error; the message names kernel, block, thread, PTX line and source line."""


class PtxSyntaxError(EmulatorError):
    """The PTX text is not understood."""


class UnsupportedInstructionError(EmulatorError):
    """An opcode, a modifier or an operand that the emulator does not implement: found when a kernel is loaded."""


class RaceError(EmulatorError):
    """Two accesses of the same memory or register, one of them a write or asynchronous, that nothing orders."""


class OutOfBoundsError(EmulatorError):
    """An access outside of every buffer, or a write to a read-only one."""


class UninitializedReadError(EmulatorError):
    """A read of memory that nothing has written, or that an unfinished copy is writing."""


class MisalignedError(EmulatorError):
    """An address that is not a multiple of the access size."""


class DeadlockError(EmulatorError):
    """No warp can proceed, or all of them spin without effect."""


class DivergenceError(EmulatorError):
    """A collective instruction that some of its threads do not execute."""


class MbarrierError(EmulatorError):
    """An mbarrier that was not initialised, gets more arrivals than it expects, or a byte count out of range."""


class TrapError(EmulatorError):
    """The program executed `trap`."""
