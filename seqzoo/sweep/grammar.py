"""Words of a sweep, read by Hydra's override parser; a caret stands under what it cannot read.

optimizer.lr=tag(log,interval(1e-4,1e-2))
optimizer.weight_decay=0,0.1 if optimizer=adamw
"""

import dataclasses
import re

from antlr4 import CommonTokenStream, InputStream
from antlr4.error.ErrorListener import ErrorListener
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from seqzoo.config.compose import with_home
from seqzoo.errors import ConfigError

_IF = re.compile(r"\s+if\s+")
_HELP = (
    "A space is a,b,c or choice(a,b), range(1,9,2), interval(0,1), tag(log,interval(1e-4,1e-2)), "
    "int(interval(1,8)); behind it may stand ' if KEY=VALUE'. Quote words that hold brackets or "
    "spaces"
)


@dataclasses.dataclass(frozen=True)
class Condition:
    """A word counts only where the setting `key` has one of these values."""

    key: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"


@dataclasses.dataclass(frozen=True)
class Word:
    """One word of a command line.

    Attributes:
        text: as typed.
        override: Hydra's reading of it, without its condition.
        when: its condition; None = always.
    """

    text: str
    override: Override
    when: Condition | None

    @property
    def key(self) -> str:
        """With a leading + where it was typed so."""
        return self.override.get_key_element()

    @property
    def setting(self) -> str:
        """The setting that it is about."""
        return self.key.lstrip("+~")


def read(text: str) -> Word:
    """Reads one word.

    Raises:
        ConfigError: it is none; a caret stands under the spot.
    """
    parts = _IF.split(text.strip())
    if len(parts) > 2:
        at = [found.start() for found in _IF.finditer(text)][1] + 1
        raise ConfigError(_shown(text, at, "one condition is enough: list values, 'if KEY=A,B'"))
    override = _parse(parts[0], text, 0)
    if len(parts) == 1:
        return Word(text, override, None)
    condition = _parse(parts[1], text, len(text) - len(parts[1]))
    if condition.is_sweep_override() and not condition.is_choice_sweep():
        raise ConfigError(_shown(text, text.index(parts[1]), "a condition lists values: KEY=A,B"))
    return Word(text, override, Condition(condition.get_key_element().lstrip("+"), _all(condition)))


def element_texts(override: Override) -> tuple[str, ...]:
    """The values of a choice as they are written behind `=`."""
    return tuple(override.sweep_string_iterator())


def caret(text: str, part: str, why: str) -> ConfigError:
    """An error with a caret under a part of a word."""
    return ConfigError(_shown(text, max(text.find(part), 0), why))


def _all(override: Override) -> tuple[str, ...]:
    if override.is_sweep_override():
        return element_texts(override)
    return (override.get_value_element_as_str(),)


def _parse(part: str, text: str, offset: int) -> Override:
    if "=" not in part and not part.startswith("~"):
        raise ConfigError(
            _shown(text, offset + len(part), "a word is KEY=VALUE, as in optimizer.lr=1e-3,3e-3")
        )
    key, equals, value = part.partition("=")
    try:
        return OverridesParser.create().parse_overrides([key + equals + with_home(value)])[0]
    except HydraException as error:
        column, why = _spot(part, error)
        raise ConfigError(_shown(text, offset + column, f"{why}\n  {_HELP}")) from error


def _spot(part: str, error: HydraException) -> tuple[int, str]:
    """Where and why: by the grammar, else by the call that failed."""
    listener = _Listener()
    lexer = OverrideLexer(InputStream(part))
    lexer.removeErrorListeners()
    lexer.addErrorListener(listener)
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(listener)
    parser.override()
    if listener.column is not None:
        if listener.column >= len(part):
            return len(part), "the word ends here, and something is missing"
        return listener.column, f"'{part[listener.column :]}' is not understood here"
    lines = [line.strip() for line in str(error).splitlines() if "hydra.cc" not in line]
    told = [line for line in lines if line and not line.startswith("Available")]
    why = told[-1].split(": ", 1)[-1] if told else "it is not understood"
    call = re.search(r"(?:evaluating|function) '(.*)'", told[-1]) if told else None
    place = part.find(call[1]) if call else -1
    if place < 0:  # Hydra writes the call anew, its spaces and quotes not as they were typed
        name = re.match(r"\w+", call[1]) if call else None
        place = part.find(name[0]) if name else part.index("=") + 1
    return max(place, 0), why


class _Listener(ErrorListener):
    """Remembers the first place that the grammar does not allow."""

    def __init__(self) -> None:
        self.column: int | None = None

    def syntaxError(self, recognizer, offendingSymbol, line, column, msg, e) -> None:
        if self.column is None:
            self.column = column


def _shown(text: str, column: int, why: str) -> str:
    return f"a word of the sweep cannot be read:\n  {text}\n  {' ' * column}^ {why}"
