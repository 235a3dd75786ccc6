"""Writing with a language model: the prompt piece by piece, then token by token through the state.

Nothing here depends on the architecture: a recurrent state stays as large as it is, a cache is
sized once. Reading is one compiled program of at most PREFILL_TOKENS tokens, writing one of
DECODE_TOKENS steps; both are called as often as it takes, so neither memory nor what is compiled
depends on how much is read or written.
"""

import functools
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqzoo.errors import ConfigError

# Tokens of the prompt in one call of the compiled program.
PREFILL_TOKENS = 512

# Steps in one call of the compiled program: what a stream shows at once, and how long after the
# end of text it still runs.
DECODE_TOKENS = 32


class Generated(NamedTuple):
    """What came out.

    Attributes:
        tokens: int32 `[b, new]`, without the prompt; after `eos`, eos again.
        prefill_seconds: reading the prompt, compilation excluded.
        decode_seconds: writing the tokens, compilation excluded.
        compile_seconds: 0 when both programs were compiled before.
        tokens_per_second: tokens written by all rows per second of decoding.
        state_bytes: what the state holds, all rows together.
    """

    tokens: np.ndarray
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    tokens_per_second: float
    state_bytes: int


def generate(
    model: nnx.Module,
    prompt: np.ndarray | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | None = None,
    on_tokens=None,
) -> Generated:
    """Continues each row of a prompt.

    Args:
        model: a language model (seqzoo.models.LanguageModel). For writing, its weights are held
            twice: layer by layer besides.
        prompt: int `[b t]`, or one sequence per row of any lengths, none empty.
        max_new_tokens: tokens to write per row, at least 1.
        temperature: logits are divided by it; 0 = always the likeliest token.
        top_k: keep the k likeliest tokens; 0 = all.
        top_p: keep the likeliest tokens that together have this probability, in (0, 1], among
            those that top_k keeps.
        seed: of the draws; the same seed, prompt and settings write the same tokens.
        eos: token that ends a row; None = none does.
        on_tokens: called with int32 `[b n]` whenever n more tokens are ready.

    Raises:
        ConfigError: a setting is out of range, or the model writes no text (an encoder).
    """
    _check(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if not hasattr(model, "step"):
        raise ConfigError(
            f"a {type(model).__name__} writes no text; generate needs a LanguageModel"
        )
    tokens, segment_ids = _pad(prompt, model.vocab_size)
    batch, length = tokens.shape
    _check_positions(model, int(np.max(np.sum(segment_ids, axis=1))), max_new_tokens)
    rounds = math.ceil(max_new_tokens / DECODE_TOKENS)
    graphdef, variables = nnx.split(model)
    try:
        state = model.init_state(batch, max_length=length + rounds * DECODE_TOKENS)
    except NotImplementedError as error:
        raise ConfigError(f"this model writes no text: {error}") from error
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    sampling = Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(min(top_k, model.vocab_size) or model.vocab_size),
        top_p=jnp.float32(top_p),
        eos=jnp.int32(-1 if eos is None else eos),
    )
    flags = (temperature == 0, bool(top_k) or top_p < 1)  # greedy, filtered
    key = jax.random.key(seed)

    pieces = _pieces(tokens, segment_ids)
    program, compile_prefill = _compiled(
        _prefill, graphdef, flags, variables, *pieces[0], state, key, sampling
    )
    start = time.perf_counter()
    for piece in pieces:
        carry = program(variables, *piece, state, key, sampling)
        state = carry.state
    jax.block_until_ready(carry)
    prefill_seconds = time.perf_counter() - start

    graphdef, variables = nnx.split(model.unrolled())
    carry = carry._replace(state=model.unrolled_state(state))
    program, compile_decode = _compiled(_decode, graphdef, flags, variables, carry, key, sampling)
    written, pieces = 0, []
    start = time.perf_counter()
    while written < max_new_tokens:
        carry, piece = program(variables, carry, key, sampling)
        piece = np.asarray(piece)[:, : max_new_tokens - written]
        written += piece.shape[1]
        pieces.append(piece)
        if on_tokens is not None:
            on_tokens(piece)
        if eos is not None and np.all(piece[:, -1] == eos):
            break
    decode_seconds = time.perf_counter() - start
    # The last round may run a little further than asked.
    ran = len(pieces) * DECODE_TOKENS
    return Generated(
        tokens=np.concatenate(pieces, axis=1),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        compile_seconds=compile_prefill + compile_decode,
        tokens_per_second=batch * ran / decode_seconds,
        state_bytes=held,
    )


