"""Weights & Biases: the extra `wandb`. The run there has our hash for its id."""

from collections.abc import Mapping
from typing import Any

from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks.hook import Hook, Values
from seqzoo.train.settings import LoggerSettings


class Wandb(Hook):
    """Sends what metrics.jsonl and timing.jsonl hold, or keeps it in the run folder (offline)."""

    name = "wandb"

    def __init__(self, settings: LoggerSettings, folder: RunFolder, config: Mapping[str, Any]):
        import wandb  # an extra

        self._run = wandb.init(
            project=settings.wandb_project,
            mode=settings.wandb_mode,
            id=folder.hash,
            resume="allow",
            name=folder.path.name,
            group=folder.path.parent.name,
            dir=str(folder.path),
            config=dict(config),
        )

    def line(self, step: int, values: Values, timing: Values) -> None:
        self._run.log(
            {f"train/{k}": v for k, v in values.items()}
            | {f"timing/{k}": v for k, v in timing.items()},
            step=step,
        )

    def evaluated(self, step: int, split: str, values: Values) -> None:
        self._run.log({f"{split}/{k}": v for k, v in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
