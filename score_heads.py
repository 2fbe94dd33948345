"""Find the visual heads: which attention heads look at the text that is being written?

    python score_heads.py [--model DIR_OR_HUB_ID] [--data FILE.json] [--num 1000]
    torchrun --nproc-per-node 8 -- score_heads.py ...               shares the pages among 8 GPUs

OCR is the anchor task (arXiv 2506.05344, "Visual Head Identification"). For every token y_i of a
page's transcript we know its word and the word's box, hence the set I of image tokens that show it.

    page                     transcript         one head's attention while "48.20" is written
    .-----------------.
    | Coffee     3.50 |      Coffee 3.50        . . . . . . . .
    | Total  [ 48.20 ]|      Total 48.20        . . . . . # o .    arg-max in the box: a hit
    '-----------------'

A head scores a hit if the arg-max of its attention row, over all keys, falls in I. The row is that
of the query at y_{i-1}, which emits y_i: before y_i is written, looking at its word helps to write
it. A hit adds 1/|I|: a random arg-max hits a word in proportion to |I|, which 1/|I| cancels. With
teacher forcing, one forward pass over prompt and transcript has every row that is needed. The
transcript is the model's own, or with --transcript truth the page's text.

NOTE(paper): its figure can be read as the row of y_i's own query; the authors' code agrees with us.
NOTE(official): there, every token of the transcript takes a forward pass of its own.
NOTE(official): there, box edges are divided by an integer tile size; our rectangles are exact.
NOTE(official): there, a token counts only if its text occurs in one box alone. We align transcript
and boxes, so that repeated words and the correct parts of a faulty transcript count.

Letters: L layers, H query heads, G KV heads, R = H/G, T tokens, D head size, P prompt tokens, n
tokens of the transcript.
"""

import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from datetime import timedelta
from difflib import SequenceMatcher
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cache import Method, attention_logits, read_head_scores, reading
from model_llava import GRID, load, open_image, prefill_attention, prepare
from sparsemm import (SCORES_FILE, OneLineParser, about_file, add_model_arguments, check_output,
                      generate, out_of_memory, write_json)

OCR_PROMPT = "Provide all the OCR results of this image."
LIMIT = 1024                    # most tokens of a transcript


# ---- one page ------------------------------------------------------------------------------------

def transcribe(model, image, question=OCR_PROMPT, limit=LIMIT):
    """The transcript that the model itself writes: token ids (n,), without the end token."""
    ids = generate(model, [image], question, Method("full"), limit)["token_ids"]
    return [token for token in ids if token not in model.processor.end_tokens]


@torch.inference_mode()
def score_transcript(model, image, words, ids, question=OCR_PROMPT):
    """The visual scores of all heads on one page: scores (L, H) float64, how many tokens counted,
    and how many hits there were.

    image: a PIL image; words: [(text, box), ...] in reading order, boxes (x0, y0, x1, y1) in
    pixels; ids: the transcript's tokens (n,); question: what the transcript answers.
    """
    prompt, tokenizer = prepare(model, [image], question), model.processor.tokenizer
    model.check_length(len(prompt.ids), len(ids))
    peaks = attention_peaks(model, prompt, ids)                                          # (L, H, n)
    shown = torch.zeros(len(words), len(prompt.ids) + len(ids), dtype=torch.bool)
    for j, (_, box) in enumerate(words):                     # shown[j, t]: position t shows word j
        shown[j, tokens_in_box(prompt.images[0], box) + prompt.starts[0]] = True
    piece = {i: tokenizer.decode([i], skip_special_tokens=True) for i in set(ids)}
    owners = align_tokens([piece[i] for i in ids], [text for text, _ in words])
    counted = [i for i, word in enumerate(owners) if word is not None and shown[word].any()]
    regions = shown[[owners[i] for i in counted]]                                           # (m, T)
    hits = regions[torch.arange(len(counted)), peaks[:, :, counted]]                     # (L, H, m)
    return (hits.double() / regions.sum(1)).sum(-1), len(counted), int(hits.sum())


def attention_peaks(model, prompt, ids):
    """Where every head looks most while it emits each token of the transcript ids (n,): (L, H, n)
    int64, on the CPU. Row P-1+i emits token i, so the last token is not fed in."""
    P, n, peaks = len(prompt.ids), len(ids), []

    def attend(layer, q, k, v):                            # (H, P+n-1, D), (G, P+n-1, D), the same
        groups = q[:, P - 1:].unflatten(0, (len(k), -1))                              # (G, R, n, D)
        rows = [attention_logits(q_g, k_g).max(-1) for q_g, k_g in zip(groups, k)]
        if not all(row.values.isfinite().all() for row in rows):
            raise ValueError(f"attention is not finite in {model.dtype}; use another --dtype")
        peaks.append(torch.cat([row.indices for row in rows]).cpu())                        # (H, n)
        return prefill_attention(q, k, v)

    model.hidden_states(prompt.extended(ids[:-1]), attend)
    return torch.stack(peaks)[:, :, :n]


