"""What a sweep searches, and what it keeps: from words to points, from points to words.

A word with several values is a parameter, any other a setting of every trial. Two things make a
word conditional: ` if KEY=VALUE` behind it, and standing under model.mixers.NAME, where it counts
only in trials whose model has that mixer.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from hydra.core.override_parser.types import IntervalSweep, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from seqzoo.config import paths
from seqzoo.config.compose import compose, spelled_out
from seqzoo.errors import ConfigError, suggest
from seqzoo.sweep import grammar
from seqzoo.sweep.grammar import Word
from seqzoo.train.identity import run_hash

# Words that decide which mixers a model has: chosen before all others.
_STRUCTURE = ("experiment", "task", "data", "model", "mixer", "model.pattern")
_TAGS = ("log", "int")
_MOST_POINTS = 100_000
_TRIES = 100  # draws until a random point is one that was not drawn before

Point = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One thing that is searched.

    Attributes:
        name: its key, with its condition where a key is searched in several ways.
        word: what was typed.
        distribution: Optuna's; the values of a choice are texts.
    """

    name: str
    word: Word
    distribution: BaseDistribution

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, where they can be counted."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return tuple(found.choices)
        if found.step is None or found.log or self._interval:
            return None
        count = math.floor((found.high - found.low) / found.step + 1e-9) + 1
        values = [found.low + i * found.step for i in range(count)]
        return tuple(values)

    @property
    def _interval(self) -> bool:
        return isinstance(self.word.override.value(), IntervalSweep)

    def text(self, value: Any) -> str:
        """The word of a trial with this value."""
        return spelled_out(self.word.key, value if isinstance(value, str) else repr(value))

    def draw(self, rng: np.random.Generator) -> Any:
        """A value at random."""
        found = self.distribution
        values = self.values
        if values is not None:
            return values[rng.integers(len(values))]
        low, high = found.low, found.high
        if isinstance(found, IntDistribution):
            if not found.log:
                return int(rng.integers(low, high + 1))
            drawn = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return min(max(round(drawn), low), high)
        if not found.log:
            return float(rng.uniform(low, high))
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(max(drawn, low), high)


