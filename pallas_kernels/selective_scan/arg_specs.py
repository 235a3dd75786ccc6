"""The calls that selective_scan is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec

ALL = ("D", "z", "delta_bias")


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Values as in a trained model: step sizes about 0.05 after softplus, rates 0.1 to 16."""
    if name == "A":
        return -np.exp(rng.uniform(np.log(0.1), np.log(16), size=shape))
    if name == "delta_bias":
        return rng.normal(size=shape) - 3
    return rng.normal(size=shape)


def draw_sizes(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As `draw`, delta being the step size itself: positive."""
    if name == "delta":
        return np.exp(rng.uniform(np.log(1e-3), np.log(0.5), size=shape))
    return draw(name, shape, rng)


def draw_extreme(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Decays from 1 - 1e-9 to exp(-4000), which is 0; both branches of softplus; large inputs."""
    if name == "A":
        return -np.exp(rng.uniform(np.log(1e-6), np.log(100), size=shape))
    if name == "delta":
        return rng.uniform(-30, 40, size=shape)
    return draw(name, shape, rng) * (30 if name == "u" else 1)


SPECS = (
    ArgSpec(name="bare", sizes=dict(b=4, e=5, n=3), draw=draw_sizes),
    ArgSpec(
        name="whole",
        sizes=dict(b=4, e=6, n=4),
        draw=draw,
        given=ALL,
        options=dict(delta_softplus=True),
    ),
    ArgSpec(
        name="extreme",
        sizes=dict(b=4, e=7, n=2),
        draw=draw_extreme,
        given=ALL,
        options=dict(delta_softplus=True),
        tags=frozenset({"extreme"}),
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, e=e, n=16),
            draw=draw,
            given=ALL,
            options=dict(delta_softplus=True),
            tags=frozenset({"bench"}),
        )
        for name, b, t, e in (
            ("issue", 4, 1024, 256),
            ("training_small", 8, 256, 384),
            ("mqar", 64, 64, 128),
            ("mamba_130m", 1, 2048, 1536),
        )
    ),
    # What kernels are compiled at (core/kernel_check.py); the last one fills a GPU by itself.
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, e=e, n=16),
            draw=draw,
            given=ALL,
            options=dict(delta_softplus=True),
            tags=frozenset(tags),
        )
        for name, b, t, e, tags in (
            ("mamba_130m_2k", 1, 2048, 1536, {"tpu", "gpu", "primary"}),
            ("mamba_130m_2k_f32", 1, 2048, 1536, {"tpu", "gpu"}),
            ("mamba_130m_8k", 1, 8192, 1536, {"tpu", "gpu"}),
            ("mamba_2_8b_2k", 1, 2048, 5120, {"tpu", "gpu"}),
            ("mamba_2_8b_2k_f32", 1, 2048, 5120, {"tpu", "gpu"}),
            ("mamba_b8_2k", 8, 2048, 2048, {"gpu", "primary"}),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
