"""In which precision operators accumulate, and checks that every operator makes."""

import jax
import jax.numpy as jnp


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """What states and sums are kept in: float32 for bf16 and float32, float64 for float64."""
    dtypes = [a.dtype for a in arrays if a is not None]
    return jnp.result_type(jnp.float32, *dtypes)


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
