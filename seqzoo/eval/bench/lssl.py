"""LSSL: memory of the kernel's construction, its time, and the ways to convolve with it.

Float32, full-precision products. What is planned for temporaries is the compiler's own figure;
"all powers" is the tensor Abar^i Bbar that the construction avoids.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.core import bench
from seqzoo.mixers import LSSL
from seqzoo.nn import hippo, krylov

GIB = 2**30


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, and the figure to reach."""
    rounds = 3 if quick else 9
    rows = [memory(256, 256, 1, 4096 if quick else 16_384, g) for g in (False, True)]
    rows += construction(64, 64, 1024, rounds)
    if not quick:
        rows += construction(128, 128, 784, rounds)
    lengths = (1024,) if quick else (1024, 2048, 4096)
    for t in lengths:
        rows += ways(64, 64, 8, t, rounds)
    return rows + steps(64, 64, 8, rounds)


def kernels(log_dt, A, B, C, *, length: int):
    """Kernels of all features, some at a time, `[e m length]`."""
    make = lambda dt, C: krylov.kernel(krylov.bilinear(A, B, dt), C, length)[0]
    return krylov.in_blocks(make, (jnp.exp(log_dt), C), A.shape[0])


def arguments(e: int, n: int, m: int) -> tuple[jax.Array, ...]:
    """log_dt, A, B and C as a layer has them at the start."""
    A, B = (jnp.asarray(x, jnp.float32) for x in hippo.legs(n))
    log_dt = jnp.linspace(jnp.log(1e-3), jnp.log(1e-1), e)
    return log_dt, A, B, jax.random.normal(jax.random.key(0), (e, m, n))


def memory(e: int, n: int, m: int, length: int, gradients: bool) -> dict[str, object]:
    """Temporaries from the compiler; nothing is run."""
    make = functools.partial(kernels, length=length)
    program = lambda dk, *arrays: make(*arrays)
    if gradients:
        program = bench.forward_and_gradients(make, has_state=False)
    shapes = jax.eval_shape(lambda: arguments(e, n, m))
    cotangent = jax.eval_shape(make, *shapes)
    _, found = bench.compile_(program, cotangent, *shapes)
    what = "forward + gradients" if gradients else "forward"
    case = f"{title(e, n, length)}, {what}, temporaries (all powers {4 * e * n * length / GIB:.1f})"
    return row(case, "GiB", found.temp_bytes / GIB, reach="< 1")


def construction(e: int, n: int, length: int, rounds: int) -> list[dict[str, object]]:
    """The kernel with all gradients, against all powers by doubling, as in the source."""

    def doubling(log_dt, A, B, C):
        step = krylov.bilinear(A, B, jnp.exp(log_dt))
        powers = krylov.squares(step.A, (length - 1).bit_length())
        x = krylov._columns(powers, step.B[..., None], 2 ** len(powers))[..., :length, 0]
        return krylov.einsum("emn,enl->eml", C, x)

    forms = {"steps": functools.partial(kernels, length=length), "doubling": doubling}
    programs = {k: bench.forward_and_gradients(f, has_state=False) for k, f in forms.items()}
    given = arguments(e, n, 1)
    found = bench.take_turns(programs, (jnp.ones((e, 1, length)), *given), rounds=rounds)
    case = f"{title(e, n, length)}, forward + gradients"
    faster = bench.times_faster(found["doubling"], found["steps"])
    return [
        row(f"{case}, baby and giant steps", "ms", 1e3 * found["steps"].median),
        row(f"{case}, all powers", "ms", 1e3 * found["doubling"].median),
        row(f"{case}, against it", "x faster", faster),
    ]


def ways(d: int, n: int, batch: int, t: int, rounds: int) -> list[dict[str, object]]:
    """A whole layer with all gradients, by both ways to convolve; rows with padding."""
    x = jax.random.normal(jax.random.key(0), (batch, t, d))
    ids = (jnp.arange(t) < t - t // 8).astype(jnp.int32)[None].repeat(batch, 0)

    layers = {c: LSSL(d, d_state=n, conv=c, rngs=nnx.Rngs(0)) for c in ("long", "chunk")}

    def program(conv):
        graphdef = nnx.graphdef(layers[conv])

        def loss(variables, x, ids):
            return jnp.sum(nnx.merge(graphdef, variables)(x, segment_ids=ids)[0] ** 2)

        return jax.grad(loss, (0, 1))

    # The parameters are arguments: of constants the compiler could make the kernel beforehand.
    arguments = (nnx.state(layers["long"]), x, ids)
    found = bench.take_turns({c: program(c) for c in layers}, arguments, rounds=rounds)
    case = f"layer B{batch} L{t:,} d{d} n{n}, forward + gradients"
    rows = [row(f"{case}, conv={name}", "ms", 1e3 * one.median) for name, one in found.items()]
    faster = bench.times_faster(found["long"], found["chunk"])
    return [*rows, row(f"{case}, chunk against long", "x faster", faster)]


def steps(d: int, n: int, batch: int, rounds: int) -> list[dict[str, object]]:
    """64 steps of a stream, discretised at each of them or once."""
    mixer = LSSL(d, d_state=n, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, batch, d))

    def program(mixer):
        graphdef, variables = nnx.split(mixer)

        def decode(variables, x):
            # The parameters of a step in a model come out of a loop's carry: nothing is hoisted.
            def one(carry, x_t):
                variables, state = carry
                y, state = nnx.merge(graphdef, variables).step(x_t, state)
                return (variables, state), y

            return jax.lax.scan(one, (variables, mixer.init_state(batch)), x)[1]

        return lambda x: decode(variables, x)

    forms = {"each": program(mixer), "once": program(mixer.prepared())}
    found = bench.take_turns(forms, (x,), rounds=rounds)
    case = f"step B{batch} d{d} n{n}"
    rows = [row(f"{case}, discretised {k}", "ms", 1e3 * v.median / 64) for k, v in found.items()]
    faster = bench.times_faster(found["each"], found["once"])
    return [*rows, row(f"{case}, once against each", "x faster", faster)]


def title(e: int, n: int, length: int) -> str:
    return f"kernel H{e} N{n} L{length:,}"


def row(case: str, unit: str, measured: float, *, reach: str = "") -> dict[str, object]:
    return {
        "bench": "lssl",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "to reach": reach,
    }
