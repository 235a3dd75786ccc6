"""The trees of ListOps, many at a time: level by level, each node a function of its own key.

A node's 64 random bits say what it is: bits 40 to 63 whether an operator stands there, bits 38 and
39 which one, bits 0 to 31 the digit or the number of arguments. The keys of its arguments follow
from its own.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from seqzoo.data import counter
from seqzoo.errors import ConfigError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
# Token numbers: 0 = padding, 1 = unknown, 2 = end of text, then digits, operators and the end of a
# list: the 18 symbols of the LRA readers.
SYMBOLS = ("<pad>", "<unk>", "<eos>", *"0123456789", *OPERATORS, "X")
END_OF_TEXT = SYMBOLS.index("<eos>")
_DIGIT, _OPERATOR, _CLOSE = SYMBOLS.index("0"), SYMBOLS.index("[MIN"), SYMBOLS.index("X")

_LOW_32 = np.uint64(0xFFFFFFFF)
_ATTEMPTS = 8  # trees drawn per row and round; the first that is kept counts
_MOST_ROUNDS = 2000


@dataclasses.dataclass(frozen=True)
class Law:
    """How trees are drawn, and which are kept.

    Attributes:
      leaf_probability: of a digit where a list might stand.
      max_depth: nodes at this depth (the root's is 1) are digits.
      max_args: a list has 2 to max_args arguments, each number equally likely.
      min_length: trees of more tokens than this are kept,
      max_length: and of fewer than this.
    """

    leaf_probability: float
    max_depth: int
    max_args: int
    min_length: int
    max_length: int

    @property
    def longest(self) -> int:
        """Tokens of the largest tree that can be drawn."""
        tokens = 1
        for _ in range(self.max_depth - 1):
            tokens = 2 + self.max_args * tokens
        return tokens

    def is_list(self, node: counter.Keys, depth: int) -> np.ndarray:
        """Whether an operator stands at the nodes of a level, bool [n]."""
        if depth >= self.max_depth:
            return np.zeros(len(node), bool)
        threshold = np.uint64(round((1 - self.leaf_probability) * 2**24))
        return (node >> np.uint64(40)) < threshold

    def arguments(self, node: counter.Keys) -> np.ndarray:
        """How many arguments lists have, int64 [n]."""
        choices = np.uint64(self.max_args - 1)
        return 2 + (((node & _LOW_32) * choices) >> np.uint64(32)).astype(np.int64)


def draw(key: counter.Keys, law: Law) -> counter.Keys:
    """Returns the root of the first tree of each row that the law keeps.

    Raises:
      ConfigError: there is a row for which none was found.
    """
    roots = np.zeros_like(key)
    todo = np.arange(len(key))
    for first in range(0, _MOST_ROUNDS * _ATTEMPTS, _ATTEMPTS):
        tried = counter.children(
            np.repeat(key[todo], _ATTEMPTS), np.tile(first + np.arange(_ATTEMPTS), len(todo))
        )
        length = lengths(tried, law)
        kept = ((length > law.min_length) & (length < law.max_length)).reshape(-1, _ATTEMPTS)
        found = kept.any(axis=1)
        best = tried.reshape(-1, _ATTEMPTS)[np.arange(len(todo)), kept.argmax(axis=1)]
        roots[todo[found]] = best[found]
        todo = todo[~found]
        if not len(todo):
            return roots
    raise ConfigError(
        f"data.min_length={law.min_length}, data.max_length={law.max_length}: none of "
        f"{_MOST_ROUNDS * _ATTEMPTS:,} trees drawn for a row has a length between; set bounds "
        "further apart, or data.max_depth and data.max_args for trees of that size"
    )


def lengths(roots: counter.Keys, law: Law) -> np.ndarray:
    """Counts the tokens of trees, int64 [n]; of those too long only as far as that is certain."""
    node, tree = roots, np.arange(len(roots))
    length = np.zeros(len(roots), np.int64)
    for depth in range(1, law.max_depth + 1):
        lists = law.is_list(node, depth)
        length += np.bincount(tree, minlength=len(roots))
        node, tree = node[lists], tree[lists]
        length += np.bincount(tree, minlength=len(roots))
        short = length[tree] < law.max_length
        node, tree, _ = _descend(node[short], tree[short], law)
    return length


class _Level(NamedTuple):
    node: np.ndarray  # uint64 [n]
    tree: np.ndarray  # int64 [n], which row
    lists: np.ndarray  # bool [n]; their arguments are the next level, one list after the other
    starts: np.ndarray  # int64 [lists], where the arguments of each list begin there
    count: np.ndarray  # int64 [lists], how many they are


def rows(roots: counter.Keys, law: Law, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes trees out.

    Args:
      roots: uint64 [b].
      law: what they were drawn by.
      seq_len: length of a row, at least that of the longest tree.

    Returns:
      tokens int32 [b t], 0 behind the end; length int64 [b]; value int32 [b], 0 to 9.
    """
    levels = _levels(roots, law)
    sizes, value = [np.empty(0, np.int64)], np.empty(0, np.int64)
    for level in reversed(levels):
        below, value, size = value, _digit(level.node), np.ones(len(level.node), np.int64)
        if len(level.count):
            size[level.lists] = 2 + np.add.reduceat(sizes[-1], level.starts)
            value[level.lists] = _evaluate(below, level)
        sizes.append(size)
    tokens = np.zeros((len(roots), seq_len), np.int32)
    place = np.zeros(len(roots), np.int64)
    for level, size, below in zip(levels, sizes[:0:-1], sizes[-2::-1], strict=True):
        tokens[level.tree, place] = np.where(
            level.lists, _OPERATOR + _operator(level.node), _DIGIT + _digit(level.node)
        )
        last = (place + size - 1)[level.lists]
        tokens[level.tree[level.lists], last] = _CLOSE
        before = np.cumsum(below) - below
        first = place[level.lists] + 1 - before[level.starts] if len(level.count) else before[:0]
        place = before + np.repeat(first, level.count)
    return tokens, sizes[-1], value.astype(np.int32)


def _descend(
    node: np.ndarray, tree: np.ndarray, law: Law
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From lists to their arguments: keys and trees of these, and how many each list has."""
    count = law.arguments(node)
    ends = np.cumsum(count)
    number = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count, count)
    return counter.children(np.repeat(node, count), number), np.repeat(tree, count), count


def _levels(roots: np.ndarray, law: Law) -> list[_Level]:
    levels, node, tree = [], roots, np.arange(len(roots))
    depth = 1
    while len(node):
        lists = law.is_list(node, depth)
        below, tree_below, count = _descend(node[lists], tree[lists], law)
        levels.append(_Level(node, tree, lists, np.cumsum(count) - count, count))
        node, tree, depth = below, tree_below, depth + 1
    return levels


def _digit(node: np.ndarray) -> np.ndarray:
    return (((node & _LOW_32) * np.uint64(10)) >> np.uint64(32)).astype(np.int64)


def _operator(node: np.ndarray) -> np.ndarray:
    return ((node >> np.uint64(38)) & np.uint64(3)).astype(np.int64)


def _evaluate(value: np.ndarray, level: _Level) -> np.ndarray:
    """Values of the lists of a level, from those of their arguments."""
    starts, count = level.starts, level.count
    group = np.repeat(np.arange(len(count)), count)
    ordered = np.sort(group * 10 + value) % 10
    # The median of an even number is the mean of the middle two, cut to a whole number.
    middle = (ordered[starts + (count - 1) // 2] + ordered[starts + count // 2]) // 2
    choices = (
        ordered[starts],
        ordered[starts + count - 1],
        middle,
        np.add.reduceat(value, starts) % 10,
    )
    return np.choose(_operator(level.node[level.lists]), choices)
