"""The mesh of a run, and how batches are laid on it. One device is the mesh of ones."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqzoo.errors import ConfigError
from seqzoo.nn.sharding import DEFAULT_RULES, MESH_AXES, Rules, make_rules
from seqzoo.train.settings import MeshSettings


def make_mesh(settings: MeshSettings, devices: list | None = None) -> Mesh:
    """Lays the devices out as the axes (data, fsdp, tensor, sequence).

    Raises:
        ConfigError: the sizes do not multiply to a number of devices that there are.
    """
    devices = jax.devices() if devices is None else devices
    others = settings.fsdp * settings.tensor * settings.sequence
    data = settings.data
    if data is None:
        data, rest = divmod(len(devices), others)
        if rest or not data:
            raise ConfigError(
                f"mesh.fsdp * mesh.tensor * mesh.sequence = {others} does not divide the "
                f"{len(devices)} devices here; change one, or set mesh.data to use fewer devices"
            )
    sizes = (data, settings.fsdp, settings.tensor, settings.sequence)
    wanted = math.prod(sizes)
    if wanted > len(devices):
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} needs {wanted} devices; there are "
            f"{len(devices)}"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} uses {wanted} of the {len(devices)} "
            f"devices of {jax.process_count()} processes: the others would idle; mesh.data=null "
            "takes all"
        )
    kinds = (AxisType.Auto,) * 4
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices[:wanted])
    if _parts(mesh, DEFAULT_RULES) is None:  # jax may lay devices out by their wires
        mesh = Mesh(np.reshape(devices, sizes), MESH_AXES, axis_types=kinds)
    return mesh


def rules_of(settings: MeshSettings) -> Rules:
    """The mesh rules of a configuration."""
    try:
        return DEFAULT_RULES if settings.rules is None else make_rules(settings.rules)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def batch_ways(mesh: Mesh, rules: Rules) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in dict(rules).get("batch", ()))


def check_batch(rows: int, mesh: Mesh, rules: Rules, what: str) -> None:
    """Raises ConfigError unless the rows divide over the devices that share a batch."""
    ways = batch_ways(mesh, rules)
    if rows % ways:
        raise ConfigError(
            f"{what}={rows} rows cannot be shared by {ways} devices; it must be a multiple of "
            f"{ways}, or mesh.data smaller"
        )


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(dict(rules).get("batch", ()) or None))


class Feed(NamedTuple):
    """Which part of the rows of each batch a process reads: part `index` of `count`.

    Processes that share rows (their devices differ in tensor or sequence alone) read the same part.
    """

    index: int  # type: ignore[assignment]
    count: int  # type: ignore[assignment]


def feed(mesh: Mesh, rules: Rules) -> Feed:
    """What this process reads.

    Raises:
        ConfigError: the rows of a process would not lie together.
    """
    parts = _parts(mesh, rules)
    if parts is None:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} over {jax.process_count()} processes: the devices of a "
            "process hold rows that do not lie together; make mesh.tensor and mesh.sequence divide "
            "the devices of a process, or be multiples of them"
        )
    return parts[jax.process_index()]


def _parts(mesh: Mesh, rules: Rules) -> dict[int, Feed] | None:
    ways = batch_ways(mesh, rules)
    held: dict[int, set[int]] = {}
    parts: Mapping[Any, Any] = batch_sharding(mesh, rules).devices_indices_map((ways,))
    for device, (rows,) in parts.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return parts_of(held, ways)


def parts_of(held: Mapping[int, set[int]], ways: int) -> dict[int, Feed] | None:
    """What each process reads; None = its rows lie apart, or processes hold unequal parts.

    Args:
        held: which of `ways` equal parts of the rows the devices of a process hold.
        ways: over how many devices the rows are spread.
    """
    (size, *others) = {len(rows) for rows in held.values()}
    if others or ways % size:
        return None
    found = {process: Feed(min(rows) // size, ways // size) for process, rows in held.items()}
    for process, rows in held.items():
        first = found[process].index * size
        if rows != set(range(first, first + size)):
            return None
    return found


def check_length(length: int, mesh: Mesh, rules: Rules, what: str) -> None:
    """Raises ConfigError unless the tokens of a row divide over the devices that share them."""
    over = dict(rules).get("length", ())
    ways = math.prod(mesh.shape[axis] for axis in over)
    if length % ways:
        raise ConfigError(
            f"{what}={length} tokens cannot be shared by {ways} devices; it must be a multiple of "
            f"{ways}, or mesh.sequence smaller"
        )


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Lays this process's rows of a batch on the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
