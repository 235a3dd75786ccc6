"""Who sees whom: later tokens, other rows, other documents, padding."""

import jax.numpy as jnp
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
    new_state,
    open_mixer,
    packed_rows,
    stream,
)


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


def packed_by_token(subject: Subject) -> str:
    """Packed documents read in chunks of one token give what the whole rows give."""
    opened, ids, _, x = _packed(subject)
    state = new_state(opened.mixer, x.shape[0], x.shape[1])
    streamed, _ = opened.tokens(opened.variables, x, ids, state)
    whole, _ = opened.call(opened.variables, x, ids)
    error = compare(
        f"rows of {ids.shape[1]} token by token against whole",
        streamed,
        whole,
        TOLERANCES["outputs"],
    )
    return f"rows of {ids.shape[1]} token by token: error {error:.0e}"


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


def _packed(subject: Subject):
    opened = open_mixer(subject)
    ids, documents = packed_rows(getattr(opened.mixer, "document_alignment", 1))
    shape = (*ids.shape, subject.d_model)
    x = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    return opened, jnp.asarray(ids), documents, x
