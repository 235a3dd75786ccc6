"""How the learning rate moves: a factor between 0 and 1 for each step, computed on the host.

A schedule is a frozen dataclass; `schedule(step, steps)` gives the factor of update number `step`
(from 0) out of `steps`. It is a run-time value of the train step: changing one compiles nothing.
Lengths below 1 are fractions of `steps`.
"""

import dataclasses
import math

from seqzoo.errors import ConfigError

# Keys of a schedule that are lengths: together not longer than the run.
_LENGTHS = ("warmup_steps", "cooldown_steps", "decay_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """1 after the warm-up.

    Attributes:
        warmup_steps: steps of linear rise from 0; below 1 = a fraction of all steps.
    """

    warmup_steps: float = 0

    def __post_init__(self) -> None:
        _check(self, lengths=("warmup_steps",))

    def __call__(self, step: int, steps: int) -> float:
        return _warmup(step, _length(self.warmup_steps, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from 1 down to min_ratio after the warm-up.

    Attributes:
        warmup_steps: steps of linear rise from 0; below 1 = a fraction of all steps.
        min_ratio: what is left at the end.
    """

    warmup_steps: float = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, lengths=("warmup_steps",), ratios=("min_ratio",))

    def __call__(self, step: int, steps: int) -> float:
        warmup = _length(self.warmup_steps, steps)
        fall = _fraction(step, warmup, steps)
        cosine = 0.5 * (1 + math.cos(math.pi * fall))
        return _warmup(step, warmup) * (self.min_ratio + (1 - self.min_ratio) * cosine)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A straight line from 1 down to min_ratio after the warm-up.

    Attributes:
        warmup_steps: steps of linear rise from 0; below 1 = a fraction of all steps.
        min_ratio: what is left at the end.
    """

    warmup_steps: float = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, lengths=("warmup_steps",), ratios=("min_ratio",))

    def __call__(self, step: int, steps: int) -> float:
        warmup = _length(self.warmup_steps, steps)
        fall = _fraction(step, warmup, steps)
        return _warmup(step, warmup) * (1 - (1 - self.min_ratio) * fall)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Warm-up, then constant, then a straight line down over the last decay_steps.

    Attributes:
        warmup_steps: steps of linear rise from 0; below 1 = a fraction of all steps.
        decay_steps: steps of the fall at the end; below 1 = a fraction of all steps.
        min_ratio: what is left at the end.

    Source: Hu et al., "MiniCPM" (arXiv 2404.06395), section 4, with a linear decay.
    """

    warmup_steps: float = 0.01
    decay_steps: float = 0.2
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self, lengths=("warmup_steps", "decay_steps"), ratios=("min_ratio",))

    def __call__(self, step: int, steps: int) -> float:
        fall = _fraction(step, steps - _length(self.decay_steps, steps), steps)
        stable = _warmup(step, _length(self.warmup_steps, steps))
        return stable * (1 - (1 - self.min_ratio) * fall)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infinite:
    """Warm-up, cosine down to a constant that may go on for ever, and a short fall at the end.

    Branches (init_from=RUN@STEP) start from any step of the constant part.

    Attributes:
        warmup_steps: steps of linear rise from 0; below 1 = a fraction of all steps.
        cooldown_steps: steps of the cosine from 1 to constant_ratio; below 1 = a fraction.
        constant_ratio: where it stays.
        decay_steps: steps of the exponential fall at the end; below 1 = a fraction; 0 = none.
        min_ratio: what is left at the end, above 0.

    Source: Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train Large Language
    Models" (arXiv 2403.08763), section 7.4.
    """

    warmup_steps: float = 0.01
    cooldown_steps: float = 0.2
    constant_ratio: float = 0.5
    decay_steps: float = 0.1
    min_ratio: float = 0.01

    def __post_init__(self) -> None:
        lengths = ("warmup_steps", "cooldown_steps", "decay_steps")
        _check(self, lengths=lengths, ratios=("constant_ratio", "min_ratio"))
        if not 0 < self.min_ratio <= self.constant_ratio:
            raise ConfigError(
                f"schedule.min_ratio={self.min_ratio}; it must lie above 0 and not above "
                f"schedule.constant_ratio={self.constant_ratio}"
            )

    def __call__(self, step: int, steps: int) -> float:
        warmup = _length(self.warmup_steps, steps)
        cooled = _fraction(step, warmup, warmup + _length(self.cooldown_steps, steps))
        cosine = 0.5 * (1 + math.cos(math.pi * cooled))
        ratio = self.constant_ratio + (1 - self.constant_ratio) * cosine
        decay = _length(self.decay_steps, steps)
        if decay:
            fallen = _fraction(step, steps - decay, steps)
            ratio *= (self.min_ratio / self.constant_ratio) ** fallen
        return _warmup(step, warmup) * ratio


def check_lengths(schedule: object, steps: int) -> None:
    """Refuses a schedule whose parts take longer than the run: the later ones would be cut.

    Raises:
        ConfigError: they do; the text has both.
    """
    parts = {name: getattr(schedule, name) for name in _LENGTHS if hasattr(schedule, name)}
    taken = sum(length * steps if length < 1 else length for length in parts.values())
    if taken > steps * (1 + 1e-9):
        told = " + ".join(f"schedule.{name}={length:g}" for name, length in parts.items() if length)
        verb = "takes" if " + " not in told else "take"
        raise ConfigError(
            f"{told} {verb} {taken:g} steps, more than trainer.steps={steps}; make the schedule "
            "shorter (a length below 1 is a fraction of all steps), or raise trainer.steps"
        )


def _length(length: float, steps: int) -> int:
    return round(length * steps) if length < 1 else int(length)


def _warmup(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _fraction(step: int, start: int, stop: int) -> float:
    """How far `step` lies between start (0) and stop (1)."""
    return min(1.0, max(0.0, (step - start) / max(1, stop - start)))


def _check(schedule: object, *, lengths: tuple[str, ...], ratios: tuple[str, ...] = ()) -> None:
    for name in lengths:
        value = getattr(schedule, name)
        if not (math.isfinite(value) and value >= 0) or (value >= 1 and value != int(value)):
            raise ConfigError(
                f"schedule.{name}={value}; it must be a number of steps, or a fraction below 1"
            )
    for name in ratios:
        value = getattr(schedule, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"schedule.{name}={value}; it must lie in [0, 1]")
