"""Ask the model every question of the evaluation, before and with the edits, many edits at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded
from fastedit.backbone.encoding import answer_tokens, own_answer_tokens
from fastedit.backbone.generation import Reader
from fastedit.deltas import DeltaSpec, Rows, RowsHolder, StackedDelta, installed
from fastedit.engine.asking import MEMORY, Asker, has_text, merged_states, split_states
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import (
    EditScores,
    evaluation_views,
)
from fastedit.evaluation.metrics import AskedRow
from fastedit.evaluation.scoring import edit_scores, row_means, token_scores
from fastedit.fitting.prepared import split_point
from fastedit.requests import EditRequest, Query

# Reference answers kept with a model (some 100 bytes each); more than one batch asks for
MOST_ANSWERS = 200_000


@dataclass
class _Fed:
    """Answers fed to some rows by the frozen and the edited model alike.

    Args:
        groups: by row, the tokens of its answer, the end token last; answers that were given, then the frozen model's
            own. A group is fed at once, so that a delta that changes nothing changes no bit.
        before: final hidden states (T, d) that predict the labels, rows in order.
    """

    groups: tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]
    before: Tensor

    @property
    def labels(self) -> dict[int, tuple[int, ...]]:
        """By row, all of them."""
        return {**self.groups[0], **self.groups[1]}

    def by_row(self) -> dict[int, Tensor]:
        """The states of each row."""
        return split_states(self.before, self.labels)


class Evaluator(Asker):
    """Scores edits under both protocols. Every question is read once up to where the deltas begin to act.

    The unedited model's answers are remembered with it.

    Args:
        model: frozen; no other delta may act.
        spec: of the deltas that will be scored (says what part of the model they cannot reach).
        timer: everything here is phase "evaluation".
        max_new_tokens: longest generated answer.
        memory: most bytes for keys and values, by which questions are taken a part at a time.
        row_limit: most questions at a time; half as many from where memory runs out.
    """

    def __init__(
        self,
        model: EditableModel,
        spec: DeltaSpec,
        timer: PhaseTimer,
        *,
        max_new_tokens: int = 48,
        memory: int = MEMORY,
        row_limit: int = 256,
    ) -> None:
        super().__init__(model, max_new_tokens=max_new_tokens, memory=memory, row_limit=row_limit)
        self.spec, self.timer = spec, timer
        self._answers = model.reference_answers

    def scores(
        self, requests: Sequence[EditRequest], stacked: StackedDelta, *, shared: bool = False
    ) -> list[EditScores]:
        """Scores of the given edits.

        Args:
            requests: n edits.
            stacked: n deltas, one per edit; or, when ``shared``, one delta that acts on every row, or any number of
                which their router chooses.
        Returns:
            n EditScores.
        """
        with self.timer.phase("evaluation"), torch.no_grad():
            rows = [AskedRow(edit, view) for edit, request in enumerate(requests) for view in evaluation_views(request)]
            self.ask(
                rows,
                lambda part, encoded: self._part(
                    part, encoded, stacked, Rows() if shared else _rows_of(part, stacked.size)
                ),
                lambda part: [row.view.query for row in part],
            )
            self._forget_some()
            return [edit_scores([row for row in rows if row.edit == edit]) for edit in range(len(requests))]

    def _part(self, rows: Sequence[AskedRow], encoded: Encoded, stacked: StackedDelta, where: Rows) -> None:
        """Fill in what is asked of some rows."""
        given = {
            number: answer_tokens(self.model, row.view.query, int(encoded.lengths[number]))
            for number, row in enumerate(rows)
            if has_text(row.view.query.answer)
        }
        longest = max((len(tokens) for tokens in given.values()), default=0)
        reader = Reader(self.model, encoded, max(longest, self.max_new_tokens))
        most = reader.rooms(self.max_new_tokens)
        reader.read_below(*split_point(self.spec))
        fed = self._before(rows, reader, given, most)
        with installed(self.model, stacked, where) as holder:
            if holder.rewrites_prompts:
                self._ask_anew(holder, rows, fed, max(longest, self.max_new_tokens))
            else:
                after, answers = self._after(reader, fed.groups, most)
                self._score(rows, fed, after)
                for number, row in enumerate(rows):
                    row.after, row.broken_after = self.text(answers[number]), number in reader.broken
                    row.acted = None if holder.choice is None else holder.choice[number] >= 0

    def _ask_anew(self, holder: RowsHolder, rows: Sequence[AskedRow], fed: _Fed, room: int) -> None:
        """Fill in the rows where the edited model is asked another question; it answers the same ones as before."""
        asked = holder.rewrite_prompts([row.view.query for row in rows])
        chosen, where = holder.choice, holder.rows
        moved = [n for n, row in enumerate(rows) if asked[n].prompt != row.view.query.prompt]
        after = fed.by_row()
        for number, row in enumerate(rows):
            row.after, row.broken_after = row.before, row.broken_before
            row.acted = None if chosen is None else chosen[number] >= 0
        if moved:
            reader = Reader(self.model, self.model.encode([asked[n] for n in moved], answers=False), room)
            groups = [{n: group[old] for n, old in enumerate(moved) if old in group} for group in fed.groups]
            if chosen is not None:
                holder.choice = [chosen[n] for n in moved]
            if where.counts is not None:
                holder.rows = _rows_of([rows[n] for n in moved], len(where.counts))
            states, answers = self._after(reader, groups, reader.rooms(self.max_new_tokens))
            after |= {moved[n]: state for n, state in states.items()}
            for n, old in enumerate(moved):
                rows[old].after, rows[old].broken_after = self.text(answers[n]), n in reader.broken
        self._score(rows, fed, after)

    def _after(
        self, reader: Reader, groups: Sequence[dict[int, tuple[int, ...]]], most: Sequence[int]
    ) -> tuple[dict[int, Tensor], dict[int, list[int]]]:
        """Ask the edited model: by row, the states that predict what is fed, and the tokens of the answer."""
        reader.broken = set()
        last = reader.read()
        states = merged_states([self.feed(reader, last, group) for group in groups], groups)
        labels = {number: tokens for group in groups for number, tokens in group.items()}
        written, coming = self.agreed(reader, last, states, labels, most)
        return split_states(states, labels), {**written, **reader.decode(coming, most, written)}

    def _before(
        self, rows: Sequence[AskedRow], reader: Reader, given: dict[int, tuple[int, ...]], most: Sequence[int]
    ) -> _Fed:
        """Ask the unedited model; its own answers are fed to the rows that have none."""
        last = reader.read()
        states = self.feed(reader, last, given)
        written, coming = self.agreed(reader, last, states, given, most)
        keys = [self._key(row.view.query) for row in rows]
        known = {key: self._answers[key] for key in keys if key in self._answers}
        coming = {number: token for number, token in coming.items() if keys[number] not in known}
        # The same question stands in several rows: one of them is asked
        first = {keys[number]: number for number in reversed(coming)}
        decoded = reader.decode({number: coming[number] for number in sorted(first.values())}, most, written)
        for number, tokens in {**written, **decoded}.items():
            if number in decoded or number not in coming:
                known.setdefault(keys[number], self.text(tokens))
        # Those of logits that were not finite are not remembered: what is would not say so
        broken = {keys[number] for number in reader.broken}
        for number, row in enumerate(rows):
            row.before, row.broken_before = known[keys[number]], keys[number] in broken
        self._answers.update({key: answer for key, answer in known.items() if key not in broken})
        reference = {
            number: own_answer_tokens(
                self.model, replace(rows[number].view.query, answer=rows[number].before), reader.lengths[number]
            )
            for number in range(len(rows))
            if number not in given and has_text(rows[number].before)
        }
        return _Fed((given, reference), merged_states([states, self.feed(reader, last, reference)], (given, reference)))

    def _score(self, rows: Sequence[AskedRow], fed: _Fed, states: Mapping[int, Tensor]) -> None:
        """Fill ``legacy`` and ``kl`` from final hidden states by row, some tokens at a time."""
        if not fed.labels:
            return
        numbers = sorted(fed.labels)
        after = torch.cat([states[number] for number in numbers])
        device = after.device
        labels = torch.tensor([token for number in numbers for token in fed.labels[number]], device=device)
        row = torch.tensor([n for n, number in enumerate(numbers) for _ in fed.labels[number]], device=device)
        size = self.tokens_at_once()
        tables = [
            token_scores(self.model.head(b), self.model.head(a), part)
            for b, a, part in zip(*(torch.split(each, size) for each in (fed.before, after, labels)), strict=True)
        ]
        means = {name: row_means(torch.cat([table[name] for table in tables]), row, len(numbers)) for name in tables[0]}
        for n, number in enumerate(numbers):
            rows[number].legacy = {name: means[name][n] for name in ("accuracy", "top1", "top10")}
            rows[number].kl = means["kl"][n]

    def _key(self, query: Query) -> tuple[Hashable, str, str, int]:
        return self.model.active_key, query.prompt, self.model.images.identity(query.image), self.max_new_tokens

    def _forget_some(self) -> None:
        """Keep the remembered answers to a number, the newest."""
        for key in list(self._answers)[: max(0, len(self._answers) - MOST_ANSWERS)]:
            self._answers.pop(key, None)


def _rows_of(rows: Sequence[AskedRow], size: int) -> Rows:
    counts = [0] * size
    for row in rows:
        counts[row.edit] += 1
    return Rows(tuple(counts))
