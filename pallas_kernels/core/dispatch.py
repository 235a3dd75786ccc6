"""Which form of an operator runs: a page of plain functions.

An operator has forms by name, modules with

    run(*arrays, config, **options) -> results       its own jax.custom_vjp inside
    refuses(shapes, device_kind) -> reason or None
    refuses_options(shapes, device_kind, **options) -> reason or None      if it serves not all

`implementation=None` takes the best form that serves the call on the platform it is lowered for; a
name takes exactly that form, or says why not. Kernels are traced where the device is theirs; a
machine without one traces them for it inside `compiling_for("TPU v5 lite")`.
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
# The device whose tiles a kernel takes where it is interpreted on another one.
INTERPRETED_AS = {"tpu": "TPU v5 lite", "cuda": "NVIDIA H100 80GB HBM3"}
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


@contextlib.contextmanager
def compiling_for(kind: str) -> Iterator[None]:
    """What is traced inside is for a device of this kind, whatever stands in this machine.

    Args:
        kind: jax's name of the device, "TPU v5 lite", "NVIDIA H200".
    """
    platform = {"cuda": "gpu"}.get(platform_of(kind), platform_of(kind))
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
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
        config: tile sizes, `interpret`, `device_kind`; None = the form's own choice. Where nobody
            names a form, the configuration of one is for that one alone.
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
            form: _why_not(forms[form], form, shapes, kind, config, options) for form in forms
        }

    def bound(form: str) -> Callable:
        theirs = name is None and _is_of_another(config, form, forms)
        return functools.partial(forms[form].run, config=None if theirs else config, **options)

    with jax.named_scope(op):
        if name is not None:
            reason = _why_not(forms[_known(name)], name, shapes, kind, config, options)
            if reason:
                raise NotImplementedError(
                    f"{op}: implementation='{name}' is refused: {reason}; "
                    "implementation=None takes the best form that serves"
                )
            return bound(name)(*arrays)
        branches: dict[str, Callable] = {}
        for kernel, platform in KERNELS.items():
            reason = _why_no_kernel(forms[kernel], platform, shapes, kind, options)
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
        `implementation=None` takes the last one without a reason. A kernel that serves a call may
        leave its backward pass to xla: docs/kernels.csv and the operator's README.md say where.
    """
    record = _Record()
    traced = {k: keywords.pop(k) for k in ("initial_state", "segment_ids") if k in keywords}
    with _RECORD(record):
        jax.eval_shape(functools.partial(op, **keywords), *arguments, **traced)
    if record.reasons is None:
        raise ValueError(f"{op} made no operator call; explain takes one of pallas_kernels")
    return record.reasons


def _is_of_another(config: Any, form: str, forms: Mapping[str, Form]) -> bool:
    """Whether a configuration was written for another form than this one."""
    module = type(config).__module__
    of = [name for name in forms if getattr(forms[name], "__name__", None) == module]
    return bool(of) and form not in of


def _why_not(
    form: Form, name: str, shapes: Any, kind: str, config: Any, options: Mapping[str, Any]
) -> str | None:
    platform = KERNELS.get(name)
    if platform is None:
        return _refusal(form, shapes, kind, options)
    if getattr(config, "interpret", False):
        return _refusal(form, shapes, config.device_kind or INTERPRETED_AS[platform], options)
    return _why_no_kernel(form, platform, shapes, kind, options)


def _why_no_kernel(
    form: Form, platform: str, shapes: Any, kind: str, options: Mapping[str, Any]
) -> str | None:
    """Why a kernel is no use here: its own reason, else that the device is another one.

    A kernel is traced for its own devices only: a CPU's programs would trace every one in vain.
    """
    if platform_of(kind) == platform:
        return _refusal(form, shapes, kind, options) or _wide()
    return _refusal(form, shapes, INTERPRETED_AS[platform], options) or (
        f"it needs a {platform} device and this is a {kind}; config.interpret runs it anyway, and "
        "inside dispatch.compiling_for(KIND) it compiles for another device"
    )


def _wide() -> str | None:
    """The reason against kernels where whole numbers have 64 bits: theirs have 32.

    Some break while they are traced, and none is tested so.
    """
    if jax.dtypes.canonicalize_dtype("int64") != "int64":
        return None
    return "jax_enable_x64 is on, and kernels count in int32; jax.enable_x64(False) around it helps"


def _refusal(form: Form, shapes: Any, kind: str, options: Mapping[str, Any]) -> str | None:
    reason = form.refuses(shapes, kind)
    more = getattr(form, "refuses_options", None)
    return reason or (more(shapes, kind, **options) if more else None)


def platform_of(kind: str) -> str:
    """The platform of a kind of device: "tpu", "cuda", or the first word of its name."""
    if kind.startswith("TPU"):
        return "tpu"
    if kind.startswith("NVIDIA"):
        return "cuda"
    return kind.split()[0].lower()


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"implementation='{name}'; allowed are None, {', '.join(NAMES)}")
    return name
