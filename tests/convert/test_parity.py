"""Our models with Hugging Face's weights against what Hugging Face computed (golden files)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqzoo.convert.checkpoint import load_model, open_checkpoint
from seqzoo.convert.mapping import to_theirs
from seqzoo.eval.generate import generate

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MAMBA = ("mamba/hf_state16", "mamba/hf_state8_bias_untied")
ALL = (*MAMBA, "attention/llama_gqa")


def error(ours, theirs) -> float:
    """The measure of the golden files: the largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-5)


@functools.cache
def model_of(name: str) -> nnx.Module:
    return load_model(str(GOLDEN / f"{name}_hf"))


def layers(model, x):
    """The residual stream after each layer, one block after the other."""
    for run, blocks in zip(model.stack.plan, model.stack.runs, strict=True):
        graphdef, variables = nnx.split(blocks)
        for repeat in range(run.repeats):
            one = jax.tree.map(lambda a, repeat=repeat: a[repeat], variables)
            for block in nnx.merge(graphdef, one):
                x, _ = block(x)
                yield x


@functools.cache
def computed(name: str, dtype: str):
    """Logits, loss, hidden states, and gradients under Hugging Face's names."""
    with np.load(GOLDEN / f"{name}.npz") as golden:
        tokens = golden["in.input_ids"]
    folder = str(GOLDEN / f"{name}_hf")
    with jax.enable_x64(dtype == "float64"):
        model = load_model(folder, dtype=dtype)
        graphdef, params = nnx.split(model, nnx.Param)

        def loss(params):
            model = nnx.merge(graphdef, params, copy=True)
            logits = model.run(tokens).logits
            log_p = jax.nn.log_softmax(logits[:, :-1])
            picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)
            return -jnp.mean(picked), logits

        @jax.jit
        def hidden(params):
            model = nnx.merge(graphdef, params, copy=True)
            return [*layers(model, model.embedded(tokens)), model.hidden(tokens)[0]]

        (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        flat = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(grads)}
        streams = hidden(params)
    leaves = open_checkpoint(folder).format.leaves
    theirs = to_theirs(flat, model.stack.plan, leaves, vocab_size=model.vocab_size)
    return logits, value, streams, theirs


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "dtype, most, most_grad", [("float32", 1e-5, 1e-4), ("float64", 1e-9, 1e-6)]
)
def test_logits_loss_and_every_gradient(golden, name, dtype, most, most_grad):
    expected = golden(name)
    logits, loss, _, grads = computed(name, dtype)
    if name.startswith("attention") and dtype == "float64":
        most = 1e-6  # the reference turned queries and keys by float32 angles in its float64 run
    assert logits.dtype == dtype
    assert error(logits, expected["out64.logits"]) < most
    assert error(loss, expected["out64.loss"]) < most
    names = {key.removeprefix("grad64.") for key in expected if key.startswith("grad64.")}
    assert names == set(grads)
    for one in names:
        ours, theirs = grads[one], expected[f"grad64.{one}"]
        if one == "model.embed_tokens.weight":  # torch gives a padding token no gradient
            ours, theirs = ours[1:], theirs[1:]
        assert error(ours, theirs) < most_grad, one


@pytest.mark.parametrize("name", MAMBA)
def test_hidden_states(golden, name):
    """After each block, and after the final norm."""
    expected = golden(name)
    hidden = computed(name, "float32")[2]
    assert len(hidden) == sum(key.startswith("out.hidden_") for key in expected)
    for i, x in enumerate(hidden):
        assert error(x, expected[f"out.hidden_{i}"]) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens_through_the_step_path(golden, name):
    expected = golden(name)
    prompt, tokens = expected["in.prompt_ids"], expected["out.generated_ids"]
    new = tokens.shape[1] - prompt.shape[1]
    written = generate(model_of(name), prompt, max_new_tokens=new, temperature=0)
    np.testing.assert_array_equal(written.tokens, tokens[:, prompt.shape[1] :])


@pytest.mark.parametrize("name", MAMBA)
def test_state_after_a_prompt_and_logits_of_each_step(golden, name):
    expected, model = golden(name), model_of(name)
    prompt, tokens = expected["in.prompt_ids"], expected["out.generated_ids"]
    graphdef, params = nnx.split(model)
    out = jax.jit(lambda p, t: nnx.merge(graphdef, p).run(t, return_state=True))(params, prompt)
    (mixer,) = out.state[0]  # one run of one kind of layer, stacked
    for i in range(model.stack.plan[0].repeats):
        # Theirs keeps one input of the convolution more than is needed, channels first.
        conv = np.moveaxis(expected[f"out.prefill_conv_state_{i}"], 1, 2)[:, 1:]
        assert error(mixer.conv.x[i], conv) < 1e-5
        assert error(mixer.scan.h[i], expected[f"out.prefill_ssm_state_{i}"]) < 1e-5

    step = jax.jit(lambda p, t, s: nnx.merge(graphdef, p).step(t, s))
    logits, state = out.logits[:, -1], out.state
    for i in range(expected["out.generated_next_logits"].shape[1]):
        assert error(logits, expected["out.generated_next_logits"][:, i]) < 1e-5
        logits, state = step(params, tokens[:, prompt.shape[1] + i], state)
