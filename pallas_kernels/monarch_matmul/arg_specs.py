"""The calls that monarch_matmul is tested and measured with."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.core.testing import ArgSpec


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values; factors so that products keep their size, and of numbers that bfloat16 holds.

    A call rounds factors to the dtype of x, as linear layers do: four roundings one after the other
    (two factors, what is between, y) are more than the suite allows for.
    """
    values = rng.normal(size=shape)
    if name == "x":
        return values
    return np.asarray(shape[-1] ** -0.5 * values).astype(jnp.bfloat16).astype(np.float64)


def _spec(name: str, b: int, k: int, q: int, p: int, second=(), tags=None, **more) -> ArgSpec:
    sizes = dict(b=b, n=k * p, k=k, q=q, p=p) | dict(zip("lsr", second, strict=False)) | more
    tags = frozenset(tags or {"bench" if "t" in more else "test"})
    return ArgSpec(name=name, sizes=sizes, draw=draw, given=("w2",) if second else (), tags=tags)


SPECS = (
    _spec("square_16", 4, 4, 4, 4, (4, 4, 4)),
    _spec("square_36", 4, 6, 6, 6, (6, 6, 6)),
    _spec("square_64", 4, 8, 8, 8, (8, 8, 8)),
    _spec("rectangular", 4, 3, 4, 4, (2, 10, 6)),
    _spec("blocks", 4, 4, 12, 6),
    _spec("m2_bert_up", 8, 4, 1536, 192, t=128),
    _spec("square_1024", 8, 32, 32, 32, (32, 32, 32), t=128),
    # The matrices of M2-BERT-80M's MLP, block-diagonal (as published) and of order 2.
    _spec("m2_bert_80m_up", 2, 4, 1536, 192, tags={"tpu", "gpu"}, t=8192),
    _spec("m2_bert_80m_down", 2, 4, 192, 768, tags={"tpu", "gpu"}, t=8192),
    _spec(
        "m2_bert_80m_monarch_up", 2, 4, 192, 192, (4, 1536, 192), {"tpu", "gpu", "primary"}, t=8192
    ),
    _spec("m2_bert_80m_monarch_down", 2, 4, 192, 768, (4, 192, 192), {"tpu", "gpu"}, t=8192),
)


def named(name: str) -> ArgSpec:
    """The one of this name."""
    return next(spec for spec in SPECS if spec.name == name)