class Space:
    """The words of a sweep.

    Args:
        words: as typed, without those of the sections sweep and launcher.
        config_dir: a user's own groups.

    Raises:
        ConfigError: a word cannot be read, or does not fit the others.
    """

    def __init__(self, words: Sequence[str], *, config_dir: str | None = None):
        self.texts = tuple(words)
        self.config_dir = config_dir
        read = [grammar.read(text) for text in words]
        swept = [word for word in read if word.override.is_sweep_override()]
        self.fixed = [word for word in read if not word.override.is_sweep_override()]
        several = {w.setting for w in swept if sum(w.setting == o.setting for o in swept) > 1}
        made = [self._parameter(word, word.setting in several) for word in swept]
        made.sort(key=lambda one: one.word.setting not in _STRUCTURE)  # else in typed order
        self.parameters = made
        self._check_conditions()

    def choose(self, draw: Callable[[Parameter], Any]) -> dict[str, Any]:
        """A point: asks for a value of each parameter that counts, those before it chosen."""
        point: dict[str, Any] = {}
        for parameter in self.parameters:
            if self._counts(parameter.word, point):
                point[parameter.name] = draw(parameter)
        return point

    def words(self, point: Point) -> list[str]:
        """The command line of a point, as for `seqzoo train`: first what is its own."""
        return [*self.own_words(point), *self.shared_words(point)]

    def own_words(self, point: Point) -> list[str]:
        """What a point chooses."""
        names = {parameter.name: parameter for parameter in self.parameters}
        return [names[name].text(value) for name, value in point.items()]

    def shared_words(self, point: Point) -> list[str]:
        """What every trial has that it fits."""
        return [_plain(word) for word in self.fixed if self._counts(word, point)]

    def grid(self) -> list[dict[str, Any]]:
        """Every point, the last parameter varying fastest.

        Raises:
            ConfigError: a parameter has endless values, or there are too many points.
        """
        for one in self.parameters:
            if one.values is None:
                raise grammar.caret(
                    one.word.text,
                    one.word.text.partition("=")[2].partition(" if ")[0],
                    "sweep.sampler=grid needs values that can be counted: list them, use "
                    "range(first,last,step), or take sweep.sampler=random or tpe",
                )
        points: list[dict[str, Any]] = [{}]
        for one in self.parameters:
            values = one.values or ()
            points = [
                {**point, **more}
                for point in points
                for more in (
                    ({one.name: value} for value in values)
                    if self._counts(one.word, point)
                    else ({},)
                )
            ]
            if len(points) > _MOST_POINTS:
                raise ConfigError(f"the grid has more than {_MOST_POINTS:,} points: search fewer")
        return points

    def random(self, seed: int, n: int) -> list[dict[str, Any]]:
        """The first n random points: a function of the seed, whatever n is. None comes twice.

        Raises:
            ConfigError: there are fewer points than that.
        """
        seen: set[str] = set()
        points = []
        for number in range(n):
            for attempt in range(_TRIES):
                point = self.choose(lambda one: one.draw(_rng(seed, number, attempt, one.name)))  # noqa: B023
                key = json.dumps(point)
                if key not in seen:
                    break
            else:
                raise ConfigError(
                    f"sweep.n_trials={n}, but the space seems to have no more than {len(seen)} "
                    "points: take sweep.sampler=grid, or fewer trials"
                )
            seen.add(key)
            points.append(point)
        return points

    def probes(self) -> Iterator[dict[str, Any]]:
        """Points that together hold every value of a choice and both ends of what is continuous."""
        first = self.choose(lambda one: _ends(one)[0])
        yield first
        for one in self.parameters:
            for value in _ends(one)[1:]:
                chosen = lambda other: value if other is one else _ends(other)[0]  # noqa: B023
                yield self.choose(chosen)
                # What depends on this value may have values of its own.
                for below in self.parameters[self.parameters.index(one) + 1 :]:
                    if below.name in first:
                        continue
                    for inner in _ends(below):
                        both = {one.name: value, below.name: inner}
                        yield self.choose(lambda o: both.get(o.name, _ends(o)[0]))  # noqa: B023

    def check(self) -> list[str]:
        """Composes enough points to find a wrong key or value before anything runs.

        Values of the model alone are left to the trials: to build it takes longer.

        Returns:
            The identities of these points: what trials are, whatever the spelling.

        Raises:
            ConfigError: as `seqzoo train` would have it.
        """
        met: set[str] = set()
        done: set[tuple[str, ...]] = set()
        hashes = set()
        for point in self.probes():
            met |= set(point)
            words = tuple(self.words(point))
            if words not in done:
                done.add(words)
                hashes.add(_checked(words, self.config_dir))
            met |= {word.text for word in self.fixed if self._counts(word, point)}
        for name in (*(one.name for one in self.parameters), *(w.text for w in self.fixed)):
            if name not in met:
                raise ConfigError(f"'{name}' counts in no trial: no value leads to it")
        return sorted(hashes)

    @functools.cached_property
    def shown(self) -> dict[str, str]:
        """What is searched, as it was typed."""
        return {one.name: one.word.text.partition("=")[2] for one in self.parameters}

    @functools.cached_property
    def description(self) -> dict[str, str]:
        """What is searched, spelled in one way: parameter to distribution and condition."""
        return {
            one.name: distribution_to_json(one.distribution)
            + (f" if {one.word.when}" if one.word.when else "")
            for one in sorted(self.parameters, key=lambda one: one.name)
        }

    def _counts(self, word: Word, point: Point) -> bool:
        if word.when is not None:
            chosen = self._setting(word.when.key, point)
            if chosen not in word.when.values:
                return False
        mixer = _mixer(word.setting)
        return mixer is None or mixer in self._pattern(point)

    def _setting(self, key: str, point: Point) -> str | None:
        """What a setting is at a point; None = not chosen there."""
        for one in self.parameters:
            if one.word.setting == key and one.name in point:
                value = point[one.name]
                return value if isinstance(value, str) else repr(value)
        for word in self.fixed:
            if word.setting == key:
                return word.override.get_value_element_as_str()
        return None

    def _pattern(self, point: Point) -> tuple[str, ...]:
        """The mixers of the model at a point."""
        words = [_plain(w) for w in self.fixed if w.setting in _STRUCTURE and w.when is None]
        for one in self.parameters:
            if one.word.setting in _STRUCTURE and one.name in point:
                words.append(one.text(point[one.name]))
        return _pattern_of(tuple(words), self.config_dir)

    def _parameter(self, word: Word, several: bool) -> Parameter:
        if word.override.is_delete():
            raise grammar.caret(word.text, word.text, "what is left out cannot have values")
        if several and word.when is None:
            raise ConfigError(
                f"'{word.setting}' is searched twice: give each a condition, as in "
                f"'{word.text} if mixer=mamba'"
            )
        name = f"{word.setting} if {word.when}" if several else word.setting
        return Parameter(name, word, _distribution(word, self.config_dir))

    def _check_conditions(self) -> None:
        known = {one.word.setting for one in self.parameters} | {w.setting for w in self.fixed}
        order = [one.word.setting for one in self.parameters]
        for word in (*(one.word for one in self.parameters), *self.fixed):
            if word.when is None:
                continue
            key = word.when.key
            if key not in known:
                why = f"no word of this sweep sets '{key}'{suggest(key, known)}"
                raise grammar.caret(word.text, f"{key}=", why)
            if word in self.fixed or key not in order:
                continue
            if order.index(key) >= order.index(word.setting):
                why = f"'{key}' must be typed before what depends on it"
                raise grammar.caret(word.text, f"{key}=", why)
            allowed = {
                value if isinstance(value, str) else repr(value)
                for one in self.parameters
                if one.word.setting == key
                for value in one.values or ()
            }
            for value in word.when.values:
                if allowed and value not in allowed:
                    why = f"{key} is never {value}{suggest(value, allowed)}"
                    raise grammar.caret(word.text, str(word.when), why)


