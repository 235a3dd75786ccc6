"""`seqzoo show`: what a configuration is, without running it."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from seqzoo.cli.common import (
    add_config_arguments,
    add_trust_argument,
    bytes_text,
    cell,
    print_json,
    print_table,
)
from seqzoo.config import paths, schema
from seqzoo.config.compose import compose
from seqzoo.config.trust import load_untrusted
from seqzoo.errors import ConfigError, suggest

EPILOG = """examples:
  seqzoo show                                              the default experiment
  seqzoo show model=mamba_130m data.seq_len=2048
  seqzoo show model.pattern='[mamba,attention]' --length 8192 --format json
  seqzoo show model=transformer_small --match params --to mamba_small
  seqzoo show model=mamba_small --match state --to transformer_small --length 1024
  seqzoo show model=mamba_small --match flops --to runs/text/latest --vary model.n_layers

Nothing is allocated: a model of billions is shown as quickly as a small one. FLOPs are those of
the operators' definitions. Memory is what must be kept, for one device that holds everything; the
temporaries of single operations come on top (measured: a third more on a CPU).
--match solves one setting (the width, or for state the mixer's d_state) until the two agree within
what a comparison needs: parameters without embeddings 2 %, state and FLOPs 5 %.
"""

MATCHES = {
    "params": "parameters without embeddings",
    "state": "state bytes",
    "flops": "training FLOPs per token",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens in a row (default: data.seq_len)"
    )
    parser.add_argument("--match", choices=tuple(MATCHES), help="solve a setting to cost as --to")
    parser.add_argument("--to", metavar="MODEL", help="a model of configs/model/, or a run folder")
    parser.add_argument("--vary", metavar="KEY", help="the setting to solve for")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    if (args.match is None) != (args.to is None):
        raise ConfigError("--match and --to belong together: --match params --to mamba_small")
    if args.length is not None and args.length < 1:
        raise ConfigError(f"--length is {args.length}; it must be at least 1")
    config = compose(args.overrides, config_dir=args.config_dir)
    from seqzoo.train.values import check_values  # imports jax

    check_values(config)
    length = args.length or config.data.get("seq_len") or 1024
    if args.match:
        return _match(args, config, length)
    found = described(config, length)
    if args.format == "json":
        print_json({"config": OmegaConf.to_container(config), **found})
        return 0
    print(OmegaConf.to_yaml(config))
    print_description(found)
    return 0


def described(config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """What `--format json` prints beside the configuration."""
    from seqzoo.eval import describe  # starts jax

    model = describe.abstract_model(config["model"])
    counted = describe.parameters(model)
    flops = describe.flops_per_token(config, length)
    memory = describe.memory(config, length)
    state: dict[str, Any] = {}
    try:
        lengths = sorted({length, *describe.LENGTHS})
        state = {str(n): one for n, one in describe.state_bytes(model, lengths).items()}
    except NotImplementedError as error:  # a model that cannot decode
        state = {"reason": str(error)}
    return {
        "parameters": {
            "total": counted.total,
            "active": counted.active,
            "without_embeddings": counted.without_embeddings,
            "by_part": counted.by_part,
        },
        "length": length,
        "state_bytes": state,
        "flops_per_token": {"forward": flops.forward, "training": flops.training},
        "memory": {**memory._asdict(), "total": memory.total},
    }


def print_description(found: Mapping[str, Any]) -> None:
    """Prints what `described` returns."""
    counted, length = found["parameters"], found["length"]
    rows = [{"parameters": part, "count": n} for part, n in counted["by_part"].items()]
    for name in ("total", "active", "without_embeddings"):
        rows.append({"parameters": name.replace("_", " "), "count": counted[name]})
    print_table(rows)
    print()
    if "reason" in found["state_bytes"]:
        print(f"no decoding state: {found['state_bytes']['reason']}")
    else:
        print_table(
            [
                {
                    "state after": f"{int(n):,} tokens",
                    "recurrent": bytes_text(one["recurrent"]),
                    "all that decoding keeps": bytes_text(one["total"]),
                }
                for n, one in found["state_bytes"].items()
            ]
        )
    flops, memory = found["flops_per_token"], found["memory"]
    print(
        f"\nFLOPs per token at length {length:,}: forward {_si(flops['forward'])}, "
        f"training {_si(flops['training'])}"
    )
    parts = ", ".join(f"{k} {bytes_text(v)}" for k, v in memory.items() if k != "total")
    print(f"memory to train, at least {bytes_text(memory['total'])} ({parts})")


def _si(n: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} "


def _match(args: argparse.Namespace, config: Mapping[str, Any], length: int) -> int:
    from seqzoo.eval import match
    from seqzoo.eval.compare import TOLERANCES

    wanted = _cost(_target(args), args.match, length)
    keys = [args.vary] if args.vary else _keys_to_vary(config, args.match)
    start = OmegaConf.select(config, keys[0])
    if start is None:  # such as d_ff, which follows from the width unless it is set
        start = config.model.d_model
    if type(start) is not int:
        raise ConfigError(f"--vary {keys[0]}: its value is {start!r}, and no whole number")

    def cost(value: int, *more: str) -> float:
        words = [*args.overrides, *more, *(f"{key}={value}" for key in keys)]
        return _cost(compose(words, config_dir=args.config_dir), args.match, length)

    cost(start)  # a setting that takes no number says so here
    tolerance = TOLERANCES[MATCHES[args.match]]
    found = match.solve(cost, wanted, start=start, tolerance=tolerance)
    overrides = [f"{key}={found.value}" for key in keys]
    if not found.fits and args.vary is None and _FINER in _settable(config):
        # A small model's widths lie far apart; the inner width of its channel mixers is finer.
        width, keys = overrides, [_FINER]
        finer = match.solve(
            lambda value: cost(value, *width), wanted, start=3 * found.value, tolerance=tolerance
        )
        if finer.off < found.off:
            found, overrides = finer, [*width, f"{_FINER}={finer.value}"]
    if args.format == "json":
        print_json({"overrides": overrides, "match": args.match, **found._asdict()})
    else:
        print(
            f"{MATCHES[args.match]} at length {length:,}: {args.to} has {cell(wanted)}, "
            f"with {' '.join(overrides)} this has {cell(found.reached)} ({found.off:.2%} off)"
        )
        print(" ".join([*args.overrides, *overrides]))
    if not found.fits:
        raise ConfigError(
            f"no whole number of {keys[0]} comes within {tolerance:.0%}; that was the nearest. "
            "--vary KEY solves another setting"
        )
    return 0


_FINER = "model.channel_mixer.d_ff"


def _settable(config: Mapping[str, Any]) -> list[str]:
    return schema.valid_keys(OmegaConf.to_container(config))


def _target(args: argparse.Namespace) -> Mapping[str, Any]:
    """The configuration to match: the same data and task with another model, or a run's own."""
    if (pathlib.Path(args.to) / "config.yaml").is_file():
        return load_untrusted(pathlib.Path(args.to) / "config.yaml", args.trust)
    allowed = paths.options("model", paths.folders(args.config_dir))
    if args.to not in allowed:
        raise ConfigError(
            f"--to {args.to}: neither a model of configs/model/ nor a run folder; there are "
            f"{', '.join(allowed)}{suggest(args.to, allowed)}"
        )
    rest = [word for word in args.overrides if not word.lstrip("+~").startswith("model")]
    return compose([*rest, f"model={args.to}"], config_dir=args.config_dir)


def _keys_to_vary(config: Mapping[str, Any], what: str) -> list[str]:
    """The width; for state the size of the recurrences where the mixers have one."""
    mixers = config["model"].get("mixers") or {}
    sized = [f"model.mixers.{name}.d_state" for name, m in mixers.items() if "d_state" in m]
    return sized if what == "state" and sized else ["model.d_model"]


def _cost(config: Mapping[str, Any], what: str, length: int) -> float:
    from seqzoo.eval import describe

    if what == "flops":
        return describe.flops_per_token(config, length).training
    model = describe.abstract_model(config["model"])
    if what == "params":
        return describe.parameters(model).without_embeddings
    try:
        return model.state_bytes(length)["total"]
    except NotImplementedError as error:
        raise ConfigError(f"--match state: {error}; match params or flops") from error
