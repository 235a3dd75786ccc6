"""Does a plain value fit an annotation? Annotations are Python text, read and never evaluated."""

import ast
import functools
from collections.abc import Mapping, Sequence
from typing import Any

# None: any value fits.
_SCALARS = {"int": int, "float": float, "bool": bool, "str": str, "None": type(None)}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection", "set"}
_MAPS = {"dict", "Dict", "Mapping", "MutableMapping"}


def fits(value: Any, annotation: str | None) -> bool:
    """Tells whether a value out of YAML may be passed where `annotation` stands.

    An int serves as a float, a float without a fraction as an int; a bool is neither. What the
    annotation names beyond plain types (a class, an alias) is left to the constructor.
    """
    node = _parse(annotation)
    return node is None or _fits(value, node)


def converted(value: Any, annotation: str | None) -> Any:
    """Returns the value in the spelling of its type: 1e4 for an int is 10000, 1 for a float 1.0."""
    if type(value) not in (int, float):
        return value
    names = _alternatives(_parse(annotation))
    if type(value) is float and "int" in names and "float" not in names and value.is_integer():
        return int(value)
    if type(value) is int and "float" in names and "int" not in names:
        return float(value)
    return value


def takes_mapping(annotation: str | None) -> bool:
    """Tells whether a mapping with keys of the user's choice belongs there (a dict of mixers)."""
    return bool(_MAPS & _alternatives(_parse(annotation)))


@functools.cache
def _parse(annotation: str | None) -> ast.expr | None:
    if annotation is None:
        return None
    try:
        return ast.parse(annotation.strip("'\""), mode="eval").body
    except SyntaxError:
        return None


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and node.value is None:
        return "None"
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""


def _alternatives(node: ast.expr | None) -> set[str]:
    if node is None:
        return set()
    if isinstance(node, ast.BinOp):
        return _alternatives(node.left) | _alternatives(node.right)
    if isinstance(node, ast.Subscript):
        outer = _name(node.value)
        if outer in ("Optional", "Union"):
            return {"None"} | set().union(*(_alternatives(item) for item in _items(node)))
        return {outer}
    return {_name(node)}


def _items(node: ast.Subscript) -> list[ast.expr]:
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _fits(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _fits(value, node.left) or _fits(value, node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return fits(value, node.value)
    if isinstance(node, ast.Subscript):
        return _fits_generic(value, _name(node.value), _items(node))
    name = _name(node)
    if name in _LISTS:
        return isinstance(value, Sequence) and not isinstance(value, str)
    if name in _MAPS:
        return isinstance(value, Mapping)
    if name not in _SCALARS:
        return True
    if name == "float":
        return type(value) in (int, float)
    if name == "int" and type(value) is float:
        return value.is_integer()
    return type(value) is _SCALARS[name]


def _fits_generic(value: Any, outer: str, items: list[ast.expr]) -> bool:
    if outer == "Literal":
        return any(isinstance(i, ast.Constant) and i.value == value for i in items)
    if outer == "Optional":
        return value is None or _fits(value, items[0])
    if outer == "Union":
        return any(_fits(value, item) for item in items)
    if outer == "Annotated":
        return _fits(value, items[0])
    if outer in _LISTS:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        fixed = outer in ("tuple", "Tuple") and not _is_ellipsis(items[-1])
        if fixed:
            pairs = zip(value, items, strict=False)
            return len(value) == len(items) and all(_fits(v, item) for v, item in pairs)
        return all(_fits(v, items[0]) for v in value)
    if outer in _MAPS:
        return isinstance(value, Mapping) and all(_fits(v, items[-1]) for v in value.values())
    return True


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
