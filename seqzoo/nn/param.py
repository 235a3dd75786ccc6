"""Parameters that say how they are sharded and whether weight decay applies to them."""

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


def param(value: jax.Array, *, axes: Axes, decay: bool = True) -> nnx.Param:
    """A float32 parameter.

    Args:
        value: its initial value.
        axes: one logical axis name per dimension (`embed inner heads kv_heads head_dim mlp state
            conv vocab`) or None; the mesh rules (configs/mesh/) say what is sharded.
        decay: whether weight decay applies. Biases, norms and decay rates say no.

    Raises:
        ValueError: `axes` does not name every dimension.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"axes={axes} name {len(axes)} dimensions, the value has {value.ndim}")
    return nnx.Param(value.astype(jnp.float32), axes=tuple(axes), decay=decay)


def metadata(*axes: str | None, decay: bool = True) -> dict[str, object]:
    """What `param` would store, as a mapping for flax's own layers (`kernel_metadata=...`)."""
    return dict(axes=axes, decay=decay)


def declare(module: nnx.Module) -> None:
    """Gives plain parameters the answers of `decays` and `axes_of` before layers are stacked.

    Stacking adds a leading dimension, after which a vector would pass for a matrix.
    """
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable.set_metadata(axes=axes_of(variable), decay=decays(variable))


def decays(variable: nnx.Variable) -> bool:
    """Whether weight decay applies: as declared, else to parameters of two or more dimensions."""
    declared = variable.get_metadata().get("decay")
    return variable.get_value().ndim >= 2 if declared is None else declared


def axes_of(variable: nnx.Variable) -> Axes:
    """One logical name per dimension; None (replicated) for leading ones that stacking added."""
    declared = variable.get_metadata().get("axes") or ()
    return (None,) * (variable.get_value().ndim - len(declared)) + tuple(declared)
