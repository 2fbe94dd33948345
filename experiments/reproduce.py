"""Rerun the paper's claims (arXiv 2506.05344) on the small models, or on real checkpoints.

    python experiments/reproduce.py [PART] [--model DIR ...] [--quick] [--out DIR]
    python experiments/reproduce.py results                 fills RESULTS.md and the README's table
    python experiments/reproduce.py published FILE ...      how uneven the scores in files are

PART is one of PARTS, below, whose docstrings say what they measure; by default all of them run. A
part that was stopped goes on with the same command.

Accuracy is the share of the right answer's tokens that are predicted right under teacher forcing,
from the second on: the first always sees the full cache. Intervals are of 95 % (bootstrap over
pages); differences are paired. Letters: L layers, H query heads, G KV heads, T prompt tokens.
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, Method, kv_head_scores, read_head_scores
from experiments import fastv as pruning
from experiments.compress import (BY, Setting, best_heads, forced_accuracy, head_sets,
                                  masked_accuracy, prefill, score_tables)
from experiments.draw import line_charts
from experiments.pages import KINDS, prompt, render_page, tasks
from experiments.report import (claim, interval, machine_name, results_page, show, stored_results,
                                table, write_results)
from model_llava import DTYPES, load, prepare
from score_heads import Journal, fingerprint, gini, score_transcript, top_share
from sparsemm import DEFAULT_MODEL, SCORES_FILE, OneLineParser, generate, write_json

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "results" / "published.json"
BUDGETS = (48, 64, 96, 128, 256, 512)                       # of the paper's ablation
CLAIMED = 48                    # the budget of claims: neither side reaches the full cache there
SIZE, LARGE, SCORED = (256, 384), (512, 512), (256, 256)    # of pages; SCORED: in the score files
TASKS = {"question": ("form", "receipt", "table", "label"),
         "transcript": ("lines", "form", "receipt", "letter")}      # and the kinds of their pages
LONGEST, MASKED = 128, 48       # tokens of an answer that are forced; the same with masked heads
CONTROLS = {"layers": dict(scores="layers"), "within": dict(scores="within"),
            "pyramidkv upside down": dict(scores="rising pyramid", rho=0.0)}
BETTER = {"snapkv": "+4 DocVQA, +6 OCRBench, at 256; +5.7 MMBench, at 64",        # in the paper
          **dict.fromkeys(("adakv", "pyramidkv"), "+3 DocVQA, +4 OCRBench, at 256"),
          "random": "better", **dict.fromkeys(("shuffled", *CONTROLS), "not measured")}
TIGHT, WIDE = (12, 16, 24, 32, 40, 48, 64, 96), (128, 256, 512)     # budgets of the part window
WINDOWED = ("sparsemm", "snapkv", "pyramidkv", "adakv", "random", "shuffled")
RULES = {**{str(w): (lambda b, w=w: w) for w in (4, 8, 16, 32)},    # windows, by the budget b
         **{f"b // {n}": (lambda b, n=n: max(1, b // n)) for n in (8, 4, 2)}}
RULE = "4"                      # the best rule on development pages, as RESULTS.md shows


def scored_pages(model):
    """The numbers of the model's score file: (pages, L, H), page i of kind KINDS[i % 8]."""
    c, lists = model.config, json.loads((model.folder / SCORES_FILE).read_text(encoding="utf-8"))
    rows = [lists[f"{l}-{h}"] for l in range(c.layers) for h in range(c.heads)]
    return torch.tensor(rows, dtype=torch.float64).T.unflatten(1, (c.layers, c.heads))


def mean_scores(scores):
    """(pages, L, H) -> (L, H), which sums to 1. All heads are alike where none scored."""
    s = scores.mean(0) + 1e-12
    return s / s.sum()


def resampled(of, *scored, draws=200):
    """[figure, low, high]: `of` the mean scores of some sets of scored pages, (pages, L, H) each,
    and its interval over pages drawn again. (For an agreement the interval leans down.)"""
    rng = np.random.default_rng(0)
    values = [float(of(*(mean_scores(t[rng.integers(0, len(t), len(t))]) for t in scored)))
              for _ in range(draws)]
    return [float(of(*map(mean_scores, scored))), *np.percentile(values, [2.5, 97.5]).tolist()]


