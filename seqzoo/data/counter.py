"""Random numbers as a function of (seed, sample, slot): no generator, no state, any order.

A sample has a 64-bit key, mixed from the seed and its number; a draw is the key plus a multiple of
an odd constant, mixed again (the finaliser of splitmix64). Everything is vectorised over samples,
and a row depends on its own key alone, so that any batch of samples may be made anywhere.

Slots are grouped by `purpose`, a small number that keeps the draws for keys, values, places and
noise of one sample apart.
"""

import numpy as np

Keys = np.ndarray  # uint64 [b], one per sample

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_PURPOSE_SHIFT = np.uint64(40)
_LOW_32 = np.uint64(0xFFFFFFFF)

# Above this share of all symbols, shuffle all of them rather than redraw what came twice.
_DENSE = 4


def keys(seed: int, index: np.ndarray, *, stream: int = 0) -> Keys:
    """Returns the keys of samples.

    Args:
      seed: any int.
      index: int64 [b], the numbers of the samples.
      stream: another int where one seed has several families of samples.

    Returns:
      uint64 [b]; different numbers have different keys.
    """
    root = np.array([seed & 0xFFFFFFFFFFFFFFFF, stream & 0xFFFFFFFFFFFFFFFF], np.uint64)
    root = _mix(_mix(root[:1] + _STEP) ^ root[1:])
    return _mix(_mix(np.asarray(index).astype(np.uint64) * _STEP + _STEP) ^ root)


def bits(key: Keys, purpose: int, count: int) -> np.ndarray:
    """Returns `count` draws of 32 random bits per sample, uint32 [b, count]."""
    words = (count + 1) // 2
    slots = (np.uint64(purpose) << _PURPOSE_SHIFT) + np.arange(1, words + 1, dtype=np.uint64)
    halves = _mix(key[:, None] + slots * _STEP).astype("<u8", copy=False).view("<u4")
    return halves[:, :count]


def children(key: Keys, number: np.ndarray) -> Keys:
    """Returns the keys of parts of samples: of each `key`, part `number`, int64 [b] from 0."""
    return _mix(key + (number.astype(np.uint64) + np.uint64(1)) * _STEP)


def integers(key: Keys, purpose: int, count: int, n: int) -> np.ndarray:
    """Returns `count` integers uniform in [0, n) per sample, int32 [b, count]."""
    drawn = bits(key, purpose, count)
    if n & (n - 1) == 0:  # a power of two: the upper bits, which the line below would give as well
        return _power_of_two(drawn, n)
    wide = np.multiply(drawn, np.uint64(n), dtype=np.uint64)
    wide >>= np.uint64(32)
    return wide.astype(np.int32)


def distinct(key: Keys, purpose: int, count: int, n: int) -> np.ndarray:
    """Returns `count` different integers of [0, n) per sample, every order equally likely.

    Draws that repeat an earlier one of their row are drawn again until none is left. The rule
    treats all symbols alike, so every ordered choice is equally likely, whichever are redrawn.

    Returns:
      int32 [b, count].
    """
    if count > n:
        raise ValueError(f"{count} different integers out of {n} do not exist")
    if count * _DENSE >= n:
        return _first_of_order(bits(key, purpose, n), count)
    drawn = integers(key, purpose, count, n)
    rows = np.arange(len(key))
    attempt = 0
    while len(rows):
        sub = drawn if attempt == 0 else drawn[rows]
        row, place = _repeats(sub)
        if not len(row):
            break
        attempt += 1
        affected = np.unique(row)
        fresh = integers(key[rows[affected]], purpose + (attempt << 8), count, n)
        drawn[rows[row], place] = fresh[np.searchsorted(affected, row), place]
        rows = rows[affected]
    return drawn


def weighted_order(key: Keys, purpose: int, count: int, weights: np.ndarray) -> np.ndarray:
    """Draws `count` places one after the other without replacement, with the odds of `weights`.

    The exponential race, which is Gumbel top-k in other words: place i arrives at E_i / w_i, E_i
    exponential, and the first `count` arrivals in order are such a draw.

    Args:
      key: uint64 [b].
      purpose: which group of slots.
      count: how many.
      weights: positive [n], need not add up to one.

    Returns:
      int32 [b, count], in the order drawn.
    """
    # Float64 so that machines whose logarithms differ in the last bit still agree on the order.
    arrival = bits(key, purpose, len(weights)) + 0.5
    arrival *= 2.0**-32
    np.log(arrival, out=arrival)
    arrival /= -np.asarray(weights, np.float64)
    return _first_of_order(arrival, count)


def permute(index: np.ndarray, n: int, *, seed: int, stream: int = 0) -> np.ndarray:
    """Maps the numbers [0, n) onto themselves in a random order, each on its own, without a table.

    A Feistel network over the next power of four, walked again where it leaves [0, n).

    Args:
      index: int64 [b], each in [0, n).
      n: how many there are.
      seed: with `stream`, which permutation (an epoch, for instance).
      stream: see `seed`.

    Returns:
      int64 [b].
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    rounds = keys(seed, np.arange(6), stream=stream)
    out = np.asarray(index).astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        x = out[todo]
        left, right = x >> half, x & low
        for constant in rounds:
            left, right = right, left ^ (_mix(right * _STEP + constant) & low)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, in place where `x` is a fresh array."""
    y = x >> np.uint64(30)
    y ^= x
    y *= _MIX_1
    z = y >> np.uint64(27)
    y ^= z
    y *= _MIX_2
    np.right_shift(y, np.uint64(31), out=z)
    y ^= z
    return y


def _power_of_two(drawn: np.ndarray, n: int) -> np.ndarray:
    if n == 1:
        return np.zeros(drawn.shape, np.int32)
    return (drawn >> np.uint32(33 - n.bit_length())).view(np.int32)


def _repeats(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the entries that equal an earlier one of their row: their rows and places."""
    b, count = drawn.shape
    shift = max(1, (count - 1).bit_length())
    # Symbol and place in one word, so that one sort of a row brings equal symbols together.
    packed = drawn.astype(np.int64) << shift
    packed += np.arange(count)
    packed.sort(axis=1)
    row, right = np.nonzero((packed[:, 1:] >> shift) == (packed[:, :-1] >> shift))
    return row, packed[row, right + 1] & ((1 << shift) - 1)


def _first_of_order(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the places of the `count` smallest non-negative scores of each row, in order."""
    n = scores.shape[1]
    shift = np.uint64(max(1, (n - 1).bit_length()))
    if scores.dtype == np.float64:
        # Positive floats sort as their bits do; the last of them make room for the place.
        packed = scores.view(np.uint64)
        packed = (packed >> shift) << shift
    else:
        packed = scores.astype(np.uint64) << shift
    packed |= np.arange(n, dtype=np.uint64)
    if count * 2 < n:
        packed.partition(count - 1, axis=1)
        packed = packed[:, :count]
    packed.sort(axis=1)
    first = packed[:, :count]
    return (first & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int32)
