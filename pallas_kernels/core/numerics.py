"""In which precision operators accumulate, and checks that every operator makes."""

import functools

import jax
import jax.numpy as jnp

# Products in full precision: on an accelerator the default for float32 is three decimal digits.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """What states and sums are kept in: float32 for bf16 and float32, float64 for float64."""
    dtypes = [a.dtype for a in arrays if a is not None]
    return jnp.result_type(jnp.float32, *dtypes)


def softplus(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log(1 + exp(x)) and its slope, both to the last digits wherever x lies.

    In float32 the logarithm is the series of 2 artanh(q / (2 + q)) in q = exp(-|x|) <= 1: as exact
    as log1p, which takes three times as long on a CPU.
    """
    q = jnp.exp(-jnp.abs(x))
    if x.dtype == jnp.float32:
        s = q / (2 + q)  # at most 1/3: the first term left out is below 2^-24
        w = s * s
        series = jnp.zeros_like(w)
        for k in range(6, -1, -1):
            series = series * w + 1 / (2 * k + 1)
        log = 2 * s * series
    else:
        log = jnp.log1p(q)
    return jnp.maximum(x, 0) + log, jnp.where(x > 0, 1, q) / (1 + q)


def check_shapes(op: str, sizes: dict[str, int], **arrays: tuple[str, jax.Array | None]) -> None:
    """Checks arrays against letters: `check_shapes("op", sizes, u=("b t e", u))`.

    Args:
        op: for the message.
        sizes: letters with their sizes; letters met for the first time are added.
        **arrays: name = (letters, array or None).

    Raises:
        ValueError: an array has another shape; the message names it and what was expected.
    """
    for name, (letters, array) in arrays.items():
        if array is None:
            continue
        expected = letters.split()
        if array.ndim != len(expected):
            raise ValueError(f"{op}: {name} has shape {array.shape}; it must be [{letters}]")
        for letter, size in zip(expected, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has shape {array.shape}; [{letters}] with "
                    f"{letter}={sizes[letter]} was expected"
                )
