"""What a mixer takes and gives: shapes, dtypes, its state and the bytes of it."""

import jax
import jax.numpy as jnp

from seqzoo.testing.subject import (
    CHUNK,
    Broken,
    Subject,
    named_leaves,
    new_state,
    open_mixer,
)


def shapes(subject: Subject) -> str:
    """`[b t d]` gives `[b t d]` in the dtype of the mixer, for any length and input dtype."""
    for dtype in ("float32", "bfloat16"):
        opened = open_mixer(subject, dtype)
        for length in (1, 2, 63, 130):
            x = jax.ShapeDtypeStruct((subject.batch, length, subject.d_model), jnp.float32)
            y, _ = jax.eval_shape(opened.call, opened.variables, x)
            # The stream itself, where the mixer gives that, need not narrow.
            stream = x.dtype if getattr(opened.mixer, "owns_residual", False) else dtype
            if y.shape != x.shape or y.dtype not in (dtype, stream):
                raise Broken(
                    f"dtype={dtype}, input {x.shape} float32: the output is {y.shape} {y.dtype}; "
                    f"it must be {x.shape} {dtype}"
                )
    return "lengths 1, 2, 63, 130 in float32 and bfloat16"


def state_structure(subject: Subject) -> str:
    """The state that goes out has the structure, shapes and dtypes of the one that went in."""
    describe = lambda tree: [
        (name, leaf.shape, str(leaf.dtype)) for name, leaf in named_leaves(tree)
    ]
    for dtype in ("float32", "bfloat16"):
        opened = open_mixer(subject, dtype)
        state = jax.eval_shape(lambda opened=opened: new_state(opened.mixer, subject.batch))
        x = jax.ShapeDtypeStruct((subject.batch, CHUNK, subject.d_model), dtype)
        ids = jax.ShapeDtypeStruct((subject.batch, CHUNK), jnp.int32)
        step = lambda v, x_t, s, opened=opened: opened.steps(v, x_t, s)
        for way, (_, after) in {
            "mixer(x, state=...)": jax.eval_shape(opened.call, opened.variables, x, None, state),
            "... with segment_ids": jax.eval_shape(opened.call, opened.variables, x, ids, state),
            "step": jax.eval_shape(step, opened.variables, x, state),
        }.items():
            changed = set(describe(after)) ^ set(describe(state))
            if changed:
                raise Broken(f"dtype={dtype}, {way} changes the state: {sorted(changed)}")
    return "call, call with documents, step"


def state_bytes(subject: Subject) -> str:
    """state_bytes(n) counts exactly what init_state(1, max_length=n) holds."""
    told = []
    for dtype in ("float32", "bfloat16"):
        mixer = open_mixer(subject, dtype).mixer
        for length in (64, 1024):
            answer = mixer.state_bytes(length)
            if set(answer) != {"recurrent", "total"}:
                raise Broken(f"state_bytes gives {sorted(answer)}; it must give recurrent, total")
            state = jax.eval_shape(lambda m=mixer, n=length: new_state(m, 1, n))
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            if answer["total"] != held:
                raise Broken(
                    f"dtype={dtype}: state_bytes({length})['total'] is {answer['total']}, "
                    f"init_state(1, max_length={length}) holds {held} bytes"
                )
            if not 0 <= answer["recurrent"] <= answer["total"]:
                raise Broken(f"recurrent must lie in 0..total; state_bytes({length}) = {answer}")
            told.append(answer["total"])
    return f"{told[0]} bytes at 64 tokens, {told[1]} at 1024 (float32)"
