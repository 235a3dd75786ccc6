"""The real train step, ready to be called: what several benches measure."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from seqzoo.config.compose import compose
from seqzoo.train import mesh as meshes
from seqzoo.train import programs
from seqzoo.train.setup import Setup, initial_state, setup
from seqzoo.train.step import train_step

# The measure of the project: a byte-level Mamba, d 256, 4 layers, N 16, batch 4 x 512.
MAMBA = (
    "data=stdlib_text",
    "task=next_token",
    "model=mamba_small",
    "model.d_model=256",
    "model.n_layers=4",
    "data.seq_len=512",
    "trainer.global_batch_size=4",
)
BATCH, LENGTH, VOCAB = 4, 512, 256


class Trainer:
    """A model in training on random tokens.

    Args:
        overrides: of the configuration.
        batch, length, vocab: of the tokens.
    """

    def __init__(self, overrides: Sequence[str], *, batch: int, length: int, vocab: int):
        self.run: Setup = setup(compose(overrides), devices=jax.devices()[:1])
        self._batches = self._draw(batch, length, vocab)
        self.seed = np.uint32(self.run.trainer.seed)
        self.step = 0

    @property
    def arguments(self) -> tuple:
        """What the step takes, without its state."""
        return next(self._batches), self.run.hyper(self.step), self.seed

    def lowered(self):
        """The step's program before compilation, for abstract state."""
        return train_step(self.run.spec).lower(self.run.state, *self.arguments)

    def start(self) -> None:
        """Draws the parameters and compiles the step."""
        self.state = initial_state(self.run)
        self.program = programs.compiled(
            train_step(self.run.spec), self.state, *self.arguments, name="train step"
        )

    def update(self) -> None:
        """One update; returns when it is computed."""
        self.state, metrics = self.program(self.state, *self.arguments)
        self.step += 1
        jax.block_until_ready(metrics.pairs)

    def _draw(self, batch: int, length: int, vocab: int) -> Iterator[dict]:
        sharding = meshes.batch_sharding(self.run.spec.mesh, self.run.spec.rules)
        rng = np.random.default_rng(0)
        for _ in itertools.count():
            tokens = rng.integers(0, vocab, (batch, length + 1), dtype=np.int32)
            yield meshes.put_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, sharding)
