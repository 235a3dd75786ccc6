"""dilated_conv as Mosaic TPU kernels: the whole stack in one pass over time.

Kept between forward and backward: the arguments; of long rows also what the levels read before each
segment. README.md has grid, blocks and bytes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch, tpu
from pallas_kernels.core.segments import boundaries
from pallas_kernels.core.tpu_parts import limit_for, most_room
from pallas_kernels.dilated_conv import ring as rings
from pallas_kernels.dilated_conv import xla
from pallas_kernels.dilated_conv.tpu_backward import backward, scratch_of
from pallas_kernels.dilated_conv.tpu_forward import forward, sight_rows
from pallas_kernels.dilated_conv.tpu_plan import Plan, plan_of

# Of the scoped limit: what blocks and scratch take; the compiler needs little else.
_SHARE = 0.72


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpuConfig(tpu.TpuConfig):
    """How the work is cut.

    Attributes:
        block: tokens of a step; a multiple of rows.
        rows: tokens that are worked on at once; a multiple of 8.
        segment: tokens whose levels the backward pass holds at once; a multiple of the block.
    """

    block: int = 512
    rows: int = 32
    segment: int = 16_384

    def __post_init__(self):
        if self.rows % 8 or self.rows < 8 or self.block % self.rows or self.segment % self.block:
            raise ValueError(
                f"dilated_conv: config has block={self.block}, rows={self.rows}, segment="
                f"{self.segment}; rows must be a multiple of 8, block of rows, segment of block"
            )


def refuses(shapes, device_kind) -> str | None:
    """The reason against a call; see `dilated_conv`."""
    del device_kind
    return tpu.refuses_dtypes(shapes)


def refuses_options(shapes, device_kind, *, dilations, activation, symmetric, fresh) -> str | None:
    """The reason against these options."""
    x, weight = shapes[:2]
    if x.shape[1] == 1 and not symmetric:
        return "one token of a stream meets rings as they lie"
    how = dict(dilations=dilations, activation=activation, symmetric=symmetric, past=not fresh)
    need = _fitting(x, weight, True, PallasTpuConfig(device_kind=device_kind), **how)[1]
    most = most_room(device_kind, _SHARE)
    if need > most:
        return (
            f"what its levels reach back to takes {need / tpu.MIB:.0f} MiB of vector memory and "
            f"there is room for {most / tpu.MIB:.0f}; smaller dilations or shorter rows fit"
        )
    return None


def _fitting(x, weight, documents: bool, config, **how) -> tuple[Plan, int]:
    """The plan with the longest segments that fit, and the bytes of vector memory it takes."""
    most, segment = most_room(config.device_kind, _SHARE), config.segment
    while True:
        plan = _plan(x, weight, documents, config, segment, **how)
        need = _bytes(plan, weight, x.dtype)
        shorter = max(config.block, segment // 2 // config.block * config.block)
        if need <= most or how["symmetric"] or shorter == segment:
            return plan, need
        segment = shorter


def _plan(x, weight, documents, config, segment, *, dilations, activation, symmetric, past) -> Plan:
    t = x.shape[1]
    block = min(config.block, tpu.round_up(t, config.rows))
    return plan_of(
        t,
        weight.shape[1],
        dilations,
        symmetric=symmetric,
        past=past,
        block=block,
        rows=config.rows,
        residual=activation == "relu_res",
        documents=documents,
        segment=-(-t // block) if symmetric else max(1, segment // block),
    )


def _bytes(plan: Plan, weight, dtype) -> int:
    """Of the vector memory that the backward kernel takes, which is the larger one."""
    levels, taps, _ = weight.shape
    rows = (2 * len(plan.levels), 2 * len(plan.levels) + 2) if plan.late else (1, 2)
    scratch = scratch_of(plan, levels * (taps + 1), rows if plan.documents else (0, 0))
    starts = 2 * sum(plan.planes()) if plan.segments > 1 else 0
    blocks = 6 * plan.block * jnp.dtype(dtype).itemsize
    return tpu.LANES * (4 * (sum(x.shape[0] for x in scratch) + starts) + blocks)


def run(
    x, weight, bias, ring, count, last_id, segment_ids, *, config, dilations, activation, symmetric,
    fresh,
):  # fmt: skip
    """See `dilated_conv`; gives y, ring, count, last_id (symmetric: y alone)."""
    b, t, e = x.shape
    kind = dispatch.device_kind(config)
    # A table of tile sizes (core/tuned.py) compares numbers.
    sizes = dict(b=b, t=t, e=e, w=weight.shape[1], itemsize=x.dtype.itemsize)
    sizes |= {f"d{i}": dilation for i, dilation in enumerate(dilations)}
    config = PallasTpuConfig.of(config, sizes, kind)
    config = dataclasses.replace(config, device_kind=kind)
    how = dict(dilations=dilations, activation=activation, symmetric=symmetric)
    documents = segment_ids is not None
    plan, need = _fitting(x, weight, documents, config, past=not fresh, **how)
    if config.vmem_limit_bytes is None:
        config = dataclasses.replace(config, vmem_limit_bytes=limit_for(need, kind, _SHARE))
    if not fresh:
        y, ring = _stream(x, weight, bias, ring, count, last_id, segment_ids, plan, config)
        state = xla.after_call(x, count, last_id, segment_ids)
        return y, ring, state.count, state.last_id
    weight_rows, rows = _rows(weight, bias)
    sights = None
    if documents:
        starts, valid, _ = boundaries(segment_ids, jnp.zeros_like(last_id))
        seen = xla.sights_of(segment_ids, starts, valid, jnp.zeros_like(count))
        sights = tuple(jnp.where(valid, one, -1) for one in seen)
    y = _stack(x, weight_rows, rows, sights, plan, config)
    if symmetric:
        return y
    _, *state = xla.run(
        x, weight, bias, ring, count, last_id, segment_ids, config=None, fresh=fresh, **how
    )
    return y, *state


def _rows(weight, bias):
    """Weights `[j*w e]` and biases `[j e]` in float32."""
    levels, _, e = weight.shape
    rows = weight.astype(jnp.float32).reshape(-1, e)
    return rows, jnp.zeros((levels, e)) if bias is None else bias.astype(jnp.float32)


# --- Without a past -----------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _stack(x, weight, bias, sights, plan: Plan, config):
    """y `[b t e]` of a stack without a past."""
    ahead = None if sights is None else _ahead_of_sweep(sights, plan, plan.hold, plan.extra)
    return forward(x, weight, bias, ahead, plan, config, save=False)[0]


def _ahead_of_sweep(sights, plan: Plan, hold: int, extra: int):
    """What tokens see at the outputs of each level, as the forward kernel meets them."""
    n = (plan.blocks + extra) * plan.block
    late = plan.lateness()[1:] if plan.late else [0]
    return _shifted(sights, [-hold - by for by in late], n)[:, : sight_rows(plan)]


def _shifted(sights, shifts, n: int):
    """behind and ahead by turns, int32 `[b 2*shifts n]`: place m holds that of m + shift."""
    rows = []
    for by in shifts:
        for row in sights:
            t = row.shape[1]
            row = jnp.pad(row, ((0, 0), (max(0, -by), max(0, n + by - t))), constant_values=-1)
            rows.append(row[:, max(0, by) : max(0, by) + n])
    return jnp.stack(rows, axis=1)


def _stack_forward(x, weight, bias, sights, plan, config):
    ahead = None if sights is None else _ahead_of_sweep(sights, plan, plan.hold, plan.extra)
    y, starts = forward(x, weight, bias, ahead, plan, config, save=True)
    return y, (x, weight, bias, sights, starts)


def _stack_backward(plan, config, residuals, dy):
    x, weight, bias, sights, starts = residuals
    both = None
    if sights is not None:
        n = (plan.blocks + plan.extra) * plan.block
        early = plan.earliness() if plan.late else [0]
        back = [by - plan.extra * plan.block for by in early]
        both = (_ahead_of_sweep(sights, plan, 0, plan.extra), _shifted(sights, back, n))
    dx, dweight, dbias = backward(x, weight, bias, starts, both, dy, plan, config)
    return dx, dweight, dbias, None


_stack.defvjp(_stack_forward, _stack_backward)


# --- With a past --------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _stream(x, weight, bias, ring, count, last_id, segment_ids, plan: Plan, config):
    """y and the ring after; the backward pass is xla's."""
    call = xla.after_call(x, count, last_id, segment_ids)
    lie = rings.places(weight.shape[1], tuple(level.dilation for level in plan.levels))
    parts = []
    for at, margin in zip(lie, plan.margins(), strict=True):
        old = rings.in_order(ring[:, at], count)
        parts.append(jnp.pad(old, ((0, 0), (margin - old.shape[1], 0), (0, 0))))
    sights, end = None, jnp.full_like(count, x.shape[1])
    if call.sights is not None:  # the past stands right before the first token: it comes first
        behind = jnp.where(call.sights.valid, call.sights.behind, -1)
        x, behind = (rings.turned(row, call.first) for row in (x, behind))
        sights = _ahead_of_sweep((behind, behind), plan, 0, 0)
        end = jnp.maximum(call.end + 1 - call.first, 1)
    past = jnp.concatenate(parts, axis=1)
    rows, biases = _rows(weight, bias)
    y, last = forward(x, rows, biases, sights, plan, config, past=past, end=end)
    if call.sights is not None:
        y = rings.turned(y, -call.first)
    new, stop = [], 0
    for at, margin in zip(lie, plan.margins(), strict=True):
        stop = stop + margin
        read = last[:, stop - (at.stop - at.start) : stop]
        new.append(rings.from_last(ring[:, at], read, call.count, call.held > 0, call.reset))
    return y, jnp.concatenate(new, axis=1)


def _stream_forward(x, weight, bias, ring, count, last_id, segment_ids, plan, config):
    given = (x, weight, bias, ring, count, last_id, segment_ids)
    return _stream(*given, plan, config), given


def _stream_backward(plan, config, given, cotangents):
    del config
    x, weight, bias, ring, *more = given
    how = dict(
        dilations=tuple(level.dilation for level in plan.levels),
        activation="relu_res" if plan.residual else "linear",
        symmetric=False,
    )

    def call(x, weight, bias, ring):
        return xla.run(x, weight, bias, ring, *more, config=None, fresh=False, **how)[:2]

    _, pull = jax.vjp(call, x, weight, bias, ring)
    return *pull(cotangents), None, None, None


_stream.defvjp(_stream_forward, _stream_backward)
