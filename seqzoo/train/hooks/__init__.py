"""What looks on while a run trains: progress, TensorBoard, Weights & Biases, the profiler.

A hook changes nothing of what is learned. Only process 0 has hooks.
"""

from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks.hook import Hook
from seqzoo.train.hooks.profiler import Profiler
from seqzoo.train.hooks.tensorboard import TensorBoard
from seqzoo.train.hooks.wandb import Wandb
from seqzoo.train.setup import Setup

__all__ = ["Hook", "make_hooks"]


def make_hooks(run: Setup, folder: RunFolder) -> list[Hook]:
    """The hooks that a configuration asks for, beside the progress display."""
    hooks: list[Hook] = []
    if run.logger.tensorboard:
        hooks.append(TensorBoard(folder.path / "tb", folder.attempt))
    if run.logger.wandb:
        hooks.append(Wandb(run.logger, folder, run.config))
    window = run.trainer.profile_window()
    if window is not None:
        hooks.append(Profiler(folder.path / "profile", *window))
    return hooks
