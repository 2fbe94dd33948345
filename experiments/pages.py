"""Documents rendered with Pillow, with the exact box of every word and the answer to every
question.

    page = render_page(random.Random(7), "receipt", width=256, height=384)
    page.image                  the picture (PIL, RGB)
    page.lines                  [[Word(text, box), ...], ...] in reading order
    page.text                   the transcript: words joined by spaces, lines by newlines
    page.questions              [("Total", "48.20"), ...]: "What is the Total?" -> "48.20"
    page.objects                what is drawn besides text: [Word("red circle", box), ...]
    tasks(page)                 all that can be asked: [("value", "Total", "48.20"), ...]
    prompt("value", "Total")    "What is the Total?"
    Rendered(KINDS, seed=0, size=(256, 384), num=1000)[0]
                                (image, [(text, box), ...], transcript) of a page to score heads on

Most values are random strings and numbers, so a model that answers them has read the page.

    python experiments/pages.py --kind receipt --seed 7 --out receipt.png
"""

import argparse
import io
import math
import random
import string
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = ("lines", "form", "receipt", "table", "letter", "label", "sign", "shapes")

KEYS = """Name Date Order Phone City Code Ref Due Paid Qty Room Seat Gate Bill Unit Plan Rate Zone
Lot Type Mode Size Color Model Serial Account Invoice Customer Amount Balance Ticket Flight Street
State Country Email Status Weight Height Price Discount Deposit Branch Desk Teller Agent Driver
Vehicle Plate Route Stop Train Platform Doctor Patient Ward Dose Batch Expiry Origin Carrier Parcel
Signature Start End Hours Salary Bonus Grade Class Level Page Volume Issue Author Title Editor Key
Pin Version Host Port Member Card""".split()
ITEMS = """Coffee Tea Milk Bread Butter Cheese Apple Banana Orange Lemon Salad Soup Pasta Pizza Rice
Beans Fish Chicken Burger Fries Cake Cookie Juice Water Soda Beer Wine Soap Paper Pen Pencil Book
Lamp Cable Battery Socks Shirt Hat Gloves Scarf Towel Brush Candle Glue Tape Nails Paint Rope Bucket
Stamp""".split()
COLUMNS = """Price Qty Stock Sold Week Month Rank Score Weight Size Code Tax Total Cost Year Shift
Rate Points Goals Units""".split()
PROSE = """the a of to and in that it was for on are with as be at this have from or had by not but
what all were when we there can an your which their said if do will each about how up out them then
she many some so these would other into has more her two like him see time could no make than first
been its who now people my made over did down only way find use may water long little very after
words called just where most know""".split()
SIGNS = """Open Closed Exit Entry Parking Sale Stop Push Pull Danger Private Welcome Platform Gate
Office Library Museum Station Bakery Toilets Keep Left Right No Smoking""".split()
COLORS = {"red": (200, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 210),
          "yellow": (225, 200, 30), "purple": (135, 50, 160), "orange": (235, 130, 30)}
SHAPES = ("circle", "square", "triangle", "cross")

SHOPS = """Market Store Cafe Bakery Corner Garden Station Harbor Central Royal Green Blue Golden
Sunny Old New City Express Grand Little""".split()
WORDINGS = {"transcript": "Provide all the OCR results of this image.", "value": "What is the {}?",
            "line": "What does line {} say?", "shapes": "Which shapes are on the page?"}


@dataclass
class Word:
    text: str
    box: tuple          # (x0, y0, x1, y1): the word's ink, in pixels of the page


@dataclass
class Page:
    image: Image.Image
    lines: list = field(default_factory=list)      # [[Word, ...], ...] top to bottom, left to right
    questions: list = field(default_factory=list)  # [(key, value), ...], each key once
    objects: list = field(default_factory=list)    # [Word, ...]: coloured shapes, in reading order

    @property
    def text(self):
        return "\n".join(" ".join(word.text for word in line) for line in self.lines)


