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

import inspect
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqzoo.nn.param import decays
from seqzoo.testing.subject import (
    CHUNK,
    N_CHUNKS,
    TOLERANCES,
    Broken,
    Subject,
    build,
    compare,
    identical,
    inputs,
    named_leaves,
    new_state,
    open_mixer,
    packed_rows,
    stream,
)

LENGTH = CHUNK * N_CHUNKS


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


# --- how it is built ------------------------------------------------------------------------------


def constructor(subject: Subject) -> str:
    """Takes d_model, then keywords that a YAML file can hold, then dtype and rngs by keyword."""
    made = getattr(subject.build, "func", subject.build)
    if not inspect.isclass(made):
        return "not a class: its keywords are not looked at"
    # of __init__: the class itself shows the signature of its metaclass
    _, first, *others = inspect.signature(made.__init__).parameters.values()
    if first.name != "d_model":
        raise Broken(f"the first argument is {first.name!r}; it must be 'd_model'")
    by_keyword = {p.name: p for p in others if p.kind is p.KEYWORD_ONLY}
    for name in ("dtype", "rngs"):
        if name not in by_keyword:
            raise Broken(f"no keyword-only argument {name!r}")
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    for parameter in others:
        if parameter.name not in by_keyword:
            raise Broken(f"argument {parameter.name!r} is not keyword-only (put a * after d_model)")
        if parameter.name in ("dtype", "rngs") or parameter.default is parameter.empty:
            continue
        if not isinstance(parameter.default, plain):
            raise Broken(
                f"the default of {parameter.name!r} is a {type(parameter.default).__name__}: "
                "a YAML file cannot hold it"
            )
    return f"{len(by_keyword) - 2} keywords"


def parameters(subject: Subject) -> str:
    """Parameters are float32 whatever the dtype; nothing random is kept for run time."""
    mixer = build(subject, "bfloat16")
    variables = nnx.to_flat_state(nnx.state(mixer))
    count = 0
    for path, variable in variables:
        name = ".".join(map(str, path))
        if isinstance(variable, nnx.RngState):
            raise Broken(f"{name} is random state: keep no nnx.Rngs, draw at construction only")
        if isinstance(variable, nnx.Param):
            count += variable[...].size
            if variable[...].dtype != jnp.float32:
                raise Broken(f"parameter {name} is {variable[...].dtype}; it must be float32")
    return f"{count} parameters at d_model {subject.d_model}"


def decay(subject: Subject) -> str:
    """Every parameter says whether weight decay applies; vectors (biases, norms) are exempt."""
    chosen = []
    for path, variable in nnx.to_flat_state(nnx.state(build(subject), nnx.Param)):
        name = ".".join(map(str, path))
        answer = decays(variable)
        if not isinstance(answer, bool):
            raise Broken(f"decays({name}) is {answer!r}; it must be True or False")
        if answer and variable[...].ndim < 2:
            raise Broken(f"{name} is a vector under weight decay: pass decay=False to param()")
        if answer:
            chosen.append(name)
    return f"decayed: {', '.join(chosen) or 'none'}"


def one_graphdef(subject: Subject) -> str:
    """Two instances with other seeds differ in arrays alone, so they share a compiled step."""
    first, second = (nnx.split(build(subject, seed=seed))[0] for seed in (0, 1))
    hash(first)
    if first != second:
        raise Broken(
            "two instances of one configuration have different static parts: keep no lambda, "
            "closure or array made in __init__ as a plain attribute"
        )
    return "equal and hashable"


def built_abstractly(subject: Subject) -> str:
    """Can be built without memory, and many layers at once (the stack and `seqzoo show` do)."""

    def one(key):
        mixer = subject.build(subject.d_model, dtype="float32", rngs=nnx.Rngs(key))
        return nnx.state(mixer, nnx.Param)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    stacked = jax.eval_shape(jax.vmap(one), keys)
    for name, leaf in named_leaves(stacked):
        if leaf.shape[:1] != (3,):
            raise Broken(f"{name} has shape {leaf.shape} when three layers are built at once")
    return "under eval_shape and vmap"


