"""Top-k routing of tokens: who goes where, with what weight, and how evenly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.report import report


class Routed(NamedTuple):
    """Where each token goes.

    Attributes:
        chosen: int32 `[... k]`, the k places with the largest logits, the largest first; always k
            different ones, whatever the logits hold.
        weights: `[... k]` float32, what each of them counts; nan where a logit is nan.
        probabilities: `[... m]` float32, softmax of the logits.
    """

    chosen: jax.Array
    weights: jax.Array
    probabilities: jax.Array


def route(logits: jax.Array, k: int, *, normalize: bool = True) -> Routed:
    """Picks the k largest logits of each token.

        p = softmax(logits);   weights = p[chosen] / sum p[chosen]

    The choice itself has no gradient: it reaches the router through the weights alone. With k = 1
    and `normalize` the weight is always 1, so there is none at all.

    Args:
        logits: `[... m]`; the softmax is in float32 (float64 for float64).
        k: places per token, 1 .. m.
        normalize: divide the weights by their sum; False: they are the probabilities.

    Raises:
        ValueError: k is out of range.
    """
    m = logits.shape[-1]
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}; it must lie in 1 .. {m}, the number of places")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    probabilities = jax.nn.softmax(logits, axis=-1)
    # By logits: probabilities that underflow to 0 would be a tie.
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    chosen = chosen.astype(jnp.int32)
    scores = logits if normalize else probabilities
    weights = jnp.sum(jnp.where(one_hot(chosen, m), scores[..., None, :], 0), axis=-1)
    if normalize:
        weights = jax.nn.softmax(weights, axis=-1)  # p[chosen] / sum p[chosen], to the last digit
    return Routed(chosen, weights, probabilities)


def one_hot(chosen: jax.Array, m: int) -> jax.Array:
    """bool `[... k m]` of int32 `[... k]`."""
    return chosen[..., None] == jnp.arange(m, dtype=jnp.int32)


def load(routed: Routed, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """How much the places are used.

    Args:
        routed: of tokens `[...]`, all layers or rows that are to be looked at together.
        valid: bool `[...]`, False = padding; None = none is.

    Returns:
        load `[m]`: the fraction of tokens that went to each place (they add up to k);
        mean `[m]`: the mean probability of each (they add up to 1).
    """
    m = routed.probabilities.shape[-1]
    hit = jnp.any(one_hot(routed.chosen, m), axis=-2)
    if valid is None:
        valid = jnp.ones(hit.shape[:-1], bool)
    seen = valid[..., None]
    axes = tuple(range(valid.ndim))
    n = jnp.maximum(jnp.sum(valid), 1).astype(routed.probabilities.dtype)
    mean = jnp.sum(jnp.where(seen, routed.probabilities, 0), axis=axes) / n
    return jnp.sum(hit & seen, axis=axes) / n, mean


def load_balance(routed: Routed, valid: jax.Array | None = None) -> jax.Array:
    """The loss that keeps all places in use, over the tokens given.

        m sum_i load_i mean_i      load and mean as `load` gives them; k when all is even

    Its gradient flows through the mean probabilities alone.

    Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), equation 4, with k choices.
    """
    m = routed.probabilities.shape[-1]
    used, mean = load(routed, valid)
    return m * jnp.sum(used * mean)


def report_routing(module: nnx.Module, routed: Routed, valid: jax.Array | None = None) -> None:
    """Reports how a router fares, for log and plots.

    router_load/I: the fraction of tokens that went to place I (k / m when even).
    router_load/max: the largest of them, which a mean over layers cannot hide.
    router_entropy/token: of one token's probabilities, as a fraction of log m: 0 = always sure.
    router_entropy/load: of the load, likewise: 1 = all places are used alike.
    """
    m = routed.probabilities.shape[-1]
    used, _ = load(routed, valid)
    for i in range(m):
        report(module, f"router_load/{i}", used[i])
    report(module, "router_load/max", jnp.max(used))
    by_token = _entropy(routed.probabilities)
    if valid is not None:
        n = jnp.maximum(jnp.sum(valid), 1)
        by_token = jnp.sum(jnp.where(valid, by_token, 0)) / n
    report(module, "router_entropy/token", jnp.mean(by_token))
    report(module, "router_entropy/load", _entropy(used / routed.chosen.shape[-1]))


def _entropy(p: jax.Array) -> jax.Array:
    """Of distributions `[... m]`, as a fraction of the largest."""
    largest = math.log(max(p.shape[-1], 2))
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1) / largest
