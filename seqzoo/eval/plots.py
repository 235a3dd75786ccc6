"""Curves of runs as PNG files."""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seqzoo.eval.records import Record, Series, series

_MOST_POINTS = 2000
_REPORTED = "train/report/"
_LAYER = re.compile(r"/layer_(\d+)$")
# Told apart without colour vision (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")


class Panel(NamedTuple):
    """One plot: which series belong on it."""

    file: str
    title: str
    names: tuple[str, ...]  # parts of the names of series
    log: bool = False


def panels(metric: str | None, names: Iterable[str] = ()) -> list[Panel]:
    """What is drawn of every run.

    Args:
        metric: what the task is scored by.
        names: of all series; what mixers reported while training (train/report/NAME or
            train/report/NAME/PART) gets a panel per NAME, in which its parts or layers stand
            together.
    """
    told = (name.removeprefix(_REPORTED) for name in names if name.startswith(_REPORTED))
    reported = {name.partition("/")[0] for name in told}
    found = [Panel("loss", "loss", ("loss",))]
    if metric and metric != "loss":
        found.append(Panel("metric", metric, (metric,)))
    return [
        *found,
        Panel("lr", "learning rate", ("lr",)),
        Panel("grad_norm", "gradient norm", ("grad_norm",), log=True),
        Panel("tokens_per_second", "tokens per second", ("tokens_per_second",)),
        *(
            Panel(f"report_{name}", name.replace("_", " "), (_REPORTED + name,))
            for name in sorted(reported)
        ),
    ]


def draw(records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws every panel for which there are numbers, and returns the files."""
    metrics = {record.metric.get("name") for record in records} - {None}
    everything = {
        record.label: {**series(record.timing), **series(record.metrics)} for record in records
    }
    files = []
    names = {name for found in everything.values() for name in found}
    for panel in panels(next(iter(sorted(metrics)), None), names):
        lines = lines_of(panel, everything)
        if any(lines.values()):
            files.append(_plot(panel, lines, folder / f"{panel.file}.png"))
    return files


def lines_of(
    panel: Panel, everything: Mapping[str, Mapping[str, Series]]
) -> dict[str, dict[str, Series]]:
    """The series of each run on a panel, layers in order; of several runs without layers."""
    return {
        label: {
            name: found[name]
            for name in sorted(found, key=_by_layer)
            if belongs(name, panel.names) and (len(everything) == 1 or not _LAYER.search(name))
        }
        for label, found in everything.items()
    }


def belongs(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a series (train/loss, valid/accuracy/pairs_4) is one of the wanted."""
    return any(f"/{one}/" in f"/{name}/" for one in wanted)


def _plot(panel: Panel, lines: dict[str, dict[str, Series]], file: pathlib.Path) -> pathlib.Path:
    figure = Figure(figsize=(7.2, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (label, found) in enumerate(lines.items()):
        depth = max([int(m[1]) for m in map(_LAYER.search, found) if m], default=0)
        for position, (name, one) in enumerate(found.items()):
            steps, values = _thin(one)
            text = name if len(lines) == 1 else label if len(found) == 1 else f"{label}  {name}"
            colour = COLOURS[(position if len(lines) == 1 else number) % len(COLOURS)]
            layer = _LAYER.search(name)
            if layer:  # from the first to the last, dark to light
                colour = colormaps["viridis"](0.9 * int(layer[1]) / depth)
            elif depth:  # their mean
                colour = "#000000"
            style = "-" if len(lines) == 1 else _STYLES[position % len(_STYLES)]
            # The one point of a test stands out from the curves that it lies on.
            mark = dict(marker="*", ms=11, zorder=3) if len(steps) == 1 else {}
            mark = dict(marker="o", ms=3.5) if 1 < len(steps) < 12 else mark
            axes.plot(steps, values, style, color=colour, lw=1.4, label=text, **mark)
    if panel.log and all(v > 0 for f in lines.values() for _, vs in f.values() for v in vs):
        axes.set_yscale("log")
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if sum(map(len, lines.values())) > 1:
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(file)
    return file


def _by_layer(name: str) -> tuple[str, int]:
    """Sorts layer 10 behind layer 9, and their mean before them."""
    layer = _LAYER.search(name)
    return (_LAYER.sub("", name), int(layer[1]) if layer else -1)


def _thin(one: Series) -> Series:
    """At most so many points as a screen shows; the last one stays."""
    steps, values = one
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    stride = math.ceil(len(pairs) / _MOST_POINTS) or 1
    kept = pairs[::stride]
    if pairs and kept[-1] != pairs[-1]:
        kept.append(pairs[-1])
    return [s for s, _ in kept], [v for _, v in kept]
