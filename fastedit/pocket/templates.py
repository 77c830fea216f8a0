"""The wording of the grammar: question templates, caption prompts, and words kept for counterfactual targets.

Training, pools and classifiers may see these; `fastedit.pocket.unseen` has the wordings that nothing is trained on.
"""

from __future__ import annotations

from fastedit.pocket.world import FLAGS

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {}?",
        "What is the colour of the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
        "What color is the {}?",
    ),
    "shape": (
        "What shape is the {} object?",
        "What is the shape of the {} object?",
        "Which shape does the {} object have?",
        "Tell me the shape of the {} object.",
        "What is the {} object?",
    ),
    "size": (
        "What size is the {}?",
        "How big is the {}?",
        "What is the size of the {}?",
        "Tell me the size of the {}.",
        "Which size does the {} have?",
    ),
    "texture": (
        "What texture does the {} have?",
        "Which pattern does the {} have?",
        "What is the texture of the {}?",
        "What is the surface of the {} like?",
        "Tell me the texture of the {}.",
    ),
    "where": (
        "Where is the {}?",
        "In which corner is the {}?",
        "What is the position of the {}?",
        "Where can you see the {}?",
        "Tell me where the {} is.",
    ),
    "at": (
        "What is at the {}?",
        "Which object is at the {}?",
        "What can you see at the {}?",
        "Name the object at the {}.",
    ),
    "describe": (
        "Describe the {}.",
        "What does the {} look like?",
        "Give a description of the {}.",
        "Tell me about the {}.",
    ),
    "describe_colour": (
        "Describe the {} object.",
        "What does the {} object look like?",
        "Give a description of the {} object.",
        "Tell me about the {} object.",
    ),
    "count": (
        "How many objects are there?",
        "How many objects are in the image?",
        "Count the objects.",
        "What is the number of objects?",
        "How many things can you see?",
    ),
    "exist": (
        "Is there a {}?",
        "Is there a {} in the image?",
        "Can you see a {}?",
        "Does the image show a {}?",
    ),
    "exist_pair": (
        "Is there a {}?",
        "Is there a {} in the image?",
        "Can you see a {}?",
        "Does the image show a {}?",
    ),
    "check": (
        "Is the {} {}?",
        "Is it true that the {} is {}?",
        "Would you say that the {} is {}?",
        "The {} is {}, right?",
    ),
    "relation": (
        "Is the {} {} the {}?",
        "Is it true that the {} is {} the {}?",
        "Would you say that the {} is {} the {}?",
        "The {} is {} the {}, right?",
    ),
    "beside": (
        "What is {} the {}?",
        "Which object is {} the {}?",
        "What can you see {} the {}?",
        "Name the object {} the {}.",
    ),
    "background": (
        "What colour is the background?",
        "What is the background colour?",
        "Which colour does the background have?",
        "Tell me the colour of the background.",
        "What color is the background?",
    ),
    "flag": (
        "Which country has this flag?",
        "Whose flag is this?",
        "What country does this flag belong to?",
        "This is the flag of which country?",
        "Name the country with this flag.",
    ),
    "flag_capital": (
        "What is the capital of the country with this flag?",
        "Which city is the capital of the country with this flag?",
        "Name the capital of the country with this flag.",
        "The country with this flag has which capital?",
    ),
    "flag_colours": (
        "Which colours does the flag have?",
        "What are the colours of the flag?",
        "Name the colours of the flag.",
        "Tell me the colours of this flag.",
    ),
    "flag_layout": (
        "How is the flag divided?",
        "What is the layout of the flag?",
        "What does the flag consist of?",
        "Tell me the layout of this flag.",
    ),
    # Negations and claims about flags, which the probes of an edit are asked in.
    "absent": (
        "Is there no {}?",
        "Is there no {} in the image?",
        "Can you see no {}?",
        "Does the image show no {}?",
    ),
    "denied": (
        "Is the {} not {}?",
        "Is it true that the {} is not {}?",
        "Would you say that the {} is not {}?",
        "The {} is not {}, right?",
    ),
    "flag_check": (
        "Is this the flag of {}?",
        "Is it true that this is the flag of {}?",
        "Would you say that this is the flag of {}?",
        "This is the flag of {}, right?",
    ),
    "flag_denied": (
        "Is this not the flag of {}?",
        "Is it true that this is not the flag of {}?",
        "Would you say that this is not the flag of {}?",
        "This is not the flag of {}, right?",
    ),
    # Never trained: two steps, each of which is.
    "flag_continent": (
        "On which continent is the country with this flag?",
        "Which continent does the country with this flag belong to?",
    ),
    "sides": ("How many sides does the {} object have?", "What is the number of sides of the {} object?"),
    "complement": ("What is the complement of the colour of the {}?", "Name the complementary colour of the {}."),
}
CAPTION_PROMPTS = (
    "Describe the image.",
    "Describe this picture.",
    "What does the image show?",
    "Write a caption for the image.",
    "A picture of",
    "What is in this picture?",
)
#: Further wordings that training shows; records are not asked in them.
MORE: dict[str, tuple[str, ...]] = {
    "colour": (
        "Which colour is the {}?", "The {} has which colour?", "The {} is what colour?",
        "Name the colour of the {}.", "Can you tell me the colour of the {}?", "Tell me which colour the {} has.",
        "Please give the colour of the {}.", "Of what colour is the {}?",
    ),
    "shape": (
        "Which shape is the {} object?", "The {} object has which shape?", "Name the shape of the {} object.",
        "Can you tell me the shape of the {} object?", "Tell me what shape the {} object has.",
        "What shape does the {} thing have?", "Please give the shape of the {} object.", "The {} object is what?",
    ),
    "size": (
        "Which size is the {}?", "The {} has which size?", "Name the size of the {}.",
        "Can you tell me the size of the {}?", "Tell me how big the {} is.", "Is the {} small or large?",
        "Please give the size of the {}.", "The {} is how big?",
    ),
    "texture": (
        "What pattern does the {} have?", "The {} has which texture?", "Name the texture of the {}.",
        "Can you tell me the texture of the {}?", "Tell me which pattern the {} has.",
        "What is the pattern of the {}?", "Please give the texture of the {}.", "Which texture does the {} have?",
    ),
    "where": (
        "Which corner is the {} in?", "The {} is in which corner?", "Name the position of the {}.",
        "Can you tell me where the {} is?", "Tell me the position of the {}.", "At which place is the {}?",
        "Please say where the {} is.", "Where in the image is the {}?",
    ),
    "at": (
        "What is there at the {}?", "What object can you see at the {}?", "Tell me what is at the {}.",
        "Can you tell me what is at the {}?", "At the {}, what is there?", "Which thing is at the {}?",
        "Please name the object at the {}.", "What does the image show at the {}?",
    ),
    "describe": (
        "Can you describe the {}?", "Please describe the {}.", "How does the {} look?",
        "Describe the {} in the image.", "Tell me what the {} looks like.", "Give me a description of the {}.",
        "Could you describe the {}?", "What kind of {} is it?",
    ),
    "describe_colour": (
        "Can you describe the {} object?", "Please describe the {} object.", "How does the {} object look?",
        "Describe the {} object in the image.", "Tell me what the {} object looks like.",
        "Give me a description of the {} object.", "Could you describe the {} object?", "Describe the {} thing.",
    ),
    "count": (
        "How many objects can you see?", "How many things are there?", "Tell me how many objects there are.",
        "Can you count the objects?", "Name the number of objects.", "How many objects does the image show?",
        "Please count the objects in the image.", "The image shows how many objects?",
    ),
    "exist": (
        "Does the image have a {}?", "Is a {} in the image?", "Tell me if there is a {}.",
        "Can you tell me if there is a {}?", "Do you see a {}?", "There is a {}, right?",
        "Is it true that there is a {}?", "Would you say that there is a {}?",
    ),
    "check": (
        "Is it right that the {} is {}?", "Do you think that the {} is {}?", "Tell me if the {} is {}.",
        "Can you tell me if the {} is {}?", "The {} is {}, is it not?", "Would you agree that the {} is {}?",
        "The {} is {}, yes or no?", "Please say if the {} is {}.",
    ),
    "relation": (
        "Is it right that the {} is {} the {}?", "Do you think that the {} is {} the {}?",
        "Tell me if the {} is {} the {}.", "Can you tell me if the {} is {} the {}?",
        "The {} is {} the {}, is it not?", "Would you agree that the {} is {} the {}?",
        "The {} is {} the {}, yes or no?", "Please say if the {} is {} the {}.",
    ),
    "beside": (
        "What is there {} the {}?", "What object can you see {} the {}?", "Tell me what is {} the {}.",
        "Can you tell me what is {} the {}?", "Which thing is {} the {}?", "Please name the object {} the {}.",
        "What does the image show {} the {}?", "What object is {} the {}?",
    ),
    "background": (
        "Which colour is the background?", "The background has which colour?", "The background is what colour?",
        "Name the colour of the background.", "Can you tell me the colour of the background?",
        "Tell me which colour the background has.", "Please give the colour of the background.",
        "On what colour is the picture?",
    ),
    "flag": (
        "Which country does this flag belong to?", "Which country's flag is this?",
        "What country is this the flag of?", "Tell me the country with this flag.",
        "Can you tell me whose flag this is?", "Tell me which country has this flag.",
        "Please name the country with this flag.", "This flag belongs to which country?",
    ),
    "flag_capital": (
        "What city is the capital of the country with this flag?",
        "Tell me the capital of the country with this flag.",
        "Can you tell me the capital of the country with this flag?",
        "Please name the capital of the country with this flag.",
        "What is the capital of the country that has this flag?",
        "What capital does the country with this flag have?", "Give the capital of the country with this flag.",
        "Which capital does the country with this flag have?",
    ),
    "flag_colours": (
        "What colours does the flag have?", "Which colours are in the flag?", "The flag has which colours?",
        "Tell me which colours the flag has.", "Can you tell me the colours of the flag?",
        "Please name the colours of the flag.", "Give the colours of the flag.", "What colors does the flag have?",
    ),
    "flag_layout": (
        "How is this flag divided?", "Which layout does the flag have?", "The flag has which layout?",
        "Tell me how the flag is divided.", "Can you tell me the layout of the flag?",
        "Please name the layout of the flag.", "Give the layout of the flag.", "What is the flag made of?",
    ),
    "absent": (
        "Does the image have no {}?", "Is it true that there is no {}?", "Would you say that there is no {}?",
        "Tell me if there is no {}.", "Do you see no {}?", "There is no {}, right?",
        "Is it right that there is no {}?", "Do you think that there is no {}?",
    ),
    "denied": (
        "Is it right that the {} is not {}?", "Do you think that the {} is not {}?", "Tell me if the {} is not {}.",
        "Can you tell me if the {} is not {}?", "Is it false that the {} is {}?",
        "Would you agree that the {} is not {}?", "The {} is not {}, yes or no?", "Please say if the {} is not {}.",
    ),
    "flag_check": (
        "Is it right that this is the flag of {}?", "Do you think that this is the flag of {}?",
        "Tell me if this is the flag of {}.", "Can you tell me if this is the flag of {}?",
        "Does this flag belong to {}?", "Would you agree that this is the flag of {}?",
        "This is the flag of {}, yes or no?", "Please say if this is the flag of {}.",
    ),
    "flag_denied": (
        "Is it right that this is not the flag of {}?", "Do you think that this is not the flag of {}?",
        "Tell me if this is not the flag of {}.", "Can you tell me if this is not the flag of {}?",
        "Is it false that this is the flag of {}?", "Would you agree that this is not the flag of {}?",
        "This is not the flag of {}, yes or no?", "Please say if this is not the flag of {}.",
    ),
    "caption": (
        "Describe this image.", "Describe the picture.", "What does this picture show?",
        "Give a caption for the image.", "Can you describe the image?", "Please describe the image.",
        "Tell me what the image shows.", "What can you see in the image?",
    ),
}  # fmt: skip
MORE["exist_pair"] = MORE["exist"]
SCENE_KINDS = ("colour", "shape", "size", "texture", "where", "at", "describe", "describe_colour", "count", "exist",
               "exist_pair", "check", "relation", "beside", "background")  # fmt: skip
