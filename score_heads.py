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

A head scores a hit when the arg-max of its attention row, over all keys, falls in I_i. The row is
that of the query that emits y_i, which stands at y_{i-1}. A hit adds 1/|I_i|: an arg-max that falls
anywhere by chance hits in proportion to |I_i|. Given the transcript (teacher forcing), one forward
pass over prompt and transcript has every row that is needed, and no other row is ever computed. The
transcript is the model's own, or with --transcript truth what the page says.

NOTE(paper): its figure can be read as the row of y_i's own query; the authors' code agrees with us.
NOTE(official): there, every token of the transcript takes a forward pass of its own.
NOTE(official): there, box edges are divided by an integer tile size; our rectangles are exact.
NOTE(official): there, a token counts only if its text occurs in one box alone (--match unique); we
align transcript and boxes, so that repeated words count, and a faulty transcript where it is right.

Letters: L layers, H query heads, G KV heads, T tokens, D head size, P prompt tokens, n tokens of
the transcript.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cache import OneLineParser, inside, read_head_scores, read_json, require
from model_llava import GRID, load, open_image, prefill_attention, prepare, weight_files
from sparsemm import SCORES_FILE, add_model_arguments, check_output, generate, write_json

try:
    import fcntl
except ImportError:                                     # not on Windows: nothing is locked there
    fcntl = None

OCR_PROMPT = "Provide all the OCR results of this image."
LIMIT = 1024                    # so many tokens does a model write at most


# ---- one transcript ------------------------------------------------------------------------------

def transcribe(model, images, question=OCR_PROMPT, limit=LIMIT):
    """What the model itself writes, greedily: token ids (n,), without the end token."""
    ids = generate(model, images, question, "full", max_new_tokens=limit)["token_ids"]
    return [token for token in ids if token not in model.processor.end_tokens]


@torch.inference_mode()
def score_transcript(model, images, words, ids, match="aligned", question=OCR_PROMPT):
    """The visual scores of all heads on one transcript, of a page or of several.

    images: PIL images; words: for each of them [(text, box), ...] in reading order; ids: the
    transcript's tokens (n,); match: which tokens count; question: what the transcript is the answer
    to. Returns scores (L, H) float64, the number of tokens that counted, and the number of hits.
    """
    prompt, tokenizer = prepare(model, images, question), model.processor.tokenizer
    model.check_length(len(prompt.ids), len(ids))
    peaks = attention_peaks(model, prompt, ids)                                          # (L, H, n)
    texts = [text for page in words for text, _ in page]
    boxes = [(image, start, box) for image, start, page in zip(prompt.images, prompt.starts, words)
             for _, box in page]
    shown = torch.zeros(len(boxes), len(prompt.ids) + len(ids), dtype=torch.bool)
    for j, (image, start, box) in enumerate(boxes):                # is word j shown by position t?
        shown[j, tokens_in_box(image, box) + start] = True
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in set(ids)}
    owners = MATCHES[match]([piece[i] for i in ids], texts)
    counted = [i for i, word in enumerate(owners) if word is not None and shown[word].any()]
    regions = shown[[owners[i] for i in counted]]                                           # (m, T)
    hits = regions[torch.arange(len(counted)), peaks[:, :, counted]]                     # (L, H, m)
    return (hits.double() / regions.sum(1)).sum(-1), len(counted), int(hits.sum())


def attention_peaks(model, prompt, ids):
    """Where every head looks most while it emits each token of the transcript ids (n,): (L, H, n)
    int64, on the CPU. Row P-1+i emits token i, so that the last token need not be read."""
    c, P, n, peaks = model.config, len(prompt.ids), len(ids), []

    def attend(layer, q, k, v):                            # (H, P+n-1, D), (G, P+n-1, D), the same
        largest, places = attention_logits(q[:, P - 1:], k).max(-1)
        require(torch.isfinite(largest).all(),
                f"layer {layer}: attention logits are not finite in {model.dtype}")
        peaks.append(places.cpu())
        return prefill_attention(q, k, v)

    if n:
        model.hidden_states(prompt.extended(ids[:-1]), attend)
    return torch.stack(peaks) if n else torch.zeros(c.layers, c.heads, 0, dtype=torch.long)