class Sampling(NamedTuple):
    """Run-time settings of a draw: changing one compiles nothing."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    eos: jax.Array


class Carry(NamedTuple):
    """Between two tokens: the state, the token to read next, how many were drawn, who is done."""

    state: object
    token: jax.Array  # [b] int32
    count: jax.Array  # [] int32
    done: jax.Array  # [b] bool


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling, flags: tuple[bool, bool]):
    """Draws one token per row from `[b o]` float32 logits.

    Args:
        flags: (always take the likeliest, some tokens are filtered), static.
    """
    greedy, filtered = flags
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if not filtered:
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    # By rank, the likeliest first and equals in order of their numbers: top_k counts exactly.
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)  # of what top_k leaves
    # A token stays while the likelier ones together fall short of top_p, so one always stays.
    before = jnp.cumsum(probability, axis=-1) - probability
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _prefill(graphdef, flags, variables, tokens, segment_ids, state, key, sampling):
    """Reads a piece of the prompt and draws the token after it (used after the last piece)."""
    model = nnx.merge(graphdef, variables)
    out = model.run(tokens, segment_ids=segment_ids, state=state, return_state=True)
    # Padding lies on the left, so the last column is the last token of every row.
    token = sample(out.logits[:, -1], jax.random.fold_in(key, 0), sampling, flags)
    return Carry(out.state, token, jnp.int32(1), jnp.zeros(token.shape, bool))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(graphdef, flags, variables, carry, key, sampling):
    """Emits the token that waits and draws the next, DECODE_TOKENS times."""

    def one(carry, _):
        written = jnp.where(carry.done, sampling.eos, carry.token)
        logits, state = nnx.merge(graphdef, variables).step(written, carry.state)
        token = sample(logits, jax.random.fold_in(key, carry.count), sampling, flags)
        done = carry.done | (written == sampling.eos)
        return Carry(state, token, carry.count + 1, done), written

    carry, tokens = jax.lax.scan(one, carry, length=DECODE_TOKENS)
    return carry, tokens.T


_programs: dict = {}


def executables() -> dict[str, int]:
    """How many programs were compiled in this process: {prefill, decode}."""
    kinds = [place[0] for place in _programs]
    return {"prefill": kinds.count(_prefill), "decode": kinds.count(_decode)}


def _compiled(function, graphdef, flags, *arguments):
    """The compiled program for these shapes, and the seconds that compiling took (0 if known)."""
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in map(jnp.asarray, leaves))
    place = (function, graphdef, flags, structure, shapes)
    if place in _programs:
        return _programs[place], 0.0
    start = time.perf_counter()
    _programs[place] = function.lower(graphdef, flags, *arguments).compile()
    return _programs[place], time.perf_counter() - start


def _pieces(tokens: np.ndarray, segment_ids: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
    """Cuts `[b t]` into calls of equal length."""
    count = max(1, tokens.shape[1] // PREFILL_TOKENS)
    cut = lambda a: [jnp.asarray(part) for part in np.split(a, count, axis=1)]
    return list(zip(cut(tokens), cut(segment_ids), strict=True))


def _pad(prompt, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-pads rows to one length.

    It is a power of two of at least 16, or a multiple of PREFILL_TOKENS: few shapes compile.
    """
    rows = [np.asarray(row, np.int64) for row in prompt]
    if any(row.ndim != 1 for row in rows):
        raise ConfigError("the prompt must be one sequence of tokens per row: [[1, 2, 3]]")
    if not rows or min(map(len, rows)) == 0:
        raise ConfigError("the prompt is empty; give every row at least one token")
    for row in rows:
        if row.min() < 0 or row.max() >= vocab_size:
            raise ConfigError(
                f"the prompt holds token {row.max() if row.min() >= 0 else row.min()}; "
                f"the model knows 0..{vocab_size - 1}"
            )
    longest = max(map(len, rows))
    length = max(16, 2 ** math.ceil(math.log2(longest)))
    if longest > PREFILL_TOKENS:
        length = math.ceil(longest / PREFILL_TOKENS) * PREFILL_TOKENS
    tokens = np.zeros((len(rows), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, length - len(row) :] = row
        segment_ids[i, length - len(row) :] = 1
    return tokens, segment_ids


def _check_positions(model: nnx.Module, read: int, new: int) -> None:
    """A model with learned positions knows places up to its longest document."""
    positions = getattr(model, "positions", None)
    if positions is not None and read + new > positions.max_positions:
        raise ConfigError(
            f"{read} tokens of prompt and max_new_tokens={new} are more than "
            f"model.max_positions={positions.max_positions}; write fewer"
        )


def _check(*, max_new_tokens, temperature, top_k, top_p) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if top_k < 0:
        raise ConfigError(f"top_k is {top_k}; it must be 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must lie above 0 and not above 1")
