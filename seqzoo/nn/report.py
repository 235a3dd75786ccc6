"""What a mixer tells while it runs: auxiliary losses, diagnostics for the log, and refusals.

Values are sown as nnx.Intermediate, so a mixer stays a plain function of its inputs. The stack
captures them layer by layer; a call outside of it drops them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

_LOSS, _VALUE, _SKIP = "loss__", "value__", "skip__"


class Reports(NamedTuple):
    """What all layers reported.

    Attributes:
        losses: scalars to add to the objective, by name, summed over layers.
        values: `[layers ...]` float32 by name, one entry per layer that reported, in order.
        skips: how many layers refuse this update, by reason.
    """

    losses: dict[str, jax.Array]
    values: dict[str, jax.Array]
    skips: dict[str, jax.Array]


EMPTY = Reports({}, {}, {})


def report(module: nnx.Module, name: str, value: jax.Array) -> None:
    """Reports a diagnostic of any (small) shape; the log shows its mean, and that of each layer
    (NAME/layer_0, ... of the layers that report it; not for names that have parts)."""
    _sow(module, _VALUE + name, jax.lax.stop_gradient(value))


def report_loss(module: nnx.Module, name: str, value: jax.Array) -> None:
    """Reports a scalar auxiliary loss, weighted already; tasks add it to the objective."""
    _sow(module, _LOSS + name, value)


def skip_update(module: nnx.Module, reason: str, when: jax.Array) -> None:
    """Asks that parameters stay as they are after this batch.

    The train step then takes neither loss nor gradients from it, finite or not, and counts it.

    Args:
        module: who asks.
        reason: a name for the log, such as "kernel_not_finite".
        when: bool [], whether to.
    """
    _sow(module, _SKIP + reason, jnp.float32(when))


def captured(module: nnx.Module, run, *args) -> tuple[Any, dict[str, jax.Array]]:
    """Runs `run(module, *args)` and returns its result and what was reported, by sown name.

    A name that was reported several times in one layer gets its mean (values) or sum (others).
    """
    result, sown = nnx.capture(run, nnx.Intermediate)(module, *args)
    found: dict[str, list[jax.Array]] = {}
    for path, value in nnx.to_flat_state(nnx.as_pure(sown)):
        items = value if isinstance(value, tuple | list) else (value,)
        name = next(part for part in reversed(path) if isinstance(part, str))
        found.setdefault(name, []).extend(jnp.asarray(item, jnp.float32) for item in items)
    return result, {
        name: sum(items) / (len(items) if name.startswith(_VALUE) else 1)
        for name, items in found.items()
    }


def gather(runs: Sequence[Sequence[Mapping[str, jax.Array]]]) -> Reports:
    """Joins the reports of all layers.

    Args:
        runs: what the blocks of each run's period told, with a leading axis over its repeats.
    """
    sums: dict[str, dict[str, jax.Array]] = {_LOSS: {}, _SKIP: {}}
    values: dict[str, list[jax.Array]] = {}
    for blocks in runs:
        told: dict[str, list[jax.Array]] = {}
        for name, value in (pair for reported in blocks for pair in reported.items()):
            if name.startswith(_VALUE):
                told.setdefault(name.removeprefix(_VALUE), []).append(value)
                continue
            kind = _LOSS if name.startswith(_LOSS) else _SKIP
            name = name.removeprefix(kind)
            sums[kind][name] = sums[kind].get(name, 0.0) + jnp.sum(value)
        for name, parts in told.items():  # layers follow one another within a repeat
            in_order = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
            values.setdefault(name, []).append(in_order)
    joined = {name: jnp.concatenate(parts) for name, parts in values.items()}
    return Reports(sums[_LOSS], joined, sums[_SKIP])


def _sow(module: nnx.Module, name: str, value: jax.Array) -> None:
    if hasattr(module, "__captures__"):  # flax warns where nobody captures
        module.sow(nnx.Intermediate, name, value)
