"""Which form of an operator runs: a page of plain functions.

An operator has forms by name, modules with

    run(*arrays, config, **options) -> results       its own jax.custom_vjp inside
    refuses(shapes, device_kind) -> reason or None

`implementation=None` takes the best form that serves the call on the platform it is lowered for
(a program traced on a CPU compiles for a TPU); a name takes exactly that form, or says why not.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax

_LOG = logging.getLogger(__name__)

# The platform that a kernel form is lowered for; the other forms run anywhere.
KERNELS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}
NAMES = ("reference", "xla", *KERNELS)


class Form(Protocol):
    """What a module of an operator's folder offers."""

    def run(self, *arrays: Any, **options: Any) -> Any: ...

    def refuses(self, shapes: Any, device_kind: str) -> str | None: ...


Reasons = dict[str, str | None]


class _Record:
    """Holds what `explain` asks for; compared by identity, so that each one is traced anew."""

    reasons: Reasons | None = None


# Contexts that jit's caches know of: what was traced outside one is traced anew inside.
_FORCED = jax.make_user_context(default_value=None)
_COUNTED = "counted"
_RECORD = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def forced(name: str) -> Iterator[None]:
    """Every operator called inside with implementation=None takes exactly the form `name`."""
    with _FORCED(_known(name)):
        yield


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """For counting operations: every operator called inside takes its definition.

    A definition may name another form in `counted_as`: no algorithm does a long convolution as a
    matrix product.
    """
    with _FORCED(_COUNTED):
        yield


def device_kind(config: Any = None) -> str:
    """The kind of device to compile for, decided at tracing.

    The config's, else that of the abstract device of the mesh in force (compile-only callers set
    one), else the local device's.
    """
    if getattr(config, "device_kind", None):
        return config.device_kind
    device = _abstract_device()
    return device.device_kind if device is not None else jax.local_devices()[0].device_kind


def call(
    op: str,
    forms: Mapping[str, Form],
    arrays: tuple,
    *,
    implementation: str | None = None,
    config: Any = None,
    **options: Any,
) -> Any:
    """Runs an operator by the form that serves.

    Args:
        op: its name, for messages and profiles.
        forms: its forms by name.
        arrays: pytree arguments of `run`; optional ones are made concrete or None beforehand.
        implementation: None = the best, else a name.
        config: tile sizes, `interpret`, `device_kind`; None = the form's own choice.
        **options: static keywords of `run`.

    Raises:
        ValueError: there is no such form.
        NotImplementedError: the form that was named refuses this call; the text says why.
    """
    name = implementation or _FORCED.value
    if implementation is None and name == _COUNTED:
        name = getattr(forms["reference"], "counted_as", "reference")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    kind = device_kind(config)
    if _RECORD.value is not None:
        _RECORD.value.reasons = {
            form: _why_not(forms[form], form, shapes, kind, config) for form in forms
        }

    def bound(form: str) -> Callable:
        return functools.partial(forms[form].run, config=config, **options)

    with jax.named_scope(op):
        if name is not None:
            reason = _why_not(forms[_known(name)], name, shapes, kind, config)
            if reason:
                raise NotImplementedError(
                    f"{op}: implementation='{name}' is refused: {reason}; "
                    "implementation=None takes the best form that serves"
                )
            return bound(name)(*arrays)
        branches: dict[str, Callable] = {}
        for kernel, platform in KERNELS.items():
            reason = forms[kernel].refuses(shapes, kind)
            if reason:
                _LOG.debug("%s: %s does not serve this call: %s", op, kernel, reason)
            else:
                branches[platform] = bound(kernel)
        if not branches:
            return bound("xla")(*arrays)
        return jax.lax.platform_dependent(*arrays, **branches, default=bound("xla"))


def explain(op: Callable, *arguments: Any, **keywords: Any) -> Reasons:
    """Which forms would serve a call of an operator here, and why others would not.

    Args:
        op: the operator.
        *arguments: its arrays or their jax.ShapeDtypeStructs; nothing is computed.
        **keywords: its keywords; segment_ids and initial_state may be abstract too.

    Returns:
        Name of the form to None (it would serve) or the reason against it, the slowest form first.
        `implementation=None` takes the last one without a reason.
    """
    record = _Record()
    traced = {k: keywords.pop(k) for k in ("initial_state", "segment_ids") if k in keywords}
    with _RECORD(record):
        jax.eval_shape(functools.partial(op, **keywords), *arguments, **traced)
    if record.reasons is None:
        raise ValueError(f"{op} made no operator call; explain takes one of pallas_kernels")
    return record.reasons


def _why_not(form: Form, name: str, shapes: Any, kind: str, config: Any) -> str | None:
    reason = form.refuses(shapes, kind)
    platform = KERNELS.get(name)
    if reason or platform is None or getattr(config, "interpret", False):
        return reason
    here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if _abstract_device() is None and here != platform:
        return f"it needs a {platform} device and this is a {here}; config.interpret runs it anyway"
    return None


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"implementation='{name}'; allowed are None, {', '.join(NAMES)}")
    return name
