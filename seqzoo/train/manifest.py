"""What a checkpoint says of itself: each array's name, shape, dtype and the crc32 of every shard.

Orbax restores a flipped bit without a word; the checksums are how we notice.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# A shard: where it lies in the whole array, as (start, stop) per axis.
Bounds = tuple[tuple[int, int], ...]


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by clean name: ``params/layers/0/mixer/in_proj/kernel``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {"/".join(_key(entry) for entry in path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have one name; rename a key that contains '/'")
    return named


def unflatten(tree: Any, named: Mapping[str, Any]) -> Any:
    """Returns `tree` with each leaf replaced by the one of its name."""
    return jax.tree_util.tree_unflatten(
        jax.tree_util.tree_structure(tree), [named[name] for name in flatten(tree)]
    )


def describe(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {name: {shape, dtype, shards: [[bounds, crc32], ...]}} of arrays on any mesh.

    Every shard is named once, by the process that holds its first copy; with several processes
    all get the whole table, so call it on every one of them.
    """
    jobs = [
        (name, bounds, data)
        for name, array in arrays.items()
        for bounds, data in _first_copies(array)
    ]
    with ThreadPoolExecutor() as pool:  # crc32 lets other threads run
        sums = list(pool.map(lambda job: _crc32(job[2]), jobs))
    local = [[name, bounds, crc] for (name, bounds, _), crc in zip(jobs, sums, strict=True)]
    table: dict[str, dict[str, Any]] = {
        name: {"shape": list(np.shape(array)), "dtype": str(array.dtype), "shards": []}
        for name, array in arrays.items()
    }
    for name, bounds, crc in gather(local):
        table[name]["shards"].append([bounds, crc])
    return table


def differences(stored: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Any]) -> str | None:
    """Returns what first differs between a stored table and the arrays wanted, or None.

    Arrays that are stored and not wanted are no difference here.
    """
    for name, array in wanted.items():
        if name not in stored:
            return f"'{name}' {_form(array.shape, array.dtype)} is not in the checkpoint"
        shape, dtype = tuple(stored[name]["shape"]), stored[name]["dtype"]
        if shape != tuple(array.shape) or dtype != str(array.dtype):
            return (
                f"'{name}' is {_form(shape, dtype)} in the checkpoint and "
                f"{_form(array.shape, array.dtype)} here"
            )
    return None


def damage(stored: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Any]) -> str | None:
    """Returns what is damaged in restored arrays, or None; the same on every process."""
    jobs = [
        (name, tuple(map(tuple, bounds)), crc)
        for name in arrays
        for bounds, crc in stored[name]["shards"]
    ]

    def check(job) -> str | None:
        name, bounds, crc = job
        data = _cut(arrays[name], bounds)
        if data is None or _crc32(data) == crc:
            return None
        return f"'{name}' {list(bounds)} fails its crc32"

    # Cutting across shards is a collective: then one after the other, the same on every process.
    with ThreadPoolExecutor(None if jax.process_count() == 1 else 1) as pool:
        found = [text for text in pool.map(check, jobs) if text]
    found = gather(found)
    return found[0] if found else None


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {content, crc32}: a JSON document that shows when it was changed."""
    text = json.dumps(content, sort_keys=True)
    return {"content": json.loads(text), "crc32": zlib.crc32(text.encode())}


def unseal(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a sealed document.

    Raises:
      ValueError: it was changed.
    """
    content = document["content"]
    if zlib.crc32(json.dumps(content, sort_keys=True).encode()) != document["crc32"]:
        raise ValueError("the metadata fails its crc32")
    return content


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _form(shape: Iterable[int], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(
        (one.start or 0, size if one.stop is None else one.stop)
        for one, size in zip(index, shape, strict=True)
    )


def _first_copies(array: Any) -> list[tuple[Bounds, Any]]:
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        return [(tuple((0, size) for size in array.shape), array)]
    return [
        (_bounds(shard.index, array.shape), shard.data)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _cut(array: Any, bounds: Bounds) -> Any:
    """Returns the part of an array within bounds; None where another process checks it."""
    cut = tuple(slice(start, stop) for start, stop in bounds)
    if array.is_fully_addressable:
        for shard in array.addressable_shards:  # mostly the shards are those that were saved
            if _bounds(shard.index, array.shape) == bounds:
                return shard.data
        return np.asarray(array)[cut]
    layout = array.sharding.devices_indices_map(array.shape).values()
    if any(_bounds(index, array.shape) == bounds for index in layout):
        mine = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        fitting = [one.data for one in mine if _bounds(one.index, array.shape) == bounds]
        return fitting[0] if fitting else None
    return multihost_utils.process_allgather(array, tiled=True)[cut]


def _crc32(data: Any) -> int:
    data = np.ascontiguousarray(np.asarray(data))
    return zlib.crc32(data.reshape(-1).view(np.uint8)) if data.size else 0


def gather(local: list) -> list:
    """Returns the lists of all processes joined, in the order of the processes."""
    if jax.process_count() == 1:
        return local
    text = np.frombuffer(json.dumps(local).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size]))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [
        item
        for row, size in zip(rows, np.ravel(sizes), strict=True)
        for item in json.loads(row[: int(size)].tobytes())
    ]
