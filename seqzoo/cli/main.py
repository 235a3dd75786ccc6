"""The `seqzoo` command. Loads the one command that was asked for, and prints errors as advice."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from seqzoo.allocator import keep_freed_memory
from seqzoo.errors import SeqzooError, suggest

# Command: (module, one line). The modules stay unloaded until called: help is instant.
COMMANDS = {
    "train": ("seqzoo.cli.train", "train a model, or go on with a run"),
    "sweep": ("seqzoo.cli.sweep", "search settings by many runs, with workers that may die"),
    "eval": ("seqzoo.cli.eval", "evaluate a run on its test split, or on other data"),
    "generate": ("seqzoo.cli.generate", "continue a prompt with a trained language model"),
    "report": ("seqzoo.cli.report", "plots and tables of runs, as PNG, HTML and CSV"),
    "show": ("seqzoo.cli.show", "what a configuration is: keys, parameters, state, FLOPs, memory"),
    "runs": ("seqzoo.cli.runs", "list the runs here"),
    "diff": ("seqzoo.cli.diff", "what differs between two runs"),
    "doctor": ("seqzoo.cli.doctor", "devices, versions, and which implementations serve here"),
    "check": ("seqzoo.cli.check", "test a mixer class, yours or ours, against the contract"),
    "bench": ("seqzoo.cli.bench", "measure operators and the train loop on this machine"),
    "import": ("seqzoo.cli.import_", "make a run from a Hugging Face checkpoint (Mamba, Llama)"),
    "export": ("seqzoo.cli.export", "write a run's model as a Hugging Face checkpoint"),
}

EPILOG = """examples:
  seqzoo train                                        the default experiment, to its target
  seqzoo train model=mamba_small optimizer.lr=3e-3
  seqzoo train model.pattern='[mamba,mamba,attention]' model.n_layers=6
  seqzoo train experiment=text_mamba
  seqzoo train -m optimizer.lr=1e-3,3e-3 trainer.seed=1,2,3
  seqzoo sweep mixer=mamba,based 'optimizer.lr=tag(log,interval(1e-4,1e-2))' sweep.n_trials=24
  seqzoo show model=mamba_130m
  seqzoo eval runs/mqar/latest
  seqzoo generate runs/text_mamba/latest --prompt "def "

'seqzoo COMMAND --help' has more. Settings are key=value; docs/keys.md lists them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    try:
        return _command(words)
    except SeqzooError as error:
        print(f"error: {error}", file=sys.stderr)
        if os.environ.get("SEQZOO_DEBUG"):
            raise
        return error.exit_code
    except BrokenPipeError:  # `seqzoo runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"seqzoo {version('seqzoo')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"error: there is no command '{name}'{suggest(name, COMMANDS)}; "
            f"there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"seqzoo {name}",
        description=COMMANDS[name][1],
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_intermixed_args(rest)) or 0


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: seqzoo COMMAND ... (seqzoo COMMAND --help says more)",
            "",
            "Train, sweep and evaluate subquadratic sequence architectures from config files.",
            "",
            "commands:",
            *lines,
            "",
            EPILOG,
        ]
    )


if __name__ == "__main__":
    # A shell's exit code is what `main` returns; SEQZOO_DEBUG=1 shows tracebacks.
    sys.exit(main())
