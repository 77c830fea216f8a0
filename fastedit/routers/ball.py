"""An edit acts on prompts that end near its key."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.probe import feed_forward_parts
from fastedit.routers import Routed
from fastedit.routers.claims import Claims, pairs_within
from fastedit.routers.tables import has_index, tables_of


class BallRouter:
    """GRACE's deferral (arXiv 2211.11031, equation (1)): the nearest of the keys in whose ball a prompt's key lies.

    A prompt's key is the state of its last token, as the feed-forward block of the layer reads it. The score is minus
    its distance to an edit's key, the threshold minus the edit's radius.
    """

    def __init__(self, model: EditableModel, stacked: Routed) -> None:
        (site,) = stacked.spec.sites
        self.model, self.stacked, self.layer = model, stacked, site.layer
        self._place = f"{site.layer}.{site.name}:"

    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        """Minus the distance of R prompts to the key of their edit (R,), or to all of them (R, B)."""
        keys = fixed[f"{self._place}key"]
        asked = prompt_keys(self.model, self.layer, state).to(keys.dtype)
        distance: Tensor
        if own is not None:
            distance = torch.linalg.vector_norm(asked - keys[own], dim=1)
        else:
            # Not by a matrix product, which loses the digits of small distances
            distance = torch.cdist(asked, keys, compute_mode="donot_use_mm_for_euclid_dist")
        return -distance

    def claims(self, state: PackedState, fixed: Mapping[str, Tensor]) -> Claims:
        """See `fastedit.routers.claims.Claiming`."""
        keys, radius = fixed[f"{self._place}key"], fixed[f"{self._place}radius"][:, 0]
        asked = prompt_keys(self.model, self.layer, state).to(keys.dtype)
        found = []
        tables = tables_of(self.model)
        if has_index(self.model, len(keys)):
            pairs = iter([tables.pairs(("ball", self._place), "l2", self.stacked, asked, [(keys, 1.0)])])
        else:
            reduced = tables.reduced(self.stacked, "key", keys, centred=True, exact=True)
            pairs = pairs_within(asked, keys, radius, reduced)
        for row, edit in pairs:
            distance = torch.linalg.vector_norm(asked[row] - keys[edit], dim=1)
            inside = distance <= radius[edit]
            found.append(Claims(row[inside], edit[inside], -distance[inside]))
        return Claims.cat(found)

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        """(B,) minus the radii."""
        return -fixed[f"{self._place}radius"][:, 0]


def prompt_keys(model: EditableModel, layer: int, state: PackedState) -> Tensor:
    """(R, d), the keys of prompts that were walked to the layer's feed-forward block.

    Args:
        state: its first wanted tokens of each row end the prompts.
    """
    firsts = [0]
    for count in state.wanted_counts[:-1]:
        firsts.append(firsts[-1] + count)
    ends = state.wanted[torch.tensor(firsts, device=state.wanted.device)]
    return feed_forward_parts(model, layer, state.hidden[ends], "up")[0]
