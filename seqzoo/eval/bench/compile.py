"""What compiling costs: flat in depth, once for a sweep of learning rates and seeds."""

import contextlib
import time
from collections.abc import Iterator

import jax

from seqzoo.eval.bench._train_step import BATCH, LENGTH, MAMBA, VOCAB, Trainer

# 32 layers of full width would be slow to run; compiling asks for shapes only.
_SMALL = ("model.d_model=64", "data.seq_len=64")
_COMPILED = "/jax/core/compile/backend_compile_duration"


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: lines of StableHLO and seconds at two depths; compilations of a sweep."""
    rows = []
    for layers in (4, 32):
        overrides = (*MAMBA, f"model.n_layers={layers}")
        if quick:
            overrides = (*overrides, *_SMALL)
        lowered = lower(overrides)
        started = time.perf_counter()
        lowered.compile()
        rows.append(
            {
                "bench": "compile",
                "case": f"train step, {layers} layers",
                "lines": lines_of(lowered),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    rows[1]["lines against 4 layers"] = f"{rows[1]['lines'] / rows[0]['lines'] - 1:+.1%}"
    rows[1]["to reach"] = "within 5 %"
    rates, seeds = (1e-3, 3e-3, 1e-2), (0, 1, 2)
    steps, others = sweep_compilations(rates, seeds)
    rows.append(
        {
            "bench": "compile",
            "case": "3 learning rates x 3 seeds",
            "train steps compiled": steps,
            "other programs after the first run": others,
            "to reach": "1",
        }
    )
    return rows


def lower(overrides):
    """The train step of a configuration, traced and not yet compiled."""
    length = 64 if "data.seq_len=64" in overrides else LENGTH
    return Trainer(overrides, batch=BATCH, length=length, vocab=VOCAB).lowered()


def lines_of(lowered) -> int:
    """Lines of its StableHLO."""
    return len(lowered.as_text().splitlines())


def sweep_compilations(rates, seeds) -> tuple[int, int]:
    """Trains one update of every combination; counts train steps compiled, and what else was."""
    overrides = (*MAMBA, *_SMALL, "model.n_layers=2")
    with compilations() as names:
        after_first = None
        for rate in rates:
            for seed in seeds:
                words = (*overrides, f"optimizer.lr={rate}", f"trainer.seed={seed}")
                trainer = Trainer(words, batch=BATCH, length=64, vocab=VOCAB)
                trainer.start()
                trainer.update()
                after_first = len(names) if after_first is None else after_first
        steps = sum("step" in name for name in names)
        return steps, sum("step" not in name for name in names[after_first:])


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of programs that are compiled inside, by jax.monitoring's events."""
    names: list[str] = []
    active = True

    def listen(event: str, seconds: float, **more) -> None:
        if active and event == _COMPILED:
            names.append(str(more.get("fun_name")))

    # A listener cannot be taken away by a public call; it falls silent instead.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        active = False
