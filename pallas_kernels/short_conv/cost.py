"""What a call of short_conv costs at least."""

from pallas_kernels.core.costs import Cost


def cost(b: int, t: int, e: int, w: int, *, itemsize: int = 4, backward: bool = False) -> Cost:
    """What a call costs at least: operations, and bytes if every array moves once."""
    tokens = b * t * e
    if not backward:
        return Cost(flops=(2 * w + 4) * tokens, bytes=2 * itemsize * tokens, transcendentals=tokens)
    return Cost(flops=(6 * w + 8) * tokens, bytes=3 * itemsize * tokens, transcendentals=tokens)
