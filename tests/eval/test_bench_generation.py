"""The generation bench compares equal models, and says where two lines cross."""

import jax
import numpy as np
import pytest
from flax import nnx

from seqzoo.config.build import build
from seqzoo.config.compose import compose
from seqzoo.eval.bench import generation


def test_the_models_are_equal_in_parameters_and_depth():
    shells = {
        name: nnx.eval_shape(lambda words=words: build(compose(words).model, rngs=nnx.Rngs(0)))
        for name, words in generation.MODELS.items()
    }
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shell, nnx.Param)))
        for name, shell in shells.items()
    }
    assert sizes["attention"] == pytest.approx(sizes["BASED"], rel=0.002)
    assert len(shells["attention"].stack.layers) == len(shells["BASED"].stack.layers)
    assert set(shells["BASED"].stack.layers) == {"base_conv", "based", "sliding_window_attention"}


@pytest.mark.parametrize(
    "flat, context",
    [
        (1.5, 150),
        (3.0, 300),
        (5.0, 500),  # beyond the last: by the last slope
        (0.5, 100),  # below the first: no shorter past is told apart
    ],
)
def test_where_the_lines_cross(flat, context):
    assert generation.crossing((100, 200, 400), (1.0, 2.0, 4.0), flat) == pytest.approx(context)


def test_lines_that_never_cross():
    assert generation.crossing((100, 200), (1.0, 1.0), 2.0) == float("inf")


def test_a_loop_goes_on_where_it_stopped():
    words = ("data=stdlib_text", "task=next_token", "model=sliding_window_small")
    words = (*words, "model.n_layers=1")
    model = build(compose(words).model, rngs=nnx.Rngs(0))
    loop = generation.Loop(model, 2, 1)
    loop()
    counts = [leaf for leaf in jax.tree.leaves(loop.carry[1]) if leaf.dtype == np.int32]
    assert max(int(leaf.max()) for leaf in counts) == 2 * generation.STEPS
    assert loop.state_bytes == 2 * model.state_bytes(1)["total"]


def test_rows():
    row = generation._row("a", "BASED", 2, step=0.02, floor=0.016, rate=12.34e9, reach="<= 1.5")
    assert row["tokens/s"] == 100 and row["ms/step"] == 20
    assert row["by floor"] == 1.25 and row["read GB/s"] == 12.3
    figure = generation._row("b", "both", 2, tokens=123.456)
    assert figure["measured"] == 123.5 and figure["unit"] == "tokens"


def test_candidates_take_turns():
    order = []
    found = generation.take_turns({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2)
    assert order == ["a", "b", "a", "b"] and [len(s) for s in found.values()] == [2, 2]
