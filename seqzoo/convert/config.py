"""A foreign config.json, read key by key: what is not there is asked for, never assumed."""

from collections.abc import Mapping
from typing import Any, NoReturn

from seqzoo.errors import ConfigError

_ASK = object()


class Config:
    """Typed access to config.json, with errors that name the key.

    Args:
        values: the JSON object.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def get(self, key: str, default: Any = _ASK) -> Any:
        """The value of a key; without a default, it must be there."""
        value = self.values.get(key, default)
        if value is _ASK:
            raise ConfigError(
                f"config.json lacks '{key}', and no value is assumed for it; add the one that the "
                "model was trained with"
            )
        return value

    def integer(self, key: str, default: Any = _ASK) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            self.refuse(key, value, "a whole number")
        return value

    def flag(self, key: str, default: Any = _ASK) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            self.refuse(key, value, "true or false")
        return value

    def must_be(self, key: str, *allowed: Any, default: Any = _ASK) -> None:
        """Refuses a value that we cannot express."""
        value = self.get(key, default)
        if value not in allowed:
            self.refuse(key, value, " or ".join(map(str, allowed)))

    def refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise ConfigError(f"config.json has {key}={value!r}; this import needs {allowed}")
