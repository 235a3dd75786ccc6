"""Optimizers by config, out of optax: what varies in a sweep is an argument, not a constant.

An optimizer is a frozen dataclass. `hyper()` gives its run-time values (lr, weight_decay,
clip_norm); `transform(hyper, decay)` builds the optax chain inside the traced step from their
traced values; `structure()` is the optimizer without them, the key of the compiled step.
Weight decay is decoupled everywhere: p <- p - lr * (update + weight_decay * p). A parameter may
declare a peak lr or a weight_decay of its own (seqzoo.nn.param.param), with any optimizer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import jax
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

from seqzoo.errors import ConfigError
from seqzoo.nn.param import Rates

Hyper = Mapping[str, Any]


class Optimizer(Protocol):
    """A node of configs/optimizer/; see the module."""

    lr: float

    def hyper(self) -> dict[str, float]: ...

    def structure(self) -> Self: ...

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay.

    Attributes:
        lr: peak learning rate.
        weight_decay: on the parameters that declare it.
        clip_norm: gradients are scaled down to this global norm; null = never.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root of the latter.
        nesterov: look ahead (NAdam).

    Source: Loshchilov and Hutter (arXiv 1711.05101).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self, "b1", "b2")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"optimizer.eps={self.eps}; it must be above 0{_finite(self.eps)}")

    def hyper(self) -> dict[str, float]:
        return _hyper(self)

    def structure(self) -> Self:
        return _structure(self)

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation:
        scale = optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=self.nesterov)
        return _chain(scale, hyper, decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """Gradient descent with momentum.

    Attributes:
        lr: peak learning rate.
        weight_decay: on the parameters that declare it.
        clip_norm: gradients are scaled down to this global norm; null = never.
        momentum: decay of the sum of gradients; 0 = none.
        nesterov: look ahead.
    """

    lr: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check(self, "momentum")

    def hyper(self) -> dict[str, float]:
        return _hyper(self)

    def structure(self) -> Self:
        return _structure(self)

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation:
        scale = optax.identity()
        if self.momentum:
            scale = optax.trace(self.momentum, nesterov=self.nesterov)
        return _chain(scale, hyper, decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of a mean of gradients.

    Attributes:
        lr: peak learning rate; a third to a tenth of AdamW's.
        weight_decay: on the parameters that declare it; three to ten times AdamW's.
        clip_norm: gradients are scaled down to this global norm; null = never.
        b1: weight of the mean in the update.
        b2: decay of the mean.

    Source: Chen et al. (arXiv 2302.06675).
    """

    lr: float = 1e-4
    weight_decay: float = 1.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self) -> None:
        _check(self, "b1", "b2")

    def hyper(self) -> dict[str, float]:
        return _hyper(self)

    def structure(self) -> Self:
        return _structure(self)

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation:
        return _chain(optax.scale_by_lion(self.b1, self.b2), hyper, decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adam whose second moment is kept as row and column sums: half the memory.

    Attributes:
        lr: peak learning rate.
        weight_decay: on the parameters that declare it.
        clip_norm: gradients are scaled down to this global norm; null = never.
        b1: decay of the mean of gradients; 0 = none is kept.
        decay_rate: exponent of the second moment's decay.
        min_dim_size_to_factor: smaller matrices keep a full second moment.

    Source: Shazeer and Stern (arXiv 1804.04235), with a given learning rate.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    b1: float = 0.9
    decay_rate: float = 0.8
    min_dim_size_to_factor: int = 128

    def __post_init__(self) -> None:
        _check(self, "b1", "decay_rate")

    def hyper(self) -> dict[str, float]:
        return _hyper(self)

    def structure(self) -> Self:
        return _structure(self)

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation:
        scale = optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_dim_size_to_factor
            ),
            optax.clip_by_block_rms(1.0),
            optax.ema(self.b1, debias=False) if self.b1 else optax.identity(),
        )
        return _chain(scale, hyper, decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices of linear layers, Adam for everything else.

    Updates are scaled so that their root mean square is Adam's: learning rates carry over.

    Attributes:
        lr: peak learning rate.
        weight_decay: on the parameters that declare it.
        clip_norm: gradients are scaled down to this global norm; null = never.
        momentum: decay of the mean of gradients, for matrices.
        ns_steps: Newton-Schulz iterations.
        b1: decay of the mean of gradients, for everything else.
        b2: decay of the mean of their squares.

    Source: Jordan et al., "Muon" (2024); the scale is that of Liu et al. (arXiv 2502.16982).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    momentum: float = 0.95
    ns_steps: int = 5
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self) -> None:
        _check(self, "momentum", "b1", "b2")
        if self.ns_steps < 1:
            raise ConfigError(f"optimizer.ns_steps={self.ns_steps}; it must be at least 1")

    def hyper(self) -> dict[str, float]:
        return _hyper(self)

    def structure(self) -> Self:
        return _structure(self)

    def transform(self, hyper: Hyper, decay: Any) -> optax.GradientTransformation:
        scale = optax.contrib.muon(
            learning_rate=1.0,
            ns_steps=self.ns_steps,
            beta=self.momentum,
            adam_b1=self.b1,
            adam_b2=self.b2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
        return _chain(optax.chain(scale, optax.scale(-1.0)), hyper, decay)


def _matrices(params: Any) -> Any:
    """The kernels of linear layers `[... in out]`; leading dimensions are layers or experts."""

    def one(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if getattr(path[-1], "key", None) != "kernel" or leaf.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(one, params)


def with_own_rates(
    updates: Mapping[str, Any],
    params: Mapping[str, Any],
    rated: Sequence[tuple[tuple, Rates]],
    hyper: Hyper,
) -> Any:
    """Updates in which some parameters follow rates of their own.

    What an optimizer adds to a parameter is its direction times lr; with another lr it is scaled,
    and a decay of its own is taken off where the optimizer's did not apply.

    Args:
        updates: what the optimizer would add to the parameters.
        params: the parameters, nested dicts alike.
        rated: paths of parameters, and their rates.
        hyper: lr and peak_lr, that lr before the schedule.
    """
    if not rated:
        return updates
    flat, values = flatten_dict(updates), flatten_dict(params)
    for path, rates in rated:
        ratio = 1.0 if rates.lr is None else rates.lr / hyper["peak_lr"]
        update = ratio * flat[path]
        if rates.weight_decay:
            update -= hyper["lr"] * ratio * rates.weight_decay * values[path]
        flat[path] = update
    return unflatten_dict(flat)


def _chain(
    scale: optax.GradientTransformation, hyper: Hyper, decay: Any
) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(hyper["clip_norm"]),
        scale,
        optax.add_decayed_weights(hyper["weight_decay"], decay),
        optax.scale_by_learning_rate(hyper["lr"]),
    )


def _hyper(optimizer: Any) -> dict[str, float]:
    clip = math.inf if optimizer.clip_norm is None else optimizer.clip_norm
    return {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay, "clip_norm": clip}


def _structure(optimizer: Any) -> Any:
    return dataclasses.replace(optimizer, lr=1.0, weight_decay=0.0, clip_norm=None)


def _check(optimizer: Any, *decays: str) -> None:
    if not 0 < optimizer.lr < math.inf:
        raise ConfigError(f"optimizer.lr={optimizer.lr}; it must be above 0{_finite(optimizer.lr)}")
    if not 0 <= optimizer.weight_decay < math.inf:
        raise ConfigError(
            f"optimizer.weight_decay={optimizer.weight_decay}; it must be 0 or more"
            f"{_finite(optimizer.weight_decay)}"
        )
    if optimizer.clip_norm is not None and not optimizer.clip_norm > 0:
        raise ConfigError(f"optimizer.clip_norm={optimizer.clip_norm}; it must be above 0, or null")
    for name in decays:
        value = getattr(optimizer, name)
        if not 0 <= value < 1:
            raise ConfigError(f"optimizer.{name}={value}; it must lie in [0, 1)")


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else ", and finite"


def init(optimizer: Optimizer, params: Any, decay: Any) -> optax.OptState:
    """The state before the first update; it does not depend on the run-time values."""
    hyper = jax.tree.map(float, optimizer.hyper())
    return optimizer.transform(hyper, decay).init(params)
