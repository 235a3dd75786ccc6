"""What a configuration is: counts as published, nothing allocated, matches within tolerance."""

import json

import jax
import pytest
from omegaconf import OmegaConf

from seqzoo.config.compose import compose
from seqzoo.eval import describe
from seqzoo.eval.compare import TOLERANCES
from seqzoo.eval.match import solve

SMALL = ["data.seq_len=32", "data.num_kv_pairs=2"]


@pytest.mark.parametrize(
    "name, millions",
    [
        ("mamba_130m", 129.1),
        ("mamba_370m", 371.5),
        ("mamba_790m", 793.2),
        ("mamba_1_4b", 1372.2),
        ("mamba_2_8b", 2768.3),
        ("mamba2_130m", 129.0),
        ("mamba2_2_7b", 2702.6),
        ("gla_340m", 341.7),
    ],
)
def test_published_sizes(name, millions):
    """Parameters of the released models (specs of state-spaces/mamba, fla), counted from shapes."""
    model = describe.abstract_model(compose([f"model={name}"]).model)
    assert round(describe.parameters(model).total / 1e6, 1) == millions


def test_a_model_of_billions_allocates_nothing(seqzoo):
    before = sum(a.nbytes for a in jax.live_arrays())
    code, out, _ = seqzoo("show", "model=mamba_2_8b", "--length", "2048", "--format", "json")
    found = json.loads(out)
    assert code == 0 and sum(a.nbytes for a in jax.live_arrays()) - before < 2**20
    assert found["length"] == 2048
    assert found["memory"]["parameters"] == 4 * found["parameters"]["total"]
    assert found["memory"]["optimizer"] == pytest.approx(
        2 * found["memory"]["parameters"], rel=1e-3
    )