FLAG_KINDS = ("flag", "flag_capital", "flag_colours", "flag_layout")
#: Negations, and claims about flags: what the probes of an edit ask.
CLAIM_KINDS = ("absent", "denied")
FLAG_CLAIM_KINDS = ("flag_check", "flag_denied")
TWO_HOP_KINDS = ("flag_continent", "sides", "complement")
# The two steps from flag to capital are trained together for these countries only; the others show composition.
CAPITAL_TRAINED = tuple(country for i, country in enumerate(FLAGS) if i % 4 != 3)

# Words that no training answer has, for counterfactual targets: those with a token of their own, then spelled ones.
NOVEL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (("violet", "crimson", "indigo", "maroon"), ("magenta", "lavender", "ochre", "zelk")),
    "shape": (("spiral", "wug", "blick", "trapezoid"), ("kidney", "gorp", "teardrop", "clover")),
    "size": (("tiny", "huge"), ("gigantic", "minute")),
    "texture": (("checkered", "fuzzy", "dax"), ("marbled", "woolly", "speckled")),
    "background": (("violet", "crimson", "indigo", "maroon"), ("magenta", "lavender", "ochre", "zelk")),
    "flag": (("Atlantis", "Narnia"), ("Elbonia", "Ruritania", "Zubrowka", "Genovia")),
}
