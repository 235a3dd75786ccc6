"""A configuration that comes from a file is data from outside, and may not name code of its choice.

A config names classes by ``_target_``, so one that is read from a run folder or a checkpoint could
name ``os.system``. It is taken as a plain container, and each target must be a public name, in a
module that imports as one, of an object defined under the list below. Whoever runs the command may
add packages (``--trust mylab``, or SEQZOO_TRUST=mylab); a file never can.
"""

import functools
import importlib
import os
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from seqzoo.errors import ConfigError

# Names may be reached under these, and objects must be defined under them or their private twins.
ALLOWED = (
    "seqzoo.nn",
    "seqzoo.mixers",
    "seqzoo.models",
    "seqzoo.data",
    "seqzoo.tasks",
    "seqzoo.train.optimizer",
    "seqzoo.train.schedule",
    "pallas_kernels",
    "flax.nnx",
    "optax",
    "jax.nn",
    "grain",
)
_DEFINED_UNDER = (*ALLOWED, "jax._src.nn")

TRUST_VARIABLE = "SEQZOO_TRUST"

_MOST_BYTES = 4 * 2**20
_DEEPEST = 64


def load_untrusted(
    source: str | os.PathLike | Mapping[str, Any], trust: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns a configuration from a file (or a checkpoint's JSON) once it is known to be harmless.

    Args:
      source: a YAML file, or what was read from a JSON one.
      trust: packages or modules beside the list whose classes it may name.

    Returns:
      Plain dicts, lists and scalars, with no interpolation in them.

    Raises:
      ConfigError: it holds an interpolation, a YAML alias or tag, or names a target that is not
        allowed; the message names it and the flag that would allow it.
    """
    plain = read_plain(source)
    try:
        check_targets(plain, trust)
    except ConfigError as error:
        raise ConfigError(f"{_where(source)}: {error}") from error.__cause__
    return plain


def read_plain(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration from a file to be shown or compared, never to be built.

    Imports nothing that it names. Raises ConfigError for what is no plain mapping.
    """
    container = source if isinstance(source, Mapping) else _read(pathlib.Path(source))
    if not isinstance(container, Mapping):
        raise ConfigError(f"{_where(source)} holds no configuration (a mapping was expected)")
    return _plain(container, _where(source), "", 0)


def _where(source: str | os.PathLike | Mapping[str, Any]) -> str:
    return "the configuration in the checkpoint" if isinstance(source, Mapping) else str(source)


def check_targets(container: Any, trust: Iterable[str] = ()) -> None:
    """Checks every ``_target_`` in a plain container: nested, in ``_args_``, under ``_partial_``.

    Raises:
      ConfigError: the first target that is not allowed, by name.
    """
    trusted = tuple(_trusted(trust))
    for key, target in _targets(container, ""):
        if not isinstance(target, str):
            raise ConfigError(f"{key} is {target!r}: a _target_ must be a name in words")
        _check(key, target, trusted)


def _trusted(trust: Iterable[str]) -> Iterable[str]:
    given = [trust] if isinstance(trust, str) else list(trust)
    for entry in [*given, os.environ.get(TRUST_VARIABLE, "")]:
        yield from (name.strip() for name in entry.split(",") if name.strip())


def _targets(value: Any, key: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            inside = f"{key}.{name}" if key else str(name)
            if name == "_target_":
                yield inside, item
            yield from _targets(item, inside)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _targets(item, f"{key}[{position}]")


def _check(key: str, target: str, trusted: tuple[str, ...]) -> None:
    parent, _, name = target.rpartition(".")
    if not _under(parent, ALLOWED + trusted):
        package = target.split(".")[0]
        raise ConfigError(
            f"{key}={target} is refused: a file may name code under {', '.join(ALLOWED)} only. If "
            f"you trust the package {package!r}, pass --trust {package} (or set {TRUST_VARIABLE})"
        )
    if any(not part.isidentifier() or part.startswith("_") for part in target.split(".")):
        raise ConfigError(f"{key}={target} is refused: it is not a public name")
    try:
        module = importlib.import_module(parent)
    except ImportError as error:
        raise ConfigError(
            f"{key}={target} is refused: {parent} does not import as a module ({error}), and no "
            "flag allows a name that is reached through anything else"
        ) from error
    found = getattr(module, name, None)
    # Hydra walks attributes from the top; where that ends elsewhere, ours was not the object meant.
    if found is None or isinstance(found, types.ModuleType) or found is not _walk(target):
        raise ConfigError(f"{key}={target} is refused: {parent} has no class or function '{name}'")
    if not callable(found):
        raise ConfigError(f"{key}={target} is refused: it cannot be called")
    while isinstance(found, functools.partial):
        found = found.func
    defined = getattr(found, "__module__", None)
    if not isinstance(defined, str) or not _under(defined, _DEFINED_UNDER + trusted):
        raise ConfigError(
            f"{key}={target} is refused: it was defined in {defined}, outside what a file may "
            f"name. If you trust that module, pass --trust {defined} (or set {TRUST_VARIABLE})"
        )


def _under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _walk(target: str) -> Any:
    first, *rest = target.split(".")
    found: Any = importlib.import_module(first)
    for name in rest:
        found = getattr(found, name, None)
    return found


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases: ten lines of them expand to a billion nodes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed here", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)


def _read(path: pathlib.Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_BYTES} bytes: no configuration has")
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not plain YAML: {error}") from error


def _plain(value: Any, where: str, key: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ConfigError(f"{where}: {key[:80]}... is nested deeper than {_DEEPEST} levels")
    if isinstance(value, str):
        if "${" in value:
            raise ConfigError(
                f"{where}: {key}={value!r} is an interpolation. A stored configuration is resolved "
                "and may hold none"
            )
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [
            _plain(item, where, f"{key}[{place}]", depth + 1) for place, item in enumerate(value)
        ]
    if isinstance(value, Mapping):
        out = {}
        for name, item in value.items():
            inside = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                raise ConfigError(f"{where}: the key {inside} is not a word")
            out[_plain(name, where, inside, depth)] = _plain(item, where, inside, depth + 1)
        return out
    raise ConfigError(f"{where}: {key} is a {type(value).__name__}; plain values only")
