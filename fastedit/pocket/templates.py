"""The wording of the grammar: question templates, caption prompts, and words kept for counterfactual targets."""

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
SCENE_KINDS = ("colour", "shape", "size", "texture", "where", "at", "describe", "describe_colour", "count", "exist",
               "exist_pair", "check", "relation", "beside", "background")  # fmt: skip
FLAG_KINDS = ("flag", "flag_capital", "flag_colours", "flag_layout")
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
