"""A study as the report reads it: from its storage alone, so that a thousand trials are quick."""

import math
from typing import Any

from seqzoo.eval.sweep_results import Results, Trial
from seqzoo.sweep.study import Row, Study


def results(study: Study) -> Results:
    """Reads a study."""
    told = study.definition
    return Results(
        name=told.name,
        metric=told.metric,
        mode=told.mode,
        sampler=told.sweep.sampler,
        seeds=told.sweep.seeds,
        space=told.space,
        trials=[_trial(study, row) for row in study.rows()],
        importances=study.importances(),
    )


def _trial(study: Study, row: Row) -> Trial:
    attrs = row.attrs
    size = attrs.get("size")
    tests = [value for value in attrs.get("tests") or [] if value is not None]
    return Trial(
        number=row.number,
        state=row.state,
        point={name: number(value) for name, value in row.point.items()},
        value=row.value,
        values=[float(value) for value in attrs.get("values") or []],
        tests=[value for value in tests if math.isfinite(value)],
        diverged=attrs.get("diverged") or 0,
        architecture=attrs.get("architecture") or "",
        size=size if isinstance(size, dict) else {},
        seconds=attrs.get("seconds"),
        runs=[study.path / name for name in attrs.get("runs") or []],
        failure=attrs.get("failure") or None,
    )


def number(value: Any) -> Any:
    """A value of a choice, which the study holds as text, as the number that it spells."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
