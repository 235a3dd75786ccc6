"""Writing 1,024 tokens: BASED against attention of equal parameters and depth, batch 1 to 32.

BASED's claim (arXiv 2402.18668) in kind: its state does not grow, so it writes faster where many
sequences have a long past each. `floor` is the weights and what the sequences keep, once through
memory, at the rate at which this machine reads. Attention reads its whole cache in every step, as
it was sized beforehand; by context, the cache is exactly as long as the context.
"""

import functools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.core import bench
from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval.generate import generate

PROMPT, NEW = 16, 1024
STEPS = 32  # in one call of a compiled loop
VOCAB = 256

_COMMON = ("data=stdlib_text", "task=next_token", "model.d_model=768", "model.n_layers=5")
# The pattern, window and feature dimension of the released models, narrower and less deep.
MODELS = {
    "BASED": (
        *_COMMON,
        "model=based_360m",
        "model.vocab_size=256",
        "model.pattern=[base_conv,based,sliding_window_attention,base_conv,base_conv]",
        "model.channel_mixer.d_ff=1536",
        "model.mixers.based.n_heads=12",
        "model.mixers.sliding_window_attention.n_heads=12",
    ),
    # The MLP is so wide that parameters are equal.
    "attention": (
        *_COMMON,
        "model=transformer_small",
        "model.channel_mixer.d_ff=1768",
        "model.mixers.attention.n_heads=12",
    ),
}


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: tokens per second of both by batch, the floor, and where the lines cross."""
    models = {name: build(compose(words).model, rngs=nnx.Rngs(0)) for name, words in MODELS.items()}
    bandwidth = read_bandwidth(megabytes=128 if quick else 512)
    rows: list[dict[str, object]] = [_row("memory, read by one sum", GB_per_s=bandwidth / 1e9)]
    for name, model in models.items():
        rows.append(_row("parameters", name, millions=weight_bytes(model) / 4e6))
    for batch in (1, 8) if quick else (1, 2, 4, 8, 16, 32):
        rows += written(models, batch, 64 if quick else NEW, bandwidth)
    for batch in (1, 8) if quick else (1, 8, 32):
        rows += by_context(models, batch, (64, 256) if quick else (64, 256, 1024, 2048), bandwidth)
    return rows


def written(models, batch: int, new: int, bandwidth: float) -> list[dict[str, object]]:
    """Both write `new` tokens after a prompt of PROMPT."""
    prompt = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
    case, rows, speeds = f"{new:,} tokens after {PROMPT}", [], {}
    for name, model in models.items():
        found = generate(model, prompt, max_new_tokens=new, temperature=0)
        speeds[name] = found.tokens_per_second
        rows.append(
            _row(
                case,
                name,
                batch,
                tokens_per_s=found.tokens_per_second,
                step=batch / found.tokens_per_second,
                floor=(weight_bytes(model) + found.state_bytes) / bandwidth,
                reach="by floor <= 1.5" if name == "attention" else "",
            )
        )
    times = speeds["BASED"] / speeds["attention"]
    return [*rows, _row(f"{case}, against attention", "BASED", batch, times=times)]


def by_context(
    models, batch: int, contexts: Sequence[int], bandwidth: float, rounds: int = 5
) -> list[dict[str, object]]:
    """Milliseconds per step at each context, in turns, and where the two lines cross."""
    loops = {("BASED", 0): Loop(models["BASED"], batch, 1)}
    loops |= {("attention", n): Loop(models["attention"], batch, n) for n in contexts}
    seconds: dict = {which: [] for which in loops}
    for _ in range(rounds):
        for which, loop in loops.items():
            seconds[which].append(loop.seconds_per_step())
    medians = {which: statistics.median(found) for which, found in seconds.items()}
    rows = []
    for (name, context), taken in medians.items():
        moved = weight_bytes(models[name]) + loops[name, context].state_bytes
        rows.append(
            _row(
                f"a step at context {context:,}" if context else "a step at any context",
                name,
                batch,
                tokens_per_s=batch / taken,
                step=taken,
                floor=moved / bandwidth,
            )
        )
    growing = [medians["attention", n] for n in contexts]
    ideal = batch / np.mean(np.interp(np.arange(PROMPT, PROMPT + NEW), contexts, growing))
    found = crossing(contexts, growing, medians["BASED", 0])
    case = f"{NEW:,} tokens after {PROMPT}, were its cache never longer than needed"
    rows.append(_row(case, "attention", batch, tokens_per_s=ideal))
    return [*rows, _row("context where the lines cross", "both", batch, tokens=found)]


class Loop:
    """A compiled loop of greedy steps over a state that is sized for one context.

    Args:
        model: a language model.
        batch: sequences.
        context: slots of caches. A step reads all of them, so how far they are filled is of no
            matter to its time.
    """

    def __init__(self, model: nnx.Module, batch: int, context: int):
        graphdef, self.variables = nnx.split(model.unrolled())
        state = model.unrolled_state(model.init_state(batch, max_length=context))
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

        @functools.partial(jax.jit, donate_argnums=1)
        def steps(variables, carry):
            def one(carry, _):
                token, state = carry
                logits, state = nnx.merge(graphdef, variables).step(token, state)
                return (jnp.argmax(logits, axis=-1).astype(jnp.int32), state), None

            return jax.lax.scan(one, carry, length=STEPS)[0]

        self.carry = (jnp.zeros((batch,), jnp.int32), state)
        self.steps = steps.lower(self.variables, self.carry).compile()
        self.seconds_per_step()  # the first call touches memory for the first time

    def seconds_per_step(self) -> float:
        """Runs it once."""
        started = time.perf_counter()
        self.carry = jax.block_until_ready(self.steps(self.variables, self.carry))
        return (time.perf_counter() - started) / STEPS


def crossing(contexts: Sequence[int], growing: Sequence[float], flat: float) -> float:
    """The context at which a growing time reaches a flat one; beyond the ends, by the last slope.

    Below the first context it is that one: so short a past is not told apart.
    """
    if growing[0] >= flat:
        return contexts[0]
    for i in range(1, len(contexts)):
        if growing[i] >= flat or i == len(contexts) - 1:
            slope = (growing[i] - growing[i - 1]) / (contexts[i] - contexts[i - 1])
            return contexts[i - 1] + (flat - growing[i - 1]) / slope if slope > 0 else float("inf")
    return float("inf")


def read_bandwidth(*, megabytes: int, rounds: int = 7) -> float:
    """Bytes per second at which this machine reads, at best: a sum of an array out of any cache."""
    large = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    found = bench.take_turns({"": jnp.sum}, (large,), rounds=rounds)[""]
    return large.nbytes / min(found.seconds)


def weight_bytes(model: nnx.Module) -> int:
    """Of all parameters: a step reads each of them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _row(
    case: str,
    model: str = "",
    batch: int | None = None,
    *,
    tokens_per_s: float | None = None,
    step: float | None = None,
    floor: float | None = None,
    reach: str = "",
    **figure: float,
) -> dict[str, object]:
    """A speed, with the seconds of a step (one token in every row) and their floor; or a figure."""
    row: dict[str, object] = {"bench": "generation", "model": model, "batch": batch, "case": case}
    for unit, value in figure.items():
        row |= {"measured": float(f"{value:.4g}"), "unit": unit.replace("_per_", "/")}
    if tokens_per_s is not None:
        row["tokens/s"] = round(float(tokens_per_s))
    if step is not None and floor is not None:
        row |= {
            "ms/step": round(1e3 * step, 2),
            "floor ms": round(1e3 * floor, 2),
            "by floor": round(step / floor, 2),
        }
    return row | {"to reach": reach}
