"""The recall frontier: accuracy against decoding state, tuned alike, five fresh seeds (contract 6).

    make frontier                                    everything: some five hours on two cores
    make frontier ARGS="--rows based,mom --sizes small"
    python experiments/recall_frontier/frontier.py --draw        the plot from results.csv

Each row is tuned on seed 0 over the same grid of learning rates (a best value at an edge widens
it), chosen on the valid split; then five fresh seeds are trained and tested. Kill it and start it
again: finished runs are found by their configuration, the one in hand goes on.
"""

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from seqzoo.config.compose import compose
from seqzoo.eval import describe, protocol
from seqzoo.eval.compare import TOLERANCES, spread

HERE = pathlib.Path(__file__).parent

# What each mixer is at each size: settings below model.mixers.NAME. All have one layer of it
# behind a gated short convolution, as in BASED's study; matched on the bytes that decoding keeps.
SIZES = ("small", "medium", "large")
ROWS: dict[str, dict[str, dict[str, object]]] = {
    row: dict(zip(SIZES, settings, strict=True))
    for row, settings in dict(
        based=[
            dict(init_std="null", n_heads=h, feature_dim=k, head_dim=v)
            for h, k, v in ((1, 8, 44), (1, 16, 52), (4, 16, 52))
        ],
        mom=[dict(init_gain=1.0, n_heads=1, head_dim=k) for k in (16, 36, 76)],
        gated_deltanet=[
            dict(init_gain=1.0, n_heads=1, head_dim=k, expand_v=1.0) for k in (41, 86, 176)
        ],
        attention=[dict(n_heads=1, head_dim=k) for k in (4, 16, 64)],
        gla=[
            dict(n_heads=1, expand_k=k, expand_v=v) for k, v in ((0.5, 1.0), (2.0, 1.0), (4.0, 2.0))
        ],
        mamba=[dict(d_state=n) for n in (13, 61, 253)],
        mamba2=[dict(d_state=n) for n in (12, 58, 242)],
        sliding_window_attention=[dict(n_heads=1, window=w) for w in (16, 64, 256)],
    ).items()
}


def overrides(row: str, size: str, rate: float, seed: int) -> list[str]:
    """The run's command line."""
    settings = [f"model.mixers.{row}.{key}={value}" for key, value in ROWS[row][size].items()]
    return [
        "experiment=recall_frontier",
        f"model.pattern=[base_conv,{row}]",
        "model.mixers.base_conv.form=zoology",
        "model.mixers.base_conv.init_std=null",
        *settings,
        f"optimizer.lr={rate:g}",
        f"trainer.seed={seed}",
    ]


def train(row: str, size: str, rate: float, seed: int) -> dict[str, object]:
    """Trains, or finds what is there; a run that diverged counts as worst."""
    return protocol.train(overrides(row, size, rate, seed))


def measure(row: str, size: str) -> dict[str, object]:
    """One line of the table."""
    rate, tried = protocol.tuned(lambda rate: protocol.rank(train(row, size, rate, 0)))
    runs = [train(row, size, rate, seed) for seed in protocol.SEEDS]
    values = [run["test"] for run in runs]
    return {
        **state(row, size),
        "lr": rate,
        "rates_tried": tried,
        "seeds": len(protocol.SEEDS),
        **protocol.summary(values),
        "solved": protocol.solved(values),
        "diverged": sum(run["diverged"] for run in runs),
    }


def state(row: str, size: str) -> dict[str, object]:
    """Sizes of a model, without training it."""
    config = compose(overrides(row, size, protocol.RATES[0], 0))
    model = describe.abstract_model(config["model"])
    kept = model.state_bytes(config["data"]["seq_len"])
    return dict(
        mixer=row,
        size=size,
        state_recurrent=kept["recurrent"],
        state_total=kept["total"],
        parameters=describe.parameters(model).without_embeddings,
    )


def check_matched(rows, sizes) -> None:
    """Says where rows of one size keep different amounts."""
    for size in sizes:
        kept = {row: state(row, size)["state_total"] for row in rows if size in ROWS[row]}
        if kept and spread(list(kept.values())) > TOLERANCES["state bytes"]:
            print(f"NOT MATCHED at {size}: {kept}")


def write(found: dict[tuple[str, str], dict[str, object]]) -> None:
    lines = [found[row, size] for row in ROWS for size in ROWS[row] if (row, size) in found]
    protocol.write(lines, HERE / "results.csv")


def read() -> dict[tuple[str, str], dict[str, object]]:
    return {(line["mixer"], line["size"]): line for line in protocol.read(HERE / "results.csv")}


def draw(found: dict[tuple[str, str], dict[str, object]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in dict.fromkeys(row for row, _ in found):
        lines = sorted(
            (line for (name, _), line in found.items() if name == row),
            key=lambda line: int(line["state_total"]),
        )
        x = [int(line["state_total"]) / 1024 for line in lines]
        y = [float(line["median"]) for line in lines]
        off = [
            [m - float(line["low"]) for m, line in zip(y, lines, strict=True)],
            [float(line["high"]) - m for m, line in zip(y, lines, strict=True)],
        ]
        axes.errorbar(x, y, yerr=off, marker="o", capsize=3, label=row)
    axes.set(xlabel="decoding state, KiB", ylabel="accuracy (test)", ylim=(0, 1.03))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "frontier.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="mixers, by comma")
    parser.add_argument("--sizes", default=",".join(SIZES), help="sizes, by comma")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    rows, sizes = args.rows.split(","), args.sizes.split(",")
    for what, asked, there in (("row", rows, ROWS), ("size", sizes, SIZES)):
        for name in asked:
            if name not in there:
                parser.error(f"there is no {what} '{name}'; there are {', '.join(there)}")
    found = read()
    if not args.draw:
        check_matched(rows, sizes)
        for size in sizes:
            for row in rows:
                new = measure(row, size)
                # Read now: another process may have added rows meanwhile.
                found = read() | {(row, size): new}
                write(found)
                draw(found)
    elif not found:
        parser.error("there is no results.csv yet: run it without --draw first")
    else:
        draw(found)


if __name__ == "__main__":
    main()