def tasks(page):
    """All that can be asked about a page: [(task, what it is about, the right answer), ...].

    Lines of at most three characters are not asked for, and no line of a page with shapes, where
    reading order leaves a doubt which line is which.
    """
    found = [("transcript", "", page.text)]
    found += [("value", key, value) for key, value in page.questions]
    if page.objects:
        found.append(("shapes", "", ", ".join(thing.text for thing in page.objects)))
    else:
        texts = (" ".join(word.text for word in line) for line in page.lines)
        found += [("line", str(i), text) for i, text in enumerate(texts, 1) if len(text) > 3]
    return found


def prompt(task, about=""):
    """What a model is asked for a task."""
    return WORDINGS[task].format(about)


load_font = lru_cache(ImageFont.load_default)           # Pillow's own font, by its size in pixels


# ---- what is written -----------------------------------------------------------------------------

def random_price(rng):
    return (f"{rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(100, 999)}"
            f".{rng.randint(0, 99):02d}")


def random_letters(rng, alphabet, low, high):
    """low to high characters of an alphabet."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def random_short(rng):
    """A short string that cannot be guessed."""
    return random_letters(rng, rng.choice([string.digits, string.digits, string.ascii_uppercase]),
                          2, 5)


def random_word(rng):
    """A string that cannot be guessed: digits, letters, prices, dates, codes."""
    def letters(alphabet, low, high):
        return random_letters(rng, alphabet, low, high)
    kind = rng.random()
    if kind < 0.25:
        return letters(string.digits, 2, 6)
    if kind < 0.40:
        return letters(string.ascii_uppercase, 2, 6)
    if kind < 0.65:
        word = letters(string.ascii_lowercase, 2, 8)
        return word.capitalize() if rng.random() < 0.4 else word
    if kind < 0.75:
        return rng.choice(["", "", "$"]) + random_price(rng)
    if kind < 0.83:
        year, month, day = rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(1, 28)
        return rng.choice([f"{year}-{month:02d}-{day:02d}", f"{day:02d}/{month:02d}/{year}"])
    if kind < 0.90:
        return (letters(string.ascii_uppercase, 1, 3) + rng.choice(["-", "", "/"])
                + letters(string.digits, 2, 5))
    if kind < 0.95:
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if kind < 0.98:
        return f"{rng.randint(0, 100)}%"
    return "".join(rng.choices(string.ascii_letters + string.digits + string.punctuation,
                               k=rng.randint(2, 6)))


def random_value(rng):
    """One word, now and then two."""
    count = 1 if rng.random() < 0.85 else 2
    return " ".join(rng.choice(ITEMS + KEYS) if rng.random() < 0.15 else random_word(rng)
                    for _ in range(count))


def distinct_keys(rng, count):
    keys = rng.sample(KEYS, min(count, len(KEYS)))
    return [k if rng.random() < 0.85
            else "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7))).capitalize()
            for k in keys]


def form_rows(rng, count):
    """Rows [(text, align), ...] of `Key: value`, and the questions they answer."""
    keys = list(dict.fromkeys(distinct_keys(rng, count)))
    colon = rng.choice([":", ":", ""])
    aligned = rng.choice(["left", "left", "column"]) if colon else "column"
    rows, questions = [], []
    for key in keys:
        value = random_value(rng)
        rows.append([(key + colon, "left"), (value, aligned)])
        questions.append((key, value))
    return rows, questions


def receipt_rows(rng, count):
    """Rows of a receipt: a heading, items with prices, the sums, and a few `Key: value` lines."""
    extra = rng.randint(0, 3) if count > 6 else 0
    header = [[(" ".join(rng.sample(SHOPS, rng.randint(1, 2))), "center")]] if count > 3 else []
    sums = ["Subtotal", "Tax", "Total"][0 if count > 6 else 2:]
    names = rng.sample(ITEMS, max(0, min(len(ITEMS), count - len(header) - len(sums) - extra)))
    priced = [(name, random_price(rng)) for name in names + sums]
    align = rng.choice(["right", "right", "column"])
    form, questions = form_rows(rng, extra)
    middle = [[(name, "left"), (price, align)] for name, price in priced]
    rows = header + form + middle if rng.random() < 0.5 else header + middle + form
    return rows, priced + [(k, v) for k, v in questions if k not in dict(priced)]


def text_rows(rng, count):
    """Rows of unrelated words, as many as fit, now and then a short one."""
    return [[(" ".join(random_word(rng) for _ in range(1 if rng.random() < 0.1 else 12)), "left")]
            for _ in range(count)], []


def table_rows(rng, count):
    """Rows of a table with named columns; "What is the Price of Apple?" has its answer."""
    columns = rng.sample(COLUMNS, rng.choice([2, 2, 3]))
    starts = [0.36, 0.68] if len(columns) == 2 else [0.30, 0.54, 0.78]
    numeric = [rng.random() < 0.5 for _ in columns]
    rows = [[("Item", "left")] + list(zip(columns, starts))]
    questions = []
    for item in rng.sample(ITEMS, max(1, min(len(ITEMS), count - 1))):
        cells = [random_price(rng) if number else random_short(rng) for number in numeric]
        rows.append([(item, "left")] + list(zip(cells, starts)))
        questions += [(f"{column} of {item}", cell) for column, cell in zip(columns, cells)]
    return rows, questions


def letter_rows(rng, count):
    """Rows of a letter: the address, lines of common words and some that cannot be guessed, and the
    sender's name."""
    def name():
        return " ".join(random_letters(rng, string.ascii_lowercase, 3, 7).capitalize()
                        for _ in range(2))
    body = [[(" ".join(random_word(rng) if rng.random() < 0.15 else rng.choice(PROSE)
                       for _ in range(16)), "left")] for _ in range(max(1, count - 2))]
    return [[(f"Dear {name()},", "left")]] + body + [[(f"Yours, {name()}", "left")]], []