# --- what it takes and gives ----------------------------------------------------------------------


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


# --- one function, three ways ---------------------------------------------------------------------


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


# --- who sees whom --------------------------------------------------------------------------------


def causal(subject: Subject) -> str:
    """No output depends on a later input: change a token, and what stands before stays."""
    opened, x = open_mixer(subject), inputs(subject)
    causality = getattr(opened.mixer, "causality", "exact")
    if causality == "none":
        _check_both_ways(subject, opened, x)
        raise NotImplementedError("causality = 'none': it looks both ways")
    if causality not in ("exact", "fft"):
        raise Broken(f"causality is {causality!r}; allowed: 'exact', 'fft', 'none'")
    y, _ = opened.call(opened.variables, x)
    for at in (1, CHUNK, LENGTH // 2 + 5, LENGTH - 1):
        changed, _ = opened.call(opened.variables, x.at[:, at].add(10.0))
        what = f"outputs before token {at} of {LENGTH}, which was changed"
        if causality == "exact":
            identical(what, changed[:, :at], y[:, :at])
        else:
            compare(what, changed[:, :at], y[:, :at], TOLERANCES["fft"])
        if np.array_equal(changed[:, at:], y[:, at:]):
            raise Broken(f"nothing changes from token {at} on, although it was changed")
    return "to the bit" if causality == "exact" else f"to {TOLERANCES['fft']:.0e} (FFT)"


def _check_both_ways(subject: Subject, opened, x) -> None:
    """That the last token is seen by the first, and that nothing pretends to stream."""
    y, state = opened.call(opened.variables, x)
    changed, _ = opened.call(opened.variables, x.at[:, -1].add(10.0))
    if np.array_equal(changed[:, :-1], y[:, :-1]):
        raise Broken("causality is 'none', but nothing before the last token changes with it")
    if state is not None:
        raise Broken("causality is 'none', but it gives a state; it must give None")
    fake = jnp.zeros((subject.batch, 1))
    for what, attempt in {
        "init_state": lambda: new_state(opened.mixer, subject.batch),
        "step": lambda: opened.mixer.step(x[:, 0], fake),
        "mixer(x, state=...)": lambda: opened.mixer(x, state=fake),
        "state_bytes": lambda: opened.mixer.state_bytes(64),
    }.items():
        try:
            attempt()
        except NotImplementedError as reason:
            if str(reason):
                continue
            raise Broken(f"{what} must give the reason with its NotImplementedError") from None
        raise Broken(f"causality is 'none', so {what} must raise NotImplementedError")


def rows_independent(subject: Subject) -> str:
    """Rows of a batch do not talk."""
    opened, x = open_mixer(subject), inputs(subject)
    y, _ = opened.call(opened.variables, x)
    changed, _ = opened.call(opened.variables, x.at[0].multiply(-3.0))
    identical("rows 1.. when row 0 was changed", changed[1:], y[1:])
    return "to the bit"


def packed_equal_alone(subject: Subject) -> str:
    """Documents packed in a row give what each gives alone; padding gives 0."""
    opened, ids, documents, x = _packed(subject)
    packed, _ = opened.call(opened.variables, x, ids)
    packed, worst = np.asarray(packed), 0.0
    if np.any(packed[np.asarray(ids) == 0]):
        raise Broken("outputs at padding (segment id 0) are not 0")
    for length in sorted({d.stop - d.start for d in documents}):
        alike = [d for d in documents if d.stop - d.start == length]
        alone, _ = opened.call(
            opened.variables, jnp.stack([x[d.row, d.start : d.stop] for d in alike])
        )
        for document, want in zip(alike, alone, strict=True):
            got = packed[document.row, document.start : document.stop]
            what = f"document at {document.start}..{document.stop} of row {document.row}"
            worst = max(worst, compare(f"{what}, against alone", got, want, TOLERANCES["outputs"]))
    return f"{len(documents)} documents in rows of {ids.shape[1]}: error {worst:.0e}"


def packed_streams(subject: Subject) -> str:
    """Packed documents read chunk by chunk, cut anywhere, give what the whole rows give."""
    opened, ids, _, x = _packed(subject)
    whole, _ = opened.call(opened.variables, x, ids)
    state = new_state(opened.mixer, x.shape[0], x.shape[1])
    streamed, _ = stream(opened, x, ids, state=state)
    error = compare(
        f"rows of {ids.shape[1]} in chunks of {CHUNK} against whole",
        streamed,
        whole,
        TOLERANCES["outputs"],
    )
    return f"rows of {ids.shape[1]} in chunks of {CHUNK}: error {error:.0e}"


def padding_content(subject: Subject) -> str:
    """What stands at padding reaches nobody."""
    opened, ids, _, x = _packed(subject)
    y, _ = opened.call(opened.variables, x, ids)
    garbage = jnp.where((ids == 0)[..., None], 100.0 * x + 7.0, x)
    changed, _ = opened.call(opened.variables, garbage, ids)
    error = compare("outputs when padding holds other values", changed, y, TOLERANCES["fft"])
    return f"error {error:.0e}"


def padding_state(subject: Subject) -> str:
    """A stream goes on after padding as if there had been none."""
    opened, x = open_mixer(subject), inputs(subject)
    one, none = (jnp.full((subject.batch, CHUNK), i, jnp.int32) for i in (1, 0))
    part = [x[:, i * CHUNK : (i + 1) * CHUNK] for i in range(N_CHUNKS)]
    call = lambda *args: opened.call(opened.variables, *args)
    _, state = call(part[0], one, new_state(opened.mixer, subject.batch))
    want, _ = call(part[2], one, state)
    silent, padded = call(part[1], none, state)
    if np.any(np.asarray(silent)):
        raise Broken("a chunk of padding alone gives outputs that are not 0")
    got, _ = call(part[2], one, padded)
    error = compare(
        f"a document going on after {CHUNK} tokens of padding", got, want, TOLERANCES["outputs"]
    )
    return f"error {error:.0e}"


def documents_go_on(subject: Subject) -> str:
    """Without segment_ids a stream stays in its document; the first id after none continues too."""
    opened, x = open_mixer(subject), inputs(subject)
    ids = jnp.full((subject.batch, CHUNK), 5, jnp.int32)
    first, second = x[:, :CHUNK], x[:, CHUNK : 2 * CHUNK]
    call = lambda *args: opened.call(opened.variables, *args)
    results = {}
    for before in ("none", "5"):
        for after in ("none", "5"):
            state = new_state(opened.mixer, subject.batch)
            _, state = call(first, None if before == "none" else ids, state)
            results[before, after], _ = call(second, None if after == "none" else ids, state)
    want = results.pop(("none", "none"))
    errors = [
        compare(
            f"second chunk with ids {after!r} after a first with ids {before!r}, "
            "against no ids at all",
            got,
            want,
            TOLERANCES["outputs"],
        )
        for (before, after), got in results.items()
    ]
    return f"error {max(errors):.0e}"


# --- gradients ------------------------------------------------------------------------------------


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


PROMISES: dict[str, Callable[[Subject], str]] = {
    promise.__name__: promise
    for promise in (
        constructor,
        parameters,
        decay,
        one_graphdef,
        built_abstractly,
        shapes,
        state_structure,
        state_bytes,
        chunks_equal_whole,
        steps_equal_whole,
        steps_go_on,
        causal,
        rows_independent,
        packed_equal_alone,
        packed_streams,
        padding_content,
        padding_state,
        documents_go_on,
        gradients_finite,
        gradients_through_state,
        deterministic,
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


def _packed(subject: Subject):
    opened = open_mixer(subject)
    ids, documents = packed_rows(getattr(opened.mixer, "document_alignment", 1))
    shape = (*ids.shape, subject.d_model)
    x = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    return opened, jnp.asarray(ids), documents, x


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "(no text)"
