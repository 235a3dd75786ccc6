"""Between text and the tokens of a run: bytes, or a tokenizer's file."""

import codecs
import pathlib
from typing import Protocol

from seqzoo.errors import ConfigError
from seqzoo.train.run_files import read_json


class Codec(Protocol):
    """Turns text into tokens and back.

    Attributes:
        end: the token that ends a document; None = there is none.
    """

    end: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, from the start of a document."""

    def decoder(self) -> "Decoder": ...


class Decoder(Protocol):
    """Turns a stream of tokens into text as it comes."""

    def feed(self, tokens: list[int], *, last: bool = False) -> str: ...


class Bytes:
    """One token per byte; 0 stands before and after each document (seqzoo.data.text)."""

    end = 0

    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]

    def decoder(self) -> Decoder:
        return _Utf8()


class _Utf8:
    def __init__(self):
        # A character may be cut by the end of what was read so far.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: list[int], *, last: bool = False) -> str:
        return self._decoder.decode(bytes(t for t in tokens if 0 < t < 256), last)


class Tokenizer:
    """A tokenizer.json, read by the `tokenizers` package (the hf extra).

    Args:
        file: the JSON file.
        end: the token that ends a document.

    Raises:
        ConfigError: the package is not installed, or cannot read the file.
    """

    def __init__(self, file: pathlib.Path, *, end: int | None = None):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ConfigError(
                f"{file} needs the tokenizers package: pip install 'seqzoo[hf]', or give the "
                "prompt as numbers with --tokens"
            ) from None
        try:
            self._library = Library.from_file(str(file))
        except Exception as error:  # it raises bare Exception
            raise ConfigError(f"{file} is no tokenizer: {error}") from error
        self.end = end

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text).ids

    def decoder(self) -> Decoder:
        return _Whole(self._library)


class _Whole:
    """Decodes all tokens so far and gives what is new: a token alone may be half a character."""

    def __init__(self, library):
        self._library, self._tokens, self._given = library, [], ""

    def feed(self, tokens: list[int], *, last: bool = False) -> str:
        self._tokens += tokens
        text = self._library.decode(self._tokens)
        if not last:
            text = text.rstrip("\ufffd")
        new, self._given = text[len(self._given) :], text
        return new


class Numbers:
    """Tokens that stand for nothing: shown as they are.

    Args:
        end: the token that ends a document.
    """

    def __init__(self, *, end: int | None = None):
        self.end = end

    def encode(self, text: str) -> list[int]:
        raise ConfigError("the tokens of this run are no text: give the prompt with --tokens 1,2,3")

    def decoder(self) -> Decoder:
        return _Spaced()


class _Spaced:
    def feed(self, tokens: list[int], *, last: bool = False) -> str:
        return "".join(f"{token} " for token in tokens)


def codec_of(path: pathlib.Path, data, *, with_text: bool = True) -> Codec:
    """Returns the codec of a run: its folder's tokenizer.json, or bytes where its data is bytes.

    Args:
        path: the run folder.
        data: its data set; None = unknown.
        with_text: whether text must be encoded; numbers do without a tokenizer's package.
    """
    end = _end(path, data)
    if (path / "tokenizer.json").is_file():
        try:
            return Tokenizer(path / "tokenizer.json", end=end)
        except ConfigError:
            if with_text:
                raise
            return Numbers(end=end)
    if getattr(data, "bytes_per_token", None) == 1.0:
        return Bytes()
    return Numbers(end=end)


def _end(path: pathlib.Path, data) -> int | None:
    """The token that ends a document: by the data, else by the config.json of an imported run."""
    found = getattr(data, "end_token", None)
    if found is None:
        found = read_json(path / "source_config.json").get("eos_token_id")
    if isinstance(found, list) and found:  # Llama 3 names several; the end of a text is the first
        found = found[0]
    return found if type(found) is int else None
