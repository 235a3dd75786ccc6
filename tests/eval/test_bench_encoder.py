"""The encoder bench compares one encoder with two mixers."""

from flax import nnx

from seqzoo.eval.bench import encoder


def test_the_encoders_differ_in_their_mixer_alone():
    shells = {n: nnx.eval_shape(lambda n=n: encoder.encoder(n, 512)) for n in encoder.MODELS}
    assert {n: set(shell.stack.layers) for n, shell in shells.items()} == {
        "M2": {"monarch_mixer"},
        encoder.KEPT: {"monarch_mixer"},
        "attention": {"attention"},
    }
    for shell in shells.values():
        (blocks,) = shell.stack.runs
        assert blocks[0].mixer.causality == "none" and shell.positions.max_positions == 512
    outside = lambda shell: {
        path: leaf.shape
        for path, leaf in nnx.to_flat_state(nnx.as_pure(nnx.state(shell, nnx.Param)))
        if "mixer" not in path and "mixer_norm" not in path
    }
    assert outside(shells["M2"]) == outside(shells["attention"])


def test_rows(monkeypatch):
    monkeypatch.setattr(encoder, "LENGTHS", (8, 16, 32))
    seconds = {
        8: {"M2": 1.0, encoder.KEPT: 0.5, "attention": 1.0},
        16: {"M2": 1.25, encoder.KEPT: 0.5, "attention": 5.0},
    }
    seen = []

    def measured(length, batch, rounds):
        seen.append((length, batch, rounds))
        one = lambda name: encoder.bench.Measured((seconds[length][name],) * 3, 0, 0, 0, 0.0)
        return {name: one(name) for name in encoder.MODELS}

    monkeypatch.setattr(encoder, "measured", measured)
    rows = encoder.run(quick=True)
    assert seen == [(8, 256, 3), (16, 128, 3)]
    assert [row["of the first"] for row in rows] == [1.0, 1.0, 1.0, 0.8, 1.0, 0.2]
    assert [row["times attention"] for row in rows] == [1.0, 2.0, "", 4.0, 10.0, ""]
    assert rows[0]["tokens/s"] == 2048 and rows[0]["batch"] == 256