def label_rows(rng, count):
    """Rows of a parcel's or a product's label: a code, the name, and a few `Key: value` lines."""
    form, questions = form_rows(rng, max(1, count - 2))
    code = random_letters(rng, string.ascii_uppercase + string.digits, 5, 9)
    name = " ".join(rng.sample(SHOPS, 2))
    return [[(name, "center")]] + form + [[(code, "center")]], questions


def sign_rows(rng, count):
    """A few large words."""
    return [[(rng.choice(SIGNS) if rng.random() < 0.5 else random_short(rng), "center")]
            for _ in range(min(count, 4))], []


ROWS = {"lines": text_rows, "form": form_rows, "receipt": receipt_rows, "table": table_rows,
        "letter": letter_rows, "label": label_rows, "sign": sign_rows, "shapes": text_rows}


# ---- how it is drawn -----------------------------------------------------------------------------

def random_colors(rng):
    """(background, ink): dark on light, one page in eight light on dark."""
    light = ([rng.randint(195, 255)] * 3 if rng.random() < 0.6
             else [rng.randint(195, 255) for _ in range(3)])
    dark = ([rng.randint(0, 80)] * 3 if rng.random() < 0.6
            else [rng.randint(0, 80) for _ in range(3)])
    return (tuple(dark), tuple(light)) if rng.random() < 0.125 else (tuple(light), tuple(dark))


def draw_ground(rng, width, height, color, uneven):
    """A picture of the ground: even, or of a colour that drifts by up to `uneven`, as paper's does
    in bad light."""
    drift = np.zeros((2, 2, 3)) if uneven == 0 else np.random.default_rng(
        rng.getrandbits(32)).uniform(-uneven, uneven, (rng.randint(2, 5), rng.randint(2, 5), 3))
    ground = Image.fromarray((np.asarray(color) + drift).clip(0, 255).astype(np.uint8))
    return ground.resize((width, height), Image.Resampling.BICUBIC)