def test_json_has_what_the_design_names(seqzoo):
    words = ["model.pattern=[mamba,mamba,attention]", "model.n_layers=6", *SMALL]
    found = json.loads(seqzoo("show", *words, "model.channel_mixer=swiglu", "--format", "json")[1])
    parameters = found["parameters"]
    assert set(parameters["by_part"]) == {
        "embedding", "mixers.mamba", "mixers.attention", "channel_mixers", "norms",
    }  # fmt: skip
    assert sum(parameters["by_part"].values()) == parameters["total"] == parameters["active"]
    assert parameters["without_embeddings"] == (
        parameters["total"] - parameters["by_part"]["embedding"]
    )
    state = found["state_bytes"]
    assert state["1024"]["total"] > state["1024"]["recurrent"] > state["256"]["recurrent"]
    flops = found["flops_per_token"]
    # A backward pass costs about twice the forward one.
    assert 2.5 < flops["training"] / flops["forward"] < 3.5
    memory = found["memory"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert found["config"]["model"]["n_layers"] == 6


def test_flops_of_matrix_products_are_counted_exactly():
    """A Transformer's products, by hand: 2 per weight, and two products of attention."""
    d, layers, length = 64, 2, 32
    config = compose(["model=transformer_small", "task=next_token", "data=mqar", *SMALL])
    counted = describe.parameters(describe.abstract_model(config.model))
    weights = counted.by_part["mixers.attention"] + counted.by_part["channel_mixers"]
    products = 2 * (weights + 256 * d) + layers * 2 * 2 * length * d
    found = describe.flops_per_token(config, length)
    assert products < found.forward < 1.15 * products  # norms, softmax and the like on top


def test_logits_are_counted_where_the_data_asks():
    """At 2 of 32 places, as they are computed in training."""
    words = ["model=transformer_small", "data=mqar", *SMALL]
    everywhere, asked = (
        describe.flops_per_token(compose([*words, f"task={task}"]), 32).forward
        for task in ("next_token", "masked_answers")
    )
    product = 2 * 256 * 64  # of one row of the head with one token
    assert 30 * product < 32 * (everywhere - asked) < 1.1 * 30 * product


def test_an_encoder_has_no_decoding_state(seqzoo):
    words = ["model=m2_small", "data=masked_stdlib_text", "task=masked_tokens", "data.seq_len=32"]
    code, out, err = seqzoo("show", *words)
    assert code == 0, err
    assert "no decoding state: a masked language model reads whole sequences" in out
    for part in ("embedding", "positions", "mixers.monarch_mixer", "channel_mixers", "head"):
        assert part in out
    code, _, err = seqzoo("show", *words, "--match", "state", "--to", "mamba_small")
    assert code == 2 and "match params or flops" in err


def test_rows_of_two_documents_and_of_vectors_are_counted():
    config = OmegaConf.to_container(compose(["model=mamba_small", "task=classification", *SMALL]))
    del config["model"]["tie_embeddings"]
    config["model"] |= {"_target_": "seqzoo.models.classifier.Classifier", "n_classes": 2}
    one, two, vectors = (
        {**config, "model": config["model"] | more}
        for more in ({}, {"documents": 2}, {"input_dim": 3})
    )
    forward = [describe.flops_per_token(c, 32).forward for c in (one, two, vectors)]
    assert forward[1] == pytest.approx(2 * forward[0], rel=0.01)
    assert 0 < forward[2] - forward[0] < 10 * 3 * 64  # a product of 3 by 64
    assert describe.memory(two, 32).activations > 1.9 * describe.memory(one, 32).activations
    counted = describe.parameters(describe.abstract_model(vectors["model"]))
    assert counted.by_part["input"] == (3 + 1) * 64 and "embedding" not in counted.by_part
    assert counted.without_embeddings == counted.total


def test_recurrent_state_does_not_grow(seqzoo):
    found = json.loads(seqzoo("show", "model=mamba_small", *SMALL, "--format", "json")[1])
    assert len({one["total"] for one in found["state_bytes"].values()}) == 1


def test_an_untied_head_is_no_part_of_what_is_matched(seqzoo):
    words = ["model=mamba_small", *SMALL, "--format", "json"]
    tied = json.loads(seqzoo("show", *words)[1])["parameters"]
    untied = json.loads(seqzoo("show", *words, "model.tie_embeddings=false")[1])["parameters"]
    assert untied["by_part"]["head"] == tied["by_part"]["embedding"]
    assert untied["without_embeddings"] == tied["without_embeddings"]


def test_text_is_readable(seqzoo):
    code, out, _ = seqzoo("show", "model=mamba_small", *SMALL, "optimizer.lr=3e-3")
    assert code == 0
    for shown in ("lr: 0.003", "without embeddings", "FLOPs per token at length 32", "at least"):
        assert shown in out
    assert "${" not in out


@pytest.mark.parametrize(
    "match, words, to",
    [
        ("params", ["model=transformer_small"], "mamba_small"),
        ("state", ["model=mamba_small", "--length", "1024"], "transformer_small"),
        ("flops", ["model=mamba_small"], "transformer_small"),
    ],
)
def test_match_solves_a_setting_within_tolerance(seqzoo, match, words, to):
    code, out, err = seqzoo(
        "show", *words, *SMALL, "--match", match, "--to", to, "--format", "json"
    )
    assert code == 0, err
    found = json.loads(out)
    limit = dict(zip(("params", "state", "flops"), TOLERANCES.values(), strict=True))[match]
    assert found["fits"] and found["off"] <= limit
    # The overrides that were printed do it.
    config = compose([words[0], *SMALL, *found["overrides"]])
    model = describe.abstract_model(config.model)
    reached = {
        "params": lambda: describe.parameters(model).without_embeddings,
        "state": lambda: model.state_bytes(1024)["total"],
        "flops": lambda: describe.flops_per_token(config, 32).training,
    }[match]()
    assert reached == pytest.approx(found["wanted"], rel=limit)


def test_match_to_a_run_and_by_a_setting_of_choice(seqzoo, write_run, tmp_path):
    run = write_run(tmp_path)
    words = ["model=transformer_small", *SMALL, "--match", "params", "--to", run]
    code, out, err = seqzoo("show", *words, "--vary", "model.channel_mixer.d_ff")
    assert "model.channel_mixer.d_ff=" in out and (code == 0) == ("comes within" not in err)


@pytest.mark.parametrize(
    "words, text",
    [
        (["--match", "params"], "--match and --to belong together"),
        (["--match", "params", "--to", "mamba_smal"], "did you mean 'mamba_small'"),
        (["--match", "params", "--to", "mamba_small", "--vary", "model.norm"], "it must be str"),
        (["--length", "0"], "--length is 0"),
        (["optimizer.learning_rate=1"], "seqzoo calls it 'optimizer.lr'"),
        (["modle=mamba_small"], "there is no key"),
        (["trainer.precision=hihg"], "trainer.precision=hihg; allowed: default, high, highest"),
        (["schedule.warmup_steps=1.5"], "schedule.warmup_steps=1.5; it must be a number of steps"),
    ],
)
def test_mistakes_are_answered(seqzoo, words, text):
    code, _, err = seqzoo("show", *words)
    assert code == 2 and text in err, err


def test_solve_finds_the_nearest_in_coarse_steps():
    tried = []

    def cost(value):
        tried.append(value)
        return 12.0 * value * value

    found = solve(cost, 12.0 * 768**2, start=64, tolerance=0.02)
    assert found.value == 768 and found.fits and len(tried) < 30
    assert solve(cost, 12.0 * 1000**2, start=64, tolerance=0.02).value % 4 == 0
    nearest = solve(cost, 12.0 * 10.4**2, start=64, tolerance=0.001)
    assert nearest.value == 10 and not nearest.fits
