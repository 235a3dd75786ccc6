"""What every form's configuration has: tile sizes are fields of the form's own class."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Self

from pallas_kernels.core import tuned

_LOG = logging.getLogger(__name__)


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
    def candidates(
        cls, sizes: Mapping[str, int], device_kind: str | None = None
    ) -> tuple[Self, ...]:
        """What is worth measuring for these sizes: `seqzoo bench --tune` takes the fastest.

        Unless a form knows better: the heuristic's, and that with each of its sizes halved and
        doubled. One that a form refuses, or that does not compile, is passed over.
        """
        first = cls.heuristic(sizes, device_kind)
        found = [first]
        for field in dataclasses.fields(cls):
            value = getattr(first, field.name)
            if type(value) is not int or value < 2 or field.name.endswith("_bytes"):
                continue
            for other in (value // 2, 2 * value):
                changed: dict[str, Any] = {field.name: other}
                with contextlib.suppress(ValueError):  # the form does not take that
                    found.append(dataclasses.replace(first, **changed))
        return tuple(dict.fromkeys(found))

    @classmethod
    def of(cls, config: Any, sizes: Mapping[str, int], device_kind: str | None = None) -> Self:
        """The configuration that was given, else a measured one (core/tuned.py), else heuristic.

        Raises:
            TypeError: it is the configuration of another form.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(
                f"config is a {type(config).__name__}; this form takes a {cls.__name__}"
            )
        tuned.note(cls, sizes, device_kind)
        if config is not None:
            return config
        first = cls.heuristic(sizes, device_kind)
        fields = tuned.fields_for(cls, sizes, device_kind)
        if fields is None:
            return first
        try:
            return dataclasses.replace(first, **fields)
        except (TypeError, ValueError) as error:
            _LOG.warning("%s: its tuned table is of no use: %s", tuned.form_of(cls), error)
            return first
