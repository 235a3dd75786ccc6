"""Solves one setting so that a configuration costs what another one does (contract 6)."""

import math
from collections.abc import Callable
from typing import NamedTuple

from seqzoo.errors import ConfigError

# The finest step last: widths that are multiples of 16 run best.
_STEPS = (16, 4, 1)
_MOST_TRIES = 40


class Solution(NamedTuple):
    """What was found.

    Attributes:
        value: of the setting.
        reached: what the configuration costs with it.
        wanted: what it should cost.
        off: how far apart they are, as a share of what is wanted.
        fits: whether that is within the tolerance.
    """

    value: int
    reached: float
    wanted: float
    off: float
    fits: bool


def solve(cost: Callable[[int], float], wanted: float, *, start: int, tolerance: float) -> Solution:
    """Finds the value nearest to the goal, in as coarse steps as will do.

    Args:
        cost: grows with the value; raises ConfigError for a value that the model refuses.
        wanted: the goal, above 0.
        start: where to begin to look.
        tolerance: of the goal, as a share.

    Raises:
        ConfigError: the model refuses every value that was tried.
    """
    known: dict[int, float | ConfigError] = {}

    def tried(value: int) -> float | None:
        if value not in known:
            try:
                known[value] = cost(value)
            except ConfigError as error:
                known[value] = error
        found = known[value]
        return None if isinstance(found, ConfigError) else found

    best: Solution | None = None
    for step in _STEPS:
        for value in _near(tried, wanted, max(step, round(start / step) * step), step):
            reached = tried(value)
            if reached is not None:
                off = abs(reached / wanted - 1)
                if best is None or off < best.off:
                    best = Solution(value, reached, wanted, off, off <= tolerance)
        if best is not None:
            start = best.value
            if best.fits:
                return best
    if best is None:
        errors = [error for error in known.values() if isinstance(error, ConfigError)]
        raise errors[-1]
    return best


def _near(tried, wanted: float, value: int, step: int) -> set[int]:
    """The multiples of `step` between which the cost crosses the goal."""
    low, high = 0, None  # the cost at `low` is below the goal, at `high` above
    for _ in range(_MOST_TRIES):
        reached = _first_accepted(tried, value, step)
        if reached is None:
            break
        value, here = reached
        if here < wanted:
            low = max(low, value)
        else:
            high = value if high is None else min(high, value)
        if high is not None and high - low <= step:
            break
        if high is None:
            # Costs grow between the first and the second power of a width.
            value = max(value + step, math.ceil(value * (wanted / here) ** 0.6 / step) * step)
        else:
            value = (low + high) // 2 // step * step
        value = max(value, step)
        if value in (low, high):
            break
    return {max(step, one) for one in (low, high) if one is not None}


def _first_accepted(tried, value: int, step: int) -> tuple[int, float] | None:
    """The value itself, or the next one above that the model takes (heads must divide a width)."""
    for one in range(value, value + 64 * step, step):
        cost = tried(one)
        if cost is not None:
            return one, cost
    return None
