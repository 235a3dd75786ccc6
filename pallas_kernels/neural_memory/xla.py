"""neural_memory for any device that XLA compiles for: matrix products, chunk by chunk.

Inside a chunk the closed form of dual.py; from chunk to chunk a scan. The backward pass runs each
chunk again from the weights and the momentum before it, of which those before every `span`-th are
kept (core/parts.py, core/windows.py). README.md has the maths, and what was tried and measured.
"""

import dataclasses
from collections.abc import Mapping

from pallas_kernels.core import dispatch, parts, windows
from pallas_kernels.core.config import Config
from pallas_kernels.neural_memory import dual

_TOKENS_PER_STATE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaConfig(Config):
    """How the work is cut.

    Attributes:
        span: chunks per state that is kept for the backward pass; above 1, it runs those between
            once more.
    """

    span: int = 1

    def __post_init__(self):
        if self.span < 1:
            raise ValueError(f"span is {self.span}; it must be at least 1")

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> "XlaConfig":
        """A state for 16 tokens at least."""
        return cls(span=max(1, _TOKENS_PER_STATE // sizes["chunk"]), device_kind=device_kind)


def refuses(shapes, device_kind) -> None:
    """Serves every call."""
    del shapes, device_kind


def run(tokens, opening, state, segment_ids, *, how, fresh, still, config):
    """See `neural_memory`; the state in the dtype to compute in. Returns y and the state's fields.

    Args:
        tokens: q, k, v, alpha, eta, theta.
        opening: weights and momentum `[h ...]` that documents begin with.
        state: weights at the chunk's start, now, and the momentum, `[b h ...]`; count, last_id.
        segment_ids: int32 `[b t]` or None.
        how: static settings.
        fresh: whether the state is an opening one, nothing read.
        still: whether its momentum is 0 besides.
        config: XlaConfig or None.
    """
    del still
    *carry, count, last_id = state
    t = tokens[0].shape[1]
    if fresh and segment_ids is None:
        span = _span(how, config)
        carry, y = parts.over_parts(
            dual.one_document,
            how,
            (),
            tuple(carry),
            tokens,
            parts.Parts(None, None),
            block=how.chunk if t > 1 else 1,
            span=span,
            kept=_without_start,
            regained=_with_start,
        )
        return y, (*carry, count + t, last_id)
    place, valid, count, last_id = parts.places(segment_ids, count, last_id, t)
    if t == 1:
        cut = parts.cut(place, valid, 1, how.chunk)
        call = (dual.any_documents, how, opening, tuple(carry), tokens)
        carry, y = parts.over_parts(*call, cut, block=1)
    else:
        carry, y = any_documents(how, opening, tuple(carry), tokens, place, valid, config=config)
    return y, (*carry, count, last_id)


def any_documents(how, opening, carry, tokens, place, valid, *, config=None):
    """Reads rows in which documents begin anywhere: the carry and y, 0 where there is no token.

    Args:
        how, opening, tokens, config: see `run`.
        carry: start, now, momentum.
        place: int32 `[b t]`, tokens of its document before each one.
        valid: bool `[b t]`, where there is a token; None = everywhere.
    """
    return windows.over_windows(
        dual.any_documents,
        how,
        opening,
        carry,
        tokens,
        place,
        valid,
        window=how.chunk,
        span=_span(how, config),
        kept=_without_start,
        regained=_with_start,
    )


def _span(how, config) -> int:
    return XlaConfig.of(config, dict(chunk=how.chunk), dispatch.device_kind(config)).span


def _without_start(carry):
    return carry[1:]


def _with_start(kept):
    return kept[0], *kept
