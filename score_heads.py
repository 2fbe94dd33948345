"""Find the visual heads: which attention heads look at the text that is being written?

    python score_heads.py [--model DIR_OR_HUB_ID] [--num 200] [--out FILE]

OCR is the anchor task (arXiv 2506.05344, "Visual Head Identification"): of each token y_i of a
page's transcript it is known where on the page its word stands, so it is known which image tokens
I_i show it.

    page                     transcript         one head's attention while "48.20" is written
    .-----------------.
    | Coffee     3.50 |      Coffee 3.50        . . . . . . . .
    | Total  [ 48.20 ]|      Total 48.20        . . . . . # o .    arg-max in the box: a hit
    '-----------------'

A head scores a hit when the arg-max of its attention row, over all keys, falls in I_i. A hit adds
1/|I_i|, so that a small box counts more. The row is that of the query that emits y_i, which stands
at y_{i-1}. Given the transcript (teacher forcing), one forward pass over prompt and transcript has
every row that is needed, and no other row is ever computed.

NOTE(paper): its figure can be read as the row of y_i's own query; the authors' code agrees with us.
NOTE(official): there, box edges are divided by an integer tile size; our rectangles are exact.
NOTE(official): there, a token counts only if its text occurs in one box alone; we align.

Letters: L layers, H query heads, G KV heads, T tokens, D head size, P prompt tokens, n tokens of
the transcript.
"""

import json
import os
import random
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import torch
from tqdm import tqdm

from cache import read_head_scores
from experiments.pages import KINDS, render_page
from model_llava import GRID, load, prepare
from sparsemm import SCORES_FILE, OneLineParser, add_model_arguments, whole_number

OCR_PROMPT = "Provide all the OCR results of this image."


class PeakReader:
    """Stands where a cache would, and of each layer that passes by keeps where the last `rows`
    queries of every head look most."""

    def __init__(self, rows):
        self.rows, self.layers = rows, []                       # layers: for each (H, rows) int64

    def __len__(self):
        return len(self.layers)

    def compress(self, layer, q, k, v):
        """q: (H, T, D), k: (G, T, D), after RoPE. (The softmax does not move a maximum.)"""
        (H, T, _), G = q.shape, k.shape[0]
        future = torch.ones(self.rows, T, dtype=torch.bool, device=q.device).triu(T - self.rows + 1)
        peaks = []
        for h in range(H):
            logits = q[h, -self.rows:].float() @ k[h * G // H].float().T               # (rows, T)
            peaks.append(logits.masked_fill(future, -torch.inf).argmax(-1))
        self.layers.append(torch.stack(peaks))


def align_tokens(pieces, words):
    """Which word each token of a transcript belongs to: for each an index into words, or None.

    pieces: the text of each token; words: the texts of the boxes in reading order. The two are
    aligned over their characters, spaces left out, and a token belongs to the word that holds most
    of its matched characters. So a repeated word counts, and a faulty transcript where it is right.
    """
    written = [(c, i) for i, piece in enumerate(pieces) for c in piece if not c.isspace()]
    printed = [(c, j) for j, word in enumerate(words) for c in word if not c.isspace()]
    matcher = SequenceMatcher(None, *([c for c, _ in text] for text in (written, printed)),
                              autojunk=False)
    votes = [{} for _ in pieces]
    for a, b, size in matcher.get_matching_blocks():
        for (_, i), (_, j) in zip(written[a:a + size], printed[b:b + size]):
            votes[i][j] = votes[i].get(j, 0) + 1
    return [max(vote, key=vote.get) if vote else None for vote in votes]


def tokens_in_box(image, box):
    """Indices of the grid tokens of image (ImageTokens) whose rectangle overlaps box (x0, y0, x1,
    y1) with positive area."""
    x0, y0, x1, y1 = image.boxes.unbind(1)
    width = x1.clamp(max=box[2]) - x0.clamp(min=box[0])
    height = y1.clamp(max=box[3]) - y0.clamp(min=box[1])
    return ((image.kinds == GRID) & (width > 0) & (height > 0)).nonzero()[:, 0]


def force(prompt, ids):
    """The prompt with a transcript's token ids after it."""
    ids, first = prompt.ids.new_tensor(ids), int(prompt.positions.max()) + 1
    positions = torch.arange(first, first + len(ids)).to(prompt.positions).expand(3, -1)
    return replace(prompt, ids=torch.cat([prompt.ids, ids]),
                   positions=torch.cat([prompt.positions, positions], dim=1))


@torch.inference_mode()
def score_page(model, image, words, transcript):
    """The visual scores of all heads on one page, (L, H) float64, and how many tokens counted.

    image: PIL image; words: [(text, box), ...] in reading order; transcript: the text to force.
    """
    prompt, tokenizer = prepare(model, [image], OCR_PROMPT), model.processor.tokenizer
    ids = tokenizer(transcript, add_special_tokens=False).input_ids                          # (n,)
    reader = PeakReader(len(ids) + 1)                    # rows P-1 ... P-1+n; row P-1+i emits y_i
    model.hidden_states(force(prompt, ids), reader)
    peaks = torch.stack(reader.layers).cpu()                                         # (L, H, n + 1)
    regions = [tokens_in_box(prompt.images[0], box) + prompt.starts[0] for _, box in words]
    belongs = align_tokens([tokenizer.decode([i]) for i in ids], [text for text, _ in words])
    scores, counted = torch.zeros(peaks.shape[:2], dtype=torch.float64), 0
    for i, word in enumerate(belongs):
        if word is not None and len(regions[word]) > 0:
            scores += torch.isin(peaks[:, :, i], regions[word]) / len(regions[word])
            counted += 1
    return scores, counted


def score_rendered(model, num, seed, size):
    """Scores `num` rendered pages of the given (width, height). Returns a list of (L, H) tensors,
    one for each page, and the number of tokens counted."""
    per_page, counted = [], 0
    for i in tqdm(range(num), unit="page"):
        rng = random.Random(f"score heads {seed} {i}")
        page = render_page(rng, KINDS[i % len(KINDS)], *size)
        words = [(word.text, word.box) for line in page.lines for word in line]
        scores, tokens = score_page(model, page.image, words, page.text)
        per_page.append(scores)
        counted += tokens
    return per_page, counted


def write_scores(per_page, path):
    """Writes {"layer-head": [one number per page]}, the authors' format, all of it or nothing."""
    L, H = per_page[0].shape
    table = {f"{l}-{h}": [round(scores[l, h].item(), 6) for scores in per_page]
             for l in range(L) for h in range(H)}
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(table) + "\n")
    os.replace(temporary, path)


