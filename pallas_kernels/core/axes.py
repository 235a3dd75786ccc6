"""The axes of an operator's arguments and results, so that a caller can spread it over a mesh."""

from typing import NamedTuple

Letters = tuple[str, ...]


class Axes(NamedTuple):
    """What an operator declares of its axes.

    Attributes:
        arguments: letters of each positional argument, in order.
        results: letters of y.
        state: letters of each field of the state, in order; empty for an operator without one.
        independent: letters along which nothing is exchanged: these may be spread over devices.
    """

    arguments: tuple[Letters, ...]
    results: Letters
    state: tuple[Letters, ...]
    independent: frozenset[str]


SEGMENT_IDS: Letters = ("b", "t")


def axes(equation: str, *, state: str = "", independent: str) -> Axes:
    """Reads ``axes("b t e, e n -> b t e", state="b e n, b", independent="b e")``."""
    arguments, results = equation.split("->")
    return Axes(
        arguments=_letters(arguments),
        results=_letters(results)[0],
        state=_letters(state) if state else (),
        independent=frozenset(independent.split()),
    )


def _letters(text: str) -> tuple[Letters, ...]:
    return tuple(tuple(one.split()) for one in text.split(","))
