"""The factor of the learning rate at each step, by hand."""

import pytest

from seqzoo.errors import ConfigError
from seqzoo.train.schedule import (
    Constant,
    Cosine,
    Infinite,
    Linear,
    WarmupStableDecay,
    check_lengths,
)


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
    ("schedule", "said"),
    [
        (
            WarmupStableDecay(warmup_steps=0.01, decay_steps=5000),
            r"schedule.warmup_steps=0.01 \+ schedule.decay_steps=5000 take 5010 steps, more than "
            "trainer.steps=1000",
        ),
        (Cosine(warmup_steps=2000), "schedule.warmup_steps=2000 takes 2000 steps"),
        (Infinite(warmup_steps=0.5, cooldown_steps=0.5), "take 1100 steps"),
    ],
)
def test_a_schedule_longer_than_the_run(schedule, said):
    with pytest.raises(ConfigError, match=said):
        check_lengths(schedule, 1000)


def test_a_schedule_as_long_as_the_run():
    check_lengths(WarmupStableDecay(warmup_steps=0.5, decay_steps=0.5), 3)
    check_lengths(Constant(warmup_steps=1000), 1000)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Cosine(warmup_steps=-1), "schedule.warmup_steps=-1; it must be a number of steps"),
        (lambda: Linear(warmup_steps=10.5), "schedule.warmup_steps=10.5"),
        (lambda: Linear(warmup_steps=float("inf")), "schedule.warmup_steps=inf; it must be"),
        (lambda: Cosine(min_ratio=2.0), r"schedule.min_ratio=2.0; it must lie in \[0, 1\]"),
        (lambda: Infinite(min_ratio=0.9, constant_ratio=0.5), "not above schedule.constant_ratio"),
    ],
)
def test_values_out_of_range(make, said):
    with pytest.raises(ConfigError, match=said):
        make()
