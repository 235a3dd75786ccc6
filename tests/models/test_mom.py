"""Models of MoM: counts as published, all and those that a token uses, from shapes alone."""

import jax.numpy as jnp
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval import describe


@pytest.mark.parametrize("name, total, active", [("mom_340m", 512, 411), ("mom_1_3b", 1553, 1351)])
def test_released_sizes(name, total, active):
    found = describe.parameters(describe.abstract_model(compose([f"model={name}"]).model))
    assert [round(n / 1e6) for n in (found.total, found.active)] == [total, active]


def test_seven_layers_to_one_of_attention():
    config = compose(["model=mom_attention"]).model
    model = describe.abstract_model(config)
    assert [i for i, name in enumerate(model.stack.layers) if name == "attention"] == [7, 15, 23]
    assert config.mixers.mom.n_layers == model.stack.layers.count("mom")  # of the loss's mean
    counted = describe.parameters(model)
    idle = 21 * 2 * (2 * 1024**2 + 2 * 4 * 1024)  # two of four memories, in 21 layers
    assert counted.total - counted.active == idle


def test_a_token_that_skips_nothing_uses_everything():
    for words in (["model.mixers.mom.topk=4"], ["model.mixers.mom.single_kv_proj=true"]):
        config = compose(["model=mom_small", "data=mqar", "task=masked_answers", *words])
        found = describe.parameters(describe.abstract_model(config.model))
        assert found.total == found.active


def test_the_loss_does_not_grow_with_depth():
    """Every layer reports its own; the scale holds for all together."""
    words = ["model=mom_small", "data=mqar", "task=masked_answers", "model.n_layers=4"]
    words += ["model.pattern=[mom]"]
    words += ["model.mixers.mom.rule=retention", "model.mixers.mom.d_conv=0"]  # quick to compile
    model = build(describe.plain(compose(words).model), rngs=nnx.Rngs(0))
    tokens = jnp.arange(24).reshape(2, 12)
    run = nnx.jit(lambda model, tokens: model.run(tokens).reports)
    found = run(model, tokens)
    assert found.values["router_load/0"].shape == (4,)
    assert float(found.losses["load_balance"]) == pytest.approx(2 * 0.01, rel=0.2)
