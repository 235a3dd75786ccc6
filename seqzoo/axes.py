"""The axis letters, once. Shape strings, einsum strings and comments all use these.

    b  batch            h  query heads          w  convolution taps
    t  time             g  key-value heads      m  memories
    d  model width      k  key width            o  vocabulary
    e  inner width      v  value width          l  cache slots
    n  state            c  chunk length         r  repeats of a period of layers

Activations are `[b t d]`, heads `[b t h k]`; states `[b e n]` or `[b h k v]`. Gates live in log
space and end in `_log`. Segment ids are int32 `[b t]`: documents numbered upward, 0 = padding.
"""

AXES = dict(
    b="batch",
    t="time",
    d="model width",
    e="inner width",
    n="state",
    h="query heads",
    g="key-value heads",
    k="key width",
    v="value width",
    c="chunk length",
    w="convolution taps",
    m="memories",
    o="vocabulary",
    l="cache slots",
    r="repeats of a period of layers",
)
