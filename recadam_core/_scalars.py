"""The few array-API functions that scalar policy needs, over Python floats.

`coefficients` and the annealings are written once, against a namespace. Traced values come with
their library's namespace; on the host this one serves, at a tenth of the cost of NumPy scalars.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Host", "host"]


class Host:
    """`exp`, `expm1`, `log`, `sqrt`, `where` of float64 scalars."""

    exp = staticmethod(math.exp)
    expm1 = staticmethod(math.expm1)
    sqrt = staticmethod(math.sqrt)

    @staticmethod
    def log(x: float) -> float:
        """Natural logarithm; minus infinity at zero, as arrays have it."""
        return math.log(x) if x else -math.inf

    @staticmethod
    def where(condition: bool, x: Any, y: Any) -> Any:
        """`x` if the condition holds, else `y`."""
        return x if condition else y


host = Host()
