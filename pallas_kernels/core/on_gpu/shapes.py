"""flash-linear-attention's operators and published shapes; numpy only, both processes read it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# Batch, tokens, heads, width of a head, as its benchmarks publish them; those that the issue asks
# about first.
SHAPES = {
    "B4_T2048_H16_D128": (4, 2048, 16, 128),
    "B1_T8192_H96_D128": (1, 8192, 96, 128),
    "B8_T1024_H8_D64": (8, 1024, 8, 64),
    "B2_T16384_H16_D128": (2, 16384, 16, 128),
    "B4_T4096_H64_D128": (4, 4096, 64, 128),
    "B8_T2048_H32_D256": (8, 2048, 32, 256),
}
AGREES = 1.5e-2  # relative root mean square, bfloat16 on both sides
_FEATURES = 16  # BASED's keys, whatever the width of a head


def here(dry: bool) -> dict[str, tuple[int, int, int, int]]:
    """The shapes; in a dry run a tiny one."""
    return {"tiny": (1, 32, 1, 16)} if dry else SHAPES


class Peer(NamedTuple):
    """One of its operators.

    Attributes:
        module: where its functions are.
        functions: by name; each takes our arrays by our names.
        arrays: our arguments with their letters.
        options: of ours.
        theirs: options of its functions.
        narrow: whether keys have 16 channels.
    """

    module: str
    functions: tuple[str, ...]
    arrays: Mapping[str, str]
    options: Mapping[str, Any] = {}
    theirs: Mapping[str, Any] = {}
    narrow: bool = False

    def sizes(self, b: int, t: int, h: int, d: int) -> dict[str, int]:
        return dict(b=b, t=t, h=h, g=h, k=_FEATURES if self.narrow else d, v=d)


_QKV = dict(q="bthk", k="bthk", v="bthv")
PEERS = {
    "gated_delta_rule": Peer(
        "fla.ops.gated_delta_rule",
        ("chunk_gated_delta_rule",),
        {**_QKV, "g": "bth", "beta": "bth"},
    ),
    "gla": Peer("fla.ops.gla", ("chunk_gla",), {**_QKV, "g": "bthk"}),
    "simple_gla": Peer("fla.ops.simple_gla", ("chunk_simple_gla",), {**_QKV, "g": "bth"}),
    "taylor_attention": Peer(
        "fla.ops.based", ("parallel_based", "fused_chunk_based"), _QKV, narrow=True
    ),
}


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Numbers as in a trained layer: keys of length 1, decays mostly near 1, beta in (0, 1)."""
    x = rng.standard_normal(shape, np.float32)
    if name == "g":
        return -np.log1p(np.exp(-(x + 3)))
    if name == "beta":
        return 1 / (1 + np.exp(-x))
    if name in ("q", "k"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def agreed(peer: Peer, seed: int) -> dict[str, np.ndarray]:
    """The numbers that both sides compute on, rounded to bfloat16."""
    rng = np.random.default_rng(seed % 2**32)
    sizes = peer.sizes(2, 512, 4, 64)
    shapes = {k: tuple(sizes[x] for x in letters) for k, letters in peer.arrays.items()}
    return {k: rounded(draw(k, shape, rng)) for k, shape in shapes.items()}


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 with bfloat16's bits, to even; neither side's rounding comes in."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
