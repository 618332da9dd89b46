"""How many of the most sensitive layers have to stay in high precision, with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

# The share of the layers within which the number is found: what is measured on texts is no more exact than that.
_TOLERANCE = 0.02


def fewest_kept(errors: Sequence[float], budget: float, drop: Callable[[int], float]) -> int:
    """The least number of layers to keep so that the drop stays within the budget.

    The estimated errors of the layers add up, so their sum says where to look; every answer is measured.

    Args:
        errors: what quantizing each layer adds, in the order in which layers are kept.
        budget: the drop allowed.
        drop: measures the drop when so many are kept.

    Returns:
        a number that was measured and stays within the budget, with one that misses it at most 2 % of the layers
        below; all layers if no such number is found.
    """
    count = len(errors)
    first = drop(0)
    if first <= budget or not count:
        return 0
    left = list(accumulate(reversed(errors), initial=0.0))[::-1]
    rate = first / left[0] if 0 < left[0] < math.inf else math.inf
    tried = next(kept for kept in range(count + 1) if kept == count or rate * left[kept] <= budget)
    width = max(1, int(_TOLERANCE * count))
    low, high, step = 0, count + 1, 2 * width
    tried = min(max(tried, 1), count)
    while high - low > width and low < count:
        if drop(tried) <= budget:
            high = tried
            tried = tried - step if low == 0 else (low + high) // 2
        else:
            low = tried
            tried = tried + step if high > count else (low + high) // 2
        step *= 2
        tried = min(max(tried, low + 1), max(low + 1, high - 1), count)
    return min(high, count)
