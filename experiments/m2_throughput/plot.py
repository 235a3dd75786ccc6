"""Turns what the bench measured into results.csv, and draws it.

seqzoo bench encoder --json > encoder.json
python experiments/m2_throughput/plot.py [encoder.json]      without a file: draws from the CSV
"""

import argparse
import csv
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.csv"
COLUMNS = ("model", "length", "batch", "tokens/s", "of the first", "times attention", "to reach")


def collect(path):
    rows = json.loads(pathlib.Path(path).read_text())["results"]["encoder"]
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw():
    with open(RESULTS) as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for model, colour in {"M2": "C0", "M2, kernels kept": "C2", "attention": "C1"}.items():
        mine = [row for row in rows if row["model"] == model]
        lengths = [int(row["length"]) for row in mine]
        speeds = [float(row["tokens/s"]) for row in mine]
        axes.plot(lengths, speeds, "o-", color=colour, label=model)
    axes.set(xscale="log", yscale="log", xlabel="length of the rows", ylabel="tokens/s, forward")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(HERE / "m2_throughput.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="what the bench printed (--json)")
    args = parser.parse_args()
    if args.file:
        collect(args.file)
    draw()
