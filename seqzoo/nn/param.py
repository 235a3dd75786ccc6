"""Parameters that say how they are sharded and what the optimizer may do to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


class Prepared(nnx.Variable):
    """What follows from parameters, computed once: it is not trained."""


class Rates(NamedTuple):
    """What a parameter has instead of the optimizer's settings; None = the optimizer's.

    Attributes:
        lr: peak learning rate; the schedule scales it as it scales optimizer.lr.
        weight_decay: strength of weight decay.
    """

    lr: float | None
    weight_decay: float | None


def param(
    value: jax.Array,
    *,
    axes: Axes,
    decay: bool = True,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> nnx.Param:
    """A float32 parameter.

    Args:
        value: its initial value.
        axes: one logical axis name per dimension (`embed inner heads kv_heads head_dim mlp state
            conv vocab`) or None; the mesh rules (configs/mesh/) say what is sharded.
        decay: whether weight decay applies. Biases, norms and decay rates say no.
        lr: a peak learning rate of its own in place of optimizer.lr: absolute, as recipes publish
            it, so a sweep over optimizer.lr leaves it alone; the schedule applies. 0 = it stays
            as it starts.
        weight_decay: a strength of its own in place of optimizer.weight_decay.

    Raises:
        ValueError: `axes` does not name every dimension, or a rate is negative or contradicts
            `decay`.
    """
    if len(axes) != value.ndim:
        raise ValueError(f"axes={axes} name {len(axes)} dimensions, the value has {value.ndim}")
    declared = metadata(*axes, decay=decay, lr=lr, weight_decay=weight_decay)
    return nnx.Param(value.astype(jnp.float32), **declared)


def metadata(
    *axes: str | None,
    decay: bool = True,
    lr: float | None = None,
    weight_decay: float | None = None,
) -> dict[str, object]:
    """What `param` would store, as a mapping for flax's own layers (`kernel_metadata=...`)."""
    for name, rate in dict(lr=lr, weight_decay=weight_decay).items():
        if rate is not None and not rate >= 0:
            raise ValueError(f"{name} is {rate}; it must be 0 or more")
    if weight_decay and not decay:
        raise ValueError(f"weight_decay is {weight_decay} and decay=False; one of them must go")
    own = dict(lr=lr, weight_decay=weight_decay)
    return dict(axes=axes, decay=decay) | {k: v for k, v in own.items() if v is not None}


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


def own_rates(variable: nnx.Variable) -> Rates | None:
    """What it has instead of the optimizer's settings; None = nothing."""
    declared = variable.get_metadata()
    rates = Rates(declared.get("lr"), declared.get("weight_decay"))
    return None if rates == (None, None) else rates


def axes_of(variable: nnx.Variable) -> Axes:
    """One logical name per dimension; None (replicated) for leading ones that stacking added."""
    declared = variable.get_metadata().get("axes") or ()
    return (None,) * (variable.get_value().ndim - len(declared)) + tuple(declared)
