"""`python -m seqzoo.eval.gpu_models MODEL`: tokens per second of training a published model here.

What `python -m pallas_kernels.gpu_report --only models` runs, a process per model: the real train
step (bfloat16, random tokens) with the kernels that dispatch takes, then with the portable forms.
Prints rows of the report as lines of JSON.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator

from pallas_kernels.core.on_gpu.result import Result

_TEXT = ("data=stdlib_text", "task=next_token")
_MASKED = ("data=masked_stdlib_text", "task=masked_tokens")
# Overrides, rows, tokens of a row.
MODELS = {
    "mamba_130m": (_TEXT, 8, 2048),
    "based_360m": (_TEXT, 8, 2048),
    "mom_340m": (_TEXT, 8, 2048),
    "titans_mag_340m": (_TEXT, 4, 4096),
    "m2_bert_80m": (_MASKED, 64, 128),
    "tcnca_enwik8": (_TEXT, 4, 4096),
}
_TINY = ("mamba_small", "model.d_model=16", "model.n_layers=1")


def measure(model: str, *, dry: bool) -> Iterator[Result | str]:
    """Seconds of an update, by kernels and by the portable forms."""
    from pallas_kernels.core import dispatch
    from seqzoo.config.compose import compose
    from seqzoo.eval import describe
    from seqzoo.eval.bench._train_step import Trainer

    what, rows, length = MODELS[model]
    named = (f"model={model}", "model.dtype=bfloat16")
    if dry:
        rows, length = 1, 32
        named = (f"model={_TINY[0]}", *_TINY[1:])
    overrides = (*named, *what, f"data.seq_len={length}", f"trainer.global_batch_size={rows}")
    overrides = (*overrides, "mesh.data=1")
    config = compose(overrides)
    flops = describe.flops_per_token(config, length).training * rows * length
    for form in ("kernels", "xla"):
        yield f"{model} by {form}"
        row = Result("models", model, f"{rows} x {length}", "bfloat16", "train step", form)
        row = row._replace(tokens=rows * length, flops=float(flops), matrix=1)
        forced = contextlib.nullcontext() if form == "kernels" else dispatch.forced("xla")
        try:
            with forced:
                vocab = int(config["model"]["vocab_size"])
                trainer = Trainer(overrides, batch=rows, length=length, vocab=min(vocab, 256))
                began = time.perf_counter()
                trainer.start()
                compiling = time.perf_counter() - began
            trainer.update()
            seconds = [_update(trainer) for _ in range(2 if dry else 15)]
        except Exception as error:  # one form that fails is a finding about it alone
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            yield row._replace(status=f"CRASHED: {text[:250]}")
            continue
        yield row._replace(
            seconds=statistics.median(seconds),
            fastest=min(seconds),
            slowest=max(seconds),
            detail=f"compiled in {compiling:.0f} s",
        )


def _update(trainer) -> float:
    began = time.perf_counter()
    trainer.update()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, prints."""
    one = argparse.ArgumentParser(prog="python -m seqzoo.eval.gpu_models", description=__doc__)
    one.add_argument("model", choices=tuple(MODELS))
    one.add_argument("--dry-run", action="store_true")
    args = one.parse_args(arguments)
    try:
        for told in measure(args.model, dry=args.dry_run):
            line = {"doing": told} if isinstance(told, str) else told._asdict()
            print(json.dumps(line), flush=True)
    except ImportError as error:
        row = Result("models", args.model, status=f"missing: {error}")
        print(json.dumps(row._asdict()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
