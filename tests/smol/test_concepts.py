from __future__ import annotations

import pytest

from fastedit.smol.concepts import FLAG, concepts, flags, icons
from fastedit.smol.countries import FLAG_COUNTRIES


def test_about_four_hundred_icons_and_a_hundred_and_twenty_flags_with_distinct_names_and_pictures() -> None:
    assert len(icons()) >= 400
    assert len(flags()) == 120
    assert len({concept.name for concept in concepts()}) == len({concept.code for concept in concepts()}) == 531


@pytest.mark.parametrize(
    ("name", "code", "phrase"),
    [
        ("dog", "1F415", "a dog"),
        ("corn", "1F33D", "corn"),
        ("elephant", "1F418", "an elephant"),
        ("grapes", "1F347", "grapes"),
        ("Japan", "1F1EF-1F1F5", "the flag of Japan"),
        ("Netherlands", "1F1F3-1F1F1", "the flag of the Netherlands"),
    ],
)
def test_a_concept_has_its_code_points_and_reads_as_people_say_it(name: str, code: str, phrase: str) -> None:
    concept = next(one for one in concepts() if one.name == name)
    assert (concept.code, concept.phrase) == (code, phrase)
    assert (concept.kind == FLAG) == name[0].isupper()


def test_every_country_has_what_people_ask_for_unless_it_is_disputed() -> None:
    japan = FLAG_COUNTRIES["Japan"]
    assert (japan.capital, japan.continent, japan.currency, japan.language) == ("Tokyo", "Asia", "yen", "Japanese")
    assert FLAG_COUNTRIES["Mexico"].capital == "Mexico City"
    assert FLAG_COUNTRIES["Turkey"].continent is None
    assert sum(country.capital is None for country in FLAG_COUNTRIES.values()) < 6
