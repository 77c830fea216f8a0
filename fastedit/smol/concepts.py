"""What the pictures show: about 400 plainly nameable icons by kind, and the flags of the best known countries.

An icon is found by its Unicode name ("ear of maize"), and called by a short natural one ("corn"). Icons that could be
taken for one another at 64 pixels (bank and museum, rat and mouse) are represented by one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

from fastedit.pocket.facts import sentence
from fastedit.smol.countries import FLAG_COUNTRIES

FLAG = "flag"

# "unicode name" or "unicode name = short name"; plural or uncountable names end in "*".
_ICONS = {
    "animal": """dog, cat, cow, horse, sheep, goat, pig, rooster, chicken = hen, duck, turkey, rabbit, mouse,
        hedgehog, tiger, leopard, lion face = lion, elephant, giraffe face = giraffe, zebra face = zebra,
        hippopotamus, rhinoceros, kangaroo, koala, panda face = panda, bear face = bear, wolf face = wolf, fox face =
        fox, raccoon, skunk, otter, beaver, sloth, bison, mammoth, llama, dromedary camel = camel, deer, gorilla,
        monkey, orangutan, bat, chipmunk = squirrel, eagle, owl, parrot, peacock, flamingo, swan, penguin, dove of
        peace = dove, baby chick = chick, turtle, snake, lizard, crocodile, frog face = frog, dragon, t-rex =
        dinosaur, fish, blowfish = pufferfish, shark, whale, dolphin, seal, octopus, squid, crab, lobster, shrimp,
        oyster, snail, butterfly, honeybee = bee, ant, lady beetle = ladybug, cricket, mosquito, fly, worm, spider,
        scorpion, unicorn face = unicorn, bug = caterpillar""",
    "food": """banana, red apple = apple, pear, peach, lemon, tangerine = orange, pineapple, mango, watermelon, melon,
        grapes*, cherries*, strawberry, blueberries*, kiwifruit = kiwi, coconut, avocado, tomato, aubergine =
        eggplant, carrot, ear of maize = corn*, hot pepper = chili pepper, bell pepper, cucumber, leafy green =
        lettuce, broccoli*, garlic*, onion, potato, peanuts*, olive, mushroom, bread*, croissant, baguette bread =
        baguette, pretzel, bagel, pancakes*, cheese wedge = cheese*, butter*, egg, bacon*, hamburger, french fries*,
        slice of pizza = pizza, hot dog, sandwich, taco, burrito, popcorn*, salt shaker, spaghetti*, sushi*, soft ice
        cream = ice cream*, doughnut = donut, cookie, birthday cake, cupcake, pie, shortcake = cake, chocolate bar =
        chocolate*, candy, lollipop, honey pot = honey*, glass of milk = milk*, hot beverage = coffee*, teapot, beer
        mug = beer*, wine glass = wine*, green salad = salad, baby bottle""",
    "plant": """tulip, rose, sunflower, cherry blossom, four leaf clover = clover, maple leaf, cactus, evergreen tree
        = pine tree, deciduous tree = tree, palm tree, potted plant, ear of rice = wheat*, christmas tree, wood =
        log""",
    "clothing": """t-shirt, jeans*, dress, necktie = tie, coat, scarf, gloves*, socks*, shorts*, bikini, kimono,
        high-heeled shoe = high heel, womans boots = boot, womans sandal = sandal, athletic shoe = sneaker, top hat,
        billed cap = cap, womans hat = hat, crown, eyeglasses = glasses*, dark sunglasses = sunglasses*, handbag,
        school satchel = backpack, ring, watch, graduation cap, lipstick""",
    "tool": """hammer, wrench, screwdriver, axe, carpentry saw = saw, pick = pickaxe, ladder, toolbox, magnet, bucket,
        broom, black scissors = scissors*, paperclip, safety pin, sewing needle, spool of thread = thread*, ball of
        yarn = yarn*, chains = chain, gear, sponge, bar of soap = soap*, toothbrush, razor, key, lock, electric torch
        = flashlight, candle, fire extinguisher, straight ruler = ruler, pencil, lower left paintbrush = paintbrush,
        lower left crayon = crayon, pushpin, microscope, telescope, stethoscope, syringe, pill, adhesive bandage =
        bandage, thermometer, compass, hocho = knife, spoon, fork and knife with plate = plate, chopsticks*,
        left-pointing magnifying glass = magnifying glass, shield, crossed swords = swords*, bow and arrow, bomb,
        boomerang, anchor, umbrella""",
    "object": """chair, bed, couch and lamp = couch, door, window, mirror, toilet, bathtub, shower, basket, jar,
        amphora = vase, teddy bear, balloon, kite, yo-yo, wrapped present = gift, game die = dice, jigsaw puzzle piece
        = puzzle piece, magic wand, crystal ball, alarm clock, hourglass, television, radio, camera, mobile phone,
        telephone receiver = telephone, personal computer = laptop, keyboard, three button mouse = computer mouse,
        printer, battery, electric plug = plug, electric light bulb = light bulb, books*, open book = book, newspaper,
        scroll, envelope, package = box, calendar, coin, gem stone = diamond, bell, trophy, military medal = medal,
        postbox = mailbox, shopping trolley = shopping cart, wastebasket = trash can, luggage = suitcase, rock,
        feather, bone, tooth, brain, eye, ear, nose, anatomical heart = heart, lungs*, skull, jack-o-lantern =
        pumpkin, snowman, ghost, robot face = robot, extraterrestrial alien = alien, artist palette = palette,
        microphone, headphone = headphones*, horizontal traffic light = traffic light, fuel pump = gas pump, spider
        web, ring buoy = life preserver, parachute""",
    "instrument": """guitar, violin, trumpet, saxophone, musical keyboard = piano, drum with drumsticks = drum, banjo,
        accordion""",
    "sport": """soccer ball, basketball and hoop = basketball, american football = football, baseball, volleyball,
        tennis racquet and ball = tennis ball, billiards = billiard ball, cricket bat and ball = cricket bat, table
        tennis paddle and ball = ping pong paddle, boxing glove, ice skate, sled, skateboard, roller skate, direct hit
        = target, fishing pole and fish = fishing rod""",
    "vehicle": """automobile = car, taxi, bus, police car, ambulance, fire engine = fire truck, delivery truck = van,
        racing car = race car, tractor, racing motorcycle = motorcycle, motor scooter = scooter, bicycle, pickup
        truck, airplane, helicopter, rocket, satellite, flying saucer = UFO, ship, sailboat, steam locomotive = train,
        tram, manual wheelchair = wheelchair, wheel""",
    "place": """house building = house, church, mosque, hindu temple = temple, hospital, school, bank, hotel, factory,
        european castle = castle, stadium, office building, tent, fountain, statue of liberty, ferris wheel, carousel
        horse = carousel, desert island = island, desert, volcano, snow capped mountain = mountain, beach with
        umbrella = beach, bridge at night = bridge, motorway = road, railway track, cityscape = city""",
    "sky": """black sun with rays = sun, crescent moon = moon, cloud, rainbow, snowflake, high voltage sign =
        lightning*, cloud with tornado = tornado, cloud with rain = rain*, water wave = wave, fire*, ringed planet =
        planet, white medium star = star, earth globe europe-africa = earth""",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Concept:
    """One thing that a picture can show.

    name: as people say it, lower case for things ("hot dog"), as written for countries ("Japan").
    kind: "animal", "food", ..., or FLAG for a country's flag.
    code: the icon's code points in upper-case hexadecimal, joined by "-": the stem of its file.
    counted: whether the name takes "a" or "an".
    """

    name: str
    kind: str
    code: str
    counted: bool = True

    @property
    def phrase(self) -> str:
        """Return the noun phrase: "a dog", "an apple", "grapes", "the flag of Japan"."""
        if self.kind == FLAG:
            return f"the flag of {FLAG_COUNTRIES[self.name].phrase}"
        return sentence("a " + self.name).replace("A", "a", 1) if self.counted else self.name


@functools.cache
def icons() -> tuple[Concept, ...]:
    """Return every icon concept, in a fixed order, names distinct."""
    concepts: dict[str, Concept] = {}
    for kind, text in _ICONS.items():
        for entry in " ".join(text.split()).split(", "):
            official, _, short = entry.rstrip("*").partition(" = ")
            name = short or official
            code = f"{ord(unicodedata.lookup(official)):X}"
            concepts.setdefault(name, Concept(name, kind, code, not entry.endswith("*")))
    return tuple(concepts.values())


@functools.cache
def flags() -> tuple[Concept, ...]:
    """Return the flag of every country, in a fixed order."""
    return tuple(Concept(country.name, FLAG, country.code) for country in FLAG_COUNTRIES.values())


@functools.cache
def concepts() -> tuple[Concept, ...]:
    """Return every concept: icons, then flags. The position is the row of `fastedit.smol.scenes.icon_bitmaps`."""
    return icons() + flags()
