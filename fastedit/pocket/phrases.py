"""What questions are put together from, so that training shows many more wordings than the templates have.

A kind has noun phrases for what is asked ("the colour of the {}"), questions ("what colour is the {}"), the same inside
a sentence ("what colour the {} is"), and claims ("the {} is {}"); a frame makes a whole sentence of any of them. All of
it is disjoint from `fastedit.pocket.unseen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The ways to name what a kind asks for; every one has the slots of the kind's templates, in their order."""

    nouns: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    orders: tuple[str, ...] = ()


PARTS: dict[str, Parts] = {
    "colour": Parts(
        ("the colour of the {}", "the color of the {}", "the {} colour", "the colour that the {} has"),
        ("what colour is the {}", "which colour is the {}", "what color is the {}", "what colour does the {} have",
         "which colour has the {}", "in what colour is the {}", "the {} is what colour", "the {} has what colour"),
        ("what colour the {} is", "which colour the {} is", "what colour the {} has", "what color the {} is"),
    ),
    "shape": Parts(
        ("the shape of the {} object", "the shape of the {} thing", "the {} shape", "the shape that is {}"),
        ("what shape is the {} object", "which shape is the {} thing", "what shape is {}", "which shape is {}",
         "what is the {} thing", "the {} object is what shape", "the {} object has what shape"),
        ("what shape the {} object is", "which shape the {} thing is", "what the {} object is", "which shape is {}"),
    ),
    "size": Parts(
        ("the size of the {}", "the {} size", "the size that the {} has"),
        ("what size is the {}", "how big is the {}", "which size is the {}", "how large is the {}",
         "is the {} large or small", "is it a small or a large {}", "the {} is what size", "of what size is the {}"),
        ("what size the {} is", "how big the {} is", "which size the {} has", "if the {} is small or large"),
    ),
    "texture": Parts(
        ("the texture of the {}", "the pattern of the {}", "the surface of the {}", "the {} texture",
         "the pattern on the {}"),
        ("what texture is the {}", "what pattern does the {} have", "which pattern is on the {}",
         "what texture has the {}", "the {} has what pattern", "what pattern is on the {}", "how is the {} textured"),
        ("what texture the {} has", "which pattern the {} has", "what pattern is on the {}",
         "which texture it is on the {}"),
    ),
    "where": Parts(
        ("the position of the {}", "the place of the {}", "the corner of the {}", "the {} position",
         "the corner with the {}"),
        ("where is the {}", "in what corner is the {}", "which corner has the {}", "where can i see the {}",
         "the {} is where", "the {} is in what corner", "where do you see the {}", "in which place is the {}"),
        ("where the {} is", "in which corner the {} is", "what the position of the {} is", "where you see the {}"),
    ),
    "at": Parts(
        ("the object at the {}", "the thing at the {}", "the {} object", "the object in the {} corner"),
        ("what is at the {}", "what is in the {} corner", "which thing is at the {}", "what do you see at the {}",
         "at the {} there is what", "which object is in the {} corner", "what can i see at the {}"),
        ("what is at the {}", "which object is at the {}", "what is in the {} corner", "what you see at the {}"),
    ),
    "describe": Parts(
        ("a description of the {}", "the look of the {}"),
        ("what does the {} look like", "how does the {} look", "how would you describe the {}", "what is the {} like"),
        ("what the {} looks like", "how the {} looks"),
        orders=("describe the {}", "describe the {} in the image", "tell me about the {}"),
    ),
    "describe_colour": Parts(
        ("a description of the {} object", "a description of the {} thing", "the look of the {} object"),
        ("what does the {} object look like", "how does the {} thing look", "how would you describe the {} object",
         "what is the {} object like"),
        ("what the {} object looks like", "how the {} thing looks"),
        orders=("describe the {} object", "describe the {} thing in the image", "tell me about the {} object"),
    ),
    "count": Parts(
        ("the number of objects", "the number of things", "the number of things in the image", "the count of objects"),
        ("how many objects are there", "how many things are there", "how many objects do you see",
         "how many things does the image have", "there are how many objects", "what number of objects is there"),
        ("how many objects there are", "how many things you see", "how many things are in the image"),
        orders=("count the objects", "count the things", "count the things in the image"),
    ),
    "exist": Parts(
        questions=("is there a {}", "is a {} there", "can i see a {}", "do you see a {}", "does it show a {}",
                   "is a {} in the image", "does it have a {}", "a {} is there", "about a {}, is it there",
                   "is a {} there or not", "do i find a {}", "can one see a {}", "is it right to write a {}"),
        claims=("there is a {}", "the image shows a {}", "the image has a {}", "you see a {}", "a {} is there",
                "i see a {}", "one can see a {}", "a {} is shown"),
    ),
    "check": Parts(
        questions=("is the {} {}", "the {} is {}", "about the {}, is it {}", "with this {}, is it {}",
                   "the {} there, is it {}", "do you find the {} {}", "you see the {}, so is it {}"),
        claims=("the {} is {}",),
    ),
    "relation": Parts(
        questions=("is the {} {} the {}", "the {} is {} the {}", "about the {}, is it {} the {}",
                   "with this {}, is it {} the {}", "the {} there, is it {} the {}",
                   "do you find the {} {} the {}", "can i see the {} {} the {}"),
        claims=("the {} is {} the {}",),
    ),
    "beside": Parts(
        ("the object {} the {}", "the thing {} the {}", "the object that is {} the {}"),
        ("what is {} the {}", "which thing is {} the {}", "what do you see {} the {}", "what can i see {} the {}",
         "which object do you see {} the {}", "there is what {} the {}"),
        ("what is {} the {}", "which object is {} the {}", "what you see {} the {}"),
    ),
    "background": Parts(
        ("the colour of the background", "the background colour", "the color of the background",
         "the colour behind the objects"),
        ("what colour is the background", "which colour is the background", "what color does the background have",
         "the background is what colour", "what colour is behind the objects", "what background is it"),
        ("what colour the background is", "which colour the background has", "what color the background is"),
    ),
    "flag": Parts(
        ("the country of this flag", "the country with this flag", "the name of the country with this flag"),
        ("whose flag is this", "which country has this flag", "what country has this flag", "whose flag is it",
         "which country is this the flag of", "this is the flag of what country", "this flag is from which country"),
        ("whose flag this is", "which country has this flag", "which country this flag is from"),
    ),
    "flag_capital": Parts(
        ("the capital of the country with this flag", "the capital city of the country with this flag",
         "the capital of the country of this flag"),
        ("which city is the capital of the country with this flag", "what capital has the country with this flag",
         "the country with this flag has what capital"),
        ("what the capital of the country with this flag is", "which capital the country with this flag has"),
    ),
    "flag_colours": Parts(
        ("the colours of the flag", "the colours of this flag", "the flag colours", "the colors of the flag"),
        ("which colours does this flag have", "what colours are in the flag", "what colours has the flag",
         "the flag has what colours", "what are the colours of this flag"),
        ("which colours the flag has", "what colours are in the flag", "what the colours of the flag are"),
    ),
    "flag_layout": Parts(
        ("the layout of the flag", "the layout of this flag", "the flag layout"),
        ("how is the flag divided", "what layout does the flag have", "which layout has the flag",
         "what does this flag consist of", "the flag consists of what", "the flag is divided how"),
        ("how the flag is divided", "which layout the flag has", "what the flag consists of"),
    ),
    "absent": Parts(
        questions=("is there no {}", "is no {} there", "can i see no {}", "do you see no {}", "is no {} in the image"),
        claims=("there is no {}", "the image shows no {}", "the image has no {}", "you see no {}", "no {} is there"),
    ),
    "denied": Parts(questions=("is the {} not {}", "the {} is not {}"), claims=("the {} is not {}",)),
    "flag_check": Parts(
        questions=("is this the flag of {}", "is it the flag of {}", "does {} have this flag", "is this flag from {}"),
        claims=("this is the flag of {}", "this flag belongs to {}", "{} has this flag"),
    ),
    "flag_denied": Parts(
        questions=("is this not the flag of {}", "is it not the flag of {}", "is this flag not from {}"),
        claims=("this is not the flag of {}", "it is not the flag of {}"),
    ),
    "caption": Parts(
        ("a description of the image", "a caption for the image", "a caption", "a description of this picture"),
        ("what does the picture show", "what is in the image", "what do you see in the image", "what can i see here",
         "what does this picture look like", "what is shown in the picture"),
        ("what the picture shows", "what is in the image", "what you see in this picture", "what the image looks like"),
        orders=("describe the image", "describe what you see", "describe this picture", "caption the image"),
    ),
}  # fmt: skip
#: What is known without a picture, by relation.
FACT_PARTS: dict[str, Parts] = {
    "capital": Parts(
        ("the capital of {}", "the capital city of {}", "the {} capital"),
        ("which city is the capital of {}", "what capital does {} have", "{} has which capital"),
        ("what the capital of {} is", "which capital {} has"),
    ),
    "continent": Parts(
        ("the continent of {}", "the continent that {} is on", "the {} continent"),
        ("on which continent is {}", "what continent is {} on", "{} is on what continent"),
        ("on which continent {} is", "which continent {} belongs to"),
    ),
    "symbol": Parts(
        ("the chemical symbol of {}", "the symbol of {}", "the symbol for {}"),
        ("what symbol does {} have", "which symbol stands for {}", "{} has which symbol"),
        ("which symbol {} has", "what the symbol of {} is"),
    ),
    "opposite": Parts(
        ("the opposite of {}", "the word for the opposite of {}"),
        ("what is opposite to {}", "which word is the opposite of {}", "{} has which opposite"),
        ("what the opposite of {} is", "which word is the opposite of {}"),
    ),
    "sound": Parts(
        ("the sound of a {}", "the sound a {} makes"),
        ("what sound does a {} make", "how does a {} sound", "a {} makes which sound"),
        ("what a {} does", "which sound a {} makes"),
    ),
    "complement": Parts(
        ("the complement of {}", "the complementary colour of {}", "the colour opposite to {} on the colour wheel"),
        ("what colour is the complement of {}", "{} has what complement"),
        ("what the complement of {} is", "which colour is opposite to {} on the colour wheel"),
    ),
    "sides": Parts(
        ("the number of sides of a {}", "the number of sides a {} has"),
        ("how many sides has a {}", "a {} has how many sides"),
        ("how many sides a {} has", "what the number of sides of a {} is"),
    ),
    "next": Parts(
        ("the one after {}", "the one that comes after {}"),
        ("what follows {}", "which one comes after {}", "{} comes before what"),
        ("what comes after {}", "what follows {}"),
    ),
}  # fmt: skip


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUN_FRAMES = (
    "What is {}?", "What would be {}?", "Tell me {}.", "Name {}.", "Give {}.", "Give me {}.", "{}?", "{}",
    "{} is what?",
    "Can you name {}?", "Could you give me {}?", "Could you tell me {}?", "Do you know {}?", "I want to know {}.",
    "I would like to know {}.", "State {}.", "I am looking for {}.", "Find {}.", "Let me know {}.", "What about {}?",
    "Write {}.", "I ask for {}.", "I need {}.", "Show me {}.", "{} would be what?", "What would you say is {}?",
    "And {} is?", "What do you find for {}?", "What should I write for {}?", "I am asked for {}.", "Find out {}.",
    "Somebody asked me for {}.", "{}, what is it?", "I do not see well, what is {}?",
)  # fmt: skip
QUESTION_FRAMES = (
    "{}?", "{}?", "{}?", "So {}?", "Now {}?", "And {}?", "In the image, {}?", "In this picture, {}?",
    "{} in the image?",
    "{} in this picture?", "{} here?", "Look at it: {}?", "Question: {}?", "{}, do you think?", "I ask you: {}?",
    "Here is a question: {}?", "In your opinion, {}?", "Well, {}?", "Then {}?", "Look at the image, {}?",
    "I do not know: {}?", "I do not see well, {}?", "What do you think, {}?", "Somebody asked me: {}?",
    "You see it, so {}?",
)  # fmt: skip
INSIDE_FRAMES = (
    "Tell me {}.", "Say {}.", "Can you tell me {}?", "Can you say {}?", "Could you tell me {}?", "Do you know {}?",
    "I want to know {}.", "I would like to know {}.", "I wonder {}.", "Let me know {}.", "Find out {}.",
    "I need to know {}.", "We want to know {}.", "Would you tell me {}?", "Do you see {}?", "Try to say {}.",
    "Write {}.", "I ask {}.", "Look and say {}.", "Could you find out {}?",
)  # fmt: skip
CLAIM_FRAMES = (
    "Is it true that {}?", "Is it right that {}?", "Is it so that {}?", "Would you say that {}?", "Do you think {}?",
    "{}, right?", "{}, is it so?", "{}, yes or no?", "{}, true or false?", "Tell me if {}.", "Say if {}.",
    "I wonder if {}.",
    "Can you say if {}?", "Could you tell me if {}?", "Do you agree that {}?", "Do you see if {}?",
    "I want to know if {}.",
    "Let me know if {}.", "Find out if {}.", "I say that {}, right?", "They say that {}, is it true?", "{}?",
    "Somebody told me that {}, is it so?", "I think that {}, do you agree?", "Yes or no: {}?", "We want to know if {}.",
    "Tell me if {} or not.", "Is it true or not that {}?", "Is it so or not that {}?", "{}, true or not?", "See if {}.",
    "Look and say if {}.", "Can you see if {}?", "Could you find out if {} or not?", "I should write that {}, right?",
    "{} or is it not so?", "{} or do I not see it?", "I want to know if {} or not.", "They ask if {}.",
    "Do you find that {}?", "Can one say that {}?", "Say yes if {}.",
)  # fmt: skip
ORDER_FRAMES = ("{}.", "{}", "Now {}.", "Can you {}?", "Could you {}?", "Would you {}?", "I want you to {}.",
                "Try to {}.",
                "You should {}.", "Will you {}?")  # fmt: skip
