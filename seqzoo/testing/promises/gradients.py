"""Gradients: finite, the same through handed-on states, the same twice."""

import numpy as np

from seqzoo.testing.subject import (
    CHUNK,
    LENGTH,
    N_CHUNKS,
    TOLERANCES,
    Broken,
    Subject,
    compare,
    identical,
    inputs,
    named_leaves,
    open_mixer,
)


def gradients_finite(subject: Subject) -> str:
    """In bfloat16 at four times the length, every gradient is finite."""
    opened = open_mixer(subject, "bfloat16")
    x = inputs(subject, 4 * LENGTH, dtype="bfloat16")
    cotangent = inputs(subject, 4 * LENGTH, seed=1)
    by_variables, by_x = opened.grad(opened.variables, x, cotangent, 1)
    for name, leaf in [*named_leaves(by_variables), ("x", by_x)]:
        bad = int(np.sum(~np.isfinite(np.asarray(leaf, np.float32))))
        if bad:
            raise Broken(
                f"bfloat16, length {4 * LENGTH}: the gradient of {name} has {bad} of {leaf.size} "
                "values that are nan or infinite"
            )
    return f"length {4 * LENGTH}"


def gradients_through_state(subject: Subject) -> str:
    """Gradients flow through a handed-on state: chunks give the gradients of the whole."""
    opened, x, cotangent = open_mixer(subject), inputs(subject), inputs(subject, seed=1)
    chunked = opened.grad(opened.variables, x, cotangent, N_CHUNKS)
    whole = opened.grad(opened.variables, x, cotangent, 1)
    errors = [
        compare(
            f"gradient of {name}, {N_CHUNKS} chunks of {CHUNK} against whole",
            got,
            want,
            TOLERANCES["gradients"],
        )
        for (name, got), (_, want) in zip(
            [*named_leaves(chunked[0]), ("x", chunked[1])],
            [*named_leaves(whole[0]), ("x", whole[1])],
            strict=True,
        )
    ]
    return f"{len(errors)} gradients over {N_CHUNKS} chunks: error {max(errors):.0e}"


def deterministic(subject: Subject) -> str:
    """The same call twice gives the same bits, forward and backward."""
    opened, x, cotangent = open_mixer(subject), inputs(subject), inputs(subject, seed=1)
    (y, _), (again, _) = (opened.call(opened.variables, x) for _ in range(2))
    identical("outputs of the same call", again, y)
    first, second = (opened.grad(opened.variables, x, cotangent, 1) for _ in range(2))
    for (name, a), (_, b) in zip(named_leaves(first), named_leaves(second), strict=True):
        identical(f"gradient {name} of the same call", b, a)
    return "to the bit"
