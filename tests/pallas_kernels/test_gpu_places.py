"""Where TMA puts what it copies: at multiples of 128 bytes of shared memory, and in one piece.

Hardware stops a kernel elsewhere ("misaligned address"); neither compilers nor interpreters look.
Buffers begin at multiples of 1,024, so that it is the places in them that count: slots of chunks
that come in turn, pieces of a warpgroup. Of what is not in one piece lowering would say so, where
it is done for that call.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import OPERATORS
from pallas_kernels.core import dispatch, gpu, kernel_check
from pallas_kernels.core.testing import letters_of, required
from pallas_kernels.short_conv import pallas_gpu as short_conv_gpu

APART = 128
HOPPER = "NVIDIA H200"
COPIES = dict(copy_gmem_to_smem=(1, "dst"), copy_smem_to_gmem=(0, "src"))


def equations(jaxpr):
    """All of a jaxpr, those within others too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(one, "jaxpr", one), "eqns"):
                    yield from equations(one)


def complaints(aval, transforms) -> list[str]:
    """About a copy's slice of a buffer."""
    shape, found = list(aval.shape), []
    if any("Untiling" in type(x).__name__ for x in transforms):  # [... rows columns 8 n]
        *shape, rows, columns, height, width = shape
        shape += [rows * height, columns * width]
    for indexer in (x for x in transforms if hasattr(x, "indices")):
        several = False  # of an axis before
        for i, (index, size) in enumerate(zip(indexer.indices, shape, strict=True)):
            first, more = getattr(index, "start", index), getattr(index, "size", 1)
            # From one place to the next; a place that is known counts from the beginning.
            step = math.prod(shape[i + 1 :]) * aval.dtype.itemsize
            step *= first if isinstance(first, int) else more
            if more < size and step % APART:
                found.append(f"{step} bytes apart")
            if more < size and several:
                found.append("not in one piece")
            several = several or more > 1
        shape = list(indexer.get_indexer_shape())
    return found


def misplaced(program, *arguments) -> list[str]:
    """The copies of a program's kernels that have a place that is none."""
    found = []
    with dispatch.compiling_for(HOPPER):
        jaxpr = jax.make_jaxpr(program)(*arguments)
    for kernel in (x for x in equations(jaxpr) if x.primitive.name == "mpmd_map"):
        for one in equations(kernel.params["jaxprs"][0]):
            if one.primitive.name not in COPIES:
                continue
            operand, side = COPIES[one.primitive.name]
            tree, aval = one.params[f"{side}_transforms_treedef"], one.invars[operand].aval
            transforms = jax.tree.unflatten(tree, [object()] * tree.num_leaves)
            found += [
                f"{kernel.params['name']}: {aval.shape} {aval.dtype}, {text}"
                for text in complaints(aval, transforms)
            ]
    return found


@pytest.mark.parametrize("rows, wrong", [(16, True), (32, False)])
def test_it_is_seen(rows, wrong):
    def body(x, y, x_s, barrier):
        for i in range(2):
            source = x.at[jax.lax.axis_index("row"), pl.ds(i * rows, rows)]
            plgpu.copy_gmem_to_smem(source, x_s.at[i], barrier)
            plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(x_s, y.at[jax.lax.axis_index("row")])

    call = gpu.kernel_call(
        body,
        name="toy",
        config=gpu.GpuConfig(),
        out_type=jax.ShapeDtypeStruct((3, 2, rows), jnp.int32),
        scratch_types=[plgpu.SMEM((2, rows), jnp.int32), plgpu.Barrier()],
        grid=(3,),
        grid_names=("row",),
    )
    found = misplaced(call, jax.ShapeDtypeStruct((3, 2 * rows), jnp.int32))
    assert set(found) == ({"toy: (2, 16) int32, 64 bytes apart"} if wrong else set())


def structs(op, spec, sizes):
    """The arrays of a call, bfloat16 along time."""
    letters = letters_of(op)
    dtype = lambda name: jnp.bfloat16 if "t" in letters[name] else jnp.float32
    return {
        name: jax.ShapeDtypeStruct(tuple(sizes[x] for x in letters[name]), dtype(name))
        for name in (*required(op), *spec.given)
    }


def backward(op, spec, ids, arrays, config=None):
    """The gradients of a sum of all results, by the kernels."""
    more = dict(config=config) if ids is None else dict(config=config, segment_ids=ids)
    run = functools.partial(op, **more, **spec.options, implementation="pallas_gpu")

    def total(arrays):
        found = (x for x in jax.tree.leaves(run(**arrays)) if jnp.issubdtype(x.dtype, jnp.floating))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in found)

    return jax.grad(total)(arrays)


@pytest.mark.parametrize(
    "name", [n for n, op in OPERATORS.items() if not hasattr(op.forms["pallas_gpu"], "library")]
)
def test_every_copy_has_its_place(name, monkeypatch):
    """Of the first call that is served, forward and backward; with documents if it may be."""
    op = OPERATORS[name]
    monkeypatch.setattr(op.forms["pallas_gpu"], "SERVED", True, raising=False)
    tagged = functools.partial(kernel_check.specs_of, op)
    found = None
    for spec in (*tagged(tags=frozenset({"test"})), *tagged()):
        sizes = {**spec.sizes, "t": spec.sizes.get("t", 130)}
        arrays = structs(op, spec, sizes)
        packed = "segment_ids" in inspect.signature(op).parameters
        ids = jnp.ones((sizes["b"], sizes["t"]), jnp.int32)
        for given in ([ids] if packed else []) + [None]:
            try:
                found = misplaced(functools.partial(backward, op, spec, given), arrays)
                break
            except NotImplementedError:  # the kernel does not serve it
                continue
        if found is not None:
            break
    assert found == []


def test_short_conv_with_longer_tiles():
    """Their flags: a part of a tile's would not be one piece."""
    op, config = OPERATORS["short_conv"], short_conv_gpu.PallasGpuConfig(tile=32, stretch=64)
    spec = next(iter(kernel_check.specs_of(op, tags=frozenset({"test"}))))
    arrays = structs(op, spec, {**spec.sizes, "t": 130})
    ids = jnp.ones((spec.sizes["b"], 130), jnp.int32)
    assert misplaced(functools.partial(backward, op, spec, ids, config=config), arrays) == []
