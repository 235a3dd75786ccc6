"""What layers exchange over devices that share a row: read from compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqzoo.eval.sequence_check import Exchanged, exchanged
from seqzoo.mixers import Mamba
from seqzoo.nn.sharding import MESH_AXES, use_mesh

TEXT = """
  %a = (f32[1,3,512]{2,1,0}, f32[1,3,512]{2,1,0}, u32[], u32[]) collective-permute-start(%x), ch
  %b = f32[1,3,512]{2,1,0} collective-permute-done(%a)
  %c = bf16[2,8]{1,0} all-gather(%y), channel_id=2
  %d = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%p, %q), channel_id=3
"""


def test_a_text_is_read():
    counts = {"collective-permute": 1, "all-gather": 1, "all-reduce": 1}
    assert exchanged(TEXT) == Exchanged(counts, 4 * 3 * 512 + 2 * 16)


def test_a_scan_hands_on_states_however_long_the_row():
    graphdef, params = nnx.split(Mamba(16, d_state=4, rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((1, 1, 1, 8), MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    def forward(params, x):
        return nnx.merge(graphdef, params)(x)[0]

    def compiled(tokens):
        rows = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        x = jax.device_put(jnp.zeros((1, tokens, 16)), rows)
        whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        with use_mesh(mesh):
            return exchanged(jax.jit(lambda *a: forward(*a)).lower(whole, x).compile().as_text())

    found = compiled(64)
    assert found == compiled(128)
    # The convolution's inputs; (decay, state) once, and again for each doubling of the devices.
    assert set(found.counts) == {"collective-permute"}
    state, inputs = 4 * 32 * 4, 4 * 3 * 32
    assert found.bytes <= inputs + 2 * state * (1 + np.ceil(np.log2(7)))
