"""Passkey: trained at 512 bytes, evaluated at up to 16,384 on a grid of depths (contract 6).

    make passkey                                     everything: some hours on two cores
    make passkey ARGS="--rows titans_mag,mamba"
    python experiments/passkey/passkey.py --draw     table and plots from results.csv

Each row is tuned on seed 0, chosen on the valid split at 512 bytes; then five fresh seeds are
trained. Only rows whose median at 512 bytes is 0.95 are evaluated beyond it. Kill it and start it
again: what is finished is found, the rest goes on.
"""

import argparse
import json
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from seqzoo.config.compose import compose
from seqzoo.eval import describe, protocol
from seqzoo.eval.compare import LEARNED, TOLERANCES
from seqzoo.eval.evaluate import evaluate_run, file_name
from seqzoo.eval.match import solve
from seqzoo.load import load

HERE = pathlib.Path(__file__).parent
TRAINED = 512
LENGTHS = (512, 2048, 8192, 16384)
DEPTHS = (0, 25, 50, 75, 100)
SAMPLES = 20  # per length and depth
CHANCE = 0.1  # one digit of ten

# Row: its model. The inner width of the MLPs makes parameters without embeddings equal.
MODELS = {
    "titans_lmm": "titans_lmm_small",
    "titans_mac": "titans_mac_small",
    "titans_mag": "titans_mag_small",
    "titans_mal": "titans_mal_small",
    "mamba": "mamba_small",
    "gated_deltanet": "gated_deltanet_small",
    "attention": "transformer_small",
}
LARGEST, INNER = "titans_mag", 64  # the row that the others are matched to, and its inner width

# What an evaluation changes: rows are read in chunks, so that memory does not grow with them.
EVALUATION = (
    f"data.test_lengths=[{','.join(map(str, LENGTHS))}]",
    f"data.depths=[{','.join(map(str, DEPTHS))}]",
    f"data.test_samples={SAMPLES}",
    "trainer.eval_batch_size=4",
    "trainer.eval_chunk_length=512",
)


def of_model(row: str, inner: int) -> list[str]:
    """The words that make the model of a row; the experiment puts an MLP behind each mixer."""
    return ["experiment=passkey", f"model={MODELS[row]}", f"model.channel_mixer.d_ff={inner}"]


def parameters(row: str, inner: int) -> int:
    """Without embeddings."""
    model = describe.abstract_model(compose(of_model(row, inner))["model"])
    return describe.parameters(model).without_embeddings


def matched(row: str) -> tuple[int, int]:
    """The inner width with which a row has the parameters of the largest, and how many it has."""
    if row == LARGEST:
        return INNER, parameters(row, INNER)
    tolerance = TOLERANCES["parameters without embeddings"]
    wanted = parameters(LARGEST, INNER)
    found = solve(lambda n: parameters(row, n), wanted, start=INNER, tolerance=tolerance)
    if not found.fits:
        print(f"NOT MATCHED: {row} has {found.reached}, {LARGEST} {wanted}")
    return found.value, int(found.reached)


def train(row: str, inner: int, rate: float, seed: int) -> dict[str, object]:
    """Trains, or finds what is there."""
    settings = [f"optimizer.lr={rate:g}", f"trainer.seed={seed}"]
    return protocol.train([*of_model(row, inner), *settings])


def evaluated(path: pathlib.Path) -> dict[str, float]:
    """Metrics of a run over the grid; computed once."""
    file = path / "report" / file_name("test", EVALUATION)
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["overrides"] == list(EVALUATION):
            return kept["metrics"]
    print(f"-- evaluating {path}", flush=True)
    return evaluate_run(load(path), EVALUATION)["metrics"]


def measure(row: str) -> list[dict[str, object]]:
    """The lines of one row: one per length and depth, or one at 512 where it was not learned."""
    inner, count = matched(row)
    rate, tried = protocol.tuned(lambda rate: protocol.rank(train(row, inner, rate, 0)))
    runs = [train(row, inner, rate, seed) for seed in protocol.SEEDS]
    tests = [run["test"] for run in runs]
    shared = dict(
        mixer=row,
        parameters=count,
        lr=rate,
        rates_tried=tried,
        seeds=len(runs),
        diverged=sum(run["diverged"] for run in runs),
        solved=protocol.solved(tests),
        learned=int(statistics.median(tests) >= LEARNED),
    )
    if not shared["learned"]:
        return [{**shared, "length": TRAINED, "depth": "all", **protocol.summary(tests)}]
    grids = [evaluated(run["path"]) if run["path"] else {} for run in runs]
    lines = []
    for length in LENGTHS:
        names = [f"len_{length}_depth_{depth}" for depth in DEPTHS]
        cells = {
            depth: [grid.get(f"accuracy/{name}", 0.0) for grid in grids]
            for depth, name in zip(DEPTHS, names, strict=True)
        }
        exact = [
            statistics.mean(grid.get(f"exact/{name}", 0.0) for name in names) for grid in grids
        ]
        whole = [statistics.mean(values) for values in zip(*cells.values(), strict=True)]
        lines.append(
            {
                **shared,
                "length": length,
                "depth": "all",
                **protocol.summary(whole),
                "exact": round(statistics.median(exact), 4),
            }
        )
        for depth, values in cells.items():
            lines.append({**shared, "length": length, "depth": depth, **protocol.summary(values)})
    return lines


