"""Tests of pages.py and wild_pages.py, in a few seconds: pytest experiments/test_pages.py"""

import hashlib
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import wild_pages
from experiments.pages import KINDS, TRAINING_KINDS, render_page, tasks

WILD = sorted(wild_pages.WILD)
SIZES = [(256, 256), (256, 384), (384, 256), (128, 32), (512, 384), (640, 480)]


def wild(seed, kind, **settings):
    size = SIZES[seed % len(SIZES)]
    return wild_pages.render_mixed_page(random.Random(seed), kind, *size, 1.0, **settings)


def test_pages_without_wild_are_what_they_were():
    digest = hashlib.sha256()
    for seed in range(3):
        for kind in KINDS + TRAINING_KINDS:
            page = render_page(random.Random(seed), kind, 256, 192, wear=0.5)
            digest.update(page.text.encode() + repr(page.questions).encode())
    assert digest.hexdigest() == "318c601fb04fb6b4678544336b3e0d771a464f2c665f57e182df01ad65160d52"


@pytest.mark.parametrize("kind", WILD)
def test_words_lie_on_the_page_and_on_ink(kind):
    for seed in range(18):
        page = wild(seed, kind, noise=0.0)
        width, height = page.image.size
        pixels = np.asarray(page.image).astype(int)
        for word in (word for line in page.lines for word in line):
            x0, y0, x1, y1 = word.box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert len(word.centers) == len(word.text)
            assert all(32 < ord(c) < 127 for c in word.text)
            shown = pixels[y0:y1, x0:x1].sum(-1)
            assert shown.max() - shown.min() > 60
        words = [word.box for line in page.lines for word in line]
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                       for i, a in enumerate(words) for b in words[:i])


@pytest.mark.parametrize("kind", WILD)
def test_answers_are_printed_and_each_key_is_asked_once(kind):
    for seed in range(18):
        page = wild(seed, kind)
        text, keys = page.text, [key.lower() for key, _ in page.questions]
        assert len(set(keys)) == len(keys)
        for key, value in page.questions:
            assert value in text
            assert all(part in text.lower() for part in key.lower().split(" of "))
        assert tasks(page)[0] == ("transcript", "", text)


def test_a_seed_gives_one_page():
    a, b = (wild(3, "table", wear=0.5) for _ in range(2))
    assert a.image.tobytes() == b.image.tobytes() and a.questions == b.questions


def test_every_decoration_and_size_occurs(monkeypatch):
    seen = Counter()
    for name in ("put_title", "put_frame", "put_window", "put_buttons", "draw_grid"):
        def spy(*args, name=name, function=getattr(wild_pages, name), **settings):
            seen[name, args[1] if name == "draw_grid" else ""] += 1
            return function(*args, **settings)
        monkeypatch.setattr(wild_pages, name, spy)
    draw_rule = wild_pages.draw_rule

    def rule(sheet, x0, x1, y, style=None):
        seen["rule", style or sheet.rule] += 1
        seen["size", sheet.size] += 1
        draw_rule(sheet, x0, x1, y, style)
    monkeypatch.setattr(wild_pages, "draw_rule", rule)
    for seed in range(240):
        wild(seed, WILD[seed % len(WILD)], noise=0.0)
    wanted = {(name, "") for name in ("put_title", "put_frame", "put_window", "put_buttons")}
    wanted |= {("draw_grid", grid) for grid in wild_pages.GRIDS}
    wanted |= {("rule", style) for style in wild_pages.RULES}
    wanted |= {("size", size) for size in range(12, 25)}
    assert wanted <= set(seen)


def test_all_that_is_drawn_can_be_written():
    rng = random.Random(0)
    for pattern in wild_pages.PHRASES + wild_pages.VALUES:
        text = wild_pages.filled_in(rng, pattern)
        assert text.isascii() and text.isprintable() and text == " ".join(text.split())


def test_pages_of_fields_have_their_values_below_or_behind_the_keys():
    below = 0
    for seed in range(20):
        page = render_page(random.Random(seed), "fields", 256, 128)
        words = {word.text.rstrip(":"): (i, word.box) for i, line in enumerate(page.lines)
                 for word in line}
        assert page.questions
        for key, value in page.questions:
            (row, box), (row_of_value, box_of_value) = words[key], words[value]
            assert row_of_value in (row, row + 1)
            below += row_of_value > row
            # the ink of a letter begins up to two pixels behind where it is drawn
            assert (abs(box[0] - box_of_value[0]) <= 3) == (row_of_value > row)
    assert below > 40
