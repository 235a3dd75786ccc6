"""neural_memory's GPU kernels, interpreted, and what they are planned to do."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import neural_memory
from pallas_kernels.core import testing
from pallas_kernels.core.gpu import SHARED_MEMORY
from pallas_kernels.neural_memory import (
    gpu_backward,
    gpu_call,
    gpu_chunk,
    gpu_machine,
    gpu_plan,
    gpu_windows,
    pallas_gpu,
)
from pallas_kernels.neural_memory.arg_specs import named
from pallas_kernels.neural_memory.memory import Rule, Weights
from pallas_kernels.neural_memory.pallas_gpu import PallasGpuConfig

LINEAR, WHOLE, CLIP, NORMALISE = map(named, ("linear", "whole", "clip", "normalise"))
CONFIG = PallasGpuConfig(interpret=True)
HOW = dict(implementation="pallas_gpu", config=CONFIG)
slow = pytest.mark.slow


@functools.wraps(neural_memory)
def one_document(*args, initial_state=None, segment_ids=None, **how):
    """The operator without a state before or documents."""
    del initial_state, segment_ids
    return neural_memory(*args, **how)


def small(spec, **changes):
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, "h": 1, **changes})


def check_as_xla(given, config=CONFIG):
    """Outputs and every field of the state."""
    found = neural_memory(**given, implementation="pallas_gpu", config=config)
    wanted = neural_memory(**given, implementation="xla")
    named = lambda x: {jax.tree_util.keystr(k): np.asarray(v) for k, v in leaves(x)[0]}
    leaves = jax.tree_util.tree_flatten_with_path
    testing.assert_close(named(found), named(wanted), "float32", implementation="pallas_gpu")


def test_reads_and_writes():
    """Outputs and weights, chunks of 16, the last one not full."""
    arrays = testing.draw_case(neural_memory, small(LINEAR), 130).arrays
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    check_as_xla(dict(**arrays, **LINEAR.options))


def test_documents_and_a_stream():
    """Documents of a stream whose chunk is open, as xla has them; padding is not seen."""
    case = testing.draw_case(neural_memory, small(LINEAR, b=2), 70, documents=True)
    ids = jnp.asarray(case.segment_ids)
    padding = lambda x: (ids == 0).reshape(*ids.shape, *[1] * (x.ndim - 2))
    tokens = ("q", "k", "v", "alpha", "eta", "theta")
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
    arrays = {n: jnp.where(padding(x), jnp.nan, x) if n in tokens else x for n, x in arrays.items()}
    given = dict(initial_state=case.state, segment_ids=ids, **LINEAR.options)
    config = dataclasses.replace(CONFIG, windows=24)
    check_as_xla(dict(**arrays, **given), config)


def test_windows_of_rows():
    """Chunks of 16 wherever documents begin; an open one belongs to no window."""
    place = jnp.asarray([[*range(5, 20), *range(18), 0, 1, 2, 0, 0, 0, 0], range(40)])
    form = gpu_chunk.Form(Rule(16, "gelu", 1e-5, "none", 1.0, False), 64, 1)
    call = gpu_call.Call(form, CONFIG, 2, 1, 5, True, False, False)
    rows = gpu_windows.rows_of(call, place, jnp.asarray([36, 40]))
    np.testing.assert_array_equal(rows.n_windows, [4, 3])
    np.testing.assert_array_equal(rows.starts, [[11, 15, 31, 33, 36, 36], [0, 16, 32, 40, 40, 40]])


@slow
@pytest.mark.parametrize("windows", [24, 2], ids=["kernel", "too many"])
def test_agrees_in_documents(windows):
    """Every gradient; rows of more windows than there is room for are xla's."""
    config = dataclasses.replace(CONFIG, windows=windows)
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(neural_memory, small(LINEAR, b=2), 40, documents=True, **how)


@slow
def test_agrees_in_documents_in_a_cluster():
    """Two blocks share the hidden units, and what documents begin with has a momentum."""
    spec, config = small(WHOLE, m=100, n=100), dataclasses.replace(CONFIG, windows=20)
    how = dict(implementation="pallas_gpu", config=config)
    testing.check_agrees(neural_memory, spec, 30, documents=True, dtype="bfloat16", **how)


