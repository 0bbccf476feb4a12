"""The words of the embedded model: objects with their pictographs, and textures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A class of the scenes.

    Attributes:
        name: what it is called first.
        synonyms: other names that captions use.
        unseen_synonyms: other names that no caption of training uses.
        codepoint: of its pictograph, in hexadecimal; empty for textures.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    unseen_synonyms: tuple[str, ...] = ()
    codepoint: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.synonyms)


def _table(rows: str) -> tuple[Entry, ...]:
    entries = []
    for row in rows.strip().splitlines():
        codepoint, names = row.split(maxsplit=1)
        (first, *seen), unseen = (
            tuple(name.strip() for name in part.split(",")) for part in names.split("|")
        )
        entries.append(Entry(first, tuple(seen), unseen, codepoint))
    return tuple(entries)


OBJECTS = _table("""
1f408 cat, kitty | kitten
1f415 dog, hound | doggy
1f40e horse, stallion | racehorse
1f404 cow, cattle | dairy cow
1f416 pig, swine | piglet
1f418 elephant, african elephant | baby elephant
1f407 rabbit, bunny | hare
1f43c panda, panda bear | giant panda
1f981 lion, king of beasts | lion face
1f427 penguin, emperor penguin | penguins
1f989 owl, night owl | owls
1f986 duck, mallard | wild duck
1f422 turtle, tortoise | sea turtle
1f438 frog, toad | tree frog
1f41f fish, trout | blue fish
1f419 octopus, kraken | red octopus
1f980 crab, red crab | crabs
1f98b butterfly, moth | butterflies
1f41d bee, honeybee | bumblebee
1f41e ladybug, beetle | lady beetle
1f40c snail, garden snail | slug
1f34e apple, red apple | apples
1f34b lemon, citrus | yellow lemon
1f34c banana, plantain | bananas
1f353 strawberry, berry | strawberries
1f347 grapes, bunch of grapes | grape
1f349 watermelon, slice of watermelon | melon slice
1f34d pineapple, ananas | pineapples
1f955 carrot, orange carrot | carrots
1f344 mushroom, toadstool | mushrooms
1f35e bread, loaf | sliced bread
1f9c0 cheese, swiss cheese | cheese wedge
1f354 hamburger, burger | cheeseburger
1f355 pizza, pizza slice | slice of pizza
1f369 doughnut, donut | doughnuts
1f382 cake, birthday cake | cake with candles
1f697 car, automobile | red car
1f69c tractor, farm tractor | tractors
1f68c bus, coach | school bus
1f682 train, locomotive | steam train
1f6b2 bicycle, bike | push bike
1f3cd motorcycle, motorbike | racing motorcycle
2708 airplane, plane | jet plane
1f680 rocket, spaceship | space rocket
26f5 sailboat, sailing boat | yacht
1f333 tree, oak tree | leafy tree
1f334 palm tree, coconut palm | palm
1f335 cactus, saguaro | cacti
1f33b sunflower, yellow flower | sunflowers
1f339 rose, red rose | roses
26c4 snowman, man of snow | snow man
1f3e0 house, home | little house
1f3f0 castle, palace | fairy-tale castle
26bd soccer ball, football | soccer
1f3c0 basketball, basket ball | basketballs
1f3b8 guitar, electric guitar | guitars
1f4d5 book, red book | closed book
1f511 key, golden key | keys
1f553 clock, wall clock | clock face
2602 umbrella, open umbrella | parasol
1f45f shoe, sneaker | running shoe
1f451 crown, golden crown | royal crown
1f388 balloon, red balloon | balloons
1f381 gift, present | wrapped gift
""")

TEXTURES = (
    Entry("grass", ("lawn", "meadow"), ("turf",)),
    Entry("water", ("sea", "lake"), ("ocean",)),
    Entry("sky", ("clouds",), ("cloudy sky",)),
    Entry("sand", ("beach", "desert"), ("sandy ground",)),
    Entry("brick", ("brick wall",), ("bricks",)),
    Entry("wood", ("wooden floor",), ("wooden planks",)),
    Entry("snow", ("ice",), ("snowy ground",)),
    Entry("stone", ("rock", "gravel"), ("cobblestones",)),
)

CLASSES = OBJECTS + TEXTURES
"""Objects first; a mask holds the index into this tuple."""
