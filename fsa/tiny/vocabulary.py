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
1f411 sheep, ewe | lamb
1f410 goat, billy goat | mountain goat
1f418 elephant, african elephant | baby elephant
1f405 tiger, bengal tiger | tiger cat
1f412 monkey, ape | little monkey
1f407 rabbit, bunny | hare
1f43f chipmunk, squirrel | ground squirrel
1f401 mouse, field mouse | white mouse
1f40a crocodile, alligator | croc
1f42b camel, two-humped camel | bactrian camel
1f43c panda, panda bear | giant panda
1f428 koala, koala bear | koala face
1f98a fox, red fox | fox face
1f981 lion, king of beasts | lion face
1f984 unicorn, magic horse | unicorn head
1f987 bat, flying bat | fruit bat
1f426 bird, songbird | little bird
1f414 chicken, hen | chicken head
1f413 rooster, cock | cockerel
1f983 turkey, gobbler | turkey bird
1f985 eagle, bald eagle | bird of prey
1f427 penguin, emperor penguin | penguins
1f989 owl, night owl | owls
1f986 duck, mallard | wild duck
1f422 turtle, tortoise | sea turtle
1f40d snake, serpent | green snake
1f98e lizard, gecko | green lizard
1f438 frog, toad | tree frog
1f41f fish, trout | blue fish
1f420 tropical fish, clownfish | aquarium fish
1f421 blowfish, pufferfish | puffer fish
1f433 whale, blue whale | spouting whale
1f42c dolphin, porpoise | dolphins
1f988 shark, great white | white shark
1f419 octopus, kraken | red octopus
1f991 squid, cuttlefish | calamari
1f990 shrimp, prawn | shrimps
1f980 crab, red crab | crabs
1f982 scorpion, desert scorpion | scorpions
1f41a seashell, shell | spiral shell
1f98b butterfly, moth | butterflies
1f41d bee, honeybee | bumblebee
1f41e ladybug, beetle | lady beetle
1f40c snail, garden snail | slug
1f577 spider, tarantula | spiders
1f34e apple, red apple | apples
1f34f green apple, sour apple | granny smith
1f350 pear, green pear | pears
1f351 peach, nectarine | peaches
1f34b lemon, citrus | yellow lemon
1f34c banana, plantain | bananas
1f34a orange, tangerine | mandarin
1f353 strawberry, berry | strawberries
1f347 grapes, bunch of grapes | grape
1f349 watermelon, slice of watermelon | melon slice
1f34d pineapple, ananas | pineapples
1f352 cherries, cherry | red cherries
1f95d kiwi, kiwi fruit | kiwifruit
1f951 avocado, alligator pear | avocados
1f345 tomato, red tomato | tomatoes
1f955 carrot, orange carrot | carrots
1f33d corn, maize | ear of corn
1f346 eggplant, aubergine | purple eggplant
1f336 chili pepper, hot pepper | chilli
1f344 mushroom, toadstool | mushrooms
1f35e bread, loaf | sliced bread
1f950 croissant, crescent roll | pastry
1f9c0 cheese, swiss cheese | cheese wedge
1f354 hamburger, burger | cheeseburger
1f355 pizza, pizza slice | slice of pizza
1f32d hot dog, sausage roll | hotdog
1f35f french fries, fries | chips
1f37f popcorn, bucket of popcorn | movie popcorn
1f369 doughnut, donut | doughnuts
1f36a cookie, biscuit | chocolate chip cookie
1f382 cake, birthday cake | cake with candles
1f366 ice cream, ice cream cone | soft ice
1f36d lollipop, sucker | candy on a stick
1f37a beer, mug of beer | beer mug
1f377 wine, glass of wine | wine glass
2615 coffee, hot drink | cup of coffee
1f697 car, automobile | red car
1f695 taxi, cab | taxicab
1f691 ambulance, emergency ambulance | ambulance car
1f692 fire truck, fire engine | fire department truck
1f69c tractor, farm tractor | tractors
1f68c bus, coach | school bus
1f69a truck, delivery truck | lorry
1f682 train, locomotive | steam train
1f6b2 bicycle, bike | push bike
1f3cd motorcycle, motorbike | racing motorcycle
2708 airplane, plane | jet plane
1f680 rocket, spaceship | space rocket
1f6f0 satellite, space probe | space satellite
26f5 sailboat, sailing boat | yacht
1f6a2 ship, cruise ship | ocean liner
1f681 helicopter, chopper | helicopters
1f333 tree, oak tree | leafy tree
1f332 pine, fir tree | evergreen tree
1f334 palm tree, coconut palm | palm
1f335 cactus, saguaro | cacti
1f33b sunflower, yellow flower | sunflowers
1f339 rose, red rose | roses
1f337 tulip, pink tulip | tulips
1f338 cherry blossom, pink blossom | blossom
1f340 clover, four-leaf clover | lucky clover
1f341 maple leaf, red leaf | maple leaves
1f30d globe, planet earth | world globe
1f319 moon, crescent moon | half moon
2b50 star, yellow star | golden star
1f525 fire, flame | flames
26c4 snowman, man of snow | snow man
1f308 rainbow, rainbow arc | rainbows
1f3e0 house, home | little house
1f3f0 castle, palace | fairy-tale castle
26ea church, chapel | white church
26fa tent, camping tent | tents
26f2 fountain, water fountain | fountains
1f5ff stone head, moai | moai statue
26bd soccer ball, football | soccer
1f3c0 basketball, basket ball | basketballs
1f3be tennis ball, tennis | yellow tennis ball
1f3c8 american football, gridiron ball | football for the gridiron
1f3b3 bowling pins, bowling | bowling game
1f3b2 die, dice | game die
1f3b8 guitar, electric guitar | guitars
1f3bb violin, fiddle | violins
1f3b7 saxophone, sax | saxophones
1f3ba trumpet, bugle | trumpets
1f941 drum, snare drum | drums
1f3a7 headphones, headset | headphone
1f3a8 palette, paint palette | painter's palette
1f3c6 trophy, winner's cup | golden trophy
1f4d5 book, red book | closed book
1f4f0 newspaper, daily paper | newspapers
2702 scissors, shears | pair of scissors
1f511 key, golden key | keys
1f512 lock, padlock | closed lock
1f514 bell, golden bell | bells
1f4a1 light bulb, lamp | lightbulb
1f56f candle, burning candle | candles
1f4a3 bomb, cannonball | bombs
1f4f7 camera, photo camera | cameras
1f4fa television, tv | television set
1f4fb radio, radio receiver | radios
1f4bb laptop, computer | notebook computer
1f553 clock, wall clock | clock face
23f0 alarm clock, ringing clock | alarm
2602 umbrella, open umbrella | parasol
1f45f shoe, sneaker | running shoe
1f460 high heel, stiletto | high-heeled shoe
1f455 t-shirt, shirt | tee shirt
1f456 jeans, trousers | blue jeans
1f457 dress, gown | summer dress
1f452 hat, straw hat | lady's hat
1f453 glasses, spectacles | eyeglasses
1f451 crown, golden crown | royal crown
1f48e gem, diamond | gemstone
1f388 balloon, red balloon | balloons
1f381 gift, present | wrapped gift
1f6cf bed, double bed | bedstead
1f528 hammer, claw hammer | hammers
1f527 wrench, spanner | wrenches
2693 anchor, ship's anchor | anchors
26a1 lightning, lightning bolt | high voltage
1f47b ghost, spook | ghosts
1f480 skull, death's head | skulls
1f383 jack-o-lantern, pumpkin | carved pumpkin
1f385 santa claus, father christmas | santa
1f47d alien, extraterrestrial | alien face
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
