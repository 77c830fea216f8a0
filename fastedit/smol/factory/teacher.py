"""What the unchanged language model answers in text, which the low-rank changes must not unlearn.

Asked without a pattern it starts a sentence; after three answered questions of the same relation it answers in a word.
These answers, right or wrong, are what training asks of it without the pattern: its form changes, what it knows stays.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.backbone.stock import cache_of
from fastedit.smol.concepts import concepts
from fastedit.smol.facts import Fact, facts
from fastedit.smol.models import TEXT_PROMPT

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_PATTERN, _BATCH, _LONGEST = 3, 40, 7
_LIKELIEST = 8  # tokens that are kept of a distribution
_OTHERS = 1200  # questions without a known answer
_WORDINGS, _TOLD = 4, 2  # of each question in training; of which tell whether a fact is known
_MEASURED_SHARE = 4  # one fact of so many is never trained on in text

#: By token of an answer, the likeliest tokens and their shares.
Likely = tuple[tuple[tuple[int, float], ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Taught:
    """One question in text and the language model's own answer.

    truth: the right one, "" where none is known or asked for. likely: by token of the answer, the end included, the
    likeliest tokens and their shares.
    """

    relation: str
    subject: str
    prompt: str
    answer: str
    truth: str
    likely: Likely = ()

    @property
    def measured(self) -> bool:
        """Return whether it is kept for measuring."""
        return kept_for_measuring(self.relation, self.subject)


def kept_for_measuring(relation: str, subject: str) -> bool:
    """Return whether a fact is never asked in training, neither in text nor through a picture."""
    return zlib.crc32(f"text:{relation}:{subject}".encode()) % _MEASURED_SHARE == 0


def told_rightly(taught: Sequence[Taught]) -> dict[tuple[str, str], bool]:
    """Return by (relation, subject) whether every answer that has a truth is it; without one there is no entry."""
    right: dict[tuple[str, str], bool] = {}
    for one in taught:
        if one.truth:
            key = (one.relation, one.subject)
            right[key] = right.get(key, True) and one.answer == one.truth
    return right


@functools.cache
def pattern(relation: str) -> tuple[str, frozenset[str]]:
    """Return answered questions of a relation, with different answers if there are, and whom they are about."""
    chosen: dict[str, Fact] = {}
    others = [fact for fact in facts() if fact.relation == relation]
    for fact in random.Random(relation).sample(others, len(others)):
        chosen.setdefault(fact.answer, fact)
    shown = list(chosen.values())[:_PATTERN]
    text = "".join(f"{TEXT_PROMPT.format(fact.prompts()[0])} {fact.answer}\n" for fact in shown)
    return text, frozenset(fact.subject for fact in shown)


def teach(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    chosen: Sequence[Fact] | None = None,
    wordings: int = _TOLD,
) -> list[Taught]:
    """Return the greedy answers to facts' questions in some wordings; those that do not end are left out.

    Args:
        model: anything with `model` and `lm_head`. seed: of the wordings behind the first. chosen: facts; None is all.
        wordings: of each fact, as far as it has them; answers behind the second have no truth.
    """
    rng, asked = random.Random(seed), []
    for fact in facts() if chosen is None else chosen:
        _, used = pattern(fact.relation)
        first, *rest = fact.prompts()
        some = (first, *rng.sample(rest, min(wordings - 1, len(rest)))) if fact.subject not in used else ()
        asked += [(fact, prompt, fact.answer if number < _TOLD else "") for number, prompt in enumerate(some)]
    rows = answers(model, tokenizer, [(fact.relation, prompt) for fact, prompt, _ in asked])
    taught = []
    for (fact, prompt, truth), row in zip(asked, rows, strict=True):
        tokens, answer = spoken(tokenizer, row)
        if answer:
            # Another spelling of the answer has other tokens, which these shares are not of
            likely = row if tokenizer(f" {answer}").input_ids == tokens else ()
            taught.append(Taught(fact.relation, fact.subject, prompt, answer, truth, likely))
    return taught


def spoken(tokenizer: PreTrainedTokenizerFast, row: Likely) -> tuple[list[int], str]:
    """Return an answer's tokens without the end, and its text: "" for what has no end, or nothing before it."""
    tokens = [token[0][0] for token in row[:-1]]
    return tokens, tokenizer.decode(tokens).strip() if tokens else ""


