"""`seqzoo generate`: continues prompts with a trained language model."""

import argparse
import pathlib
import sys

import numpy as np

from seqzoo.cli.common import (
    add_run_arguments,
    add_trust_argument,
    bytes_text,
    print_json,
    run_path,
)
from seqzoo.errors import ConfigError

EPILOG = """examples:
  seqzoo generate runs/text_mamba/latest --prompt "def "
  seqzoo generate RUN --prompt-file start.py --max-new-tokens 2000 --temperature 0.8 --top-p 0.95
  seqzoo generate RUN --prompt "import " --prompt "class " --seed 3
  seqzoo generate RUN --tokens 1,5,7 --temperature 0

The prompt is read in pieces, then text comes token by token: the state that is kept does not grow
with a recurrent model. Rows end at the end of a document unless --no-stop. The same seed writes the
same text. A summary (tokens per second, state) goes to stderr.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    parser.add_argument("--prompt-file", metavar="FILE", help="continue the text of a file")
    parser.add_argument(
        "--tokens", action="append", metavar="1,2,3", help="a prompt as numbers; may be repeated"
    )
    parser.add_argument("-n", "--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="0 = always the likeliest token (1.0)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 = all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep the likeliest that make up this probability"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-stop", action="store_true", help="go on after the end of a document")
    parser.add_argument("--step", default="best", help="best, last, or a number (best)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    path = run_path(args.run)
    from seqzoo.eval.codec import codec_of  # starts jax
    from seqzoo.eval.generate import generate
    from seqzoo.load import load
    from seqzoo.train import programs

    programs.use_disk_cache()
    loaded = load(path, args.step, args.trust)
    if not hasattr(loaded.model, "step"):
        raise ConfigError(f"{args.run} holds a {type(loaded.model).__name__}, which writes no text")
    with_text = bool(args.prompt) or args.prompt_file is not None
    codec = codec_of(path, loaded.data, with_text=with_text)
    prompts = read_prompts(args, codec)
    end = None if args.no_stop else codec.end
    printer = Printer(codec, len(prompts), end=end, shown=args.format == "text")
    printer.begin(prompts)
    try:
        written = generate(
            loaded.model,
            prompts,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            eos=end,
            on_tokens=printer.add,
        )
    except BaseException:
        printer.cut()
        raise
    printer.end()
    read = max(map(len, prompts))
    if args.format == "json":
        print_json(
            {
                "step": loaded.step,
                "rows": [
                    {"tokens": row.tolist(), "text": text}
                    for row, text in zip(written.tokens, printer.texts, strict=True)
                ],
                "tokens_per_second": written.tokens_per_second,
                "prefill_seconds": written.prefill_seconds,
                "compile_seconds": written.compile_seconds,
                "state_bytes": written.state_bytes,
            }
        )
        return 0
    print(
        f"[{read:,} tokens read in {written.prefill_seconds:.2f} s; "
        f"{written.tokens_per_second:,.0f} tokens/s; state {bytes_text(written.state_bytes)}; "
        f"compiled in {written.compile_seconds:.1f} s]",
        file=sys.stderr,
    )
    return 0


def read_prompts(args: argparse.Namespace, codec) -> list[list[int]]:
    """The prompts as tokens.

    Raises:
        ConfigError: there is none, a file cannot be read, or tokens are no numbers.
    """
    prompts = [codec.encode(text) for text in args.prompt or ()]
    if args.prompt_file is not None:
        try:
            text = pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--prompt-file {args.prompt_file} cannot be read: {error}"
            ) from error
        prompts.append(codec.encode(text))
    for words in args.tokens or ():
        try:
            prompts.append([int(word) for word in words.replace(",", " ").split()])
        except ValueError:
            raise ConfigError(f"--tokens {words}: they must be numbers, as in 1,2,3") from None
    if not prompts:
        raise ConfigError('give a prompt: --prompt "text", --prompt-file FILE or --tokens 1,2,3')
    return prompts


class Printer:
    """Text as it comes: one row at once, several one after the other at the end.

    Attributes:
        texts: what each row wrote, once `end` was called.
    """

    def __init__(self, codec, rows: int, *, end: int | None, shown: bool):
        self._codec, self._end, self._shown = codec, end, shown
        self._decoders = [codec.decoder() for _ in range(rows)]
        self._over = [False] * rows
        self.texts = [""] * rows
        self._prompts: list[str] = []

    def begin(self, prompts: list[list[int]]) -> None:
        self._prompts = [self._codec.decoder().feed(list(prompt), last=True) for prompt in prompts]
        if self._shown and len(prompts) == 1:
            print(self._prompts[0], end="", flush=True)

    def add(self, tokens: np.ndarray) -> None:
        for i, row in enumerate(tokens.tolist()):
            if self._over[i]:
                continue
            if self._end in row:
                row = row[: row.index(self._end)]
                self._over[i] = True
            self._show(i, self._decoders[i].feed(row))

    def end(self) -> None:
        for i, decoder in enumerate(self._decoders):
            self._show(i, decoder.feed([], last=True))
        if not self._shown:
            return
        if len(self.texts) == 1:
            print()
            return
        for number, (prompt, text) in enumerate(zip(self._prompts, self.texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")

    def cut(self) -> None:
        """Ends the line, so that an error begins one of its own."""
        if self._shown and len(self.texts) == 1:
            print()

    def _show(self, i: int, text: str) -> None:
        self.texts[i] += text
        if self._shown and len(self.texts) == 1:
            print(text, end="", flush=True)