def draw_shapes(rng, draw, width, top, bottom):
    """Draws one to four coloured shapes side by side between two heights. Returns them as Words, in
    reading order."""
    count = rng.randint(1, min(4, max(1, width // 48)))
    slot, objects = width / count, []
    for i in range(count):
        radius = rng.uniform(9, max(10, min(slot, bottom - top) / 2 - 2))
        radius = min(radius, slot / 2 - 1, (bottom - top) / 2)
        x = rng.uniform(i * slot + radius, (i + 1) * slot - radius)
        y = rng.uniform(top + radius, bottom - radius)
        name, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        box, color = (x - radius, y - radius, x + radius, y + radius), COLORS[name]
        if shape == "circle":
            draw.ellipse(box, fill=color)
        elif shape == "square":
            draw.rectangle(box, fill=color)
        elif shape == "triangle":
            draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=color)
        else:
            third = radius / 3
            draw.rectangle((x - third, box[1], x + third, box[3]), fill=color)
            draw.rectangle((box[0], y - third, box[2], y + third), fill=color)
        objects.append(Word(f"{name} {shape}", box))
    return objects


def rotate(page, degrees, color):
    """Turns a page about its middle, and its boxes with it: a box becomes the smallest upright one
    around the turned one."""
    width, height = page.image.size
    page.image = page.image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=color)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def turn(x, y):
        x, y = x - width / 2, y - height / 2
        return x * cos + y * sin + width / 2, y * cos - x * sin + height / 2

    for word in [word for line in page.lines for word in line] + page.objects:
        x0, y0, x1, y1 = word.box
        xs, ys = zip(*(turn(x, y) for x in (x0, x1) for y in (y0, y1)))
        word.box = (min(xs), min(ys), max(xs), max(ys))


def render_page(rng, kind, width, height, sizes=(13, 16), noise=0.03, wear=0.0):
    """Renders one page.

    rng: random.Random, the only source of chance; kind: one of KINDS; width, height: pixels; sizes:
    smallest and largest font size in pixels (a sign's is up to twice as large); noise: largest
    standard deviation of the Gaussian noise, as a share of the range from black to white; wear:
    probability of each of three defects, an uneven background, a rotation by up to 1.5 degrees, and
    JPEG artefacts. Rows that do not fit are left out, and so are their questions.
    """
    background, ink = random_colors(rng)
    uneven = rng.randint(8, 30) if rng.random() < wear else 0
    image = draw_ground(rng, width, height, background, uneven)
    draw = ImageDraw.Draw(image)
    size = rng.randint(sizes[1], max(sizes[1], min(2 * sizes[1], height // 3))) if kind == "sign" \
        else rng.randint(*sizes)
    rng.randrange(1)                # moves the generator: every seed must keep its page
    font, pitch = load_font(size), size + rng.randint(2, 8)
    text_height = max(pitch, round(height * rng.uniform(0.3, 0.6))) if kind == "shapes" else height
    rows_that_fit = max(1, (text_height - 2) // pitch)
    count = rng.randint(max(1, rows_that_fit // 2), rows_that_fit)
    rows, questions = ROWS[kind](rng, count)
    margin, column = rng.randint(2, max(2, width // 24)), round(width * rng.uniform(0.35, 0.55))
    y = rng.randint(0, max(0, text_height - 2 - pitch * len(rows)))
    page = Page(image)
    drawn = []                                              # the parts of the rows on the page
    for row in rows:
        line, complete = draw_row(draw, row, font, y, margin, column, width, ink,
                                  space=rng.uniform(1.0, 1.6),
                                  may_break=kind in ("lines", "letter", "shapes"))
        if complete:
            page.lines.append(line)
            drawn += [text.rstrip(":") for text, _ in row]
        y += pitch
    page.questions = [(key, value) for key, value in questions
                      if key.split(" of ")[-1] in drawn and value.rstrip(":") in drawn]
    if not page.lines:                                  # nothing fitted: one short word always does
        page.lines = [draw_row(draw, [(random_word(rng)[:3], "left")], font, 0, 2, column, width,
                               ink, 1.0, True)[0]]
    if kind == "shapes" and height - text_height > 24:
        page.objects = draw_shapes(rng, draw, width, text_height, height)
    return worn(rng, page, background, noise, wear)


def worn(rng, page, background, noise, wear):
    """The page turned, with noise and JPEG artefacts, as render_page says."""
    if rng.random() < wear:
        rotate(page, rng.uniform(-1.5, 1.5), background)
    if noise:
        pixels = np.asarray(page.image, dtype=np.float32)
        grain = np.random.default_rng(rng.getrandbits(32)).normal(
            0, rng.uniform(0, noise) * 255, pixels.shape[:2])
        page.image = Image.fromarray((pixels + grain[..., None]).clip(0, 255).astype(np.uint8))
    if rng.random() < wear:
        file = io.BytesIO()
        page.image.save(file, "JPEG", quality=rng.randint(40, 90))
        page.image = Image.open(file).convert("RGB")
    return page


def draw_row(draw, row, font, y, margin, column, width, ink, space, may_break):
    """Draws one row of (text, align) parts at height y. Returns its words, and whether the whole
    row was drawn.

    align: "left" (after the part before), "column" (at x = column), a share of the width, "right"
    or "center". A row that does not fit is not drawn at all, unless may_break: then its first words
    are.
    """
    gap = font.getlength(" ") * space
    placed, x, full = [], margin, False
    for text, align in row:
        words, lengths = text.split(" "), []
        for word in words:
            lengths.append(font.getlength(word))
            if sum(lengths) > width:                              # no need to measure what follows
                break
        total = sum(lengths) + gap * (len(lengths) - 1)
        start = {"left": x, "column": max(x, column), "right": max(x, width - margin - total),
                 "center": (width - total) / 2}.get(align)
        x = max(x, align * width) if start is None else start
        for word, length in zip(words, lengths):
            if x < 0 or x + length > width - 2:
                if not may_break:
                    return [], False
                full = True
                break
            placed.append((word, round(x)))
            x += length + gap
        if full:
            break
    line = [draw_word(draw, word, x, y, font, ink) for word, x in placed]
    return line, bool(line)


def draw_word(draw, word, x, y, font, ink):
    draw.text((x, y), word, font=font, fill=ink)
    return Word(word, tuple(draw.textbbox((x, y), word, font=font)))


# ---- many pages, and the command -----------------------------------------------------------------

@dataclass
class Rendered:
    """Pages to score heads on, after the idea of SynthDoG (arXiv 2111.15664): text of several sizes
    and colours, on even grounds and others. Page i is the same on every machine."""
    kinds: tuple
    seed: int
    size: tuple                 # (width, height) in pixels
    num: int

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        """(PIL image, [(text, box), ...], transcript) of page i."""
        rng = random.Random(f"score heads {self.seed} {i}")
        kind, largest = self.kinds[i % len(self.kinds)], max(16, self.size[1] // 24)
        page = render_page(rng, kind, *self.size, sizes=(13, largest), wear=0.3)
        words = [(word.text, word.box) for line in page.lines for word in line]
        return page.image, words, page.text


def main(argv=None):
    parser = argparse.ArgumentParser(description="Render one page; print its text and questions.")
    parser.add_argument("--kind", choices=KINDS, default="receipt")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="PNG")
    args = parser.parse_args(argv)
    try:
        page = render_page(random.Random(args.seed), args.kind, args.width, args.height)
        page.image.save(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(page.text)
    for task, about, answer in tasks(page)[1:]:
        print(prompt(task, about), answer)


if __name__ == "__main__":
    main()
