"""selective_scan's GPU kernels called on stretches of time that are rows of their own."""

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.gpu_backward import backward
from pallas_kernels.selective_scan.gpu_forward import forward
from pallas_kernels.selective_scan.gpu_parts import LOG2_E, How
from pallas_kernels.selective_scan.gpu_summary import summary


def _inputs(arrays: dict, flags: jax.Array | None) -> dict:
    """What both kernels take, without states."""
    along = [arrays["B"], arrays["C"], *([] if flags is None else [flags])]
    channels = [arrays["A"] * LOG2_E, arrays["D"][None], arrays["bias"][None]]
    some = {name: arrays[name] for name in ("u", "delta", "z") if name in arrays}
    return dict(**some, along=jnp.concatenate(along, 1), channels=jnp.concatenate(channels, 0))


def _cut(inputs: dict, splits: int) -> dict:
    """Stretches of time as rows of their own."""
    if splits == 1:
        return inputs

    def one(name, x):
        if name == "channels":
            return x
        if name != "along":
            return x.reshape(-1, x.shape[1] // splits, *x.shape[2:])
        b, rows, t = x.shape
        x = jnp.swapaxes(x.reshape(b, rows, splits, t // splits), 1, 2)
        return x.reshape(b * splits, rows, t // splits)

    return {name: one(name, x) for name, x in inputs.items()}


def _resets(flags: jax.Array | None, splits: int) -> jax.Array | None:
    """Whether a document begins in a stretch `[b splits]`."""
    if flags is None:
        return None
    return jnp.any(flags[:, 1].reshape(flags.shape[0], splits, -1) < 0, axis=2)


def run_forward(arrays: dict, flags: jax.Array | None, how: How, *, save: bool) -> dict:
    """`forward`, stretch by stretch; h and starts are the sequences' own."""
    splits, h = how.config.splits, arrays["h"]
    inputs = _cut(_inputs(arrays, flags), splits)
    if splits > 1:
        found = summary(inputs, how)
        starts = _starts(found, arrays["A"], _resets(flags, splits), h)
        found = forward({**inputs, "h": starts.reshape(-1, *h.shape[1:])}, how, save=save)
        found["h"] = found["h"].reshape(starts.shape)[:, -1]
    else:
        found = forward({**inputs, "h": h}, how, save=save)
    joined = {x: found[x].reshape(h.shape[0], -1, *found[x].shape[2:]) for x in found if x != "h"}
    return {**joined, "h": found["h"]}


def run_backward(arrays: dict, flags: jax.Array | None, more: dict, how: How) -> dict:
    """`backward`, stretch by stretch; B and C summed over blocks of channels."""
    splits, dlast = how.config.splits_backward, more.pop("dlast")
    inputs = _cut({**_inputs(arrays, flags), **more}, splits)
    if splits > 1:
        resets = _resets(flags, splits)
        resets = None if resets is None else resets[:, ::-1]
        found = summary(inputs, how, reverse=True)
        found = tuple(x.reshape(-1, splits, *x.shape[1:])[:, ::-1] for x in found)
        lasts = _starts(found, arrays["A"], resets, dlast)[:, ::-1]
        found = backward({**inputs, "dlast": lasts.reshape(-1, *dlast.shape[1:])}, how)
        found["h"] = found["h"].reshape(lasts.shape)[:, 0]
    else:
        found = backward({**inputs, "dlast": dlast}, how)
    b, n, t = arrays["B"].shape
    group = how.config.group_backward
    both = jnp.sum(found.pop("BC"), axis=1).reshape(b, t // group, n, 2, group)
    both = jnp.transpose(both, (3, 0, 2, 1, 4)).reshape(2, b, n, t)
    sums = jnp.sum(found.pop("sums"), axis=0)
    found["A"] = jnp.sum(found["A"], axis=0)
    tokens = {x: found[x].reshape(b, t, -1) for x in ("u", "delta", "z") if x in found}
    return {**found, **tokens, "B": both[0], "C": both[1], "D": sums[0], "bias": sums[1]}


def _starts(found: tuple, rates: jax.Array, reset: jax.Array | None, h: jax.Array) -> jax.Array:
    """The state before each stretch, `[b splits n e]`.

    Args:
        found: by `summary`, a row per stretch; or those as `[b splits ...]`, in the order in which
            the state passes.
        rates: A `[n e]`.
        reset: whether a document begins in a stretch, `[b splits]`; None = nowhere.
        h: the state before the first `[b n e]`.
    """
    last, d = (x.reshape(h.shape[0], -1, *x.shape[-2:]) for x in found)
    decay = jnp.exp(d * rates)
    if reset is not None:
        decay = jnp.where(reset[..., None, None], 0, decay)
    starts = [h]
    for i in range(last.shape[1] - 1):
        starts.append(decay[:, i] * starts[-1] + last[:, i])
    return jnp.stack(starts, axis=1)