def summary(s):
    """Text: the ten best heads of s (L, H), which sums to 1, and what the best ones hold."""
    values, order = s.flatten().sort(descending=True)
    lines = ["layer  head   share"]
    lines += [f"{i // s.shape[1]:5d} {i % s.shape[1]:5d} {value:7.2%}"
              for value, i in zip(values[:10].tolist(), order.tolist())]
    for part in (0.01, 0.05, 0.10):
        n = max(1, round(part * len(values)))
        lines.append(f"top {part:4.0%}, {n} of {len(values)} heads: {values[:n].sum():.1%}")
    return "\n".join(lines)


def main(argv=None):
    parser = OneLineParser(prog="score_heads.py",
                           description="Count how often each head looks at the text being written.")
    parser.add_argument("--num", type=whole_number(1), default=200, help="pages (default 200)")
    parser.add_argument("--width", type=whole_number(32), default=256, help="of a page, in pixels")
    parser.add_argument("--height", type=whole_number(32), default=384, help="of a page, in pixels")
    parser.add_argument("--out", metavar="FILE",
                        help=f"default: {SCORES_FILE} in the model's folder")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    try:
        model = load(args.model, args.device, args.dtype)
    except ValueError as error:
        parser.error(error)
    out = Path(args.out or model.folder / SCORES_FILE)
    per_page, counted = score_rendered(model, args.num, args.seed, (args.width, args.height))
    if sum(per_page).sum() == 0:
        parser.error(f"argument --model: no head of {args.model} looked at the text even once")
    write_scores(per_page, out)
    print(f"{args.num} pages, {counted:,} tokens counted; wrote {out}")
    print(summary(read_head_scores(out, model.config.layers, model.config.heads)))


if __name__ == "__main__":
    main()
