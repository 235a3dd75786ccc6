"""Multi-query associative recall at several lengths and numbers of pairs: BASED's form of it.

Source: HazyResearch/zoology, the configurations of "Simple linear attention language models balance
the recall-throughput tradeoff" (arXiv 2402.18668), figure 2.
Differs from source: what is left of a segment after its last whole block is not used; rows may come
in random order of blocks (the original never shuffles: every epoch goes from easy to hard).
"""

import dataclasses
import functools

from seqzoo.data.mqar import check_power, check_shape, recall_rows
from seqzoo.data.source import (
    Generated,
    Joined,
    Source,
    Split,
    at_least,
    fingerprint_of,
    known_split,
)
from seqzoo.errors import ConfigError

_VERSION = 1

Segment = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class MQARSegments:
    """A list of segments [seq_len, num_kv_pairs, samples] to train on, another to be tested on.

    Rows have the length of their segment, and a batch comes from one segment. Each segment has
    random numbers of its own. Rows are as in seqzoo.data.mqar.MQAR.

    Attributes:
      vocab_size: half of it keys, half values.
      train: segments to train on.
      test: segments to be tested on.
      valid: segments to choose by; null = those of test, with rows of their own.
      power_a: 1 = a key comes again anywhere, towards 0 = rather soon.
      random_non_queries: fill the rest with random tokens; false = with token 0.
      order: shuffled = blocks in a new order in each epoch; zoology = as listed, in every epoch.
      block: rows of a segment that stay together; the global batch must divide it.
      seed: of the data, apart from trainer.seed.
    """

    vocab_size: int
    train: tuple[tuple[int, int, int], ...]
    test: tuple[tuple[int, int, int], ...]
    valid: tuple[tuple[int, int, int], ...] | None = None
    power_a: float = 0.01
    random_non_queries: bool = True
    order: str = "shuffled"
    block: int = 256
    seed: int = 0

    bytes_per_token = None

    def __post_init__(self) -> None:
        at_least("block", self.block, 1)
        check_power(self.power_a)
        if self.order not in ("shuffled", "zoology"):
            raise ConfigError(f"data.order={self.order}; it must be shuffled or zoology")
        for split in ("train", "valid", "test"):
            segments = getattr(self, split)
            if segments is None:
                continue
            segments = tuple((int(t), int(k), int(n)) for t, k, n in segments)
            object.__setattr__(self, split, segments)
            if not segments:
                raise ConfigError(f"data.{split} is empty; give segments [seq_len, pairs, samples]")
            for seq_len, pairs, samples in segments:
                check_shape(self.vocab_size, seq_len, pairs)
                at_least(f"{split}'s samples", samples, 1)
        for seq_len, pairs, samples in self.train:
            if samples < self.block:
                raise ConfigError(
                    f"data.train: segment [{seq_len}, {pairs}, {samples}] has fewer samples than "
                    f"data.block={self.block}"
                )

    @property
    def seq_len(self) -> int:
        return max(seq_len for seq_len, _, _ in (*self.train, *self.test))

    @property
    def most_asked(self) -> int:
        """Targets per row, at most."""
        return max(pairs for _, pairs, _ in (*self.train, *(self.valid or ()), *self.test))

    @property
    def group_names(self) -> tuple[str, ...]:
        segments = (*self.train, *(self.valid or ()), *self.test)
        return tuple(dict.fromkeys(_name(segment) for segment in segments))

    def source(self, split: Split) -> Source:
        segments = self.test if known_split(split) == "valid" else getattr(self, split)
        if split == "valid" and self.valid is not None:
            segments = self.valid
        parts = tuple(self._part(split, n, segment) for n, segment in enumerate(segments))
        return Joined(
            parts,
            self.seed,
            shuffle=self.order == "shuffled",
            block=self.block if split == "train" else 0,
            group_names=self.group_names,
        )

    def fingerprint(self) -> str:
        return fingerprint_of("mqar_segments", _VERSION, dataclasses.asdict(self))

    def _part(self, split: Split, number: int, segment: Segment) -> Generated:
        seq_len, pairs, samples = segment
        make = functools.partial(
            recall_rows,
            vocab_size=self.vocab_size,
            seq_len=seq_len,
            num_kv_pairs=pairs,
            power_a=self.power_a,
            noise=self.random_non_queries,
            group=self.group_names.index(_name(segment)),
        )
        if split == "train":
            samples -= samples % self.block
        return Generated(make, self.seed, split, samples, self.group_names, stream=number)


def _name(segment: Segment) -> str:
    return f"len_{segment[0]}_pairs_{segment[1]}"
