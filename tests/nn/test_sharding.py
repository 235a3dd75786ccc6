"""Logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from seqzoo.nn.linear import linear
from seqzoo.nn.param import axes_of, decays, declare, param
from seqzoo.nn.sharding import (
    MESH_AXES,
    constrain,
    make_rules,
    mesh_in_force,
    param_shardings,
    spec_of,
    use_mesh,
)


def mesh_of(data=1, fsdp=1, tensor=1, sequence=1):
    shape = (data, fsdp, tensor, sequence)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def test_spec_of():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert spec_of(("batch", "length", None), (8, 6, 3), mesh) == PartitionSpec(
        ("data", "fsdp"), None, None
    )
    assert spec_of(("embed", "inner"), (4, 8), mesh) == PartitionSpec("fsdp", "tensor")
    # an axis serves one dimension; of size 1 it serves none; an unknown name is whole
    assert spec_of(("embed", "embed"), (4, 4), mesh) == PartitionSpec("fsdp", None)
    assert spec_of(("embed", "state"), (4, 4), mesh_of(tensor=8)) == PartitionSpec(None, None)


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"parameter w: its dimension 'inner' of 6 .* of 4"):
        spec_of(("embed", "inner"), (4, 6), mesh_of(data=2, tensor=4), what="parameter w")


def test_rules():
    rules = make_rules({"batch": ["data"], "embed": None, "inner": "fsdp"})
    mesh = mesh_of(data=2, fsdp=4)
    assert spec_of(("batch", "inner", "embed"), (2, 4, 3), mesh, rules) == PartitionSpec(
        "data", "fsdp", None
    )
    with pytest.raises(ValueError, match="mesh.rules.inner names 'model'; allowed"):
        make_rules({"inner": "model"})


def test_the_mesh_in_force():
    assert mesh_in_force() is None
    x = jnp.ones((8, 2, 2))
    assert constrain(x, "batch", "length", None) is x
    mesh = mesh_of(data=8)
    x = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec()))
    with use_mesh(mesh):
        assert mesh_in_force().size == 8
        y = jax.jit(lambda x: constrain(x, "batch", "length", None))(x)
        assert {shard.data.shape for shard in y.addressable_shards} == {(1, 2, 2)}
    assert mesh_in_force() is None


def test_parameters_lie_as_they_declare():
    model = nnx.List([linear(4, 8, axes=("embed", "inner"), use_bias=True, rngs=nnx.Rngs(0))])
    mesh = mesh_of(fsdp=2, tensor=4)
    shardings = param_shardings(nnx.state(model, nnx.Param), mesh)
    assert shardings[0]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    assert shardings[0]["bias"].spec == PartitionSpec("tensor")


def test_declarations():
    with pytest.raises(ValueError, match="name 1 dimensions, the value has 2"):
        param(jnp.ones((2, 3)), axes=("embed",))
    one = param(jnp.ones((2, 3), jnp.bfloat16), axes=("embed", None), decay=False)
    assert one.dtype == jnp.float32 and axes_of(one) == ("embed", None) and not decays(one)
    module = nnx.List([nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones((2, 3)))])
    assert not decays(module[0]) and decays(module[1])
    declare(module)
    assert module[0].get_metadata()["decay"] is False and axes_of(module[1]) == (None, None)
