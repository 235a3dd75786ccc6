"""neural_memory's TPU kernels, interpreted: the operators' suite, and what they refuse."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import neural_memory
from pallas_kernels.core import dispatch, testing, tpu
from pallas_kernels.neural_memory import tpu_sizes
from pallas_kernels.neural_memory.arg_specs import SPECS, named
from pallas_kernels.neural_memory.pallas_tpu import PallasTpuConfig

LINEAR, WHOLE, CLIP, NORMALISE, DEEP, EDGES = map(
    named, ("linear", "whole", "clip", "normalise", "deep", "edges")
)
CONFIG = PallasTpuConfig(interpret=True, span=3)
HOW = dict(implementation="pallas_tpu", config=CONFIG)
slow = pytest.mark.slow


@functools.wraps(neural_memory)
def one_document(*args, initial_state=None, segment_ids=None, **how):
    """The operator without a state before or documents: the kernels know that case."""
    del initial_state, segment_ids
    return neural_memory(*args, **how)


def small(spec, **changes):
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, **changes})


@pytest.mark.parametrize("spec", [LINEAR, pytest.param(WHOLE, marks=slow)], ids=lambda s: s.name)
def test_agrees(spec):
    """Documents that begin anywhere, several parts in a block, a state inside a chunk."""
    testing.check_agrees(neural_memory, spec, 130, documents=True, **HOW)


@slow
def test_agrees_for_one_token():
    testing.check_agrees(neural_memory, LINEAR, 1, **HOW)


@slow
def test_agrees_in_one_document():
    """Several spans, the last block not full."""
    testing.check_agrees(one_document, WHOLE, 130, **HOW)


@pytest.mark.parametrize("length", [1, 70])
def test_two_lengths_in_one_process(length):
    """jax 0.11 keeps pl.num_programs of another grid; nothing here reads it."""
    testing.check_agrees(one_document, small(LINEAR), length, **HOW)


def test_agrees_in_bfloat16():
    """Two layers and gamma."""
    testing.check_agrees(one_document, small(CLIP), 40, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [LINEAR, WHOLE, CLIP, NORMALISE], ids=lambda s: s.name)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_agrees_for_more_memories(spec, dtype, documents):
    op = neural_memory if documents else one_document
    testing.check_agrees(op, spec, 130, dtype=dtype, documents=documents, **HOW)


@slow
def test_agrees_at_the_edge_of_the_domain():
    """Shares of 0 and 1, steps of 0, keys and gradients of 0 under normalise."""
    testing.check_agrees(neural_memory, EDGES, 70, documents=True, **HOW)
    testing.check_agrees(one_document, EDGES, 70, **HOW)


@slow
@pytest.mark.parametrize("chunk", [8, 20])
def test_chunks_that_are_no_blocks(chunk):
    spec = dataclasses.replace(WHOLE, options={**WHOLE.options, "chunk": chunk})
    testing.check_agrees(neural_memory, spec, 70, documents=True, **HOW)
    testing.check_agrees(one_document, spec, 70, **HOW)


@slow
@pytest.mark.parametrize("h", [2, 3])
def test_agrees_at_a_real_width(h):
    """Two heads share the columns of a step; an empty one stands beside the third."""
    spec = dataclasses.replace(
        WHOLE,
        sizes=dict(b=1, h=h, k=64, v=64, m=256, n=256),
        given=("w_in", "gamma"),
        options=dict(chunk=64, limit="clip"),
    )
    for dtype in ("float32", "bfloat16"):
        testing.check_agrees(one_document, spec, 192, dtype=dtype, **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(neural_memory, LINEAR, 50, **HOW)


@slow
def test_padding_only():
    testing.check_padding_only(neural_memory, LINEAR, **HOW)


@slow
@pytest.mark.parametrize("cut", [16, 51])
def test_hand_off(cut):
    testing.check_hand_off(neural_memory, LINEAR, 70, cut, documents=True, **HOW)


@slow
def test_vmap():
    testing.check_vmap(neural_memory, LINEAR, 37, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(neural_memory, LINEAR, 40, **HOW)


@slow
def test_configs():
    configs = tuple(PallasTpuConfig(interpret=True, span=s) for s in (1, 2, 99))
    testing.check_configs(neural_memory, WHOLE, 70, configs, implementation="pallas_tpu")


@slow
def test_state_dtypes():
    testing.check_state_dtypes(neural_memory, WHOLE, **HOW)


@pytest.mark.parametrize("op", [one_document, pytest.param(neural_memory, marks=slow)])
def test_no_races(op):
    """Nor reads of what was never written, or out of bounds."""
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    config = PallasTpuConfig(interpret="races", span=2)
    testing.check_agrees(op, small(LINEAR), 33, implementation="pallas_tpu", config=config)
    assert not interpreter.races.races_found


# --- What is refused, and what sizes do ---------------------------------------------------------


def reason_against(names, dtype=jnp.float32, **sizes):
    """Why a v5e's kernel does not serve a call; None = it does."""
    sizes = dict(b=1, t=256, h=4, k=64, v=64, m=256, n=256, l=1) | sizes
    letters = testing.letters_of(neural_memory)
    names = (*testing.required(neural_memory), *names)
    shape = lambda n: tuple(sizes[x] for x in letters[n])
    arrays = [jax.ShapeDtypeStruct(shape(n), dtype) if n in names else None for n in letters]
    with dispatch.compiling_for("TPU v5 lite"):
        return dispatch.explain(neural_memory, *arrays, chunk=64)["pallas_tpu"]


