"""Turns what the bench measured into results.csv, and draws it.

seqzoo bench dilated_conv --json > dilated_conv.json
python experiments/dilated_conv/plot.py [dilated_conv.json]      without a file: draws from the CSV
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
    *("form", "length", "batch", "width", "field", "levels", "what", "ms", "temporaries MB"),
    *("floor ms", "times faster", "than"),
)
COLOURS = {
    "stack, 16 taps": "C3",
    "stack, 8 taps": "C4",
    "average, fft": "C0",
    "average, monarch": "C1",
    "average, scan": "C2",
}
WHATS = ("forward", "forward + gradients")


def collect(path):
    rows = json.loads(pathlib.Path(path).read_text())["results"]["dilated_conv"]
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def draw():
    with open(RESULTS) as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex=True)
    titles = ("field of 4,096 tokens", "field of the whole row")
    # A row as long as the field belongs to both.
    belongs = (lambda r: int(r["field"]) == 4096, lambda r: r["field"] == r["length"])
    for line, what in zip(axes, WHATS, strict=True):
        for plot, title, mine in zip(line, titles, belongs, strict=True):
            for form, colour in COLOURS.items():
                points = sorted(
                    {
                        (int(r["length"]), float(r["ms"]))
                        for r in rows
                        if (r["form"], r["what"]) == (form, what) and mine(r)
                    }
                )
                plot.plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=form)
            lengths = sorted({int(r["length"]) for r in rows})
            plot.set(xscale="log", yscale="log", ylabel="ms")
            plot.set_xticks(lengths, [f"{n:,}" for n in lengths])
            plot.minorticks_off()
            plot.set_title(f"{what}, {title}", fontsize=10)
    for plot in axes[-1]:
        plot.set_xlabel("length (equal tokens per call)")
    axes[0][0].legend(fontsize=8)
    figure.savefig(HERE / "dilated_conv.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="what the bench printed (--json)")
    args = parser.parse_args()
    if args.file:
        collect(args.file)
    draw()
