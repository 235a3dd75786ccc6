"""Which points of a space are trained together. Imports no jax."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seqzoo.sweep.settings import SweepSettings
from seqzoo.sweep.space import Space


def parts(
    space: Space, sweep: SweepSettings, points: Sequence[Mapping[str, Any]]
) -> Iterator[list[int]]:
    """The points of each group, by number: alike but for what is vectorised, and not too many."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, point in enumerate(points):
        rest = [word for word in space.words(point) if _setting(word) not in sweep.vectorize]
        alike.setdefault(tuple(rest), []).append(number)
    most = max(1, sweep.vectorize_most // sweep.seeds)
    for numbers in alike.values():
        for start in range(0, len(numbers), most):
            yield numbers[start : start + most]


def _setting(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
