"""Decoding: tokens per second, and that neither state nor programs grow with what was read."""

import jax
import numpy as np
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval.bench._train_step import MAMBA, VOCAB
from seqzoo.eval.generate import executables, generate


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: per length of prompt, seconds to read it, tokens per second, state and programs."""
    model = build(compose(MAMBA).model, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = []
    for batch in (1, 8):
        before = executables()["decode"]
        # A first call of each shape compiles; it is not measured.
        generate(model, rng.integers(0, VOCAB, (batch, 1)), max_new_tokens=1)
        for length in (64, 1024) if quick else (64, 1024, 16_384):
            prompt = rng.integers(0, VOCAB, (batch, length))
            found = generate(model, prompt, max_new_tokens=64 if quick else 256, seed=1)
            rows.append(
                {
                    "bench": "decode",
                    "case": f"Mamba d 256, 4 layers, batch {batch}, prompt {length:,}",
                    "tokens/s": round(found.tokens_per_second),
                    "read s": round(found.prefill_seconds, 2),
                    "state bytes": found.state_bytes,
                    "decoders compiled": executables()["decode"] - before,
                    "device": jax.devices()[0].device_kind,
                }
            )
    return rows
