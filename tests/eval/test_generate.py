"""Writing with a model: what comes out is what the whole forward pass says, at a constant cost."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.errors import ConfigError
from seqzoo.eval import generate as module
from seqzoo.eval.codec import Bytes, Numbers, codec_of
from seqzoo.eval.generate import Sampling, executables, generate, sample
from seqzoo.mixers import Attention, Mamba
from seqzoo.models import LanguageModel

VOCAB = 23


@functools.cache
def model_of(*pattern: str) -> LanguageModel:
    mixers = dict(
        mamba=functools.partial(Mamba, 16, d_state=4),
        attention=functools.partial(Attention, 16, n_heads=2),
    )
    return LanguageModel(
        VOCAB,
        d_model=16,
        n_layers=2,
        pattern=pattern,
        mixers=mixers,
        rngs=nnx.Rngs(3),
    )


def random_prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("pattern", [("mamba",), ("mamba", "attention")])
def test_greedy_tokens_are_the_argmax_of_the_whole_forward(pattern):
    """Across more than one call of the compiled decoder, and prompts of unequal lengths."""
    model, prompts = model_of(*pattern), random_prompts(3, 11)
    new = module.DECODE_TOKENS + 5
    written = generate(model, prompts, max_new_tokens=new, temperature=0)
    assert written.tokens.shape == (2, new)
    graphdef, variables = nnx.split(model)
    run = jax.jit(lambda v, t: nnx.merge(graphdef, v).run(t).logits)
    for prompt, tokens in zip(prompts, written.tokens, strict=True):
        whole = np.array([*prompt, *tokens])
        logits = run(variables, np.pad(whole, (0, 48 - len(whole)))[None])[0]
        likeliest = np.argmax(logits[len(prompt) - 1 : len(whole) - 1], axis=-1)
        np.testing.assert_array_equal(likeliest, tokens)


def test_rows_of_a_batch_are_written_as_if_alone():
    prompts = random_prompts(1, 9, 16)
    together = generate(model_of("mamba"), prompts, max_new_tokens=8, temperature=0).tokens
    for prompt, tokens in zip(prompts, together, strict=True):
        alone = generate(model_of("mamba"), [prompt], max_new_tokens=8, temperature=0).tokens
        np.testing.assert_array_equal(alone[0], tokens)


def test_the_cost_does_not_depend_on_what_was_read():
    """One decoder and one state size after 64 and after 16,384 tokens."""
    model = model_of("mamba")
    short = generate(model, random_prompts(64), max_new_tokens=8, seed=1)
    before = executables()
    long = generate(model, random_prompts(16_384), max_new_tokens=8, seed=1)
    assert long.state_bytes == short.state_bytes == model.state_bytes(64)["total"]
    assert executables()["decode"] == before["decode"]
    assert executables()["prefill"] <= before["prefill"] + 1  # 64 tokens at a time, 512 at a time
    more = generate(model, random_prompts(30_000), max_new_tokens=100, seed=2)
    assert more.compile_seconds == 0


def test_a_prompt_longer_than_a_piece_equals_the_whole_forward():
    (prompt,) = random_prompts(module.PREFILL_TOKENS + 70)
    model = model_of("mamba", "attention")
    graphdef, variables = nnx.split(model)
    logits = jax.jit(lambda v, t: nnx.merge(graphdef, v).run(t).logits)(
        variables, np.array([prompt])
    )
    written = generate(model, [prompt], max_new_tokens=1, temperature=0)
    assert written.tokens[0, 0] == np.argmax(logits[0, -1])


def test_the_seed_decides():
    write = functools.partial(
        generate, model_of("mamba"), random_prompts(4, 4), max_new_tokens=24, temperature=2.0
    )
    np.testing.assert_array_equal(write(seed=1).tokens, write(seed=1).tokens)
    assert not np.array_equal(write(seed=1).tokens, write(seed=2).tokens)


def test_one_token_kept_is_the_greedy_one():
    write = functools.partial(generate, model_of("mamba"), random_prompts(5), max_new_tokens=12)
    greedy = write(temperature=0).tokens
    np.testing.assert_array_equal(write(top_k=1).tokens, greedy)
    np.testing.assert_array_equal(write(top_p=1e-6).tokens, greedy)


def draws(logits, *, temperature=1.0, top_k=None, top_p=1.0, n=4000) -> np.ndarray:
    """How often each token is drawn."""
    settings = Sampling(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k or len(logits)),
        top_p=jnp.float32(top_p),
        eos=jnp.int32(-1),
    )
    flags = (False, top_k is not None or top_p < 1)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1))
    drawn = jax.jit(sample, static_argnums=3)(rows, jax.random.key(0), settings, flags)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / n


PROBABILITIES = np.array([0.1, 0.5, 0.05, 0.3, 0.05])


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), PROBABILITIES),
        (dict(temperature=0.5), PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (dict(top_k=2), np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
        (dict(top_p=0.75), np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
        (dict(top_p=0.45), np.array([0, 1.0, 0, 0, 0])),
        (dict(top_p=0.85, top_k=2), np.array([0, 0.5, 0, 0.3, 0]) / 0.8),
    ],
)
def test_draws_follow_the_distribution(settings, expected):
    found = draws(np.log(PROBABILITIES), **settings)
    assert np.all((found == 0) == (expected == 0))
    # Five standard deviations of a share of 4,000 draws.
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / 4000**0.5)


def test_top_p_counts_among_what_top_k_keeps():
    found = draws(np.log([0.4, 0.3, 0.2, 0.1]), top_k=2, top_p=0.55)  # 0.4 of 0.7 is enough
    np.testing.assert_array_equal(found, [1, 0, 0, 0])


def test_top_k_keeps_no_more_than_k_of_equals():
    found = draws(np.zeros(6), top_k=2)
    assert np.all(found[:2] > 0.4) and not np.any(found[2:])


def test_a_row_ends_with_its_end_token():
    model, (prompt,) = model_of("mamba"), random_prompts(6)
    free = generate(model, [prompt], max_new_tokens=80, temperature=0).tokens[0]
    end = int(free[3])
    first = int(np.argmax(free == end))
    ended = generate(model, [prompt], max_new_tokens=80, temperature=0, eos=end).tokens[0]
    np.testing.assert_array_equal(ended[: first + 1], free[: first + 1])
    assert np.all(ended[first:] == end)
    assert len(ended) == module.DECODE_TOKENS  # it stopped as soon as it could


def test_tokens_come_as_they_are_ready():
    pieces: list[np.ndarray] = []
    written = generate(
        model_of("mamba"), random_prompts(4), max_new_tokens=40, seed=1, on_tokens=pieces.append
    )
    assert [piece.shape[1] for piece in pieces] == [32, 8]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), written.tokens)


@pytest.mark.parametrize(
    "prompt, settings, text",
    [
        ([[]], {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([[1, VOCAB]], {}, f"token {VOCAB}; the model knows 0..{VOCAB - 1}"),
        ([[-1]], {}, "token -1"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(temperature=-1.0), "temperature is -1.0"),
        ([[1]], dict(temperature=float("nan")), "temperature is nan"),
        ([[1]], dict(top_k=-1), "top_k is -1"),
        ([[1]], dict(top_p=0.0), "top_p is 0.0"),
    ],
)
def test_what_is_out_of_range_is_named(prompt, settings, text):
    with pytest.raises(ConfigError, match=text):
        generate(model_of("mamba"), prompt, **{"max_new_tokens": 4, **settings})


def test_bytes_to_text_as_they_come():
    codec = Bytes()
    tokens = codec.encode("héllo €")
    assert tokens[0] == 0 and bytes(tokens[1:]).decode() == "héllo €"
    decoder = codec.decoder()
    parts = [decoder.feed([token]) for token in tokens] + [decoder.feed([], last=True)]
    assert "".join(parts) == "héllo €"
    assert "\ufffd" not in "".join(parts)
    assert Bytes().decoder().feed([0xC3, ord("x")], last=True) == "\ufffdx"


def test_a_tokenizer_without_its_package(tmp_path, monkeypatch):
    """Text needs it and says how to get it; numbers do without."""
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'seqzoo\[hf\]'"):
        codec_of(tmp_path, None)
    assert isinstance(codec_of(tmp_path, None, with_text=False), Numbers)


def test_tokens_of_a_tokenizer_as_they_come(tmp_path, monkeypatch):
    """A stand-in whose second token completes the character that the first one began."""

    class Library:
        @staticmethod
        def from_file(file):
            return Library()

        def encode(self, text):
            return types.SimpleNamespace(ids=[7] * len(text))

        def decode(self, tokens):
            return bytes(tokens).decode(errors="replace")

    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=Library))
    (tmp_path / "tokenizer.json").write_text("{}")
    codec = codec_of(tmp_path, None)
    assert codec.encode("abc") == [7, 7, 7]
    decoder = codec.decoder()
    assert [decoder.feed([t]) for t in "é!".encode()] == ["", "é", "!"]


def test_tokens_that_are_no_text():
    assert Numbers().decoder().feed([3, 14]) == "3 14 "
    with pytest.raises(ConfigError, match="--tokens"):
        Numbers().encode("text")


def test_the_end_of_a_document_is_known_from_the_data_or_the_import(tmp_path):
    assert codec_of(tmp_path, None).end is None
    (tmp_path / "source_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert codec_of(tmp_path, None).end == 7
    assert codec_of(tmp_path, types.SimpleNamespace(end_token=3)).end == 3
