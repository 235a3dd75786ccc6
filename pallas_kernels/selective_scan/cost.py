"""What a call of selective_scan costs at least."""

from pallas_kernels.core.costs import Cost


def cost(b: int, t: int, e: int, n: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once.

    Forward 9 b t e n + 3 b t e operations, b t e n of them exponentials (the community's count).
    Backward computes the states again (6) and walks back (16); its exponentials are kept between.
    """
    states, tokens, small = b * t * e * n, b * t * e, b * t * n
    if not backward:
        moved = itemsize * (4 * tokens + 2 * small) + 4 * (2 * b * e * n + e * n)
        return Cost(flops=9 * states + 3 * tokens, bytes=moved, transcendentals=states)
    moved = itemsize * (4 * tokens + 2 * small + 3 * tokens + 2 * small)
    return Cost(flops=22 * states + 12 * tokens, bytes=moved, transcendentals=states)
