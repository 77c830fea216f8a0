"""Cases for a GPU: made when their turn comes, so that their inputs go with them, and small where asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Bounds of sizes that are scaled down.
LEAST, MOST = 2, 256


@dataclass(frozen=True)
class Sized:
    """A case to be made.

    Args:
        make: makes a case from its name, ``device`` and the arguments below.
        name: of the case.
        sizes: arguments that a scale shrinks. fixed: arguments that it does not.
    """

    make: Callable[..., dict[str, Any]]
    name: str
    sizes: Mapping[str, int]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, device: str, scale: float = 1.0) -> dict[str, Any]:
        """Return the case on a device; below 1, its sizes times ``scale``."""
        sizes = dict(self.sizes)
        if scale < 1.0:
            sizes = {name: min(MOST, max(LEAST, round(size * scale))) for name, size in sizes.items()}
        return self.make(self.name, **sizes, **self.fixed, device=device)
