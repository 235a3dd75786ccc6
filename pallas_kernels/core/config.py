"""What every form's configuration has: tile sizes are fields of the form's own class."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a form is to run; results are the same up to rounding, whatever it says.

    Attributes:
        interpret: runs a kernel by interpretation, on any machine; "races" by the slow interpreter
            that also finds races, reads out of bounds and reads of what was never written.
        device_kind: the device to compile for, by jax's name; None = the one of the mesh in force,
            else the local one.
    """

    interpret: bool | str = False
    device_kind: str | None = None

    @classmethod
    def heuristic(cls, sizes: Mapping[str, int], device_kind: str | None = None) -> Self:
        """The choice for these sizes where nobody chose.

        Args:
            sizes: axis letters with their sizes.
            device_kind: jax's name of the device.
        """
        del sizes
        return cls(device_kind=device_kind)

    @classmethod
    def of(cls, config: Any, sizes: Mapping[str, int], device_kind: str | None = None) -> Self:
        """The configuration that was given, else the heuristic one.

        Raises:
            TypeError: it is the configuration of another form.
        """
        if config is None:
            return cls.heuristic(sizes, device_kind)
        if not isinstance(config, cls):
            raise TypeError(
                f"config is a {type(config).__name__}; this form takes a {cls.__name__}"
            )
        return config
