"""Turns what the bench measured into results.csv, and draws it.

seqzoo bench generation --json > generation.json
python experiments/generation/plot.py [generation.json]      without a file: draws from the CSV
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
COLUMNS = (
    *("model", "batch", "case", "tokens/s", "ms/step", "floor ms", "by floor", "read GB/s"),
    *("measured", "unit", "to reach"),
)
COLOURS = {"BASED": "C0", "attention": "C1"}
STEP = "a step at context "


def collect(path):
    rows = json.loads(pathlib.Path(path).read_text())["results"]["generation"]
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw():
    with open(RESULTS) as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for model, colour in COLOURS.items():
        written = [r for r in rows if r["model"] == model and r["case"].endswith(" tokens")]
        batches = [int(row["batch"]) for row in written]
        left.plot(
            batches, [float(row["tokens/s"]) for row in written], "o-", color=colour, label=model
        )
        floor = [1e3 * b / float(row["floor ms"]) for b, row in zip(batches, written, strict=True)]
        left.plot(batches, floor, ":", color=colour, lw=1, label=f"{model}: memory's floor")
    left.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s", xticks=batches)
    left.set_xticks(batches, batches)
    left.minorticks_off()
    left.set_title(f"writing {written[0]['case']}", fontsize=10)
    left.legend(fontsize=8)

    batches = sorted({int(row["batch"]) for row in rows if row["case"].startswith(STEP)})
    for batch, style in zip(batches, ("-", "--", ":"), strict=False):
        mine = [row for row in rows if row["batch"] == str(batch)]
        steps = [row for row in mine if row["case"].startswith(STEP)]
        contexts = [int(row["case"].removeprefix(STEP).replace(",", "")) for row in steps]
        times = [float(row["ms/step"]) for row in steps]
        right.plot(contexts, times, style, marker="o", ms=4, color=COLOURS["attention"])
        (flat,) = (float(r["ms/step"]) for r in mine if r["case"] == "a step at any context")
        right.plot(contexts, [flat] * len(contexts), style, color=COLOURS["BASED"])
        right.text(contexts[-1], times[-1], f" batch {batch}", va="bottom", ha="right", fontsize=8)
        (cross,) = (float(r["measured"]) for r in mine if r["case"].startswith("context where"))
        if contexts[0] < cross < contexts[-1]:
            right.plot([cross], [flat], "*", color="black", ms=10, zorder=3)
    right.set(xscale="log", yscale="log", xlabel="context", ylabel="ms per step")
    right.set_xticks(contexts, contexts)
    right.minorticks_off()
    right.set_title("a step by context; stars: the lines cross", fontsize=10)
    figure.savefig(HERE / "generation.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="what the bench printed (--json)")
    args = parser.parse_args()
    if args.file:
        collect(args.file)
    draw()
