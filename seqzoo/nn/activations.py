"""Activations by name."""

import jax

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # the exact one, by erf
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "identity": lambda x: x,
}


def check_activation(name: str) -> None:
    """Refuses a name that there is not.

    Raises:
        ValueError: says what is allowed.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}; allowed: {', '.join(ACTIVATIONS)}")


def activate(name: str, x: jax.Array) -> jax.Array:
    """The activation of that name, element by element."""
    return ACTIVATIONS[name](x)
