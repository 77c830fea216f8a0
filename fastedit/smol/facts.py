"""What is true of what the pictures show, in short words; `known` says which of it the language model answers in text.

Nothing of this is taught to smol-llava: its language model knows it, or the question is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

from fastedit.smol.concepts import FLAG, concepts
from fastedit.smol.countries import FLAG_COUNTRIES
from fastedit.smol.templates import prompts

KNOWN = Path(__file__).parent / "assets" / "known.json"

# answer: subjects
_ANIMALS = {
    "class": {
        "mammal": """dog cat cow horse sheep goat pig rabbit mouse hedgehog tiger leopard lion elephant giraffe zebra
            hippopotamus rhinoceros kangaroo koala panda bear wolf fox raccoon skunk otter beaver sloth bison llama
            camel deer gorilla monkey orangutan bat squirrel whale dolphin seal""",
        "bird": "rooster hen duck turkey eagle owl parrot peacock flamingo swan penguin dove chick",
        "reptile": "turtle snake lizard crocodile dinosaur",
        "amphibian": "frog",
        "fish": "fish pufferfish shark",
        "insect": "butterfly bee ant ladybug cricket mosquito fly",
        "crustacean": "crab lobster shrimp",
        "mollusk": "octopus squid oyster snail",
        "arachnid": "spider scorpion",
    },
    "legs": {
        "four": """dog cat cow horse sheep goat pig rabbit mouse tiger leopard lion elephant giraffe zebra hippopotamus
            rhinoceros panda bear wolf fox raccoon bison camel llama deer turtle lizard crocodile frog""",
        "two": "rooster hen duck turkey eagle owl parrot peacock flamingo swan penguin dove chick",
        "six": "butterfly bee ant ladybug cricket mosquito fly",
        "eight": "spider scorpion octopus",
        "ten": "crab lobster",
        "zero": "snake worm fish whale dolphin shark snail",
    },
    "sound": {
        "bark": "dog", "meow": "cat", "moo": "cow", "neigh": "horse", "baa": "sheep", "bleat": "goat", "oink": "pig",
        "crow": "rooster", "cluck": "hen", "quack": "duck", "gobble": "turkey", "roar": "lion tiger bear",
        "howl": "wolf", "hoot": "owl", "hiss": "snake", "croak": "frog", "buzz": "bee mosquito fly", "chirp": "cricket",
        "coo": "dove", "squeak": "mouse", "trumpet": "elephant", "squawk": "parrot", "peep": "chick",
    },
    "young": {
        "puppy": "dog", "kitten": "cat",
        "calf": "cow elephant whale dolphin giraffe hippopotamus rhinoceros bison camel",
        "foal": "horse zebra", "lamb": "sheep", "kid": "goat", "piglet": "pig", "duckling": "duck",
        "chick": "hen eagle penguin", "cub": "lion tiger bear leopard panda", "pup": "wolf seal bat",
        "joey": "kangaroo koala", "fawn": "deer", "cygnet": "swan", "owlet": "owl", "tadpole": "frog",
        "caterpillar": "butterfly", "bunny": "rabbit", "hatchling": "turtle",
    },
    "food": {
        "grass": "cow sheep horse goat bison zebra", "bamboo": "panda", "eucalyptus leaves": "koala",
        "carrots": "rabbit", "bananas": "monkey", "nuts": "squirrel", "nectar": "bee butterfly",
        "fish": "penguin seal dolphin otter shark", "meat": "lion tiger wolf leopard",
        "leaves": "giraffe sloth caterpillar",
        "cheese": "mouse", "insects": "frog spider bat lizard", "blood": "mosquito", "corn": "hen rooster",
        "mice": "owl snake cat",
    },
    "home": {
        "ocean": "whale shark dolphin octopus squid lobster seal", "desert": "camel scorpion", "hive": "bee",
        "Antarctica": "penguin", "Australia": "kangaroo koala", "China": "panda", "Africa": "giraffe zebra lion",
        "jungle": "monkey orangutan tiger gorilla", "farm": "cow pig hen sheep horse goat rooster",
        "forest": "bear deer wolf fox owl squirrel", "web": "spider", "cave": "bat", "pond": "frog duck",
        "water": "fish", "river": "crocodile hippopotamus beaver otter", "nest": "dove eagle", "soil": "worm",
    },
}  # fmt: skip
_THINGS = {
    "colour": {
        "yellow": "banana lemon corn cheese butter pineapple sunflower chick taxi lion",
        "red": "apple strawberry tomato rose watermelon ladybug lobster|fire truck",
        "green": "cucumber broccoli lettuce avocado kiwi cactus frog pear clover|pine tree|crocodile|palm tree",
        "orange": "carrot orange pumpkin tiger", "purple": "eggplant", "pink": "pig flamingo peach|cherry blossom",
        "white": "swan milk egg garlic dove sheep cloud snowman ghost|snowflake|tooth|bone",
        "brown": "potato coconut chocolate bear cookie log",
        "gray": "elephant dolphin mouse rhinoceros rock koala", "black": "gorilla bat",
    },
    "group": {
        "fruit": """banana apple pear peach lemon orange pineapple mango watermelon melon strawberry kiwi coconut
            avocado""",
        "vegetable": "carrot eggplant cucumber lettuce broccoli garlic onion potato|bell pepper|corn|tomato|salad",
        "dairy": "cheese butter milk", "meat": "bacon hamburger|hot dog", "bread": "croissant baguette bagel",
        "dessert": "cake pie cupcake donut cookie|ice cream|birthday cake", "drink": "coffee beer wine milk",
        "candy": "lollipop chocolate", "seafood": "shrimp lobster oyster crab", "pasta": "spaghetti",
    },
    "material": {
        "milk": "cheese butter", "grapes": "wine", "flour": "bread pretzel bagel spaghetti croissant baguette",
        "potatoes": "french fries", "cocoa": "chocolate", "corn": "popcorn",
        "wood": "pencil chair door log violin guitar",
        "metal": "key coin anchor hammer wrench chain bell spoon knife saw", "glass": "window mirror|magnifying glass",
        "paper": "book newspaper envelope calendar", "wax": "candle crayon", "snow": "snowman", "gold": "crown",
        "rubber": "wheel balloon", "wool": "scarf yarn", "leather": "boot handbag football",
        "water": "rain cloud wave snowflake", "cotton": "t-shirt", "stone": "castle mountain", "calcium": "bone tooth",
        "silk": "tie kimono", "plastic": "toothbrush", "denim": "jeans", "coffee beans": "coffee",
    },
    "user": {
        "doctor": "stethoscope syringe thermometer pill", "scientist": "microscope", "astronomer": "telescope",
        "painter": "paintbrush palette ladder", "carpenter": "hammer saw axe", "farmer": "tractor",
        "astronaut": "rocket",
        "firefighter": "fire truck|fire extinguisher", "pilot": "airplane helicopter", "police officer": "police car",
        "chef": "knife", "tailor": "sewing needle|thread|scissors", "photographer": "camera", "plumber": "wrench",
        "mechanic": "screwdriver wrench", "sailor": "anchor ship sailboat", "student": "backpack pencil ruler",
        "barber": "scissors razor", "miner": "pickaxe", "king": "crown", "teacher": "book",
        "musician": "guitar violin piano",
        "singer": "microphone", "archer": "bow and arrow", "magician": "magic wand|top hat", "journalist": "newspaper",
    },
    "way": {
        "road": "car bus taxi van motorcycle bicycle scooter ambulance|police car|fire truck|pickup truck",
        "water": "ship sailboat", "air": "airplane helicopter parachute", "tracks": "train tram",
        "space": "rocket satellite UFO",
        "ice": "ice skate", "snow": "sled", "sky": "kite balloon", "field": "tractor",
    },
    "body": {
        "head": "top hat|cap|hat|crown|graduation cap", "neck": "scarf tie", "finger": "ring", "wrist": "watch",
        "foot": "boot sandal sneaker|high heel", "hands": "gloves", "feet": "socks", "eyes": "glasses sunglasses",
        "legs": "jeans shorts", "back": "backpack", "ears": "headphones", "lips": "lipstick", "hand": "boxing glove",
    },
    "wheels": {
        "two": "bicycle motorcycle scooter",
        "four": "car taxi van skateboard tractor|police car|race car|roller skate|pickup truck",
        "zero": "sled sailboat ship",
    },
}  # fmt: skip
_FLAG_RELATIONS = ("capital", "continent", "currency", "language")
#: A further step from the capital; true of a country exactly as it is of its capital.
TWO_HOP = {"capital_continent": "continent", "capital_language": "language", "capital_currency": "currency"}
#: What a picture's concept is called in a question about it.
THIS = {FLAG: ("this country", "the country with this flag"), "animal": ("this animal",), "food": ("this food", "this")}
_THIS = ("this", "this thing")


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One fact. relation: a kind of `templates.WORDINGS`; subject: a concept's name; answer: in short words."""

    relation: str
    subject: str
    answer: str

    @property
    def two_hop(self) -> bool:
        """Return whether the answer is two steps from the subject."""
        return self.relation in TWO_HOP

    def prompts(self, *, unseen: bool = False) -> tuple[str, ...]:
        """Return the question in text only, in every wording."""
        return prompts(self.relation, (_in_text(self.subject),), unseen=unseen)

    def seen_prompts(self, *, unseen: bool = False) -> tuple[str, ...]:
        """Return the question about a picture of the subject, in every wording."""
        return tuple(
            prompt for this in this_one(self.subject) for prompt in prompts(self.relation, (this,), unseen=unseen)
        )