def _ends(one: Parameter) -> tuple[Any, ...]:
    if isinstance(one.distribution, CategoricalDistribution):
        return tuple(one.distribution.choices)
    return (one.distribution.low, one.distribution.high)


def _plain(word: Word) -> str:
    if word.setting == "mixer":
        return spelled_out(word.setting, word.override.get_value_element_as_str())
    return word.override.input_line or word.text


def _mixer(setting: str) -> str | None:
    first, second, name, *rest = (*setting.split("."), "", "", "")
    return name if (first, second) == ("model", "mixers") and any(rest) else None


@functools.lru_cache(maxsize=256)
def _pattern_of(words: tuple[str, ...], config_dir: str | None) -> tuple[str, ...]:
    return tuple(compose(words, config_dir=config_dir)["model"].get("pattern") or ())


@functools.lru_cache(maxsize=4096)
def _checked(words: tuple[str, ...], config_dir: str | None) -> str:
    """The identity of a run whose values are all allowed."""
    from seqzoo.train.values import check_values  # imports jax; a worker must not before its time

    config = compose(words, config_dir=config_dir)
    check_values(config)
    return run_hash(config)


def _rng(seed: int, number: int, attempt: int, name: str) -> np.random.Generator:
    """A generator for one parameter of one trial: parameters that come or go leave others alone."""
    digest = hashlib.sha256(f"{seed}/{number}/{attempt}/{name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def _distribution(word: Word, config_dir: str | None) -> BaseDistribution:
    override = word.override
    value = override.value()
    wrong = lambda why: grammar.caret(word.text, word.text.partition("=")[2], why)
    tags = set(getattr(value, "tags", None) or ())
    if unknown := sorted(tags - set(_TAGS)):
        why = f"there is no tag '{unknown[0]}'{suggest(unknown[0], _TAGS)}; there are log and int"
        raise grammar.caret(word.text, unknown[0], why)
    if getattr(value, "shuffle", False):
        raise wrong("the order of trials is the sampler's: leave shuffle() out")
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        whole = "int" in tags or (isinstance(low, int) and isinstance(high, int))
        if whole and (low != int(low) or high != int(high)):
            raise wrong("an interval of whole numbers has whole ends")
        if low >= high:
            raise wrong(f"from {low} to {high} there is nothing: write interval(LOW,HIGH)")
        if "log" in tags and low <= 0:
            raise wrong(f"log needs a lower end above 0, not {low}")
        if whole:
            return IntDistribution(int(low), int(high), log="log" in tags)
        return FloatDistribution(float(low), float(high), log="log" in tags)
    if tags:
        raise wrong("tags belong to interval(LOW,HIGH)")
    if isinstance(value, RangeSweep):
        return _range(value, wrong)
    if override.is_choice_sweep() and not hasattr(value, "include"):
        texts = grammar.element_texts(override)
    else:  # glob(*)
        group = word.setting
        texts = tuple(value.filter(paths.options(group, paths.folders(config_dir))))
        if not texts:
            raise wrong(f"no file of configs/{group}/ fits")
    doubled = sorted({text for text in texts if texts.count(text) > 1})
    if doubled:
        raise grammar.caret(word.text, doubled[0], f"{doubled[0]} stands there twice")
    return CategoricalDistribution(texts)


def _range(value: RangeSweep, wrong: Callable[[str], ConfigError]) -> BaseDistribution:
    start, stop, step = value.start, value.stop, value.step
    if start is None or stop is None:
        raise wrong("write range(FIRST,BEHIND_LAST,STEP)")
    count = math.ceil((stop - start) / step - 1e-9) if step else 0
    if count < 1 or step < 0:
        raise wrong(f"from {start} up to {stop} by {step} there is nothing")
    last = start + (count - 1) * step
    if all(isinstance(number, int) for number in (start, stop, step)):
        return IntDistribution(start, last, step=step)
    return FloatDistribution(float(start), float(last), step=float(step))