def attention_logits(q, k):
    """Of the last n queries, causal, not divided by sqrt(D), which moves no maximum. q: (H, n, D),
    k: (G, T, D). Returns (H, n, T) float32."""
    (H, n, D), (G, T, _) = q.shape, k.shape
    logits = q.reshape(G, -1, D).float() @ k.float().transpose(1, 2)                # (G, R * n, T)
    future = torch.ones(n, T, dtype=torch.bool, device=q.device).triu(T - n + 1)
    return logits.view(H, n, T).masked_fill_(future, -torch.inf)


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
    y1) with positive area. The thumbnail's do not count: one of them shows many words, and would
    tell no word apart."""
    x0, y0, x1, y1 = image.boxes.unbind(1)
    width = x1.clamp(max=box[2]) - x0.clamp(min=box[0])
    height = y1.clamp(max=box[3]) - y0.clamp(min=box[1])
    return ((image.kinds == GRID) & (width > 0) & (height > 0)).nonzero()[:, 0]


# ---- many pages ----------------------------------------------------------------------------------

class Annotated:
    """Pages of a JSON file in the layout of SynthDoG-detection: a list of {"id", "image_name",
    "2_coord": [{"chunk": text, "coord": [[x, y], ...]}, ...]}, coordinates in pixels. Other OCR and
    detection sets fit in, with a class name for the chunk. Images lie beside the file."""

    def __init__(self, path, num):
        entries = read_json(path, "--data")
        require(isinstance(entries, list) and entries, f"--data {path}: not a list of pages")
        self.folder, self.entries = Path(path).parent, entries[:num]

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        """(PIL image, [(text, box), ...], transcript) of page i. Raises ValueError that names an
        entry which cannot be read, or whose picture lies in no folder beside the file."""
        entry = self.entries[i]
        try:
            words = []
            for chunk in entry["2_coord"]:
                x, y = zip(*((float(x), float(y)) for x, y in chunk["coord"]))
                require(all(map(math.isfinite, x + y)), f"{chunk['coord']} is not finite")
                words.append((str(chunk["chunk"]), (min(x), min(y), max(x), max(y))))
            image = open_image(inside(self.folder, entry["image_name"]))
        except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
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
        numbers = range(len(self.pages))[i * self.size:(i + 1) * self.size]
        images, words, texts = zip(*(self.pages[j] for j in numbers))
        return images, words, "\n".join(texts)


def score_pages(model, pages, progress, process, processes, match, whose):
    """Scores the pages process, process + processes, ... that are not done yet, and saves each.
    Returns the errors of those that cannot be read or used, {page number: text}."""
    errors = {}
    for i in tqdm(range(process, len(pages), processes), unit="page", disable=process > 0):
        if str(i) in progress.done:
            continue
        try:
            images, words, text = pages[i]
            ids = model.processor.tokenizer(text, add_special_tokens=False).input_ids
            if whose == "model":
                ids = transcribe(model, images)
            scores, tokens, hits = score_transcript(model, images, words, ids, match)
        except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            errors[i] = " ".join(str(error).split())
            continue
        progress.save(i, dict(scores=scores.flatten().tolist(), tokens=tokens, hits=hits))
    return errors


def write_scores(per_page, path):
    """Writes {"layer-head": [one number per page]}, the authors' format. per_page: (L, H) each."""
    L, H = per_page[0].shape
    write_json({f"{l}-{h}": [float(scores[l, h]) for scores in per_page]
                for l in range(L) for h in range(H)}, path)


class Progress:
    """What is done so far: a line for each page, in a file beside the result for each process. What
    is written once is never written again, so that a run can be killed at any time."""

    def __init__(self, file, out, process, processes, settings, resume):
        """file: of this process, for appending. Raises ValueError if another run holds it, if there
        are pages that would be lost, or pages of other settings."""
        self.file, self.done = file, {}     # page number (text) -> {"scores": [L*H], "tokens", ...}
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)   # ends with the process
        except BlockingIOError:
            raise ValueError(f"--out {out}: another run is at work on it") from None
        for number, path in part_files(out).items():
            pages = read_part(path)
            made_with = pages.pop("settings", settings)
            if resume:
                require(made_with == settings,
                        f"--resume: {path} was made with other settings, weights or data; another "
                        "--out, or to delete that file, is right")
                self.done |= pages
            else:                                     # others may have begun with their own shares
                require(not pages or number < processes and number != process,
                        f"--out {out}: {len(pages)} pages are saved in {path}; --resume goes on "
                        "with them, another --out begins anew")
        self.write({"settings": settings})

    def save(self, i, page):
        self.done[str(i)] = page
        self.write({i: page})

    def write(self, content):
        """A line begins with its line break, which also ends one that was cut."""
        self.file.write("\n" + json.dumps(content))
        self.file.flush()


