"""What the constructor behind a `_target_` takes: the schema of a configuration node.

The constructor is the one truth. Its source is read rather than imported where that is enough, so
that composing a configuration does not wait for jax to start.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
from collections.abc import Mapping
from typing import Any

from seqzoo.errors import ConfigError, suggest

# Bases that add no constructor of their own.
_PLAIN_BASES = {"object", "nnx.Module", "nnx.Pytree", "Protocol", "typing.Protocol", "abc.ABC"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyword:
    """One keyword of a constructor.

    Attributes:
        annotation: its type as Python text; None where the source gives none.
        default: its default as Python text; None where a value is required.
        meaning: what its docstring says of it.
    """

    annotation: str | None
    default: str | None
    meaning: str = ""

    @property
    def required(self) -> bool:
        return self.default is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """The keywords of a constructor, in order; `open` where it also takes any other."""

    keywords: dict[str, Keyword]
    open: bool = False


@functools.cache
def signature_of(target: str) -> Signature:
    """Returns what `package.module.Name` takes.

    Raises:
        ConfigError: there is no such module, or nothing of that name in it.
    """
    module, _, name = target.rpartition(".")
    if not module:
        raise ConfigError(f"_target_={target!r} names no class; give package.module.Class")
    return _read(module, name) or _imported(module, name)


def with_defaults(node: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a node with a `_target_`: where it is silent what the constructor takes."""
    found = dict(node)
    for name, keyword in signature_of(node["_target_"]).keywords.items():
        if keyword.default is not None:
            with contextlib.suppress(ValueError, SyntaxError):  # an expression, no value
                found.setdefault(name, ast.literal_eval(keyword.default))
    return found


def _read(module: str, name: str, depth: int = 0) -> Signature | None:
    """Reads the signature from source; None where only an import can tell."""
    tree = _tree(module)
    if tree is None or depth > 4:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(node, module, depth)
        if isinstance(node, ast.FunctionDef) and node.name == name and not node.decorator_list:
            return _of_function(node, ast.get_docstring(node), skip=0)
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _read(node.module, alias.name, depth + 1)
    return None


@functools.cache
def _tree(module: str) -> ast.Module | None:
    origin = _source(module)
    if origin is None:
        return None
    try:
        return ast.parse(origin.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _source(module: str) -> pathlib.Path | None:
    """Finds a module's file without importing the packages above it."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        name = top
        for part in rest:
            if spec is None:
                return None
            name += "." + part
            spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return pathlib.Path(spec.origin)


def _of_class(node: ast.ClassDef, module: str, depth: int) -> Signature | None:
    documented = ast.get_docstring(node) or ""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name in ("__init__", "__new__"):
            own = _of_function(item, documented + "\n\n" + (ast.get_docstring(item) or ""), skip=1)
            return _with_parents(own, node, module, depth) if own.open else own
    if {ast.unparse(base).split("[")[0] for base in node.bases} - _PLAIN_BASES:
        return None  # a parent may add keywords
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    meanings = _meanings(documented)
    keywords = {}
    for place, item in enumerate(node.body):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        annotation = ast.unparse(item.annotation)
        if annotation.startswith(("ClassVar", "typing.ClassVar")):
            continue
        default = None if item.value is None else ast.unparse(item.value)
        if default is not None and "field(" in default:
            if "init=False" in default:
                continue
            default = _field_default(item.value)
        name = item.target.id
        said = meanings.get(name) or _text_under(node.body, place)
        keywords[name] = Keyword(annotation=annotation, default=default, meaning=said)
    return Signature(keywords=keywords)


def _with_parents(own: Signature, node: ast.ClassDef, module: str, depth: int) -> Signature | None:
    """Adds what a constructor hands on as **keywords: what its parents take."""
    keywords = dict(own.keywords)
    for base in node.bases:
        if ast.unparse(base) in _PLAIN_BASES:
            continue
        parent = _read(module, ast.unparse(base), depth + 1)
        if parent is None:
            return None  # only an import can tell
        if parent.open:
            return Signature(keywords={**parent.keywords, **keywords}, open=True)
        keywords = {**parent.keywords, **keywords}
    return Signature(keywords=keywords, open=keywords == own.keywords)


def _field_default(call: ast.expr) -> str | None:
    for keyword in getattr(call, "keywords", ()):
        if keyword.arg in ("default", "default_factory"):
            return ast.unparse(keyword.value)
    return None


def _text_under(body: list[ast.stmt], place: int) -> str:
    """The string that stands under a field, as some write their field's documentation."""
    following = body[place + 1] if place + 1 < len(body) else None
    value = following.value if isinstance(following, ast.Expr) else None
    text = value.value if isinstance(value, ast.Constant) else None
    return " ".join(text.split()) if isinstance(text, str) else ""


def _of_function(node: ast.FunctionDef, documented: str | None, *, skip: int) -> Signature:
    meanings = _meanings(documented or "")
    args = node.args
    positional = (args.posonlyargs + args.args)[skip:]
    padded = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(positional, padded[-len(positional) :] if positional else [], strict=True)]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    keywords = {
        arg.arg: Keyword(
            annotation=None if arg.annotation is None else ast.unparse(arg.annotation),
            default=None if default is None else ast.unparse(default),
            meaning=meanings.get(arg.arg, ""),
        )
        for arg, default in pairs
    }
    return Signature(keywords=keywords, open=args.kwarg is not None)


def _imported(module: str, name: str) -> Signature:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(
            f"_target_={module}.{name}: cannot import {module} ({error}); is its package "
            "installed here (pip install -e .), or on PYTHONPATH?"
        ) from error
    if not callable(found):
        names = vars(importlib.import_module(module))
        raise ConfigError(f"_target_={module}.{name}: {module} has no {name}{suggest(name, names)}")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return Signature(keywords={}, open=True)
    meanings = _meanings(inspect.getdoc(found) or "")
    return Signature(
        keywords={
            p.name: Keyword(
                annotation=None if p.annotation is p.empty else _annotation_text(p.annotation),
                default=None if p.default is p.empty else repr(p.default),
                meaning=meanings.get(p.name, ""),
            )
            for p in parameters
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        },
        open=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _annotation_text(annotation) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if type(annotation) is type else str(annotation)


def _meanings(documented: str) -> dict[str, str]:
    """Reads the entries under ``Args:`` or ``Attributes:`` of a Google-form docstring."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside, indent = False, None
    for line in inspect.cleandoc(documented).splitlines():
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if text and depth == 0:
            inside, indent, names = text in ("Args:", "Attributes:"), None, []
            continue
        if not inside or not text:
            continue
        indent = depth if indent is None else indent
        head, colon, rest = text.partition(":")
        if depth == indent and colon:
            names = [name.strip() for name in head.split("(")[0].split(",")]
            found.update(dict.fromkeys(names, rest.strip()))
        else:
            found.update({name: f"{found[name]} {text}" for name in names})
    return found
