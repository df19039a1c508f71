"""The GPU suite: correctness and timing on one machine, in one command and a fixed time."""
