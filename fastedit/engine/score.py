"""``score``: how a model answers the questions of edits, whoever changed it: both protocols, and no edit is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded
from fastedit.backbone.context import on_frozen_model, outside_inference_mode
from fastedit.backbone.encoding import answer_tokens, own_answer_tokens
from fastedit.backbone.generation import Reader
from fastedit.backbone.wrapping import wrap
from fastedit.data import fingerprint
from fastedit.data.problems import RecordErrors
from fastedit.engine.asking import Asker, has_text, merged_states, split_states
from fastedit.engine.preflight import record_problems
from fastedit.evaluation import EditScores, Score, evaluation_views, summarise
from fastedit.evaluation.metrics import AskedRow
from fastedit.evaluation.scoring import TOP_K, edit_scores
from fastedit.requests import EditRequest, Query


@dataclass(frozen=True)
class Answered:
    """One question as a model answered it.

    Args:
        text: generated. broken: whether logits were not finite.
        fed: tokens of the answer that was fed, the end token last; none where there was nothing to feed.
        best: (len(fed), 10) int64, on the CPU: the likeliest tokens where those are predicted, in order.
    """

    text: str
    broken: bool
    fed: tuple[int, ...]
    best: Tensor


@dataclass(frozen=True)
class ModelScores:
    """What ``fastedit.score`` returns; also the ``reference`` of a later call with the same records.

    Args:
        scores: by protocol ("legacy", "strict") and name, the mean over edits with its interval.
        edit_scores: of each record, with the answers.
        answered: of each record, its questions in the order of ``fastedit.evaluation.evaluation_views``.
        records: fingerprint of the records. vocab_size: of the model.
    """

    scores: Mapping[str, Mapping[str, Score]]
    edit_scores: Sequence[EditScores]
    answered: Sequence[Sequence[Answered]] = field(repr=False)
    records: str
    vocab_size: int

    @property
    def holds(self) -> list[bool]:
        """Of each record, whether its question gets its answer (protocol "strict")."""
        return [each.strict["reliability"] == 1.0 for each in self.edit_scores]


def score(
    model: Any,
    processor: Any,
    records: Sequence[EditRequest],
    *,
    reference: ModelScores | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> ModelScores:
    """Ask a model every question of some edits and score its answers. Nothing of the model changes.

    Whatever made the model counts: a fine-tuning, merged weights, an adapter, deltas of ``fastedit.applied`` around the
    call. What must change is compared with the record's target. What must stay is compared with the ``reference``:
    the model before it was changed, scored by an earlier call; without one, those scores are left out. The KL columns
    of ``fastedit.edit`` are absent: logits of the reference are not kept, only the ten best tokens of each position.

    Args:
        model: of transformers or PEFT; or an ``EditableModel``.
        processor: of the model (see ``fastedit.wrap``); None with an ``EditableModel``.
        records: from ``fastedit.read_edits``, for example.
        reference: of the same records, by a model with the same vocabulary.
        max_new_tokens: longest generated answer.
        seed: of the intervals.
    Returns:
        ModelScores.
    Raises:
        TypeError, ValueError: a model that ``fastedit.wrap`` refuses; no records, or a reference of other ones.
        RecordErrors: records that cannot be asked, all of them at once.
    """
    editable = model if isinstance(model, EditableModel) else wrap(model, processor)
    if not records:
        raise ValueError("score: records must have at least one edit (got none)")
    if max_new_tokens < 1:
        raise ValueError(f"score: max_new_tokens must be at least 1 (got max_new_tokens={max_new_tokens})")
    problems = record_problems(editable, records)
    if problems:
        raise RecordErrors(problems)
    digest = fingerprint(records)
    if reference is not None and (reference.records, reference.vocab_size) != (digest, editable.vocab_size):
        raise ValueError(
            "score: reference must be scores of the same records by a model of the same vocabulary (got records "
            f"{reference.records[:12]}, vocab_size={reference.vocab_size}, where those given are {digest[:12]}, "
            f"vocab_size={editable.vocab_size})"
        )
    rows = [AskedRow(edit, view) for edit, record in enumerate(records) for view in evaluation_views(record)]
    before = None if reference is None else [each for answers in reference.answered for each in answers]
    answered = _answers(editable, rows, before, max_new_tokens)
    by_edit: list[list[AskedRow]] = [[] for _ in records]
    lists: list[list[Answered]] = [[] for _ in records]
    for row, answer in zip(rows, answered, strict=True):
        by_edit[row.edit].append(row)
        lists[row.edit].append(answer)
    scored = [_scores(each, known=reference is not None) for each in by_edit]
    return ModelScores(summarise(scored, seed=seed), scored, lists, digest, editable.vocab_size)


def of_record(scores: ModelScores, records: Sequence[EditRequest], number: int) -> ModelScores:
    """Of the scores of some records those of one, as if it had been asked alone."""
    scored, answered = [scores.edit_scores[number]], [scores.answered[number]]
    return ModelScores(summarise(scored), scored, answered, fingerprint([records[number]]), scores.vocab_size)


def joined(parts: Sequence[ModelScores], records: Sequence[EditRequest]) -> ModelScores:
    """The scores of records that were asked one by one."""
    scored = [part.edit_scores[0] for part in parts]
    answered = [part.answered[0] for part in parts]
    return ModelScores(summarise(scored), scored, answered, fingerprint(records), parts[0].vocab_size)


def _scores(rows: Sequence[AskedRow], *, known: bool) -> EditScores:
    """Scores of one record; of what must stay where it is known what the answer was before."""
    scored = edit_scores(rows)
    if known:
        return scored
    changed = edit_scores([row for row in rows if row.view.changes])
    return EditScores(changed.legacy, changed.strict, scored.answers)


@on_frozen_model
@outside_inference_mode
@torch.no_grad()
def _answers(
    model: EditableModel, rows: Sequence[AskedRow], before: Sequence[Answered] | None, max_new_tokens: int
) -> list[Answered]:
    """Ask all rows and fill in what is scored of them; returns the answers in order."""
    asker = _StockAsker(model, max_new_tokens=max_new_tokens)
    answered: list[Answered] = []

    def part(some: Sequence[AskedRow], encoded: Encoded) -> None:
        start = len(answered)
        known = None if before is None else before[start : start + len(some)]
        found = asker.answers(some, encoded, known)
        for number, (row, answer) in enumerate(zip(some, found, strict=True)):
            _fill(row, answer, answer if known is None else known[number])
        answered.extend(found)

    asker.ask(rows, part, asker.queries)
    return answered


def _fill(row: AskedRow, answer: Answered, before: Answered) -> None:
    """Write an answer, and the one before, into the row that is scored."""
    row.before, row.after = before.text, answer.text
    row.broken_before, row.broken_after = before.broken, answer.broken
    if not answer.fed:
        return
    labels = torch.tensor(answer.fed)
    sound = float(not answer.broken)
    row.legacy = {"accuracy": sound * float((answer.best[:, 0] == labels).double().mean())}
    if before.fed == answer.fed:
        same = (answer.best == before.best).double() * sound * float(not before.broken)
        row.legacy |= {"top1": float(same[:, 0].mean()), "top10": float(same.mean())}
    elif not row.view.changes:
        row.legacy = None


class _StockAsker(Asker):
    """Asks one model, with whatever acts on it."""

    def queries(self, rows: Sequence[AskedRow]) -> Sequence[Query]:
        """What is asked of rows: other questions where deltas act that ask those."""
        asked: Sequence[Query] = [row.view.query for row in rows]
        for holder in self.model.holders:
            asked = holder.rewrite_prompts(asked)
        return asked

    def answers(self, rows: Sequence[AskedRow], encoded: Encoded, before: Sequence[Answered] | None) -> list[Answered]:
        """The answers to rows; fed are wanted answers, and to what must stay the one before."""
        lengths = encoded.lengths.tolist()
        given: dict[int, tuple[int, ...]] = {}
        for number, row in enumerate(rows):
            if has_text(row.view.query.answer):
                given[number] = answer_tokens(self.model, row.view.query, lengths[number])
            elif before is not None and before[number].fed:
                given[number] = before[number].fed
        longest = max((len(tokens) for tokens in given.values()), default=0)
        reader = Reader(self.model, encoded, max(longest, self.max_new_tokens))
        most = reader.rooms(self.max_new_tokens)
        last = reader.read()
        states = self.feed(reader, last, given)
        written, coming = self.agreed(reader, last, states, given, most)
        decoded = {**written, **reader.decode(coming, most, written)}
        texts = [self.text(decoded[number]) for number in range(len(rows))]
        own = {
            number: own_answer_tokens(self.model, replace(row.view.query, answer=texts[number]), lengths[number])
            for number, row in enumerate(rows)
            if number not in given and before is None and has_text(texts[number])
        }
        groups = given, own
        fed = {**given, **own}
        best = split_states(self._best(merged_states([states, self.feed(reader, last, own)], groups)), fed)
        nothing = torch.empty(0, TOP_K, dtype=torch.long)
        return [
            Answered(text, number in reader.broken, fed.get(number, ()), best.get(number, nothing))
            for number, text in enumerate(texts)
        ]

    def _best(self, states: Tensor) -> Tensor:
        """(T, 10) the likeliest tokens at final hidden states (T, d), equal ones in the order of their ids."""
        parts = [
            torch.sort(self.model.head(part), dim=-1, descending=True, stable=True).indices[:, :TOP_K].cpu()
            for part in torch.split(states, self.tokens_at_once())
            if len(part)
        ]
        return torch.cat(parts) if parts else torch.empty(0, TOP_K, dtype=torch.long)
