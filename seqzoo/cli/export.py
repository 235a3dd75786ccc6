"""`seqzoo export`: writes a run's model as a Hugging Face checkpoint."""

import argparse
import os
import shlex

from seqzoo.cli.common import add_run_arguments, add_trust_argument, bytes_text, run_path

EPILOG = """examples:
  seqzoo export runs/text_mamba/latest ./my-mamba-hf
  seqzoo export RUN ./my-mamba-hf --step last --dtype bfloat16
  seqzoo export RUN ./my-llama-hf --format llama --force

DIR gets model.safetensors and config.json as transformers has them for Mamba (MambaForCausalLM) and
Llama, and tokenizer.json if the run was imported with one. Models whose every layer is `mamba`, or
`attention` with `swiglu`, have these forms; others are refused, and their checkpoints are Orbax.

In float32 'seqzoo import DIR' gives the same parameters bit by bit. Rows that pad the embedding are
no tokens and stay out. Where a run kept a moving average of its weights, that is what is written.
Nothing is replaced without --force, and a write that fails leaves no file behind.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("folder", metavar="DIR", help="the checkpoint's folder; made if need be")
    parser.add_argument("--step", default="best", help="best, last, or a number (best)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights in the file (float32)",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="mamba or llama, and no other (what the model is)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    path = run_path(args.run)
    from seqzoo.convert.export import export_run  # starts jax

    written = export_run(
        path,
        args.folder,
        step=args.step,
        dtype=args.dtype,
        format=args.format,
        force=args.force,
        trust=args.trust,
    )
    print(f"step {written.step} as {written.format.architecture}, {args.dtype}:\n")
    for file in written.files:
        print(f"  {shlex.quote(os.path.relpath(file))}  {bytes_text(file.stat().st_size)}")
    folder = os.path.relpath(written.files[0].parent)
    print(f"\nnext:\n  seqzoo import {shlex.quote(folder)} --name NAME")
    print(f"  transformers.{written.format.architecture}.from_pretrained({folder!r})")
    return 0
