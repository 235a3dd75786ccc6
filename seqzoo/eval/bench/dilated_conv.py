"""dilated_conv against MEGA's moving average, at equal receptive field and equal tokens.

One run, all forms taking turns: the dilated stack of TCNCA (relu_res), and the moving average of 16
components per channel as a long convolution by Fourier transforms, the same by Monarch products,
and as a recurrence over chunks. The average's kernel is made from its parameters inside the call.
Float32; gradients of x and of all parameters.

Two fields: 4,096 tokens at every length (w 16, dilations 1, 16, 256; the average's kernel is cut
there, but its recurrence has no end), and the whole row (as many levels as that takes).
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dilated_conv, long_conv
from pallas_kernels.core import bench
from pallas_kernels.core.bench import Measured
from pallas_kernels.core.costs import roofline
from pallas_kernels.long_conv.xla import XlaConfig
from seqzoo.nn.ema_scan import Rates, ema_scan, kernel

TAPS, COMPONENTS, FIELD = 16, 16, 4096
TOKENS, WIDTH = 131_072, 128
LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)
AVERAGES = ("fft", "monarch", "scan")


def run(quick: bool = False, width: int = WIDTH) -> list[dict[str, object]]:
    """Rows: milliseconds of each form, and the stack against the fastest average.

    Args:
        quick: fewer and shorter.
        width: channels.
    """
    machine = bench.this_machine(rounds=3 if quick else 9)
    tokens, lengths = (8192, (1024, 8192)) if quick else (TOKENS, LENGTHS)
    rows = []
    for length, field in itertools.product(lengths, (FIELD, None)):
        if field is not None and field >= length:
            continue  # the row itself is no longer: that is the other field
        dilations = levels(length if field is None else field)
        for gradients in (False, True):
            rows += measure(
                tokens // length, length, width, dilations, field, gradients, machine, quick
            )
    return rows


def levels(field: int) -> tuple[int, ...]:
    """Dilations 1, 16, 256, ... whose receptive field is that at least."""
    count = 1
    while TAPS**count < field:
        count += 1
    return tuple(TAPS**i for i in range(count))


def measure(
    batch, length, width, dilations, field, gradients, machine, quick
) -> list[dict[str, object]]:
    """All forms of one shape, in turns."""
    found = bench.take_turns(
        programs(dilations, field, gradients),
        draw(batch, length, width, len(dilations)),
        rounds=3 if quick else 9,
        pause=0.0 if quick else 0.1,
    )
    sizes = dict(b=batch, t=length, e=width, j=len(dilations), w=TAPS)
    costs = (dilated_conv.cost(**sizes, backward=b) for b in (False, True)[: 1 + gradients])
    floor = sum(roofline(cost, machine, dtype="float32", matrix_units=False) for cost in costs)
    fastest = min(AVERAGES, key=lambda name: found[name].median)
    times = bench.times_faster(found[fastest], found["dilated_conv"])
    return [
        row(name, measured, sizes, field, gradients)
        | (
            {"floor ms": round(1e3 * floor, 1), "times faster": round(times, 2), "than": fastest}
            if name == "dilated_conv"
            else {}
        )
        for name, measured in found.items()
    ]


def programs(dilations, field: int | None, gradients: bool) -> dict[str, Callable]:
    """Each form as a function of (dy, x, its own and the others' parameters)."""

    def stack(x, taps, average):
        return dilated_conv(x, *taps, dilations=dilations)[0]

    def convolution(form):
        def run(x, taps, average):
            length = x.shape[1] if field is None else min(field, x.shape[1])
            k = kernel(Rates(*average), length)
            return long_conv(x, k, config=XlaConfig(form=form))[0]

        return run

    def recurrence(x, taps, average):
        return ema_scan(x, Rates(*average))[0]

    def forward(form):
        return lambda dy, x, taps, average: form(x, taps, average)

    def both(form):
        def run(dy, x, taps, average):
            # of what the form does not use the gradient is 0 and costs nothing
            y, pull = jax.vjp(form, x, taps, average)
            return y, pull(dy)

        return run

    forms = {
        "dilated_conv": stack,
        "fft": convolution("fft"),
        "monarch": convolution("monarch"),
        "scan": recurrence,
    }
    return {name: (both if gradients else forward)(form) for name, form in forms.items()}


def draw(batch: int, length: int, width: int, n_levels: int) -> tuple:
    """dy and x `[b t e]`, taps and bias, and the average's rates as MEGA starts."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, std=1.0: jnp.asarray(std * rng.normal(size=shape), jnp.float32)
    dy, x = (normal(batch, length, width) for _ in range(2))
    taps = (normal(n_levels, TAPS, width, std=TAPS**-0.5), normal(n_levels, width))
    shape = (width, COMPONENTS)
    p, alpha = (jax.nn.sigmoid(normal(*shape, std=0.2)) for _ in range(2))
    into, out = p * (1 + normal(*shape, std=0.02)), normal(*shape) * COMPONENTS**-0.5
    return dy, x, taps, (jnp.log1p(-p * alpha), into, out)


def row(name: str, measured: Measured, sizes, field, gradients: bool) -> dict[str, object]:
    return {
        "bench": "dilated_conv",
        "form": name if name == "dilated_conv" else f"average, {name}",
        "length": sizes["t"],
        "batch": sizes["b"],
        "width": sizes["e"],
        "field": sizes["t"] if field is None else field,
        "levels": sizes["j"] if name == "dilated_conv" else "",
        "what": "forward + gradients" if gradients else "forward",
        "ms": round(1e3 * measured.median, 2),
        "temporaries MB": round(measured.temp_bytes / 1e6, 1),
        "floor ms": "",
        "times faster": "",
        "than": "",
    }
