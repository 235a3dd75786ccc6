"""Between their arrays, one per layer, and ours, stacked over the repeats of a run (nn/stack)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqzoo.errors import ConfigError
from seqzoo.nn.stack import Run

Path = tuple[str | int, ...]


class Leaf(NamedTuple):
    """One parameter here and there.

    Attributes:
        ours: path below the model, or below a block where `theirs` holds `{i}`.
        theirs: name in the file; `{i}` is the number of the layer.
        layout: a key of LAYOUTS.
    """

    ours: Path
    theirs: str
    layout: str = "same"


class Format(NamedTuple):
    """What is known of one kind of checkpoint.

    Attributes:
        model_type: what config.json calls it.
        architecture: the class of transformers that reads it.
        node: config.json -> a `model` node of ours.
        values: and back, of every key that `node` reads.
        leaves: every parameter that it may have.
        embedding, head: names in the file, to tell whether they are tied.
        mixer, channel_mixer: the classes in each of its layers.
        computed: endings of names that some files hold and nobody reads: tables that follow from
            config.json.
    """

    model_type: str
    architecture: str
    node: Callable[[Mapping[str, Any]], dict[str, Any]]
    values: Callable[["Settings"], dict[str, Any]]
    leaves: tuple[Leaf, ...]
    embedding: str
    head: str
    mixer: str
    channel_mixer: str | None
    computed: tuple[str, ...] = ()


class Settings(NamedTuple):
    """Our model as an export sees it.

    Attributes:
        model: every key of its node, defaults included.
        mixer: the same of the mixer in its layers.
        block: its first layer, whose parts know the widths that a node leaves open.
        seq_len: the longest row that it was made for; None = not known.
    """

    model: Mapping[str, Any]
    mixer: Mapping[str, Any]
    block: Any
    seq_len: int | None


# Name: (theirs -> ours, ours -> theirs). torch stores a linear layer as (out, in), and a depthwise
# convolution as (channels, 1, taps). Rows: our vocabulary is padded, see `to_ours`.
LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda a: a, lambda a: a),
    "transpose": (lambda a: a.T, lambda a: a.T),
    "conv": (lambda a: a[:, 0, :].T, lambda a: a.T[:, None, :]),
    "rows": (lambda a: a, lambda a: a),
}


def to_ours(
    weights: Mapping[str, np.ndarray],
    wanted: Mapping[Path, Any],
    plan: Sequence[Run],
    leaves: Sequence[Leaf],
    *,
    dtype: str = "float32",
) -> dict[Path, np.ndarray]:
    """Returns our arrays by path.

    Args:
        weights: theirs, by name.
        wanted: the parameters of our model by path: anything with a shape.
        plan: of the model's stack.
        leaves: what maps to what.
        dtype: of the arrays returned.

    Raises:
        ConfigError: an array is missing, left over or of another shape; the text names it.
    """
    used: set[str] = set()

    def read(leaf: Leaf, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in weights:
            raise ConfigError(f"the weights lack '{name}' {list(shape)}, which config.json implies")
        used.add(name)
        array = LAYOUTS[leaf.layout][0](weights[name]).astype(dtype)
        if leaf.layout == "rows" and array.shape[1:] == shape[1:] and len(array) <= shape[0]:
            array = np.concatenate([array, np.zeros((shape[0] - len(array), *shape[1:]), dtype)])
        if array.shape != shape:
            raise ConfigError(
                f"'{name}' is {list(array.shape)} in the weights (in our layout), and "
                f"{list(shape)} by config.json"
            )
        return array

    found = {}
    for path, target in wanted.items():
        leaf, layers = _find(path, plan, leaves)
        shape = tuple(target.shape)
        if layers is None:
            found[path] = read(leaf, leaf.theirs, shape)
        else:
            parts = [read(leaf, leaf.theirs.format(i=i), shape[1:]) for i in layers]
            found[path] = np.stack(parts)
    left = sorted(set(weights) - used)
    if left:
        raise ConfigError(
            f"the weights hold '{left[0]}'"
            + (f" and {len(left) - 1} more" if len(left) > 1 else "")
            + ", for which the model that config.json describes has no place"
        )
    return found


def to_theirs(
    arrays: Mapping[Path, Any], plan: Sequence[Run], leaves: Sequence[Leaf], *, vocab_size: int
) -> dict[str, np.ndarray]:
    """Returns arrays of our parameters (values or gradients) by their names, in their layouts."""
    found = {}
    for path, array in arrays.items():
        leaf, layers = _find(path, plan, leaves)
        back = LAYOUTS[leaf.layout][1]
        array = np.asarray(array)
        if layers is not None:
            for i, one in zip(layers, array, strict=True):
                found[leaf.theirs.format(i=i)] = back(one)
        else:
            found[leaf.theirs] = back(array[:vocab_size] if leaf.layout == "rows" else array)
    return found


def _find(path: Path, plan: Sequence[Run], leaves: Sequence[Leaf]) -> tuple[Leaf, range | None]:
    """The leaf of one of our paths, and the layers that its array stacks (None: it is alone)."""
    layers, inner = None, path
    if path[:2] == ("stack", "runs"):
        run, place, inner = plan[int(path[2])], int(path[3]), path[4:]
        step = len(run.period)
        layers = range(run.start + place, run.start + run.repeats * step, step)
    for leaf in leaves:
        if leaf.ours == inner and ("{i}" in leaf.theirs) == (layers is not None):
            return leaf, layers
    raise ConfigError(f"our parameter {'.'.join(map(str, path))} has no name in this format")
