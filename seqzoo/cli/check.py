"""`seqzoo check`: the suite that every mixer passes, run on any class."""

import argparse
import functools
import importlib
import inspect

from omegaconf import OmegaConf

from seqzoo.errors import ConfigError, suggest

HELP = "test a mixer class, yours or ours, against the contract of a mixer"

EPILOG = """examples:
  seqzoo check seqzoo.mixers.Mamba
  seqzoo check seqzoo.mixers.attention.Attention n_heads=4 n_kv_heads=2
  seqzoo check mylab.mixers.diagonal.Diagonal d_state=8 --only causal packed_equal_alone

One line per promise. "declined" means that the mixer raised NotImplementedError with a reason.
The exit code is 1 if a promise is broken. The class is imported as Python does it: install its
package, or set PYTHONPATH. How to write one: docs/add_a_mixer.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = HELP
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", metavar="package.module.Class")
    parser.add_argument(
        "keywords", nargs="*", default=[], metavar="key=value", help="of its constructor"
    )
    parser.add_argument("--d-model", type=int, default=32, help="width to test at (default 32)")
    parser.add_argument("--only", nargs="+", metavar="PROMISE", help="test these promises alone")


def run(args: argparse.Namespace) -> int:
    mixer_class = find_class(args.target)
    keywords = parse_keywords(args.keywords, mixer_class)

    from seqzoo.testing import PROMISES, Subject, check_promise  # starts jax

    for name in args.only or ():
        if name not in PROMISES:
            raise ConfigError(
                f"no promise is called {name!r}{suggest(name, PROMISES)}; "
                f"there are {', '.join(PROMISES)}"
            )
    subject = Subject(build=functools.partial(mixer_class, **keywords), d_model=args.d_model)
    results = []
    for name in args.only or PROMISES:
        result = check_promise(name, subject)
        results.append(result)
        print(f"{result.outcome:<9} {result.promise:<24} {result.detail}", flush=True)
    failed = [result.promise for result in results if not result.passed]
    declined = sum(result.outcome == "declined" for result in results)
    print(
        f"\n{args.target}: {len(results) - len(failed) - declined} kept, {declined} declined, "
        f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


def find_class(target: str) -> type:
    """Imports `package.module.Class`.

    Raises:
        ConfigError: it cannot be imported, or is no class; the text says which part is missing.
    """
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{target!r} names no class; give package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module_name!r}: {error}; is its package installed here "
            "(pip install -e .), or on PYTHONPATH?"
        ) from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise ConfigError(f"{module_name} has no class {name!r}{suggest(name, classes)}")
    return found


def parse_keywords(overrides: list[str], mixer_class: type) -> dict:
    """Reads key=value as a config would, and refuses what the constructor does not take."""
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is no key=value")
    keywords = OmegaConf.to_container(OmegaConf.from_dotlist(overrides), resolve=True)
    taken = dict(inspect.signature(mixer_class.__init__).parameters)
    taken.pop("self", None)
    for key in keywords:
        if key in ("d_model", "dtype", "rngs"):
            raise ConfigError(f"{key} is set by the suite; --d-model sets the width")
        if key not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise ConfigError(
                f"{mixer_class.__name__} takes no {key!r}{suggest(key, taken)}; it takes "
                f"{', '.join(n for n in taken if n not in ('d_model', 'dtype', 'rngs'))}"
            )
    return keywords
