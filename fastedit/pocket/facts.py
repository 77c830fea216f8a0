"""True text-only facts: what the embedded models know beside images, and what text locality is measured on.

Every relation has several question templates. Each fact leaves one of them out of training (a different one from fact
to fact), so that the untrained template shows whether a fact or a sentence was learned.
"""

from __future__ import annotations

import dataclasses
import re

# country: capital, continent
COUNTRIES: dict[str, tuple[str, str]] = {}
_BY_CONTINENT = {
    "Europe": """France Paris, Italy Rome, Ireland Dublin, Belgium Brussels, Romania Bucharest, Germany Berlin,
        Netherlands Amsterdam, Russia Moscow, Austria Vienna, Hungary Budapest, Bulgaria Sofia, Estonia Tallinn,
        Lithuania Vilnius, Ukraine Kyiv, Poland Warsaw, Sweden Stockholm, Finland Helsinki, Denmark Copenhagen,
        Norway Oslo, Iceland Reykjavik, Switzerland Bern, Spain Madrid, Portugal Lisbon, Greece Athens, Croatia Zagreb,
        Serbia Belgrade, Slovakia Bratislava, Slovenia Ljubljana, Latvia Riga, Albania Tirana, Moldova Chisinau,
        Belarus Minsk""",
    "Asia": """Armenia Yerevan, Indonesia Jakarta, Yemen Sanaa, Japan Tokyo, Bangladesh Dhaka, China Beijing,
        Thailand Bangkok, Vietnam Hanoi, Mongolia Ulaanbaatar, Nepal Kathmandu, Iran Tehran, Iraq Baghdad,
        Jordan Amman, Lebanon Beirut, Syria Damascus, Qatar Doha, Oman Muscat, Pakistan Islamabad, Afghanistan Kabul,
        Uzbekistan Tashkent, Cambodia Phnom-Penh, Laos Vientiane, Philippines Manila,
        Bhutan Thimphu, Malaysia Kuala-Lumpur""",
    "Africa": """Nigeria Abuja, Mali Bamako, Guinea Conakry, Gabon Libreville, Egypt Cairo, Kenya Nairobi,
        Ethiopia Addis-Ababa, Ghana Accra, Senegal Dakar, Morocco Rabat, Algeria Algiers, Tunisia Tunis,
        Libya Tripoli, Sudan Khartoum, Uganda Kampala, Rwanda Kigali, Zambia Lusaka, Zimbabwe Harare, Angola Luanda,
        Mozambique Maputo, Madagascar Antananarivo, Somalia Mogadishu, Namibia Windhoek, Botswana Gaborone,
        Liberia Monrovia, Niger Niamey, Togo Lome""",
    "South-America": """Peru Lima, Argentina Buenos-Aires, Chile Santiago, Colombia Bogota, Ecuador Quito,
        Venezuela Caracas, Uruguay Montevideo, Paraguay Asuncion, Brazil Brasilia, Guyana Georgetown""",
    "North-America": """Canada Ottawa, Cuba Havana, Jamaica Kingston, Haiti Port-au-Prince, Panama Panama-City,
        Nicaragua Managua, Honduras Tegucigalpa, Bahamas Nassau""",
    "Oceania": """Palau Ngerulmud, Australia Canberra, Fiji Suva, Samoa Apia, Tonga Nukualofa, Vanuatu Port-Vila""",
}
for _continent, _rows in _BY_CONTINENT.items():
    for _row in _rows.split(","):
        _country, _capital = _row.split()
        _capital = _capital.replace("-", " ") if _capital != "Port-au-Prince" else _capital
        COUNTRIES[_country] = (_capital, _continent.replace("-", " "))

_ELEMENTS = """hydrogen H, helium He, lithium Li, carbon C, nitrogen N, oxygen O, fluorine F, neon Ne, sodium Na,
    magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S, chlorine Cl, argon Ar, potassium K, calcium Ca,
    titanium Ti, chromium Cr, manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, arsenic As,
    bromine Br, krypton Kr, silver Ag, tin Sn, iodine I, xenon Xe, tungsten W, platinum Pt, gold Au, mercury Hg,
    lead Pb, radium Ra, uranium U"""
