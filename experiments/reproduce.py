"""Rerun the paper's claims on the small models (or on real checkpoints), in one command.

    python experiments/reproduce.py [PART] [--model DIR ...] [--quick] [--out DIR]
    python experiments/reproduce.py published FILE ... [--kv-heads N]
    python experiments/reproduce.py results

    heads           how many heads look at the image, and how concentrated their scores are
    main            every method at every budget, by page size; what layers and what heads
                    contribute; answers written freely
    large           the same on pages of 512 x 512 pixels, with scores from the smaller ones
    ablation        window, uniform and score part; rho; the window's size
    masking         the visual heads switched off, against random ones
    robustness      scores from other kinds of pages, from detection, from fewer pages
    redistribution  what a head cannot hold; which tokens count
    beyond          changes to the method, chosen on other pages than they are tested on
    fastv           image tokens dropped in prefill (FastV), alone and before sparsemm
    all             all of these (the default)
    results         writes RESULTS.md beside --out, and the README's table, of what is stored
    published       how uneven the scores in some files are, the authors' or others; stored, too

Accuracy is the share of the right answer's tokens that are predicted from those before them, from
the second one on: the first always sees the full cache. Pages are drawn from seeds of their own
(`exercise`), held out from training and from scoring. Every figure has its 95 % interval (bootstrap
over pages); differences are paired, over the same pages. A claim has one figure for each task, at
the one budget that it names; the other budgets are in the part's tables. DIR/pages keeps the
results of single pages, so that a run that was stopped goes on where it was. The paper: arXiv
2506.05344.

Letters: L layers, H query heads, G KV heads, T prompt tokens.
"""

import json
import platform
import random
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, OneLineParser, kv_head_scores, read_head_scores
from experiments import fastv as pruning
from experiments.arguments import as_typed, output_folder, whole_number
from experiments.compress import (BY, Setting, drawn, forced_accuracy, head_sets, masked_accuracy,
                                  only_heads, only_layers, power_of_scores, prefill,
                                  rising_pyramid, within_layers, written)
from experiments.draw import line_charts
from experiments.evaluate_tiny import edit_distance, page_size
from experiments.metrics import anls
from experiments.pages import KINDS, prompt, render_page, tasks
from experiments.progress import machine_name
from experiments.report import (STRONGEST, claim, interval, negative, positive, results_page, show,
                                table, write_results)
from experiments.sources import Rendered
from model_llava import DTYPES, load, prepare
from score_heads import MATCHES, gini, score_transcript, top_share
from sparsemm import DEFAULT_MODEL, generate, write_file, write_json

HERE = Path(__file__).resolve().parent
SMALL_MODELS = (DEFAULT_MODEL, DEFAULT_MODEL.parent / "llava-next")
BUDGETS = (48, 64, 96, 128, 256, 512)                       # of the paper's ablation
TIGHT = BUDGETS[:3]
LARGE_PAGE = (512, 512)         # more than 1,000 image tokens for the small models
CLAIMED, ON_LARGE, NEARLY_FULL = 64, 128, 256      # the budgets that claims are made at
RIVALS = {      # what sparsemm is compared with in claims, and the paper's figures
    "snapkv": ("every head has the same budget",
               "+4 DocVQA, +6 OCRBench, at 256; +5.7 MMBench, at 64"),
    "adakv": ("the heads of a layer share by their attention", "+3 DocVQA, +4 OCRBench, at 256"),
    "pyramidkv": ("lower layers have more", "+3 DocVQA, +4 OCRBench, at 256"),
    "random": ("head scores drawn at random", "better"),
    "shuffled": ("its own head scores, dealt to other heads", "not measured"),
    "layers": ("every head has its layer's mean score", "not measured"),
    "within": ("its scores, dealt anew inside each layer", "not measured")}
CONTROLS = {"layers": dict(scores="layers"), "within": dict(scores="within"),
            "heads": dict(scores="heads"),
            "pyramidkv upside down": dict(scores="rising pyramid", rho=0.0)}
WRITERS = ("sparsemm", "snapkv", "pyramidkv", "adakv", "shuffled")             # who write freely
TASKS = {"question": ("form", "receipt", "table", "label"),
         "transcript": ("lines", "form", "receipt", "letter")}      # and the kinds of their pages
LONGEST = 128                   # so many tokens of a transcript are forced, or written
MASKED = 48                     # so many where heads are masked, which takes a pass for each set
READS = 0.9                     # the accuracy of a full cache that counts as reading


# ---- pages ---------------------------------------------------------------------------------------

def exercise(model, split, seed, task, size, i):
    """Page i of a task and size: (image, prompt, right answer, its token ids, two at least).

    split: "test" for what is reported, "development" for what is chosen before. No other script
    draws from these seeds.
    """
    kind = TASKS[task][i % len(TASKS[task])]
    for attempt in range(100):
        rng = random.Random(f"reproduce {split} {seed} {task} {size} {i} {attempt}")
        page = render_page(rng, kind, *size)
        about, answer = ("", page.text) if task == "transcript" else rng.choice(
            page.questions or [("", "")])
        ids = model.processor.tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) > 1:
            name = "transcript" if task == "transcript" else "value"
            return page.image, prompt(None, name, about), answer, ids[:LONGEST]
    raise ValueError(f"--sizes: pages of {size[0]} x {size[1]} pixels have no room for a {task}")


