"""The drawn world: one thing that people drew, in one of five styles, on a coloured background.

"a tiger in flat style on a blue background" has a thing, a style and a background. The pictures come from five icon
sets that share their names (demo/train_sets.py); this file knows the words only.
"""
from __future__ import annotations

from dataclasses import dataclass

# a word of captions and the icon's name where it is another one; one drawing for every word, one token for every thing
_ANIMALS = """cat=cat-face dog=dog-face tiger=tiger-face rabbit=rabbit-face bear panda fox lion cow=cow-face
pig=pig-face frog monkey=monkey-face horse=horse-face mouse=mouse-face koala chicken penguin owl unicorn elephant snail
turtle fish octopus whale butterfly ladybug=lady-beetle bee=honeybee duck parrot flamingo crab spider dragon
dinosaur=sauropod snake bat hedgehog"""
_FOOD = """apple=red-apple pear lemon banana watermelon grapes strawberry cherries pineapple tomato avocado carrot
corn=ear-of-corn broccoli mushroom bread croissant pancakes cheese=cheese-wedge hamburger fries=french-fries pizza
hotdog=hot-dog popcorn doughnut cake=birthday-cake cupcake lollipop icecream=soft-ice-cream coffee=hot-beverage teapot
beer=beer-mug"""
_VEHICLES = """car=automobile bus tractor motorcycle bicycle airplane helicopter rocket saucer=flying-saucer sailboat
ship train=locomotive"""
_OUTDOORS = """house castle tent umbrella balloon gift=wrapped-gift pine=evergreen-tree tree=deciduous-tree
palm=palm-tree cactus sunflower rose tulip"""
_TOOLS = """football=soccer-ball basketball guitar trumpet camera television lightbulb=light-bulb key hammer bell crown
hat=top-hat shirt=t-shirt backpack hourglass=hourglass-done bomb gem=gem-stone trophy candle scissors"""
_SKY = """star moon=crescent-moon sun cloud snowflake snowman fire rainbow heart=red-heart pumpkin=jack-o-lantern skull
ghost robot"""


def _read_icons(text: str) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in text.split())
    return {word: icon or word for word, _, icon in pairs}


KINDS: dict[str, dict[str, str]] = {
    name: _read_icons(text) for name, text in (
        ("animals", _ANIMALS), ("food", _FOOD), ("vehicles", _VEHICLES), ("outdoors", _OUTDOORS), ("tools", _TOOLS),
        ("sky", _SKY))}
ICONS: dict[str, str] = {word: icon for kind in KINDS.values() for word, icon in kind.items()}
THINGS = tuple(ICONS)
STYLES: dict[str, str] = {  # word and the set that is drawn so
    "shaded": "noto",
    "flat": "fluent-emoji-flat",
    "rounded": "twemoji",
    "glossy": "fluent-emoji",
    "line": "fluent-emoji-high-contrast",
}
# light enough for black lines, and each told from the others at a glance
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 248),
    "grey": (172, 177, 186),
    "yellow": (250, 222, 105),
    "orange": (246, 168, 92),
    "red": (234, 112, 106),
    "green": (134, 204, 126),
    "blue": (116, 172, 240),
    "purple": (180, 146, 228),
}
SEVERAL = ("grapes", "cherries", "broccoli", "bread", "pancakes", "cheese", "fries", "popcorn", "coffee", "beer",
           "corn", "scissors", "fire")  # take no article
FILLERS = ("a", "an", "the", "in", "on", "with", "of", "style", "picture", "drawing", "icon", "background")


@dataclass(frozen=True)
class Drawing:
    """What a caption says. None means unsaid in a caption, absent (`thing`, `style`) in an empty picture."""

    thing: str | None = None
    style: str | None = None
    background: str | None = None


def name_thing(thing: str) -> str:
    """The thing with its article."""
    if thing in SEVERAL:
        return thing
    return f"{'an' if thing[0] in 'aeio' else 'a'} {thing}"


def describe_drawing(drawing: Drawing) -> str:
    """The caption of a drawing; unsaid parts are left out."""
    parts = [name_thing(drawing.thing)] if drawing.thing else []
    parts += [f"in {drawing.style} style"] if drawing.style else []
    if drawing.background:
        parts += ["on"] if parts else []
        parts += [f"{'an' if drawing.background[0] in 'aeio' else 'a'} {drawing.background} background"]
    return " ".join(parts)
