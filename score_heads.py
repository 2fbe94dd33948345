"""Find the visual heads: which attention heads look at the text that is being written?

    python score_heads.py [--model DIR_OR_HUB_ID] [--data FILE.json | --synthetic KIND] [--num 1000]
    torchrun --nproc-per-node 8 -- score_heads.py ...               shares the pages among 8 GPUs

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
every row that is needed, and no other row is ever computed. The transcript is the model's own, or
with --transcript truth what the page says; what the page says also makes it quick to find out what
the model writes (`write`).

NOTE(paper): its figure can be read as the row of y_i's own query; the authors' code agrees with us.
NOTE(official): there, every token of the transcript takes a forward pass of its own.
NOTE(official): there, box edges are divided by an integer tile size; our rectangles are exact.
NOTE(official): there, a token counts only if its text occurs in one box alone (--match unique); we
align transcript and boxes, so that repeated words count, and a faulty transcript where it is right.

Letters: L layers, H query heads, G KV heads, T tokens, D head size, P prompt tokens, n tokens of
the transcript.
"""

import json
import math
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cache import read_head_scores
from experiments.arguments import (OneLineParser, add_model_arguments, output_file, png_file,
                                   whole_number)
from experiments.drafts import write
from experiments.pages import KINDS
from experiments.progress import Progress, gather, rank_and_ranks, write_json
from experiments.sources import Annotated, Rendered, Sets
from model_llava import GRID, load, prepare, rotary_angles
from sparsemm import SCORES_FILE

OCR_PROMPT = "Provide all the OCR results of this image."
LIMIT = 1024                    # so many tokens does a model write at most
PEAK_ROWS = 64                  # of so many tokens are the attention logits held at once


# ---- one transcript ------------------------------------------------------------------------------

class Reading:
    """A KV cache of everything, which stands where a cache.KVCache would and also keeps the queries
    from position `first` on. It takes several tokens at a time, `room` in all, and forgets those
    that are cut off again."""

    by_head = False

    def __init__(self, first, room=0):
        self.first, self.room, self.length = first, room, 0
        self.layers = []             # of each q (H, T - first, D) and k, v (G, T, D), after RoPE

    def __len__(self):
        return len(self.layers)

    def compress(self, layer, q, k, v):
        self.length = k.shape[1]
        self.layers.append([F.pad(x, (0, 0, 0, self.room)) for x in (q[:, self.first:], k, v)])

    def append(self, layer, k, v):
        new = slice(self.length, self.length + k.shape[1])
        self.layers[layer][1][:, new], self.layers[layer][2][:, new] = k, v

    def attend(self, layer, q):
        """q: (H, n, D), of the last n tokens. Returns (H, n, D)."""
        (H, n, D), (queries, k, v), T = q.shape, self.layers[layer], self.length + q.shape[1]
        queries[:, self.length - self.first:T - self.first] = q
        p = (attention_logits(q, k[:, :T]) / math.sqrt(D)).softmax(-1).to(v.dtype)      # (H, n, T)
        return (p.view(len(v), -1, T) @ v[:, :T]).view(H, n, D)

    def cut(self, T):
        """Leaves the first T tokens."""
        self.length = T

    def peaks(self):
        """Where every head looks most from each position on from `first`: (L, H, T - first) int64,
        on the CPU. (The softmax does not move a maximum.) Some rows at a time: their logits stay in
        a processor's cache, those of all would be written to memory and read again; and the keys
        behind the last of them are left out."""
        peaks = []
        for q, k, _ in self.layers:
            found = []
            for start in range(self.first, self.length, PEAK_ROWS):
                end = min(start + PEAK_ROWS, self.length)
                rows = q[:, start - self.first:end - self.first]
                found.append(argmax(attention_logits(rows, k[:, :end])))
            peaks.append(torch.cat(found, 1).cpu())
        return torch.stack(peaks)


def attention_logits(q, k):
    """Of the last n queries, causal, not divided by sqrt(D). q: (H, n, D), k: (G, T, D). Returns
    (H, n, T) float32. Of bfloat16 numbers a CPU's units for them make the same exact products, and
    add them up in float32, in less time than its others do."""
    (H, n, D), (G, T, _) = q.shape, k.shape
    units = "bf16" if q.dtype == torch.bfloat16 else "none"
    with torch.backends.mkldnn.flags(enabled=True, allow_tf32=None, fp32_precision=units):
        logits = q.reshape(G, -1, D).float() @ k.float().transpose(1, 2)            # (G, H/G*n, T)
    future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    logits.view(H, n, T)[:, :, T - n:].masked_fill_(future, -torch.inf)
    return logits.view(H, n, T)


