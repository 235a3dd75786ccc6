"""Plots of a sweep as PNG files."""

import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seqzoo.eval.plots import COLOURS
from seqzoo.eval.records import Record, read, series
from seqzoo.sweep.results import Results

_MARKERS = "osD^vPX*"
_MOST_SEEDS = 8  # of one trial that are drawn as curves
_MOST_LINES = 300  # of parallel coordinates: the best

Curve = tuple[list[float], list[float]]


def draw(found: Results, folder: pathlib.Path) -> tuple[list[pathlib.Path], list[dict[str, Any]]]:
    """Draws what there is to draw; returns the files, and the curves' points as rows."""
    curves = _curves(found)
    panels: list[tuple[str, Callable[[Figure], bool]]] = [
        ("best", lambda figure: _best(figure, found)),
        ("learning_rate", lambda figure: _rates(figure, found)),
        ("frontier", lambda figure: _frontier(figure, found)),
        ("loss_tokens", lambda figure: _losses(figure, curves, "tokens")),
        ("loss_time", lambda figure: _losses(figure, curves, "seconds")),
        ("parallel", lambda figure: _parallel(figure, found)),
        ("importance", lambda figure: _importance(figure, found)),
    ]
    files = []
    for name, panel in panels:
        figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        file = folder / f"{name}.png"
        file.unlink(missing_ok=True)  # of an earlier report
        if panel(figure):
            figure.savefig(file)
            files.append(file)
    return files, [
        {"architecture": name, "seed": seed, "tokens": t, "seconds": s, "train/loss": v}
        for name, runs in curves.items()
        for seed, points in runs.items()
        for t, s, v in points
    ]


