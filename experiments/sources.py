"""The pages that score_heads.py scores: from a file, drawn here, several to a prompt."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from experiments.arguments import open_image
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


class Annotated:
    """Pages of a JSON file in the layout of SynthDoG-detection: a list of {"id", "image_name",
    "2_coord": [{"chunk": text, "coord": [[x, y], ...]}, ...]}, coordinates in pixels. Other OCR and
    detection sets fit in, with a class name for the chunk. Images lie beside the file."""

    def __init__(self, path, num):
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise ValueError(f"--data {path}: not JSON") from None
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"--data {path}: not a list of pages")
        self.folder, self.entries = Path(path).parent, entries[:num]

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        """As Rendered. Raises ValueError that names an entry which cannot be read."""
        entry = self.entries[i]
        try:
            words = []
            for chunk in entry["2_coord"]:
                x, y = zip(*((float(x), float(y)) for x, y in chunk["coord"]))
                words.append((str(chunk["chunk"]), (min(x), min(y), max(x), max(y))))
            image = open_image(self.folder / entry["image_name"])
        except (KeyError, TypeError, ValueError) as error:
            name = entry.get("id", i) if isinstance(entry, dict) else i
            reason = str(error).removeprefix("--image ")
            raise ValueError(f"entry {name}: {type(error).__name__} {reason}") from None
        return image, words, " ".join(text for text, _ in words)


@dataclass
class Sets:
    """Pages that follow one another, `size` at a time: the images of one prompt, which are counted
    as one page from here on."""
    pages: object
    size: int

    def __len__(self):
        return -(-len(self.pages) // self.size)

    def __getitem__(self, i):
        """(images, the words of each, transcript) of prompt i."""
        first = i * self.size
        images, words, texts = zip(*(self.pages[j] for j in range(
            first, min(first + self.size, len(self.pages)))))
        return images, words, "\n".join(texts)
