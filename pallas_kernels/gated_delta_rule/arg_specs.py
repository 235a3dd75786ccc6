"""The calls that gated_delta_rule is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As in a layer: keys and queries of length 1, beta = sigmoid(normal), decays 0.9 to 0.99."""
    x = rng.normal(size=shape)
    if name in ("q", "k"):
        return _unit(x)
    if name == "g":
        return -np.log1p(np.exp(-x)) / 16
    return 1 / (1 + np.exp(-x)) if name == "beta" else x


def draw_repeated(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One key all along, overwritten at beta 0.99 with next to no decay (text that repeats)."""
    if name == "k":
        b, _, h, k = shape
        return np.broadcast_to(_unit(rng.normal(size=(b, 1, h, k))), shape)
    if name == "beta":
        return np.full(shape, 0.99)
    return draw(name, shape, rng) * (0.01 if name == "g" else 1)


def draw_extreme(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Decays from 1 - 1e-9 to exp(-4000), which is 0, side by side; like keys; any beta in 0..1."""
    if name == "g":
        rates = np.exp(rng.uniform(np.log(1e-9), np.log(4000), size=shape))
        return np.where(rng.uniform(size=shape) < 0.1, 0.0, -rates)
    if name == "beta":
        return rng.uniform(size=shape)
    if name == "k":
        return _unit(rng.normal(size=shape) + 1.5 * draw_repeated(name, shape, rng))
    return draw(name, shape, rng)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


SPECS = (
    ArgSpec(name="bare", sizes=dict(b=4, h=1, k=3, v=5), draw=draw),
    ArgSpec(name="whole", sizes=dict(b=4, h=2, k=6, v=4), draw=draw, options=dict(scale=0.7)),
    ArgSpec(
        name="repeated",
        sizes=dict(b=2, h=2, k=16, v=8),
        draw=draw_repeated,
        tags=frozenset({"extreme"}),
    ),
    ArgSpec(
        name="extreme",
        sizes=dict(b=4, h=2, k=5, v=4),
        draw=draw_extreme,
        tags=frozenset({"extreme"}),
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, k=k, v=v),
            draw=draw,
            tags=frozenset({"bench"}),
        )
        for name, b, t, h, k, v in (
            ("issue", 1, 2048, 4, 64, 64),
            ("mqar", 64, 64, 2, 32, 32),
            ("mom_340m", 1, 2048, 4, 256, 256),
        )
    ),
    # What TPU kernels are compiled at (core/kernel_check.py). MoM has the same heads at 340M and at
    # 1.3B; its 2,048 tokens take 6,464 slots of memories.
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, h=h, k=256, v=v),
            draw=draw,
            tags=frozenset({"tpu", *more}),
        )
        for name, t, h, v, more in (
            ("mom_1_3b", 2048, 4, 256, {"primary"}),
            ("mom_1_3b_slots", 6464, 4, 256, ()),
            ("mom_1_3b_8k", 8192, 4, 256, ()),
            ("mom_1_3b_8k_f32", 8192, 4, 256, ()),
            ("gated_deltanet_340m", 2048, 3, 512, ()),
            ("gated_deltanet_340m_8k", 8192, 3, 512, ()),
            ("gated_deltanet_1_3b", 2048, 6, 512, ()),
            ("gated_deltanet_1_3b_8k", 8192, 6, 512, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