def test_what_is_refused():
    assert reason_against(("w_in", "gamma")) is None
    assert reason_against((), n=64) is None
    assert "has 3 layers" in reason_against(("w_in", "w_hidden"))
    assert "MiB of vector memory" in reason_against(("w_in",), k=512, v=512, m=4096, n=4096)
    assert "float16" in reason_against(("w_in",), jnp.float16)
    arrays = testing.draw_case(neural_memory, DEEP, 3).arrays
    with pytest.raises(NotImplementedError, match="has 4 layers"):
        neural_memory(**arrays, **DEEP.options, **HOW)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU7x"])
@pytest.mark.parametrize("spec", [s for s in SPECS if "tpu" in s.tags], ids=lambda s: s.name)
def test_what_is_kept_is_little(spec, kind):
    """About a sixth of what the forward pass moves at most."""
    sizes, itemsize = spec.sizes, 4 if spec.name.endswith("f32") else 2
    mlp = "m" in sizes
    found = tpu_sizes.sizes_of(
        h=sizes["h"],
        k=64,
        v=64,
        n=sizes["n"],
        chunk=64,
        itemsize=itemsize,
        layers=2 if mlp else 1,
        aligned=True,
    )
    span = PallasTpuConfig.heuristic(found, kind).span
    state = 2 * 4 * 64 * sizes["n"] * (2 if mlp else 1)
    assert state / (span * 64 * 4 * 64 * itemsize) < 0.18 or span * 64 >= sizes["t"]
    need = tpu_sizes.need_backward(found, span)
    assert need <= tpu_sizes.most_room(kind)
    assert need <= 0.76 * (tpu_sizes.limit_for(need, kind) or tpu.generation(kind).scoped_vmem)


@pytest.mark.parametrize(
    "h, k, v, expected",
    [(16, 64, 64, (2, 16)), (3, 64, 64, (2, 4)), (1, 64, 64, (1, 1)), (5, 128, 256, (1, 5))],
)
def test_heads_fill_registers(h, k, v, expected):
    assert tpu_sizes.heads_per_step(h, k, v) == expected


def test_bad_config():
    with pytest.raises(ValueError, match="span is 0; it must be at least 1"):
        PallasTpuConfig(span=0)
