"""In which precision operators accumulate, and checks that every operator makes."""

import functools

import jax
import jax.numpy as jnp

# Products in full precision: on an accelerator the default for float32 is three decimal digits.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def state_dtype(*of: jax.Array | str | None) -> jnp.dtype:
    """What states and sums are kept in, of arrays or names of dtypes.

    float32 for bf16 and float32, float64 for float64.
    """
    dtypes = [a if isinstance(a, str) else a.dtype for a in of if a is not None]
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
        TypeError: an array is not of a floating-point type.
    """
    for name, (letters, array) in arrays.items():
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{op}: {name} has dtype {array.dtype}; it must be float32, bfloat16, float16 or "
                "float64"
            )
        expected = letters.split()
        if array.ndim != len(expected):
            raise ValueError(f"{op}: {name} has shape {array.shape}; it must be [{letters}]")
        for letter, size in zip(expected, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{op}: {name} has shape {array.shape}; [{letters}] with "
                    f"{letter}={sizes[letter]} was expected"
                )


def check_documents(
    op: str, sizes: dict[str, int], segment_ids: jax.Array | None, last_id: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Checks segment ids `[b t]` and the state's id `[b]`; gives both as int32.

    Raises:
        ValueError: a shape does not fit.
        TypeError: they are not integers.
    """
    b, t = sizes["b"], sizes["t"]
    if segment_ids is not None:
        segment_ids = _ids(f"{op}: segment_ids", segment_ids, (b, t))
    return segment_ids, _ids(f"{op}: last_id of initial_state", last_id, (b,))


def _ids(what: str, array: jax.Array, expected: tuple[int, ...]) -> jax.Array:
    if array.shape != expected:
        raise ValueError(f"{what} has shape {array.shape}; it must be {expected}")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{what} has dtype {array.dtype}; it must be int32")
    return jnp.asarray(array, jnp.int32)
