"""How the TPU kernels of neural_memory are cut, by sizes alone, and what they take on the chip."""

from collections.abc import Mapping

from pallas_kernels.core.tpu import LANES, MIB, SUBLANES, generation, round_up

ROWS = 16  # of a bfloat16 register: blocks are multiples
_SHARE = 0.75  # of a limit, what a kernel may need
_MOST = 0.8  # of all vector memory, what a limit may be
_MOST_BLOCKS = 16  # per state that is kept, with documents: three sets of weights make a state


def heads_per_step(h: int, k: int, v: int) -> tuple[int, int]:
    """Heads per step of the grid, so that their columns fill registers or are all there are; and
    heads in all, some of them empty where the first does not divide h."""
    heads = 1
    while (heads * k) % LANES or (heads * v) % LANES:
        heads *= 2
    return (h, h) if heads >= h else (heads, round_up(h, heads))


def sizes_of(
    *, h: int, k: int, v: int, n: int, chunk: int, itemsize: int, layers: int, aligned: bool
) -> dict[str, int]:
    """What the choices below go by."""
    heads, _ = heads_per_step(h, k, v)
    block = round_up(chunk, ROWS)
    return dict(
        k=k, v=v, n=n, heads=heads, block=block, itemsize=itemsize, layers=layers, aligned=aligned
    )


def _tiles(rows: int, columns: int) -> int:
    """Bytes of a float32 matrix in registers."""
    return 4 * round_up(rows, SUBLANES) * round_up(columns, LANES)


def _weights(sizes: Mapping[str, int]) -> int:
    """Bytes of one set of weights of a step's heads."""
    w_in = _tiles(sizes["k"], sizes["n"]) if sizes["layers"] == 2 else 0
    return sizes["heads"] * (_tiles(sizes["v"], sizes["n"]) + w_in + _tiles(1, sizes["v"]))


def need_forward(sizes: Mapping[str, int]) -> int:
    """Bytes on chip of the blocks and scratch of the forward kernel."""
    # What a row begins with, what it ends with and what is kept (two copies of these).
    found = (1 + 2) * _state(sizes) + 2 * 3 * _weights(sizes)
    if not sizes["aligned"]:
        found += 2 * _weights(sizes)
    return found + 2 * 4 * _tokens(sizes) + _between(sizes, 40)


def need_backward(sizes: Mapping[str, int], span: int) -> int:
    """Bytes on chip of the blocks and scratch of the backward kernel."""
    weights, state = _weights(sizes), _state(sizes)
    # What each block begins with, what was kept (two copies), what the row begins with, gradients.
    found = (span + 2 + 1 + 2) * state + 3 * weights
    if not sizes["aligned"]:
        found += (2 + 4) * weights + state  # openings, their gradients, the part that is at work
    tokens = 2 * (5 + 2 * span) * _tokens(sizes)  # two copies; keys and values of all of the span
    gates = 4 * sizes["heads"] * span * _tiles(3, sizes["block"])
    return found + tokens + gates + _between(sizes, 84)


def _state(sizes: Mapping[str, int]) -> int:
    return (2 if sizes["aligned"] else 3) * _weights(sizes)


def _tokens(sizes: Mapping[str, int]) -> int:
    """Bytes of a block of q, k or v."""
    width = round_up(sizes["heads"] * max(sizes["k"], sizes["v"]), LANES)
    return sizes["block"] * width * sizes["itemsize"]


def _between(sizes: Mapping[str, int], count: int) -> int:
    """Bytes of so many matrices, tokens by inner width, that lie between the stages of a body."""
    return count * _tiles(sizes["block"], max(sizes["n"], sizes["k"], sizes["v"]))


def most_room(device_kind: str | None) -> int:
    """Bytes that a kernel may need."""
    return int(_SHARE * _MOST * generation(device_kind).vmem)


def limit_for(need: int, device_kind: str | None) -> int | None:
    """The limit that a kernel asks for; None = the generation's own will do."""
    if need <= _SHARE * generation(device_kind).scoped_vmem:
        return None
    return min(round_up(int(need / _SHARE), MIB), int(_MOST * generation(device_kind).vmem))


def span_for(sizes: Mapping[str, int], device_kind: str | None) -> int:
    """Blocks per state that is kept: so many that what is kept adds a sixth to what the forward
    pass moves, or as many as fit."""
    moved = 4 * sizes["block"] * max(sizes["k"], sizes["v"]) * sizes["itemsize"] * sizes["heads"]
    span = -(-2 * _weights(sizes) * 6 // moved)
    if not sizes["aligned"]:
        span = min(span, _MOST_BLOCKS)
    while span > 1 and need_backward(sizes, span) > most_room(device_kind):
        span -= 1
    return span
