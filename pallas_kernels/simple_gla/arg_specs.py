"""The calls that simple_gla is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values; decays as of a gated layer, logsigmoid(normal) / 16: 0.9 to 0.99."""
    x = rng.normal(size=shape)
    return -np.log1p(np.exp(-x)) / 16 if name == "g" else x


def draw_extreme(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Decays from 1 - 1e-9 to exp(-4000), which is 0, side by side; some are exactly 1 or 0."""
    if name != "g":
        return draw(name, shape, rng)
    rates = np.exp(rng.uniform(np.log(1e-9), np.log(4000), size=shape))
    chance = rng.uniform(size=shape)
    return np.select([chance < 0.1, chance > 0.95], [0.0, -np.inf], -rates)


SPECS = (
    ArgSpec(name="own_heads", sizes=dict(b=4, h=2, g=2, k=5, v=3), draw=draw),
    ArgSpec(
        name="shared_heads",
        sizes=dict(b=4, h=4, g=2, k=4, v=6),
        draw=draw,
        options=dict(scale=0.7),
    ),
    ArgSpec(
        name="extreme",
        sizes=dict(b=4, h=2, g=1, k=3, v=4),
        draw=draw_extreme,
        tags=frozenset({"extreme"}),
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, g=g, k=k, v=v),
            draw=draw,
            tags=frozenset({"bench"}),
        )
        for name, b, t, h, g, k, v in (
            ("issue", 1, 2048, 4, 4, 64, 64),
            ("mqar", 64, 64, 2, 1, 64, 64),
            ("mamba2_130m", 1, 2048, 24, 1, 128, 64),
            ("retention_340m", 1, 2048, 4, 4, 256, 512),
        )
    ),
    # What TPU and GPU kernels are compiled at (core/kernel_check.py).
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, h=h, g=g, k=k, v=v),
            draw=draw,
            tags=frozenset({"tpu", *more}),
        )
        for name, t, h, g, k, v, more in (
            ("mamba2_130m_2k", 2048, 24, 1, 128, 64, {"primary"}),
            ("mamba2_130m_8k_f32", 8192, 24, 1, 128, 64, ()),
            ("retention_340m_2k", 2048, 4, 4, 256, 512, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
