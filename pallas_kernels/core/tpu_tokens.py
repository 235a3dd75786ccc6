"""TPU kernels with tokens on lanes: how arrays are turned, and a call whose operands have names.

Arrays are `[b h k t]`: the products of a chunk of tokens then need no array turned, and no array
ends in a narrow axis, which memory would pad to 128.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.core.tpu_places import pack

NN, NT, TN = (1, 0), (1, 1), (0, 0)  # contracted axes of tpu_parts.dot
ROWS = 16  # of a bfloat16 register
LOWEST = -1e30  # a log decay: exp of it is 0 in any precision, and sums of it are finite


def product_dtype(*arrays: jax.Array) -> Any:
    """What the matrix units are given: bfloat16 where all arrays are."""
    return jnp.bfloat16 if all(a.dtype == jnp.bfloat16 for a in arrays) else jnp.float32


def tokens_last(x: jax.Array, block: int) -> jax.Array:
    """`[b h k t]` from `[b t h k]`: k up to a multiple of 16, t to one of the block."""
    x = jnp.moveaxis(x, 1, -1)
    x = tpu.pad_to(x, 3, tpu.round_up(x.shape[3], block))
    return tpu.pad_to(x, 2, tpu.round_up(x.shape[2], ROWS))


def tokens_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """`[b t h k]` in the shape of another one, from `[b h k t]`."""
    return jnp.moveaxis(x[:, :, : like.shape[3], : like.shape[1]], -1, 1)


def places(
    t: int, segment_ids: jax.Array | None, last_id: jax.Array, config: Any
) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    """What a call's tokens see (tpu_places.py).

    Args:
        t: tokens.
        segment_ids: int32 `[b t]` or None.
        last_id: int32 `[b]`.
        config: with a chunk and a block.

    Returns:
        int32 `[b 1 t]`, t up to whole blocks, None where all see all before them; bool `[b t]`,
        where there is a token, None with it; the ids to carry on.
    """
    padded = tpu.round_up(t, config.block)
    if segment_ids is None and padded == t:
        return None, None, last_id
    shape = (last_id.shape[0], t)
    reset, valid = jnp.zeros(shape, bool), jnp.ones(shape, bool)
    if segment_ids is not None:
        reset, valid, last_id = boundaries(segment_ids, last_id)
    document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)  # 0 = the one of the state
    return pack(document, valid, config.chunk, padded), valid, last_id


def named_call(
    body: Callable,
    *,
    name: str,
    config: tpu.TpuConfig,
    grid: tuple[int, ...],
    semantics: Sequence[str],
    inputs: Mapping[str, tuple[Any, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """`tpu.kernel_call` of a body that takes one dict of references by name.

    Args:
        body: a fresh partial for each call.
        name: of the call.
        config: of the form.
        grid: steps.
        semantics: per grid axis.
        inputs: arrays and their blocks; an array of None is not there.
        outputs: shapes and their blocks.
        scratch: pltpu.VMEM((...), dtype), ...

    Returns:
        The results by name.
    """
    inputs = {key: pair for key, pair in inputs.items() if pair[0] is not None}
    names = (*inputs, *outputs, *scratch)

    def run(*refs, names, body):
        body(dict(zip(names, refs, strict=True)))

    results = tpu.kernel_call(
        functools.partial(run, names=names, body=body),
        name=name,
        config=config,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        semantics=semantics,
        scratch_shapes=list(scratch.values()),
    )(*(x for x, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))
