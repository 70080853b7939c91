"""The demo's tasks: one row of pictures, questions and answers at a time, each from its own seed.

Every task needs its picture. Order slips hold four words drawn from eight each; a meme is hateful only when a mean word
stands beside a face (either alone is harmless); statements about picture pairs are true and false equally often; a
clip's class is the colour and the direction of a moving ball. Whoever answers without looking gets one slip word in
eight, half of the memes and statements, and one clip in ten.

A row's numbers come from (seed, task, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image

from phi3v.demo import pictures

SLIP_FIELDS: dict[str, tuple[str, ...]] = {
    "FOR": ("ANNA", "OTTO", "EMIL", "RUTH", "IVAN", "LENA", "HUGO", "MAYA"),
    "IN": ("OSLO", "LIMA", "ROME", "KYIV", "BERN", "BAKU", "CALI", "DOHA"),
    "BUY": ("LAMP", "DESK", "SOFA", "BOOK", "VASE", "MUGS", "TENT", "RICE"),
    "DAY": ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN", "ANY"),
}
"""A slip's fields (at most three letters) and their values (at most four letters)."""

SLIP_QUESTIONS = {
    "FOR": "Who is the order FOR?",
    "IN": "Which city is it IN?",
    "BUY": "What is there to BUY?",
    "DAY": "On which DAY is it needed?",
}
"""A question names its field as the slip does."""

MEAN_WORDS = ("UGLY", "VILE", "DUMB", "LAZY", "FOUL", "MEAN")
KIND_WORDS = ("KIND", "WISE", "COOL", "NICE", "FINE", "GOOD")
MEME_OPENINGS = ("SO", "VERY", "HOW", "TOO")

PAIR_COLOURS = ("red", "green", "blue")
PAIR_SHAPES = ("circle", "square", "cross")

UCF_CLASSES: dict[str, tuple[str, str]] = {
    "ApplyEyeMakeup": ("red", "right"), "ApplyLipstick": ("red", "down"),
    "Archery": ("green", "right"), "BabyCrawling": ("green", "down"),
    "BalanceBeam": ("blue", "right"), "BandMarching": ("blue", "down"),
    "BaseballPitch": ("yellow", "right"), "Basketball": ("yellow", "down"),
    "BasketballDunk": ("purple", "right"), "BenchPress": ("purple", "down"),
}  # fmt: skip
"""The recipe's ten class names; in the demo a class is the colour and the direction of a ball."""


@dataclass(frozen=True)
class TaskRow:
    """Pictures with their questions and answers: what a row of a the_cauldron file holds.

    `turns` are (user, assistant) texts; `pictures` belong to all of them.
    """

    pictures: tuple[Image.Image, ...]
    turns: tuple[tuple[str, str], ...]


def rng_of(seed: int, task: str, index: int) -> Random:
    """The random numbers of one row."""
    return Random(f"{seed}/{task}/{index}")


def _slip(rng: Random, filled: int = 4) -> tuple[Image.Image, dict[str, str]]:
    """An order slip with `filled` of its four lines written on, and their values by field from top to bottom."""
    written = set(rng.sample(list(SLIP_FIELDS), filled))
    values = {name: rng.choice(options) for name, options in SLIP_FIELDS.items() if name in written}
    return pictures.page(rng, [(name, values.get(name, "")) for name in SLIP_FIELDS]), values


def slip_row(rng: Random) -> TaskRow:
    """An order slip with one question, as in the mini DocVQA set (which adds no instruction to it)."""
    picture, values = _slip(rng)
    name = rng.choice(list(SLIP_QUESTIONS))
    return TaskRow((picture,), ((SLIP_QUESTIONS[name], values[name]),))


def docvqa_row(rng: Random) -> TaskRow:
    """An order slip with two or three questions."""
    picture, values = _slip(rng)
    asked = rng.sample(list(SLIP_QUESTIONS), rng.randint(2, 3))
    return TaskRow((picture,), tuple((f"{SLIP_QUESTIONS[name]}\nAnswer briefly.", values[name]) for name in asked))


def _meme(rng: Random, hateful: bool) -> tuple[Image.Image, str, str, str]:
    """A meme's picture, figure, opening and word; harmless ones change the figure, the word or both."""
    mean, person = (True, True) if hateful else rng.choice(((True, False), (False, True), (False, False)))
    figure = "face" if person else "house"
    opening, word = rng.choice(MEME_OPENINGS), rng.choice(MEAN_WORDS if mean else KIND_WORDS)
    return pictures.meme(rng, figure, opening, word), figure, opening, word


