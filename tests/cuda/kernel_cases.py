"""Inputs of the emulated attention kernels, shared by the tests of every generation of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from tools.cuda_plans.run import (
    Array,
    KernelRun,
    Table,
    attention_backward,
    attention_forward,
    from_storage,
    to_storage,
)

from tests.cuda.kernel_reference import Arithmetic, AttentionReference

# Two partial tiles of queries, partial and repeated and shared key ranges, rows in no range, keys that nobody reads.
RAGGED: Table = [((0, 70), [(0, 20), (37, 141)]), ((75, 150), [(100, 160), (100, 160)])]
N_QUERIES, N_KEYS = 170, 180


@dataclass
class Case:
    """Inputs of one call; `to_storage` has rounded them, so they are exact."""

    dtype: str
    q: Array
    k: Array
    v: Array
    grad_out: Array
    grad_lse: Array
    table: Table
    q_freqs: Array | None = None
    key_mask: Array | None = None
    scale: float | None = None
    allow_tf32: bool = False
    wanted: tuple[str, ...] = ("q", "k", "v")
    run: KernelRun = field(default_factory=KernelRun)

    def forward(self) -> tuple[Array, Array]:
        return attention_forward(
            self.dtype, self.q, self.k, self.v, self.table, q_freqs=self.q_freqs, key_mask=self.key_mask,
            scale=self.scale, run=self.run, allow_tf32=self.allow_tf32,
        )  # fmt: skip

    def backward(self, out: Array, lse: Array) -> dict[str, Array]:
        return attention_backward(
            self.dtype, self.q, self.k, self.v, self.table, out, lse, self.grad_out, grad_lse=self.grad_lse,
            q_freqs=self.q_freqs, key_mask=self.key_mask, scale=self.scale, wanted=self.wanted, run=self.run,
            allow_tf32=self.allow_tf32,
        )  # fmt: skip

    def reference(self) -> AttentionReference:
        q, k, v = (from_storage(x, self.dtype) for x in (self.q, self.k, self.v))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        arithmetic = Arithmetic.of(self.dtype, self.allow_tf32)
        return AttentionReference(q, k, v, self.table, arithmetic, scale, self.q_freqs, self.key_mask)

    def check_forward(self) -> tuple[Array, Array]:
        """Runs the forward pass and compares it with the reference."""
        reference = self.reference()
        out, lse = self.forward()
        reference.lse.check(lse.astype(np.float64), "lse")
        reference.out.check(from_storage(out, self.dtype), "out")
        return out, lse

    def check(self) -> tuple[Array, Array, dict[str, Array]]:
        """Runs both passes and compares everything with the reference."""
        out, lse = self.check_forward()
        reference = self.reference()
        gradients = self.backward(out, lse)
        expected = reference.backward(from_storage(self.grad_out, self.dtype), self.grad_lse)
        assert set(gradients) == set(self.wanted)
        for name, gradient in gradients.items():
            computed = gradient if name == "q_freqs" else from_storage(gradient, self.dtype)
            expected[name].check(computed, f"grad_{name}")
        return out, lse, gradients


def make_freqs(rng: np.random.Generator, batch: int, tokens: int, head_dim: int) -> Array:
    """Complex factors of any modulus."""
    shape = (batch, tokens, head_dim // 2)
    factors = rng.uniform(0.7, 1.3, shape) * np.exp(1j * rng.uniform(0, 2 * math.pi, shape))
    return np.asarray(factors, np.complex64)


def make_case(
    dtype: str = "bfloat16", batch: int = 1, n_queries: int = N_QUERIES, n_keys: int = N_KEYS, heads: int = 1,
    head_dim: int = 64, table: Table = RAGGED, freqs_batch: int = 0, keep: float = 1.0, seed: int = 0,
    generation: str = "sm80", kv_heads: int | None = None, value_dim: int | None = None,
) -> Case:  # fmt: skip
    """Random inputs with a mean; factors where `freqs_batch` > 0, a key mask where `keep` < 1."""
    rng = np.random.default_rng(seed)
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = head_dim if value_dim is None else value_dim

    def tensor(tokens: int, heads: int, width: int) -> Array:
        return to_storage(rng.normal(0.2, 1.0, (batch, tokens, heads, width)), dtype)

    q, k = tensor(n_queries, heads, head_dim), tensor(n_keys, kv_heads, head_dim)
    v, grad_out = tensor(n_keys, kv_heads, value_dim), tensor(n_queries, heads, value_dim)
    grad_lse = rng.normal(size=(batch, heads, n_queries)).astype(np.float32)
    case = Case(dtype, q, k, v, grad_out, grad_lse, table, run=KernelRun(generation=generation))
    if freqs_batch:
        case.q_freqs = make_freqs(rng, freqs_batch, n_queries, head_dim)
    if keep < 1:
        case.key_mask = rng.uniform(size=(batch, n_keys)) < keep
    return case


def nan_storage(dtype: str) -> float | int:
    """NaN as the kernels store it."""
    return {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": math.nan}[dtype]
