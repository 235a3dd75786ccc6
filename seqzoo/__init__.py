"""Train, sweep and evaluate subquadratic sequence architectures from config files, in JAX.

    run = seqzoo.load("runs/mqar/latest")       a trained model, its configuration, its metrics
    seqzoo.train(overrides=["model=mamba_small"])
    from seqzoo.mixers import Mamba

Nothing is imported before it is used.
"""

import importlib
from typing import Any

__all__ = ["load", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # both modules can be called
        return importlib.import_module(f"seqzoo.{name}")
    raise AttributeError(f"module 'seqzoo' has no attribute {name!r}")
