"""MEGA and TCNCA of the Long Range Arena: every configuration has the parts of the card's table."""

import pytest

from seqzoo.config.compose import compose
from seqzoo.eval import describe

# Layers, width, values, queries and keys, numbers of a norm, learning rate, taps of TCNCA.
TABLE = {
    "listops": (6, 80, 160, 64, 2 * 80, 0.001, 17),
    "text": (4, 128, 256, 64, 1, 0.004, 21),
    "retrieval": (6, 128, 256, 64, 1, 0.003, 21),
    "image": (8, 160, 320, 96, 2 * 160, 0.01, 13),
    "pathfinder": (6, 128, 256, 64, 2 * 128, 0.01, 13),
    "pathx": (4, 64, 128, 32, 2 * 64, 0.01, 33),
}


@pytest.mark.filterwarnings("ignore:the receptive field")
@pytest.mark.parametrize("mixer", ["mega", "tcnca"])
@pytest.mark.parametrize("task", TABLE)
def test_parameters(task, mixer):
    layers, d, v, z, norm, lr, taps = TABLE[task]
    words = [f"experiment=lra_{task}", f"model={mixer}_lra_{task}"]
    config = compose(words if task == "listops" else [*words, "data.path=somewhere"])
    assert config.optimizer.lr == lr and config.optimizer.b2 == 0.98
    tokens = task in ("listops", "text", "retrieval")
    assert not tokens or config.model.embed_std == pytest.approx(d**-0.5)
    assert config.model.dropout == config.model.embed_dropout == (0.1 if tokens else 0.0)
    assert config.data.seq_len == {
        "listops": 2048, "text": 4096, "retrieval": 4000, "pathx": 16384
    }.get(task, 1024)  # fmt: skip
    counted = describe.parameters(describe.abstract_model(config.model))
    move = 8 * d * 16 + d if mixer == "mega" else 3 * d * (taps + 2) + d
    maps = (d + 1) * v + (d + 1) * (2 * d + z + v) + (v + 1) * d
    block = move + maps + 4 * z + 255 + norm  # scales and offsets, distances, its norm
    assert counted.by_part[f"mixers.{mixer}"] == layers * block
    assert counted.by_part["channel_mixers"] == layers * (2 * d * v + v + d)
    assert counted.by_part["head"] == (d * (4 if task == "retrieval" else 1) + 1) * (
        10 if task in ("listops", "image") else 2
    )


def test_tcnca_enwik8():
    """Its network has 48 taps, a norm of each level and a bias, and omega: 0.07 % off MEGA's."""
    counted = {
        name: describe.parameters(
            describe.abstract_model(
                compose([f"model={name}", "data=text", "data.path=x", "data.seq_len=8192"]).model
            )
        )
        for name in ("mega_enwik8", "tcnca_enwik8")
    }
    ours, mega = (counted[f"{n}_enwik8"].by_part[f"mixers.{n}"] for n in ("tcnca", "mega"))
    assert mega - ours == 12 * (4 * 512 * 16 - 512 * 3 * (16 + 2))
    assert abs(counted["tcnca_enwik8"].total / 39.0e6 - 1) < 0.005
