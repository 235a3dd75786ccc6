"""The calls that gla is tested and measured with."""

from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.simple_gla.arg_specs import draw, draw_extreme

SPECS = (
    ArgSpec(name="narrow", sizes=dict(b=4, h=2, k=5, v=3), draw=draw),
    ArgSpec(name="scaled", sizes=dict(b=4, h=1, k=4, v=6), draw=draw, options=dict(scale=0.7)),
    ArgSpec(
        name="extreme",
        sizes=dict(b=4, h=2, k=3, v=4),
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
            ("mqar", 64, 64, 2, 16, 32),
            ("gla_340m", 1, 2048, 4, 128, 256),
        )
    ),
    # What TPU and GPU kernels are compiled at (core/kernel_check.py).
    *(
        ArgSpec(
            name=name,
            sizes=dict(b=1, t=t, h=h, k=k, v=v),
            draw=draw,
            tags=frozenset({"tpu", *more}),
        )
        for name, t, h, k, v, more in (
            ("gla_340m_2k", 2048, 4, 128, 256, {"primary"}),
            ("gla_340m_8k_f32", 8192, 4, 128, 256, ()),
            ("gla_1b_2k", 2048, 4, 256, 512, ()),
        )
    ),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
