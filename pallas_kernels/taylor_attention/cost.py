"""What a call of taylor_attention costs at least."""

from pallas_kernels.core.costs import Cost
from pallas_kernels.taylor_attention.features import feature_count


def cost(
    b: int, t: int, h: int, k: int, v: int, *, itemsize: int = 4, backward: bool = False
) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once.

    Forward per token and head: two products with the state, 2 f (v + 1) operations each, and twice
    f for the features. Backward five such products: the state again, its gradient, and one each for
    the gradients of q, k and v.
    """
    tokens, f = b * t * h, feature_count(k)
    products = 2 * f * (v + 1)
    state = 4 * b * h * f * (v + 1)
    if not backward:
        moved = itemsize * tokens * (2 * k + 2 * v) + 2 * state
        return Cost(flops=tokens * (2 * products + 2 * f), bytes=moved)
    moved = itemsize * tokens * (4 * k + 3 * v) + 2 * state
    return Cost(flops=tokens * (5 * products + 6 * f), bytes=moved)
