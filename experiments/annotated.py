"""Annotated pages from a file, for score_heads.py --data."""

import json
from pathlib import Path

from sparsemm import open_image


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
