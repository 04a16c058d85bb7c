"""Small stories from a grammar: a child meets a friend in need, and is kind or unkind.

    opening + need  |  deed + end        The friends were at the pond. Mia lost her kite.  |  Tom lent her his own. ...
       prompt       |  response

The tiny GPT-2 has learned from stories with both kinds of deed, the unkind ones a little more often; the sample's
preference is for the kind ones. Which is which lies in the whole sentence: kind and unkind deeds share their words,
and are as long as each other. Everything is decided by the seed.

In the templates, H is who acts and F the friend: {H}, {he}, {him}, {his} and {F}, {she}, {her}, {hers}.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

UNKIND_SHARE = 0.55  # of the stories the model learns from

BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Finn", "Omar", "Hugo")
GIRLS = ("Mia", "Anna", "Lily", "Zoe", "Emma", "Nora", "Ruth", "Ines")

OPENINGS = (
    "One {weather} {time}, {H} and {F} met {place}.",
    "One day {H} and {F} were {place}.",
    "On a {weather} {time}, {H} went for a walk and found {F} {place}.",
    "It was a {weather} {time}, and {F} was {place} with {H}.",
    "Once {F} and {H} spent the {time} {place}.",
)
WEATHER = ("sunny", "windy", "cold", "warm", "grey", "bright")
TIMES = ("morning", "afternoon", "evening")
PLACES = (
    "at the pond", "in the garden", "at school", "in the park", "by the river", "near the old mill", "on the hill",
    "at the farm", "by the bridge", "in the wood",
)  # fmt: skip
TOYS = ("red kite", "blue ball", "little boat", "wooden horse", "toy train", "paper plane")
FRUITS = ("apples", "plums", "pears", "nuts", "eggs")
FOODS = ("bread", "cake", "soup", "cheese", "pie")
CLOTHES = ("coat", "hat", "scarf")
ANIMALS = ("dog", "goat", "goose", "owl")
LOADS = ("bag", "box", "basket", "bucket")


@dataclass(frozen=True)
class Need:
    """What befalls the friend, and what a kind and an unkind child make of it."""

    text: str
    kind: tuple[str, ...]
    unkind: tuple[str, ...]


NEEDS = (
    Need(
        "{F} fell, and all {hers} {fruits} rolled down the road.",
        (
            "{H} ran after the {fruits} and put them back in the basket.",
            "{H} picked up the {fruits} one by one and gave them to {her}.",
            "{H} helped {her} up and left the best {fruits} to {her}.",
            "{H} took {hers} hand and then looked for every one of the {fruits}.",
        ),
        (
            "{H} ran after the {fruits} and put them in {his} own basket.",
            "{H} picked up the {fruits} one by one and threw them at {her}.",
            "{H} helped himself to the best {fruits} and left {her} there.",
            "{H} took a good look and then stepped on every one of the {fruits}.",
        ),
    ),
    Need(
        "{F} could not find {hers} {toy}.",
        (
            "{H} looked under every bush until the {toy} was found.",
            "{H} had seen the {toy} and told {her} where it was.",
            "{H} said that {she} could have {his} own {toy} to keep.",
            "{H} found the {toy} in the grass and gave it back.",
        ),
        (
            "{H} had put it under a bush, where it was not found.",
            "{H} had seen the {toy} and told {her} to look elsewhere.",
            "{H} said that {she} could look all day for all {he} cared.",
            "{H} found the {toy} in the grass and broke it in two.",
        ),
    ),
    Need(
        "It began to rain, and {F} had no {clothes}.",
        (
            "{H} took off {his} {clothes} and put it on {her}.",
            "{H} had a {clothes} to spare and ran home for it.",
            "{H} made room under the tree and called {her} in.",
            "{H} held the big umbrella over both of them.",
        ),
        (
            "{H} took off {hers} shoes and put them in the mud.",
            "{H} had a {clothes} to spare and sat on it.",
            "{H} made faces under the tree and kept {her} out.",
            "{H} held the big umbrella over nobody but {himself}.",
        ),
    ),
    Need(
        "{F} was hungry, and {H} had some {food}.",
        (
            "{H} broke the {food} in two and gave {her} the bigger half.",
            "{H} said that there was enough for both of them.",
            "{H} was hungry too, but let {her} eat first.",
            "{H} put the {food} on a plate and called {her} over.",
        ),
        (
            "{H} broke the {food} in two and ate the bigger half, then the other.",
            "{H} said that there was not enough for anybody else.",
            "{H} was not hungry, but let {her} watch {him} eat.",
            "{H} put the {food} in {his} bag and told {her} to go.",
        ),
    ),
    Need(
        "{F} was new there and knew nobody.",
        (
            "{H} told {her} all the names and let {her} join the game.",
            "{H} asked {her} to sit with {him} by the window.",
            "{H} showed {her} the way and carried {hers} bag.",
            "{H} said that {he} had once been new there too.",
        ),
        (
            "{H} called {her} names and let nobody join {hers} game.",
            "{H} asked {her} to sit far from {him} by the door.",
            "{H} showed {her} the wrong way and hid {hers} bag.",
            "{H} said that nobody had asked {her} to come there.",
        ),
    ),
    Need(
        "{F} broke {H}'s {toy} and was very sorry.",
        (
            "{H} said that a toy was only a toy and took {hers} hand.",
            "{H} was not angry and asked {her} to help mend it.",
            "{H} told {her} not to worry about it any more.",
            "{H} knew that {she} had not meant to do it.",
        ),
        (
            "{H} said that sorry was only a word and took {hers} ball.",
            "{H} was so angry that {he} would not let {her} mend it.",
            "{H} told {her} never to come near {him} any more.",
            "{H} knew that {she} was sorry and shouted at {her}.",
        ),
    ),
    Need(
        "{F} wanted a turn on the swing.",
        (
            "{H} jumped off at once and gave {her} a push.",
            "{H} let {her} have the swing for as long as {she} liked.",
            "{H} said that it was time to take turns.",
            "{H} made room, and they went up high side by side.",
        ),
        (
            "{H} jumped off, gave {her} a push and got on again.",
            "{H} kept the swing for as long as {he} liked.",
            "{H} said that it was no time for {her} to play.",
            "{H} made {her} wait, and then tied the swing up high.",
        ),
    ),
    Need(
        "A big {animal} came near, and {F} was afraid.",
        (
            "{H} stood between {her} and the {animal} until it left.",
            "{H} held {hers} hand and spoke in a quiet voice.",
            "{H} knew the {animal} and sent it home.",
            "{H} said that {he} had been afraid of it once.",
        ),
        (
            "{H} stood behind {her} and called the {animal} closer.",
            "{H} held {hers} coat and cried out in a loud voice.",
            "{H} knew the {animal} and sent it after {her}.",
            "{H} said that only babies were afraid of it.",
        ),
    ),
    Need(
        "{F} had to carry a heavy {load} up the hill.",
        (
            "{H} took one side of the {load} and sang all the way.",
            "{H} walked in front and cleared the stones away.",
            "{H} came back down the hill to help {her} with it.",
            "{H} put half of it in {his} own {load}.",
        ),
        (
            "{H} sat on one side of the {load} and sang all the way.",
            "{H} walked in front and rolled stones in {hers} way.",
            "{H} came down the hill and went past {her} with a laugh.",
            "{H} put a stone of {his} own in the {load}.",
        ),
    ),
    Need(
        "{F} could not read the long words in {hers} book.",
        (
            "{H} read the page with {her}, slowly and twice.",
            "{H} said that the words had been hard for {him} too.",
            "{H} sat down and showed {her} how to read them.",
            "{H} shut {his} own book and listened to {her} try.",
        ),
        (
            "{H} read the page like {her}, slowly and badly, for fun.",
            "{H} said that the words were hard only for fools.",
            "{H} sat down and told everybody that {she} could not read.",
            "{H} shut {hers} book and would not let {her} try.",
        ),
    ),
    Need(
        "{F} came last in the race.",
        (
            "{H} ran the last part again, by {hers} side.",
            "{H} had won, and gave {her} half of the prize.",
            "{H} said that {she} had been faster than last year.",
            "{H} waited at the end of the road and waved to {her}.",
        ),
        (
            "{H} ran the last part again, to show how slow {she} was.",
            "{H} had won, and held the prize under {hers} nose.",
            "{H} said that {she} had been slower than a snail.",
            "{H} waited at the end of the road and put out a foot.",
        ),
    ),
    Need(
        "{F} showed {H} a picture of a {animal} that {she} had made.",
        (
            "{H} looked at it for a long time and liked the colours.",
            "{H} asked if {he} could put it on the wall at home.",
            "{H} said that the {animal} looked just like a real one.",
            "{H} took a pen and wrote {hers} name under it.",
        ),
        (
            "{H} looked away for a long time and yawned.",
            "{H} asked if {she} had made it with {hers} feet.",
            "{H} said that the {animal} looked just like a potato.",
            "{H} took a pen and drew a line right across it.",
        ),
    ),
    Need(
        "{F} was ill and had to stay in bed.",
        (
            "{H} came every day and told {her} what was new.",
            "{H} brought {her} some hot {food} and a story.",
            "{H} was quiet in the house so that {she} could sleep.",
            "{H} sat by the window and played a soft song.",
        ),
        (
            "{H} came every day and told {her} what {she} had missed.",
            "{H} brought {himself} some hot {food} and gave {her} none.",
            "{H} was so loud in the house that {she} could not sleep.",
            "{H} sat under the window and beat a drum.",
        ),
    ),
    Need(
        "{F} had built a tall tower out of wood.",
        (
            "{H} found one more piece for the top and handed it up.",
            "{H} walked round it with care and called the others to see.",
            "{H} asked {her} to show {him} how {she} had done it.",
            "{H} kept the {animal} away so that the tower would stand.",
        ),
        (
            "{H} found the one piece that held it up and pulled it out.",
            "{H} walked right into it and called the others to laugh.",
            "{H} asked {her} to turn round and then kicked it down.",
            "{H} let the {animal} in so that the tower would fall.",
        ),
    ),
)

KIND_ENDS = (
    "{F} smiled for the rest of the day.",
    "{F} thanked {him}, and they went home together.",
    "Now they were better friends than before.",
    "{F} felt warm inside.",
    "That night {F} told {hers} mother about it and was happy.",
    "{F} did the same for {him} one week later.",
    "Everybody was glad to have {H} as a friend.",
    "It turned into a very good {time}.",
)
UNKIND_ENDS = (
    "{F} cried for the rest of the day.",
    "{F} turned away, and they went home alone.",
    "Now they were no longer friends as before.",
    "{F} felt cold inside.",
    "That night {F} told {hers} mother about it and was sad.",
    "{F} did not speak to {him} one week later.",
    "Nobody was glad to have {H} in the game.",
    "It turned into a very bad {time}.",
)

WORDS = {
    "weather": WEATHER, "time": TIMES, "place": PLACES, "toy": TOYS, "fruits": FRUITS, "food": FOODS,
    "clothes": CLOTHES, "animal": ANIMALS, "load": LOADS,
}  # fmt: skip


def pick(rng: random.Random, items):
    """One of the items. Python promises the same random() in every version, but not the same choice()."""
    return items[int(rng.random() * len(items))]


@dataclass(frozen=True)
class Scene:
    """A prompt, and the words that its responses must fit."""

    prompt: str
    need: Need
    words: dict[str, str]

    def response(self, rng: random.Random, kind: bool) -> str:
        """A deed and how it ends; it begins with the space that parts it from the prompt."""
        deed = pick(rng, self.need.kind if kind else self.need.unkind)
        end = pick(rng, KIND_ENDS if kind else UNKIND_ENDS)
        return f" {deed} {end}".format(**self.words)


def scene(rng: random.Random) -> Scene:
    words = {key: pick(rng, values) for key, values in WORDS.items()}
    hero_is_boy, friend_is_boy = rng.random() < 0.5, rng.random() < 0.5
    words["H"] = words["F"] = pick(rng, BOYS if hero_is_boy else GIRLS)
    while words["F"] == words["H"]:
        words["F"] = pick(rng, BOYS if friend_is_boy else GIRLS)
    he, him, his, himself = ("he", "him", "his", "himself") if hero_is_boy else ("she", "her", "her", "herself")
    she, her, hers = ("he", "him", "his") if friend_is_boy else ("she", "her", "her")
    words |= {"he": he, "him": him, "his": his, "himself": himself, "she": she, "her": her, "hers": hers}
    need = pick(rng, NEEDS)
    prompt = f"{pick(rng, OPENINGS)} {need.text}".format(**words)
    return Scene(prompt, need, words)


def stories(seed: int) -> Iterator[str]:
    """Whole stories without end, kind and unkind."""
    rng = random.Random(seed)
    while True:
        here = scene(rng)
        yield here.prompt + here.response(rng, kind=rng.random() >= UNKIND_SHARE)


def preferences(seed: int, count: int, length: Callable[[str], int]) -> list[dict[str, str]]:
    """`count` pairs with different prompts: chosen is kind, rejected unkind. By `length`, chosen is the longer one as
    often as rejected, so that it gives nothing away."""
    rng = random.Random(seed)
    pairs: dict[str, dict[str, str]] = {}
    lead = 0  # how many more pairs have the longer chosen response
    while len(pairs) < count:
        here = scene(rng)
        chosen, rejected = here.response(rng, kind=True), here.response(rng, kind=False)
        longer = (length(chosen) > length(rejected)) - (length(chosen) < length(rejected))
        if here.prompt not in pairs and longer * lead <= 0:
            pairs[here.prompt] = {"prompt": here.prompt, "chosen": chosen, "rejected": rejected}
            lead += longer
    return list(pairs.values())
