"""Collects runs into curves.csv, and draws them beside the baselines.

python experiments/text/plot.py [RUN ...]     with runs: collects first; without: draws from the CSV
"""

import argparse
import csv
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from seqzoo.eval import records

HERE = pathlib.Path(__file__).parent
CURVES = HERE / "curves.csv"
COLUMNS = ("model", "minutes", "step", "tokens", "valid_bits_per_byte", "test_bits_per_byte")


def collect(runs):
    """The valid curve of each run over minutes and tokens, and its test figure at the end."""
    rows = []
    for run in runs:
        model = "+".join(dict.fromkeys(run.config["model"]["pattern"]))
        model += f", {run.config['trainer']['steps']:,} steps"
        per_step = run.config["trainer"]["global_batch_size"] * run.config["data"]["seq_len"]
        elapsed = minutes(run)
        steps, values = records.series(run.metrics)["valid/bits_per_byte"]
        for step, value in zip(steps, values, strict=True):
            test = run.tested["bits_per_byte"] if step == run.status["step"] else ""
            row = (model, round(elapsed(step), 2), step, step * per_step, round(value, 4), test)
            rows.append(dict(zip(COLUMNS, row, strict=True)))
    with open(CURVES, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def minutes(run):
    """Minutes of training up to a step: what a start lost when it was stopped is counted out."""
    lines = run.timing
    begins = {
        a: min(x["step"] for x in lines if x["attempt"] == a) for a in {x["attempt"] for x in lines}
    }

    def elapsed(step):
        total = 0.0
        for attempt in sorted(begins):
            until = min([step] + [begins[a] - 1 for a in begins if a > attempt])
            seen = [x["seconds"] for x in lines if x["attempt"] == attempt and x["step"] <= until]
            total += max(seen, default=0.0)
        return total / 60

    return elapsed


def draw():
    with open(CURVES) as file:
        rows = list(csv.DictReader(file))
    with open(HERE / "baselines.csv") as file:
        baselines = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        x = [int(row["tokens"]) / 1e6 for row in mine]
        (line,) = axes.plot(x, [float(r["valid_bits_per_byte"]) for r in mine], label=model)
        test = mine[-1]["test_bits_per_byte"]
        if test:
            axes.plot(x[-1:], [float(test)], "o", color=line.get_color(), label=f"{model}, test")
    for row in baselines:
        value = float(row["bits_per_byte"])
        axes.axhline(value, color="0.6", lw=0.8, ls="--")
        axes.text(0, value, f" {row['baseline']} (test)", va="bottom", fontsize=7, color="0.4")
    axes.set(xlabel="million bytes read", ylabel="bits per byte", xlim=(0, None), ylim=(1.35, 2.6))
    axes.legend(fontsize=8)
    figure.savefig(HERE / "bits_per_byte.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    args = parser.parse_args()
    if args.runs:
        runs = records.finished(args.runs) or parser.error("none of these is a finished run")
        collect(runs)
    draw()
