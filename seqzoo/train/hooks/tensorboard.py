"""Curves for TensorBoard, under tb/ in the run folder."""

import pathlib
from typing import Any

from seqzoo.train.hooks.hook import Hook, Values


class TensorBoard(Hook):
    """Writes what metrics.jsonl and timing.jsonl hold.

    A start from step S tells TensorBoard to forget what an earlier start wrote after S.

    Args:
        folder: where.
        attempt: which start of the run this is: two in one second must not share a file.
    """

    name = "tensorboard"

    def __init__(self, folder: pathlib.Path, attempt: int):
        self._folder, self._attempt = folder, attempt
        self._writer: Any = None

    def start(self, step: int) -> None:
        from tensorboardX import SummaryWriter  # not before somebody wants curves

        self._writer = SummaryWriter(
            str(self._folder),
            purge_step=step + 1 if step or self._attempt > 1 else None,
            filename_suffix=f".{self._attempt:03d}",
        )

    def line(self, step: int, values: Values, timing: Values) -> None:
        self._write(step, "train", values)
        self._write(step, "timing", timing)

    def evaluated(self, step: int, split: str, values: Values) -> None:
        self._write(step, split, values)

    def _write(self, step: int, section: str, values: Values) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{section}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
