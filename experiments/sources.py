"""The pages that score_heads.py scores if it is given none."""

import random
from dataclasses import dataclass

from experiments.pages import render_page


@dataclass
class Rendered:
    """Pages drawn here, after the idea of SynthDoG (arXiv 2111.15664): text of several sizes and
    colours, on even grounds and others. Page i is the same on every machine."""
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
