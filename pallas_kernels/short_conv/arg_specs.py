"""The calls that short_conv is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values."""
    del name
    return rng.normal(size=shape)


SPECS = (
    ArgSpec(name="bare", sizes=dict(b=4, e=5, w=3), draw=draw),
    ArgSpec(
        name="whole",
        sizes=dict(b=4, e=7, w=4),
        draw=draw,
        given=("bias",),
        options=dict(activation="silu"),
    ),
    ArgSpec(name="one_tap", sizes=dict(b=4, e=1, w=1), draw=draw, given=("bias",)),
    ArgSpec(
        name="issue",
        sizes=dict(b=4, t=1024, e=256, w=4),
        draw=draw,
        given=("bias",),
        options=dict(activation="silu"),
        tags=frozenset({"bench"}),
    ),
    # What kernels are compiled at (core/kernel_check.py).
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, e=e, w=4),
            draw=draw,
            given=("bias",),
            options=dict(activation="silu"),
            tags=frozenset({"tpu", "gpu", *more}),
        )
        for name, t, e, more in (
            ("mamba_130m_2k", 2048, 1536, {"primary"}),
            ("mamba_130m_2k_f32", 2048, 1536, ()),
            ("mamba_2_8b_2k", 2048, 5120, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
