"""How alike two images must be before an edit of one acts on the other, the more edits are stored the more.

The classifier's threshold lets one stored edit in many thousands claim a question about something else, nearly always
by an image that the entity head finds like its own, and not quite. With n stored edits that happens n times as often.
So an edit also has to agree with the image: the cosine of the entity vectors, less a share of the distance of the
images' centres, which nothing was learned for. What two unrelated images reach of it has a tail that is measured where
the classifier is trained, and the least agreement grows with the number of stored edits along that tail, so that the
share of foreign questions on which any of them acts stays where it was set. A question about the very image of an edit
has agreement 1, however it is worded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

#: Share of the distance of centres that counts. Found on a train split.
DISTANCE = 0.5
#: Of unrelated pairs so many of the highest are the tail.
TAIL = 200


@dataclass(frozen=True)
class Agreement:
    """The least agreement by number of stored edits.

    Args:
        level: where the tail begins. rate: share of all unrelated pairs that reach it and ask the same.
        scale: of the tail, an exponential.
        most: it is never more, lest an edit be lost to another picture of what it is about.
        false_rate: share of foreign questions on which any of the stored edits may act.
    """

    level: float
    rate: float
    scale: float
    most: float
    false_rate: float

    @staticmethod
    def of(cosine: Tensor, distance: Tensor) -> Tensor:
        """Agreement of cosines of entity vectors and distances of centres, of any shape."""
        return cosine - DISTANCE * distance

    def least(self, stored: int) -> float:
        """The least agreement with so many stored edits: each pair of a question and one of them has its share."""
        wanted = self.level + self.scale * math.log(max(1, stored) * self.rate / self.false_rate)
        return min(self.most, wanted)

    def settings(self) -> dict[str, float]:
        """As plain values, for an artifact's config."""
        return asdict(self)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Agreement | None:
        """That of an artifact (config "agreement"); None where it was trained without."""
        known = config.get("agreement")
        return None if known is None else Agreement(**known)

    @staticmethod
    def fitted(unrelated: Tensor, pairs: int, related: Tensor, *, false_rate: float, kept: float) -> Agreement | None:
        """From examples; None where there are too few.

        Args:
            unrelated: agreements of unrelated pairs that ask the same. pairs: unrelated ones in all.
            related: agreements of an edit and another picture of what it is about.
            kept: of those such a share must stay.
        """
        if len(unrelated) < 2 or not len(related):
            return None
        highest = unrelated.double().topk(min(TAIL, len(unrelated) - 1) + 1).values
        level, above = float(highest[-1]), highest[:-1]
        scale = max(1e-6, float((above - level).mean()))
        most = float(torch.quantile(related.double(), 1 - kept))
        return Agreement(level, len(above) / pairs, scale, most, false_rate)
