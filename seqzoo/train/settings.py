"""The settings of a run that build no object: sections trainer, mesh and logger."""

import dataclasses
import importlib.util

from seqzoo.errors import ConfigError

PRECISIONS = ("default", "high", "highest")
PROGRESS = ("auto", "bar", "lines", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How long, in which portions, and how often to look.

    Attributes:
        steps: updates of the parameters in all.
        global_batch_size: rows per update, of all devices together.
        grad_accum_steps: an update is computed in so many microbatches; the result is the same but
            for rounding and dropout.
        seed: of initial values and dropout.
        stop_at_target: end when the validation metric reaches task.target.
        eval_every: steps between evaluations on the validation split; 0 = at the end only.
        eval_samples: rows of the validation split that are looked at; null = all.
        test_samples: rows of the test split that are looked at, at the end; null = all, 0 = none.
        eval_batch_size: rows per batch when evaluating; null = those of a microbatch.
        eval_chunk_length: tokens of a row that the model reads at a time when evaluating, carrying
            its state: memory does not grow with the row; null = whole rows. May be typed as
            eval.stream_chunk.
        log_every: steps per line of metrics.jsonl, which holds their means.
        save_every: steps between checkpoints; 0 = by the clock and at the end only.
        save_minutes: minutes between checkpoints; 0 = by steps and at the end only.
        ema_decay: keep a moving average of the parameters with this decay, and evaluate it;
            null = no.
        precision: of float32 matrix products on accelerators: default, high, highest.
        deterministic: the same bits every time on an accelerator too, at some cost in speed.
        profile: "10:15" traces these steps into profile/; null = none.
        workers: threads that make batches.
        prefetch: batches that may wait ready.
    """

    steps: int = 1000
    global_batch_size: int = 64
    grad_accum_steps: int = 1
    seed: int = 0
    stop_at_target: bool = False
    eval_every: int = 200
    eval_samples: int | None = 1000
    test_samples: int | None = None
    eval_batch_size: int | None = None
    eval_chunk_length: int | None = None
    log_every: int = 10
    save_every: int = 200
    save_minutes: float = 10.0
    ema_decay: float | None = None
    precision: str = "default"
    deterministic: bool = False
    profile: str | None = None
    workers: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "grad_accum_steps", "log_every"):
            _at_least("trainer", self, name, 1)
        for name in ("eval_every", "save_every", "save_minutes", "workers", "prefetch"):
            _at_least("trainer", self, name, 0)
        for name in ("eval_samples", "eval_batch_size", "eval_chunk_length"):
            _at_least("trainer", self, name, 1)
        _at_least("trainer", self, "test_samples", 0)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(
                f"trainer.seed={self.seed}; it must be at least 0 and below 2**32 = 4294967296"
            )
        if self.global_batch_size % self.grad_accum_steps:
            raise ConfigError(
                f"trainer.global_batch_size={self.global_batch_size} is no multiple of "
                f"trainer.grad_accum_steps={self.grad_accum_steps}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"trainer.ema_decay={self.ema_decay}; it must lie in [0, 1), or null")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"trainer.precision={self.precision}; allowed: {', '.join(PRECISIONS)}"
            )
        if self.profile is not None:
            self.profile_window()

    def profile_window(self) -> tuple[int, int] | None:
        """The steps to trace, [first, last); None = none."""
        if self.profile is None:
            return None
        first, colon, last = self.profile.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise ConfigError(
                f"trainer.profile={self.profile}; it must be FIRST:LAST, two steps as in 10:15"
            )
        if int(first) >= self.steps:
            raise ConfigError(
                f"trainer.profile={self.profile} begins at step {first}, and trainer.steps="
                f"{self.steps} ends before it; trace earlier steps, or raise trainer.steps"
            )
        return int(first), int(last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Over which devices a run is spread.

    Attributes:
        data: devices that share the batch; null = all that the other axes leave.
        fsdp: devices that share the batch and the parameters.
        tensor: devices that share the channels of a layer.
        sequence: devices that share the length of a sequence.
        rules: logical axis names to mesh axes, {embed: fsdp, ...}; null = the usual ones.
    """

    data: int | None = None
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    rules: dict | None = None

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor", "sequence"):
            _at_least("mesh", self, name, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """Where metrics go beside metrics.jsonl.

    Attributes:
        progress: auto (a bar on a terminal, else lines), bar, lines or none.
        tensorboard: write tb/.
        wandb: write to Weights & Biases (the extra `wandb`); the run's id is its hash.
        wandb_project: its project there.
        wandb_mode: offline or online.
    """

    progress: str = "auto"
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "seqzoo"
    wandb_mode: str = "offline"

    def __post_init__(self) -> None:
        if self.progress not in PROGRESS:
            raise ConfigError(f"logger.progress={self.progress}; allowed: {', '.join(PROGRESS)}")
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logger.wandb=true needs the package wandb: pip install 'seqzoo[wandb]', or "
                "make install EXTRA=wandb"
            )
        if self.wandb_mode not in ("offline", "online"):
            raise ConfigError(f"logger.wandb_mode={self.wandb_mode}; allowed: offline, online")


def _at_least(section: str, settings: object, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and not value >= least:
        raise ConfigError(f"{section}.{name}={value}; it must be at least {least}")
