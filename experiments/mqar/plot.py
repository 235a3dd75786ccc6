"""Collects runs into curves.csv and results.csv, and draws them beside the baselines.

python experiments/mqar/plot.py [RUN ...]     with runs: collects first; without: draws from the CSV
"""

import argparse
import csv
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from seqzoo.eval import records

HERE = pathlib.Path(__file__).parent
BASELINES = {"noise ceiling": 0.9904, "a value of the context, guessed": 0.25}


def collect(runs):
    """The valid curve of each run over steps, and what it reached."""
    curves, results = [], []
    for run in runs:
        model = "+".join(dict.fromkeys(run.config["model"]["pattern"]))
        std = run.config["model"].get("embed_std", 0.02)
        model += "" if std == 0.02 else f", embeddings of {std:g}"
        steps, values = records.series(run.metrics)["valid/accuracy"]
        for step, value in zip(steps, values, strict=True):
            curves.append(dict(model=model, seed=run.seed, step=step, accuracy=round(value, 4)))
        results.append(
            dict(
                model=model,
                seed=run.seed,
                steps=run.status["step"],
                seconds=round(run.timing[-1]["seconds"], 1) if run.timing else "",
                valid_accuracy=round(run.metric["value"], 4),
                test_accuracy=round(run.tested["accuracy"], 4),
            )
        )
    write("curves.csv", curves)
    write("results.csv", results)


def write(name, rows):
    with open(HERE / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw():
    with open(HERE / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = {}
    for model, seed in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["seed"]) == (model, seed)]
        first = model not in colours
        (line,) = axes.plot(
            [int(row["step"]) for row in mine],
            [float(row["accuracy"]) for row in mine],
            color=colours.get(model),
            label=model if first else None,
            marker=".",
        )
        colours.setdefault(model, line.get_color())
    for name, value in BASELINES.items():
        axes.axhline(value, color="0.6", lw=0.8, ls="--")
        axes.text(100, value, name, va="bottom", fontsize=7, color="0.4")
    axes.set(xscale="log", xlabel="steps of 64 rows", ylabel="accuracy (valid)", ylim=(0, 1.05))
    axes.legend(fontsize=8, loc="center right")
    figure.savefig(HERE / "accuracy.png", dpi=130)


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
