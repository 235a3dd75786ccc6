"""The factor of the learning rate at each step, by hand."""

import pytest

from seqzoo.errors import ConfigError
from seqzoo.train.schedule import Constant, Cosine, Infinite, Linear, WarmupStableDecay


def values(schedule, *steps, of=100):
    return [pytest.approx(schedule(step, of), abs=1e-9) for step in steps]


def test_constant_after_a_warm_up():
    assert values(Constant(), 0, 99) == [1, 1]
    assert values(Constant(warmup_steps=4), 0, 1, 3, 4, 99) == [0.25, 0.5, 1, 1, 1]
    assert values(Constant(warmup_steps=0.1), 0, 4, 9) == [0.1, 0.5, 1]


def test_cosine_and_linear_end_at_their_least():
    cosine, linear = Cosine(min_ratio=0.1), Linear(min_ratio=0.1)
    assert values(cosine, 0, 50, 100) == [1, 0.55, 0.1]
    assert values(linear, 0, 50, 100) == [1, 0.55, 0.1]
    assert values(Cosine(warmup_steps=20), 20, 60, 100) == [1, 0.5, 0]
    assert values(cosine, 500) == [0.1]  # a branch may go past the end


def test_warm_up_stable_decay():
    schedule = WarmupStableDecay(warmup_steps=10, decay_steps=0.2, min_ratio=0.5)
    assert values(schedule, 0, 9, 50, 80, 90, 100) == [0.1, 1, 1, 1, 0.75, 0.5]


def test_infinite_is_constant_between_cooldown_and_decay():
    schedule = Infinite(
        warmup_steps=0, cooldown_steps=20, constant_ratio=0.4, decay_steps=10, min_ratio=0.1
    )
    assert values(schedule, 0, 10, 20, 90, 95, 100) == [1, 0.7, 0.4, 0.4, 0.2, 0.1]
    same = Infinite(warmup_steps=0, cooldown_steps=20, constant_ratio=0.4, decay_steps=10)
    assert same(50, 100) == same(50, 10_000)  # the trunk does not know how long it will be


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cosine(warmup_steps=-1), "schedule.warmup_steps=-1; it must be a number of steps"),
        (lambda: Linear(warmup_steps=10.5), "schedule.warmup_steps=10.5"),
        (lambda: Cosine(min_ratio=2.0), r"schedule.min_ratio=2.0; it must lie in \[0, 1\]"),
        (lambda: Infinite(min_ratio=0.9, constant_ratio=0.5), "not above schedule.constant_ratio"),
    ],
)
def test_values_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