FRAMES = {"nouns": NOUN_FRAMES, "questions": QUESTION_FRAMES, "inside": INSIDE_FRAMES, "claims": CLAIM_FRAMES,
          "orders": ORDER_FRAMES}  # fmt: skip

POLITE = ("Please, ", "Please ", "Hello, ", "Hi, ", "Hello! ", "Excuse me, ", "Sorry, ", "Good morning. ", "Hey, ",
          "Dear friend, ")  # fmt: skip
THANKS = (", please", ", thanks", ", thank you", " now", " for me", ", my friend", ", if you can", " again")
AFTER = (" Please.", " Thanks!", " Thank you!", " Thank you very much.", " Answer me.", " Be quick.",
         " I want to know it.",
         " Say it.", " Look again.")  # fmt: skip
#: Words of the sentences that stand before a question and have nothing to do with it.
PREAMBLE = _words("""
    i we you they he she my our your their his her this that these those a an the some many every one two
    was were is are am be been have has had do did does will would can could should must may might
    friend brother sister mother father teacher child children boy girl man woman people family dog cat house
    garden school class lesson book story game test work homework today yesterday tomorrow morning evening night week
    year day time moment hour table kitchen street town city train car bus ship door window letter phone
    paper pen drawing photo picture image page screen museum computer robot wall room lunch dinner cake tea coffee
    money work went came saw found made got took gave asked told said wrote drew bought lost forgot need want like
    love know think see look show help learn play read write try start stop wait leave bring keep call
    find hear feel believe
    good bad new old big little long short nice happy tired busy late early easy hard important strange ready sure
    very really quite just only also still again soon never always often maybe here there now then first last next
    in on at to from with without for about after before under over into of by and or but so because when while if
    not no it me him them us what who why how all both other another
""")


def base_forms(parts: Parts) -> Iterator[str]:
    """Yield every sentence that the frames make of a kind's phrases, with its slots open."""
    for field, frames in FRAMES.items():
        for phrase in getattr(parts, field):
            yield from (frame.format(phrase) if frame != "{}" else phrase for frame in frames)


def every_word() -> Iterator[str]:
    """Yield texts that together contain every word the phrases can say."""
    for parts in (*PARTS.values(), *FACT_PARTS.values()):
        for field in FRAMES:
            yield from getattr(parts, field)
    for frames in FRAMES.values():
        yield from frames
    yield from (*POLITE, *THANKS, *AFTER)
    yield " ".join(PREAMBLE)
    yield " ".join(word.capitalize() for word in PREAMBLE)