def align_tokens(pieces, words):
    """The word to which each token of a transcript belongs: indices into words, or None.

    pieces: the text of each token; words: the texts of the boxes in reading order. Both are aligned
    over their characters, without spaces. A token belongs to the word that holds most of its
    matched characters.
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
    """I: indices of the grid tokens of an image (ImageTokens) whose rectangle overlaps the box (x0,
    y0, x1, y1) with positive area. Thumbnail tokens do not count: each shows many words."""
    x0, y0, x1, y1 = image.boxes.unbind(1)
    width = x1.clamp(max=box[2]) - x0.clamp(min=box[0])
    height = y1.clamp(max=box[3]) - y0.clamp(min=box[1])
    return ((image.kinds == GRID) & (width > 0) & (height > 0)).nonzero()[:, 0]


# ---- many pages, shared among processes, and the command -----------------------------------------

class Annotated(list):
    """Pages of a JSON file in the layout of SynthDoG-detection: a list of {"id", "image_name",
    "2_coord": [{"chunk": text, "coord": [[x, y], ...]}, ...]}, coordinates in pixels. Other OCR and
    detection sets fit in, with a class name for the chunk. Images lie beside the file."""

    def __init__(self, path, num):
        with reading(f"--data {path}: must be a JSON list of pages"):
            super().__init__(json.loads(Path(path).read_text(encoding="utf-8"))[:max(0, num)])
        self.folder = Path(path).parent

    def __getitem__(self, i):
        """(PIL image, [(text, box), ...], transcript) of page i, or ValueError that names it."""
        entry, words = super().__getitem__(i), []
        with reading(f"entry {entry.get('id', i) if isinstance(entry, dict) else i}"):
            for chunk in entry["2_coord"]:
                x, y = zip(*((float(x), float(y)) for x, y in chunk["coord"]))
                words.append((str(chunk["chunk"]), (min(x), min(y), max(x), max(y))))
            image = open_image(self.folder / entry["image_name"])
        return image, words, " ".join(text for text, _ in words)


def score_pages(model, pages, journal, process, processes, whose):
    """Scores the pages process, process + processes, ... that are not in the journal yet. Returns
    the errors of those that cannot be read or used, {page number: text}."""
    errors = {}
    for i in tqdm(range(process, len(pages), processes), unit="page", disable=process > 0):
        if str(i) in journal.done:
            continue
        try:
            image, words, text = pages[i]
            ids = model.processor.tokenizer(text, add_special_tokens=False).input_ids
            if whose == "model":
                ids = transcribe(model, image)
            scores, tokens, hits = score_transcript(model, image, words, ids)
        except (ValueError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ValueError) or out_of_memory(error)):
                raise
            errors[i] = " ".join(str(error).split()) or "too little memory"
            continue
        journal.add(i, dict(scores=scores.flatten().tolist(), tokens=tokens, hits=hits))
    return errors


def write_scores(per_page, path):
    """Writes {"layer-head": [one number per page]}, the authors' format. per_page: (L, H) each."""
    L, H = per_page[0].shape
    write_json({f"{l}-{h}": [float(scores[l, h]) for scores in per_page]
                for l in range(L) for h in range(H)}, path)


class Journal:
    """What a long run has done: a file of JSON lines beside its result, first the settings, then a
    line for each finished piece. The same command resumes after a kill. Each process of a run
    writes a file of its own, {out}.journal0, 1, ..., and reads all of them."""

    def __init__(self, out, settings, process=0):
        """out: path of the result; settings: all that the work depends on. Raises ValueError if
        there is work that was done with other settings."""
        self.own, self.out, self.done = f"{out}.journal{process}", out, {}
        self.first = ["settings", json.loads(json.dumps(settings))]
        for path in self.paths():
            first, *rest = self.lines(path)
            if rest and first != self.first:
                raise ValueError(f"{path}: has other settings; delete it, or use another --out")
            if not rest and path == self.own:
                os.unlink(path)                                     # it holds settings at most
            self.done |= dict(rest)                                 # key (text) -> what was added

    @staticmethod
    def lines(path):
        """A journal's lines, except those that a kill has cut."""
        lines = []
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(line))
        return lines or [None]

    def paths(self):
        return sorted(glob.glob(f"{glob.escape(str(self.out))}.journal[0-9]*"))

    def add(self, key, value):
        """Writes a line, its line break first: a line that a kill has cut spoils only itself."""
        lines = [] if os.path.exists(self.own) else [self.first]
        with open(self.own, "a", encoding="utf-8") as file:
            file.writelines("\n" + json.dumps(line) for line in (*lines, [str(key), value]))
        self.done[str(key)] = value

    def remove(self):
        """Ends the run: its result is written."""
        for path in self.paths():
            os.unlink(path)