def detection_page(seed, i, size):
    """A page with shapes: (image, [(name, box), ...], what answers the prompt for shapes)."""
    for attempt in range(100):
        page = render_page(random.Random(f"reproduce shapes {seed} {i} {attempt}"), "shapes", *size)
        if page.objects:
            answers = {task: answer for task, _, answer in tasks(page)}
            return page.image, [(o.text, o.box) for o in page.objects], answers["shapes"]
    raise ValueError(f"--sizes: pages of {size[0]} x {size[1]} pixels have no room for shapes")


# ---- how answers and tables of scores are judged -------------------------------------------------

def characters(answer, right):
    """Character accuracy, not below 0."""
    return max(0.0, 1 - edit_distance(answer, right) / len(right))


def rank_correlation(a, b):
    """Spearman's coefficient of two tables; equal values share their mean rank."""
    ranks = []
    for x in (a.flatten(), b.flatten()):
        r = (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2
        ranks.append(r - r.mean())
    return (ranks[0] @ ranks[1] / (ranks[0].norm() * ranks[1].norm()).clamp(min=1e-30)).item()


def overlap(a, b, part=0.05):
    """How much of the top `part` of the heads two tables have in common."""
    n = max(1, round(part * a.numel()))
    top = [set(x.flatten().argsort(descending=True, stable=True)[:n].tolist()) for x in (a, b)]
    return len(top[0] & top[1]) / n


# ---- a run ---------------------------------------------------------------------------------------

@dataclass
class Run:
    """What the parts share."""
    model: object
    name: str
    out: Path
    seed: int
    sizes: list                     # page sizes, the smallest first
    pages: int                      # of each task and size
    scoring_pages: int
    tables: dict = field(default_factory=dict)              # see compress.Prefill
    weights: int = 0                # a checksum of the weights
    seconds: float = 0              # that the results took which were asked for so far

    def per_page(self, name, facts, num, work):
        """[work(0), ..., work(num - 1)], of which those done before come from a file.

        facts: what else the results depend on; a file made under others is refused."""
        path = self.out / "pages" / f"{self.name}-{name}.json"
        facts = json.loads(json.dumps(dict(facts, seed=self.seed, weights=self.weights)))
        done, before = read_pages(path, facts) if path.exists() else ({}, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        missing, start = [i for i in range(num) if str(i) not in done], time.monotonic()
        saved = start

        def save():
            write_json(dict(facts=facts, seconds=before + saved - start, pages=done), path)

        try:
            for i in tqdm(missing, desc=f"{self.name} {name}", unit="page", leave=False):
                done[str(i)] = work(i)
                if time.monotonic() > saved + 2:
                    saved = time.monotonic()
                    save()
        finally:
            if missing:
                saved = time.monotonic()
                save()
        self.seconds += before + saved - start
        return [done[str(i)] for i in range(num)]

    def facts(self, settings):
        """What results of settings depend on."""
        return dict(settings=[asdict(s) for s in settings], tables={
            name: checksum(drawn(self.tables[name], 0))
            for name in sorted({s.scores for s in settings})})

    def decode(self, ids):
        return self.model.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def measure(self, name, task, size, settings, num=None, split="test"):
        """Each setting on the same pages, answers forced: {setting: {"accuracy": (pages,), "kept":
        (pages,) entries per head}} and the mean prompt length. What is drawn is drawn anew for
        every page, so that intervals hold the luck of the draw, too."""
        facts = dict(self.facts(settings), task=task, size=size, split=split, longest=LONGEST)

        def work(i):
            image, text, _, ids = exercise(self.model, split, self.seed, task, size, i)
            read = prefill(self.model, prepare(self.model, [image], text))
            keep = torch.stack([read.keep(s, self.tables, seed=i) for s in settings])
            kept = keep.double().mean((1, 2, 3)) * read.length
            return dict(tokens=read.length, kept=kept.tolist(),
                        accuracy=forced_accuracy(read, keep, ids).tolist())

        label = f"{name}-{task}-{size[0]}x{size[1]}-{split}"
        done = self.per_page(label, facts, num or self.pages, work)
        measured = {s: {what: np.array([page[what][j] for page in done])
                        for what in ("accuracy", "kept")} for j, s in enumerate(settings)}
        return measured, float(np.mean([page["tokens"] for page in done]))

    def score(self, name, num, work):
        """Visual scores of single pages (num, L, H), and how many tokens counted in all. work(i) ->
        what score_transcript returns."""
        def compact(i):
            scores, tokens, hits = work(i)
            return dict(scores=scores.flatten().tolist(), tokens=tokens, hits=hits)
        c = self.model.config
        done = self.per_page(f"scores-{name}", dict(size=self.sizes[-1]), num, compact)
        if not sum(page["hits"] for page in done):
            raise ValueError(f"no head of {self.name} looked at what it wrote on the {num} pages "
                             f"for scores ({name})")
        scores = torch.tensor([page["scores"] for page in done], dtype=torch.float64)
        return scores.view(num, c.layers, c.heads), sum(page["tokens"] for page in done)

    def ocr_scores(self, num=None, match="aligned"):
        """Scores of OCR pages of all kinds in turn, given their right transcripts."""
        pages = Rendered(KINDS, self.seed, self.sizes[-1], num or self.scoring_pages)

        def work(i):
            image, words, text = pages[i]
            ids = self.model.processor.tokenizer(text, add_special_tokens=False).input_ids
            return score_transcript(self.model, [image], [words], ids, match)
        return self.score(match.replace(" ", "-"), len(pages), work)

    def detection_scores(self, num):
        """Scores of pages with shapes, while they are named."""
        def work(i):
            image, objects, text = detection_page(self.seed, i, self.sizes[-1])
            ids = self.model.processor.tokenizer(text, add_special_tokens=False).input_ids
            return score_transcript(self.model, [image], [objects], ids,
                                    question=prompt(None, "shapes", ""))
        return self.score("shapes", num, work)

    def reading_size(self):
        """The largest page size at which a full cache reads (READS), judged by questions about
        development pages; if there is none, the one it reads best."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        shares = [self.measure("reading", "question", size, [Setting("full")], num=24,
                               split="development")[0] for size in self.sizes]
        shares = [next(iter(share.values()))["accuracy"].mean() for share in shares]
        for size, share in reversed(list(zip(self.sizes, shares))):
            if share >= READS:
                return size
        return self.sizes[int(np.argmax(shares))]


def read_pages(path, facts):
    """({page number, as text: its results}, seconds they took) from a file that was made with the
    same facts."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        made_with, pages, seconds = stored["facts"], stored["pages"], stored["seconds"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {path} is not a file of ours") from None
    if made_with != facts:
        raise ValueError(f"--out: {path} was made with other settings; another folder is right, or "
                         "none of that name")
    return pages, seconds


def checksum(tensor):
    """A number that changes with any element of a tensor."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def mean_scores(scores):
    """(pages, L, H) -> (L, H), which sums to 1."""
    s = scores.mean(0)
    return s / s.sum() if s.sum() > 0 else torch.full_like(s, 1 / s.numel())


def score_tables(s, G):
    """The visual scores (L, H), and those of CONTROLS."""
    return {"aligned": s, "layers": only_layers(s), "within": partial(within_layers, s, G),
            "heads": only_heads(s), "rising pyramid": rising_pyramid(s)}


def figure(measured, entry, what="accuracy"):
    """A cell: of a setting its mean, of a pair of settings the paired difference, or None."""
    if isinstance(entry, tuple):
        return interval(measured[entry[0]][what] - measured[entry[1]][what])
    return entry and interval(measured[entry][what])


def grid(title, columns, rows, measured, what="accuracy"):
    """A table of measured settings. rows: {label: for each column an entry as figure takes it}."""
    return table(title, ["", *columns], [
        [label, *(figure(measured, entry, what) for entry in row)] for label, row in rows.items()],
        "%" if what == "accuracy" else "entries")


def row(budgets=BUDGETS, **changes):
    """The settings of one row of a table: one for each budget, None where the window is larger."""
    settings = [Setting(budget=b, **changes) for b in budgets]
    return [s if s.budget >= s.window else None for s in settings]


def by_method(methods=METHODS[1:], budgets=BUDGETS):
    """The rows of a table that compares some methods, the full cache first."""
    return {"full": [Setting("full")] * len(budgets),
            **{method: row(budgets, method=method) for method in methods}}


def with_controls():
    """The rows of by_method, and the tables of scores that tell layers from heads."""
    return by_method() | {name: row(**changes) for name, changes in CONTROLS.items()}


def flat(*groups):
    """All settings of some tables' rows, each once."""
    return list(dict.fromkeys(s for rows in groups for r in rows.values() for s in r if s))


def against(rows, name):
    """Rows of pairs: the settings of row `name` against those of every other row."""
    return {other: list(zip(rows[name], r)) for other, r in rows.items() if other != name}


def split_gain(rows):
    """Rows of pairs: what sparsemm gains over snapkv; what of it the layers' shares alone give, and
    what heads add to that."""
    def minus(a, b):
        return list(zip(rows[a], rows[b]))
    return {"sparsemm - snapkv": minus("sparsemm", "snapkv"),
            "layers alone: layers - snapkv": minus("layers", "snapkv"),
            "heads beside: sparsemm - layers": minus("sparsemm", "layers"),
            "the right heads of a layer: sparsemm - within": minus("sparsemm", "within")}


def gain(measured, rows, where, budget):
    """The rows of RESULTS.md that split sparsemm's gain, of {task: measured}."""
    i = BUDGETS.index(budget)
    return {f"{task}s{where}, {budget} entries": {
        name: figure(of, pairs[i]) for name, pairs in split_gain(rows).items()}
        for task, of in measured.items()}


def differences(measured, a, b, budget=CLAIMED):
    """{task: figure} of two rows of settings at one budget, of {task: measured}."""
    i = BUDGETS.index(budget)
    return {f"{task}s": figure(of, (a[i], b[i])) for task, of in measured.items()}


def place(task, size, T):
    return f"{task}s, {size[0]} x {size[1]} pixels, {T:.0f} prompt tokens"


# ---- the parts -----------------------------------------------------------------------------------

def resampled(tables, of, draws=200):
    """[figure, low, high]: `of` the mean scores of some sets of scored pages, (pages, L, H) each,
    and its interval over pages drawn again. (Of an agreement the interval leans down: tables of
    pages drawn again are noisier than their own.)"""
    rng = np.random.default_rng(0)
    values = [float(of(*(mean_scores(t[rng.integers(0, len(t), len(t))]) for t in tables)))
              for _ in range(draws)]
    return [float(of(*map(mean_scores, tables))), *np.percentile(values, [2.5, 97.5]).tolist()]


def visual(s, share=0.1):
    """Which heads have that share of the best head's score."""
    return (s >= share * s.max()).double()


def unevenness(s):
    """How uneven the scores (L, G) of KV heads are, by layer and inside layers: {name: share}."""
    s = s / s.sum()
    (L, G), layers = s.shape, s.sum(1)
    total, between = ((s - s.mean()) ** 2).sum(), G * ((s.mean(1) - s.mean()) ** 2).sum()
    return {"Gini coefficient of the heads": gini(s),
            "Gini coefficient of the layers' sums": gini(layers),
            "Gini coefficients inside layers, weighted by the layers' sums": sum(
                (gini(row) * row.sum()).item() for row in s if row.sum() > 0),
            "variance of the scores between layers": (between / total.clamp(min=1e-300)).item(),
            "the same if heads were dealt to layers by chance": (L - 1) / (L * G - 1),
            STRONGEST: layers.max().item(),
            "heads with a tenth of the best head's score": visual(s).mean().item(),
            "the same in the layer that has most": visual(s).mean(1).max().item()}


def heads(run):
    """How many heads are visual, and how concentrated the scores are. Beside them what the authors'
    score file of LLaVA-NeXT-Vicuna-7B gives."""
    def half(s):                                # the share of heads that hold half of the scores
        best = s.flatten().sort(descending=True).values.cumsum(0)
        return ((best < 0.5).sum() + 1) / s.numel()

    pages, tokens = run.ocr_scores()
    (num, L, H), top = pages.shape, top_share(pages[0], 0.05)[0]
    held = resampled([pages], lambda s: top_share(s, 0.05)[1])
    shares = [[f"top 5 % of the heads ({top} of {L * H}) hold", held, "55.4"],
              ["Gini coefficient", resampled([pages], gini), "85.5"],
              ["share of the heads that hold half of the scores", resampled([pages], half), "4.2"]]
    columns = []
    for name, share, published in (("a tenth", 0.1, 11.1), ("a quarter", 0.25, 4.6)):
        columns.append([resampled([pages], lambda s: visual(s, share)[l].mean())
                        for l in (*range(L), slice(None))])
        shares.append([f"heads with {name} of the best head's score", columns[-1][-1],
                       str(published)])
    columns.append([*(resampled([pages], lambda s: s[l].sum()) for l in range(L)), "100"])
    names, (*of_layers, of_all) = [*(f"layer {l}" for l in range(L)), "all"], columns[0]
    return dict(
        facts=dict(pages=num, tokens=tokens, size=run.sizes[-1]),
        tables=[table(f"Visual scores of {num} pages, %", ["", run.name, "the published scores of "
                      "LLaVA-NeXT-Vicuna-7B, 1,024 heads"], shares),
                table("Visual heads (at least a tenth, or a quarter, of the best head's score) and "
                      "share of the scores, %", ["", "a tenth", "a quarter", "share of the scores"],
                      [list(line) for line in zip(names, *columns)])],
        claims=[claim("few heads look: fewer than 5 % have a tenth of the best head's score, or "
                      "more", "< 5 %; their published scores: 11.1", {"": of_all}, below=0.05,
                      signed=False),
                claim("so in every layer (the figure is that of the layer that has most)",
                      "< 5 %; their published scores: 31.2",
                      {"": max(of_layers, key=lambda cell: cell[0])}, below=0.05, signed=False),
                claim("the top 5 % of the heads hold half of the scores, or more",
                      "their published scores: 55.4", {"": held}, above=0.5, signed=False)],
        unevenness=unevenness(kv_head_scores(mean_scores(pages), run.model.config.kv_heads)))


def main_part(run):
    """Every method and control at every budget, questions and transcripts, by page size."""
    rows, tables, at_size, curves, size = with_controls(), [], {}, {}, run.reading_size()
    for task in TASKS:
        for other in run.sizes:
            measured, T = run.measure("main", task, other, flat(rows))
            where = place(task, other, T)
            tables += comparison(where, measured, rows)
            tables.append(grid(f"Entries really kept per head, {where}", BUDGETS, rows, measured,
                               "kept"))
            if other == size:
                at_size[task] = measured
                curves[where] = {m: [(measured[s]["kept"].mean(), measured[s]["accuracy"].mean())
                                     for s in dict.fromkeys(r)] for m, r in by_method().items()}
    claims = [claim(f"`sparsemm` is better than `{rival}` ({what}), {CLAIMED} entries", paper,
                    differences(at_size, rows["sparsemm"], rows[rival]), above=0)
              for rival, (what, paper) in RIVALS.items()]
    claims.append(claim(
        f"`random` is as good as `snapkv`: within 3 points, {CLAIMED} entries", "about equal",
        differences(at_size, rows["random"], rows["snapkv"]), above=-0.03, below=0.03))
    picture = f"main-{run.name}.png"
    line_charts(curves, run.out / picture, f"{run.name}: accuracy (%) against kept entries",
                "entries kept per head", BUDGETS[:-1])
    return dict(facts=dict(pages=run.pages, size=size), tables=tables + free_running(run, size),
                claims=claims, split=gain(at_size, rows, "", CLAIMED), picture=picture)


def comparison(where, measured, rows):
    """The tables that compare methods and controls at one place."""
    return [grid(f"Accuracy, {where}, %", BUDGETS, rows, measured),
            grid(f"sparsemm minus each other method, {where}, points", BUDGETS,
                 against(rows, "sparsemm"), measured),
            grid(f"Layers and heads in sparsemm's gain over snapkv, {where}, points", BUDGETS,
                 split_gain(rows), measured)]


def free_running(run, size):
    """Tables of answers that are written freely, with the real cache, on some of the pages."""
    budgets = BUDGETS[1:4]
    rows = by_method(WRITERS, budgets)
    settings, tables = flat(rows), []
    for task, num, measures in (
            ("question", max(1, run.pages // 2), dict(exact=lambda a, b: float(a == b),
                                                      ANLS=lambda a, b: anls(a, [b]))),
            ("transcript", max(1, run.pages // 8), dict(characters=characters))):
        def work(i):
            image, text, _, ids = exercise(run.model, "test", run.seed, task, size, i)
            right, limit = run.decode(ids), min(LONGEST, len(ids) + 8)
            read = prefill(run.model, prepare(run.model, [image], text))
            texts = [written(read, read.cache(s, run.tables, i), limit) for s in settings]
            return {name: [of(text, right) for text in texts] for name, of in measures.items()}

        pages = run.per_page(f"free-{task}-{size[0]}x{size[1]}",
                             dict(run.facts(settings), size=size, longest=LONGEST), num, work)
        for name in measures:
            measured = {s: dict(accuracy=np.array([page[name][j] for page in pages]))
                        for j, s in enumerate(settings)}
            where = f"{name}, {task}s written freely, {size[0]} x {size[1]} pixels, {num} pages"
            tables += [grid(f"{where}, %", budgets, rows, measured),
                       grid(f"sparsemm minus each other method, {where}, points", budgets,
                            against(rows, "sparsemm"), measured)]
    return tables


def large(run):
    """Every method and control at every budget on large pages, of which there are half as many."""
    rows, num, tables, of_task = with_controls(), max(1, run.pages // 2), [], {}
    for task in TASKS:
        of_task[task], T = run.measure("large", task, LARGE_PAGE, flat(rows), num=num)
        tables += comparison(f"{place(task, LARGE_PAGE, T)}, {num} pages", of_task[task], rows)
    on = f"large pages ({LARGE_PAGE[0]} x {LARGE_PAGE[1]})"
    claims = [claim(f"`sparsemm` is better than `snapkv` on {on}, {ON_LARGE} entries",
                    RIVALS["snapkv"][1].split(";")[0],
                    differences(of_task, rows["sparsemm"], rows["snapkv"], ON_LARGE), above=0),
              claim(f"`sparsemm` loses no more than a point to the full cache on {on}, "
                    f"{NEARLY_FULL} entries", "0 on DocVQA and OCRBench, at 256",
                    differences(of_task, rows["sparsemm"], rows["full"], NEARLY_FULL), above=-0.01)]
    return dict(facts=dict(pages=num, size=LARGE_PAGE), tables=tables, claims=claims,
                split=gain(of_task, rows, ", large pages", ON_LARGE))


def ablation(run):
    """The three parts of the budget, the uniform share rho, and the window."""
    size, tables, of_task = run.reading_size(), [], {}
    parts = {"window": row(method="window"), "window + uniform": row(rho=1.0),
             "window + uniform + score": row()}
    shares = {rho: row(rho=rho) for rho in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)}
    windows = {f"window {w}": row(window=w) for w in (8, 16, 32, 64)}
    bare = {rho: row(rho=rho, window=1) for rho in (0.0, 0.1)}    # heads without score keep one
    for task in TASKS:
        measured, T = run.measure("ablation", task, size, flat(parts, shares, windows, bare))
        where, of_task[task] = place(task, size, T), measured
        tables += [grid(f"Parts of the budget, {where}, %", BUDGETS, parts, measured),
                   grid(f"Uniform share, {where}, %", BUDGETS,
                        {f"rho = {rho:g}": r for rho, r in shares.items()}, measured),
                   grid(f"Uniform share where the window is 1, {where}, %", BUDGETS,
                        {f"rho = {rho:g}": r for rho, r in bare.items()}, measured),
                   grid(f"Window, {where}, %", BUDGETS, windows, measured)]
    claims = [claim(f"entries shared out evenly help beside the window, {CLAIMED} entries",
                    "+4.1 MMBench, at 64", differences(
                        of_task, parts["window + uniform"], parts["window"]), above=0),
              claim(f"accuracy falls without the uniform share (rho 0, not 0.1), {CLAIMED} entries",
                    "from 0.519 to 0.145 (Mistral)",
                    differences(of_task, shares[0.0], shares[0.1]), below=0),
              claim(f"the same if the window is one entry, {CLAIMED} entries", "not measured",
                    differences(of_task, bare[0.0], bare[0.1]), below=0)]
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=claims)


def masking(run, seeds=10):
    """The visual heads switched off, against random sets of other heads: their outputs, and for 5 %
    of the heads their queries, too."""
    size, num, s = run.reading_size(), max(1, run.pages // 2), run.tables["aligned"]
    sets, tables, costs = head_sets(s, seeds), [], {}
    few = min((count for count, _ in sets), key=lambda count: abs(count / s.numel() - 0.05))
    fewer = {key: of for key, of in sets.items() if key[0] == few}
    for task in TASKS:
        for what, of in (("outputs", sets), ("queries", fewer)):
            rows = masked_rows(run, what, task, size, num, of)
            tables.append(table(
                f"Accuracy with masked heads, their {what} zero, {task}s, {size[0]} x {size[1]} "
                f"pixels, {num} pages, %",
                ["masked", "visual heads", f"random heads, mean of {seeds} sets",
                 "visual minus none", "random minus none", "single random sets minus none",
                 "visual minus random"], rows))
            if of is sets:
                costs[f"{task}s"] = [next(r for r in rows if r[0].startswith(f"{few} of")),
                                     rows[-1]]
    claims = [claim("masking the top 5 % of the heads costs accuracy", "-20 OCRBench, -15 TextVQA",
                    {task: at[0][3] for task, at in costs.items()}, below=0),
              claim("masking as many random heads costs less than 3 points", "< 3",
                    {task: at[0][4] for task, at in costs.items()}, above=-0.03),
              claim("masking the top 10 % costs more than masking as many random heads",
                    "not measured", {task: at[1][6] for task, at in costs.items()}, below=0)]
    return dict(facts=dict(pages=num, size=size, sets=[[str(key), of] for key, of in sets.items()]),
                tables=tables, claims=claims)


def masked_rows(run, what, task, size, num, sets):
    """Rows of the table of masked heads: no heads, then one row for each count.

    what: "outputs" or "queries", which are zero; sets: {(count, "visual" or seed): heads}."""
    sets, heads = {"none": [], **sets}, run.tables["aligned"].numel()

    def work(i):
        image, text, _, ids = exercise(run.model, "test", run.seed, task, size, i)
        return masked_accuracy(run.model, image, text, ids[:MASKED], sets.values(),
                               query=what == "queries")

    facts = dict(sets=list(sets.values()), size=size, longest=MASKED)
    name = f"masking{'' if what == 'outputs' else '-queries'}-{task}-{size[0]}x{size[1]}"
    measured = dict(zip(sets, np.array(run.per_page(name, facts, num, work)).T))
    none = measured.pop("none")
    rows = [["none", interval(none), interval(none), None, None, None, None]]
    for count in dict.fromkeys(count for count, _ in measured):
        visual = measured.pop((count, "visual"))
        each = np.array([of for key, of in measured.items() if key[0] == count])   # (sets, pages)
        control, changes = each.mean(0), (each - none).mean(1)
        rows.append([f"{count} of {heads}", interval(visual), interval(control),
                     interval(visual - none), interval(control - none),
                     f"{show(changes.min())} to {show(changes.max())}", interval(visual - control)])
    return rows


def robustness(run):
    """Scores from other kinds of pages, from detection, and from fewer pages."""
    pages, _ = run.ocr_scores()
    num, size = len(pages) // len(KINDS), run.reading_size()
    if not num:
        raise ValueError(f"--scoring-pages: {len(pages)} are too few; {len(KINDS)} is right")
    kinds = {f"OCR, {kind}": pages[KINDS.index(kind)::len(KINDS)][:num]
             for kind in ("lines", "receipt", "letter")}
    ocr = list(kinds)
    kinds["detection"], _ = run.detection_scores(num)
    counts = {f"{count} pages": pages[:count] for count in (10, 50, 200) if count < len(pages)}
    sources = {"OCR, all": pages, **kinds, **counts}
    run.tables.update({name: mean_scores(scores) for name, scores in sources.items()})
    pairs = [(ocr[0], ocr[1]), (ocr[0], ocr[2]), (ocr[1], ocr[2]),
             *((name, "detection") for name in ocr), *((count, "OCR, all") for count in counts)]
    agreement = [[f"{a} / {b}", *(resampled([sources[a], sources[b]], of)
                                  for of in (rank_correlation, overlap))] for a, b in pairs]
    least, r = min((line[1] for line in agreement[:3]), key=lambda cell: cell[0]), rank_correlation
    apart = resampled(list(kinds.values()), lambda a, b, c, d: (
        r(a, b) + r(a, c) + r(b, c) - r(a, d) - r(b, d) - r(c, d)) / 3)
    tables = [table(f"Agreement of scores, {num} pages of each kind, {len(pages)} of all, %",
                    ["", "rank correlation", "common heads of the top 5 %"], agreement)]
    of_task = {}
    rows = {name: row(TIGHT, scores=name) for name in sources}
    for task in TASKS:
        of_task[task], T = run.measure("robustness", task, size, flat(rows))
        tables.append(grid(f"sparsemm by where its scores come from, {place(task, size, T)}, %",
                           TIGHT, rows, of_task[task]))
    claims = [claim("scores from lines, receipts and letters agree: the lowest rank correlation of "
                    "two is above 0.8", "highly consistent", {"": least}, above=0.8, signed=False),
              claim("they agree better with one another than with scores from naming shapes "
                    "(difference of the mean correlations)", "better", {"": apart}, above=0),
              claim(f"scores from lines of text serve better than from naming shapes, {CLAIMED} "
                    "entries", "better", differences(of_task, rows[ocr[0]], rows["detection"]),
                    above=0)]
    return dict(facts=dict(pages=run.pages, scoring_pages=len(pages), size=size), tables=tables,
                claims=claims)


def unique_words(pieces, words):
    """The authors' rule on whole words, for any tokenizer: a token counts if the word that it is
    part of, between white space, is contained in exactly one box. (Single pieces must keep their
    spaces; those of Llama's tokenizer do not.)"""
    found, start, text = [], 0, "".join(pieces)
    for piece in pieces:
        first = start + len(piece) - len(piece.lstrip())                # of what is not white space
        start += len(piece)
        before, after = text[:first].split(" "), text[first:].split()
        word = before[-1].split("\n")[-1] + after[0] if piece.strip() else ""
        boxes = [j for j, box in enumerate(words) if word and word in box]
        found.append(boxes[0] if len(boxes) == 1 else None)
    return found


MATCHES["unique words"] = unique_words


def redistribution(run):
    """What a head cannot hold: lost, or poured out again. And the rule for which tokens count."""
    size, num, rules, rows = run.reading_size(), max(1, run.scoring_pages // 5), {}, []
    aligned, _ = run.ocr_scores(num)
    for match in ("aligned", "unique", "unique words"):
        try:
            scores, tokens = run.ocr_scores(num, match)
        except ValueError:                                  # of characters, hardly any are unique
            rows.append([match, "0", None, None])
            continue
        name = f"{match}, {num} pages"
        run.tables[name], rules[name] = mean_scores(scores), row(TIGHT, scores=name)
        rows.append([match, f"{tokens:,}", resampled([scores, aligned], rank_correlation),
                     resampled([scores, aligned], overlap)])
    tables = [table(f"Which tokens count, {num} pages, %", ["rule", "tokens", "rank correlation "
                    "with aligned", "common heads of the top 5 %"], rows)]
    pours = {"poured out again": row(), "lost (literal)": row(redistribute=False)}
    for task in TASKS:
        measured, T = run.measure("redistribution", task, size, flat(pours, rules))
        where = place(task, size, T)
        tables += [grid(f"What a head cannot hold, {where}, %", BUDGETS, pours, measured),
                   grid(f"Poured out minus lost, {where}, points", BUDGETS,
                        {"": list(zip(*pours.values()))}, measured),
                   grid(f"Entries really kept per head, {where}", BUDGETS, pours, measured, "kept"),
                   grid(f"sparsemm by the rule for which tokens count, {where}, %", TIGHT, rules,
                        measured)]
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=[])


def beyond(run):
    """Changes to the method, compared on development pages; the same again on test pages."""
    size, G, base = run.reading_size(), run.model.config.kv_heads, row()
    rows = {f"ranked by {by}": row(by=by) for by in BY}
    for exponent in (0.5, 0.75, 2):
        name = f"scores to the power {exponent:g}"
        run.tables[name] = power_of_scores(run.tables["aligned"], G, exponent)
        rows[name] = row(scores=name)
    rows |= {"rho 0.3": row(rho=0.3), "window 16": row(window=16), "window 8": row(window=8),
             "power 0.5, window 16": row(scores="scores to the power 0.5", window=16)}
    rivals = {"sparsemm": base, "snapkv": row(method="snapkv"), "adakv": row(method="adakv")}
    pairs, tables = {name: list(zip(r, base)) for name, r in rows.items()}, []
    changes = {name: dict(development=[], test=[]) for name in rows}
    for split in ("development", "test"):
        for task in TASKS:
            measured, T = run.measure("beyond", task, size, flat(rivals, rows), split=split)
            where = f"{split} pages, {place(task, size, T)}"
            tables += [grid(f"Change of sparsemm's accuracy, {where}, points", BUDGETS, pairs,
                            measured),
                       grid(f"Accuracy, {where}, %", BUDGETS, {**rivals, **rows}, measured)]
            for name in rows:
                changes[name][split] += [figure(measured, pair) for pair in pairs[name]]
    counts = []
    for name, of in changes.items():
        better, worse = ({split: sum(map(test, of[split])) for split in of}
                         for test in (positive, negative))
        chosen = better["development"] > 0 and worse["development"] == 0
        counts.append([name, better["test"], worse["test"], "yes" if chosen else "no"])
    tables.insert(0, table(
        f"At how many of {len(BUDGETS) * len(TASKS)} budgets and tasks a change of the method "
        f"shows on test pages, {size[0]} x {size[1]} pixels",
        ["", "better by more than the interval", "worse by more than the interval",
         "better and never worse on development pages"], counts, ""))
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=[])


def fastv(run, layer=2):
    """FastV drops image tokens in prefill; sparsemm shares out what is left. Answers are written
    freely."""
    size, num, shares = run.reading_size(), max(1, run.pages // 2), (1.0, 0.5, 0.25)
    hows = {"full": ("full", 256), **{f"sparsemm {b}": ("sparsemm", b) for b in BUDGETS[1:4:2]}}

    def work(i):
        image, text, _, ids = exercise(run.model, "test", run.seed, "question", size, i)
        rows = []
        for kept in shares:
            for method, budget in hows.values():
                answer = generate if kept == 1 else partial(pruning.generate, layers=layer,
                                                            keep=kept)
                r = answer(run.model, [image], text, method=method, budget=budget,
                           head_scores=run.tables["aligned"], max_new_tokens=len(ids) + 8)
                rows.append([float(r["text"] == run.decode(ids)), np.mean(r["kept"]),
                             1000 * r["prefill_seconds"]])
        return rows

    facts = dict(size=size, layer=layer, shares=shares, hows=hows,
                 scores=checksum(run.tables["aligned"]))
    done = np.array(run.per_page(f"fastv-{size[0]}x{size[1]}", facts, num, work))
    done = done.reshape(num, len(shares), len(hows), 3)
    where, tables = f"questions, {size[0]} x {size[1]} pixels, {num} pages", []
    for i, (what, unit) in enumerate((("Exact answers", "%"), ("Entries kept per head", "entries"),
                                      ("Prefill, ms", ""))):
        tables.append(table(
            f"{what}{', %' if unit == '%' else ''}; FastV after {layer} layers, {where}",
            ["image tokens that stay", *hows],
            [[f"{kept:.0%}", *(interval(done[:, j, m, i]) for m in range(len(hows)))]
             for j, kept in enumerate(shares)], unit))
    return dict(facts=dict(pages=num, size=size), tables=tables, claims=[])


PARTS = dict(heads=heads, main=main_part, large=large, ablation=ablation, masking=masking,
             robustness=robustness, redistribution=redistribution, beyond=beyond, fastv=fastv)


# ---- the command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = OneLineParser(prog="reproduce.py",
                           description="Rerun the paper's claims; write JSON files and tables.")
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all", "published", "results"),
                        default="all")
    parser.add_argument("files", nargs="*", metavar="FILE", help="score files, for published")
    parser.add_argument("--kv-heads", type=whole_number(1), metavar="N",
                        help="a layer's, in these files (default: as many as query heads)")
    parser.add_argument("--model", nargs="+", metavar="DIR",
                        help="checkpoints' folders or hub ids (default: the ones in tiny/)")
    parser.add_argument("--quick", action="store_true",
                        help="40 pages, and 100 for the scores, instead of 128 and 1,000")
    parser.add_argument("--out", type=output_folder, metavar="DIR",
                        help="default: experiments/results, or experiments/work/quick if --quick")
    parser.add_argument("--pages", type=whole_number(1), metavar="N", help="of each task and size")
    parser.add_argument("--scoring-pages", type=whole_number(1), metavar="N",
                        help="for the visual scores")
    parser.add_argument("--sizes", nargs="+", type=page_size, metavar="WxH",
                        default=[(256, 128), (256, 256), (256, 384)], help="of pages, in pixels")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", metavar="FILE",
                        help="whose table the part results rewrites")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    args = parser.parse_args(argv)
    args.out = args.out or HERE / ("work/quick" if args.quick else "results")
    args.pages = args.pages or (40 if args.quick else 128)
    args.scoring_pages = args.scoring_pages or (100 if args.quick else 1000)
    args.sizes = sorted(set(args.sizes), key=lambda size: size[0] * size[1])
    args.model = args.model or [str(path) for path in SMALL_MODELS if path.is_dir()]
    if args.files and args.part != "published" or args.part == "published" and not args.files:
        parser.error("argument FILE: score files are right for the part published, and only there")
    if not args.model and args.part not in ("published", "results"):
        parser.error(f"argument --model: none in {DEFAULT_MODEL.parent}; a checkpoint's folder is "
                     "right")
    return parser, args


def describe(args, run, part, model):
    """What a result depends on. model: as --model names it."""
    c = run.model.config
    return dict(
        part=part, model=run.name, attention="MHA" if c.heads == c.kv_heads else "GQA",
        layers=c.layers, heads=c.heads, kv_heads=c.kv_heads, seed=args.seed,
        entry_bytes=2 * c.head_dim * run.model.dtype.itemsize,
        command=f"python experiments/reproduce.py {part} --model {as_typed(model)} --pages "
                f"{args.pages} --scoring-pages {args.scoring_pages} --sizes "
                f"{' '.join(f'{w}x{h}' for w, h in args.sizes)} --seed {args.seed}",
        machine=machine_name(run.model.device),
        versions=dict(python=platform.python_version(), torch=torch.__version__,
                      transformers=transformers.__version__))


def published(args):
    """Stores how uneven the scores of some files are, in published.json beside other results."""
    path = args.out / "published.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for file in map(Path, args.files):
        try:
            keys = [list(map(int, key.split("-"))) for key in json.loads(file.read_text())]
            L, H = (max(place) + 1 for place in zip(*keys))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{file}: has no scores by \"layer-head\"") from None
        if H % (args.kv_heads or H):
            raise ValueError(f"--kv-heads {args.kv_heads}: {file} has {H} heads a layer; a divisor "
                             "is right")
        scores = kv_head_scores(read_head_scores(file, L, H), args.kv_heads or H)
        stored[file.stem] = unevenness(scores)
        print("\n".join([file.stem, *(f"    {name}: {show(of)} %"
                                      for name, of in stored[file.stem].items())]))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(stored, path)


def run_parts(args, name):
    """Runs the parts for one model, and writes their JSON, Markdown and pictures."""
    model = load(name, args.device, args.dtype)
    run = Run(model, Path(name).resolve().name if Path(name).is_dir() else name.split("/")[-1],
              args.out, args.seed, args.sizes, args.pages, args.scoring_pages,
              weights=checksum(torch.cat([p.flatten()[:100].float() for p in model.parameters()])))
    run.tables |= score_tables(mean_scores(run.ocr_scores()[0]), model.config.kv_heads)
    for part in PARTS if args.part == "all" else [args.part]:
        run.seconds = 0
        found = PARTS[part](run)
        results = dict(describe(args, run, part, name), seconds=run.seconds, **found)
        write_json(results, args.out / f"{part}-{run.name}.json")
        write_file(args.out / f"{part}-{run.name}.md", results_page(results))
        print(results_page(results))


def main(argv=None):
    parser, args = parse_arguments(argv)
    try:
        if args.part == "results":
            return write_results(args.out, PARTS, args.readme)
        if args.part == "published":
            return published(args)
        for name in args.model:
            run_parts(args, name)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
