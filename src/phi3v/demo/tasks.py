"""The demo's tasks, one row of pictures, questions and answers at a time, each from its own seed; and how pictures are drawn.

Every task needs its picture. Order slips hold two words drawn from eight each; a meme is hateful only when a mean word
stands beside a face (either alone is harmless); statements about the colours of picture pairs are true and false equally often; a
clip's class is the colour and the direction of a moving ball. Whoever answers without looking gets one slip word in
eight, half of the memes and statements, and one clip in ten. A row's numbers come from (seed, task, index) alone.

Pictures are drawn on a grid of cells of 14 x 14 pixels. With the tiny model's tiles of 28 x 28 pixels and `num_crops`
4 the HD transform halves slips, memes and cards of 112 x 56 (2 x 1 tiles), so that a letter falls
on a patch of 7 x 7: the smallest picture on which lettering is still legible, hence the cheapest one from which a model
can learn to read. The letters are a bitmap font of this module: the same bytes whatever font library the machine has.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

# Pictures -----------------------------------------------------------------------------------------------------------

CELL = 14
"""Pixels from one letter to the next."""
SIDE = 8 * CELL
"""Width of a picture, twice its height, in pixels: 8 letters across, 4 rows of cells down."""

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (205, 40, 35),
    "green": (40, 150, 60),
    "blue": (40, 75, 205),
    "yellow": (225, 190, 30),
    "purple": (150, 50, 165),
}

# Seven rows of five dots for each character. A row is a digit of base 32, whose highest bit is the leftmost dot.
_FONT = (
    "A:EHHVHHH B:UHHUHHU C:EHGGGHE D:SIHHHIS E:VGGUGGV F:VGGUGGG G:EHGNHHF H:HHHVHHH I:E44444E "
    "J:72222IC K:HIKOKIH L:GGGGGGV M:HRLLHHH N:HPPLJJH O:EHHHHHE P:UHHUGGG Q:EHHHLID R:UHHUKIH "
    "S:FGGE11U T:V444444 U:HHHHHHE V:HHHHHA4 W:HHHLLRH X:HHA4AHH Y:HHA4444 Z:V1248GV 0:EHJLPHE "
    "1:4C4444E 2:EH168GV 3:U11E11U 4:26AIV22 5:VGU11HE 6:68GUHHE 7:V124888 8:EHHEHHE 9:EHHF12C"
)
_GLYPHS = {entry[0]: [int(row, 32) for row in entry[2:]] for entry in _FONT.split()} | {" ": [0] * 7}


def png_bytes(picture: Image.Image) -> bytes:
    """`picture` as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def jpeg_bytes(picture: Image.Image) -> bytes:
    """`picture` as a JPEG file of quality 95."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def shade(rng: Random, colour: Colour, spread: int = 20) -> Colour:
    """`colour` with each channel moved by up to `spread`."""
    return tuple(min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)  # type: ignore[return-value]


def write(canvas: ImageDraw.ImageDraw, left: int, top: int, text: str, ink: Colour) -> None:
    """Draw `text` (A-Z, 0-9, space) with its top left corner at (`left`, `top`); each font dot is 2 x 2 pixels."""
    for character in text:
        for row, bits in enumerate(_GLYPHS[character]):
            for column in range(5):
                if bits >> (4 - column) & 1:
                    x, y = left + 2 * column + 2, top + 2 * row
                    canvas.rectangle((x, y, x + 1, y + 1), fill=ink)
        left += CELL


def paper(rng: Random) -> Colour:
    """A light background."""
    return shade(rng, (235, 235, 230), 18)


def page(rng: Random, lines: list[tuple[str, str]]) -> Image.Image:
    """A form of up to two lines: the field's name in the left half, its value in the right half."""
    picture = Image.new("RGB", (SIDE, SIDE // 2), paper(rng))
    canvas = ImageDraw.Draw(picture)
    ink, label = shade(rng, (30, 30, 50), 25), shade(rng, (95, 95, 110), 25)
    for number, (name, value) in enumerate(lines):
        top = 2 * CELL * number + CELL // 2
        write(canvas, 0, top, name, label)
        write(canvas, SIDE // 2, top, value, ink)
        canvas.line((0, top + 2 * CELL - CELL // 2, SIDE, top + 2 * CELL - CELL // 2), fill=label)
    return picture


def shape(canvas: ImageDraw.ImageDraw, kind: str, box: tuple[int, int, int, int], fill: Colour) -> None:
    """Draw a filled circle, square or cross into `box` = (left, top, right, bottom)."""
    left, top, right, bottom = box
    if kind == "circle":
        canvas.ellipse(box, fill=fill)
    elif kind == "square":
        canvas.rectangle(box, fill=fill)
    else:
        third_x, third_y = (right - left) // 3, (bottom - top) // 3
        canvas.rectangle((left + third_x, top, right - third_x, bottom), fill=fill)
        canvas.rectangle((left, top + third_y, right, bottom - third_y), fill=fill)


def face(canvas: ImageDraw.ImageDraw, box: tuple[int, int, int, int], fill: Colour) -> None:
    """Draw a person's face into `box`."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    canvas.ellipse(box, fill=fill)
    for x in (0.32, 0.68):
        eye = (left + width * (x - 0.08), top + height * 0.3, left + width * (x + 0.08), top + height * 0.46)
        canvas.ellipse(eye, fill=(20, 20, 20))
    mouth = (left + width * 0.25, top + height * 0.6, left + width * 0.75, top + height * 0.75)
    canvas.rectangle(mouth, fill=(150, 20, 20))


def house(canvas: ImageDraw.ImageDraw, box: tuple[int, int, int, int], fill: Colour) -> None:
    """Draw a house into `box`."""
    left, top, right, bottom = box
    middle = (top + bottom) // 2
    canvas.polygon([((left + right) // 2, top), (right, middle), (left, middle)], fill=(120, 60, 40))
    canvas.rectangle((left + 4, middle, right - 4, bottom), fill=fill)


def meme(rng: Random, figure: str, first: str, second: str) -> Image.Image:
    """A meme, twice as wide as high: a `figure` ("face" or "house"), and beside it two words of up to 4 letters."""
    half = SIDE // 2
    picture = Image.new("RGB", (SIDE, half), shade(rng, (120, 170, 210), 35))
    canvas = ImageDraw.Draw(picture)
    side = 42 + rng.randint(0, 8)
    left, top = rng.randint(1, half - side - 2), rng.randint(1, half - side - 2)
    draw = {"face": face, "house": house}[figure]
    draw(canvas, (left, top, left + side, top + side), shade(rng, (235, 200, 120), 20))
    canvas.rectangle((half, 0, SIDE, half), fill=paper(rng))
    ink = shade(rng, (25, 25, 25), 25)
    for number, line in enumerate((first, second)):
        write(canvas, half, CELL // 2 + 2 * CELL * number, line, ink)
    return picture


def figure_card(rng: Random, kind: str, colour: str) -> Image.Image:
    """One coloured shape somewhere on a light card, twice as wide as high."""
    width, height = SIDE, SIDE // 2
    picture = Image.new("RGB", (width, height), paper(rng))
    size = rng.randint(38, 46)
    left, top = rng.randint(2, width - size - 2), rng.randint(2, height - size - 2)
    shape(ImageDraw.Draw(picture), kind, (left, top, left + size, top + size), shade(rng, COLOURS[colour]))
    return picture


def printed_digit(rng: Random, digit: str, side: int = 8) -> Image.Image:
    """A letter-press digit, leaned, stretched and shifted by chance, on `side` x `side` grey pixels."""
    large = Image.new("L", (64, 64), 0)
    canvas = ImageDraw.Draw(large)
    thick = rng.choice((6, 7, 8))
    for row, bits in enumerate(_GLYPHS[digit]):
        for column in range(5):
            if bits >> (4 - column) & 1:
                x, y = 14 + 7 * column, 7 + 7 * row
                canvas.rectangle((x, y, x + thick, y + thick), fill=255)
    # Output pixel (x, y) is taken from (a x + b y + c, d x + e y + f).
    lean, wide, high = rng.uniform(-0.3, 0.3), rng.uniform(0.85, 1.3), rng.uniform(0.85, 1.1)
    shift = (32 - wide * 32 - lean * 32 + rng.uniform(-5, 5), 32 - high * 32 + rng.uniform(-4, 4))
    moved = large.transform((64, 64), Image.Transform.AFFINE, (wide, lean, shift[0], 0, high, shift[1]))
    ink = moved.resize((side, side), Image.Resampling.BOX)
    strength = rng.uniform(0.8, 1.0)
    return Image.eval(ink, lambda value: 255 - int(value * strength))


def moving_frames(rng: Random, colour: str, direction: str, frames: int, side: int = 64) -> list[Image.Image]:
    """A coloured ball that crosses a square of `side` pixels; direction: "right" (at any height) or "down"."""
    ground, fill = paper(rng), shade(rng, COLOURS[colour])
    size = side * rng.randint(38, 48) // 100
    start, end = rng.randint(0, 4), side - size - rng.randint(1, 5)
    across = rng.randint(2, side - size - 2)
    pictures = []
    for number in range(frames):
        along = start + (end - start) * number // max(1, frames - 1)
        left, top = (along, across) if direction == "right" else (across, along)
        picture = Image.new("RGB", (side, side), ground)
        ImageDraw.Draw(picture).ellipse((left, top, left + size, top + size), fill=fill)
        pictures.append(picture)
    return pictures


# Tasks --------------------------------------------------------------------------------------------------------------

SLIP_FIELDS: dict[str, tuple[str, ...]] = {
    "FOR": ("ANNA", "OTTO", "EMIL", "RUTH", "IVAN", "LENA", "HUGO", "MAYA"),
    "BUY": ("LAMP", "DESK", "SOFA", "BOOK", "VASE", "MUGS", "TENT", "RICE"),
}
"""A slip's fields (at most three letters) and their values (at most four letters)."""

SLIP_QUESTIONS = {
    "FOR": "Who is the order FOR?",
    "BUY": "What is there to BUY?",
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


def _slip(rng: Random, filled: int = 2) -> tuple[Image.Image, dict[str, str]]:
    """An order slip with `filled` of its two lines written on, and their values by field from top to bottom."""
    written = set(rng.sample(list(SLIP_FIELDS), filled))
    values = {name: rng.choice(options) for name, options in SLIP_FIELDS.items() if name in written}
    return page(rng, [(name, values.get(name, "")) for name in SLIP_FIELDS]), values


def slip_row(rng: Random) -> TaskRow:
    """An order slip with one question, as in the mini DocVQA set (which adds no instruction to it)."""
    picture, values = _slip(rng)
    name = rng.choice(list(SLIP_QUESTIONS))
    return TaskRow((picture,), ((SLIP_QUESTIONS[name], values[name]),))


def docvqa_row(rng: Random) -> TaskRow:
    """An order slip with one or two questions."""
    picture, values = _slip(rng)
    asked = rng.sample(list(SLIP_QUESTIONS), rng.randint(1, 2))
    return TaskRow((picture,), tuple((f"{SLIP_QUESTIONS[name]}\nAnswer briefly.", values[name]) for name in asked))


def _meme(rng: Random, hateful: bool) -> tuple[Image.Image, str, str, str]:
    """A meme's picture, figure, opening and word; harmless ones change the figure, the word or both."""
    mean, person = (True, True) if hateful else rng.choice(((True, False), (False, True), (False, False)))
    figure = "face" if person else "house"
    opening, word = rng.choice(MEME_OPENINGS), rng.choice(MEAN_WORDS if mean else KIND_WORDS)
    return meme(rng, figure, opening, word), figure, opening, word


def hateful_memes_row(rng: Random) -> TaskRow:
    """A meme, hateful in half of the rows."""
    hateful = rng.random() < 0.5
    picture, *_ = _meme(rng, hateful)
    question = "Is this meme hateful?\nAnswer yes or no."
    return TaskRow((picture,), ((question, "Yes." if hateful else "No."),))


def _pair(rng: Random) -> tuple[tuple[Image.Image, Image.Image], list[tuple[str, str]]]:
    """Two cards and their (colour, shape)."""
    contents = [(rng.choice(PAIR_COLOURS), rng.choice(PAIR_SHAPES)) for _ in range(2)]
    left, right = (figure_card(rng, shape, colour) for colour, shape in contents)
    return (left, right), contents


def _claim(rng: Random, contents: list[tuple[str, str]], true: bool) -> str:
    """A colour that a card has, or that neither has: three colours, at most two are on the cards."""
    colours = {colour for colour, _ in contents}
    return rng.choice([colour for colour in PAIR_COLOURS if (colour in colours) == true])


def nlvr2_row(rng: Random) -> TaskRow:
    """A picture pair with two statements on its colours, each true in half of the rows."""
    cards, contents = _pair(rng)
    turns = []
    for true in (rng.random() < 0.5, rng.random() < 0.5):
        statement = f"One of the images shows something {_claim(rng, contents, true)}."
        turns.append((f"{statement} Yes or no?", "Yes." if true else "No."))
    return TaskRow(cards, tuple(turns))


def mixture_slip(rng: Random) -> TaskRow:
    """Reading: everything on a slip with one or two lines, then its lines one by one."""
    filled = rng.choice((1, 2, 2))
    picture, values = _slip(rng, filled)
    everything = " ".join(f"{name} {value}" for name, value in values.items())
    asked = rng.sample(list(values), filled)
    return TaskRow(
        (picture,), (("Read all lines.", everything), *((f"Read the line {name}.", values[name]) for name in asked))
    )


def mixture_meme(rng: Random) -> TaskRow:
    """Naming a meme's figure and reading its text."""
    picture, figure, opening, word = _meme(rng, rng.random() < 0.5)
    turns = [("What is drawn?", f"a {figure}"), ("Read the text.", f"{opening} {word}")]
    rng.shuffle(turns)
    return TaskRow((picture,), tuple(turns))


def mixture_check(rng: Random) -> TaskRow:
    """Questions on a pair, half of them to be answered yes."""
    cards, contents = _pair(rng)
    turns = []
    for true in (rng.random() < 0.5, rng.random() < 0.5):
        turns.append((f"Is anything {_claim(rng, contents, true)}?", "Yes." if true else "No."))
    return TaskRow(cards, tuple(turns))


def mixture_digit(rng: Random) -> TaskRow:
    """A printed digit, as small and as crooked as a scanned one."""
    digit = str(rng.randrange(10))
    return TaskRow((printed_digit(rng, digit),), (("Read the digit.", digit),))


MIXTURE: tuple[Callable[[Random], TaskRow], ...] = (
    mixture_slip,
    mixture_meme,
    mixture_slip,
    mixture_check,
    mixture_slip,
    mixture_digit,
    mixture_slip,
    mixture_meme,
    mixture_check,
)
"""What the tiny base is pre-trained on, in turn: perception, with other words than the tasks use. Reading is hardest."""


def clip_frames(rng: Random, name: str, frames: int) -> list[Image.Image]:
    """The frames of one clip of class `name`."""
    colour, direction = UCF_CLASSES[name]
    return moving_frames(rng, colour, direction, frames)
