"""Writing 1,024 tokens: BASED against attention of equal parameters and depth, batch 1 to 32.

BASED's claim (arXiv 2402.18668) in kind: its state does not grow, so it writes faster where many
sequences have a long past each. `floor` is the weights and what the sequences keep, once through
memory, at the rate at which this machine reads. The models and the reading of memory take turns, 32
tokens at a time, so that a busy machine slows all of them alike. Attention reads its whole cache in
every step, as it was sized beforehand; by context, the cache is exactly as long as the context.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose

NEW = 1024
STEPS = 32  # in one call of a compiled loop

_COMMON = ("data=stdlib_text", "task=next_token", "model.d_model=768", "model.n_layers=5")
ANY_CONTEXT = "a step at any context"

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
    read = Read(megabytes=128 if quick else 512)
    rows = [
        _row("parameters", name, millions=weight_bytes(model) / 4e6)
        for name, model in models.items()
    ]
    for batch in (1, 8) if quick else (1, 2, 4, 8, 16, 32):
        rows += written(models, batch, read, 64 if quick else NEW)
    for batch in (1, 8) if quick else (1, 8, 32):
        rows += by_context(models, batch, read, (64, 256) if quick else (16, 64, 256, 1024, 2048))
    return rows


def written(models, batch: int, read: "Read", new: int = NEW) -> list[dict[str, object]]:
    """Both write `new` tokens, in turns."""
    loops = {name: Loop(model, batch, new) for name, model in models.items()}
    seconds = take_turns({**loops, "read": read}, rounds=new // STEPS)
    rate = read.nbytes / statistics.median(seconds["read"])
    case, rows = f"{new:,} tokens", []
    for name, loop in loops.items():
        step = sum(seconds[name]) / new
        reach = "by floor <= 1.5" if name == "attention" else ""
        floor = (weight_bytes(models[name]) + loop.state_bytes) / rate
        rows.append(_row(case, name, batch, step=step, floor=floor, rate=rate, reach=reach))
    times = sum(seconds["attention"]) / sum(seconds["BASED"])
    return [*rows, _row(f"{case}, against attention", "BASED", batch, times=times)]


def by_context(
    models, batch: int, read: "Read", contexts: Sequence[int], rounds: int = 9
) -> list[dict[str, object]]:
    """Time of a step at each context, and where the two lines cross."""
    loops = {0: Loop(models["BASED"], batch, 1)}
    loops |= {n: Loop(models["attention"], batch, n) for n in contexts}
    seconds = take_turns({**loops, "read": read}, rounds=rounds)
    rate = read.nbytes / statistics.median(seconds.pop("read"))
    medians = {n: statistics.median(found) / STEPS for n, found in seconds.items()}
    rows = []
    for n, step in medians.items():
        name, case = ("attention", f"a step at context {n:,}") if n else ("BASED", ANY_CONTEXT)
        floor = (weight_bytes(models[name]) + loops[n].state_bytes) / rate
        rows.append(_row(case, name, batch, step=step, floor=floor, rate=rate))
    growing = [medians[n] for n in contexts]
    if contexts[-1] >= NEW:
        mean = float(np.mean(np.interp(np.arange(NEW), contexts, growing)))
        case = f"{NEW:,} tokens, were the cache never longer than needed"
        rows.append(_row(case, "attention", batch, step=mean))
    found = crossing(contexts, growing, medians[0])
    return [*rows, _row("context where the lines cross", "both", batch, tokens=found)]


def take_turns(candidates: Mapping, rounds: int) -> dict:
    """Calls each once per round; the seconds of each call."""
    seconds: dict = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


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
        self()  # the first call touches its memory for the first time

    def __call__(self) -> None:
        """Writes STEPS tokens in each row."""
        self.carry = jax.block_until_ready(self.steps(self.variables, self.carry))


class Read:
    """Reads memory as fast as this machine does: a sum of an array that fits into no cache.

    Args:
        megabytes: of the array.
    """

    def __init__(self, megabytes: int):
        self.large = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
        self.nbytes = self.large.nbytes
        self.sum: Callable = jax.jit(jnp.sum)
        self()

    def __call__(self) -> None:
        jax.block_until_ready(self.sum(self.large))


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


def weight_bytes(model: nnx.Module) -> int:
    """Of all parameters: a step reads each of them."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _row(
    case: str,
    model: str,
    batch: int | None = None,
    *,
    step: float | None = None,
    floor: float | None = None,
    rate: float | None = None,
    reach: str = "",
    **figure: float,
) -> dict[str, object]:
    """The seconds of a step (one token in every row), their floor and the rate behind it in bytes
    per second; or a figure with its unit."""
    row: dict[str, object] = {"bench": "generation", "model": model, "batch": batch, "case": case}
    if step is not None and batch is not None:
        row |= {"tokens/s": round(batch / step), "ms/step": round(1e3 * step, 2)}
        if floor is not None and rate is not None:
            row |= {"floor ms": round(1e3 * floor, 2), "by floor": round(step / floor, 2)}
            row |= {"read GB/s": round(rate / 1e9, 1)}
    for unit, value in figure.items():
        row |= {"measured": float(f"{value:.4g}"), "unit": unit}
    return row | {"to reach": reach}
