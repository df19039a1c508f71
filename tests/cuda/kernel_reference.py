"""The operation in float64, with a bound for what a kernel of a given precision may differ by, element by element.

The bounds follow the kernels' arithmetic, to first order: inputs are exact; a product of operands of b significant bits
is exact or, in the tf32 forms, has the error of their rounding; sums run in float32; probabilities, and gradients of
scores, are rounded to the operand type before they enter the next product; outputs are rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tools.cuda_plans.run import Array, Table, unit_roundoff

F64 = NDArray[np.float64]
_FLOAT32 = 2.0**-24
_EXP2 = 2.0**-21  # ex2.approx and the rounding of its argument's last operation, relative


@dataclass(frozen=True)
class Bounded:
    """A value and the largest error that it may have, of one shape."""

    value: Array
    error: F64

    def check(self, computed: Array, what: str) -> None:
        """Raises AssertionError where `computed` is further away than allowed; infinities must agree."""
        finite = np.isfinite(self.value)
        np.testing.assert_array_equal(np.isfinite(computed), finite, err_msg=f"{what}: infinities differ")
        np.testing.assert_array_equal(computed[~finite], self.value[~finite], err_msg=what)
        excess = np.abs(computed[finite] - self.value[finite]) - self.error[finite]
        if excess.size and excess.max() > 0:
            worst = np.argwhere(finite)[excess.argmax()]
            at = tuple(worst)
            raise AssertionError(
                f"{what}{list(worst)} = {computed[at]}, expected {self.value[at]} ± {self.error[at]:.3g}; "
                f"{(excess > 0).mean():.1%} of the elements are too far"
            )


@dataclass(frozen=True)
class Arithmetic:
    """Relative errors of an operand (kept through a product), and of a stored result."""

    operand: float
    stored: float
    smallest: float  # absolute error of storing a number near zero

    @staticmethod
    def of(dtype: str, allow_tf32: bool) -> Arithmetic:
        if dtype == "float32":
            return Arithmetic(2.0**-11 if allow_tf32 else 2.0**-21, _FLOAT32, 1e-30)
        return Arithmetic(0.0, unit_roundoff(dtype), 2.0**-25 if dtype == "float16" else 1e-30)

    @property
    def rounded_operand(self) -> float:
        """Of a computed value that becomes an operand."""
        return self.operand + (self.stored if self.operand == 0.0 else 0.0)


def rotate(x: F64, freqs: Array) -> F64:
    """x (B, N, H, D) times freqs (B or 1, N, D / 2) on interleaved pairs."""
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * freqs.astype(np.complex128)[:, :, None, :]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def multiplicity(table: Table, n_queries: int, n_keys: int) -> F64:
    """How often each query reads each key."""
    counts = np.zeros((n_queries, n_keys))
    for (q_begin, q_end), keys in table:
        for k_begin, k_end in keys:
            counts[q_begin:q_end, k_begin:k_end] += 1
    return counts


@dataclass
class AttentionReference:
    """Forward and backward of one case; arrays (B, H, Nq, Nk) inside, where grouped heads have keys of their own."""

    q: F64
    k: F64
    v: F64
    table: Table
    arithmetic: Arithmetic
    scale: float
    q_freqs: Array | None = None
    key_mask: Array | None = None

    def __post_init__(self) -> None:
        n_queries, n_keys = self.q.shape[1], self.k.shape[1]
        self._shared_by = self.q.shape[2] // self.k.shape[2] if self.k.shape[2] else 1
        k, v = (np.repeat(x, self._shared_by, axis=2) for x in (self.k, self.v))
        q = self.q if self.q_freqs is None else rotate(self.q, self.q_freqs)
        # Rotated queries are rounded to the input type before they are multiplied, up to one unit either way.
        q_error = 0.0 if self.q_freqs is None else 2 * self.arithmetic.stored + 4 * _FLOAT32
        self._q, self._k, self._v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        counts = np.broadcast_to(multiplicity(self.table, n_queries, n_keys), (q.shape[0], 1, n_queries, n_keys))
        if self.key_mask is not None:
            counts = counts * self.key_mask[:, None, None, :]
        self._counts = counts
        self._product_error = 2 * self.arithmetic.operand + (max(q.shape[3], v.shape[3]) + 2) * _FLOAT32
        scores = self.scale * self._q @ self._k.swapaxes(-1, -2)
        magnitude = abs(self.scale) * np.abs(self._q) @ np.abs(self._k).swapaxes(-1, -2)
        # The rotation mixes the two numbers of a pair, so an element's error follows the pair's magnitude.
        pair_factor = 1.5 if self.q_freqs is not None else 1.0
        self._score_error = magnitude * (self._product_error + pair_factor * q_error)
        with np.errstate(divide="ignore", invalid="ignore"):
            weights = np.where(counts > 0, scores, -np.inf)
            maximum = weights.max(axis=-1, keepdims=True, initial=-np.inf)
            maximum = np.where(np.isfinite(maximum), maximum, 0.0)
            exponentials = counts * np.exp(np.where(counts > 0, scores - maximum, -np.inf))
            total = exponentials.sum(axis=-1, keepdims=True)
            self._p = np.divide(exponentials, total, out=np.zeros_like(exponentials), where=total > 0)
            lse = (maximum + np.log(total))[..., 0]
        n_terms = counts.sum(axis=-1)
        score_error = np.where(counts > 0, self._score_error, 0.0).max(axis=-1, initial=0.0)
        argument_error = 4 * _FLOAT32 * np.abs(scores).max(axis=-1, initial=0.0)
        self._lse_error = score_error + argument_error + _EXP2 + (n_terms + 4) * _FLOAT32
        self.lse = Bounded(lse, self._lse_error + 4 * _FLOAT32 * np.abs(np.nan_to_num(lse, neginf=0.0)))
        # Errors of the scores move numerator and denominator.
        probability_error = self._score_error + (argument_error + _EXP2)[..., None] + self.lse.error[..., None]
        self._probability_error = self._p * probability_error
        out = self._p @ self._v
        operand_error = self.arithmetic.rounded_operand + self.arithmetic.operand + (n_terms[..., None] + 8) * _FLOAT32
        rounded = self._p * operand_error
        error = (self._probability_error + rounded) @ np.abs(self._v) + self.arithmetic.stored * np.abs(out)
        self.out = Bounded(out.transpose(0, 2, 1, 3), error.transpose(0, 2, 1, 3) + self.arithmetic.smallest)

    def backward(self, grad_out: F64, grad_lse: Array | None = None) -> dict[str, Bounded]:
        """Gradients of q, k, v and, with q_freqs, q_freqs; shapes of the inputs."""
        a = self.arithmetic
        g = grad_out.transpose(0, 2, 1, 3)
        n_queries, n_keys = self._p.shape[-2:]
        out, out_error = (x.transpose(0, 2, 1, 3) for x in (self.out.value, self.out.error))
        delta = (g * out).sum(axis=-1, keepdims=True)
        delta_error = (np.abs(g) * (out_error + 16 * _FLOAT32 * np.abs(out))).sum(axis=-1, keepdims=True)
        if grad_lse is not None:
            has_keys = np.isfinite(self.lse.value)
            delta = delta - np.where(has_keys, grad_lse, 0.0)[..., None]
        gradient_of_p = g @ self._v.swapaxes(-1, -2)
        gradient_of_p_error = self._product_error * np.abs(g) @ np.abs(self._v).swapaxes(-1, -2)
        ds = self._p * (gradient_of_p - delta)
        ds_error = self._probability_error * np.abs(gradient_of_p - delta)
        ds_error = ds_error + self._p * (
            gradient_of_p_error + delta_error + 2 * _FLOAT32 * np.abs(gradient_of_p - delta)
        )

        # Of a group's heads the gradients add up in float32.
        n_rows = n_queries * self._shared_by
        grad_v = self._product(self._p.swapaxes(-1, -2), self._probability_error.swapaxes(-1, -2), g, n_rows, 1.0)
        q_error = 2 * a.stored + 4 * _FLOAT32 if self.q_freqs is not None else 0.0
        ds_t, ds_t_error = ds.swapaxes(-1, -2), ds_error.swapaxes(-1, -2)
        grad_k = self._product(ds_t, ds_t_error + 1.5 * q_error * np.abs(ds_t), self._q, n_rows, self.scale)
        grad_q = self._product(ds, ds_error, self._k, n_keys, self.scale)
        gradients = {"k": self._summed(grad_k), "v": self._summed(grad_v)}
        if self.q_freqs is None:
            return gradients | {"q": grad_q}
        return gradients | rope_gradients(self.q, self.q_freqs, grad_q.value, a, grad_q.error)

    def _product(self, x: F64, x_error: F64, y: F64, terms: int, factor: float) -> Bounded:
        """factor · x @ y, where x was computed, in the order of the inputs' axes."""
        a = self.arithmetic
        value = factor * x @ y
        operand_error = a.rounded_operand + a.operand + (terms + 8) * _FLOAT32
        # `smallest` is what an operand loses where it underflows.
        error = abs(factor) * (x_error + np.abs(x) * operand_error + a.smallest) @ np.abs(y)
        error = error + a.stored * np.abs(value) + a.smallest
        return Bounded(value.transpose(0, 2, 1, 3), error.transpose(0, 2, 1, 3))

    def _directions(self, q_tangent: F64 | None, k_tangent: F64 | None, v_tangent: F64 | None) -> list[F64]:
        """Heads first, of one head of queries each; zeros for None."""
        given = ((q_tangent, self._q, 1), (k_tangent, self._k, self._shared_by), (v_tangent, self._v, self._shared_by))
        return [
            np.zeros_like(like) if x is None else np.repeat(x, shared_by, axis=2).transpose(0, 2, 1, 3)
            for x, like, shared_by in given
        ]

    def _score_tangents(self, of_q: F64, of_k: F64) -> tuple[F64, F64]:
        """T, and the sum of the magnitudes of its terms."""
        keys, key_tangents = self._k.swapaxes(-1, -2), of_k.swapaxes(-1, -2)
        t = self.scale * (of_q @ keys + self._q @ key_tangents)
        return t, abs(self.scale) * (np.abs(of_q) @ np.abs(keys) + np.abs(self._q) @ np.abs(key_tangents))

    def tangents(self, q_tangent: F64 | None, k_tangent: F64 | None, v_tangent: F64 | None) -> tuple[Bounded, Bounded]:
        """Of out and lse along a direction, None where it is zero; shapes of the inputs, of out and of lse."""
        a = self.arithmetic
        of_q, of_k, of_v = self._directions(q_tangent, k_tangent, v_tangent)
        t, size = self._score_tangents(of_q, of_k)
        has_keys = self._p.any(axis=-1, keepdims=True)
        read = self._counts > 0
        # The reference is a mean of T over some of the row's keys: what is left of T is no larger than the range of T.
        largest, least = (
            np.where(has_keys, pick(np.where(read, t, sign * np.inf), axis=-1, keepdims=True, initial=sign * np.inf), 0)
            for pick, sign in ((np.max, -1), (np.min, 1))
        )
        left = np.where(read, np.maximum(np.abs(t - least), np.abs(t - largest)), 0.0)
        reference = np.maximum(np.abs(least), np.abs(largest))
        t_error = size * self._product_error + 4 * _FLOAT32 * (np.abs(t) + reference)
        w, w_error = self._p * left, self._probability_error * left + self._p * t_error
        n_terms = self._counts.sum(axis=-1, keepdims=True)
        sums = (n_terms + 8) * _FLOAT32
        mean = (self._p * t).sum(axis=-1, keepdims=True)
        mean_error = (w_error + w * sums).sum(axis=-1, keepdims=True)
        lse = Bounded(mean[..., 0], (mean_error + 4 * _FLOAT32 * reference)[..., 0] + a.smallest)
        operand_error = a.rounded_operand + a.operand + sums
        out, out_error = (x.transpose(0, 2, 1, 3) for x in (self.out.value, self.out.error))
        value = (self._p * (t - mean)) @ self._v + self._p @ of_v
        error = (w_error + w * operand_error + a.smallest * read) @ np.abs(self._v)
        error = error + (self._probability_error + self._p * operand_error + a.smallest * read) @ np.abs(of_v)
        error = error + w.sum(axis=-1, keepdims=True) * (out_error + 2 * _FLOAT32 * np.abs(out))
        error = error + mean_error * np.abs(out) + a.stored * np.abs(value) + a.smallest
        return Bounded(value.transpose(0, 2, 1, 3), error.transpose(0, 2, 1, 3)), lse

    def second(
        self, grad_out: F64, grad_lse: Array, q_tangent: F64 | None, k_tangent: F64 | None, v_tangent: F64 | None
    ) -> dict[str, Bounded]:
        """Gradients of <grad_out, tangent of out> + <grad_lse, tangent of lse>, of q, k and v."""
        of_q, of_k, of_v = self._directions(q_tangent, k_tangent, v_tangent)
        out_tangent, lse_tangent = self.tangents(q_tangent, k_tangent, v_tangent)
        g, v_rows = grad_out.transpose(0, 2, 1, 3), self._v.swapaxes(-1, -2)

        def row_product(rows: Bounded) -> tuple[F64, F64]:
            value, error = (x.transpose(0, 2, 1, 3) for x in (rows.value, rows.error))
            terms_error = np.abs(g) * (error + 16 * _FLOAT32 * np.abs(value))
            return (g * value).sum(axis=-1, keepdims=True), terms_error.sum(axis=-1, keepdims=True)

        (delta, delta_error), (mean, mean_error) = row_product(self.out), row_product(out_tangent)
        has_keys = np.isfinite(self.lse.value)
        delta = delta - np.where(has_keys, grad_lse, 0.0)[..., None]
        t, t_size = self._score_tangents(of_q, of_k)
        r, r_error = lse_tangent.value[..., None], lse_tangent.error[..., None]
        t_error = t_size * self._product_error + r_error + 4 * _FLOAT32 * (np.abs(t) + np.abs(r))
        t = t - r
        d = g @ v_rows - delta
        d_error = (
            self._product_error * np.abs(g) @ np.abs(v_rows) + delta_error + 4 * _FLOAT32 * (np.abs(d) + np.abs(delta))
        )
        x = g @ of_v.swapaxes(-1, -2)
        e = t * d + x - mean
        e_error = np.abs(t) * d_error + np.abs(d) * t_error + mean_error
        e_error = e_error + self._product_error * np.abs(g) @ np.abs(of_v).swapaxes(-1, -2)
        e_error = e_error + 4 * _FLOAT32 * (np.abs(t * d) + np.abs(x) + np.abs(mean))

        def weighted(y: F64, y_error: F64) -> tuple[F64, F64]:
            return self._p * y, self._probability_error * np.abs(y) + self._p * (y_error + 2 * _FLOAT32 * np.abs(y))

        def both(first: Bounded, other: Bounded) -> Bounded:
            return Bounded(first.value + other.value, first.error + other.error)

        def transposed(pair: tuple[F64, F64]) -> tuple[F64, F64]:
            return pair[0].swapaxes(-1, -2), pair[1].swapaxes(-1, -2)

        w, ds, gradient = weighted(t, t_error), weighted(d, d_error), weighted(e, e_error)
        n_queries, n_keys = self._p.shape[-2:]
        n_rows = n_queries * self._shared_by
        product, scale = self._product, self.scale
        of_keys = both(product(*transposed(gradient), self._q, n_rows, scale),
                       product(*transposed(ds), of_q, n_rows, scale))  # fmt: skip
        return {
            "q": both(product(*gradient, self._k, n_keys, scale), product(*ds, of_k, n_keys, scale)),
            "k": self._summed(of_keys),
            "v": self._summed(product(*transposed(w), g, n_rows, 1.0)),
        }

    def _summed(self, gradient: Bounded) -> Bounded:
        """Of heads → of the heads of keys that they share."""
        batch, tokens, heads, width = gradient.value.shape
        shape = (batch, tokens, heads // self._shared_by, self._shared_by, width)
        return Bounded(gradient.value.reshape(shape).sum(axis=3), gradient.error.reshape(shape).sum(axis=3))


def rope_gradients(
    x: F64, freqs: Array, grad_out: F64, arithmetic: Arithmetic, grad_out_error: F64 | None = None
) -> dict[str, Bounded]:
    """Gradients "q" (of x) and "q_freqs" of `rotate`."""
    stored = arithmetic.stored
    error = np.zeros_like(grad_out) if grad_out_error is None else grad_out_error
    grad_x = rotate(grad_out, np.conj(freqs))
    mixed = np.abs(freqs).astype(np.float64)
    pair_error = np.repeat((error[..., ::2] + error[..., 1::2]) * mixed[:, :, None, :], 2, axis=-1)
    pair_size = np.repeat((np.abs(grad_out[..., ::2]) + np.abs(grad_out[..., 1::2])) * mixed[:, :, None, :], 2, axis=-1)
    # Where the gradient is rotated back in a pass of its own it has been rounded twice.
    grad_x_error = pair_error + pair_size * (stored + 4 * _FLOAT32) + stored * np.abs(grad_x) + arithmetic.smallest
    terms = x.shape[2] * x.shape[0]
    xc, gc = x[..., ::2] + 1j * x[..., 1::2], grad_out[..., ::2] + 1j * grad_out[..., 1::2]
    sizes = np.abs(xc) * (error[..., ::2] + error[..., 1::2] + (stored + (terms + 4) * _FLOAT32) * np.abs(gc))
    axes = (0, 2) if freqs.shape[0] == 1 else (2,)
    grad_freqs = (gc * np.conj(xc)).sum(axis=axes, keepdims=True).squeeze(2)
    freqs_error = sizes.sum(axis=axes, keepdims=True).squeeze(2) + 1e-30
    return {"q": Bounded(grad_x, grad_x_error), "q_freqs": Bounded(grad_freqs, freqs_error)}
