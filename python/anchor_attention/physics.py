"""Derivatives of learnt fields with respect to coordinates: gradient, Jacobian, divergence, curl, Laplacian.

A decoder is any function from the coordinates of points, (…, n, d), to outputs at these points, (…, n, C), where the
outputs at a point depend only on its own coordinates: for example queries against fixed anchors, or against their
cache. This makes derivatives with respect to all coordinates of all points as cheap as d directions. For a decoder
whose points read each other, the results are sums over points instead.

Points are processed in chunks. Under ``torch.no_grad`` only the memory of one chunk is used; otherwise autograd keeps
what each chunk saves. First derivatives can be differentiated once more, with respect to parameters; the Laplacian,
which is a second derivative, only on the reference back-end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.func import grad, jvp, vmap

Decoder = Callable[[torch.Tensor], torch.Tensor]
Result = TypeVar("Result")

CHUNK_SIZE = 8192


def jacobian(
    decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and first derivatives of all outputs, in forward mode: d tangents that share one pass.

    Args:
        decoder: From coordinates (…, n, d) of any n to outputs (…, n, C).
        coordinates: (…, N, d), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        The values (…, N, C) and ∂output_c / ∂x_i, (…, N, C, d).

    Raises:
        ValueError: If an argument or the decoder's output does not fit.
    """

    def of_chunk(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out_dims: Any = (None, 0)
        values, slopes = vmap(lambda along: _tangent(decoder, x, along), out_dims=out_dims)(_axes_of(x))
        _check_output(values, x)
        return values, slopes.movedim(0, -1)

    chunks = _in_chunks(of_chunk, coordinates, chunk_size)
    return torch.cat([values for values, _ in chunks], dim=-2), torch.cat([slopes for _, slopes in chunks], dim=-3)


def gradient(decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """The gradient of a scalar field, in reverse mode, which is cheaper than d tangents for one output.

    Args:
        decoder: From coordinates (…, n, d) to outputs (…, n, 1).
        coordinates: (…, N, d), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        (…, N, d).

    Raises:
        ValueError: If an argument does not fit, or the decoder has several outputs.
    """

    def of_chunk(x: torch.Tensor) -> torch.Tensor:
        values, slopes = _slopes_of_sum(decoder, x, 0)
        _check_output(values, x, (1,))
        return slopes

    return torch.cat(_in_chunks(of_chunk, coordinates, chunk_size), dim=-2)


def stream_velocity(decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """The velocity (∂ψ/∂y, −∂ψ/∂x) of a stream function ψ in the plane, which is free of divergence for every ψ.

    Args:
        decoder: From coordinates (…, n, 2) to ψ, (…, n, 1).
        coordinates: (…, N, 2), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        (…, N, 2).

    Raises:
        ValueError: If an argument does not fit, there are not two coordinates, or the decoder has several outputs.
    """
    _check_dimensions(coordinates, (2,))
    by_x, by_y = gradient(decoder, coordinates, chunk_size=chunk_size).unbind(-1)
    return torch.stack([by_y, -by_x], dim=-1)


def divergence(decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """Σ_i ∂u_i / ∂x_i of a field with as many outputs as coordinates.

    Args:
        decoder: From coordinates (…, n, d) to u, (…, n, d).
        coordinates: (…, N, d), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        (…, N).

    Raises:
        ValueError: If an argument does not fit, or the decoder does not have d outputs.
    """
    checked = _with_outputs(decoder, (coordinates.shape[-1],))
    _, slopes = jacobian(checked, coordinates, chunk_size=chunk_size)
    return slopes.diagonal(dim1=-2, dim2=-1).sum(-1)


def curl(decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """The rotation of a field: the vorticity, where the field is a velocity.

    Args:
        decoder: From coordinates (…, n, d) to u, (…, n, d); d is 2 or 3.
        coordinates: (…, N, d), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        In the plane ∂u_y/∂x − ∂u_x/∂y, (…, N); in space the vector ∇ × u, (…, N, 3).

    Raises:
        ValueError: If an argument does not fit, d is neither 2 nor 3, or the decoder does not have d outputs.
    """
    _check_dimensions(coordinates, (2, 3))
    d = coordinates.shape[-1]
    _, slopes = jacobian(_with_outputs(decoder, (d,)), coordinates, chunk_size=chunk_size)
    if d == 2:
        return slopes[..., 1, 0] - slopes[..., 0, 1]
    pairs = ((2, 1), (0, 2), (1, 0))
    return torch.stack([slopes[..., i, j] - slopes[..., j, i] for i, j in pairs], dim=-1)


def laplacian(decoder: Decoder, coordinates: torch.Tensor, *, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """Σ_i ∂²u_c / ∂x_i² of every output: tangents of gradients, one output after the other.

    Args:
        decoder: From coordinates (…, n, d) to u, (…, n, C).
        coordinates: (…, N, d), floating point.
        chunk_size: Points in one call of the decoder.

    Returns:
        (…, N, C).

    Raises:
        ValueError: If an argument or the decoder's output does not fit.
    """

    def of_output(c: int, x: torch.Tensor) -> torch.Tensor:
        def slopes(x: torch.Tensor) -> torch.Tensor:
            return _slopes_of_sum(decoder, x, c)[1]

        # Row i: the derivative of the whole gradient along x_i.
        second: torch.Tensor = vmap(lambda along: _tangent(slopes, x, along)[1])(_axes_of(x))
        return second.diagonal(dim1=0, dim2=-1).sum(-1)

    def of_chunk(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            n_outputs = decoder(x[..., :1, :]).shape[-1]
        return torch.stack([of_output(c, x) for c in range(n_outputs)], dim=-1)

    return torch.cat(_in_chunks(of_chunk, coordinates, chunk_size), dim=-2)


def _tangent(function: Decoder, x: torch.Tensor, along: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    result: Any = jvp(function, (x,), (along,))
    value, slope = result
    return value, slope


def _slopes_of_sum(decoder: Decoder, x: torch.Tensor, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and the gradient of output c at every point: that of the sum over points, each of which adds its part."""

    def total(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = decoder(x)
        _check_output(values, x)
        return values[..., c].sum(), values

    slopes, values = grad(total, has_aux=True)(x)
    return values, slopes


def _axes_of(x: torch.Tensor) -> torch.Tensor:
    """(d, …, n, d): the direction of each axis, at every point."""
    d = x.shape[-1]
    axes = torch.eye(d, dtype=x.dtype, device=x.device)
    return axes.view(d, *(1,) * (x.dim() - 1), d).expand(d, *x.shape)


def _in_chunks(function: Callable[[torch.Tensor], Result], coordinates: torch.Tensor, chunk_size: int) -> list[Result]:
    if not isinstance(coordinates, torch.Tensor) or coordinates.dim() < 2 or not coordinates.is_floating_point():
        raise ValueError(f"coordinates must be a floating-point tensor (…, N, d), got {_description(coordinates)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    # Without points there is one empty chunk, which shows how many outputs there are.
    return [function(chunk) for chunk in torch.split(coordinates, chunk_size, dim=-2)]


def _description(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value))


def _check_dimensions(coordinates: torch.Tensor, allowed: tuple[int, ...]) -> None:
    if coordinates.shape[-1] not in allowed:
        text = " or ".join(map(str, allowed))
        raise ValueError(f"coordinates must have {text} components, got shape {tuple(coordinates.shape)}")


def _check_output(values: torch.Tensor, x: torch.Tensor, n_outputs: tuple[int, ...] = ()) -> None:
    fits = isinstance(values, torch.Tensor) and values.dim() == x.dim() and values.shape[:-1] == x.shape[:-1]
    if not fits or (n_outputs and values.shape[-1] not in n_outputs):
        last = n_outputs[0] if n_outputs else "outputs"
        raise ValueError(
            f"decoder must return ({', '.join(map(str, (*x.shape[:-1], last)))}) for coordinates of shape "
            f"{tuple(x.shape)}, got {_description(values)}"
        )


def _with_outputs(decoder: Decoder, n_outputs: tuple[int, ...]) -> Decoder:
    def checked(x: torch.Tensor) -> torch.Tensor:
        values = decoder(x)
        _check_output(values, x, n_outputs)
        return values

    return checked
