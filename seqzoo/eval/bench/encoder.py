"""An M2 encoder against the same encoder with attention: tokens per second by length of the rows.

M2-BERT's claim (arXiv 2310.12109) in kind: the long convolution costs L log L where attention costs
L^2, so that throughput hardly depends on the length. Tokens per call are the same at every length;
all read whole rows, forward, up to the logits. They take turns, so that a busy machine slows all
alike. M2 comes twice: its kernels made anew in every call, as in training, and kept from one call
to the next (`model.prepared()`), as where the parameters are fixed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.core import bench
from seqzoo.config.build import build
from seqzoo.config.compose import compose

LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS = 32_768  # per call: 64 rows of 512, 4 rows of 8,192

_COMMON = ("data=masked_stdlib_text", "task=masked_tokens", "model=m2_small")
KEPT = "M2, kernels kept"
MODELS = {
    "M2": _COMMON,
    KEPT: _COMMON,
    "attention": (
        *_COMMON,
        "model.pattern=[attention]",
        "model.mixers.attention.causal=false",
        "model.mixers.attention.rope=false",
        "model.mixers.attention.n_heads=2",
    ),
}


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: per length, tokens per second of each, and how much is left of those at the first."""
    lengths, tokens, rounds = (LENGTHS[:2], 2048, 3) if quick else (LENGTHS, TOKENS, 9)
    rows: list[dict[str, object]] = []
    first: dict[str, float] = {}
    for length in lengths:
        found = measured(length, tokens // length, rounds)
        for name, one in found.items():
            speed = tokens / one.median
            first.setdefault(name, speed)
            row = _row(name, length, tokens // length, speed, first[name])
            if name != "attention":
                times = bench.times_faster(found["attention"], one)
                row["times attention"] = round(times, 2)
            rows.append(row)
    return rows


def measured(length: int, batch: int, rounds: int) -> dict[str, bench.Measured]:
    """What a forward pass over rows of one length takes, in turns."""
    tokens = np.random.default_rng(0).integers(0, 256, (batch, length))
    models = {name: encoder(name, length) for name in MODELS}
    programs = {name: functools.partial(forward, nnx.split(m)[0]) for name, m in models.items()}
    variables = {name: nnx.split(m)[1] for name, m in models.items()}
    # One set of arguments for all, so that neither has its weights as constants.
    candidates = {
        name: lambda variables, tokens, name=name: programs[name](variables[name], tokens)
        for name in MODELS
    }
    return bench.take_turns(candidates, (variables, jnp.asarray(tokens, jnp.int32)), rounds=rounds)


def encoder(name: str, length: int) -> nnx.Module:
    """One of MODELS, for rows of one length."""
    words = (*MODELS[name], f"data.seq_len={length}", f"model.max_positions={length}")
    model = build(compose(words).model, rngs=nnx.Rngs(0))
    return model.prepared() if name == KEPT else model


def forward(graphdef, variables, tokens: jax.Array) -> jax.Array:
    """Logits of whole rows."""
    return nnx.merge(graphdef, variables)(tokens)


def _row(name: str, length: int, batch: int, speed: float, first: float) -> dict[str, object]:
    reach = "of the first >= 0.75" if name != "attention" and length == LENGTHS[-1] else ""
    return {
        "bench": "encoder",
        "model": name,
        "length": length,
        "batch": batch,
        "tokens/s": round(speed),
        "of the first": round(speed / first, 2),
        "times attention": "",
        "to reach": reach,
    }