def hateful_memes_row(rng: Random) -> TaskRow:
    """A meme, hateful in half of the rows."""
    hateful = rng.random() < 0.5
    picture, *_ = _meme(rng, hateful)
    question = "Is this meme hateful?\nAnswer yes or no."
    return TaskRow((picture,), ((question, "Yes." if hateful else "No."),))


def _pair(rng: Random) -> tuple[tuple[Image.Image, Image.Image], list[tuple[str, str]]]:
    """Two cards and their (colour, shape)."""
    contents = [(rng.choice(PAIR_COLOURS), rng.choice(PAIR_SHAPES)) for _ in range(2)]
    left, right = (pictures.figure_card(rng, shape, colour) for colour, shape in contents)
    return (left, right), contents


def _claim(rng: Random, contents: list[tuple[str, str]], true: bool) -> tuple[int, str]:
    """(0, colour) or (1, shape) that a card has, or that neither has: three options, at most two are shown."""
    kind = rng.randrange(2)
    shown = {content[kind] for content in contents}
    options = [value for value in (PAIR_COLOURS, PAIR_SHAPES)[kind] if (value in shown) == true]
    return kind, rng.choice(options)


def nlvr2_row(rng: Random) -> TaskRow:
    """A picture pair with two statements on the pair, each true in half of the rows."""
    cards, contents = _pair(rng)
    turns = []
    for true in (rng.random() < 0.5, rng.random() < 0.5):
        kind, said = _claim(rng, contents, true)
        statement = f"One of the images shows {'something' if kind == 0 else 'a'} {said}."
        turns.append((f"{statement} Yes or no?", "Yes." if true else "No."))
    return TaskRow(cards, tuple(turns))


def mixture_slip(rng: Random) -> TaskRow:
    """Reading: everything on a slip with one to four lines, then single lines of it."""
    filled = rng.choice((1, 1, 2, 4))
    picture, values = _slip(rng, filled)
    everything = " ".join(f"{name} {value}" for name, value in values.items())
    asked = rng.sample(list(values), min(2, filled))
    return TaskRow(
        (picture,), (("Read all lines.", everything), *((f"Read the line {name}.", values[name]) for name in asked))
    )


def mixture_meme(rng: Random) -> TaskRow:
    """Naming a meme's figure and reading its text."""
    picture, figure, opening, word = _meme(rng, rng.random() < 0.5)
    turns = [("What is drawn?", f"a {figure}"), ("Read the text.", f"{opening} {word}")]
    rng.shuffle(turns)
    return TaskRow((picture,), tuple(turns))


def mixture_pair(rng: Random) -> TaskRow:
    """Describing both cards of a pair."""
    cards, contents = _pair(rng)
    return TaskRow(cards, (("Describe both.", " ".join(word for content in contents for word in content)),))


def mixture_check(rng: Random) -> TaskRow:
    """Questions on a pair, half of them to be answered yes."""
    cards, contents = _pair(rng)
    turns = []
    for true in (rng.random() < 0.5, rng.random() < 0.5):
        kind, said = _claim(rng, contents, true)
        turns.append((f"Is {'anything' if kind == 0 else 'there a'} {said}?", "Yes." if true else "No."))
    return TaskRow(cards, tuple(turns))


def mixture_digit(rng: Random) -> TaskRow:
    """A printed digit, as small and as crooked as a scanned one."""
    digit = str(rng.randrange(10))
    return TaskRow((pictures.printed_digit(rng, digit),), (("Read the digit.", digit),))


MIXTURE: tuple[Callable[[Random], TaskRow], ...] = (
    mixture_slip,
    mixture_meme,
    mixture_pair,
    mixture_check,
    mixture_slip,
    mixture_digit,
    mixture_check,
)
"""What the tiny base is pre-trained on, in turn: perception, with other words than the tasks use."""


def clip_frames(rng: Random, name: str, frames: int) -> list[Image.Image]:
    """The frames of one clip of class `name`."""
    colour, direction = UCF_CLASSES[name]
    return pictures.moving_frames(rng, colour, direction, frames)