def draw(lines: list[dict[str, str]]) -> None:
    """A heat map of depth and length per row, and accuracy over length with chance."""
    rows = list(dict.fromkeys(line["mixer"] for line in lines))
    figure, axes = plt.subplots(
        1, len(rows), figsize=(2 + 1.7 * len(rows), 2.8), squeeze=False, layout="constrained"
    )
    image = None
    for one, row in zip(axes[0], rows, strict=True):
        of_row = {(str(n["length"]), str(n["depth"])): n for n in lines if n["mixer"] == row}
        one.set_title(row, fontsize=9)
        if not learned(of_row):
            one.text(0.5, 0.5, "not learned", ha="center", transform=one.transAxes)
            one.set(xticks=[], yticks=[])
            continue
        grid = [[float(of_row[str(n), str(d)]["median"]) for n in LENGTHS] for d in DEPTHS]
        image = one.imshow(grid, vmin=CHANCE, vmax=1, cmap="viridis", aspect="auto")
        one.set_xticks(range(len(LENGTHS)), [f"{n / 1024:g}k" for n in LENGTHS], fontsize=8)
        one.set_yticks(range(len(DEPTHS)), [f"{d} %" for d in DEPTHS], fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=axes[0].tolist())
        bar.set_label(f"accuracy per digit\n(darkest: chance, {CHANCE:g})", fontsize=8)
    figure.supxlabel("bytes of a row")
    figure.supylabel("depth")
    figure.savefig(HERE / "depth.png", dpi=130)

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in rows:
        found = [n for n in lines if n["mixer"] == row and str(n["depth"]) == "all"]
        y = [float(n["median"]) for n in found]
        off = [
            [float(n["median"]) - float(n["low"]) for n in found],
            [float(n["high"]) - float(n["median"]) for n in found],
        ]
        label = row if len(found) > 1 else f"{row}, not learned"
        x = [int(n["length"]) for n in found]
        axis.errorbar(x, y, yerr=off, marker="o", capsize=3, label=label)
    axis.axhline(CHANCE, color="grey", ls=":", label="chance")
    axis.axvline(TRAINED, color="grey", lw=0.8)
    axis.set(xlabel="bytes of a row (trained at the line)", ylabel="accuracy per digit (test)")
    axis.set(ylim=(0, 1.03))
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(HERE / "length.png", dpi=130)


def learned(of_row: dict) -> bool:
    return all(int(line["learned"]) for line in of_row.values())


def table(lines: list[dict[str, str]]) -> str:
    """Markdown: a row per mixer, a column per length."""
    head = [f"{n:,}" for n in LENGTHS]
    text = ["| row | parameters | lr | solved | diverged | " + " | ".join(head) + " |"]
    text.append("|---|---|---|---|---|" + "---|" * len(LENGTHS))
    for row in dict.fromkeys(line["mixer"] for line in lines):
        of_row = [n for n in lines if n["mixer"] == row and str(n["depth"]) == "all"]
        known = {
            int(n["length"]): f"{float(n['median']):.2f} ({float(n['low']):.2f}-"
            f"{float(n['high']):.2f})"
            for n in of_row
        }
        cells = [known.get(n, "not learned") for n in LENGTHS]
        first = of_row[0]
        kept = [row, first["parameters"], first["lr"], first["solved"], first["diverged"], *cells]
        text.append("| " + " | ".join(map(str, kept)) + " |")
    text.append(f"| chance | | | | | {' | '.join([f'{CHANCE:.2f}'] * len(LENGTHS))} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(MODELS), help="mixers, by comma")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    args = parser.parse_args()
    rows = args.rows.split(",")
    for name in rows:
        if name not in MODELS:
            parser.error(f"there is no row '{name}'; there are {', '.join(MODELS)}")
    file = HERE / "results.csv"
    for row in () if args.draw else rows:
        new = measure(row)  # before the file is read: another process may add rows meanwhile
        lines = [line for line in protocol.read(file) if line["mixer"] != row] + new
        lines.sort(key=lambda line: list(MODELS).index(line["mixer"]))
        protocol.write(lines, file)
        draw(lines)
    lines = protocol.read(file)
    if not lines:
        parser.error("there is no results.csv yet: run it without --draw first")
    draw(lines)
    print(table(lines))


if __name__ == "__main__":
    main()
