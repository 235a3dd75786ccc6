"""What a call of neural_memory costs."""

from pallas_kernels.core.costs import Cost


def cost(
    b: int,
    t: int,
    h: int,
    k: int,
    v: int,
    n: int,
    chunk: int,
    m: int | None = None,
    l: int = 0,
    *,
    itemsize: int = 4,
    backward: bool = False,
) -> Cost:
    """What a call costs at least, in the closed form: operations, and bytes if arrays move once.

    Per token and weight: the keys' way through 2, what comes back 2 (not through the first layer),
    the queries' way through weights and momentum 4, the updates of both 4; per pair of tokens
    and layer 2 (inputs + outputs), halved as half of the pairs are in sight, and the mixing matrix
    chunk / 3 per pair. Backward is the forward once more and twice it.
    """
    layers = [(k, v)] if m is None else [(k, m), *[(m, m)] * l, (n, v)]
    weights = sum(i * o for i, o in layers)
    back = weights - layers[0][0] * layers[0][1]
    pairs = sum(i + o for i, o in layers) + chunk / 3
    per_token = 10 * weights + 2 * back + chunk * pairs
    hidden = 0 if m is None else (1 + l) * m
    tokens, ends = itemsize * b * t * h, 4 * 4 * b * h * weights
    moved = tokens * (2 * k + 2 * v + 3) + ends
    once = Cost(b * t * h * per_token, moved, b * t * h * 2 * hidden)
    if not backward:
        return once
    moved = tokens * (4 * k + 3 * v + 6) + 2 * ends
    return Cost(3 * once.flops, moved, 2 * once.transcendentals)
