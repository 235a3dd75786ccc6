"""The mesh of a run, and how batches are laid on it. One device is the mesh of ones."""

import math
from collections.abc import Mapping

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
    if settings.sequence > 1:
        raise ConfigError(
            f"mesh.sequence={settings.sequence}: sequences cannot be split over devices yet; "
            "it must be 1"
        )
    data = settings.data
    if data is None:
        data, rest = divmod(len(devices), others)
        if rest or not data:
            raise ConfigError(
                f"mesh.fsdp * mesh.tensor = {others} does not divide the {len(devices)} devices "
                "here; change one, or set mesh.data to use fewer devices"
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
            f"mesh uses {wanted} of {len(devices)} devices: with several processes all"
        )
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:wanted]
    )


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


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Lays this process's rows of a batch on the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
