"""Documents rendered with Pillow, with the exact box of every word and the answer to every
question.

    page = render_page(random.Random(7), "receipt", width=256, height=384)
    page.image                  the picture (PIL, RGB)
    page.lines                  [[Word(text, box), ...], ...] in reading order, boxes in pixels
    page.text                   the transcript: words joined by spaces, lines by newlines
    page.questions              [("Total", "48.20"), ...]: "What is the Total?" -> "48.20"

Most values are random strings and numbers, so a model that answers them has read the page.

    python experiments/pages.py --kind receipt --seed 7 --out receipt.png
                                renders one page to look at
"""

import argparse
import random
import string
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = ("lines", "form", "receipt")

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
SHOPS = """Market Store Cafe Bakery Corner Garden Station Harbor Central Royal Green Blue Golden
Sunny Old New City Express Grand Little""".split()


@dataclass
class Word:
    text: str
    box: tuple          # (x0, y0, x1, y1): the word's ink, in pixels of the page
    middle: float       # y halfway up the line's capitals, the same for all its words


@dataclass
class Page:
    image: Image.Image
    lines: list = field(default_factory=list)      # [[Word, ...], ...] top to bottom, left to right
    questions: list = field(default_factory=list)  # [(key, value), ...], each key once
    font_size: int = 14

    @property
    def text(self):
        return "\n".join(" ".join(word.text for word in line) for line in self.lines)


@lru_cache(maxsize=None)
def load_font(size):
    """Pillow's built-in font at `size` pixels."""
    return ImageFont.load_default(size)


# ---- what is written -----------------------------------------------------------------------------

def random_price(rng):
    return (f"{rng.randint(0, 99) if rng.random() < 0.8 else rng.randint(100, 999)}"
            f".{rng.randint(0, 99):02d}")


def random_word(rng):
    """A string that cannot be guessed: digits, letters, prices, dates, codes."""
    def letters(alphabet, low, high):
        return "".join(rng.choices(alphabet, k=rng.randint(low, high)))
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
    return [[(" ".join(random_word(rng) for _ in range(1 if rng.random() < 0.1 else 40)), "left")]
            for _ in range(count)], []


ROWS = {"lines": text_rows, "form": form_rows, "receipt": receipt_rows}


# ---- how it is drawn -----------------------------------------------------------------------------

def random_colors(rng):
    """(background, ink): dark on light, one page in eight light on dark."""
    light = ([rng.randint(195, 255)] * 3 if rng.random() < 0.6
             else [rng.randint(195, 255) for _ in range(3)])
    dark = ([rng.randint(0, 80)] * 3 if rng.random() < 0.6
            else [rng.randint(0, 80) for _ in range(3)])
    return (tuple(dark), tuple(light)) if rng.random() < 0.125 else (tuple(light), tuple(dark))


def render_page(rng, kind, width, height, sizes=(13, 16), max_rows=None, noise=0.03):
    """Renders one page.

    rng: random.Random, the only source of chance; kind: one of KINDS; width, height: pixels; sizes:
    smallest and largest font size in pixels; max_rows: at most so many lines; noise: largest
    standard deviation of the Gaussian noise, as a share of the range from black to white. Rows that
    do not fit are left out, and so are their questions.
    """
    background, ink = random_colors(rng)
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    size = rng.randint(*sizes)
    font, pitch = load_font(size), size + rng.randint(2, 8)
    rows_that_fit = max(1, (height - 2) // pitch)
    count = rng.randint(max(1, rows_that_fit // 2), rows_that_fit)
    rows, questions = ROWS[kind](rng, min(count, max_rows or count))
    margin, column = rng.randint(2, max(2, width // 24)), round(width * rng.uniform(0.35, 0.55))
    y = rng.randint(0, max(0, height - 2 - pitch * len(rows)))
    page = Page(image, font_size=size)
    for row in rows:
        line, complete = draw_row(draw, row, font, y, margin, column, width, ink,
                                  space=rng.uniform(1.0, 1.6), may_break=kind == "lines")
        if complete:
            page.lines.append(line)
        y += pitch
    drawn = {line[0].text.rstrip(":") for line in page.lines}
    page.questions = [(key, value) for key, value in questions if key in drawn]
    if not page.lines:                                  # nothing fitted: one short word always does
        page.lines = [draw_row(draw, [(random_word(rng)[:3], "left")], font, 0, 2, column, width,
                               ink, 1.0, True)[0]]
    if noise:
        pixels = np.asarray(image, dtype=np.float32)
        grain = np.random.default_rng(rng.getrandbits(32)).normal(
            0, rng.uniform(0, noise) * 255, pixels.shape[:2])
        page.image = Image.fromarray((pixels + grain[..., None]).clip(0, 255).astype(np.uint8))
    return page


def draw_row(draw, row, font, y, margin, column, width, ink, space, may_break):
    """Draws one row of (text, align) parts at height y. Returns its words, and whether the whole
    row was drawn.

    align: "left" (after the part before), "column" (at x = column), "right" or "center". A row that
    does not fit is not drawn at all, unless may_break: then its first words are.
    """
    gap = font.getlength(" ") * space
    placed, x = [], margin
    for text, align in row:
        words = text.split(" ")
        lengths = [font.getlength(word) for word in words]
        total = sum(lengths) + gap * (len(words) - 1)
        x = {"left": x, "column": max(x, column), "right": max(x, width - margin - total),
             "center": (width - total) / 2}[align]
        for word, length in zip(words, lengths):
            if x < 0 or x + length > width - 2:
                if not may_break:
                    return [], False
                break
            placed.append((word, round(x)))
            x += length + gap
    line = []
    for word, x in placed:
        draw.text((x, y), word, font=font, fill=ink)
        line.append(Word(word, tuple(draw.textbbox((x, y), word, font=font)), y + 0.62 * font.size))
    return line, bool(line)


def main():
    parser = argparse.ArgumentParser(description="Render one page.")
    parser.add_argument("--kind", choices=KINDS, default="receipt")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    page = render_page(random.Random(args.seed), args.kind, args.width, args.height)
    page.image.save(args.out)
    print(page.text)
    for key, value in page.questions:
        print(f"What is the {key}? {value}")


if __name__ == "__main__":
    main()
