from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastedit.smol.factory.knowledge import known_facts, write
from fastedit.smol.facts import facts

WRONG = "What language is spoken in Japan?"  # the second wording


def all_but_one(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    return [question != WRONG for question, _ in pairs]


def test_a_fact_is_known_in_every_wording_and_two_hops_need_both_steps() -> None:
    known = known_facts(all_but_one)
    lost = {(fact.relation, fact.subject) for fact in facts()} - {(fact.relation, fact.subject) for fact in known}
    assert lost == {("language", "Japan"), ("capital_language", "Japan")}


def test_what_is_known_is_listed_by_relation(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    write([fact for fact in facts() if fact.subject == "dog"], "a model", path)
    stored = json.loads(path.read_text())
    assert stored["asked"] == "a model"
    assert stored["known"]["sound"] == ["dog"]