def argmax(x):
    """x: (..., n) -> (...). On a CPU numpy's takes a fifteenth of the time that torch's does."""
    return torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)


def align_tokens(pieces, words):
    """Which word each token of a transcript belongs to: for each an index into words, or None.

    pieces: the text of each token; words: the texts of the boxes in reading order. The two are
    aligned over their characters, spaces left out, and a token belongs to the word that holds most
    of its matched characters.
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


def unique_tokens(pieces, words):
    """As align_tokens, by the authors' rule: a token belongs to the only word that contains it."""
    found = [[j for j, word in enumerate(words) if piece.strip() and piece.strip() in word]
             for piece in pieces]
    return [places[0] if len(places) == 1 else None for places in found]


MATCHES = {"aligned": align_tokens, "unique": unique_tokens}


def tokens_in_box(image, box):
    """Indices of the grid tokens of image (ImageTokens) whose rectangle overlaps box (x0, y0, x1,
    y1) with positive area."""
    x0, y0, x1, y1 = image.boxes.unbind(1)
    width = x1.clamp(max=box[2]) - x0.clamp(min=box[0])
    height = y1.clamp(max=box[3]) - y0.clamp(min=box[1])
    return ((image.kinds == GRID) & (width > 0) & (height > 0)).nonzero()[:, 0]


@torch.inference_mode()
def score_transcript(model, images, words, ids, match="aligned", question=OCR_PROMPT, own=False,
                     limit=LIMIT):
    """The visual scores of all heads on one transcript, of a page or of several.

    images: PIL images; words: for each of them [(text, box), ...] in reading order; ids: the
    transcript's tokens (n,); match: which tokens count; question: what the transcript is the answer
    to; own: score what the model itself would write, `limit` tokens at most, for which ids are but
    a draft. Returns scores (L, H) float64, the number of tokens that counted, and the number of
    hits.
    """
    prompt, tokenizer = prepare(model, images, question), model.processor.tokenizer
    model.check_length(len(prompt.ids), limit if own else len(ids))
    reading = Reading(first=len(prompt.ids) - 1, room=limit if own else 0)   # P-1+i emits y_i
    if own:
        ids = write(model, prompt, reading, ids, limit)
    else:
        read(model, prompt.extended(ids), reading)
    texts = [text for page in words for text, _ in page]
    boxes = [(image, start, box) for image, start, page in zip(prompt.images, prompt.starts, words)
             for _, box in page]
    shown = torch.zeros(len(boxes), reading.length, dtype=torch.bool)     # word j by position t?
    for j, (image, start, box) in enumerate(boxes):
        shown[j, tokens_in_box(image, box) + start] = True
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in set(ids)}
    owners = MATCHES[match]([piece[i] for i in ids], texts)
    counted = [i for i, word in enumerate(owners) if word is not None and shown[word].any()]
    regions = shown[[owners[i] for i in counted]]                                           # (m, T)
    hits = regions[torch.arange(len(counted)), reading.peaks()[:, :, counted]]           # (L, H, m)
    return (hits.double() / regions.sum(1)).sum(-1), len(counted), int(hits.sum())


def read(model, prompt, reading):
    """Prefill, without what follows the last layer's queries and keys: nothing asks for it."""
    *layers, last = model.decoder.layers
    x = model.embed(prompt)                                                                 # (T, E)
    cos, sin = (angle.to(x.dtype) for angle in rotary_angles(prompt.positions, model.config))
    for l, layer in enumerate(layers):
        x = layer(x, cos, sin, l, reading)
    reading.compress(len(layers), *last.self_attn.project(last.input_layernorm(x), cos, sin))


# ---- many pages ----------------------------------------------------------------------------------

def score_pages(model, pages, progress, done, rank, ranks, match, whose, every=10):
    """Scores the pages rank, rank + ranks, ... that are not done yet, and saves now and then.
    Returns the errors of the pages that could not be read."""
    errors = {}
    mine = [i for i in range(rank, len(pages), ranks) if str(i) not in done]
    for count, i in enumerate(tqdm(mine, unit="page", disable=rank > 0), 1):
        try:
            images, words, text = pages[i]
        except ValueError as error:
            errors[i] = str(error)
            continue
        ids = model.processor.tokenizer(text, add_special_tokens=False).input_ids
        scores, tokens, hits = score_transcript(model, images, words, ids, match,
                                                own=whose == "model")
        progress.pages[str(i)] = dict(scores=scores.flatten().tolist(), tokens=tokens, hits=hits)
        if count % every == 0 or count == len(mine):
            progress.save()
    return errors