@slow
def test_agrees_in_a_stream():
    """Without documents, from a state that came with the call."""
    testing.check_agrees(neural_memory, small(LINEAR, b=2), 37, dtype="bfloat16", **HOW)


@slow
def test_documents_alone():
    testing.check_documents_alone(
        neural_memory, small(LINEAR, b=2), 40, implementation="pallas_gpu", config=CONFIG
    )


@slow
def test_agrees():
    """Blocks that are chunks of 16, the last one not full."""
    testing.check_agrees(one_document, small(LINEAR), 130, **HOW)


@slow
@pytest.mark.parametrize(
    "spec, dtype",
    [
        (LINEAR, "float32"),
        (LINEAR, "bfloat16"),
        (CLIP, "bfloat16"),
        (NORMALISE, "bfloat16"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_agrees_for_more_memories(spec, dtype):
    testing.check_agrees(one_document, small(spec), 20, dtype=dtype, **HOW)


@slow
def test_agrees_in_float32(monkeypatch):
    """Two layers, whose plan has fewer tiles in registers; with any jax, for it is interpreted."""
    monkeypatch.setattr(jax, "__version_info__", max(jax.__version_info__, (0, 11, 0)))
    testing.check_agrees(one_document, small(CLIP), 20, **HOW)


@slow
def test_agrees_in_a_cluster():
    """Two blocks share the hidden units."""
    testing.check_agrees(one_document, small(WHOLE, m=100, n=100), 20, dtype="bfloat16", **HOW)


@slow
@pytest.mark.parametrize("length", [1, 70])
def test_two_lengths_in_one_process(length):
    testing.check_agrees(one_document, small(LINEAR), length, **HOW)


@slow
def test_deterministic():
    testing.check_deterministic(one_document, small(LINEAR), 40, **HOW)


@slow
def test_no_races():
    interpreter = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    config = PallasGpuConfig(interpret="races")
    spec = small(LINEAR)
    testing.check_agrees(one_document, spec, 20, implementation="pallas_gpu", config=config)
    assert not interpreter.get_races().races_found


# --- The plan ------------------------------------------------------------------------------------


class Place(gpu_machine.Tile):
    """A tile or a vector, in Python."""

    def __init__(self, x=None):
        object.__setattr__(self, "x", x)

    @property
    def parts(self):
        return (self.x,)

    def load(self):
        return self.x

    def store(self, x):
        object.__setattr__(self, "x", x)

    def along(self, axis):
        del axis
        return self


class Many(dict):
    def __missing__(self, at):
        self[at] = Place()
        return self[at]


@pytest.mark.parametrize("mlp, gain", [(False, False), (True, True)], ids=["linear", "whole"])
@slow
def test_plan_does_what_the_function_does(mlp, gain):
    """The gradients of a block, step by step as the kernel does them, against jax.vjp's."""
    how = Rule(64, "gelu", 1e-5, "clip", 1.0, False)
    form = gpu_chunk.Form(how, 64, 1)
    call = gpu_call.Call(form, CONFIG, 1, 1, 1, False, mlp, gain)
    plan = gpu_backward.plan_of(call, gpu_plan.Room(tiles=3))
    assert plan.tiles <= 3
    rng = np.random.default_rng(0)
    normal = lambda x, by=1: jnp.asarray(rng.normal(size=x.shape) * by / 8, jnp.float32)
    share = lambda most: jnp.asarray(rng.uniform(0, most, size=(1, 64)), jnp.float32)
    weights = [jax.tree.map(functools.partial(normal, by=by), call.weights) for by in (4, 1, 4, 4)]
    q, k, v, dy = (normal(call.tokens.q, by) for by in (1, 1, 8, 8))
    one = jnp.ones((1, 64))
    tokens = gpu_chunk.Tokens(q, k, v, share(0.02), share(0.8), share(0.01), one)

    def run(now, momentum, *others):
        tokens = gpu_chunk.Tokens(*others, one)
        return gpu_chunk.read_and_write(form, now, now, momentum, tokens)

    pull = jax.vjp(run, *weights[:2], *tokens[:6])[1]
    wanted = jax.tree.leaves(pull((dy, *weights[2:])))
    found = [Place() for _ in wanted]
    of_weights = len(jax.tree.leaves(weights[:2]))
    flat = [x if x.shape[0] > 1 else x[0] for x in jax.tree.leaves((weights, tokens, dy, one))]
    homes = list(map(Place, flat))

    def give(at):
        def store(x):
            found[at].store(x)
            if at < of_weights:  # the gradients of weights lie where those behind them lay
                homes[of_weights + at].store(x)

        return store

    tiles = [Place() for _ in range(plan.tiles)]
    places = gpu_machine.Places(tiles, Many().__getitem__, Many().__getitem__, Place())
    registers = gpu_machine.Registers(True)
    gpu_machine.run(plan, registers, homes, list(map(give, range(len(found)))), places)
    for a, b in zip(found, wanted, strict=True):
        b = b.reshape(a.x.shape)
        assert float(jnp.sqrt(jnp.mean((a.x - b) ** 2) / jnp.mean(b**2))) < 1e-5


def test_no_vector_waits_in_registers():
    """A row takes half of what a tile does: one that is wanted later lies in memory until then."""
    form = gpu_chunk.Form(Rule(64, "gelu", 1e-5, "clip", 1.0, False), 64, 4)
    call = gpu_call.Call(form, CONFIG, 1, 1, 1, True, True, True)
    plan = gpu_backward.plan_of(call, gpu_backward.room_of(call))
    held: set[int] = set()
    products = 0
    for step in plan.steps:
        if step.what == "drop":
            held.discard(step.value)
        elif step.what in ("node", "input", "read") and not plan.is_tile(step.value):
            held.add(step.value)
        if step.node is not None and step.node.name == "dot_general":
            products += 1
            assert len(held) <= 1, held
    assert products > 0


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_shared_memory_is_enough(narrow, blocks):
    """Even in the forward pass, where weights and momentum stay on chip."""
    form = gpu_chunk.Form(Rule(64, "gelu", 1e-5, "clip", 1.0, False), 64, blocks)
    call = gpu_call.Call(form, CONFIG, 1, 1, 1, narrow, blocks > 1, True)
    assert call.room(4 if blocks > 1 else 2, 3) >= 3
    assert call.room(0, 4) >= 3
    assert call.room(0, 0) * call.parts * 8192 <= SHARED_MEMORY


# --- What is refused -----------------------------------------------------------------------------


def reason_against(names=(), dtype=jnp.bfloat16, kind="NVIDIA H200", ids=None, **sizes):
    """Why the kernels of a device do not serve a call; None = they do."""
    sizes = dict(b=1, t=256, h=4, k=64, v=64, m=256, n=256, l=1) | sizes
    letters = testing.letters_of(neural_memory)
    names = (*testing.required(neural_memory), *names)
    shape = lambda n: tuple(sizes[x] for x in letters[n])
    arrays = [jax.ShapeDtypeStruct(shape(n), dtype) if n in names else None for n in letters]
    opening = Weights(*arrays[6:10])
    return pallas_gpu.refuses((arrays[:6], (opening, opening), None, ids), kind)


def test_what_is_refused():
    assert reason_against(n=64) is None
    assert "Hopper" in reason_against(n=64, kind="NVIDIA A100-SXM4-80GB")
    assert "has 3 layers" in reason_against(("w_in", "w_hidden"))
    assert "heads are 128 wide" in reason_against(k=128, v=128, n=128)
    assert "has 1024 hidden units" in reason_against(("w_in",), m=1024, n=1024)
    assert reason_against(("w_in", "gamma")) is None
    reason = reason_against(("w_in", "gamma"), jnp.float32)
    assert (reason is None) if jax.__version_info__ >= (0, 11) else "take jax 0.11" in reason
    assert "float16" in reason_against((), jnp.float16, n=64)
    assert reason_against(n=64, ids=jax.ShapeDtypeStruct((1, 256), jnp.int32)) is None


def test_which_calls_are_refused():
    def refused(chunk, fresh, t=256):
        shapes = ((jax.ShapeDtypeStruct((1, t, 4, 64), jnp.bfloat16),),)
        how = Rule(chunk, "gelu", 1e-5, "none", 1.0, False)
        return pallas_gpu.refuses_options(shapes, None, how=how, fresh=fresh, still=True)

    assert refused(64, True) is None
    assert refused(64, False) is None
    assert refused(64, True, t=1) is None
    assert "chunk is 128" in refused(128, True)
    assert "one token of a stream" in refused(64, False, t=1)
