"""Where arrays lie: logical axis names, the rules that map them to a mesh, the mesh in force.

A mesh has the axes (data, fsdp, tensor, sequence); one device is the mesh of ones. Layers ask for
logical names and never for mesh axes, so the rules alone decide what is sharded.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator, Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqzoo.errors import MeshError
from seqzoo.nn.param import axes_of

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

# Logical name -> mesh axes, as pairs: hashable, so that a compiled step may depend on it.
Rules = tuple[tuple[str, tuple[str, ...]], ...]

# Names of parameters (see nn.param) and of activations (batch, length). What is not named is whole.
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("length", ("sequence",)),
    ("embed", ("fsdp",)),
    ("inner", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
)

_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


def make_rules(table: Mapping[str, str | Iterable[str] | None]) -> Rules:
    """Rules from a config's mapping, `{"embed": "fsdp", "batch": ["data", "fsdp"]}`.

    Raises:
        ValueError: a mesh axis that does not exist.
    """
    rules = []
    for name, axes in table.items():
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        for axis in axes:
            if axis not in MESH_AXES:
                raise ValueError(f"mesh.rules.{name} names '{axis}'; allowed: {list(MESH_AXES)}")
        rules.append((name, axes))
    return tuple(rules)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Puts a mesh and its rules in force for what is traced inside; may stand in a trace."""
    token = _RULES.set(rules)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _RULES.reset(token)


def rules_in_force() -> Rules:
    """The rules of the innermost `use_mesh`, else the default ones."""
    return _RULES.get()


def mesh_in_force():
    """The mesh of the innermost `use_mesh` (abstract, as a trace sees it), or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def axes_over(name: str, mesh) -> tuple[str, ...]:
    """The mesh axes of more than one device that a logical name is spread over."""
    wanted = dict(rules_in_force()).get(name, ())
    return tuple(axis for axis in wanted if mesh.shape.get(axis, 1) > 1)


def rows_are_cut() -> bool:
    """Whether the mesh in force spreads the tokens of a row over devices."""
    mesh = mesh_in_force()
    return mesh is not None and bool(axes_over("length", mesh))


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Rows are not cut over devices in what is traced inside."""
    token = _RULES.set(tuple(rule for rule in rules_in_force() if rule[0] != "length"))
    try:
        yield
    finally:
        _RULES.reset(token)


def spec_of(
    axes: Iterable[str | None],
    shape: Iterable[int],
    mesh,
    rules: Rules | None = None,
    *,
    what: str = "an array",
) -> PartitionSpec:
    """Which mesh axes each dimension of an array is spread over.

    A mesh axis of size 1 is left out, one that an earlier dimension took as well.

    Args:
        axes: a logical name or None per dimension.
        shape: the dimensions' sizes.
        mesh: concrete or abstract.
        rules: None = those in force.
        what: a name for the error.

    Raises:
        MeshError: a dimension is no multiple of the mesh axes that it is spread over.
    """
    table = dict(rules_in_force() if rules is None else rules)
    sizes = dict(mesh.shape)
    taken: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        wanted = table.get(name, ()) if name else ()
        over = tuple(a for a in wanted if sizes.get(a, 1) > 1 and a not in taken)
        ways = math.prod(sizes[a] for a in over)
        if size % ways:
            raise MeshError(
                f"{what}: its dimension '{name}' of {size} is no multiple of {ways}, the "
                f"product of mesh axes {list(over)}; change mesh.{over[0]} or the dimension, or "
                f"take '{name}' out of mesh.rules"
            )
        taken |= set(over)
        spec.append(over if len(over) > 1 else over[0] if over else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keeps an activation spread as the rules say; does nothing where no mesh is in force."""
    mesh = mesh_in_force()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, x.shape, mesh, what="an activation"))


def param_shardings(variables: nnx.State, mesh: Mesh, rules: Rules | None = None):
    """A NamedSharding for each variable, as its declared axes and the rules say.

    Args:
        variables: a state whose leaves are variables (not yet stripped by `nnx.as_pure`).
        mesh: concrete.
        rules: None = those in force.

    Returns:
        The same tree, stripped, with a NamedSharding in place of each array.
    """
    found = []
    for path, variable in nnx.to_flat_state(variables):
        name = "parameter " + ".".join(map(str, path))
        spec = spec_of(axes_of(variable), variable.get_value().shape, mesh, rules, what=name)
        found.append((path, NamedSharding(mesh, spec)))
    return nnx.from_flat_state(found)
