"""dilated_conv against MEGA's moving average, at equal receptive field and equal tokens.

One run, all forms taking turns: the dilated stack of TCNCA (relu_res) with 16 and with 8 taps per
level, and the moving average of 16 components per channel as a long convolution by Fourier
transforms, the same by Monarch products, and as a recurrence over chunks. The average's kernel is
made from its parameters inside the call. Float32; gradients of x and of all parameters.

Two fields: 4,096 tokens at every length (the average's kernel is cut there, but its recurrence has
no end), and the whole row (as many levels as that takes).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dilated_conv, long_conv
from pallas_kernels.core import bench
from pallas_kernels.core.bench import Measured
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.long_conv.xla import XlaConfig
from seqzoo.nn.ema_scan import Rates, ema_scan, kernel

# Taps per level; the dilation grows by as much.
STACKS = {"stack, 16 taps": 16, "stack, 8 taps": 8}
AVERAGES = ("average, fft", "average, monarch", "average, scan")
COMPONENTS, FIELD = 16, 4096
TOKENS, WIDTH = 131_072, 128
LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)


def run(quick: bool = False, width: int = WIDTH) -> list[dict[str, object]]:
    """Rows: milliseconds of each form, and each stack against the fastest average.

    Args:
        quick: fewer and shorter.
        width: channels.
    """
    machine = bench.this_machine(rounds=3 if quick else 9)
    tokens, lengths = (8192, (1024, 8192)) if quick else (TOKENS, LENGTHS)
    rows = []
    for length in lengths:
        shape = (tokens // length, length, width)
        # A row that is no longer than the field is the other field.
        for field in (FIELD, length) if length > FIELD else (length,):
            for gradients in (False, True):
                found = bench.take_turns(
                    programs(field, gradients),
                    draw(*shape, field),
                    rounds=3 if quick else 9,
                    pause=0.0 if quick else 0.1,
                )
                rows += table(found, shape, field, gradients, machine)
    return rows


def levels(field: int, taps: int) -> tuple[int, ...]:
    """Dilations 1, taps, taps^2, ... whose receptive field is that at least."""
    count = 1
    while taps**count < field:
        count += 1
    return tuple(taps**i for i in range(count))


def programs(field: int, gradients: bool) -> dict[str, Callable]:
    """Each form as a function of (dy, x, parameters of the stacks by name, of the average)."""

    def stack(name):
        dilations = levels(field, STACKS[name])
        return lambda x, stacks, average: dilated_conv(x, *stacks[name], dilations=dilations)[0]

    def convolution(form):
        def run(x, stacks, average):
            return long_conv(x, kernel(Rates(*average), field), config=XlaConfig(form=form))[0]

        return run

    def recurrence(x, stacks, average):
        return ema_scan(x, Rates(*average))[0]

    def forward(form):
        return lambda dy, x, stacks, average: form(x, stacks, average)

    def both(form):
        def run(dy, x, stacks, average):
            # Of parameters that the form does not use the gradient is 0 and costs nothing.
            y, pull = jax.vjp(form, x, stacks, average)
            return y, pull(dy)

        return run

    forms = (
        *map(stack, STACKS),
        convolution("fft"),
        convolution("monarch"),
        recurrence,
    )
    wrap = both if gradients else forward
    return dict(zip((*STACKS, *AVERAGES), map(wrap, forms), strict=True))


def draw(batch: int, length: int, width: int, field: int) -> tuple:
    """dy and x `[b t e]`, taps and biases, and the average's rates as MEGA starts."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, std=1.0: jnp.asarray(std * rng.normal(size=shape), jnp.float32)
    dy, x = (normal(batch, length, width) for _ in range(2))
    stacks = {}
    for name, taps in STACKS.items():
        count = len(levels(field, taps))
        stacks[name] = (normal(count, taps, width, std=taps**-0.5), normal(count, width))
    shape = (width, COMPONENTS)
    p, alpha = (jax.nn.sigmoid(normal(*shape, std=0.2)) for _ in range(2))
    into, out = p * (1 + normal(*shape, std=0.02)), normal(*shape) * COMPONENTS**-0.5
    return dy, x, stacks, (jnp.log1p(-p * alpha), into, out)


def table(
    found: dict[str, Measured],
    shape: tuple[int, int, int],
    field: int,
    gradients: bool,
    machine: Device,
) -> list[dict[str, object]]:
    """A row per form; stacks have their floor, and how much faster they are than the averages."""
    fastest = min(AVERAGES, key=lambda name: found[name].median)
    rows = []
    for name, measured in found.items():
        row: dict[str, object] = {
            "bench": "dilated_conv",
            "form": name,
            **dict(zip(("batch", "length", "width"), shape, strict=True)),
            "field": field,
            "levels": "",
            "what": "forward + gradients" if gradients else "forward",
            "ms": round(1e3 * measured.median, 2),
            "temporaries MB": round(measured.temp_bytes / 1e6, 1),
            "floor ms": "",
            "times faster": "",
            "than": "",
        }
        if name in STACKS:
            count = len(levels(field, STACKS[name]))
            costs = [
                dilated_conv.cost(*shape, j=count, w=STACKS[name], backward=backward)
                for backward in (False, True)[: 1 + gradients]
            ]
            floor = sum(
                roofline(cost, machine, dtype="float32", matrix_units=False) for cost in costs
            )
            times = bench.times_faster(found[fastest], measured)
            row |= {
                "levels": count,
                "floor ms": round(1e3 * floor, 1),
                "times faster": round(times, 2),
                "than": fastest,
            }
        rows.append(row)
    return rows