def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: Sequence[tuple[str, str]]
) -> list[Likely]:
    """Return for each (relation, question) the greedy answer behind the relation's pattern; () where no end comes.

    Args:
        model: anything with `model` and `lm_head`. asked: in any order.
    """
    ends = {tokenizer.eos_token_id, tokenizer("\n").input_ids[0]}
    # Questions of one length side by side need no padding
    groups: dict[str, dict[int, list[tuple[int, list[int]]]]] = defaultdict(lambda: defaultdict(list))
    for number, (relation, prompt) in enumerate(asked):
        ids = tokenizer(TEXT_PROMPT.format(prompt)).input_ids
        groups[relation][len(ids)].append((number, ids))
    found: list[Likely] = [()] * len(asked)
    for relation, lengths in groups.items():
        head = model.model(input_ids=tokenizer(pattern(relation)[0], return_tensors="pt").input_ids, use_cache=True)
        for group in lengths.values():
            for at in range(0, len(group), _BATCH):
                part = group[at : at + _BATCH]
                rows = _continued(model, cache_of(head), [ids for _, ids in part], ends)
                for (number, _), row in zip(part, rows, strict=True):
                    found[number] = row
    return found


def _continued(model: Any, before: Any, prompts: list[list[int]], ends: set[int]) -> list[Likely]:
    """Return for each token of greedy answers, the end included, the likeliest tokens; () where no end comes."""
    import torch

    cache = copy.deepcopy(before)
    cache.batch_repeat_interleave(len(prompts))
    ids, steps = torch.tensor(prompts), []
    with torch.no_grad():
        for _ in range(_LONGEST):
            # By its position: transformers is about to give the cache another name
            hidden = model.model(ids, None, None, cache, use_cache=True).last_hidden_state[:, -1]
            shares, tokens = model.lm_head(hidden).float().softmax(-1).topk(_LIKELIEST)
            steps.append([tuple(zip(*row, strict=True)) for row in zip(tokens.tolist(), shares.tolist(), strict=True)])
            ids = tokens[:, :1]
    rows = [list(row) for row in zip(*steps, strict=True)]
    stops = [next((at for at, token in enumerate(row) if token[0][0] in ends), None) for row in rows]
    return [() if stop is None else tuple(row[: stop + 1]) for row, stop in zip(rows, stops, strict=True)]


def others(seed: int = 0) -> list[Fact]:
    """Return questions that have no known answer: of each relation, every concept of the kinds that facts are of.

    What is said of them must stay as well, and nobody measures it.
    """
    every = frozenset((fact.relation, fact.subject) for fact in facts())
    kinds: dict[str, set[str]] = defaultdict(set)
    kind_of = {concept.name: concept.kind for concept in concepts()}
    for relation, subject in sorted(every):
        kinds[relation].add(kind_of[subject])
    asked = [
        Fact(relation, name, "")
        for relation, wanted in sorted(kinds.items())
        for name, kind in kind_of.items()
        if kind in wanted and (relation, name) not in every and not kept_for_measuring(relation, name)
    ]
    return random.Random(f"others:{seed}").sample(asked, min(_OTHERS, len(asked)))


def stored(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[Taught]:
    """Return what `teach` gives, from a file if it is there, else written to it."""
    if not path.is_file():
        taught = teach(model, tokenizer, chosen=[*facts(), *others()], wordings=_WORDINGS)
        path.write_text(json.dumps([dataclasses.asdict(one) for one in taught]), encoding="utf-8")
    return read(path)


def read(path: Path) -> list[Taught]:
    """Return what `stored` wrote."""
    return [
        Taught(
            **{**one, "likely": tuple(tuple((int(n), float(share)) for n, share in token) for token in one["likely"])}
        )
        for one in json.loads(path.read_text(encoding="utf-8"))
    ]
