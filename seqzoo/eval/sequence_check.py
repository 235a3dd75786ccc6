"""`python -m seqzoo.eval.sequence_check`: what layers exchange where rows are cut over devices.

Each mixer alone, its row cut over the sixteen compile-only devices of a v5e 4x4 slice, forward and
with gradients. Read from the compiled text: collectives by kind, and the bytes that a device gets
by them. Twice as many tokens must not change either where states pass: only a mixer that exchanges
activations (keys in a ring, channels for tokens) gets more. Nothing is run.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from pallas_kernels.core import aot

TOPOLOGY, DEVICES = "v5e:4x4", 16
WIDTH, TOKENS = 256, 4096  # of a row; 256 on each device

# Mixers by the name of their class, with the keywords that are not the usual ones.
MIXERS: dict[str, dict[str, Any]] = {
    "Mamba": {},
    "Mamba2": {},
    "Retention": {},
    "GLA": {},
    "GatedDeltaNet": {},
    "Based": {},
    "BaseConv": {},
    "Mega": {},
    "SlidingWindowAttention": {},
    "TCNCA": {"dilation_growth": 4, "kernel_size": 8},
    "TitansLMM": {},
    "Attention": {"n_heads": 4},
    "MonarchMixer": {"max_length": 2 * TOKENS},
    "S4D": {},
}
_LINE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b(pred|c64|[fsu]\d+|bf16)\[([0-9,]*)\]")


class Exchanged(NamedTuple):
    """What one program exchanges, per device; a loop's body counts once.

    Attributes:
        counts: collectives by kind.
        bytes: of their results, sums of gradients of parameters left out.
    """

    counts: dict[str, int]
    bytes: int


def exchanged(text: str) -> Exchanged:
    """Reads a compiled program. All-reduces are counted; their bytes are those of parameters."""
    counts: dict[str, int] = {}
    moved = 0
    for line in text.splitlines():
        found = _LINE.search(line)
        if found is None:
            continue
        shapes, kind, start = found.groups()
        counts[kind] = counts.get(kind, 0) + 1
        if kind != "all-reduce":
            sizes = [_bytes(*one) for one in _SHAPE.findall(shapes) if one[1]]
            # A start gives its operands and its results.
            moved += sum(sizes) // (2 if start else 1)
    return Exchanged(counts, moved)


def _bytes(kind: str, dimensions: str) -> int:
    bits = 8 if kind == "pred" else 64 if kind == "c64" else int(kind.lstrip("bfsu"))
    return bits // 8 * math.prod(int(size) for size in dimensions.split(","))


def compile_layer(name: str, tokens: int, *, gradients: bool) -> Exchanged:
    """One layer of width WIDTH over a row of so many tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from seqzoo import mixers
    from seqzoo.nn.sharding import MESH_AXES, param_shardings, use_mesh

    devices = np.reshape(aot.tpu_devices(TOPOLOGY), (1, 1, 1, DEVICES))
    mesh = Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    make = lambda: getattr(mixers, name)(WIDTH, **MIXERS[name], rngs=nnx.Rngs(0))
    graphdef, variables, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    at = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    params = jax.tree.map(at, nnx.as_pure(variables), nnx.as_pure(param_shardings(variables, mesh)))
    rows = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    x = jax.ShapeDtypeStruct((1, tokens, WIDTH), jnp.float32, sharding=rows)

    def forward(params, x):
        return nnx.merge(graphdef, params, rest)(x)[0]

    def backward(params, x):
        return jax.grad(lambda *a: jnp.sum(forward(*a) ** 2), argnums=(0, 1))(params, x)

    with use_mesh(mesh):
        lower = jax.jit(backward if gradients else forward).lower
        return exchanged(aot.compile_lowered(lambda: lower(params, x)).text)


def main(arguments: list[str] | None = None) -> int:
    """Each mixer in a process of its own; prints a table, gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.eval.sequence_check",
        description=f"What layers exchange over {DEVICES} devices of a {TOPOLOGY} slice.",
    )
    parser.add_argument("names", nargs="*", metavar="MIXER", help="classes of seqzoo.mixers (all)")
    parser.add_argument("--worker", metavar="MIXER", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return _work(args.worker)
    print(f"activations of a device: {4 * WIDTH * TOKENS // DEVICES:,} bytes\n")
    print("| mixer | forward | bytes | with gradients | bytes | twice the tokens |")
    print("|---|---|---:|---|---:|---|")
    return max(_run(name) for name in args.names or MIXERS)


def _run(name: str) -> int:
    command = [sys.executable, "-m", "seqzoo.eval.sequence_check", "--worker", name]
    with tempfile.TemporaryFile("w+") as noise:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=noise, text=True)
        noise.seek(0)
        if done.returncode:
            print(f"| {name} | {' '.join(noise.read().split())[-300:]} | | | | |")
            return 1
    forward, longer, both = (Exchanged(*one) for one in json.loads(done.stdout.splitlines()[-1]))
    told = lambda one: ", ".join(f"{kind} x {n}" for kind, n in sorted(one.counts.items()))
    same = "the same" if forward == longer else f"{longer.bytes / max(forward.bytes, 1):.1f} times"
    cells = (name, told(forward), f"{forward.bytes:,}", told(both), f"{both.bytes:,}", same)
    print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def _work(name: str) -> int:
    aot.prepare()
    found = [
        compile_layer(name, TOKENS, gradients=False),
        compile_layer(name, 2 * TOKENS, gradients=False),
        compile_layer(name, TOKENS, gradients=True),
    ]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
