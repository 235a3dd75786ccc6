"""The calls that taylor_attention is tested and measured with."""

from typing import Any

import numpy as np

from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.taylor_attention.features import WIDEST, feature_count


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values: scores of about 1."""
    del name
    return rng.normal(size=shape)


def draw_extreme(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Queries and keys seven times as long: weights from 1/2 (its least) to thousands."""
    return rng.normal(size=shape) * (1 if name == "v" else 7)


def settle(state: Any, rng: np.random.Generator) -> Any:
    """z as 20 keys leave it: what no keys leave may add up to nothing to divide by."""
    shape = state.z.shape
    k = next(k for k in range(1, WIDEST + 1) if feature_count(k) == shape[-1])
    first, second = np.triu_indices(k, 1)
    x = rng.normal(size=(20, *shape[:-1], k))
    parts = (np.ones_like(x[..., :1]), x, x * x / np.sqrt(2), x[..., first] * x[..., second])
    z = np.concatenate(parts, axis=-1).sum(axis=0)
    return state._replace(z=z.astype(state.z.dtype))


SPECS = (
    ArgSpec(name="whole", sizes=dict(b=4, h=2, k=4, v=5), draw=draw, settle=settle),
    ArgSpec(
        name="undivided",
        sizes=dict(b=4, h=1, k=3, v=2),
        draw=draw,
        settle=settle,
        options=dict(scale=-0.7, normalize=False),
    ),
    ArgSpec(
        name="one_wide",
        sizes=dict(b=4, h=1, k=1, v=1),
        draw=draw,
        settle=settle,
        options=dict(eps=0.0),
    ),
    ArgSpec(
        name="extreme",
        sizes=dict(b=4, h=2, k=6, v=3),
        draw=draw_extreme,
        settle=settle,
        tags=frozenset({"extreme"}),
    ),
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=b, t=t, h=h, k=16, v=v),
            draw=draw,
            tags=frozenset({"bench"}),
        )
        for name, b, t, h, v in (
            ("issue", 1, 2048, 4, 64),
            ("mqar", 64, 64, 4, 16),
            ("based_360m", 1, 2048, 16, 64),
        )
    ),
    # What kernels are compiled at (core/kernel_check.py).
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, h=16, k=16, v=v),
            draw=draw,
            tags=frozenset({"tpu", *more}),
        )
        for name, t, v, more in (
            ("based_1b", 2048, 112, {"primary"}),
            ("based_1b_8k", 8192, 112, ()),
            ("based_1b_8k_f32", 8192, 112, ()),
            ("based_360m_2k", 2048, 64, ()),
            ("based_360m_8k", 8192, 64, ()),
            ("based_360m_8k_f32", 8192, 64, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
