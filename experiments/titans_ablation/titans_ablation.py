"""What the parts of a Titans memory are worth: the paper's ablation on recall (contract 6).

    make titans-ablation                                         everything: hours on two cores
    make titans-ablation ARGS="--rows linear,no_decay"
    python experiments/titans_ablation/titans_ablation.py --draw table and plot from results.csv

First the full model is tuned on MQAR of growing difficulty until its accuracy on the valid split
lies between 0.6 and 0.95, where parts can show. There each row is tuned on seed 0 over the same
grid, then five seeds are trained, the same for all: differences are taken seed by seed. Kill it and
start it again: what is finished is found, the rest goes on.
"""

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from seqzoo.eval import protocol

HERE = pathlib.Path(__file__).parent
FULL = "full"
MODELS = {
    FULL: "titans_lmm_small",
    "linear": "titans_lmm_linear_small",
    "no_conv": "titans_lmm_no_conv_small",
    "no_momentum": "titans_lmm_no_momentum_small",
    "no_decay": "titans_lmm_no_decay_small",
    "no_persistent": "titans_lmm_no_persistent_small",
}
# What the paper lost without each part (arXiv 2501.00663, its ablation table): perplexity, and
# points of long-context accuracy out of 92.68.
PAPER = {
    FULL: (0.0, 0.0),
    "linear": (1.48, 7.34),
    "no_conv": (1.72, 2.40),
    "no_momentum": (1.97, 5.56),
    "no_decay": (2.03, 7.08),
    "no_persistent": (0.62, 0.19),
}
# Lengths and pairs, easiest first.
LADDER = ((64, 4), (64, 6), (64, 8), (128, 8), (128, 16))
BETWEEN = (0.6, 0.95)


def train(row: str, rung: tuple[int, int], rate: float, seed: int) -> dict[str, object]:
    """Trains, or finds what is there."""
    return protocol.train(
        [
            "experiment=titans_ablation",
            f"model={MODELS[row]}",
            f"data.seq_len={rung[0]}",
            f"data.num_kv_pairs={rung[1]}",
            f"optimizer.lr={rate:g}",
            f"trainer.seed={seed}",
        ]
    )


def tuned(row: str, rung: tuple[int, int]) -> tuple[float, int]:
    return protocol.tuned(lambda rate: protocol.rank(train(row, rung, rate, 0)))


def difficulty() -> tuple[int, int]:
    """The first rung at which the full model, tuned, is neither lost nor done."""
    seen = {}
    for rung in LADDER:
        rate, _ = tuned(FULL, rung)
        seen[rung] = train(FULL, rung, rate, 0)["valid"]
        if BETWEEN[0] <= seen[rung] <= BETWEEN[1]:
            return rung
        if seen[rung] < BETWEEN[0]:
            break  # the next are harder
    raise SystemExit(f"no rung of LADDER has the full model within {BETWEEN}: {seen}")


def measure(row: str, rung: tuple[int, int], full: list[float] | None) -> dict[str, object]:
    """One line of the table; `full` holds the full model's accuracies by seed."""
    rate, tried = tuned(row, rung)
    runs = [train(row, rung, rate, seed) for seed in protocol.SEEDS]
    values = [run["test"] for run in runs]
    lost = [a - b for a, b in zip(values if full is None else full, values, strict=True)]
    of_lost = {f"lost_{name}": value for name, value in protocol.summary(lost).items()}
    ppl, long_context = PAPER[row]
    return {
        "row": row,
        "seq_len": rung[0],
        "num_kv_pairs": rung[1],
        "lr": rate,
        "rates_tried": tried,
        "seeds": len(runs),
        "diverged": sum(run["diverged"] for run in runs),
        "values": " ".join(f"{value:.4f}" for value in values),
        **protocol.summary(values),
        **of_lost,
        "paper_ppl": ppl,
        "paper_long_context": long_context,
    }


def order(lines: list[dict], key: str) -> str:
    """Rows by what was lost without their part, most first."""
    parts = [line for line in lines if line["row"] != FULL]
    return " > ".join(n["row"] for n in sorted(parts, key=lambda n: -float(n[key])))


def table(lines: list[dict]) -> str:
    text = [
        "| row | lr | accuracy (min - max) | lost by seed | 95 % | paper: ppl | long context |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in lines:
        cells = [
            n["row"],
            n["lr"],
            f"{float(n['median']):.3f} ({float(n['low']):.3f} - {float(n['high']):.3f})",
            f"{float(n['lost_median']):+.3f}",
            f"{float(n['lost_ci_low']):+.3f} to {float(n['lost_ci_high']):+.3f}",
            f"+{float(n['paper_ppl']):.2f}",
            f"-{float(n['paper_long_context']):.2f}",
        ]
        text.append("| " + " | ".join(map(str, cells)) + " |")
    text += [
        "",
        f"most lost first: {order(lines, 'lost_median')}",
        f"paper, perplexity: {order(lines, 'paper_ppl')}",
        f"paper, long context: {order(lines, 'paper_long_context')}",
    ]
    return "\n".join(text)


def draw(lines: list[dict]) -> None:
    parts = [line for line in lines if line["row"] != FULL]
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for place, n in enumerate(parts):
        low, middle, high = (float(n[f"lost_{k}"]) for k in ("ci_low", "median", "ci_high"))
        axis.plot([low, high], [place, place], color="#0072B2", lw=2)
        axis.plot([middle], [place], "o", color="#0072B2")
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(range(len(parts)), [n["row"] for n in parts])
    axis.set_xlabel("accuracy lost against the full model: median and 95 % over paired seeds")
    figure.savefig(HERE / "ablation.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(MODELS), help="rows, by comma")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    rows = [FULL, *(row for row in args.rows.split(",") if row != FULL)]
    for name in rows:
        if name not in MODELS:
            parser.error(f"there is no row '{name}'; there are {', '.join(MODELS)}")
    file = HERE / "results.csv"
    if not args.draw:
        rung, full = difficulty(), None
        for row in rows:
            new = measure(row, rung, full)
            full = [float(value) for value in new["values"].split()] if row == FULL else full
            # Read now: another process may have added rows meanwhile.
            lines = [line for line in protocol.read(file) if line["row"] != row] + [new]
            lines.sort(key=lambda line: list(MODELS).index(line["row"]))
            protocol.write(lines, file)
            draw(lines)
    lines = protocol.read(file)
    if not lines:
        parser.error("there is no results.csv yet: run it without --draw first")
    draw(lines)
    print(table(lines))


if __name__ == "__main__":
    main()
