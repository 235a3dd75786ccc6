"""Which attention a call asks for: what its static keywords say, checked."""

from typing import NamedTuple

from pallas_kernels.chunk_attention.scores import SCORES


class Form(NamedTuple):
    """The static part of a call.

    Attributes:
        chunk: tokens of a chunk; None = a sliding window.
        slots: of the ring: the window, or the chunk.
        score: what makes weights of scores.
        causal: a query sees no later key.
        scale: factor of q.k.
        fresh: no state came in, so that every row stands at the start of a chunk.
    """

    chunk: int | None
    slots: int
    score: str
    causal: bool
    scale: float
    fresh: bool


def form_of(
    window: int | None,
    chunk: int | None,
    score: str,
    causal: bool,
    scale: float | None,
    *,
    width: int,
    bias: bool,
    fresh: bool,
) -> Form:
    """Checks the keywords of a call.

    Args:
        window, chunk, score, causal, scale: as in `chunk_attention`.
        width: of keys.
        bias: whether there is one.
        fresh: whether no state came in.

    Raises:
        ValueError: they are out of range, or do not go together.
        TypeError: a size is no integer.
    """
    if (window is None) == (chunk is None):
        raise ValueError(
            f"chunk_attention: window={window} and chunk={chunk}; give one of them: window = keys "
            "that a query sees, chunk = tokens that see each other"
        )
    for name, size in dict(window=window, chunk=chunk).items():
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"chunk_attention: {name} is {size!r}; it must be an integer")
        if size < 1:
            raise ValueError(
                f"chunk_attention: {name}={size}; it must be at least 1 (a token sees itself)"
            )
    if score not in SCORES:
        raise ValueError(f"chunk_attention: score={score!r}; allowed: {', '.join(SCORES)}")
    if window is not None and (score != "softmax" or bias or not causal):
        raise ValueError(
            f"chunk_attention: score={score!r}, causal={causal}, bias "
            f"{'given' if bias else 'None'} with a window; a window is causal, a softmax and has "
            "no bias: give chunk in its place"
        )
    if not causal and not fresh:
        raise ValueError(
            "chunk_attention: initial_state with causal=False; what looks both ways depends on "
            "tokens that a stream has not read yet: pass whole sequences and no state"
        )
    if scale is None:
        scale = width**-0.5 if score == "softmax" else 1.0
    return Form(chunk, chunk or window or 0, score, causal, float(scale), fresh)
