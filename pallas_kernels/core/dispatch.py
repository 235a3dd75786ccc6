"""Which form of an operator runs: a page of plain functions.

An operator has forms by name, modules with

    run(*arrays, **options) -> results       its own jax.custom_vjp inside
    refuses(shapes, device_kind) -> reason or None

`implementation=None` takes the best form that serves the call on the platform it is lowered for
(a program traced on a CPU compiles for a TPU); a name takes exactly that form, or says why not.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax

_LOG = logging.getLogger(__name__)

# The platform that a kernel form is lowered for; the other forms run anywhere.
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
NAMES = ("reference", "xla", *KERNELS)

_FORCED: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Every operator called inside with implementation=None takes exactly the form `name`."""
    token = _FORCED.set(_known(name))
    try:
        yield
    finally:
        _FORCED.reset(token)


def device_kind(config: Any = None) -> str:
    """The kind of device to compile for, decided at tracing.

    The config's, else that of the abstract device of the mesh in force (compile-only callers set
    one), else the local device's.
    """
    if getattr(config, "device_kind", None):
        return config.device_kind
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.local_devices()[0].device_kind


def call(
    op: str,
    forms: Mapping[str, ModuleType],
    arrays: tuple,
    *,
    implementation: str | None = None,
    config: Any = None,
    **options: Any,
) -> Any:
    """Runs an operator by the form that serves.

    Args:
        op: its name, for messages.
        forms: its forms by name.
        arrays: pytree arguments of `run`; optional ones are made concrete or None beforehand.
        implementation: None = the best, else a name.
        config: tile sizes, `interpret`, `device_kind`; None = the form's own choice.
        **options: static keywords of `run`.

    Raises:
        ValueError: there is no such form.
        NotImplementedError: the form that was named refuses this call; the text says why.
    """
    name = implementation or _FORCED.get()
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    kind = device_kind(config)
    if name is not None:
        reason = _why_not(forms, _known(name), shapes, kind, config)
        if reason:
            raise NotImplementedError(f"{op}: implementation='{name}' is refused: {reason}")
        return _bound(forms[name], options, config)(*arrays)
    branches: dict[str, Callable] = {}
    for kernel, platform in KERNELS.items():
        reason = forms[kernel].refuses(shapes, kind)
        if reason:
            _LOG.debug("%s: %s does not serve this call: %s", op, kernel, reason)
        else:
            branches[platform] = _bound(forms[kernel], options, config)
    xla = _bound(forms["xla"], options, config)
    if not branches:
        return xla(*arrays)
    return jax.lax.platform_dependent(*arrays, **branches, default=xla)


def explain(forms: Mapping[str, ModuleType], shapes: tuple) -> dict[str, str | None]:
    """Why each form would not serve these shapes on this machine; None = it would.

    Args:
        forms: the operator's.
        shapes: its arrays or their ShapeDtypeStructs.
    """
    return {name: _why_not(forms, name, shapes, device_kind(), None) for name in forms}


def _why_not(forms, name: str, shapes, kind: str, config) -> str | None:
    reason = forms[name].refuses(shapes, kind)
    platform = KERNELS.get(name)
    if reason or platform is None or getattr(config, "interpret", False):
        return reason
    here = jax.default_backend()
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is None and {"gpu": "cuda"}.get(here, here) != platform:
        return f"it needs a {platform} device and this is a {here}"
    return None


def _bound(form: ModuleType, options: Mapping[str, Any], config: Any) -> Callable:
    return functools.partial(form.run, config=config, **options)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"implementation='{name}'; allowed are None, {', '.join(NAMES)}")
    return name
