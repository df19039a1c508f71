"""Signals while an operation runs: a handler that raises ends it within a second, one that returns changes nothing."""

from __future__ import annotations

import subprocess
import sys

# Operations of more than ten seconds on the machines that tests run on; each is stopped after some tenths of one.
SCENARIOS = """
import os, signal, threading, time
import torch
from anchor_attention import KeyRangeTable, anchor_attention

# A shell that runs the tests in the background has its children ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def table(n):
    return KeyRangeTable([0, n], [0, 1], [0, n])

def tokens(n, **fields):
    return torch.randn(1, n, 8, 64, **fields)

long, short = tokens(40_000), tokens(3_000)
ranges = (table(40_000).q_ranges, table(40_000).k_offsets, table(40_000).k_ranges)
leaf = tokens(40_000, requires_grad=True)
lse = torch.zeros(1, 8, 40_000)
operation = torch.ops.anchor_attention.attention

class Stop(Exception):
    pass

def raise_stop(*args):
    raise Stop("by a handler")

def backward():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()
        @staticmethod
        def backward(ctx, grad):
            return torch.ops.anchor_attention.attention_backward(
                grad, None, long, long, long, long, lse, *ranges, None, None, None, False, True, True, True, False)[0]
    Forward.apply(leaf).sum().backward()

def inference():
    with torch.inference_mode():
        operation(long, long, long, *ranges)

scenarios = {
    "functional": lambda: anchor_attention(long, long, long, table(40_000)),
    "recorded": lambda: anchor_attention(leaf, long, long, table(40_000)),
    "operation": lambda: operation(long, long, long, *ranges),
    "operation in inference mode": inference,
    "backward": backward,
}

def stopped(call, expected):
    sent = []
    def send():
        time.sleep(0.3)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        call()
        text = "was not stopped"
    except BaseException as error:
        text = "stopped" if type(error) is expected and error.__cause__ is None else repr(error)
    late = time.perf_counter() - sent[0]
    sender.join()
    return text if late < 1 else f"{text} after {late:.1f} s"

for name, call in scenarios.items():
    print(name, stopped(call, KeyboardInterrupt), sep=": ")
signal.signal(signal.SIGINT, raise_stop)
print("another exception", stopped(scenarios["functional"], Stop), sep=": ")
print("grad", leaf.grad, sep=": ")

# Handlers that return, and calls from other threads, are not disturbed.
expected = anchor_attention(short, short, short, table(3_000))
heard = []
signal.signal(signal.SIGINT, lambda *args: heard.append(1))
ringing = True
def ring():
    while ringing:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
ringer = threading.Thread(target=ring)
ringer.start()
equal = [torch.equal(anchor_attention(short, short, short, table(3_000)), expected) for _ in range(3)]
ringing = False
ringer.join()
print("handler that returns", all(equal) and len(heard) > 0, sep=": ")
signal.signal(signal.SIGINT, raise_stop)
results = []
worker = threading.Thread(target=lambda: results.append(anchor_attention(short, short, short, table(3_000))))
worker.start()
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
except Stop:
    pass
worker.join()
print("call of another thread", torch.equal(results[0], expected), sep=": ")
"""


def test_long_calls_end_when_a_handler_raises() -> None:
    result = subprocess.run([sys.executable, "-c", SCENARIOS], capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "functional: stopped",
        "recorded: stopped",
        "operation: stopped",
        "operation in inference mode: stopped",
        "backward: stopped",
        "another exception: stopped",
        "grad: None",
        "handler that returns: True",
        "call of another thread: True",
    ]


# The main thread keeps the interpreter's lock, as code between two of its hand-overs does, and looks at what the other
# thread's call computes meanwhile.
KEPT_LOCK = """
import ctypes, sys, threading, time
import torch
from anchor_attention import KeyRangeTable, anchor_attention

torch.set_num_threads(1)
tokens = torch.randn(1, 12_000, 8, 64)
table = KeyRangeTable([0, 12_000], [0, 1], [0, 12_000])
worker = threading.Thread(target=anchor_attention, args=(tokens, tokens, tokens, table))
worker.start()
clock = time.pthread_getcpuclockid(worker.ident)
while time.clock_gettime(clock) < 0.05:
    time.sleep(0.01)
keep = ctypes.PyDLL(None).usleep
sys.setswitchinterval(1000)
end = time.perf_counter() + 120
while time.clock_gettime(clock) < 0.5 and time.perf_counter() < end:
    keep(10_000)
computed = time.clock_gettime(clock)
sys.setswitchinterval(0.005)
worker.join()
print(computed >= 0.5)
"""


def test_a_call_of_another_thread_never_waits_for_the_interpreter() -> None:
    result = subprocess.run([sys.executable, "-c", KEPT_LOCK], capture_output=True, text=True, timeout=300)
    assert (result.stdout, result.stderr) == ("True\n", "")
