"""What the law checks measure with."""

import numpy as np
import pytest


def _chi_square(counts, expected):
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="session")
def chi_square():
    """How many standard deviations the chi-square statistic lies above what is expected of it."""
    return _chi_square