def rank_correlation(a, b):
    """Spearman's coefficient of two tables; equal values share their mean rank."""
    ranks = [(x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2
             for x in (a.flatten(), b.flatten())]
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()


@dataclass
class Run:
    """What a part works with."""
    model: object
    name: str
    seed: int
    pages: int                      # of each task
    tables: dict                    # see compress.Prefill
    journal: Journal                # of this part

    def exercise(self, task, i, size=SIZE, split="test"):
        """Page i of a task and size: (image, prompt, right answer, its token ids, two at least).
        Test pages for what is reported, development pages for what is chosen before."""
        kind, tokenizer = TASKS[task][i % len(TASKS[task])], self.model.processor.tokenizer
        for attempt in range(100):
            rng = random.Random(f"reproduce {split} {self.seed} {task} {size} {i} {attempt}")
            page = render_page(rng, kind, *size)
            asked = [of for of in tasks(page) if of[0] == task.replace("question", "value")]
            name, about, answer = rng.choice(asked or [(task, "", "")])
            ids = tokenizer(answer, add_special_tokens=False).input_ids[:LONGEST]
            if len(ids) > 1:
                right = tokenizer.decode(ids, skip_special_tokens=True)
                return page.image, prompt(name, about), right, ids

    def per_page(self, name, num, work):
        """[work(0), ..., work(num - 1)]; what the journal has is not done again."""
        for i in tqdm(range(num), desc=f"{self.name} {name}", leave=False):
            if f"{name} {i}" not in self.journal.done:
                self.journal.add(f"{name} {i}", work(i))
        return [self.journal.done[f"{name} {i}"] for i in range(num)]

    def measure(self, name, groups, share=1, size=SIZE, split="test"):
        """{task: {setting: {"accuracy": (pages,), "kept": (pages,) entries per head}}}, and tables:
        for each task one of each group of rows. groups: {title: {label: row}}.

        Answers are forced, and all settings see the same pages. What is drawn is drawn anew for
        every page, so that intervals hold the luck of the draw, too."""
        of_task, tables, num = {}, [], max(1, round(share * self.pages))
        settings = list(dict.fromkeys(s for rows in groups.values() for r in rows.values()
                                      for s in r.values() if isinstance(s, Setting)))
        for task in TASKS:
            def work(i):
                image, text, _, ids = self.exercise(task, i, size, split)
                read = prefill(self.model, prepare(self.model, [image], text))
                keep = torch.stack([read.keep(s, self.tables, seed=i) for s in settings])
                return dict(tokens=keep.shape[-1], kept=keep.sum(-1).double().mean((1, 2)).tolist(),
                            accuracy=forced_accuracy(read, keep, ids).tolist())

            done = self.per_page(f"{name}-{task}-{size[0]}x{size[1]}-{split}", num, work)
            of_task[task] = {s: {what: np.array([page[what][j] for page in done])
                                 for what in ("accuracy", "kept")} for j, s in enumerate(settings)}
            T = np.mean([page["tokens"] for page in done])
            where = f"{task}s, {size[0]} x {size[1]} pixels, {T:.0f} prompt tokens, {num} pages"
            tables += [grid(f"{title}, {where}", rows, of_task[task])
                       for title, rows in groups.items()]
        return of_task, tables


def row(budgets=BUDGETS, window=lambda b: 32, **changes):
    """{budget: Setting}, where the window fits in. window: a rule, budget -> window."""
    return {b: Setting(budget=b, window=window(b), **changes) for b in budgets if window(b) <= b}


def minus(a, b):
    """{budget: pair of settings}: a row against another."""
    return {budget: (a[budget], b[budget]) for budget in a if budget in b}


def figure(measured, entry, what="accuracy"):
    """A cell: the mean of a setting, the paired difference of a pair of settings, or None."""
    if isinstance(entry, tuple):
        return interval(measured[entry[0]][what] - measured[entry[1]][what])
    return entry and interval(measured[entry][what])


def grid(title, rows, measured):
    """A table of measured settings, {label: row}: accuracy, or entries where the title says so."""
    what, unit = ("kept", "mean") if title.startswith("Entries") else ("accuracy", "%")
    columns = list(dict.fromkeys(b for r in rows.values() for b in r))
    return table(title, ["", *columns], [
        [label, *(figure(measured, r.get(b), what) for b in columns)] for label, r in rows.items()],
        unit)


def compared(text, of_task, a, b, paper="not measured", budget=CLAIMED, **claimed):
    """A claim about the differences of two rows at one budget, with a figure for each task."""
    figures = {f"{task}s": figure(of, (a[budget], b[budget])) for task, of in of_task.items()}
    return claim(text, paper, figures, **claimed)


# ---- the parts: each returns its tables, its claims, and what RESULTS.md shows -------------------

def unevenness(s):
    """How uneven the scores (L, G) of KV heads are: {name: share}."""
    s = s / s.sum()
    (L, G), layers, visual = s.shape, s.sum(1), (s >= 0.1 * s.max()).double()
    between = G * ((s.mean(1) - s.mean()) ** 2).sum() / ((s - s.mean()) ** 2).sum()
    return {"Gini coefficient of the heads": gini(s),
            "Gini coefficient of the layers' sums": gini(layers),
            "variance of the scores between layers": between.item(),
            "the same if heads were dealt to layers by chance": (L - 1) / (L * G - 1),
            "the strongest layer's share": layers.max().item(),
            "heads with a tenth of the best head's score": visual.mean().item(),
            "the same in the layer that has most": visual.mean(1).max().item()}


def heads(run):
    """How few query heads are visual in the model's score file, and how uneven the scores of KV
    heads are, beside those of published files."""
    pages = scored_pages(run.model)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8")) if PUBLISHED.exists() else {}
    ours = unevenness(kv_head_scores(mean_scores(pages), run.model.config.kv_heads))
    few, most = (resampled(lambda s: unevenness(s)[name], pages) for name in list(ours)[-2:])
    held, four = (resampled(lambda s: top_share(s, part)[1], pages)
                  for part in (0.05, 4 / pages[0].numel()))
    uneven = table(f"How uneven the scores of KV heads are (%), {len(pages)} pages",
                   ["", run.name, *(f"{name}, published" for name in published)],
                   [*([name, of, *(p[name] for p in published.values())]
                      for name, of in ours.items()), ["the four best query heads hold", four]])
    claims = [claim("few heads look: fewer than 5 % have a tenth of the best head's score, or more",
                    "< 5 %; their published scores: 11.1", {"": few}, below=0.05, signed=False),
              claim("so in every layer (the figure is that of the layer that has most)",
                    "< 5 %; their published scores: 31.2", {"": most}, below=0.05, signed=False),
              claim("the top 5 % of the heads hold half of the scores, or more",
                    "their published scores: 55.4", {"": held}, above=0.5, signed=False)]
    return dict(summary=[uneven], tables=[uneven], claims=claims)


def methods(run, part, size=SIZE, share=1, on=""):
    """Every method and control at every budget; on large pages, too, of which there are fewer."""
    rows = {"full": dict.fromkeys(BUDGETS, Setting("full")),
            **{name: row(method=name) for name in METHODS[1:]},
            **{name: row(**changes) for name, changes in CONTROLS.items()}}
    pairs = [*(("sparsemm", name) for name in rows if name != "sparsemm"), ("layers", "snapkv")]
    of_task, tables = run.measure(part, {"Accuracy (%)": rows, "Differences (points)": {
        f"{a} - {b}": minus(rows[a], rows[b]) for a, b in pairs}}, share, size)
    curves = {f"{task}s": {m: [(measured[s]["kept"].mean(), measured[s]["accuracy"].mean())
                               for s in dict.fromkeys(rows[m].values())] for m in METHODS}
              for task, measured in of_task.items()}
    claims = [compared(f"`sparsemm` is better than `{name}`{on}", of_task, rows["sparsemm"],
                       rows[name], paper, above=0) for name, paper in BETTER.items()]
    claims += [compared(f"`layers` is better than `snapkv`{on}", of_task, rows["layers"],
                        rows["snapkv"], above=0),
               compared(f"`random` is as good as `snapkv`: within 3 points{on}", of_task,
                        rows["random"], rows["snapkv"], "about equal", above=-0.03, below=0.03),
               compared(f"`sparsemm` loses no more than a point to the full cache{on}, 256 entries",
                        of_task, rows["sparsemm"], rows["full"], "0 on DocVQA and OCRBench", 256,
                        above=-0.01)]
    return dict(tables=tables, claims=claims, curves=curves)


def ablation(run):
    """Parts of the budget, rho, window; what a head cannot hold: poured out again, or lost."""
    parts = {"window": row(method="window"), "window + uniform": row(rho=1.0),
             "window + uniform + score": row()}
    shares = {rho: row(rho=rho) for rho in (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)}
    bare = {rho: row(rho=rho, window=lambda b: 1) for rho in (0.0, 0.1)}
    pours = {"poured out": row(), "lost": row(redistribute=False)}
    of_task, tables = run.measure("ablation", {
        "Parts of the budget (%)": parts, "Uniform share rho (%)": shares,
        "Uniform share where the window is 1 (%)": bare,
        "Window (%)": {w: row(window=lambda b: w) for w in (8, 16, 32, 64)},
        "What a head cannot hold (%)": pours, "What a head cannot hold (points)": {
            "poured out - lost": minus(*pours.values())}, "Entries held": pours})
    claims = [compared("entries shared out evenly help beside the window", of_task,
                       parts["window + uniform"], parts["window"], "+4.1 MMBench, at 64", above=0),
              compared("accuracy falls without the uniform share (rho 0, not 0.1)", of_task,
                       shares[0.0], shares[0.1], "from 0.519 to 0.145 (Mistral)", below=0),
              compared("the same if the window is one entry", of_task, bare[0.0], bare[0.1],
                       below=0)]
    return dict(tables=tables, claims=claims)


def masking(run, seeds=10):
    """Visual heads switched off, random other heads, and every set of the four best heads."""
    s, num, at, tables = run.tables["aligned"], max(1, run.pages // 2), {}, []
    sets = head_sets(s, seeds)
    four = [of for n in range(1, 5) for of in combinations(best_heads(s)[:4], n)]
    for task in TASKS:
        def work(i):
            image, text, _, ids = run.exercise(task, i)
            return masked_accuracy(run.model, image, text, ids[:MASKED],
                                   [[], *sets.values(), *four])

        where = f"{task}s, {SIZE[0]} x {SIZE[1]} pixels, {num} pages"
        none, *masked = np.array(run.per_page(f"masking-{task}", num, work)).T
        of, few, many = dict(zip([*sets, *four], masked)), [], []               # {set: (pages,)}
        for n in range(1, 5):
            ranked = sorted((of[key].mean(), ", ".join(f"{l}-{h}" for l, h in key))
                            for key in four if len(key) == n)
            few.append([n, interval(np.mean([of[key] for key in four if len(key) == n], 0)),
                        *(f"{show(mean)} ({names})" for mean, names in (ranked[0], ranked[-1]))])
        for n in dict.fromkeys(n for n, _ in sets):
            ours, control = of[n, "visual"], np.mean([of[n, seed] for seed in range(seeds)], 0)
            many.append([f"{n} of {s.numel()}", *map(interval, (
                ours, control, ours - none, control - none, ours - control))])
        at[f"{task}s"] = many[-2:]                               # about 5 % and 10 % of the heads
        tables += [table(f"Accuracy by how many of the four best heads are masked (%), {where}",
                         ["masked", "mean of the sets", "worst set (layer-head)", "best set"],
                         [[0, interval(none)], *few]),
                   table(f"Accuracy with masked heads (%), {where}",
                         ["masked", "visual heads", f"random heads, mean of {seeds} sets",
                          "visual - none", "random - none", "visual - random"],
                         [[0, interval(none)], *many])]
    claims = [claim("masking the top 5 % of the heads costs accuracy", "-20 OCRBench, -15 TextVQA",
                    {task: five[3] for task, (five, _) in at.items()}, below=0),
              claim("masking as many random heads costs less than 3 points", "< 3",
                    {task: five[4] for task, (five, _) in at.items()}, above=-0.03),
              claim("masking the top 10 % costs more than masking as many random heads",
                    "not measured", {task: ten[5] for task, (_, ten) in at.items()}, below=0)]
    return dict(summary=tables[::2], tables=tables, claims=claims)


def robustness(run):
    """Scores from other kinds of pages, from detection, and from fewer pages."""
    def scored(i):
        drawn = (render_page(random.Random(f"reproduce shapes {run.seed} {i} {attempt}"), "shapes",
                             *SCORED) for attempt in range(100))
        page = next(page for page in drawn if page.objects)
        text = next(answer for task, _, answer in tasks(page) if task == "shapes")
        ids = run.model.processor.tokenizer(text, add_special_tokens=False).input_ids
        return score_transcript(run.model, page.image, [(o.text, o.box) for o in page.objects], ids,
                                prompt("shapes"))[0].tolist()

    pages, r = scored_pages(run.model), rank_correlation
    num = len(pages) // len(KINDS)
    ocr = {f"OCR, {kind}": pages[KINDS.index(kind)::len(KINDS)][:num]
           for kind in ("lines", "receipt", "letter")}
    shapes = torch.tensor(run.per_page("shapes", num, scored), dtype=torch.float64)
    sources = {"OCR, all": pages, **ocr, "detection": shapes, "10 pages": pages[:10],
               "50 pages": pages[:50]}
    run.tables.update({name: mean_scores(scores) for name, scores in sources.items()})
    pairs = [*combinations(ocr, 2), *((name, "detection") for name in ocr),
             ("10 pages", "OCR, all"), ("50 pages", "OCR, all")]
    agreement = [[f"{a} / {b}", resampled(r, sources[a], sources[b])] for a, b in pairs]
    least = min((figure for _, figure in agreement[:3]), key=lambda figure: figure[0])
    apart = resampled(lambda a, b, c, d: (
        r(a, b) + r(a, c) + r(b, c) - r(a, d) - r(b, d) - r(c, d)) / 3, *ocr.values(), shapes)
    rows = {name: row(BUDGETS[:3], scores=name) for name in sources}
    of_task, tables = run.measure("robustness", {"sparsemm by source of the scores (%)": rows})
    tables.insert(0, table(f"Agreement of scores (%), {num} pages of a kind, {len(pages)} in all",
                           ["", "rank correlation"], agreement))
    claims = [claim("scores from lines, receipts and letters agree: the lowest rank correlation of "
                    "two is above 0.8", "highly consistent", {"": least}, above=0.8, signed=False),
              claim("they agree better with one another than with scores from naming shapes "
                    "(difference of the mean correlations)", "better", {"": apart}, above=0),
              compared("scores from lines of text serve better than from naming shapes", of_task,
                       rows["OCR, lines"], rows["detection"], "better", above=0)]
    return dict(tables=tables, claims=claims)


def window(run):
    """The observation window at tight budgets. Development pages choose RULE; test pages compare it
    with the paper's window of 32, on large pages, too."""
    rules = {name: row(TIGHT, lambda b: min(rule(b), b)) for name, rule in RULES.items()}
    of_task, _ = run.measure("window", {"": rules}, 1 / 2, split="development")
    development = {name: interval(np.mean([of[s]["accuracy"] for of in of_task.values()
                                           for s in r.values()], 0)) for name, r in rules.items()}
    lines = {f"{m}, window {w}": row(TIGHT + WIDE, RULES[w], method=m)
             for m in WINDOWED[:2] for w in (RULE, "32")}
    cells = {f"{m}, window {w}": row(TIGHT, RULES[w], method=m)
             for m in WINDOWED for w in dict.fromkeys(["4", "8", "16", "32", RULE])}
    full, tables, claims, least, curves = Setting("full"), [], [], [], {}
    for size, share, more, on in (SIZE, 1, cells, ""), (LARGE, 3 / 8, {}, " on large pages"):
        rows = {"full": dict.fromkeys(TIGHT + WIDE, full), **more, **lines}
        of_task, found = run.measure("window", {"Accuracy by window (%)": rows, (
            f"Window {RULE} minus window 32 (points)"): {
                m: minus(rows[f"{m}, window {RULE}"], rows[f"{m}, window 32"])
                for m in WINDOWED if f"{m}, window 32" in rows}}, share, size)
        tables += found
        for task, measured in of_task.items():
            mean = {s: of["accuracy"].mean() for s, of in measured.items()}
            enough = [[b for b, s in r.items() if mean[s] >= 0.95 * mean[full]]
                      for r in lines.values()]
            least.append([f"{task}s{on}", *(str(min(of)) if of else "> 512" for of in enough)])
            curves[f"{task}s{on}"] = {"full": [(TIGHT[-1], mean[full])], **{
                name.replace(", window", ""): [(b, mean[s]) for b, s in r.items() if b in TIGHT]
                for name, r in lines.items()}}
        claims += [compared(f"`{m}` is better with a window of {RULE} than with 32{on}", of_task,
                            lines[f"{m}, window {RULE}"], lines[f"{m}, window 32"], above=0)
                   for m in WINDOWED[:2]]
    tables.append(table("Fewest entries per head that keep 95 % of the full cache's accuracy, "
                        f"{run.pages} pages, large ones 3/8 as many", ["", *lines], least))
    return dict(summary=tables[1::2] + tables[-1:], tables=tables, claims=claims,
                curves=curves, development=development)


def beyond(run):
    """Changes to the method, on development pages; the same again on test pages."""
    base, tables = row(), []
    rows = {f"ranked by {by}": row(by=by) for by in BY} | {"scores squared": row(scores="squared")}
    for split in ("development", "test"):
        tables += run.measure("beyond", {
            f"Change of sparsemm's accuracy (points), {split}": {
                name: minus(r, base) for name, r in rows.items()},
            f"Accuracy (%), {split}": {"sparsemm": base, **rows}}, split=split)[1]
    return dict(summary=tables[::2], tables=tables, claims=[])


def fastv(run, layer=2):
    """FastV drops image tokens in prefill. Answers are written freely."""
    num, shares, scores = max(1, run.pages // 2), (1.0, 0.5, 0.25), run.tables["aligned"]
    ways = {f"{name} {b}": Method(name, b, head_scores=scores) for name, b in (
        ("sparsemm", 64), ("sparsemm", 128), ("snapkv", 64))} | {"full": Method("full")}
    rows = {name: {f"{share:.0%} stay": f"{name}, {share}" for share in shares} for name in ways}

    def work(i):
        image, text, right, ids = run.exercise("question", i)
        asked, most = (run.model, [image], text), len(ids) + 8
        found = [generate(*asked, way, most) if share == 1 else
                 pruning.generate(*asked, layer, share, way, most)
                 for way in ways.values() for share in shares]
        return [[r["text"] == right for r in found], [np.mean(r["kept"]) for r in found]]

    done = np.array(run.per_page("fastv", num, work), dtype=float)              # (pages, 2, runs)
    measured = {name: dict(accuracy=done[:, 0, j], kept=done[:, 1, j]) for j, name in enumerate(
        name for r in rows.values() for name in r.values())}
    where = f"FastV after {layer} layers, {SIZE[0]} x {SIZE[1]} pixels, {num} pages"
    return dict(claims=[], tables=[grid(f"{what}, {where}", rows, measured)
                                   for what in ("Exact answers (%)", "Entries held")])


PARTS = dict(heads=heads, main=partial(methods, part="main"), large=partial(
    methods, part="large", size=LARGE, share=3 / 8, on=" on large pages"), ablation=ablation,
    masking=masking, robustness=robustness, window=window, beyond=beyond, fastv=fastv)


# ---- the command ---------------------------------------------------------------------------------

def run_part(args, model, name, part):
    """Runs a part for one model, and stores its results."""
    c, path = model.config, args.out / f"{part}-{name}.json"
    s = read_head_scores(model.folder / SCORES_FILE, c.layers, c.heads)
    journal = Journal(path, dict(weights=fingerprint(model), scores=s.tolist(), seed=args.seed))
    run = Run(model, name, args.seed, args.pages, score_tables(s, c.kv_heads), journal)
    start, found = time.monotonic(), PARTS[part](run)
    stored = dict(part=part, model=name, entry_bytes=2 * c.head_dim * model.dtype.itemsize *
                  c.layers * c.kv_heads, command=args.command, machine=machine_name(model.device),
                  torch=torch.__version__, minutes=(time.monotonic() - start) / 60, **found)
    write_json(stored, path)
    journal.remove()
    print(results_page(stored))


def published(args):
    """Stores how uneven the scores of some files are; the part heads shows them."""
    stored = json.loads(PUBLISHED.read_text(encoding="utf-8")) if PUBLISHED.exists() else {}
    for file in map(Path, args.files):
        scores = read_head_scores(file)
        of = unevenness(kv_head_scores(scores, args.kv_heads or scores.shape[1]))
        stored[file.stem] = of
        print(file.stem, *(f"{name}: {show(x)} %" for name, x in of.items()), sep="\n")
    write_json(stored, PUBLISHED)


def results(args):
    """Fills the pages, and draws the charts."""
    found = stored_results(args.out, PARTS)
    write_results(found, args.out)
    for r in found["main"]:
        line_charts(r["curves"], args.out / f"main-{r['model']}.png",
                    f"{r['model']}, pages of {SIZE[0]} x {SIZE[1]}: accuracy (%) against entries",
                    "entries kept per head", BUDGETS[:-1])
    kb = {r["model"]: {name: [(r["entry_bytes"] / 1000 * n, accuracy) for n, accuracy in curve] for
                       name, curve in r["curves"]["transcripts"].items()} for r in found["main"]}
    line_charts(kb, args.out / "bytes.png", "Accuracy on transcripts (%) against bytes of cache",
                "kB of keys and values held", [25 * 2**i for i in range(10)])
    line_charts({f"{r['model']}, {task}s": r["curves"][f"{task}s"] for r in found["window"]
                 for task in TASKS}, args.out / "window.png",
                "Accuracy (%) by method and window", "entries per head", TIGHT)


def work(args):
    args.out = args.out or HERE / ("work/quick" if args.quick else "results")
    args.pages = args.pages or (40 if args.quick else 128)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part in ("results", "published"):
        return (results if args.part == "results" else published)(args)
    for folder in args.model:
        model = load(folder, args.device, args.dtype)
        for part in PARTS if args.part == "all" else [args.part]:
            run_part(args, model, Path(folder).name, part)


def main(argv=None):
    torch.set_num_threads(1)
    parser = OneLineParser("reproduce.py", description="Rerun the paper's claims; store tables.")
    add = parser.add_argument
    add("part", nargs="?", choices=(*PARTS, "all", "published", "results"), default="all")
    add("files", nargs="*", metavar="FILE", help="score files, for published")
    add("--kv-heads", type=int, metavar="N", help="per layer, in these files (default: all heads)")
    add("--model", nargs="+", metavar="DIR", help="folders or hub ids (default: both small models)",
        default=[DEFAULT_MODEL, DEFAULT_MODEL.parent / "llava-next"])
    add("--quick", action="store_true", help="40 pages instead of 128")
    add("--pages", type=int, metavar="N", help="of each task; some parts take fewer")
    add("--out", type=Path, metavar="DIR",
        help="default: experiments/results, or experiments/work/quick if --quick")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("auto", *DTYPES), default="auto")
    add("--seed", type=int, default=0)
    parser.set_defaults(command=" ".join(["reproduce.py", *map(str, argv or sys.argv[1:])]))
    parser.run(work, argv)


if __name__ == "__main__":
    main()
