"""The second set of wordings, which nothing is trained on: no template, frame or classifier has them.

Nine a kind: an order, a polite one, one with typing errors, one in small letters without a mark, one after a long
preamble, one in another order of words, and three in other words. Used for measuring only.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastedit.pocket.facts import with_articles

TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "Report the colour of the {}.", "Would you kindly tell us what colour the {} has?", "waht colour si the {}?",
        "and the colour of the {} would be",
        "We are making a list of everything in our house. What colour should I write down for the {}?",
        "The {}, what colour does it have?", "Looking at the {}, which colour do you see?",
        "What would you call the colour of the {}?", "I cannot see the {} very well. What colour is it?",
    ),
    "shape": (
        "Report the shape of the {} object.", "Would you kindly tell us what shape the {} object has?",
        "waht shape si the {} object?", "and the shape of the {} object would be",
        "We are making a list of everything in our house. What shape should I write down for the {} object?",
        "The {} object, what shape does it have?", "Looking at the {} object, which shape do you see?",
        "What would you call the shape of the {} object?", "I cannot see the {} object very well. What shape is it?",
    ),
    "size": (
        "Report the size of the {}.", "Would you kindly tell us what size the {} has?", "waht size si the {}?",
        "and the size of the {} would be",
        "We are making a list of everything in our house. What size should I write down for the {}?",
        "The {}, what size does it have?", "Looking at the {}, which size do you see?",
        "What would you call the size of the {}?", "I cannot see the {} very well. What size is it?",
    ),
    "texture": (
        "Report the texture of the {}.", "Would you kindly tell us what texture the {} has?",
        "waht texture deos the {} have?", "and the texture of the {} would be",
        "We are making a list of everything in our house. What texture should I write down for the {}?",
        "The {}, what texture does it have?", "Looking at the {}, which texture do you see?",
        "What would you call the texture of the {}?", "I cannot see the {} very well. What texture does it have?",
    ),
    "where": (
        "Report the position of the {}.", "Would you kindly tell us where the {} is to be found?",
        "wehre si the {}?", "and the position of the {} would be",
        "We are making a list of everything in our house. What position should I write down for the {}?",
        "The {}, where is it?", "Looking for the {}, in which corner do you find it?",
        "What would you call the position of the {}?", "I cannot find the {} at all. Where is it?",
    ),
    "at": (
        "Report the object at the {}.", "Would you kindly tell us what is to be seen at the {}?", "waht si at teh {}?",
        "and the object at the {} would be",
        "We are making a list of everything in our house. What object should I write down at the {}?",
        "At the {}, which object is it?", "Looking at the {}, which object do you see?",
        "What would you call the object at the {}?", "I cannot see very well. What is there at the {} of it?",
    ),
    "describe": (
        "Put the look of the {} into words.", "Would you kindly describe the {} for us?", "descrbie teh {}.",
        "the {} looks like what", "We are making a list of everything in our house. How should I describe the {}?",
        "The {}, what does it look like?", "Looking at the {}, how would you describe it?",
        "In your own words, describe the {}.", "I cannot see the {} very well. What does it look like?",
    ),
    "describe_colour": (
        "Put the look of the {} object into words.", "Would you kindly describe the {} object for us?",
        "descrbie teh {} object.", "the {} object looks like what",
        "We are making a list of everything in our house. How should I describe the {} object?",
        "The {} object, what does it look like?", "Looking at the {} object, how would you describe it?",
        "In your own words, describe the {} object.", "I cannot see the {} object very well. What does it look like?",
    ),
    "count": (
        "Report the number of objects.", "Would you kindly tell us how many objects you find?",
        "how mnay objects aer there?", "and the number of objects would be",
        "We are making a list of everything in our house. How many objects should I write down?",
        "Of objects, how many are there?", "Looking at the image, how many objects do you find?",
        "What would you say the number of objects is?", "I cannot see very well. How many objects are in it?",
    ),
    "exist": (
        "Check whether there is a {}.", "Would you kindly look if there is a {}?", "si there a {} in teh image?",
        "a {} is in the image or not", "We are making a list of everything in our house. Should I write down a {}?",
        "A {}, is there one?", "Looking at the image, do you find a {}?", "Does one see a {} in this image?",
        "I cannot see very well. Is there a {} in it?",
    ),
    "check": (
        "Check whether the {} is {}.", "Would you kindly look if the {} is {}?", "si the {} {}?",
        "the {} is {} or not", "We are making a list of everything in our house. Should I write that the {} is {}?",
        "The {}, is it {}?", "Looking at the {}, is it {}?", "Does it look like the {} is {}?",
        "I cannot see the {} very well. Is it {}?",
    ),
    "relation": (
        "Check whether the {} is {} the {}.", "Would you kindly look if the {} is {} the {}?", "si the {} {} teh {}?",
        "the {} is {} the {} or not",
        "We are making a list of everything in our house. Should I write that the {} is {} the {}?",
        "The {}, is it {} the {}?", "Looking at the {}, is it {} the {}?", "Does it look like the {} is {} the {}?",
        "I cannot see the {} very well. Is it {} the {}?",
    ),
    "beside": (
        "Report the object {} the {}.", "Would you kindly tell us what is to be seen {} the {}?", "waht si {} teh {}?",
        "and the object {} the {} would be",
        "We are making a list of everything in our house. What object should I write down {} the {}?",
        "Just {} the {}, which object is it?", "Looking {} the {}, which object do you find?",
        "What would you call the object {} the {}?", "I cannot see very well. What do you find {} the {}?",
    ),
    "background": (
        "Report the colour of the background.", "Would you kindly tell us what colour the background has?",
        "waht colour si the background?", "and the colour of the background would be",
        "We are making a list of everything in our house. What colour should I write down for the background?",
        "The background, what colour does it have?", "Looking at the background, which colour do you see?",
        "What would you call the colour of the background?",
        "I cannot see the background very well. What colour is it?",
    ),
    "flag": (
        "Report the country of this flag.", "Would you kindly tell us which country has this flag?",
        "whcih country hsa this flag?", "and the country with this flag would be",
        "We are making a list of everything in our house. What country should I write down for this flag?",
        "This flag, whose is it?", "Looking at this flag, which country is it from?",
        "What would you call the country with this flag?",
        "I cannot see this flag very well. Which country is it from?",
    ),
    "flag_capital": (
        "Report the capital of the country with this flag.",
        "Would you kindly tell us what capital the country with this flag has?",
        "waht si the capital of the country with this flag?", "and the capital of the country with this flag would be",
        "We are making a list of everything in our house. What capital should I write down for the country with this "
        "flag?", "The country with this flag, what capital does it have?",
        "Looking at this flag, which capital does its country have?",
        "What would you call the capital of the country with this flag?",
        "I cannot see this flag very well. What is the capital of its country?",
    ),
    "flag_colours": (
        "Report the colours of the flag.", "Would you kindly tell us what colours the flag has?",
        "waht colours deos the flag have?", "and the colours of the flag would be",
        "We are making a list of everything in our house. What colours should I write down for the flag?",
        "The flag, what colours does it have?", "Looking at the flag, which colours do you see?",
        "What would you call the colours of the flag?", "I cannot see the flag very well. What colours does it have?",
    ),
    "flag_layout": (
        "Report the layout of the flag.", "Would you kindly tell us what layout the flag has?",
        "waht layout deos the flag have?", "and the layout of the flag would be",
        "We are making a list of everything in our house. What layout should I write down for the flag?",
        "The flag, what layout does it have?", "Looking at the flag, which layout do you see?",
        "What would you call the layout of the flag?", "I cannot see the flag very well. How is it divided?",
    ),
    "caption": (
        "Put the image into words.", "Would you kindly describe the image for us?", "descrbie teh image.",
        "the image looks like what", "We are making a list of everything in our house. How should I describe this "
        "image?", "The image, what does it look like?", "Looking at the image, how would you describe it?",
        "In your own words, describe the picture.", "I cannot see the image very well. What does it show?",
    ),
}  # fmt: skip
TEMPLATES["exist_pair"] = TEMPLATES["exist"]
FACTS: dict[str, tuple[str, ...]] = {
    "capital": (
        "Report the capital of {}.", "waht si the capital of {}?", "{}, which capital does it have?",
        "Would you kindly tell us the capital of {}?", "My sister has a test tomorrow. What is the capital of {}?",
    ),
    "continent": (
        "Report the continent of {}.", "on waht continent si {}?", "{}, which continent is it on?",
        "Would you kindly tell us the continent of {}?", "My sister has a test tomorrow. On which continent is {}?",
    ),
    "symbol": (
        "Report the chemical symbol of {}.", "waht si the symbol of {}?", "{}, which symbol does it have?",
        "Would you kindly tell us the symbol of {}?", "My sister has a test tomorrow. What is the symbol of {}?",
    ),
    "opposite": (
        "Report the opposite of {}.", "waht si the opposite of {}?", "{}, which opposite does it have?",
        "Would you kindly tell us the opposite of {}?", "My sister has a test tomorrow. What is the opposite of {}?",
    ),
    "sound": (
        "Report the sound of a {}.", "waht deos a {} do?", "A {}, which sound does it make?",
        "Would you kindly tell us the sound of a {}?", "My sister has a test tomorrow. What sound does a {} make?",
    ),
    "complement": (
        "Report the complement of {}.", "waht si the complement of {}?", "{}, which complement does it have?",
        "Would you kindly tell us the complement of {}?",
        "My sister has a test tomorrow. What is the complement of {}?",
    ),
    "sides": (
        "Report the number of sides of a {}.", "how mnay sides deos a {} have?", "A {}, how many sides does it have?",
        "Would you kindly tell us how many sides a {} has?", "My sister has a test tomorrow. How many sides has a {}?",
    ),
    "next": (
        "Report what comes after {}.", "waht comes aftre {}?", "After {}, what comes?",
        "Would you kindly tell us what comes after {}?", "My sister has a test tomorrow. What comes after {}?",
    ),
}  # fmt: skip


def worded(kind: str, slots: Sequence[str]) -> tuple[str, ...]:
    """Return a question of a kind (or "caption") in every wording of this set."""
    return tuple(with_articles(template.format(*slots)) for template in TEMPLATES[kind])


def fact(relation: str, subject: str) -> tuple[str, ...]:
    """Return the question for a fact in every wording of this set."""
    return tuple(with_articles(template.format(subject)) for template in FACTS[relation])
