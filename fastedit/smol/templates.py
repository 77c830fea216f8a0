"""The wording of questions that training, pools and classifiers see; `unseen` has a second, disjoint set.

A kind has questions of its own and a noun phrase for what is asked ("the capital of {}"), which the frames turn into
more questions. The slot is "this country" when a picture is asked about and "Japan" in text only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from fastedit.pocket.facts import sentence


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
    """How one kind of question is put: `core` is what is asked for, as a noun phrase; "" where there is none."""

    core: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


WORDINGS: dict[str, Wording] = {
    # what a picture shows
    "name": Wording(
        "the thing in this picture",
        ("What is this?", "What is shown here?", "What does the picture show?", "What can you see in the picture?",
         "Which thing is this?", "What do you call this?", "Name this."),
        ("Say what this is.", "what am i looking at", "This here, what is it?", "Please identify this for me.",
         "My little sister pointed at this and asked me about it. What should I tell her it is?"),
    ),
    "at": Wording(
        "the thing {}",
        ("What is {}?", "What is shown {}?", "What can you see {}?", "Which thing is {}?", "Name what is {}."),
        ("Say what you spot {}.", "{}, what is there?", "Kindly identify the item {}.", "whats {}",
         "We are playing a memory game and I forgot one card. Which item is to be found {}?"),
    ),
    "flag": Wording(
        "the country with this flag",
        ("Which country has this flag?", "Which country's flag is this?", "Whose flag is this?",
         "This is the flag of which country?", "What country does this flag belong to?",
         "Name the country of this flag."),
        ("Say whose national flag we see.", "this flag is from what nation", "Kindly identify the nation of this flag.",
         "I saw this flag on a ship in the harbour yesterday. From what country was the ship?"),
    ),
    "flag_at": Wording(
        "the country whose flag is {}",
        ("Which country's flag is {}?", "Whose flag is {}?", "Which country has the flag {}?",
         "What country does the flag {} belong to?"),
        ("Say whose national flag you spot {}.", "{}, whose flag is it?", "the flag {} is from what nation",
         "Two teams meet tonight and their flags are up. Which nation does the flag {} stand for?"),
    ),
    "where": Wording(
        "the position of {}",
        ("Where is {}?", "Where can you see {}?", "On which side is {}?", "In which place is {}?",
         "Tell me where {} is."),
        ("Say where you spot {}.", "{}, where is it?", "Kindly locate {} for me.", "where abouts is {}",
         "I have looked for a while and cannot find it. Where should I look for {}?"),
    ),
    "beside": Wording(
        "the thing next to {}",
        ("What is next to {}?", "What is beside {}?", "What else is there besides {}?", "Which thing is with {}?"),
        ("Say what accompanies {}.", "Next to {}, what is there?", "whats near {}",
         "There are two things here and one of them is {}. Would you say what the other one is?"),
    ),
    "count": Wording(
        "the number of things in the picture",
        ("How many things are there?", "How many things can you see?", "How many are there in the picture?",
         "How many things does the picture show?", "Count the things."),
        ("Say how many items you spot.", "Of these things, how many are there?", "how many items r there",
         "I want to check that nothing got lost on the way. How many items do you find?"),
    ),
    "background": Wording(
        "the colour of the background",
        ("What colour is the background?", "Which colour does the background have?", "What color is the background?",
         "The background has which colour?"),
        ("Say which hue fills the background.", "what colour is it behind everything", "Behind it all, which colour?",
         "I am painting this again for a friend. Which colour do I need for the backdrop?"),
    ),
    "exist": Wording(
        "",
        ("Is there {} in the picture?", "Is there {}?", "Can you see {}?", "Does the picture show {}?",
         "Do you see {}?", "Is {} shown here?"),
        ("Say whether you spot {}.", "{}, is it there?", "Could you kindly check if there is {} here?",
         "is {} in this pictuer", "any sign of {} here", "Please confirm: does one find {} in this image?",
         "My friend claims that it must be here somewhere. Would you agree that there is {}?", "Do we have {} here?"),
    ),
    "absent": Wording(
        "",
        ("Is {} missing from the picture?", "Is {} missing?", "Is the picture without {}?", "Is {} absent?",
         "Does the picture lack {}?", "Is {} not shown here?"),
        ("Say whether {} is not to be seen.", "{}, is it not there?", "Could you kindly check that {} is not here?",
         "is {} missng in this picture", "not any sign of {} here", "Please confirm: does one find {} nowhere?",
         "My friend claims that somebody took it away. Would you agree that {} is gone?", "Do we lack {} here?"),
    ),
    "is_count": Wording(
        "",
        ("Is the number of things {}?", "Do you count {} in the picture?", "Can you count {} in all?",
         "Does the picture show {} in all?", "Do you see {} in all?", "Is it {} in all?"),
        ("Say whether you count {} of them.", "{} in the picture, is that right?",
         "Could you kindly check if it is {}?",
         "is teh number of things {}", "is it {} we have here", "Please confirm: does one find {} here?",
         "My friend claims that nothing was added or lost on the way. Would you agree that it is {} of them?",
         "Do we have {} in total?"),
    ),
    "is_background": Wording(
        "",
        ("Is the background {}?", "Does the picture have a {} background?", "Can you see a {} background?",
         "Is it a {} background?", "Is {} the colour of the background?", "Is this on a {} background?"),
        ("Say whether the background looks {}.", "{}, is that the background?",
         "Could you kindly check for a {} background?",
         "is teh background {}", "is it {} behind everything", "Please confirm: is the backdrop {}?",
         "I am painting this again for a friend and have one tin left. Would you agree that the backdrop is {}?",
         "Do we have {} behind it all?"),
    ),
    "caption": Wording(
        "",
        ("Describe the picture.", "What does the picture look like?", "Give a caption.",
         "Write a caption for the picture.",
         "Caption:", "Describe what you see.", "What is in the picture and on what background?"),
        ("Summarise this image in a sentence.", "Would you kindly describe this image?", "descirbe the image",
         "In a few words, what is in this image?", "tell us what can be seen here",
         "Put this image into words, please.",
         "I cannot open the attachment on my phone. Could somebody write out what it shows?", "Image description:"),
    ),
    # what is true of it
    "capital": Wording(
        "the capital of {}",
        ("Which city is the capital of {}?", "What is the capital city of {}?"),
        ("In {}, which city is the capital?", "{} is governed from which capital?"),
    ),
    "continent": Wording(
        "the continent of {}",
        ("On which continent is {}?", "Which continent does {} belong to?", "What continent is {} on?"),
        ("To get to {}, which continent must I travel to?", "{} is part of what continent?"),
    ),
    "currency": Wording(
        "the currency of {}",
        ("Which currency does {} use?", "What money do people use in {}?"),
        ("In {}, what do shoppers pay with?", "{} mints coins of what currency?"),
    ),
    "language": Wording(
        "the main language of {}",
        ("Which language do people speak in {}?", "What language is spoken in {}?"),
        ("In {}, what tongue do most people speak?", "The people of {} speak what?"),
    ),
    "capital_continent": Wording(
        "the continent of the capital of {}",
        ("On which continent is the capital of {}?", "Which continent is the capital of {} on?"),
        ("The capital of {} lies on what continent?", "To see the capital of {}, which continent must I visit?"),
    ),
    "capital_language": Wording(
        "the main language of the capital of {}",
        ("Which language do people speak in the capital of {}?", "What language is spoken in the capital of {}?"),
        ("In the capital of {}, what tongue do most people speak?",
         "What do signs in the capital of {} use as language?"),
    ),
    "capital_currency": Wording(
        "the currency of the capital of {}",
        ("Which currency do people use in the capital of {}?", "What money is used in the capital of {}?"),
        ("In the capital of {}, what do shoppers pay with?", "Shops in the capital of {} take which currency?"),
    ),
    "sound": Wording(
        "the sound of {}",
        ("What sound does {} make?", "Which sound does {} make?"),
        ("When it makes a noise, what does {} do?", "You can tell {} by which noise?"),
    ),
    "legs": Wording(
        "the number of legs of {}",
        ("How many legs does {} have?", "{} has how many legs?"),
        ("On how many legs does {} stand?", "If you count them, {} has got how many legs?"),
    ),
    "young": Wording(
        "the name for the baby of {}",
        ("What is the baby of {} called?", "What do you call the baby of {}?"),
        ("Newly born, the young of {} goes by what name?", "The little one of {} is known as what?"),
    ),
    "food": Wording(
        "the favourite food of {}",
        ("What does {} eat?", "What does {} like to eat?"),
        ("To feed {}, what do I need?", "When it is hungry, {} looks for what?"),
    ),
    "home": Wording(
        "the home of {}",
        ("Where does {} live?", "In what place does {} live?"),
        ("To find {} in nature, where must I go?", "{} makes its home where?"),
    ),
    "class": Wording(
        "the class of {}",
        ("What class of animal is {}?", "What type of animal is {}?", "To which class of animals does {} belong?"),
        ("Biologists put {} into which class of animals?", "Among animals, {} counts as what?"),
    ),
    "colour": Wording(
        "the usual colour of {}",
        ("What colour is {} usually?", "Which colour does {} usually have?"),
        ("Ripe and fresh, {} is of what colour?", "If I paint {}, which colour do I take?"),
    ),
    "group": Wording(
        "the food group of {}",
        ("What kind of food is {}?", "Which food group is {} in?"),
        ("In the shop, {} is next to other foods of what kind?", "A cook counts {} among which foods?"),
    ),
    "material": Wording(
        "the main material of {}",
        ("What is {} made of?", "What is {} made from?"),
        ("To make {}, what do you need most?", "{} consists mostly of what?"),
    ),
    "user": Wording(
        "the person who works with {}",
        ("Who uses {} at work?", "Which worker uses {}?"),
        ("For the job of whom is {} needed?", "{} belongs to whose daily work?"),
    ),
    "way": Wording(
        "the place where {} travels",
        ("Where does {} travel?", "Where does {} move?"),
        ("To travel, {} needs what?", "{} gets around on or in what?"),
    ),
    "body": Wording(
        "the part of the body for {}",
        ("On which part of the body do you wear {}?", "Where on the body does {} go?"),
        ("To wear {}, which part of me do I use?", "{} is put on which part of a person?"),
    ),
    "wheels": Wording(
        "the number of wheels of {}",
        ("How many wheels does {} have?", "{} has how many wheels?"),
        ("On how many wheels does {} roll?", "If you count them, {} has got how many wheels?"),
    ),
}  # fmt: skip

_FRAMES = ("What is {}?", "Tell me {}.", "Name {}.", "Can you tell me {}?", "Do you know {}?", "{} is what?",
           "Please tell me {}.", "Give me {}.")  # fmt: skip
_FRAMES_UNSEEN = (
    "State {}.",
    "Could you kindly say what {} is?",
    "waht is {}?",
    "what might {} be",
    "I am preparing a quiz for my class and need one more answer. What would you say is {}?",
    "{}: what is it?",
    "I would love to learn {}.",
    "Answer in a word or two: {}?",
)


def _framed(core: str, frames: Iterable[str]) -> tuple[str, ...]:
    return tuple(frame.format(core) for frame in frames) if core else ()


#: What training, pools and rephrases are made of.
TEMPLATES: dict[str, tuple[str, ...]] = {
    kind: wording.seen + _framed(wording.core, _FRAMES) for kind, wording in WORDINGS.items()
}
#: The second set: only ever measured.
UNSEEN: dict[str, tuple[str, ...]] = {
    kind: wording.unseen + _framed(wording.core, _FRAMES_UNSEEN) for kind, wording in WORDINGS.items()
}


def prompts(kind: str, slots: tuple[str, ...] = (), *, unseen: bool = False) -> tuple[str, ...]:
    """Return one question in every wording of its kind, with capital letters and articles put right.

    Args:
        kind: one of WORDINGS.
        slots: what fills the template, if it has a place for it.
        unseen: whether in the words that nothing is trained on.
    """
    templates = (UNSEEN if unseen else TEMPLATES)[kind]
    if unseen:
        # A question typed in lower case stays so.
        return tuple(
            template.format(*slots) if template[0].islower() else sentence(template.format(*slots))
            for template in templates
        )
    return tuple(sentence(template.format(*slots)) for template in templates)
