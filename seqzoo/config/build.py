"""From a node of a configuration to the object that it describes."""

from collections.abc import Mapping
from typing import Any

from seqzoo.errors import ConfigError, SeqzooError

# What a constructor raises that cannot work with a value.
_REFUSALS = (ValueError, TypeError, ArithmeticError, NotImplementedError)


def build(node: Mapping[str, Any], **given: Any) -> Any:
    """Calls the `_target_` of a node with its keys, nested nodes first (hydra's instantiate).

    Args:
        node: a node of a composed configuration.
        **given: what no file can hold, such as ``rngs=nnx.Rngs(0)``.

    Raises:
        ConfigError: a constructor refused a value; the text is the constructor's.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        raise _cause(error, node) from error


def _cause(error: Exception, node: Mapping[str, Any]) -> Exception:
    """What the user must read: the constructor's own words, or the bug as it is."""
    cause: BaseException = error
    while cause.__cause__ is not None and type(cause).__name__ == "InstantiationException":
        cause = cause.__cause__
    target = node.get("_target_", "") if isinstance(node, Mapping) else ""
    if isinstance(cause, SeqzooError):
        return cause
    if cause is error or isinstance(cause, _REFUSALS):
        return ConfigError(f"{target}: {cause}")
    return cause if isinstance(cause, Exception) else error
