"""What the corpus's kernels should compute, in float64, and how far off they may be: bounds made of their roundings."""

from __future__ import annotations

import numpy as np

from tests.tools.corpus.programs import Array, loaded, random_matrix, unit_roundoff

LOG2E = 1.4426950408889634
# Of exp2, of logarithms, of sums of a few hundred numbers, relative: a few of the last bits of float32.
_SMALL = 2.0**-18


def operands(kind: str, shape: tuple[int, int, int], exact: bool = True) -> tuple[Array, Array, Array, Array]:
    """a (rows, depth) and b (depth, columns); the product; and how far off a sum in float32 may be."""
    rows, columns, depth = shape
    rng = np.random.default_rng(rows + columns + depth)
    if exact:
        a, b = random_matrix(rng, (rows, depth), kind), random_matrix(rng, (depth, columns), kind)
    else:
        a, b = (rng.standard_normal(extents).astype(np.float32) for extents in ((rows, depth), (depth, columns)))
    left, right = loaded(a, kind), loaded(b, kind)
    return a, b, left @ right, product_error(left, right)


def product_error(left: Array, right: Array) -> Array:
    """How far off a matrix product on tensor cores may be."""
    # Products are exact. Of each number that it adds, an instruction may lose what is below 24 bits of the largest.
    return (left.shape[-1] + 2) * 2.0**-23 * (np.abs(left) @ np.abs(right))


def laid_out(matrix: Array, transposed: bool) -> Array:
    return np.ascontiguousarray(matrix.T) if transposed else matrix


def transposed(matrices: Array) -> Array:
    return np.swapaxes(matrices, -1, -2)


def probabilities(q: Array, k: Array, scale: float, causal: bool) -> tuple[Array, Array, Array]:
    """Softmax of scaled scores, the logarithms of its denominators to base e, and bounds of the scores' errors."""
    scores = q @ transposed(k) * scale
    score_error = product_error(q, transposed(k)) * scale + 2.0**-22
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    maximum = scores.max(-1, keepdims=True)
    powers = np.exp(scores - maximum)
    total = powers.sum(-1, keepdims=True)
    return powers / total, (maximum + np.log(total))[..., 0], score_error


def attend(q: Array, k: Array, v: Array, kind: str, scale: float, causal: bool) -> tuple[Array, Array, Array, Array]:
    """Output and lse (base 2) of heads, and bounds of their errors."""
    weights, lse, score_error = probabilities(q, k, scale, causal)
    lse *= LOG2E
    out = weights @ v
    worst = score_error.max(-1, keepdims=True)
    # Scores as exponents, in the numerator and in the denominator; probabilities as operands; the output as stored.
    rounding = unit_roundoff(kind)
    bound = (2 * worst + rounding + _SMALL) * (weights @ np.abs(v)) + 1.01 * rounding * np.abs(out)
    return out, lse, bound, (worst[..., 0] * LOG2E + _SMALL * (1 + np.abs(lse)))
