"""The bench of long_conv: its rows, its forms, what it calls."""

import jax
import jax.numpy as jnp

from pallas_kernels.long_conv.arg_specs import named
from seqzoo.eval.bench import long_conv as rows_of


def test_rows():
    assert rows_of.title(named("m2_bert")) == "long_conv m2_bert B4 L512 D768"
    assert rows_of.title(rows_of.at_length(4096)) == "long_conv bare B1 L4,096 D64"
    row = rows_of.row("a", "ms", 12.345, 3.214)
    assert (row["measured"], row["floor"], row["to reach"]) == (12.3, 3.21, "")


def test_what_is_drawn_is_what_is_called():
    spec = named("m2_bert")
    b, t, e = (spec.sizes[x] for x in "bte")
    dy, *arrays = rows_of.abstract(rows_of.long_conv, spec, t)
    for config in rows_of.FORMS.values():
        program = rows_of.program(spec, config, backward=True)
        y, gradients = jax.eval_shape(program, dy, *arrays)
        assert y.shape == (b, t, e) and y.dtype == jnp.float32
        assert [x.shape for x in gradients] == [x.shape for x in arrays]
