"""One function, three ways: whole, chunk by chunk, step by step."""

import jax.numpy as jnp

from seqzoo.testing.subject import (
    CHUNK,
    LENGTH,
    TOLERANCES,
    Subject,
    compare,
    inputs,
    new_state,
    open_mixer,
    stream,
)


def chunks_equal_whole(subject: Subject) -> str:
    """A sequence read chunk by chunk gives what it gives in one piece."""
    opened, x = open_mixer(subject), inputs(subject)
    streamed, _ = stream(opened, x)
    whole, _ = opened.call(opened.variables, x)
    error = compare(
        f"length {LENGTH} in chunks of {CHUNK} against whole",
        streamed,
        whole,
        TOLERANCES["outputs"],
    )
    return f"length {LENGTH} in chunks of {CHUNK}: error {error:.0e}"


def steps_equal_whole(subject: Subject) -> str:
    """A sequence read token by token gives what it gives in one piece."""
    opened, x = open_mixer(subject), inputs(subject)
    stepped, _ = opened.steps(opened.variables, x, new_state(opened.mixer, subject.batch))
    whole, _ = opened.call(opened.variables, x)
    error = compare(
        f"length {LENGTH} step by step against whole", stepped, whole, TOLERANCES["outputs"]
    )
    return f"{LENGTH} steps: error {error:.0e}"


def steps_go_on(subject: Subject) -> str:
    """After a prompt read in one piece, steps go on as if everything had been one piece."""
    opened, x = open_mixer(subject), inputs(subject)
    state = new_state(opened.mixer, subject.batch)
    before, state = opened.call(opened.variables, x[:, :CHUNK], None, state)
    after, _ = opened.steps(opened.variables, x[:, CHUNK:], state)
    whole, _ = opened.call(opened.variables, x)
    error = compare(
        f"prompt of {CHUNK}, then {LENGTH - CHUNK} steps, against whole",
        jnp.concatenate([before, after], axis=1),
        whole,
        TOLERANCES["outputs"],
    )
    return f"prompt of {CHUNK}, then {LENGTH - CHUNK} steps: error {error:.0e}"
