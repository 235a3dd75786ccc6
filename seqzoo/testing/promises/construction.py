"""How a mixer is built: from plain keywords, with float32 parameters, many at once."""

import inspect

import jax
import jax.numpy as jnp
from flax import nnx

from seqzoo.nn.param import decays
from seqzoo.testing.subject import (
    Broken,
    Subject,
    build,
    named_leaves,
)


def constructor(subject: Subject) -> str:
    """Takes d_model, then keywords that a YAML file can hold, then dtype and rngs by keyword."""
    made = getattr(subject.build, "func", subject.build)
    if not inspect.isclass(made):
        return "not a class: its keywords are not looked at"
    # of __init__: the class itself shows the signature of its metaclass
    _, first, *others = inspect.signature(made.__init__).parameters.values()
    if first.name != "d_model":
        raise Broken(f"the first argument is {first.name!r}; it must be 'd_model'")
    by_keyword = {p.name: p for p in others if p.kind is p.KEYWORD_ONLY}
    for name in ("dtype", "rngs"):
        if name not in by_keyword:
            raise Broken(f"no keyword-only argument {name!r}")
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    for parameter in others:
        if parameter.name not in by_keyword:
            raise Broken(f"argument {parameter.name!r} is not keyword-only (put a * after d_model)")
        if parameter.name in ("dtype", "rngs") or parameter.default is parameter.empty:
            continue
        if not isinstance(parameter.default, plain):
            raise Broken(
                f"the default of {parameter.name!r} is a {type(parameter.default).__name__}: "
                "a YAML file cannot hold it"
            )
    return f"{len(by_keyword) - 2} keywords"


def parameters(subject: Subject) -> str:
    """Parameters are float32 whatever the dtype; nothing random is kept for run time."""
    mixer = build(subject, "bfloat16")
    variables = nnx.to_flat_state(nnx.state(mixer))
    count = 0
    for path, variable in variables:
        name = ".".join(map(str, path))
        if isinstance(variable, nnx.RngState):
            raise Broken(f"{name} is random state: keep no nnx.Rngs, draw at construction only")
        if isinstance(variable, nnx.Param):
            count += variable[...].size
            if variable[...].dtype != jnp.float32:
                raise Broken(f"parameter {name} is {variable[...].dtype}; it must be float32")
    return f"{count} parameters at d_model {subject.d_model}"


def decay(subject: Subject) -> str:
    """Every parameter says whether weight decay applies; vectors (biases, norms) are exempt."""
    chosen = []
    for path, variable in nnx.to_flat_state(nnx.state(build(subject), nnx.Param)):
        name = ".".join(map(str, path))
        answer = decays(variable)
        if not isinstance(answer, bool):
            raise Broken(f"decays({name}) is {answer!r}; it must be True or False")
        if answer and variable[...].ndim < 2:
            raise Broken(f"{name} is a vector under weight decay: pass decay=False to param()")
        if answer:
            chosen.append(name)
    return f"decayed: {', '.join(chosen) or 'none'}"


def one_graphdef(subject: Subject) -> str:
    """Two instances with other seeds differ in arrays alone, so they share a compiled step."""
    first, second = (nnx.split(build(subject, seed=seed))[0] for seed in (0, 1))
    hash(first)
    if first != second:
        raise Broken(
            "two instances of one configuration have different static parts: keep no lambda, "
            "closure or array made in __init__ as a plain attribute"
        )
    return "equal and hashable"


def built_abstractly(subject: Subject) -> str:
    """Can be built without memory, and many layers at once (the stack and `seqzoo show` do)."""

    def one(key):
        mixer = subject.build(subject.d_model, dtype="float32", rngs=nnx.Rngs(key))
        return nnx.state(mixer, nnx.Param)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    stacked = jax.eval_shape(jax.vmap(one), keys)
    for name, leaf in named_leaves(stacked):
        if leaf.shape[:1] != (3,):
            raise Broken(f"{name} has shape {leaf.shape} when three layers are built at once")
    return "under eval_shape and vmap"