def fingerprint(model):
    """A checksum (text) that changes with the weights: of the first 100 numbers of each tensor."""
    numbers = torch.cat([w.flatten()[:100].float() for w in model.parameters()])
    return hashlib.sha256(numbers.cpu().numpy().tobytes()).hexdigest()[:16]


def process_and_processes(args):
    """The number of this process and the number of processes: 0 and 1 unless torchrun started it.
    On GPUs, args.device becomes the process's own."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{dist.get_node_local_rank()}"
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def gather(own):
    """What every process has, in order; they may come hours apart. The process group is destroyed
    at once, since its threads can make Python abort at exit."""
    if not dist.is_torchelastic_launched():
        return [own]
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    dist.destroy_process_group()
    return gathered


def gini(values):
    """Gini coefficient of non-negative values: 0 if all are alike, near 1 if one holds all."""
    x, n = values.flatten().sort().values, values.numel()
    return (2 * (torch.arange(1, n + 1) * x).sum() / (n * x.sum()) - (n + 1) / n).item()


def top_share(values, part):
    """(the number of values in the top `part`, their share of the sum)."""
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


def score(args):
    """What the command does."""
    if args.data is not None:
        pages = Annotated(args.data, args.num)
    else:
        from experiments.pages import KINDS, Rendered
        pages = Rendered(KINDS, args.seed, (args.width, args.height), args.num)
    process, processes = process_and_processes(args)
    model = load(args.model, args.device, args.dtype)
    out = model.folder / SCORES_FILE if args.out is None else Path(args.out)
    for path in (out, about_file(out)):
        check_output(path, "--out", inputs=[args.data])
    data = args.data and hashlib.sha256(Path(args.data).read_bytes()).hexdigest()[:16]
    settings = dict(model=model.name, data=args.data, data_checksum=data, seed=args.seed,
                    size=[args.width, args.height], transcript=args.transcript, dtype=args.dtype,
                    weights=fingerprint(model))
    journal = Journal(out, settings, process)
    try:
        errors = score_pages(model, pages, journal, process, processes, args.transcript)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {len(journal.done)} pages are saved, the same command "
                                "goes on") from None
    done = {}
    for done_by_one, errors_of_one in gather((journal.done, errors)):
        done |= done_by_one
        errors |= errors_of_one
    if process > 0:
        return
    L, H = model.config.layers, model.config.heads
    chosen = [done[str(i)] for i in sorted(map(int, done)) if i < len(pages)]
    errors = [f"page {i}: {error}" for i, error in sorted(errors.items())]
    tokens, hits = (sum(page[what] for page in chosen) for what in ("tokens", "hits"))
    if not hits:
        journal.remove()
        raise ValueError(f"no head looked at a word while writing it: {len(chosen)} of {len(pages)}"
                         f" pages could be used, {tokens} tokens counted. {' '.join(errors[:1])}")
    write_scores([torch.tensor(page["scores"], dtype=torch.float64).view(L, H) for page in chosen],
                 out)
    write_json(dict(settings, pages=len(chosen), skipped=len(errors), tokens=tokens, hits=hits),
               about_file(out))
    journal.remove()
    print(*(f"skipped {error}" for error in errors[:10]),
          f"{len(chosen)} pages, {len(errors)} skipped, {tokens:,} tokens counted; wrote {out}",
          summary(read_head_scores(out, L, H)), sep="\n")


def main(argv=None):
    parser = OneLineParser("score_heads.py", description="Count how often each head looks at the "
                                                         "text that is being written.")
    add = parser.add_argument
    add("--data", metavar="FILE", help="SynthDoG-detection's JSON (default: pages are rendered)")
    add("--num", type=int, default=1000, help="pages (1000)")
    add("--width", type=int, default=256, help="rendered page, pixels (256)")
    add("--height", type=int, default=384, help="(384)")
    add("--transcript", choices=("model", "truth"), default="model", help="whose text is forced")
    add("--out", metavar="FILE", help=f"default: {SCORES_FILE} in the model's folder")
    add_model_arguments(parser)
    parser.run(score, argv)


if __name__ == "__main__":
    main()
