"""The report of a sweep: tables and plots, as PNG, CSV and one HTML page."""

import collections
import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from seqzoo.eval import page
from seqzoo.sweep import plots
from seqzoo.sweep.results import Results, Trial, best_rows, remarks

_MOST_COLUMNS = 5  # architectures that stand beside each other rather than below
_MOST_ROWS = 2000  # of the table on the page; trials.csv has all


def write_sweep_report(found: Results, folder: pathlib.Path) -> pathlib.Path:
    """Writes index.html, the PNG files that it shows, best.csv, trials.csv and curves.csv.

    Args:
        found: the study.
        folder: where to write.

    Returns:
        The path of index.html.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images, curves = plots.draw(found, folder)
    best, trials = best_rows(found), trial_rows(found)
    page.write_rows(best, folder / "best.csv")
    page.write_rows(trials, folder / "trials.csv")
    page.write_rows(curves, folder / "curves.csv", ("architecture", "seed", "tokens", "seconds",
                                                    "train/loss"))  # fmt: skip
    failed = [{"trial": t.number, "failure": t.failure} for t in found.trials if t.failure]
    body = [
        f"<p>{html.escape(_summary(found))}</p>",
        *(page.note(text) for text in remarks(found)),
        "<h2>best of each architecture</h2>" if best else "",
        page.table(best, across=len(best) > _MOST_COLUMNS) if best else "",
        *([f"<h2>failed</h2>{page.table(failed)}"] if failed else []),
        *map(page.image, images),
        page.details("what was searched", _space(found)),
        page.details(f"trials ({len(trials)})", trials[:_MOST_ROWS]),
    ]
    return page.write_page(folder / "index.html", f"sweep {found.name}", body)


def trial_rows(found: Results) -> list[dict[str, Any]]:
    """Every trial, the best first, then by number what has no value."""
    sign = -1 if found.mode == "max" else 1
    ranked = sorted(
        found.trials,
        key=lambda t: (not t.ended, 0 if t.value is None else sign * t.value, t.number),
    )
    return [_row(found, trial) for trial in ranked]


def _row(found: Results, trial: Trial) -> dict[str, Any]:
    value = trial.value
    return {
        "trial": trial.number,
        "state": trial.state,
        "architecture": trial.architecture or None,
        found.metric: value if value is None or math.isfinite(value) else "diverged",
        "test": sorted(trial.tests)[len(trial.tests) // 2] if trial.tests else None,
        **{name: _plain(trial.point.get(name)) for name in found.space},
        "seconds": trial.seconds,
        "state bytes": trial.size.get("state_total"),
        "run": trial.runs[0].name if trial.runs else None,
    }


def _summary(found: Results) -> str:
    states = collections.Counter(trial.state for trial in found.trials)
    told = ", ".join(f"{count} {state}" for state, count in states.most_common())
    hours = sum(trial.seconds or 0 for trial in found.trials) / 3600
    seeds = f"{found.seeds} seeds each" if found.seeds > 1 else "one seed each"
    took = (
        f"{hours:.1f} hours of training" if hours >= 1 else f"{60 * hours:.1f} minutes of training"
    )
    return f"{len(found.trials)} trials by {found.sampler}, {seeds}: {told}; {took}."


def _space(found: Results) -> Sequence[dict[str, Any]]:
    return [{"parameter": name, "values": values} for name, values in found.space.items()]


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
