"""Windows against a loop over tokens: documents, holes, streams, little room for carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.core import parts, testing
from pallas_kernels.core.windows import over_windows

WINDOW = 4
ROWS = {
    "documents": [[1] * 5 + [2] * 4 + [3] * 3, [1] * 12, [1, 2, 2] + [3] * 9],
    "holes": [[0, 0] + [1] * 5 + [0, 2, 2, 2], [1, 1, 0, 1, 1, 0, 1, 2, 0, 0, 0], [0] * 11],
    "single tokens": [list(range(1, 15)), [1] * 14, [0] * 6 + list(range(1, 9))],
}


def rule(how, params, carry, tokens, mine, place):
    """Before every window its carry is squashed; a document begins with the parameter."""
    (x,), (sum_,) = tokens, carry
    begins = jnp.any(mine & (place == 0), axis=1)
    anew = jnp.any(mine & (place % how == 0), axis=1)
    start = jnp.where(begins, params, jnp.where(anew, jnp.sin(sum_), sum_))
    y = start[:, None] + jnp.cumsum(jnp.where(mine, x * start[:, None], 0), axis=1)
    return (jnp.where(jnp.any(mine, axis=1), y[:, -1], sum_),), y


def by_token(params, carry, x, ids, count, last_id):
    """The same, by its definition."""
    rows, carries = [], []
    for r in range(len(ids)):
        sum_, n, last, out = carry[r], count[r], last_id[r], []
        start = sum_
        for t, number in enumerate(ids[r]):
            if number == 0:
                out.append(0.0)
                continue
            if last not in (0, number):
                n = 0
            if n == 0:
                sum_ = start = params
            elif n % WINDOW == 0:
                sum_ = start = jnp.sin(sum_)
            elif not any(ids[r][:t]):  # the stream stopped inside a window
                start = sum_
            sum_ = sum_ + x[r, t] * start
            n, last = n + 1, number
            out.append(sum_)
        rows.append(jnp.stack([jnp.asarray(o) for o in out]))
        carries.append(sum_)
    return jnp.stack(carries), jnp.stack(rows)


@pytest.mark.parametrize("span", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_windows_are_the_loop_over_tokens(name, span):
    ids = ROWS[name]
    count, last_id = [6, 0, 3], [1, 0, 1]  # two rows are in the midst of a document
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, len(ids[0]))) * 0.3
    weights, carry = rng.normal(size=x.shape), rng.normal(size=3)
    with jax.enable_x64(True):

        def windows(params, carry, x):
            place, valid, *_ = parts.places(
                jnp.asarray(ids, jnp.int32), jnp.asarray(count), jnp.asarray(last_id), x.shape[1]
            )
            (last,), y = over_windows(
                rule, WINDOW, params, (carry,), (x,), place, valid, window=WINDOW, span=span
            )
            return jnp.sum(last) + jnp.sum(weights * y), (last, y)

        def tokens(params, carry, x):
            last, y = by_token(params, carry, x, ids, count, last_id)
            return jnp.sum(last) + jnp.sum(weights * y), (last, y)

        given = (jnp.float64(0.7), jnp.asarray(carry), jnp.asarray(x))
        grads, values = jax.jit(jax.grad(windows, argnums=(0, 1, 2), has_aux=True))(*given)
        wanted, right = jax.grad(tokens, argnums=(0, 1, 2), has_aux=True)(*given)
    limit = testing.TOLERANCES["float64"].largest
    for ours, theirs in zip(
        jax.tree.leaves((grads, values)), jax.tree.leaves((wanted, right)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=limit, atol=limit)
