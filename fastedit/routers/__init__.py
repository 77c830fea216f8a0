"""When a delta acts: a router looks at prompts on the frozen model and chooses an edit for each, or none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fastedit.backbone import EditableModel, PackedState

__all__ = ["READ_PARTS", "ROUTERS", "Routed", "Router", "make_router"]


class Routed(Protocol):
    """Stacked deltas, as far as a router needs them (``fastedit.deltas.StackedDelta``)."""

    spec: Any
    fixed: dict[str, Tensor]
    texts: list[Mapping[str, str]]

    @property
    def size(self) -> int:
        """B."""

    def delta(self, site: int, x: Tensor, rows: Any, output: Tensor) -> Tensor:
        """Change of a site's output."""


class Router(Protocol):
    """Scores prompts against stored edits; an edit may act where its score reaches its threshold.

    Made from (model, stacked), whose deltas it decides for. One that reads behind the deltas' split point has that
    ``layer`` as an attribute, and walks there itself on the frozen model.
    """

    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        """Scores of R prompts.

        Args:
            state: walked to the deltas' split point on the frozen model; wanted are the last tokens of the prompts,
                ``image`` marks tokens of images.
            fixed: of the B deltas, (B, ...).
            own: (R,) int64, the edit that each row is scored against; None is all of them.
        Returns:
            (R,), or (R, B) where ``own`` is None.
        """

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        """(B,) the smallest score at which each edit acts."""


#: Module and class by name.
ROUTERS: dict[str, tuple[str, str]] = {
    "classifier": ("classifier", "ClassifierRouter"),
    "scope": ("scope", "ScopeRouter"),
    "distance": ("distance", "DistanceRouter"),
    "ball": ("ball", "BallRouter"),
}
#: Those that look at the parts of every delta, not only at what is fixed in them.
READ_PARTS = frozenset({"distance"})


def make_router(model: EditableModel, stacked: Routed) -> Router | None:
    """The router that the deltas' spec names; None for deltas that always act.

    Raises:
        ValueError: an unknown name.
    """
    name = stacked.spec.options.get("router")
    if name is None:
        return None
    if name not in ROUTERS:
        raise ValueError(f"delta: router is one of {sorted(ROUTERS)} (got router={name!r})")
    module, class_name = ROUTERS[name]
    kind: Any = getattr(importlib.import_module(f"fastedit.routers.{module}"), class_name)
    router: Router = kind(model, stacked)
    return router
