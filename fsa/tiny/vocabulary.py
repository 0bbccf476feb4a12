"""The words of the embedded model: objects with their pictographs, and textures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A class of the scenes.

    Attributes:
        name: what it is called first.
        synonyms: other names that captions use.
        codepoint: of its pictograph, in hexadecimal; empty for textures.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    codepoint: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.synonyms)


def _table(rows: str) -> tuple[Entry, ...]:
    entries = []
    for row in rows.strip().splitlines():
        codepoint, names = row.split(maxsplit=1)
        first, *others = (name.strip() for name in names.split(","))
        entries.append(Entry(first, tuple(others), codepoint))
    return tuple(entries)


OBJECTS = _table("""
1f408 cat, kitty
1f415 dog, hound
1f40e horse
1f404 cow
1f416 pig
1f411 sheep
1f418 elephant
1f405 tiger
1f412 monkey
1f407 rabbit, bunny
1f43f chipmunk, squirrel
1f994 hedgehog
1f426 bird
1f414 chicken, hen
1f427 penguin
1f989 owl
1f986 duck
1f422 turtle
1f40d snake
1f438 frog
1f41f fish
1f433 whale
1f419 octopus
1f980 crab
1f98b butterfly
1f41d bee, honeybee
1f41e ladybug, beetle
1f40c snail
1f34e apple
1f34c banana
1f34a orange, tangerine
1f353 strawberry
1f347 grapes
1f349 watermelon
1f34d pineapple
1f352 cherries
1f955 carrot
1f33d corn, maize
1f346 eggplant, aubergine
1f966 broccoli
1f344 mushroom
1f35e bread, loaf
1f9c0 cheese
1f354 hamburger, burger
1f355 pizza
1f369 doughnut, donut
1f382 cake, birthday cake
1f366 ice cream
2615 coffee, hot drink
1f697 car, automobile
1f68c bus
1f69a truck, lorry
1f682 train, locomotive
1f6b2 bicycle, bike
2708 airplane, plane
1f680 rocket
26f5 sailboat, boat
1f681 helicopter
1f333 tree
1f335 cactus
1f33b sunflower
1f339 rose
1f340 clover
1f3e0 house, home
26fa tent
26bd soccer ball, football
1f3c0 basketball
1f3b8 guitar
1f3ba trumpet
1f4d5 book
1f511 key
1f512 lock, padlock
1f4a1 light bulb, lamp
1f4f7 camera
1f4bb laptop, computer
1f553 clock
2602 umbrella
1f45f shoe, sneaker
1f452 hat
1f451 crown
1f388 balloon
1f381 gift, present
1fa91 chair
1f528 hammer
""")

TEXTURES = (
    Entry("grass", ("lawn", "meadow")),
    Entry("water", ("sea", "lake")),
    Entry("sky", ("clouds",)),
    Entry("sand", ("beach", "desert")),
    Entry("brick", ("brick wall",)),
    Entry("wood", ("wooden floor",)),
    Entry("snow", ("ice",)),
    Entry("stone", ("rock", "gravel")),
)

CLASSES = OBJECTS + TEXTURES
"""Objects first; a mask holds the index into this tuple."""
