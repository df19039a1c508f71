"""What a signal's handler raised while an operation ran, in place of the operation's own error.

A long call on the CPU asks Python several times a second whether a signal has arrived (csrc/host/interrupts.cpp). If
the handler raises (KeyboardInterrupt for Ctrl-C), the call stops with an error, and the handler's exception stays
pending in the interpreter.
"""

from __future__ import annotations

_STOPPED = "anchor_attention: interrupted by the handler of a signal"


def raised_by_a_signal(error: RuntimeError) -> BaseException | None:
    """The exception of the handler that stopped the operation; ``None`` if something else went wrong."""
    if str(error).startswith(_STOPPED):
        try:
            _let_the_interpreter_look()
        except BaseException as raised:
            return raised.with_traceback(None)
    return None


def _let_the_interpreter_look() -> None:
    # The interpreter raises what is pending when it enters a Python function, and when it jumps back in a loop.
    for _ in range(2):
        pass
