"""A process of the report: one phase of one operator; rows and progress as lines of JSON."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from pallas_kernels.core.on_gpu import shapes
from pallas_kernels.core.on_gpu.result import Result

# In their order: whether kernels are right comes before how fast they are. Seconds that one
# process of a phase may take, and the phase's share of the time that is left.
PHASES = {
    **dict(numerics=110, rates=45, times=75, peers=50, attention=45, ours=40),
    "models": 150,
}
SHARES = dict(numerics=6, rates=1, times=10, peers=5, attention=1, ours=4, models=10)
USUAL = tuple(phase for phase in PHASES if phase != "models")
# Those of seqzoo.eval.gpu_models, which a process of that module trains.
MODELS = (
    *("mamba_130m", "based_360m", "mom_340m", "titans_mag_340m", "m2_bert_80m"),
    "tcnca_enwik8",
)
BY_OPERATOR = ("numerics", "times")
BY_PEER = ("peers", "ours")
# Of operators whose kernels take most of a minute each to compile: processes that share the cases
# of numerics, and how many times as long as another's one may take.
PARTS = {"neural_memory": 6}
LONGER = {"neural_memory": 2.0}


def names_of(phase: str, names: list[str], *, whole: bool = False) -> list[str]:
    """The processes of a phase, of operators in the order of a report; one has no name.

    Those of numerics that share an operator are "operator/part", and come first: they take longest.
    With `whole` none is shared.
    """
    if phase == "models":
        return list(MODELS)
    if phase in BY_PEER:
        return [name for name in names if name in shapes.PEERS]
    if phase == "numerics" and not whole:
        shared = [f"{name}/{i}" for name in names if name in PARTS for i in range(PARTS[name])]
        return shared + [name for name in names if name not in PARTS]
    return names if phase in BY_OPERATOR else [""]


def operator_of(name: str) -> str:
    """The operator that a process of `names_of` is about."""
    return name.partition("/")[0]


def work(phase: str, name: str, *, seed: int, dry: bool, folder: pathlib.Path) -> int:
    """Prints the findings of a phase; the exit code is 0 unless the process itself broke."""
    for told in _findings(phase, name, seed, dry, folder):
        line = {"doing": told} if isinstance(told, str) else told._asdict()
        print(json.dumps(line), flush=True)
    return 0


def _findings(
    phase: str, name: str, seed: int, dry: bool, folder: pathlib.Path
) -> Iterator[Result | str]:
    if phase == "peers":  # no jax: the GPU's memory is PyTorch's
        from pallas_kernels.core.on_gpu import peers

        yield from peers.measure(name, seed, dry, folder)
        return
    from pallas_kernels.core.on_gpu import lines, numerics, times

    name, _, part = name.partition("/")
    how = numerics.How(seed, dry, int(part or 0), PARTS[name] if part else 1)
    if phase == "device":
        yield _device()
    elif phase == "rates":
        yield from times.rates(how)
    elif phase == "attention":
        yield from lines.attention(how)
    elif phase == "ours":
        yield from lines.ours(name, how, folder)
    else:
        from pallas_kernels import OPERATORS
        from pallas_kernels.core import kernel_check

        op: Any = OPERATORS[name]
        if not kernel_check.has_kernel(op, numerics.FORM):
            text = "NOT WRITTEN: there is no GPU kernel; dispatch takes xla"
            yield Result(phase, name, what=numerics.FORM, status=text)
            return
        yield from (numerics.check if phase == "numerics" else times.measure)(op, how)


def _device() -> Result:
    import jax

    from pallas_kernels.core import gpu

    device = jax.local_devices()[0]
    on_gpu = device.platform in ("gpu", "cuda")
    refused = gpu.refuses_device(device.device_kind) if on_gpu else None
    versions = f"jax {jax.__version__}, {device.client.platform_version}"
    row = Result("device", device.device_kind, what=device.platform, detail=versions)
    return row._replace(status=refused or "ok")
