"""Training. `seqzoo.train(overrides=["optimizer.lr=1e-3"])` trains from Python.

The package can be called: the module `seqzoo.train` would otherwise stand in the place of the
function of that name. Imports nothing before it is.
"""

import sys
import types
from collections.abc import Sequence
from typing import Any


class _Callable(types.ModuleType):
    def __call__(
        self,
        overrides: Sequence[str] = (),
        *,
        root: str = "runs",
        force: bool = False,
        strict: bool = False,
        config_dir: str | None = None,
    ) -> Any:
        """Composes a configuration and trains; the same call goes on where it stopped.

        Args:
            overrides: as on the command line, ``["model=mamba_small", "optimizer.lr=1e-3"]``.
            root: the folder of all runs.
            force: begin anew; what is there moves aside.
            strict: refuse to go on if code or versions changed.
            config_dir: your own config groups, beside ours.

        Returns:
            seqzoo.train.result.Result: status, step, metric, value, target, test, path.
        """
        from seqzoo.config.compose import compose
        from seqzoo.train.folder import apply_threads

        config = compose(overrides, config_dir=config_dir)
        if not force:
            apply_threads(config, overrides, root=root)  # before jax starts
        from seqzoo.train.loop import train

        return train(config, overrides=overrides, root=root, force=force, strict=strict)


sys.modules[__name__].__class__ = _Callable