_OPPOSITES = """hot cold, big little, small large, fast slow, light heavy, open closed, day night, young old,
    happy sad, wet dry, hard soft, strong weak, early late, full empty, thick thin, near far, deep shallow,
    rich poor, true false, high low"""
_SOUNDS = """dog barks, cat meows, cow moos, duck quacks, lion roars, pig oinks, snake hisses, frog croaks,
    owl hoots, bee buzzes, wolf howls, horse neighs, donkey brays, crow caws, mouse squeaks, bird chirps"""
# The painter's wheel.
_COMPLEMENTS = "red green, green red, blue orange, orange blue, yellow purple, purple yellow"
_SIDES = "triangle three, square four, diamond four, rectangle four, pentagon five, hexagon six, octagon eight"
_NEXT = """Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday,
    Sunday Monday, January February, February March, March April, April May, May June, June July, July August,
    August September, September October, October November, November December, December January"""


def _table(text: str) -> dict[str, str]:
    return dict(row.split() for row in text.split(","))


ELEMENTS = _table(_ELEMENTS)
OPPOSITES = _table(_OPPOSITES)
SOUNDS = _table(_SOUNDS)
COMPLEMENTS = _table(_COMPLEMENTS)
SIDES = _table(_SIDES)
NEXT = _table(_NEXT)

RELATIONS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "capital": (
        {country: capital for country, (capital, _) in COUNTRIES.items()},
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "The capital of {} is which city?",
            "What is the name of the capital city of {}?",
        ),
    ),
    "continent": (
        {country: continent for country, (_, continent) in COUNTRIES.items()},
        (
            "On which continent is {}?",
            "What continent is {} on?",
            "Which continent does {} belong to?",
            "{} lies on which continent?",
        ),
    ),
    "symbol": (
        ELEMENTS,
        (
            "What is the chemical symbol of {}?",
            "Which symbol stands for {}?",
            "How do chemists write {}?",
            "Give the symbol of the element {}.",
        ),
    ),
    "opposite": (
        OPPOSITES | {b: a for a, b in OPPOSITES.items() if b not in OPPOSITES},
        (
            "What is the opposite of {}?",
            "Which word means the opposite of {}?",
            "Name the opposite of {}.",
            "{} is the opposite of what?",
        ),
    ),
    "sound": (
        SOUNDS,
        ("What does a {} do?", "Which sound does a {} make?", "How does a {} speak?", "Name the sound of a {}."),
    ),
    "complement": (
        COMPLEMENTS,
        (
            "Which colour is opposite to {} on the colour wheel?",
            "What is the complement of {}?",
            "Name the complementary colour of {}.",
            "{} has which complementary colour?",
        ),
    ),
    "sides": (
        SIDES,
        (
            "How many sides does a {} have?",
            "What is the number of sides of a {}?",
            "Count the sides of a {}.",
            "A {} has how many sides?",
        ),
    ),
    "next": (
        NEXT,
        ("What comes after {}?", "Which one follows {}?", "Name what follows {}.", "{} is followed by what?"),
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One fact; `prompts[untrained]` is the template that training never shows for it."""

    relation: str
    subject: str
    answer: str
    prompts: tuple[str, ...]
    untrained: int

    def trained(self) -> tuple[str, ...]:
        """Return the prompts that training shows."""
        return self.prompts[: self.untrained] + self.prompts[self.untrained + 1 :]


def _facts() -> list[Fact]:
    facts = []
    for relation, (table, templates) in RELATIONS.items():
        for i, (subject, answer) in enumerate(table.items()):
            prompts = tuple(sentence(template.format(subject)) for template in templates)
            facts.append(Fact(relation, subject, answer, prompts, i % len(templates)))
    return facts


def sentence(text: str) -> str:
    """Return the sentence with "a" turned into "an" before vowels and a capital first letter."""
    text = with_articles(text)
    return text[:1].upper() + text[1:]


def with_articles(text: str) -> str:
    """Return the text with "a" turned into "an" before vowels."""
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


#: Every fact, in a fixed order.
FACTS: tuple[Fact, ...] = tuple(_facts())
