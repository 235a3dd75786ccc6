"""How far an array may be off, and comparing by it."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.core.testing.cases import Arrays, is_float


class Tolerance(NamedTuple):
    """How far an array may be off.

    Attributes:
        rms: root mean square of the difference, by that of the oracle.
        largest: largest difference, by the oracle's largest entry.
        gradients: by which factor gradients may be further off than outputs and states.
    """

    rms: float
    largest: float
    gradients: float = 1.0


# By the dtype of the activations. Loosening one needs a reason in the commit.
# bfloat16 keeps 8 bits: the rounding of an output alone is 2^-9 = 2e-3.
TOLERANCES = {
    "float64": Tolerance(rms=1e-13, largest=1e-12),
    "float32": Tolerance(rms=2e-6, largest=5e-6),
    "bfloat16": Tolerance(rms=3e-3, largest=6e-3),
    # Kernels add in the order of their tiles and take the accelerator's exponentials. In bfloat16
    # their products take bfloat16 operands, so that what stands between two products is rounded.
    "kernel float32": Tolerance(rms=1e-5, largest=5e-5, gradients=5.0),
    "kernel bfloat16": Tolerance(rms=1e-2, largest=5e-2),
}


def tolerance_of(dtype: str, implementation: str | None = None) -> Tolerance:
    """What a form is allowed: kernels ("pallas_...") have rows of their own."""
    kernel = implementation is not None and implementation.startswith("pallas_")
    return TOLERANCES[f"kernel {dtype}" if kernel else dtype]


def assert_close(
    got: Arrays,
    expected: Arrays,
    dtype: str,
    *,
    factor: float = 1.0,
    implementation: str | None = None,
) -> None:
    """Compares every array by TOLERANCES; the message names all that are off.

    Args:
        got: what was computed.
        expected: the oracle.
        dtype: of the tolerance.
        factor: by which this comparison may be looser.
        implementation: what computed it, as operators take it.
    """
    assert got.keys() == expected.keys(), (sorted(got), sorted(expected))
    tolerance = tolerance_of(dtype, implementation)
    wrong = []
    for name, want in expected.items():
        have = np.asarray(got[name])
        assert have.shape == want.shape, f"{name}: shape {have.shape}, expected {want.shape}"
        if not is_float(want):
            if not np.array_equal(have, want):
                wrong.append(f"{name}: {have} is not {want}")
            continue
        have, want = have.astype(np.float64), want.astype(np.float64)
        if have.size == 0:
            continue
        off = np.abs(have - want)
        scale = max(float(np.max(np.abs(want))), 1e-5)
        rms = np.sqrt(np.mean(off**2)) / max(float(np.sqrt(np.mean(want**2))), 1e-5)
        largest = off.max() / scale
        looser = factor * (tolerance.gradients if name.startswith("grad") else 1)
        if not (rms <= looser * tolerance.rms and largest <= looser * tolerance.largest):
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(off)), off.shape))
            wrong.append(
                f"{name}: rms {rms:.1e} (allowed {looser * tolerance.rms:.1e}), largest "
                f"{largest:.1e} (allowed {looser * tolerance.largest:.1e}) at {at}: "
                f"{have[at]:.6g} is not {want[at]:.6g}"
            )
    assert not wrong, "\n".join(wrong)


def assert_equal(got: Arrays, expected: Arrays) -> None:
    """Compares every array bit by bit."""
    assert got.keys() == expected.keys()
    wrong = [k for k in got if got[k].tobytes() != expected[k].tobytes()]
    assert not wrong, f"these are not bitwise equal: {wrong}"
