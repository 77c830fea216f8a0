"""What a training view is for."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class Role(IntEnum):
    """What a training view is for (ODEdit, arXiv 2601.19700, section 3: IN, SE and OUT prompt groups)."""

    EDIT = 0  # IN: the edit itself
    TEXT_REPHRASE = 1  # SE: another wording
    IMAGE_REPHRASE = 2  # SE: another picture of the same
    TEXT_LOCALITY = 3  # OUT: an unrelated text-only question
    IMAGE_LOCALITY = 4  # OUT: an unrelated question about an image


ROLES = tuple(Role)
CE_ROLES = (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE)
KL_ROLES = (Role.TEXT_LOCALITY, Role.IMAGE_LOCALITY)


def repeated(roles: Sequence[Role], n_views: int) -> tuple[Role, ...]:
    """The roles in order, each as often as it shall have views; the edit's own once."""
    return tuple(role for role in roles for _ in range(1 if role is Role.EDIT else n_views))
