"""What a mixer tells while it runs: auxiliary losses, and diagnostics for the log.

Values are sown as nnx.Intermediate, so a mixer stays a plain function of its inputs. The stack
captures them layer by layer; a call outside of it drops them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

_LOSS, _VALUE = "loss__", "value__"


class Reports(NamedTuple):
    """What all layers reported.

    Attributes:
        losses: scalars to add to the objective, by name, summed over layers.
        values: `[layers ...]` float32 by name, one entry per layer that reported, in order.
    """

    losses: dict[str, jax.Array]
    values: dict[str, jax.Array]


EMPTY = Reports({}, {})


def report(module: nnx.Module, name: str, value: jax.Array) -> None:
    """Reports a diagnostic of any (small) shape; the log shows its mean."""
    _sow(module, _VALUE + name, jax.lax.stop_gradient(value))


def report_loss(module: nnx.Module, name: str, value: jax.Array) -> None:
    """Reports a scalar auxiliary loss, weighted already; tasks add it to the objective."""
    _sow(module, _LOSS + name, value)


def captured(module: nnx.Module, run, *args) -> tuple[Any, dict[str, jax.Array]]:
    """Runs `run(module, *args)` and returns its result and what was reported, by sown name.

    A name that was reported several times in one layer gets its sum (losses) or mean (values).
    """
    result, sown = nnx.capture(run, nnx.Intermediate)(module, *args)
    found: dict[str, list[jax.Array]] = {}
    for path, value in nnx.to_flat_state(nnx.as_pure(sown)):
        items = value if isinstance(value, tuple | list) else (value,)
        name = next(part for part in reversed(path) if isinstance(part, str))
        found.setdefault(name, []).extend(jnp.asarray(item, jnp.float32) for item in items)
    return result, {
        name: sum(items) if name.startswith(_LOSS) else sum(items) / len(items)
        for name, items in found.items()
    }


def gather(layers: list[Mapping[str, jax.Array]]) -> Reports:
    """Joins the reports of blocks, each with a leading axis over its repeats."""
    losses: dict[str, jax.Array] = {}
    values: dict[str, list[jax.Array]] = {}
    for reported in layers:
        for name, value in reported.items():
            if name.startswith(_LOSS):
                name = name.removeprefix(_LOSS)
                losses[name] = losses.get(name, 0.0) + jnp.sum(value)
            else:
                values.setdefault(name.removeprefix(_VALUE), []).append(value)
    return Reports(losses, {name: jnp.concatenate(parts) for name, parts in values.items()})


def _sow(module: nnx.Module, name: str, value: jax.Array) -> None:
    if hasattr(module, "__captures__"):  # flax warns where nobody captures
        module.sow(nnx.Intermediate, name, value)
