"""The promises of a mixer (contract 2), one function each, run on any class.

A promise takes a Subject and returns what it measured as a short text. It raises Broken where the
promise does not hold; a NotImplementedError of the mixer itself means that it declines, which is
reported with its reason. `seqzoo check` and tests/mixers run the same list.

Two optional attributes of a mixer change what is asked of it:
    causality: "exact" (default), "fft" (earlier outputs may move by 1e-5 of the largest) or "none":
        it looks both ways. Then it declines STREAMS, the promises about causality, states and
        steps, and no other; that it looks ahead, and refuses states by NotImplementedError with a
        reason, is tested instead.
    document_alignment: packed documents start at multiples of it (default 1).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from seqzoo.testing.promises import construction, documents, gradients, shapes, streams
from seqzoo.testing.subject import Broken, Subject


class Result(NamedTuple):
    """What became of one promise.

    Attributes:
        promise: its name.
        outcome: "kept", "declined" (by NotImplementedError), "broken", or "error" (it crashed).
        detail: what was measured, or the reason.
        seconds: how long it took, compilation included.
    """

    promise: str
    outcome: str
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome in ("kept", "declined")


PROMISES: dict[str, Callable[[Subject], str]] = {
    promise.__name__: promise
    for promise in (
        construction.constructor,
        construction.parameters,
        construction.decay,
        construction.one_graphdef,
        construction.built_abstractly,
        shapes.shapes,
        shapes.state_structure,
        shapes.state_bytes,
        streams.chunks_equal_whole,
        streams.steps_equal_whole,
        streams.steps_go_on,
        documents.causal,
        documents.rows_independent,
        documents.packed_equal_alone,
        documents.packed_streams,
        documents.packed_by_token,
        documents.padding_content,
        documents.padding_state,
        documents.documents_go_on,
        gradients.gradients_finite,
        gradients.gradients_through_state,
        gradients.deterministic,
    )
}

# What a mixer that looks both ways declines, and it alone may decline all of.
STREAMS = frozenset(
    {
        "state_structure",
        "state_bytes",
        "chunks_equal_whole",
        "steps_equal_whole",
        "steps_go_on",
        "causal",
        "packed_streams",
        "packed_by_token",
        "padding_state",
        "documents_go_on",
        "gradients_through_state",
    }
)

# What no mixer may decline.
_REQUIRED = {
    "constructor",
    "parameters",
    "decay",
    "one_graphdef",
    "built_abstractly",
    "shapes",
    "rows_independent",
    "gradients_finite",
    "deterministic",
}


def check_promise(name: str, subject: Subject) -> Result:
    """Tests one promise; never raises for what the mixer does."""
    start = time.perf_counter()
    try:
        # Accelerators round float32 products to fewer bits unless told not to.
        with jax.default_matmul_precision("highest"):
            outcome, detail = "kept", PROMISES[name](subject)
    except NotImplementedError as reason:
        outcome, detail = "declined", str(reason) or "NotImplementedError without a reason"
        if name in _REQUIRED:
            outcome, detail = "broken", f"no mixer may decline this one: {detail}"
        elif not str(reason):
            outcome, detail = "broken", "declined without a reason: give NotImplementedError a text"
    except Broken as broken:
        outcome, detail = "broken", str(broken)
    except Exception as error:  # a stranger's class may do anything; the others are still told
        outcome, detail = "error", f"{type(error).__name__}: {_first_line(error)}"
    return Result(name, outcome, detail, time.perf_counter() - start)


def check_mixer(build, *, d_model: int = 32, batch: int = 2) -> list[Result]:
    """Tests every promise.

    Args:
        build: `build(d_model, *, dtype, rngs) -> mixer`: a class, or a functools.partial of it.
        d_model: width to test at.
        batch: rows, at least 2.

    Returns:
        One Result per promise, in order.
    """
    subject = Subject(build=build, d_model=d_model, batch=batch)
    return [check_promise(name, subject) for name in PROMISES]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no text)"
