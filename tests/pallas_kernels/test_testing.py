"""The suite's own comparison: it finds what is off, by the table of tolerances."""

import contextlib

import numpy as np
import pytest

from pallas_kernels.core.testing import TOLERANCES, assert_close

ONES = np.ones(100, np.float32)


@pytest.mark.parametrize(
    "name, off, others, kernels",
    [
        ("y", 1e-6, True, True),
        ("y", 8e-6, False, True),
        ("y", 2e-5, False, False),
        ("grad.x", 8e-6, False, True),
        ("grad.x", 4e-5, False, True),
        ("grad.x", 8e-5, False, False),
    ],
)
def test_kernels_have_tolerances_of_their_own(name, off, others, kernels):
    for form in (None, "reference", "xla", "pallas_tpu", "pallas_gpu"):
        allowed = kernels if form in ("pallas_tpu", "pallas_gpu") else others
        with contextlib.nullcontext() if allowed else pytest.raises(AssertionError, match="rms"):
            assert_close({name: ONES * (1 + off)}, {name: ONES}, "float32", implementation=form)


def test_one_entry_far_off_is_found():
    off = ONES.copy()
    off[7] += 1e-4
    with pytest.raises(AssertionError, match=r"largest 1.0e-04 .* at \(7,\)"):
        assert_close({"y": off}, {"y": ONES}, "float32", implementation="pallas_tpu")


def test_nan_is_never_close():
    with pytest.raises(AssertionError):
        assert_close({"y": ONES * np.nan}, {"y": ONES}, "bfloat16", implementation="pallas_tpu")


def test_what_the_issue_asks_of_kernels():
    kernel = TOLERANCES["kernel float32"]
    assert (kernel.rms, kernel.rms * kernel.gradients) == (1e-5, pytest.approx(5e-5))
    assert TOLERANCES["kernel bfloat16"].rms == 1e-2
