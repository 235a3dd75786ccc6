"""What a call of chunk_attention costs at least."""

from pallas_kernels.core.costs import Cost


def cost(
    b: int,
    t: int,
    h: int,
    g: int,
    k: int,
    v: int,
    window: int | None = None,
    *,
    chunk: int | None = None,
    score: str = "softmax",
    causal: bool = True,
    itemsize: int = 4,
    backward: bool = False,
    **others: object,
) -> Cost:
    """Operations on the pairs in sight, and bytes if arrays move once.

    Forward 2 k + 2 v per pair for the products and 5 for its weight; backward computes the scores
    again and makes four products more. relu2 has no exponentials.
    """
    del others  # other options of a call change nothing
    pairs = b * h * _pairs(t, window, chunk, causal)
    moved = itemsize * b * t * (h * k + h * v + g * k + g * v)
    powers = 0 if score == "relu2" else pairs
    if not backward:
        return Cost(flops=(2 * k + 2 * v + 5) * pairs, bytes=moved, transcendentals=powers)
    return Cost(flops=(6 * k + 4 * v + 8) * pairs, bytes=2 * moved, transcendentals=powers)


def _pairs(t: int, window: int | None, chunk: int | None, causal: bool) -> int:
    """Of a row of t tokens."""
    if chunk is None:
        seen = min(window or t, t)
        return t * seen - seen * (seen - 1) // 2
    whole, rest = divmod(t, chunk)
    of = lambda n: n * (n + 1) // 2 if causal else n * n
    return whole * of(chunk) + of(rest)
