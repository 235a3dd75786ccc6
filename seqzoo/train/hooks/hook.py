"""What a hook is, and which ones a run has."""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, float]


class Hook:
    """Looks on. Every method may be left out.

    Attributes:
        name: under which its memory is saved.
    """

    name = ""

    def start(self, step: int) -> None:
        """The run begins at this step, or goes on from it."""

    def before_step(self, step: int, state: Any) -> None:
        """Update number `step` (from 0) is about to be computed from `state`."""

    def line(self, step: int, values: Values, timing: Values) -> None:
        """A line of metrics.jsonl and one of timing.jsonl were written."""

    def evaluated(self, step: int, split: str, values: Values) -> None:
        """A split was evaluated."""

    def memory(self) -> Any:
        """What to save with a checkpoint (JSON); None = nothing."""

    def remember(self, memory: Any) -> None:
        """Goes on from a memory."""

    def close(self) -> None:
        """The run ends here, however it ends."""
