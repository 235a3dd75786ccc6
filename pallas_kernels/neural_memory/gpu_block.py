"""What a block of threads of neural_memory's GPU kernels has: memory, tokens, its cluster."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu import kernel_call
from pallas_kernels.neural_memory.gpu_call import GATES, Call, Cuts, exchanged
from pallas_kernels.neural_memory.gpu_machine import (
    Far,
    Places,
    Registers,
    Tile,
    Vector,
    tile_type,
)
from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.neural_memory.gpu_tiles import SIZE
from pallas_kernels.neural_memory.memory import Weights

_weights: Any = Weights  # of references, places


# --- Memory --------------------------------------------------------------------------------------


def scratch(call: Call, plan: Plan, tokens: int, states: int = 0) -> dict[str, Any]:
    """Shared memory of a block.

    Args:
        call: what is static.
        plan: that is run in it.
        tokens: tiles of tokens per block of them.
        states: tiles of weights that stay.
    """
    lead = (call.form.blocks,) if call.interpret and call.form.blocks > 1 else ()
    copies = 2 * (lead or (1,))[0]
    found: dict[str, Any] = dict(
        # Those of tokens lie behind the others: a second array would have addresses of its own.
        tiles=tile_type(*lead, states * 3 + plan.tiles * call.parts + 2 * tokens * call.narrow),
        vectors=plgpu.SMEM((*lead, max(plan.vectors, 1), SIZE), jnp.float32),
        rows=plgpu.SMEM((*lead, 4, SIZE), jnp.float32),
        gates=plgpu.SMEM((*lead, 2, GATES, SIZE), jnp.float32),
        zero=plgpu.SMEM((1,), jnp.int32),
        came=plgpu.Barrier(num_arrivals=1 + tokens * call.narrow, num_barriers=copies),
    )
    if call.form.blocks > 1:
        several = exchanged(states)
        shape = (*lead, several, SIZE, SIZE)
        found |= dict(
            tile=plgpu.SMEM(shape, jnp.float32, transforms=() if lead else _FLOAT),
            full=_meeting(call, lead),
        )
        if several == 1:
            found["empty"] = _meeting(call, lead)
    return found


_FLOAT = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def _meeting(call: Call, lead: tuple[int, ...]) -> Any:
    if lead:
        return plgpu.Barrier(num_arrivals=call.form.blocks)
    return plgpu.ClusterBarrier(collective_axes=("j",))


def start(call: Call, body, *, name: str, inputs, results, memory):
    """Calls a kernel with a block (or a cluster) for each row and head.

    Interpreted, the blocks of a cluster are the warpgroups of one: the interpreter knows no other
    way to share memory.

    Args:
        call: what is static.
        body: takes a Block, and trees of references: inputs, results.
        name: of the kernel.
        inputs: tree of arrays.
        results: tree of ShapeDtypeStructs.
        memory: of `scratch`.
    """
    given, tree = jax.tree.flatten(inputs)
    wanted, result_tree = jax.tree.flatten(results)
    places, scratch_tree = jax.tree.flatten(memory)
    form = call.form

    def flat(*refs):
        a, b = len(given), len(given) + len(wanted)
        block = Block(call, jax.tree.unflatten(scratch_tree, refs[b:]))
        body(
            block,
            jax.tree.unflatten(tree, refs[:a]),
            jax.tree.unflatten(result_tree, refs[a:b]),
        )

    several: dict[str, Any] = {}
    if form.blocks > 1:
        several = dict(cluster=(form.blocks,), cluster_names=("j",))
        if call.interpret:
            several = dict(num_threads=form.blocks, thread_name="j")
    found = kernel_call(
        flat,
        name=name,
        config=call.config,
        out_type=wanted,
        scratch_types=places,
        grid=(call.b, call.h),
        grid_names=("b", "h"),
        # Every layout is named (gpu_machine.py), so there is nothing to search for.
        semantics=plgpu.LoweringSemantics.Lane,
        **several,
    )(*given)
    return jax.tree.unflatten(result_tree, found)


class Block:
    """A block of threads at work: its place, its memory, and the blocks that it works with."""

    def __init__(self, call: Call, memory: dict[str, Any]):
        self.call, self.memory = call, memory
        self.cuts: Cuts | None = None
        self.registers = Registers(call.interpret, self.fresh)
        self.b, self.h = (jax.lax.axis_index(x) for x in "bh")
        self.blocks = call.form.blocks
        self.j = jax.lax.axis_index("j") if self.blocks > 1 else jnp.int32(0)
        self.emulated = call.interpret and self.blocks > 1

    def mine(self, ref: Any) -> Any:
        return ref.at[self.j] if self.emulated else ref

    def fresh(self) -> Any:
        """A 0 that is read from memory.

        Places and indices are counted from it. The compiler would compute every address and every
        mask once, before the loop, and hold them all.
        """
        return self.memory["zero"][0]

    def tile(self, first: int, parts: int) -> Tile:
        tiles = self.mine(self.memory["tiles"])

        def find():
            zero = self.fresh()
            return tuple(tiles.at[zero ^ (first + i)] for i in range(parts))

        return Tile(find, self.registers)

    def row(self, of: str, at: int) -> Vector:
        return Vector(lambda: self.mine(self.memory[of]).at[self.number(at)], self.registers)

    def places(self, plan: Plan, far: Any, states: int) -> Places:
        """Where a plan's values lie; `far` is `[b h j n 64 64]` or None."""
        parts = self.call.parts
        return Places(
            [self.tile(3 * states + i * parts, parts) for i in range(plan.tiles)],
            lambda at: self.out(far, self.h, self.j, number=at),
            lambda at: self.row("vectors", at),
            self.row("rows", 3),
        )

    # --- Weights

    def number(self, at: Any) -> Any:
        """That number, as the compiler does not know it.

        A sum with the 0 would be taken apart again: where each place lies, but for the 0, would be
        held in registers.
        """
        return self.fresh() ^ at

    def out(self, ref: Any, *at: Any, number: int | None = None) -> Far:
        """What of an array `[b ...]` in device memory belongs to this block's row; an index may be
        a function that finds it anew, and the last one a number that is known now."""

        def find():
            last = () if number is None else (self.number(number),)
            found = (x() if callable(x) else x for x in at)
            return ref.at[(self.number(self.b), *found, *last)]

        return Far(find, self.registers)

    def once(self, ref: Any, *at: Any) -> Far:
        """What all blocks of a cluster have, and the first one writes."""
        when = None if self.blocks == 1 else self.j == 0
        return dataclasses.replace(self.out(ref, *at), when=when)

    def far(self, weights: Weights, *lead: Any, rarely: bool = False) -> Weights:
        """This block's share of weights in device memory, `[b ... h x y]`.

        What is looked at `rarely`, in a branch of a loop, has all of its place found there: the
        compiler would find the head's before the loop, and keep it through all turns.
        """
        again = self.number if rarely else lambda x: x
        h = lambda: again(self.h)
        columns: Any = slice(None)
        if self.blocks > 1:
            columns = lambda: pl.ds(again(self.j) * SIZE, SIZE)
        at = (*lead, h)
        return _weights(
            self.out(weights.w_out, *at, slice(None), columns),
            None if weights.w_in is None else self.out(weights.w_in, *at, columns, slice(None)),
            None,
            None if weights.gamma is None else self.once(weights.gamma, *at),
        )

    def states(self) -> tuple[Weights, ...]:
        """Two sets of weights in shared memory."""
        each = 2 if self.call.mlp else 1
        return tuple(
            _weights(
                self.tile(3 * each * i, 3),
                self.tile(3 * each * i + 3, 3) if self.call.mlp else None,
                None,
                self.row("rows", i) if self.call.gain else None,
            )
            for i in range(2)
        )

    # --- Tokens

    @property
    def count(self) -> Any:
        """Blocks of tokens of this block's row."""
        return self.call.n if self.cuts is None else self.cuts.count[self.number(self.b)]

    def when_begins(self, i, do: Callable[[], None]) -> None:
        """Does something where a document begins with block i."""
        if self.cuts is not None:
            pl.when(self.cuts.begins[self.number(self.b), i] > 0)(do)

    def token(self, refs, at: int, parity) -> Any:
        """Where a tile of array `at` among those of tokens lies."""
        tiles = self.mine(self.memory["tiles"])
        return tiles.at[tiles.shape[0] + 2 * (at - len(refs)) + parity]

    def fetch(self, refs, gates, i, parity) -> None:
        """Begins to bring block i of tokens `[b t h 64]` and shares `[b h n 4 64]`."""
        came = self.memory["came"].at[2 * self.j + parity if self.emulated else parity]
        rows = pl.ds(i * SIZE, SIZE)
        if self.call.narrow:
            for at, ref in enumerate(refs):
                to = self.token(refs, at, parity)
                plgpu.copy_gmem_to_smem(ref.at[self.b, rows, self.h], to, came)
        to = self.mine(self.memory["gates"]).at[parity]
        plgpu.copy_gmem_to_smem(gates.at[self.b, self.h, i], to, came)

    def fetched(self, refs, i, parity) -> tuple[list[Any], list[Vector]]:
        """Waits for them: where tokens and shares lie."""
        plgpu.barrier_wait(self.memory["came"].at[2 * self.j + parity if self.emulated else parity])
        rows = pl.ds(i * SIZE, SIZE)
        gates = self.mine(self.memory["gates"])

        def tile(at) -> Tile:
            return Tile(lambda: (self.token(refs, at, self.number(parity)),), self.registers)

        def share(row) -> Vector:
            return Vector(lambda: gates.at[self.number(parity), row], self.registers)

        found: list[Any] = [tile(at) for at in range(len(refs))]
        if not self.call.narrow:
            found = [self.out(ref, rows, self.h) for ref in refs]
        return found, [share(row) for row in range(GATES)]

    # --- The cluster

    def open(self) -> None:
        self.memory["zero"][0] = jnp.int32(0)
        if "empty" in self.memory:
            plgpu.barrier_arrive(self.memory["empty"])

    def turn(self, step: Any, plan: Plan) -> None:
        """At the beginning of a step: the tiles for exchange go on where the last one left off."""
        count = sum(x.node is not None and x.node.name == "across" for x in plan.steps)
        self.step, self.exchanged = step * (count % 2), 0

    def close(self) -> None:
        """Others may still read what lies here."""
        if "empty" in self.memory:
            plgpu.barrier_wait(self.memory["empty"])
        elif self.blocks > 1:
            self.meet()

    def meet(self) -> None:
        plgpu.barrier_arrive(self.memory["full"])
        plgpu.barrier_wait(self.memory["full"])

    def across(self, x: jax.Array, axis: int) -> jax.Array:
        """The sum over the blocks of a cluster, in the same order in each of them."""
        if x.ndim == 1:  # a column; others' memory is read by tiles
            assert axis == 0
            tile = self.across(jax.lax.broadcast_in_dim(x, (SIZE, SIZE), (0,)), 0)
            return jnp.sum(tile, axis=1) * (1 / SIZE)
        ref, alone = self.memory["tile"], "empty" in self.memory
        which = 0 if alone else jax.lax.rem(self.number(self.step) + self.exchanged, 2)
        self.exchanged += 1
        if alone:
            plgpu.barrier_wait(self.memory["empty"])
        self.mine(ref).at[which][...] = x
        self.meet()
        found: Any = None
        for j in range(self.blocks):
            # With a constant, where each thread reads each peer's would be held in registers.
            at = self.number(j)
            peer = ref.at[at] if self.emulated else plgpu.cluster_ref(ref, {"j": at})
            share = self.registers.cast(peer.at[which][...])
            found = share if found is None else found + share
        # One thread of a warpgroup tells the others; all of its warps must have read by then.
        plgpu.commit_smem()
        if alone:
            plgpu.barrier_arrive(self.memory["empty"])
        return found
