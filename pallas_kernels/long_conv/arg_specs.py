"""The calls that long_conv is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values; kernels die away along their lags, at one rate per channel."""
    x = rng.normal(size=shape)
    if name not in ("kernel", "reverse_kernel"):
        return x
    channels, lags = shape
    rates = np.linspace(0.5, 4, channels)[:, None]
    return x * np.exp(-rates * np.arange(lags) / lags)


def draw_flat(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values, kernels too: their last lags are as heavy as their first."""
    del name
    return rng.normal(size=shape)


GATES = ("pre_gate", "post_gate")

SPECS = (
    ArgSpec(name="bare", sizes=dict(b=4, e=3, l=150), draw=draw),
    ArgSpec(
        name="whole",
        sizes=dict(b=4, e=3, l=70),
        draw=draw,
        given=("skip", "bias", *GATES),
    ),
    ArgSpec(name="one_lag", sizes=dict(b=4, e=1, l=1), draw=draw, given=("skip",)),
    ArgSpec(
        name="two_sided",
        sizes=dict(b=4, e=3, l=140),
        draw=draw_flat,
        given=("skip", "reverse_kernel", *GATES),
    ),
    *(
        ArgSpec(name=name, sizes=sizes, draw=draw, given=given, tags=frozenset(tags))
        for name, sizes, given, tags in (
            # M2-BERT-80M as it was pretrained, and its long one; the causal form of that.
            (
                "m2_bert_80m",
                dict(b=32, t=128, e=768, l=128),
                ("skip", "reverse_kernel", *GATES),
                {"tpu"},
            ),
            (
                "m2_bert_80m_8k",
                dict(b=2, t=8192, e=768, l=8192),
                ("skip", "reverse_kernel", *GATES),
                {"tpu", "primary"},
            ),
            (
                "m2_causal_2k",
                dict(b=2, t=2048, e=768, l=2048),
                ("skip", *GATES),
                {"tpu"},
            ),
            ("long", dict(b=1, t=16_384, e=128, l=16_384), (), {"bench"}),
            (
                "m2_bert",
                dict(b=4, t=512, e=768, l=512),
                ("skip", "reverse_kernel", *GATES),
                {"bench"},
            ),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