def write_scores(per_page, path):
    """Writes {"layer-head": [one number per page]}, the authors' format. per_page: (L, H) each."""
    L, H = per_page[0].shape
    write_json({f"{l}-{h}": [round(float(scores[l, h]), 6) for scores in per_page]
                for l in range(L) for h in range(H)}, path)


# ---- the command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = OneLineParser(
        prog="score_heads.py",
        description="Count how often each head looks at the text that is being written.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE", help="annotated pages: SynthDoG-detection's JSON")
    source.add_argument("--synthetic", choices=("all", *KINDS), default="all",
                        help="which pages to render if there is no --data (default all)")
    parser.add_argument("--num", type=whole_number(1), default=1000, help="pages (default 1000)")
    parser.add_argument("--images", type=whole_number(1), default=1, metavar="N",
                        help="pages in one prompt, transcribed one after the other (default 1)")
    parser.add_argument("--width", type=whole_number(32), default=256, help="rendered page, pixels")
    parser.add_argument("--height", type=whole_number(32), default=384, help="(default 256 x 384)")
    parser.add_argument("--transcript", choices=("model", "truth"), default="model",
                        help="whose transcript is forced (default: the model's own)")
    parser.add_argument("--match", choices=tuple(MATCHES), default="aligned",
                        help="which tokens count (default: all that can be aligned with a box)")
    parser.add_argument("--out", type=output_file, metavar="FILE",
                        help=f"default: {SCORES_FILE} in the model's folder")
    parser.add_argument("--heatmap", type=png_file, metavar="PNG",
                        help="also draw a layer x head map")
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    add_model_arguments(parser)
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_arguments(argv)
    rank, ranks = rank_and_ranks(args)
    kinds = KINDS if args.synthetic == "all" else (args.synthetic,)
    name = Path(args.model).name if Path(args.model).is_dir() else args.model
    settings = dict(model=name, data=args.data, synthetic=None if args.data else kinds,
                    size=[args.width, args.height], seed=args.seed, match=args.match,
                    transcript=args.transcript, dtype=args.dtype, images=args.images)
    settings = json.loads(json.dumps(settings))                     # as they come back from a file
    try:
        pages = (Annotated(args.data, args.num) if args.data else
                 Rendered(kinds, args.seed, (args.width, args.height), args.num))
        pages = Sets(pages, args.images)
        model = load(args.model, args.device, args.dtype)
        out = args.out or model.folder / SCORES_FILE
        progress, done = Progress.resume(out, rank, settings, args.resume)
        errors = score_pages(model, pages, progress, done, rank, ranks, args.match, args.transcript)
        for pages_of_rank, errors_of_rank in gather((progress.pages, errors)):
            done |= pages_of_rank
            errors |= errors_of_rank
        if rank == 0:
            finish(args, model, out, settings, len(pages), done, errors)
    except ValueError as error:
        parser.error(error)


def finish(args, model, out, settings, num, done, errors):
    """Writes the score file, its sidecar and the heat map, and prints what they say."""
    (L, H), done = (model.config.layers, model.config.heads), dict(done)
    chosen = [done[str(i)] for i in range(num) if str(i) in done]
    for i, error in sorted(errors.items())[:10]:
        print(f"skipped page {i}: {error}")
    tokens, hits = (sum(page[what] for page in chosen) for what in ("tokens", "hits"))
    if hits == 0:
        raise ValueError(f"no head of {args.model} looked at a word while writing it: "
                         f"{len(chosen)} of {num} pages could be read, {tokens} tokens counted")
    write_scores([torch.tensor(page["scores"]).view(L, H) for page in chosen], out)
    write_json(dict(settings, pages=len(chosen), skipped=len(errors), tokens=tokens, hits=hits),
               out.with_suffix(".about.json"))
    for part in out.parent.glob(f"{out.name}.part*[0-9]"):
        part.unlink()
    s = read_head_scores(out, L, H)
    unit = "pages" if args.images == 1 else f"prompts of {args.images} pages"
    print(f"{len(chosen)} {unit}, {len(errors)} skipped, {tokens:,} tokens counted ({args.match}); "
          f"wrote {out}")
    from experiments.draw import heat_map, summary
    print(summary(s))
    if args.heatmap:
        heat_map(s, args.heatmap, f"{settings['model']}: visual scores, {len(chosen)} pages")


if __name__ == "__main__":
    main()
