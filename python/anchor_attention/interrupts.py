"""What a signal's handler raised while an operation ran, in place of the operation's own error.

A long call on the CPU asks Python some times a second whether a signal came (csrc/host/interrupts.cpp). If the handler
raises, KeyboardInterrupt for Ctrl-C, the call stops with an error, and its exception waits for the interpreter.
"""

from __future__ import annotations

_STOPPED = "anchor_attention: interrupted by the handler of a signal"


def raised_by_a_signal(error: RuntimeError) -> BaseException | None:
    """The exception of the handler that stopped the operation; ``None`` where something else was the matter."""
    if str(error).startswith(_STOPPED):
        try:
            _let_the_interpreter_look()
        except BaseException as raised:
            return raised.with_traceback(None)
    return None


def _let_the_interpreter_look() -> None:
    # It raises what waits when it enters a function of Python, and when it goes back in a loop.
    for _ in range(2):
        pass
