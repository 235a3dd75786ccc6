"""What constructors check of their settings, and mixers of what they are called with."""

from typing import Any

import jax
import jax.numpy as jnp


def at_least(least: float, **settings: float) -> None:
    """Refuses a setting that is too small.

    Raises:
        ValueError: names the first one, its value and what is allowed.
    """
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def head_widths(d_model: int, n_heads: int, name: str, expand: float) -> int:
    """expand * d_model, the width of all heads together.

    Raises:
        ValueError: it is no whole multiple of n_heads.
    """
    width = int(expand * d_model)
    if width < n_heads or width % n_heads:
        raise ValueError(
            f"{name} is {expand}: {width} channels (of d_model {d_model}) do not make "
            f"{n_heads} heads (n_heads) of equal width"
        )
    return width


def check_call(x: Any, segment_ids: Any, state: Any, kind: type) -> None:
    """Refuses what is no chunk, and a state that is another mixer's or of other rows.

    Much of it would broadcast, and give numbers.

    Args:
        x: must be `[b t d]`, of a float type.
        segment_ids: must be integers `[b t]`, or None.
        state: must be of b rows, or None.
        kind: class of the mixer's state.

    Raises:
        ValueError: a shape does not fit.
        TypeError: numbers are of the wrong type, or the state is.
    """
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}; it must be [b t d], and [b d] for step")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; it must be a float type (embed tokens first)")
    b, t, _ = x.shape
    if segment_ids is not None:
        if segment_ids.shape != (b, t):
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape} and x {x.shape}; it must be {(b, t)}"
            )
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids has dtype {segment_ids.dtype}; it must be int32")
    if state is None:
        return
    if not isinstance(state, kind):
        raise TypeError(
            f"state is a {type(state).__name__}; this mixer takes the {kind.__name__} that its "
            "init_state or its last call gave"
        )
    rows = jax.tree.leaves(state)[0].shape[0]
    if rows != b:
        raise ValueError(f"state has {rows} rows and x {b}; init_state({b}) makes one that fits x")
