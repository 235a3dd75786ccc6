"""The calls that dilated_conv is tested and measured with."""

import numpy as np

from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.dilated_conv.ring import places


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values; weights so that a level keeps the size of what it reads."""
    return rng.normal(size=shape) * (shape[1] ** -0.5 if name == "weight" else 1.0)


def settled(taps: int, dilations: tuple[int, ...]):
    """Makes of random floats a state that a stream can be in: slots not reached hold 0."""

    def settle(state, rng: np.random.Generator):
        count = rng.integers(0, 2 * (taps - 1) * max(dilations) + 2, state.count.shape)
        x = np.array(state.x)
        for at in places(taps, dilations):
            empty = np.arange(at.stop - at.start) >= count[:, None]
            x[:, at][empty] = 0
        return state._replace(x=x, count=count.astype(np.int32))

    return settle


def spec(name: str, *, dilations: tuple[int, ...], w: int, given=("bias",), tags=None, **more):
    """A call with a stack of these dilations."""
    sizes = dict(b=4, e=3, j=len(dilations), w=w) | more.pop("sizes", {})
    return ArgSpec(
        name=name,
        sizes=sizes,
        draw=draw,
        given=given,
        options=dict(dilations=dilations, **more),
        tags=frozenset(tags or {"test"}),
        settle=None if more.get("symmetric") else settled(w, dilations),
    )


SPECS = (
    spec("whole", dilations=(1, 4), w=3),
    spec("three_levels", dilations=(1, 3, 9), w=3),
    spec("linear", dilations=(1, 4), w=4, given=(), activation="linear"),
    spec("one_level", dilations=(5,), w=2, sizes=dict(e=1)),
    spec("one_tap", dilations=(1, 7), w=1),
    spec("symmetric", dilations=(1, 3), w=5, symmetric=True),
    spec("symmetric_linear", dilations=(2, 1), w=3, symmetric=True, activation="linear"),
    # TCNCA on enwik8: rows of four chunks, and the longest that the abstract times.
    spec(
        "tcnca_enwik8",
        dilations=(1, 16, 256),
        w=16,
        sizes=dict(b=2, t=8192, e=512),
        tags={"tpu", "gpu", "primary"},
    ),
    spec(
        "tcnca_131k",
        dilations=(1, 16, 256),
        w=16,
        sizes=dict(b=1, t=131_072, e=128),
        tags={"tpu", "gpu"},
    ),
    # A symmetric stack of LRA's text: 17 taps.
    spec(
        "tcnca_text",
        dilations=(1, 17, 289),
        w=17,
        sizes=dict(b=2, t=4096, e=128),
        tags={"tpu", "gpu"},
        symmetric=True,
    ),
    spec("issue", dilations=(1, 16, 256), w=16, sizes=dict(b=1, t=16_384, e=128), tags={"bench"}),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
