"""Where the tokens of each edit and view stand in a batch: made once, so that a step asks the device for nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from fastedit.objectives.roles import CE_ROLES, KL_ROLES, ROLES, Role

#: Columns of a table (B, roles + 1) by role and generality: the edit, what must change, what must stay, all.
EDIT_COLUMN, CE_COLUMNS, KL_COLUMNS = slice(0, 1), slice(0, len(CE_ROLES)), slice(len(CE_ROLES), len(ROLES))
ALL_COLUMNS = slice(0, len(ROLES) + 1)
Group = Literal["edit", "rephrased"]


class BatchLayout:
    """Numbers, segments and counts of a batch's label tokens; they change only when the batch is put together anew.

    All is worked out on the host from the lists, and moved to the device at its first use, once. Tokens whose view must
    change are *fitted*, the others are *out*.

    Args:
        edit: by token, the edit that it belongs to, 0 to B - 1.
        role: by token, values of ``Role``.
        n_edits: B.
        device: of the tensors.
    """

    def __init__(self, edit: Sequence[int], role: Sequence[int], n_edits: int, device: torch.device | str) -> None:
        self._edit, self._role = list(edit), list(role)
        self.n_edits, self.device = n_edits, torch.device(device)
        kept = {int(known) for known in KL_ROLES}
        self._fitted = [token for token, known in enumerate(self._role) if known not in kept]
        self._out = [token for token, known in enumerate(self._role) if known in kept]
        self.n_fitted, self.n_out = len(self._fitted), len(self._out)
        #: Whether the fitted tokens all come before the others.
        self.is_split = not self._out or not self._fitted or self._fitted[-1] < self._out[0]
        self._groups = {"edit": self._by_edit(CE_ROLES[:1]), "rephrased": self._by_edit(CE_ROLES[1:])}
        self._sizes = {
            name: [sum(self._edit[token] == number for token in tokens) for number in range(n_edits)]
            for name, tokens in self._groups.items()
        }
        self._has = [[False] * (len(ROLES) + 1) for _ in range(n_edits)]
        for token, known in enumerate(self._role):
            self._has[self._edit[token]][known] = True
        for number, row in enumerate(self._has):
            row[-1] = all(size[number] for size in self._sizes.values())
        self._kept: dict[Hashable, Tensor] = {}

    @staticmethod
    def of(edit: Tensor, role: Tensor, n_edits: int) -> BatchLayout:
        """The layout of edits and roles (T,) that a device holds, which are read."""
        return BatchLayout(edit.tolist(), role.tolist(), n_edits, edit.device)

    def _by_edit(self, roles: Sequence[Role]) -> list[int]:
        """Tokens of some roles, sorted by edit."""
        known = {int(role) for role in roles}
        tokens = [token for token, role in enumerate(self._role) if role in known]
        return sorted(tokens, key=lambda token: self._edit[token])

    def _remembered(self, key: Hashable, make: Callable[[], Tensor | Sequence[int]]) -> Tensor:
        if key not in self._kept:
            made = make()
            made = made if isinstance(made, Tensor) else torch.tensor(made, dtype=torch.long)
            self._kept[key] = made.to(self.device)
        return self._kept[key]

    @property
    def has_generality(self) -> bool:
        """Whether any edit has both its own view and a rephrased one."""
        return any(row[-1] for row in self._has)

    @property
    def present(self) -> Tensor:
        """(B, roles + 1), bool: the views that an edit has; last, whether it has its own and a rephrased one."""
        shape = (self.n_edits, len(ROLES) + 1)
        return self._remembered("present", lambda: torch.tensor(self._has, dtype=torch.bool).view(shape))

    def split(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows (T_fitted, ...) and (T_out, ...) of values (T, ...); None where there are no tokens that must stay."""
        if not self._out:
            return values, None
        if self.is_split:
            fitted, out = torch.split(values, [self.n_fitted, self.n_out])
            return fitted, out
        numbers = self._remembered("fitted", lambda: self._fitted), self._remembered("out", lambda: self._out)
        return values.index_select(0, numbers[0]), values.index_select(0, numbers[1])

    def fitted(self, values: Tensor) -> Tensor:
        """Rows (T_fitted, ...) of values (T, ...)."""
        if not self._out:
            return values
        if self.is_split:
            return values[: self.n_fitted]
        return values.index_select(0, self._remembered("fitted", lambda: self._fitted))

    def segments(self, *roles: Role) -> Tensor:
        """(T_fitted,), int64: edit times the number of roles plus the role's place among them; -1 of other roles."""
        place = {int(role): index for index, role in enumerate(roles)}

        def make() -> list[int]:
            edit, role = self._edit, self._role
            return [edit[t] * len(roles) + place[role[t]] if role[t] in place else -1 for t in self._fitted]

        return self._remembered(("segments", roles), make)

    def chosen(self, *roles: Role) -> Tensor | None:
        """(T_fitted,), bool: tokens of some roles; None where all are."""
        known = {int(role) for role in roles}
        if all(self._role[token] in known for token in self._fitted):
            return None
        return self._remembered(
            ("chosen", roles), lambda: torch.tensor([self._role[t] in known for t in self._fitted], dtype=torch.bool)
        )

    @property
    def fitted_edits(self) -> Tensor:
        """(T_fitted,), int64: whose the fitted tokens are."""
        return self._remembered("fitted edits", lambda: [self._edit[t] for t in self._fitted])

    @property
    def out_edits(self) -> Tensor:
        """(T_out,), int64: whose the others are."""
        return self._remembered("out edits", lambda: [self._edit[t] for t in self._out])

    @property
    def out_slots(self) -> Tensor:
        """(T_out,), int64: edit times the number of all roles plus the role."""
        return self._remembered("out slots", lambda: [self._edit[t] * len(ROLES) + self._role[t] for t in self._out])

    def joined(self, fitted: Tensor, out: Tensor) -> Tensor:
        """Values (T, ...) of those (T_fitted, ...) and (T_out, ...): what ``split`` takes apart."""
        values = torch.cat([fitted, out])
        if self.is_split:
            return values
        order = [*self._fitted, *self._out]
        return values.index_select(0, self._remembered("order", lambda: torch.tensor(order).argsort()))

    @property
    def slots(self) -> Tensor:
        """(T,), int64: edit times the number of all roles plus the role."""
        return self._remembered("slots", self._slots)

    def _slots(self) -> Tensor:
        return torch.tensor(self._edit, dtype=torch.long) * len(ROLES) + torch.tensor(self._role, dtype=torch.long)

    def slot_sizes(self, dtype: torch.dtype) -> Tensor:
        """(T,) how many tokens are in a token's slot."""
        return self._remembered(("slot sizes", dtype), lambda: torch.bincount(self._slots())[self._slots()].to(dtype))

    @property
    def edits(self) -> Tensor:
        """(T,), int64: whose the tokens are."""
        return self._remembered("edits", lambda: self._edit)

    def edit_sizes(self, dtype: torch.dtype) -> Tensor:
        """(B,) label tokens of all views of an edit, at least 1."""

        def make() -> Tensor:
            edits = torch.tensor(self._edit, dtype=torch.long)
            return torch.bincount(edits, minlength=self.n_edits).clamp(min=1).to(dtype)

        return self._remembered(("edit sizes", dtype), make)

    def has_all(self, columns: slice | Sequence[int]) -> bool:
        """Whether every edit has all of these columns of ``present``."""
        return all(all(_taken(row, columns)) for row in self._has)

    def mean(self, values: Tensor, columns: slice | Sequence[int]) -> Tensor:
        """Mean (B,) over values (B, n) of the named columns of ``present``, of those that an edit has; 0 without any.

        Args:
            columns: n of them, whose values these are.
        """
        if self.has_all(columns):
            return values.sum(1) / values.shape[1]
        return (values * self.mask(columns, values.dtype)).sum(1) / self.count(columns, values.dtype)

    def mask(self, columns: slice | Sequence[int], dtype: torch.dtype) -> Tensor:
        """(B, n) these columns of ``present`` as numbers."""
        rows = [_taken(row, columns) for row in self._has]
        return self._remembered(("mask", str(columns), dtype), lambda: torch.tensor(rows, dtype=dtype))

    def count(self, columns: slice | Sequence[int], dtype: torch.dtype) -> Tensor:
        """(B,) how many of them an edit has, at least 1."""
        sizes = [max(1, sum(_taken(row, columns))) for row in self._has]
        return self._remembered(("count", str(columns), dtype), lambda: torch.tensor(sizes, dtype=dtype))

    def group(self, name: Group) -> Tensor:
        """(n,), int64: numbers of the tokens of the edits' own views or of their rephrased ones, sorted by edit."""
        return self._remembered(("group", name), lambda: self._groups[name])

    def offsets(self, name: Group) -> Tensor:
        """(B + 1,), int64: offsets of an edit's among them."""
        return self._remembered(("offsets", name), lambda: [0, *accumulate(self._sizes[name])])

    def pooled(self) -> Tensor:
        """(n + m,), int64: whose the tokens of both groups are, one behind the other."""
        return self._remembered("pooled", lambda: [self._edit[t] for tokens in self._groups.values() for t in tokens])

    def pooled_sizes(self, dtype: torch.dtype, less: int = 0) -> Tensor:
        """(B,) how many tokens of both groups an edit has, less some and at least 1."""
        sizes = [max(1, x + y - less) for x, y in zip(*self._sizes.values(), strict=True)]
        return self._remembered(("pooled", dtype, less), lambda: torch.tensor(sizes, dtype=dtype))

    def constant(self, values: tuple[float, ...]) -> Tensor:
        """(n,), float32: numbers on the device."""
        return self._remembered(("constant", values), lambda: torch.tensor(values))


def _taken(row: Sequence[bool], columns: slice | Sequence[int]) -> Sequence[bool]:
    return row[columns] if isinstance(columns, slice) else [row[int(column)] for column in columns]