def part_files(out):
    """{number of a process: the file of its Progress} beside the result."""
    found = [(re.fullmatch(re.escape(out.name) + r"\.part(\d+)", path.name), path)
             for path in sorted(out.parent.iterdir())]
    return {int(match[1]): path for match, path in found if match}


def read_part(path):
    """The lines of a Progress's file, as one dict. Raises ValueError for a file of another kind."""
    content, lines = path.read_bytes(), {}
    require(content.startswith(b'\n{"settings": ') or not content,
            f"{path} is not a file of ours; another --out is right")
    for line in content.splitlines():
        try:
            lines |= json.loads(line)
        except ValueError:                                              # cut, or the empty first
            continue
    return lines


def checksum(paths):
    """Of files: a checksum (text) of their names and contents."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
    return digest.hexdigest()[:16]


# ---- several processes, each with a share of the pages -------------------------------------------

def process_and_processes(args):
    """This process's number and that of all: 0 and 1 unless torchrun started it. On GPUs
    args.device becomes its own."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{dist.get_node_local_rank()}"
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gather(own):
    """What every process has, in order. They may come hours apart. The process group lives no
    longer than that: the threads of one that is left can abort Python's end."""
    if not dist.is_torchelastic_launched():
        return [own]
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    dist.destroy_process_group()
    return gathered


# ---- the command ---------------------------------------------------------------------------------

def gini(values):
    """Gini coefficient of non-negative values: 0 if all are alike, near 1 if one holds all."""
    x, n = values.flatten().sort().values, values.numel()
    return (2 * (torch.arange(1, n + 1) * x).sum() / (n * x.sum()) - (n + 1) / n).item()


def top_share(values, part):
    """(how many values are the top `part` of them, what share of the sum these hold)."""
    n = max(1, round(part * values.numel()))
    return n, (values.flatten().sort(descending=True).values[:n].sum() / values.sum()).item()


def summary(s, shades=" .:-=+*#%@"):
    """Text: the ten best heads of s (L, H), which sums to 1, how concentrated it is over all heads
    and within each layer, and a map."""
    (L, H), lines = s.shape, ["layer  head   share"]
    for i in s.flatten().argsort(descending=True, stable=True)[:10].tolist():
        lines.append(f"{i // H:5d} {i % H:5d} {s[i // H, i % H]:7.2%}")
    for part in (0.01, 0.05, 0.10):
        n, held = top_share(s, part)
        lines.append(f"top {part:4.0%} ({n} of {L * H} heads) hold {held:.1%}")
    lines += [f"Gini coefficient {gini(s):.3f}", "",
              f"layer  share  top 1 %  5 %  10 %   heads 0 to {H - 1}"]
    for l in range(L):
        held = "  ".join(f"{top_share(s[l], part)[1]:4.0%}" if s[l].sum() > 0 else "   -"
                         for part in (0.01, 0.05, 0.10))
        cells = "".join(shades[min(len(shades) - 1, int(x * len(shades) / s.max()))] for x in s[l])
        lines.append(f"{l:5d} {s[l].sum():6.1%}   {held}   |{cells}|")
    return "\n".join(lines)


def argument_parser():
    parser = OneLineParser(
        prog="score_heads.py",
        description="Count how often each head looks at the text that is being written.")
    add, source = parser.add_argument, parser.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE", help="annotated pages: SynthDoG-detection's JSON")
    source.add_argument("--synthetic", default="all", metavar="KIND",
                        help="which pages to render if there is no --data (default all)")
    add("--num", type=int, default=1000, help="pages (default 1000)")
    add("--images", type=int, default=1, metavar="N", help="pages in one prompt (default 1)")
    add("--width", type=int, default=256, help="rendered page, pixels")
    add("--height", type=int, default=384, help="(default 256 x 384)")
    add("--transcript", choices=("model", "truth"), default="model",
        help="whose transcript is forced (default: the model's own)")
    add("--match", choices=tuple(MATCHES), default="aligned",
        help="which tokens count (default: all that can be aligned with a box)")
    add("--out", type=Path, metavar="FILE", help=f"default: {SCORES_FILE} in the model's folder")
    add("--heatmap", type=Path, metavar="PNG", help="also draw a layer x head map")
    add("--resume", action="store_true", help="go on where a run was stopped")
    add_model_arguments(parser)
    return parser