def colours(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each architecture, the same on every plot."""
    return {
        name: (COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS) % len(_MARKERS)])
        for i, name in enumerate(names)
    }


def _best(figure: Figure, found: Results) -> bool:
    """The best trial of each architecture: every seed, from smallest to largest, the median."""
    groups = found.architectures
    best = {name: found.best(trials) for name, trials in groups.items()}
    shown = {n: t for n, t in best.items() if t and t.value is not None and _finite(t.values)}
    if not shown:
        return False
    figure.set_size_inches(8, 1.2 + 0.42 * len(shown))
    axes = figure.add_subplot()
    marks = colours(groups)
    for place, (name, trial) in enumerate(shown.items()):
        values, (colour, _) = _finite(trial.values), marks[name]
        axes.plot([min(values), max(values)], [place, place], color=colour, lw=3, alpha=0.35)
        axes.plot(values, [place] * len(values), "o", color=colour, ms=4, alpha=0.6)
        axes.plot([statistics.median(values)], [place], "|", color=colour, ms=16, mew=2.5)
    axes.set_yticks(range(len(shown)), list(shown))
    axes.invert_yaxis()
    axes.margins(y=0.15)
    _dress(axes, "best trial of each architecture, its seeds", f"{found.metric} (valid)", "")
    return True


def _rates(figure: Figure, found: Results) -> bool:
    """Metric against learning rate; a line joins the best at each rate."""
    axes = None
    marks = colours(found.architectures)
    for name, trials in found.architectures.items():
        pairs = [(t.lr, t) for t in trials if t.lr and t.value is not None and t.state != "failed"]
        pairs = [(lr, t) for lr, t in pairs if math.isfinite(t.value)]
        if len({lr for lr, _ in pairs}) < 2:
            continue
        axes = axes or figure.add_subplot()
        colour, marker = marks[name]
        ended = [(lr, t.value) for lr, t in pairs if t.ended]
        pruned = [(lr, t.value) for lr, t in pairs if not t.ended]
        top: dict[float, float] = {}
        for lr, value in ended:
            sign = 1 if found.mode == "max" else -1
            top[lr] = max(top.get(lr, -sign * math.inf), value, key=lambda v: sign * v)
        line = sorted(top.items())
        if len(line) <= 12:
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.4) if line else None
        _scatter(axes, ended, colour, marker, label=name)
        _scatter(axes, pruned, colour, "x", alpha=0.4)
    if axes is None:
        return False
    axes.set_xscale("log")
    _dress(axes, "learning rate (x: ended early)", "learning rate", found.metric)
    return True


def _frontier(figure: Figure, found: Results) -> bool:
    """Metric against what decoding keeps; a line joins the best at each size."""
    groups = {
        name: [
            (t.size["state_total"], t.value)
            for t in trials
            if t.ended and t.size.get("state_total") and math.isfinite(t.value)
        ]
        for name, trials in found.architectures.items()
    }
    if len({size for pairs in groups.values() for size, _ in pairs}) < 2:
        return False
    axes = figure.add_subplot()
    marks = colours(found.architectures)
    choose = max if found.mode == "max" else min
    for name, pairs in groups.items():
        if not pairs:
            continue
        colour, marker = marks[name]
        _scatter(axes, pairs, colour, marker, alpha=0.25)
        sizes = sorted({size for size, _ in pairs})
        best = [choose(value for size, value in pairs if size == one) for one in sizes]
        axes.plot(sizes, best, color=colour, marker=marker, lw=1.4, label=name)
    axes.set_xscale("log")
    _dress(axes, "against what decoding keeps", "decoding state, bytes", found.metric)
    return True


def _losses(figure: Figure, curves: Mapping[str, Mapping[str, list]], by: str) -> bool:
    """Training loss of the best trial of each architecture, all seeds."""
    if not any(curves.values()):
        return False
    axes = figure.add_subplot()
    marks = colours(curves)
    lowest = math.inf
    for name, runs in curves.items():
        for number, points in enumerate(runs.values()):
            x = [t if by == "tokens" else s for t, s, _ in points]
            y = [value for _, _, value in points]
            lowest = min(lowest, *y)
            first = number == 0
            axes.plot(
                x,
                y,
                color=marks[name][0],
                lw=1.5 if first else 0.8,
                alpha=1.0 if first else 0.4,
                label=name if first else None,
            )
    if lowest > 0:
        axes.set_yscale("log")
    what = "tokens read" if by == "tokens" else "seconds of training"
    _dress(axes, f"training loss against {what}, best trials", what, "loss")
    return True


def _parallel(figure: Figure, found: Results) -> bool:
    """A line per trial through the axes of what was searched, coloured by its metric."""
    trials = [t for t in found.trials if t.ended and math.isfinite(t.value)]
    names = list(dict.fromkeys(name for trial in trials for name in trial.point))
    # A choice without alternatives tells nothing.
    names = [n for n in names if len({t.point.get(n) for t in trials}) > 1]
    if len(trials) < 2 or not names:
        return False
    worst_first = sorted(trials, key=lambda t: t.value, reverse=found.mode == "min")
    trials = worst_first[-_MOST_LINES:]
    figure.set_size_inches(max(8, 1.9 * (len(names) + 1)), 4.4)
    axes = figure.add_subplot()
    scales = [_Scale([t.point.get(name) for t in trials]) for name in names]
    scales.append(_Scale([t.value for t in trials]))
    low, high = min(t.value for t in trials), max(t.value for t in trials)
    colour = _shade(low, high, found.mode)
    for trial in trials:
        values = [*(trial.point.get(name) for name in names), trial.value]
        pairs = [
            (x, scale(value))
            for x, (scale, value) in enumerate(zip(scales, values, strict=True))
            if value is not None
        ]
        axes.plot(*zip(*pairs, strict=True), color=colour(trial.value), lw=1.0, alpha=0.75)
    for x, scale in enumerate(scales):
        axes.axvline(x, color="#999", lw=0.8, zorder=0)
        for text, y in scale.ticks():
            axes.annotate(
                text, (x, y), xytext=(-4, 0), textcoords="offset points", ha="right", va="center",
                fontsize=8, color="#333", bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
    labels = [name.rpartition(".")[2] if " if " not in name else name for name in names]
    axes.set_xticks(range(len(scales)), [*labels, found.metric])
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(scales) - 0.75)
    axes.set_title(f"trials, dark = best {found.metric}", loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    return True


def _importance(figure: Figure, found: Results) -> bool:
    if not found.importances or not any(found.importances.values()):
        return False
    ranked = sorted(found.importances.items(), key=lambda pair: pair[1])
    figure.set_size_inches(8, 1.2 + 0.35 * len(ranked))
    axes = figure.add_subplot()
    axes.barh([name for name, _ in ranked], [value for _, value in ranked], color=COLOURS[0])
    for place, (_, value) in enumerate(ranked):
        axes.annotate(
            f"{value:.2f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_xlim(0, 1.08 * max(found.importances.values()))
    _dress(axes, "what decides whether a trial is among the best", "importance (PED-ANOVA)", "")
    return True


def _curves(found: Results) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """Per architecture and seed: (tokens, seconds, loss) of the best trial."""
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for name, trials in found.architectures.items():
        best = found.best(trials)
        curves[name] = {}
        for path in [] if best is None else best.runs[:_MOST_SEEDS]:
            if (path / "config.yaml").exists():
                record = read(path)
                points = _points(record)
                if points:
                    curves[name][str(record.seed)] = points
    return curves


def _points(record: Record) -> list[tuple[float, float, float]]:
    # Of a step; the mean, where rows have several lengths.
    tokens = (record.tokens or 0) / (record.status.get("step") or 1)
    steps, losses = series(record.metrics).get("train/loss", ([], []))
    took = {line["step"]: line.get("step_seconds") or 0.0 for line in record.timing}
    points, seconds, before = [], 0.0, 0
    for step, loss in zip(steps, losses, strict=True):
        seconds += took.get(step, 0.0) * (step - before)
        before = step
        if math.isfinite(loss):
            points.append((float(step * tokens), seconds, loss))
    return points


class _Scale:
    """From values of one parameter to heights between 0 and 1, and the marks beside its axis."""

    def __init__(self, values: Sequence[Any]):
        known = [value for value in values if value is not None]
        self._texts = sorted({str(v) for v in known if isinstance(v, str | bool)})
        numbers = [float(v) for v in known if not isinstance(v, str | bool)]
        self._low, self._high = min(numbers, default=0.0), max(numbers, default=0.0)
        self._log = self._low > 0 and self._high >= 10 * self._low
        self._listed = sorted(set(numbers)) if len(set(numbers)) <= 6 else []
        if self._texts:
            self._texts += [f"{number:g}" for number in sorted(set(numbers))]

    def __call__(self, value: Any) -> float:
        if self._texts:
            text = str(value) if isinstance(value, str | bool) else f"{value:g}"
            return self._texts.index(text) / max(1, len(self._texts) - 1)
        low, high, value = self._low, self._high, float(value)
        if self._log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return 0.5 if low == high else (value - low) / (high - low)

    def ticks(self) -> list[tuple[str, float]]:
        if self._texts:
            return [(text, i / max(1, len(self._texts) - 1)) for i, text in enumerate(self._texts)]
        if self._listed:
            return [(f"{number:.4g}", self(number)) for number in self._listed]
        middle = math.sqrt(self._low * self._high) if self._log else (self._low + self._high) / 2
        return [(f"{number:.3g}", self(number)) for number in (self._low, middle, self._high)]


def _shade(low: float, high: float, mode: str) -> Callable[[float], Any]:
    from matplotlib import colormaps

    shades = colormaps["YlGnBu"]

    def colour(value: float) -> Any:
        share = 0.5 if high == low else (value - low) / (high - low)
        return shades(0.2 + 0.75 * (share if mode == "max" else 1 - share))

    return colour


def _scatter(axes: Axes, pairs: Sequence[tuple], colour: str, marker: str, **more: Any) -> None:
    if pairs:
        x, y = zip(*pairs, strict=True)
        axes.scatter(x, y, color=colour, marker=marker, s=22, **more)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8, frameon=False)
