"""`seqzoo import`: makes a run from a Hugging Face checkpoint."""

import argparse
import os
import re
import shlex

from seqzoo.errors import ConfigError

EPILOG = """examples:
  seqzoo import ~/models/mamba-130m-hf --name mamba-130m
  seqzoo import ./mamba-130m-hf --name mamba-130m data=tokens data.path=pile.npy
  seqzoo import ./mamba-130m-hf --name mamba-130m --dtype bfloat16

The folder holds config.json and model.safetensors (or its shards and their index), as transformers
writes them for Mamba (MambaForCausalLM) and Llama. Every setting is read from config.json, none is
assumed. A pickle (pytorch_model.bin, .pt) is refused: reading one runs the code in it. Nothing is
downloaded. 'seqzoo export' writes such a folder from a run.

The run takes eval, generate, report, export and init_from=RUN@0 'reset=[optimizer]' like any other;
imported with data and trained on other data, 'reset=[optimizer,data]'. Its data is the tokens of
the model's own tokenizer: name an array of them with data.path, here or at eval.
generate takes text if tokenizer.json lies in the folder (pip install 'seqzoo[hf]').
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="the checkpoint's folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="data and task of the run"
    )
    parser.add_argument("--name", required=True, help="the run lies in runs/NAME/")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what layers compute in"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs lie (runs)")
    parser.add_argument(
        "--force", action="store_true", help="import again; the old one moves aside"
    )


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
        raise ConfigError(f"--name {args.name}: letters, digits, '.', '_' and '-' only")
    from seqzoo.convert.run import import_run  # starts jax

    path = import_run(
        args.path, args.name, args.overrides, dtype=args.dtype, root=args.runs, force=args.force
    )
    shown = shlex.quote(os.path.relpath(path))
    print(f"imported into\n\n  {shown}\n\nnext:")
    prompt = '--prompt "..."' if (path / "tokenizer.json").is_file() else "--tokens 1,2,3"
    print(f"  seqzoo generate {shown} {prompt}\n  seqzoo eval {shown} data.path=TOKENS.npy")
    return 0
