from __future__ import annotations

from fastedit.pocket.facts import COUNTRIES, FACTS, sentence
from fastedit.pocket.world import FLAGS


def test_there_are_a_few_hundred_facts_and_no_prompt_has_two_answers() -> None:
    facts = FACTS
    assert len(facts) > 300
    prompts = [prompt for fact in facts for prompt in fact.prompts]
    assert len(prompts) == len(set(prompts))


def test_some_facts_anyone_can_check() -> None:
    known = {prompt: fact.answer for fact in FACTS for prompt in fact.prompts}
    assert known["What is the capital of France?"] == "Paris"
    assert known["On which continent is Peru?"] == "South America"
    assert known["What is the chemical symbol of iron?"] == "Fe"
    assert known["What is the opposite of hot?"] == "cold"
    assert known["What is the opposite of cold?"] == "hot"
    assert known["How many sides does an octagon have?"] == "eight"
    assert known["What does an owl do?"] == "hoots"
    assert known["What is the complement of red?"] == "green"
    assert known["What is the capital of Haiti?"] == "Port-au-Prince"
    assert known["What is the capital of Argentina?"] == "Buenos Aires"


def test_every_flag_has_a_capital_and_a_continent() -> None:
    assert set(FLAGS) <= set(COUNTRIES)


def test_one_template_of_each_fact_is_not_trained() -> None:
    left_out = set()
    for fact in FACTS:
        untrained = fact.prompts[fact.untrained]
        assert untrained not in fact.trained()
        assert len(fact.trained()) == len(fact.prompts) - 1 >= 3
        left_out.add((fact.relation, fact.untrained))
    # Every template is trained with some facts, so what is new is the combination.
    assert len(left_out) == len({(fact.relation, i) for fact in FACTS for i in range(len(fact.prompts))})


def test_sentences() -> None:
    assert sentence("is a owl a bird?") == "Is an owl a bird?"