@functools.cache
def _by_name() -> dict[str, tuple[str, str]]:
    """Return (kind, the name as it stands in a sentence) by a concept's name."""
    return {
        concept.name: (
            concept.kind,
            FLAG_COUNTRIES[concept.name].phrase if concept.kind == FLAG else concept.phrase,
        )
        for concept in concepts()
    }


def _in_text(subject: str) -> str:
    return _by_name()[subject][1]


def this_one(subject: str) -> tuple[str, ...]:
    """Return what a picture's subject is called in a question about it: "this animal", "this country"."""
    return THIS.get(_by_name()[subject][0], _THIS)


def _subjects(text: str) -> list[str]:
    """Return the names in a list: separated by "|" where one of them has more than one word, else by spaces."""
    names: list[str] = []
    for part in " ".join(text.split()).split("|"):
        names += [part] if part in _by_name() else part.split()
    return names


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Return every fact about a concept, in a fixed order; a subject has one answer for each relation."""
    answers: dict[tuple[str, str], str] = {}
    for tables in (_ANIMALS, _THINGS):
        for relation, rows in tables.items():
            for answer, text in rows.items():
                for subject in _subjects(text):
                    answers.setdefault((relation, subject), answer)
    for country in FLAG_COUNTRIES.values():
        for relation in _FLAG_RELATIONS:
            answer = getattr(country, relation)
            if answer is not None:
                answers[relation, country.name] = answer
        for relation, step in TWO_HOP.items():
            answer = getattr(country, step)
            if answer is not None and country.capital is not None:
                answers[relation, country.name] = answer
    return tuple(Fact(relation, subject, answer) for (relation, subject), answer in answers.items())


@functools.cache
def known() -> tuple[Fact, ...]:
    """Return the facts that the language model answers rightly in text, as `assets/known.json` lists them."""
    listed: Mapping[str, list[str]] = json.loads(KNOWN.read_text(encoding="utf-8"))["known"]
    return tuple(fact for fact in facts() if fact.subject in listed.get(fact.relation, ()))


@functools.cache
def of(subject: str) -> tuple[Fact, ...]:
    """Return what is true of a subject, whether the language model knows it or not."""
    return tuple(fact for fact in facts() if fact.subject == subject)


@functools.cache
def known_of(subject: str) -> tuple[Fact, ...]:
    """Return what the language model knows of a subject."""
    return tuple(fact for fact in known() if fact.subject == subject)