def find_pages(args):
    """The pages that are asked for: those of --data, or rendered ones, and what they are called in
    the sidecar. Raises ValueError for arguments that are out of range."""
    for option, value, least, most in (
            ("--num", args.num, 1, 10**9), ("--images", args.images, 1, 1000),
            ("--width", args.width, 32, 4096), ("--height", args.height, 32, 4096)):
        require(least <= value <= most, f"{option}: {value} is not between {least} and {most}")
    if args.data is not None:
        return Annotated(args.data, args.num), None
    try:
        from experiments.pages import KINDS
        from experiments.sources import Rendered
    except ImportError as error:
        raise ValueError(f"--data: is needed, since there is no page renderer ({error})") from None
    require(args.synthetic in ("all", *KINDS),
            f"--synthetic: {args.synthetic!r} is not one of all, {', '.join(KINDS)}")
    kinds = KINDS if args.synthetic == "all" else (args.synthetic,)
    return Rendered(kinds, args.seed, (args.width, args.height), args.num), kinds


def score(args):
    """What the command does."""
    if args.heatmap is not None:
        check_output(args.heatmap, "--heatmap", ".png", inputs=(args.data, args.out))
    if args.out is not None:                                        # before any work is done
        check_output(args.out, "--out", inputs=[args.data])
    pages, kinds = find_pages(args)
    process, processes = process_and_processes(args)
    pages = Sets(pages, args.images)
    model = load(args.model, args.device, args.dtype)
    out = args.out or model.folder / SCORES_FILE
    check_output(out, "--out", inputs=[args.data])
    settings = dict(model=model.name, data=args.data, synthetic=kinds and list(kinds),
                    size=[args.width, args.height], seed=args.seed, match=args.match,
                    transcript=args.transcript, dtype=args.dtype, images=args.images,
                    weights=checksum(weight_files(model.folder)),
                    data_checksum=args.data and checksum([args.data]))
    with open(f"{out}.part{process}", "a", encoding="utf-8") as file:
        progress = Progress(file, out, process, processes, settings, args.resume)
        try:
            errors = score_pages(model, pages, progress, process, processes, args.match,
                                 args.transcript)
        except KeyboardInterrupt:
            stopped = f"stopped; {len(progress.done)} pages are saved, --resume goes on"
            raise KeyboardInterrupt(stopped) from None
        done = {}
        for done_by_one, errors_of_one in gather((progress.done, errors)):
            done |= done_by_one
            errors |= errors_of_one
        if process == 0:
            finish(args, model, out, settings, len(pages), done, errors)


def finish(args, model, out, settings, num, done, errors):
    """Writes the score file, its sidecar and the heat map, and prints what they say."""
    L, H = model.config.layers, model.config.heads
    chosen = [done[str(i)] for i in sorted(map(int, done)) if i < num]
    errors = [f"page {i}: {error}" for i, error in sorted(errors.items())]
    require(chosen, f"none of the {num} pages can be used; {' '.join(errors[:1])}")
    tokens, hits = (sum(page[what] for page in chosen) for what in ("tokens", "hits"))
    require(hits, f"no head of {args.model} looked at a word while writing it: {len(chosen)} of "
                  f"{num} pages could be read, {tokens} tokens counted")
    write_scores([torch.tensor(page["scores"], dtype=torch.float64).view(L, H) for page in chosen],
                 out)
    write_json(dict(settings, pages=len(chosen), skipped=len(errors), tokens=tokens, hits=hits),
               out.with_suffix(".about.json"))
    for part in part_files(out).values():
        part.unlink()
    s = read_head_scores(out, L, H)
    unit = "pages" if args.images == 1 else f"prompts of {args.images} pages"
    print(*(f"skipped {error}" for error in errors[:10]),
          f"{len(chosen)} {unit}, {len(errors)} skipped, {tokens:,} tokens counted ({args.match}); "
          f"wrote {out}", summary(s), sep="\n")
    if args.heatmap:
        from experiments.draw import heat_map
        heat_map(s, args.heatmap, f"{settings['model']}: visual scores, {len(chosen)} pages")


def main(argv=None):
    argument_parser().run(score, argv)


if __name__ == "__main__":
    main()
