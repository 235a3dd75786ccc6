"""A mixer under test: built, compiled once per use, fed, and compared."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# max|a - b| / max|b| that two ways to the same answer may differ by. The whole form sums in another
# order than the stepwise one; 1e-5 is the house's aim for one operator in float32, and a mixer
# chains a few. `fft` is what contract 2 grants a convolution by FFT where others must be exact.
TOLERANCES = {"outputs": 3e-5, "gradients": 2e-4, "fft": 1e-5}

# A stream is cut into chunks of this many tokens: no power of two, so that it never falls in step
# with the chunks inside an operator.
CHUNK = 28
N_CHUNKS = 4
LENGTH = CHUNK * N_CHUNKS


class Broken(AssertionError):
    """A promise that does not hold; the text says where and by how much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What to test.

    Attributes:
        build: `build(d_model, *, dtype, rngs) -> mixer`: a class, or a functools.partial of one
            with its keywords.
        d_model: width to test at.
        batch: rows, at least 2.
    """

    build: Callable[..., nnx.Module]
    d_model: int = 32
    batch: int = 2


class Opened(NamedTuple):
    """A built mixer, taken apart for jit.

    Attributes:
        mixer: the module itself (for its attributes and pure questions).
        variables: everything that it holds, as one pytree.
        call: `(variables, x, segment_ids, state) -> (y, state)`, compiled.
        steps: `(variables, x, state) -> (y, state)`, token by token through `step`, compiled.
        tokens: as call, in chunks of one token, compiled.
        grad: `(variables, x, cotangent, n_chunks) -> gradients by (variables, x)` of
            sum(y * cotangent), the sequence cut into n_chunks handed on by their state; compiled.
    """

    mixer: nnx.Module
    variables: Any
    call: Callable
    steps: Callable
    tokens: Callable
    grad: Callable


@functools.lru_cache(maxsize=8)
def open_mixer(subject: Subject, dtype: str = "float32") -> Opened:
    """Builds the mixer; parameters that start at zero are moved so that they cannot hide."""
    mixer = build(subject, dtype)
    graphdef, variables = nnx.split(mixer)
    variables = _fill_zeros(variables)
    mixer = nnx.merge(graphdef, variables)  # a state may hold what parameters make of it

    def call(variables, x, segment_ids=None, state=None):
        return nnx.merge(graphdef, variables)(x, segment_ids=segment_ids, state=state)

    def steps(variables, x, state):
        def one(state, x_t):
            y_t, state = nnx.merge(graphdef, variables).step(x_t, state)
            return state, y_t

        state, y = jax.lax.scan(one, state, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(y, 0, 1), state

    def tokens(variables, x, segment_ids, state):
        def one(state, token):
            x_t, id_t = token
            y_t, state = call(variables, x_t[:, None], id_t[:, None], state)
            return state, y_t[:, 0]

        by_time = (jnp.swapaxes(x, 0, 1), segment_ids.T)
        state, y = jax.lax.scan(one, state, by_time)
        return jnp.swapaxes(y, 0, 1), state

    def objective(floats, rest, x, cotangent, n_chunks):
        variables = jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=_is_none)
        state = None if n_chunks == 1 else new_state(mixer, x.shape[0], x.shape[1])
        total = 0.0
        for part, weight in zip(
            jnp.split(x, n_chunks, axis=1), jnp.split(cotangent, n_chunks, axis=1), strict=True
        ):
            y, state = call(variables, part, None, state)
            total += jnp.sum(y.astype(jnp.float32) * weight)
        return total

    def grad(variables, x, cotangent, n_chunks):
        is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
        floats = jax.tree.map(lambda a: a if is_float(a) else None, variables)
        rest = jax.tree.map(lambda a: None if is_float(a) else a, variables)
        return jax.grad(objective, argnums=(0, 2))(floats, rest, x, cotangent, n_chunks)

    compiled = (*map(jax.jit, (call, steps, tokens)), jax.jit(grad, static_argnums=3))
    return Opened(mixer, variables, *compiled)


def build(subject: Subject, dtype: str = "float32", seed: int = 0) -> nnx.Module:
    """One instance, as a model would build it."""
    return subject.build(subject.d_model, dtype=dtype, rngs=nnx.Rngs(seed))


def new_state(mixer: nnx.Module, batch: int, max_length: int = LENGTH):
    return mixer.init_state(batch, max_length=max_length)


def inputs(subject: Subject, length: int = LENGTH, *, dtype="float32", seed=0):
    """Standard normal `[b t d]`, as after a norm."""
    shape = (subject.batch, length, subject.d_model)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def stream(opened: Opened, x, segment_ids=None, *, state=None):
    """Runs x chunk by chunk, the state handed on."""
    if state is None:
        state = new_state(opened.mixer, x.shape[0])
    outputs = []
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        ids = None if segment_ids is None else segment_ids[:, part]
        y, state = opened.call(opened.variables, x[:, part], ids, state)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), state


class Document(NamedTuple):
    """Where a document lies: tokens start..stop of a row."""

    row: int
    start: int
    stop: int


def packed_rows(alignment: int = 1) -> tuple[np.ndarray, list[Document]]:
    """Two rows of documents with padding before, between and after them.

    Documents have one of two lengths, so that running them alone compiles twice. Some start and
    stop where a stream is cut (multiples of CHUNK), others across such a cut.

    Args:
        alignment: documents start at multiples of it, for mixers on a grid.

    Returns:
        int32 `[2 t]` segment ids, t a multiple of CHUNK, and the documents.
    """
    layout = (  # padding before it, length
        ((3, 20), (2, 31), (0, 20), (4, 31)),
        ((0, 31), (0, 20), (5, 20), (8, 20)),
    )
    documents, end = [], 0
    for row, parts in enumerate(layout):
        at = 0
        for gap, length in parts:
            start = -(-(at + gap) // alignment) * alignment
            documents.append(Document(row, start, start + length))
            at = start + length
        end = max(end, at)
    ids = np.zeros((len(layout), -(-end // CHUNK) * CHUNK), np.int32)
    for number, document in enumerate(documents):  # numbered upward in each row, not from 1
        ids[document.row, document.start : document.stop] = number + 1
    return ids, documents


def compare(what: str, got, want, tolerance: float) -> float:
    """The largest error relative to the largest value; raises Broken above the tolerance."""
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    if got.shape != want.shape:
        raise Broken(f"{what}: shapes differ: {got.shape} and {want.shape}")
    if got.size == 0:
        return 0.0
    difference = np.abs(got - want)
    error = float(np.max(difference) / max(np.max(np.abs(want)), 1e-5))
    if not error <= tolerance:  # a nan is no agreement
        worst = np.unravel_index(np.argmax(np.nan_to_num(difference, nan=np.inf)), got.shape)
        raise Broken(
            f"{what}: error {error:.1e} of the largest value, allowed {tolerance:.0e}; "
            f"worst at {tuple(int(i) for i in worst)} of {got.shape}: "
            f"{got[worst]:.6g} instead of {want[worst]:.6g}"
        )
    return error


def identical(what: str, got, want) -> None:
    """Raises Broken unless every bit agrees."""
    got, want = np.asarray(got), np.asarray(want)
    if not np.array_equal(got, want):
        error = np.abs(got.astype(np.float64) - want.astype(np.float64))
        worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), got.shape)
        raise Broken(
            f"{what}: must agree to the bit; off by up to {error[worst]:.1e} "
            f"at {tuple(int(i) for i in worst)} of {got.shape}"
        )


def named_leaves(tree) -> list[tuple[str, Any]]:
    """(readable path, leaf) of every array in a tree."""
    return [
        (jax.tree_util.keystr(path).removesuffix(".value"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _fill_zeros(variables):
    random = np.random.default_rng(1)

    def fill(value):
        if not jnp.issubdtype(value.dtype, jnp.floating) or np.any(np.asarray(value)):
            return value
        return jnp.asarray(0.1 * random.standard_normal(value.shape), value.dtype)

    return jax.tree.map(fill, variables)


def _is_none(leaf) -> bool:
    return leaf is None
