"""neural_memory: what users call. The forms behind it are modules of this folder."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.core import dispatch
from pallas_kernels.core.axes import axes
from pallas_kernels.core.numerics import check_documents, check_shapes, state_dtype
from pallas_kernels.neural_memory import pallas_gpu, pallas_tpu, reference, xla
from pallas_kernels.neural_memory.cost import cost
from pallas_kernels.neural_memory.memory import ACTIVATIONS, Rule, Weights

FORMS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
LIMITS = ("none", "clip", "normalise")
_OF_WEIGHTS = ("h v n", "h m k", "h l m m", "h v")  # w_out, w_in, w_hidden, gamma
AXES = axes(
    "b t h k, b t h k, b t h v, b t h, b t h, b t h, "
    + ", ".join((*_OF_WEIGHTS, *_OF_WEIGHTS))
    + " -> b t h v",
    state="b h, b h, b h, b, b",  # of the weights, what their arrays begin with
    independent="b h",
)


class NeuralMemoryState(NamedTuple):
    """Where a stream stopped, also inside a chunk.

    Attributes:
        start: weights before the current chunk, `[b h ...]` each, float32 (float64 for float64
            inputs); gradients are taken at them until the chunk is full.
        now: weights after the last token.
        momentum: S after the last token.
        count: int32 `[b]`, tokens of the current document so far. 0 = nothing is read: then the
            weights above do not matter, a document begins with those of the call. Whether a chunk
            begins is count modulo chunk, too.
        last_id: int32 `[b]`, id of that document; 0 = none yet, or not tracked.
    """

    start: Weights
    now: Weights
    momentum: Weights
    count: jax.Array  # type: ignore[assignment]  # a tuple has a method of this name
    last_id: jax.Array


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array,
    eta: jax.Array,
    theta: jax.Array,
    w_out: jax.Array,
    w_in: jax.Array | None = None,
    w_hidden: jax.Array | None = None,
    gamma: jax.Array | None = None,
    s_out: jax.Array | None = None,
    s_in: jax.Array | None = None,
    s_hidden: jax.Array | None = None,
    s_gamma: jax.Array | None = None,
    *,
    chunk: int,
    activation: str = "gelu",
    limit: str = "none",
    max_norm: float = 1.0,
    detach_norm: bool = False,
    norm_eps: float = 1e-5,
    initial_state: NeuralMemoryState | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> tuple[jax.Array, NeuralMemoryState]:
    """A network per head that is trained on (key, value) pairs while the sequence is read.

        u_t = gradient of |M(k_t) - v_t|^2 by the weights, at those before t's chunk
        S_t = eta_t S_{t-1} - theta_t u_t                        surprise, with momentum
        W_t = (1 - alpha_t) W_{t-1} + S_t                        forgetting
        y_t = M_t(q_t)                                           read after the write

    M is linear (w_out alone), has two layers (w_in) or more (w_hidden); with gamma its output is
    normalised, scaled, and added to its input:

        M(k) = W_out phi(W_hidden ... phi(W_in k)),   LayerNorm(that) (1 + gamma) + k  with gamma

    Chunks count from the start of each document. `chunk` is part of the model: 1 is the exact
    recurrence, more takes the gradients of a chunk's tokens at older weights.

    Args:
        q: `[b t h k]`, float32, bfloat16 or float64.
        k: `[b t h k]`, of length 1: steps are too long for longer ones.
        v: `[b t h v]`.
        alpha: `[b t h]`, share that is forgotten, 0 to 1.
        eta: `[b t h]`, share of the momentum that stays, 0 to 1.
        theta: `[b t h]`, step size. Where keys are alike, above (1 - eta) / chunk it may diverge.
        w_out: `[h v n]`, last layer that every document begins with; n = m, or k if it is the only
            one.
        w_in: `[h m k]`, first layer; None = a linear memory.
        w_hidden: `[h l m m]`, layers between; None = none.
        gamma: `[h v]`, gain of the norm less 1, learned as the weights are; None = no norm and no
            residual. Needs v = k.
        s_out, s_in, s_hidden, s_gamma: momenta of these that every document begins with; None = 0.
        chunk: tokens whose gradients are taken at the same weights, at least 1.
        activation: phi, "gelu" (by erf) or "silu".
        limit: of the gradient of each token by each matrix (and gamma): "none"; "clip" = no longer
            than max_norm; "normalise" = of length max_norm, 0 where it is 0.
        max_norm: that length.
        detach_norm: whether the length counts as a constant when y is differentiated.
        norm_eps: added to the variance under the root of the norm.
        initial_state: where the stream stopped; None = nothing read.
        segment_ids: int32 `[b t]`, documents numbered upward, 0 = padding; None = one document.
            Documents may begin anywhere; the xla form is quickest where they begin at multiples of
            chunk.
        implementation: None = the best that serves, or "reference", "xla", "pallas_tpu",
            "pallas_gpu".
        config: tile sizes and `interpret` of that form; None = its own choice.

    Returns:
        y `[b t h v]` in the dtype of v (0 at padding) and the state after the last token. Weights,
        momenta and sums are in float32 (float64 for float64 inputs). Differentiable in every
        argument, in initial_state and through the state.

    Raises:
        ValueError: shapes do not fit together, a setting is out of range, or there is no such
            implementation.
        TypeError: an array is of the wrong kind.
        NotImplementedError: the implementation that was named does not serve this call.

    Source: Behrouz, Zhong and Mirrokni, "Titans: Learning to Memorize at Test Time" (arXiv
    2501.00663), sections 3.1 and 3.2.

    Differs from source: the loss keeps its factor 2 (equation 17 drops it); packed documents and
    streams, cut anywhere; limits on the gradient, the norm with its residual (as TTT has them) and
    momenta at the start are not in the paper.
    """
    how = Rule(chunk, activation, float(norm_eps), limit, float(max_norm), bool(detach_norm))
    _check_settings(how)
    sizes: dict[str, int] = {}
    opening = Weights(w_out, w_in, w_hidden, gamma)
    given = (s_out, s_in, s_hidden, s_gamma)
    check_shapes(
        "neural_memory",
        sizes,
        q=("b t h k", q),
        k=("b t h k", k),
        v=("b t h v", v),
        alpha=("b t h", alpha),
        eta=("b t h", eta),
        theta=("b t h", theta),
        **_named(opening, Weights._fields),
        **_named(given, ("s_out", "s_in", "s_hidden", "s_gamma")),
    )
    _check_layers(sizes, opening)
    dtype = state_dtype(q, k, v, alpha, eta, theta, *(x for x in opening if x is not None))
    opening = jax.tree.map(lambda x: x.astype(dtype), opening)
    momentum = Weights(*map(_or_zeros, opening, given))
    fresh = initial_state is None
    if initial_state is None:
        rows = lambda tree: jax.tree.map(
            lambda x: jnp.broadcast_to(x, (sizes["b"], *x.shape)), tree
        )
        # One array each: a state is donated, and no buffer can be given away twice.
        none = (jnp.zeros((sizes["b"],), jnp.int32) for _ in range(2))
        initial_state = NeuralMemoryState(rows(opening), rows(opening), rows(momentum), *none)
    *weights, count, last_id = initial_state
    for name, part in zip(("start", "now", "momentum"), weights, strict=True):
        _check_state(sizes, name, opening, part)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    if count.shape != (sizes["b"],) or not jnp.issubdtype(count.dtype, jnp.integer):
        raise ValueError(
            f"neural_memory: count of initial_state is {count.dtype} {count.shape}; "
            f"it must be int32 {(sizes['b'],)}"
        )
    count = jnp.asarray(count, jnp.int32)
    segment_ids, last_id = check_documents("neural_memory", sizes, segment_ids, last_id)
    state = (*weights, count, last_id)
    if 0 in (sizes["b"], sizes["t"]):
        return v, NeuralMemoryState(*state)
    y, state = dispatch.call(
        "neural_memory",
        FORMS,
        ((q, k, v, alpha, eta, theta), (opening, momentum), state, segment_ids),
        implementation=implementation,
        config=config,
        how=how,
        fresh=fresh,
        still=fresh and not any(s is not None for s in given),
    )
    return y, NeuralMemoryState(*state)


def _check_settings(how: Rule) -> None:
    if isinstance(how.chunk, bool) or not isinstance(how.chunk, int):
        raise TypeError(f"neural_memory: chunk is {how.chunk!r}; it must be an integer")
    if how.chunk < 1:
        raise ValueError(f"neural_memory: chunk={how.chunk}; it must be at least 1")
    for name, value, allowed in (
        ("activation", how.activation, tuple(ACTIVATIONS)),
        ("limit", how.limit, LIMITS),
    ):
        if value not in allowed:
            raise ValueError(f"neural_memory: {name}={value!r}; allowed: {', '.join(allowed)}")
    for name, number in dict(max_norm=how.max_norm, norm_eps=how.norm_eps).items():
        if number <= 0:
            raise ValueError(f"neural_memory: {name}={number}; it must be above 0")


def _named(weights: tuple, names: tuple[str, ...]) -> dict[str, tuple[str, jax.Array | None]]:
    """Weights for check_shapes, under the names of the arguments."""
    return dict(zip(names, zip(_OF_WEIGHTS, weights, strict=True), strict=True))


def _check_layers(sizes: dict[str, int], weights: Weights) -> None:
    if weights.w_in is None and weights.w_hidden is not None:
        raise ValueError("neural_memory: w_hidden is given and w_in is not; they come with w_in")
    letter = "k" if weights.w_in is None else "m"
    if sizes["n"] != sizes[letter]:
        raise ValueError(
            f"neural_memory: w_out has shape {weights.w_out.shape}; [h v {letter}] with "
            f"{letter}={sizes[letter]} was expected"
        )
    if weights.gamma is not None and sizes["v"] != sizes["k"]:
        raise ValueError(
            f"neural_memory: gamma is given, so the memory adds its input to its output, but keys "
            f"have k={sizes['k']} and values v={sizes['v']}; they must be equal"
        )


def _or_zeros(weight, momentum):
    if weight is None or momentum is not None:
        if weight is None and momentum is not None:
            raise ValueError("neural_memory: a momentum is given for a weight that is not")
        return momentum if weight is None else momentum.astype(weight.dtype)
    return jnp.zeros_like(weight)


def _check_state(sizes: dict[str, int], name: str, opening: Weights, part: Weights) -> None:
    for field, weight, array in zip(Weights._fields, opening, part, strict=True):
        shape = None if weight is None else (sizes["b"], *weight.shape)
        found = None if array is None else array.shape
        if found != shape:
            raise ValueError(
                f"neural_memory: {field} of initial_state.{name} has shape {found}; it must be "
                f"{shape}, as the call's {field} has it"
            )


neural_memory.axes = AXES  # type: ignore[attr-defined]
neural_memory.forms = FORMS  # type: ignore[attr-defined]
neural_memory.sizes = dict(m=256, n=256, l=1)  # type: ignore[attr-defined]  # of a typical call
neural_memory.left_out = ("w_hidden", "s_hidden")  # type: ignore[attr-defined]
neural_memory.options = dict(chunk=64)  # type: ignore[attr-defined]
neural_memory.cost = cost  # type: ignore[attr-defined]
