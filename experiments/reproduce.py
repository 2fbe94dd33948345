"""Rerun the paper's claims on the small models (or on real checkpoints), in one command.

    python experiments/reproduce.py [heads|main|ablation|masking|robustness|redistribution|beyond|all]
                                    [--model DIR ...] [--quick] [--out DIR]
    python experiments/reproduce.py readme          rewrites the results chapter of README.md

    page, question --> one prefill --> all keys and values, the last queries
                                          |        |        |
                                       sparsemm  snapkv   ...        x  budgets: which positions
                                          |        |        |           each head keeps, as masks
                                          `--------+--------'
                                       the right answer is forced through the decoder once, with a
                                       row of the batch for each of the masks  --> accuracy

The paper: arXiv 2506.05344. Accuracy is the share of the right answer's tokens that are predicted
from those before them, from the second one on: the first always sees the full cache. Pages are drawn
with seeds of their own (`exercise`), held out from training and from the scoring of heads; what is
tuned is tuned on others. Every figure comes with its 95 % interval (bootstrap over pages), and
differences between methods are paired: both have read the same pages. Results of single pages are
kept in DIR/pages, so that a run that was stopped goes on where it was.

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, w window, n
tokens of the answer, S settings.
"""

import contextlib
import json
import math
import os
import platform
import random
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, KVCache, kv_head_scores, make_method, observation_scores
from experiments.draw import line_charts
from experiments.evaluate_tiny import edit_distance, page_size
from experiments.pages import KINDS, prompt, render_page, tasks
from model_llava import load, prepare, rotary_angles, rotate
from score_heads import MATCHES, Rendered, force, gini, score_page, top_share, write_json
from sparsemm import DEFAULT_MODEL, OneLineParser, device_name, whole_number

HERE = Path(__file__).resolve().parent
SMALL_MODELS = (DEFAULT_MODEL, DEFAULT_MODEL.parent / "llava-next")
BUDGETS = (48, 64, 96, 128, 256, 512)                       # of the paper's ablation
TIGHT = BUDGETS[:3]
RIVALS = ("shuffled", "random", "snapkv", "pyramidkv", "adakv")
WRITERS = ("full", "sparsemm", "snapkv", "pyramidkv", "adakv", "shuffled")   # who writes freely
TASKS = {"question": ("form", "receipt", "table", "label"),
         "transcript": ("lines", "form", "receipt", "letter")}      # and the kinds of their pages
LONGEST = 128                   # so many tokens of a transcript are forced, or written
READS = 0.9                     # the accuracy of a full cache that counts as reading
SHARES = (1 / 64, 2 / 64, 3 / 64, 6 / 64)                   # of the heads that are masked


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


# ---- one prefill for all settings ----------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """One way to compress a cache."""
    method: str = "sparsemm"
    budget: int = 256
    window: int = 32
    rho: float = 0.1
    redistribute: bool = True
    scores: str = "aligned"         # which of the tables of visual scores (L, H), by name
    rank: str = "mean"              # what a head's positions are ranked by: the method's, or RANKS


class Prefill:
    """Stands where a cache would, and keeps of every layer all keys and values and the last
    queries: what any setting needs to compress it."""

    def __init__(self, model, image, text, rows=64):
        """rows: how many queries are kept, the largest observation window."""
        self.model, self.rows, self.q, self.k, self.v = model, rows, [], [], []
        self.rankings = {}                                  # those that settings have in common
        self.inputs = prepare(model, [image], text)
        self.first = model.logits(model.hidden_states(self.inputs, self)[-1])      # (vocabulary,)
        self.length = len(self.inputs.ids)

    def __len__(self):
        return len(self.k)

    def compress(self, layer, q, k, v):
        """q: (H, T, D), k, v: (G, T, D)."""
        self.q.append(q[:, -self.rows:].clone())
        self.k.append(k)
        self.v.append(v)

    def method(self, setting, tables, seed=0):
        """The setting's Method for this prompt."""
        c = self.model.config
        return make_method(setting.method, c.layers, c.kv_heads, self.length, setting.budget,
                           setting.window, setting.rho, setting.redistribute,
                           tables.get(setting.scores), seed)

    def ranked(self, layer, method, setting, tables):
        """Scores (G, T-w) of the positions, and the place of each in their order, 0 the best."""
        q, k = self.q[layer], self.k[layer]
        if method.rank is not observation_scores:                       # by position, and soon done
            a = method.rank(q, k, setting.window)
            return a, a.argsort(descending=True, stable=True).argsort()
        shared = layer, setting.window, setting.rank, setting.rank != "mean" and setting.scores
        if shared not in self.rankings:
            a = (observation_scores(q, k, setting.window) if setting.rank == "mean" else
                 RANKS[setting.rank](attention_rows(q, k, setting.window), k,
                                     tables[setting.scores][layer]))
            self.rankings[shared] = a, a.argsort(descending=True, stable=True).argsort()
        return self.rankings[shared]

    def keep(self, setting, tables, seed=0):
        """The positions of the prompt that each head keeps: (L, G, T) bool."""
        method, T = self.method(setting, tables, seed), self.length
        keep = torch.ones(len(self), len(self.k[0]), T, dtype=torch.bool)
        for l in range(len(self)):
            a, places = self.ranked(l, method, setting, tables)
            w = T - a.shape[1]
            keep[l, :, :T - w] = places.cpu() < (method.budgets(l, a).cpu() - w)[:, None]
        return keep

    def cache(self, setting, tables, seed=0, reserve=0):
        """The real cache, compressed under a setting."""
        cache = KVCache(self.method(setting, tables, seed), setting.window, reserve)
        for l in range(len(self)):
            cache.compress(l, self.q[l], self.k[l], self.v[l])
        return cache


def masked_attention(q, k, v, prompt_k, prompt_v, keep):
    """n answer tokens in S settings attend to what each keeps of the prompt, and to each other.

    q: (S, H, n, D); k, v: (S, G, n, D); prompt_k, prompt_v: (G, T, D); keep: (S, G, T) bool.
    Returns (S, H, n, D)."""
    (S, H, n, _), (_, G, T) = q.shape, keep.shape
    keys = torch.cat([prompt_k.expand(S, -1, -1, -1), k], dim=2)                    # (S, G, T+n, D)
    values = torch.cat([prompt_v.expand(S, -1, -1, -1), v], dim=2)
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    seen = torch.cat([keep[:, :, None].expand(S, G, n, T), causal.expand(S, G, n, n)], dim=-1)
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True,
                                          attn_mask=seen.repeat_interleave(H // G, dim=1))


@torch.inference_mode()
def forced_logits(prefill, keep, ids):
    """The logits (S, n, vocabulary) that follow each token of a forced answer, ids (n,), for S
    caches at a time. keep: (S, L, G, T) bool."""
    model, c, S, n = prefill.model, prefill.model.config, len(keep), len(ids)
    positions = int(prefill.inputs.positions.max()) + 1 + torch.arange(n).expand(3, -1)
    ids, keep = (t.to(prefill.inputs.ids.device) for t in (torch.as_tensor(ids), keep))
    x = model.decoder.embed_tokens(ids).expand(S, n, -1)                                # (S, n, E)
    cos, sin = (a.to(x) for a in rotary_angles(positions, c))
    for l, layer in enumerate(model.decoder.layers):
        y, attn = layer.input_layernorm(x), layer.self_attn
        q, k, v = (project(y).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
                   for project in (attn.q_proj, attn.k_proj, attn.v_proj))      # (S, heads, n, D)
        out = masked_attention(rotate(q, cos, sin), rotate(k, cos, sin), v,
                               prefill.k[l], prefill.v[l], keep[:, l])
        x = x + attn.o_proj(out.transpose(1, 2).flatten(2))             # (S, H, n, D) -> (S, n, E)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.logits(model.decoder.norm(x))


def forced_accuracy(prefill, keep, ids, rows=2048):
    """The share of right tokens among the second to the last of an answer, for each of S caches:
    (S,). Caches that are the same are computed once, and about `rows` tokens at a time."""
    different, which = torch.unique(keep.flatten(1), dim=0, return_inverse=True)
    different, right = different.view(-1, *keep.shape[1:]), torch.tensor(ids[1:])
    parts = [forced_logits(prefill, part, ids[:-1]).argmax(-1).cpu() == right
             for part in different.split(max(1, rows // len(ids)))]
    return torch.cat(parts).double().mean(1)[which]


@torch.inference_mode()
def written(prefill, cache, limit):
    """What the model writes from a prefill and its compressed cache, greedily, as text."""
    model, tokens = prefill.model, [prefill.first.argmax().item()]
    position = int(prefill.inputs.positions.max()) + 1
    while tokens[-1] not in model.processor.end_tokens and len(tokens) < limit:
        tokens.append(model.decode(tokens[-1], position, cache).argmax().item())
        position += 1
    return model.processor.tokenizer.decode(tokens, skip_special_tokens=True)


# ---- other ways to rank positions ----------------------------------------------------------------

def attention_rows(q, k, window):
    """A of cache.observation_scores, not yet averaged: (H, w, T-w) float32."""
    (G, T, D), H = k.shape, q.shape[0]
    w = min(window, T)
    keys = k.float().repeat_interleave(H // G, dim=0)                                   # (H, T, D)
    logits = q[:, -w:].float() @ keys.transpose(1, 2) / math.sqrt(D)                    # (H, w, T)
    future = torch.ones(w, T, dtype=torch.bool, device=q.device).triu(T - w + 1)
    return logits.masked_fill(future, -math.inf).softmax(-1)[:, :, :T - w]


def pool(a, kernel=5):
    """(G, T-w) -> the same, averaged over neighbours as in cache.observation_scores."""
    return F.avg_pool1d(a[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]


def rank_by_scored_heads(A, k, s):
    """The heads of a group count by their visual scores instead of alike. (MHA: no change.)"""
    weights = s.to(A).view(len(k), -1)                                                      # (G, R)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    weights = weights / weights.sum(1, keepdim=True)
    return pool((A.mean(1).unflatten(0, weights.shape) * weights[:, :, None]).sum(1))


def rank_by_best_head(A, k, s):
    """Of the heads of a group the one that looks most counts. (MHA: no change.)"""
    return pool(A.mean(1).unflatten(0, (len(k), -1)).amax(1))


def rank_by_last_query(A, k, s, share=0.5):
    """The last query has `share` of the weight (after BACON, arXiv 2606.14782)."""
    a = share * A[:, -1] + (1 - share) * A.mean(1)                                      # (H, T-w)
    return pool(a.unflatten(0, (len(k), -1)).mean(1))


def rank_by_diversity(A, k, s):
    """Attention mixed with how much a key differs from the others (after MixKV, arXiv 2510.20707):
    (1 - r) * attention + r * diversity, both scaled to [0, 1] per head; r is the mean cosine
    similarity of a head's keys."""
    a = pool(A.mean(1).unflatten(0, (len(k), -1)).mean(1))
    unit = F.normalize(k[:, :a.shape[1]].float(), dim=-1)                             # (G, T-w, D)
    mean = unit.mean(1, keepdim=True)
    r = mean.square().sum(-1).clamp(0, 1)                                                   # (G, 1)
    diversity = -(unit * F.normalize(mean, dim=-1)).sum(-1)

    def scaled(x):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-30)
    return (1 - r) * scaled(a) + r * scaled(diversity)


RANKS = {"heads by score": rank_by_scored_heads, "best head": rank_by_best_head,
         "last query": rank_by_last_query, "diversity": rank_by_diversity}


def power_of_scores(s, G, exponent):
    """Visual scores (L, H) whose KV heads have s[l,g] ** exponent; it is dealt out evenly among a
    group's query heads, whose sum is all that counts."""
    kv = kv_head_scores(s, G) ** exponent
    return (kv * G / s.shape[1]).repeat_interleave(s.shape[1] // G, dim=1)


# ---- masked heads --------------------------------------------------------------------------------

@contextlib.contextmanager
def masked_heads(model, heads):
    """Within it the output of these heads, [(layer, head), ...], is zero before o_proj, in whatever
    the model computes, prefill and answer.

    NOTE(official): there the query is set to zero, so that the head averages all values."""
    def zero(columns):
        def hook(module, inputs):
            x = inputs[0].clone()
            x[..., columns] = 0
            return (x,)
        return hook

    D, hooks = model.config.head_dim, []
    for layer in {l for l, _ in heads}:
        columns = [h * D + d for l, h in heads if l == layer for d in range(D)]
        o_proj = model.decoder.layers[layer].self_attn.o_proj
        hooks.append(o_proj.register_forward_pre_hook(zero(columns)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def head_sets(s, seeds):
    """{(count, "visual" or seed): heads}: the best heads by s (L, H), and for each seed random sets
    of the same counts, drawn once from the heads that are in none of the visual sets."""
    H, order = s.shape[1], s.flatten().argsort(descending=True, stable=True).tolist()
    counts = sorted({max(1, round(share * len(order))) for share in SHARES})
    others, sets = sorted(order[counts[-1]:]), {}
    for count in counts:
        sets[count, "visual"] = [divmod(i, H) for i in order[:count]]
        for seed in range(seeds):
            drawn = random.Random(f"masked heads {seed} {count}").sample(others, count)
            sets[count, seed] = [divmod(i, H) for i in drawn]
    return sets


@torch.inference_mode()
def masked_accuracy(model, image, text, ids, sets):
    """The share of right tokens of a forced answer, all of them, for each set of masked heads."""
    forced, right = force(prepare(model, [image], text), ids[:-1]), torch.tensor(ids)
    x, shares = model.embed(forced), []
    for heads in sets:
        with masked_heads(model, heads):
            hidden = model.decoder(x, forced.positions)[-len(ids):]
        shares.append((model.logits(hidden).argmax(-1).cpu() == right).double().mean().item())
    return shares


# ---- figures -------------------------------------------------------------------------------------

def interval(values, draws=2000):
    """[mean, low, high]: a mean over pages and its 95 % bootstrap interval."""
    x = np.asarray(values, dtype=float)
    means = x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))].mean(1)
    return [x.mean(), *np.percentile(means, [2.5, 97.5])]


def anls(answer, right):
    """Normalised Levenshtein similarity, 0 if below a half (DocVQA)."""
    a, b = (" ".join(text.lower().split()) for text in (answer, right))
    s = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
    return s if s >= 0.5 else 0.0


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


def table(title, head, rows, unit="%", readme=False):
    """A table as it is stored. rows: [label, cell, ...]; a cell is a number, [mean, low, high], text
    or None; unit: "%" for shares, which are then shown as per cent; readme: whether it belongs
    there."""
    return dict(title=title, head=head, rows=rows, unit=unit, readme=readme)


def claim(text, paper, ours, holds):
    """A claim of the paper, its figure there, ours, and whether ours agrees."""
    return dict(claim=text, paper=paper, ours=ours, holds=bool(holds))


def show(cell, unit="%", sign=""):
    """A cell as text: "91.2 [88.1, 94.0]"."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (list, tuple)):
        mean, low, high = (show(x, unit, sign) for x in cell)
        return f"{mean} [{low}, {high}]"
    if unit == "%":
        return f"{100 * cell:{sign}.1f}"
    return f"{cell:{sign}.2f}" if isinstance(cell, float) else f"{cell:{sign},}"


def markdown(stored):
    """A stored table as Markdown."""
    lines = [f"**{stored['title']}**", "", "| " + " | ".join(map(str, stored["head"])) + " |",
             "|---" * len(stored["head"]) + "|"]
    for label, *cells in stored["rows"]:
        lines.append("| " + " | ".join([label, *(show(x, stored["unit"]) for x in cells)]) + " |")
    return "\n".join(lines)


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
    tables: dict = field(default_factory=dict)              # visual scores (L, H) by name
    weights: int = 0                # a checksum of the weights

    def per_page(self, name, facts, num, work):
        """[work(0), ..., work(num - 1)], of which those done before come from a file.

        facts: what else the results depend on; a file made under others is refused."""
        path = self.out / "pages" / f"{self.name}-{name}.json"
        facts = json.loads(json.dumps(dict(facts, seed=self.seed, weights=self.weights)))
        done = {}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["facts"] != facts:
                raise ValueError(f"--out: {path} was made with other settings; another folder is "
                                 "right, or none of that name")
            done = stored["pages"]
        path.parent.mkdir(parents=True, exist_ok=True)
        missing, saved = [i for i in range(num) if str(i) not in done], time.monotonic()
        try:
            for i in tqdm(missing, desc=f"{self.name} {name}", unit="page", leave=False):
                done[str(i)] = work(i)
                if time.monotonic() > saved + 2:
                    write_json(dict(facts=facts, pages=done), path)
                    saved = time.monotonic()
        finally:
            if missing:
                write_json(dict(facts=facts, pages=done), path)
        return [done[str(i)] for i in range(num)]

    def measure(self, name, task, size, settings, num=None, split="test"):
        """Each setting on the same pages, answers forced: {setting: {"accuracy": (pages,), "kept":
        (pages,) entries per head}} and the mean prompt length. Random tables are drawn anew for
        every page, so that intervals hold the luck of the draw, too."""
        used = {s.scores for s in settings if s.scores in self.tables}
        facts = dict(settings=[asdict(s) for s in settings], task=task, size=size, split=split,
                     longest=LONGEST, tables={t: checksum(self.tables[t]) for t in sorted(used)})

        def work(i):
            image, text, _, ids = exercise(self.model, split, self.seed, task, size, i)
            with torch.inference_mode():
                prefill = Prefill(self.model, image, text)
                keep = torch.stack([prefill.keep(s, self.tables, seed=i) for s in settings])
                accuracy = forced_accuracy(prefill, keep, ids).tolist()
            kept = keep.double().mean((1, 2, 3)) * prefill.length
            return dict(tokens=prefill.length, kept=kept.tolist(), accuracy=accuracy)

        label = f"{name}-{task}-{size[0]}x{size[1]}-{split}"
        done = self.per_page(label, facts, num or self.pages, work)
        measured = {s: {what: np.array([page[what][j] for page in done])
                        for what in ("accuracy", "kept")} for j, s in enumerate(settings)}
        return measured, float(np.mean([page["tokens"] for page in done]))

    def score(self, name, num, work):
        """Visual scores of single pages (num, L, H), and how many tokens counted in all. work(i) ->
        what score_page returns."""
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
            return score_page(self.model, image, words, ids, match)
        return self.score(match.replace(" ", "-"), len(pages), work)

    def detection_scores(self, num):
        """Scores of pages with shapes, while they are named."""
        def work(i):
            image, objects, text = detection_page(self.seed, i, self.sizes[-1])
            ids = self.model.processor.tokenizer(text, add_special_tokens=False).input_ids
            return score_page(self.model, image, objects, ids, prompt=prompt(None, "shapes", ""))
        return self.score("shapes", num, work)

    def reading_size(self):
        """The largest page size at which a full cache reads (READS), judged by questions about
        development pages; if there is none, the one it reads best."""
        shares = [self.measure("reading", "question", size, [Setting("full")], num=24,
                               split="development")[0] for size in self.sizes]
        shares = [next(iter(share.values()))["accuracy"].mean() for share in shares]
        for size, share in reversed(list(zip(self.sizes, shares))):
            if share >= READS:
                return size
        return self.sizes[int(np.argmax(shares))]


def checksum(tensor):
    return zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def mean_scores(scores):
    """(pages, L, H) -> (L, H), which sums to 1."""
    s = scores.mean(0)
    return s / s.sum() if s.sum() > 0 else torch.full_like(s, 1 / s.numel())


def grid(title, columns, rows, measured, what="accuracy", **more):
    """A table of measured settings. rows: {label: a setting for each column, or None}."""
    unit = "%" if what == "accuracy" else "entries"
    return table(title, ["", *columns], [
        [label, *(s and interval(measured[s][what]) for s in settings)]
        for label, settings in rows.items()], unit, **more)


def difference(measured, a, b):
    """[mean, low, high] of a's accuracy minus b's, page by page."""
    return interval(measured[a]["accuracy"] - measured[b]["accuracy"])


def differences(title, columns, rows, measured, **more):
    """A table of differences. rows: {label: a pair of settings for each column, or None}."""
    return table(title, ["", *columns], [
        [label, *(pair and difference(measured, *pair) for pair in pairs)]
        for label, pairs in rows.items()], **more)


def pixels(size):
    return f"{size[0]} x {size[1]}"


def sentence(figures):
    """{"48": [mean, low, high], ...} as text: "+3.1 [1.0, 5.2] at 48; ..."."""
    return "; ".join(f"{show(figure, sign='+')} at {where}" for where, figure in figures.items())


# ---- the parts -----------------------------------------------------------------------------------

def heads(run):
    """How many heads are visual, and how concentrated the scores are."""
    pages, tokens = run.ocr_scores()
    (num, L, H), rng = pages.shape, np.random.default_rng(0)
    resampled = [pages[rng.integers(0, num, num)] for _ in range(200)]

    def figure(of):
        values = [float(of(mean_scores(sample))) for sample in resampled]
        return [float(of(mean_scores(pages))), *np.percentile(values, [2.5, 97.5])]

    def visual(s):
        """Heads with at least a tenth of the best head's score."""
        return (s >= s.max() / 10).double()

    rows = [[f"layer {l}", figure(lambda s: visual(s)[l].mean()), figure(lambda s: s[l].sum())]
            for l in range(L)]
    rows.append(["all", figure(lambda s: visual(s).mean()), "100"])
    top, _ = top_share(pages[0], 0.05)
    shares = [[f"top 5 % of the heads ({top} of {L * H}) hold",
               figure(lambda s: top_share(s, 0.05)[1]), "55.4"],
              ["Gini coefficient, per cent", figure(gini), "85.5"],
              ["heads that hold half of all scores",
               figure(lambda s: (s.flatten().sort(descending=True).values.cumsum(0) < 0.5).sum() + 1)
               and figure(lambda s: ((s.flatten().sort(descending=True).values.cumsum(0) < 0.5)
                                     .sum() + 1) / s.numel()), "-"]]
    everywhere = rows[-1][1]
    largest = max(row[1][0] for row in rows[:-1])
    return dict(
        facts=dict(pages=num, tokens=tokens, size=run.sizes[-1]),
        tables=[table("Concentration of the visual scores, %", ["", run.name,
                      "published scores of LLaVA-NeXT-Vicuna-7B (1,024 heads)"], shares,
                      readme=True),
                table("Visual heads (at least a tenth of the best head's score) and share of the "
                      "scores, %", ["", "visual heads", "share of the scores"], rows)],
        claims=[claim("Fewer than 5 % of the heads of a layer are visual", "< 5 %",
                      f"{show(everywhere)} % of all heads; {show(largest)} % in the layer with most",
                      largest < 0.05)])


def main_part(run):
    """Every method at every budget, questions and transcripts, by page size."""
    methods = METHODS[1:]
    full, settings = Setting("full"), {m: [Setting(m, b) for b in BUDGETS] for m in methods}
    everything, size = [full, *(s for row in settings.values() for s in row)], run.reading_size()
    tables, claims, curves = [], [], {}
    for task in TASKS:
        for other in run.sizes:
            measured, T = run.measure("main", task, other, everything)
            where = f"{task}s, {pixels(other)} pixels, {T:.0f} prompt tokens"
            rows = {"full": [full] * len(BUDGETS), **settings}
            tables += [
                grid(f"Accuracy, {where}, %", BUDGETS, rows, measured, readme=other == size),
                differences(f"sparsemm minus each other method, {where}, points", BUDGETS,
                            {m: list(zip(settings["sparsemm"], settings[m])) for m in methods
                             if m != "sparsemm"}, measured),
                grid(f"Entries really kept per head, {where}", BUDGETS, rows, measured, "kept")]
            if other == size:
                claims += main_claims(task, measured, T, full, settings)
                curves[where] = {m: [(measured[s]["kept"].mean(), measured[s]["accuracy"].mean())
                                     for s in row] for m, row in settings.items()}
                curves[where]["full"] = [(T, measured[full]["accuracy"].mean())]
    picture = f"main-{run.name}.png"
    line_charts(curves, run.out / picture, f"{run.name}: accuracy against kept entries",
                "entries kept per head", BUDGETS[:-1])
    free = free_running(run, size)
    return dict(facts=dict(pages=run.pages, size=size), tables=tables + free,
                claims=claims, picture=picture)


def main_claims(task, measured, T, full, settings):
    """What the paper says of methods and budgets, on one task at the reading size."""
    tight = [i for i, b in enumerate(BUDGETS) if b <= T / 4] or [0]
    wide = [i for i, b in enumerate(BUDGETS) if b >= T / 2]
    sparse, claims = settings["sparsemm"], []
    for rival in RIVALS:
        figures = {BUDGETS[i]: difference(measured, sparse[i], settings[rival][i]) for i in tight}
        paper = {"snapkv": "+4 to +6 points at 256 (DocVQA, OCRBench)",
                 "pyramidkv": "+3 to +4", "adakv": "+3 to +4"}.get(rival, "above")
        claims.append(claim(f"sparsemm above {rival} up to a quarter of the prompt, {task}s", paper,
                            sentence(figures), all(low > 0 for _, low, _ in figures.values())))
    figures = {BUDGETS[i]: difference(measured, sparse[i], full) for i in wide}
    claims.append(claim(f"sparsemm loses nothing (a point at most) from half the prompt on, {task}s",
                        "0 at 256 (DocVQA, OCRBench, TextVQA)", sentence(figures),
                        all(abs(mean) <= 0.01 for mean, _, _ in figures.values())))
    figures = {BUDGETS[i]: difference(measured, settings["random"][i], settings["snapkv"][i])
               for i in tight}
    claims.append(claim(f"random scores are as good as snapkv, {task}s", "about equal",
                        sentence(figures), all(low <= 0 <= high for _, low, high in
                                               figures.values())))
    return claims


def free_running(run, size):
    """Tables of answers that are written freely, with the real cache, on some of the pages."""
    full, budgets = Setting("full"), BUDGETS[1:4]
    settings = [full] + [Setting(m, b) for m in WRITERS[1:] for b in budgets]
    measures = {"question": dict(exact=lambda a, b: float(a == b), ANLS=anls),
                "transcript": dict(characters=characters)}
    tables = []
    for task, num in (("question", max(1, run.pages // 2)), ("transcript", max(1, run.pages // 8))):
        def work(i):
            image, text, answer, ids = exercise(run.model, "test", run.seed, task, size, i)
            answer = run.model.processor.tokenizer.decode(ids, skip_special_tokens=True)
            limit = min(LONGEST, len(ids) + 8)
            with torch.inference_mode():
                prefill = Prefill(run.model, image, text)
                texts = [written(prefill, prefill.cache(s, run.tables, i, limit), limit)
                         for s in settings]
            return {name: [of(text, answer) for text in texts]
                    for name, of in measures[task].items()}

        facts = dict(settings=[asdict(s) for s in settings], size=size, longest=LONGEST,
                     tables=checksum(run.tables["aligned"]))
        pages = run.per_page(f"free-{task}-{size[0]}x{size[1]}", facts, num, work)
        for name in measures[task]:
            measured = {s: dict(accuracy=np.array([page[name][j] for page in pages]))
                        for j, s in enumerate(settings)}
            rows = {m: [full if m == "full" else Setting(m, b) for b in budgets] for m in WRITERS}
            where = f"{name}, {task}s written freely, {pixels(size)} pixels, {num} pages"
            tables += [grid(f"{where}, %", budgets, rows, measured, readme=True),
                       differences(f"sparsemm minus each other method, {where}, points", budgets,
                                   {m: list(zip(rows["sparsemm"], rows[m])) for m in WRITERS
                                    if m != "sparsemm"}, measured)]
    return tables


def ablation(run):
    """The three parts of the budget, the uniform share rho, and the window."""
    size, tables, claims = run.reading_size(), [], []
    parts = {"window": [Setting("window", b) for b in BUDGETS],
             "window + uniform": [Setting(budget=b, rho=1.0) for b in BUDGETS],
             "window + uniform + score": [Setting(budget=b) for b in BUDGETS]}
    shares = {f"rho = {rho:g}": [Setting(budget=b, rho=float(rho)) for b in BUDGETS]
              for rho in (0, 0.05, 0.1, 0.2, 0.5, 1)}
    windows = {f"window {w}": [Setting(budget=b, window=w) if b >= w else None for b in BUDGETS]
               for w in (8, 16, 32, 64)}
    settings = list(dict.fromkeys(s for rows in (parts, shares, windows) for row in rows.values()
                                  for s in row if s))
    for task in TASKS:
        measured, T = run.measure("ablation", task, size, settings)
        where = f"{task}s, {pixels(size)} pixels, {T:.0f} prompt tokens"
        tables += [grid(f"Parts of the budget, {where}, %", BUDGETS, parts, measured, readme=True),
                   grid(f"Uniform share, {where}, %", BUDGETS, shares, measured, readme=True),
                   grid(f"Window, {where}, %", BUDGETS, windows, measured, readme=True)]
        tight = [i for i, b in enumerate(BUDGETS) if b <= T / 4] or [0]
        names, paper = list(parts), {48: ("+6.7", "+4.0"), 128: ("+2.0", "+2.2")}
        for k, what in ((1, "uniform entries help"), (2, "score entries help further")):
            figures = {BUDGETS[i]: difference(measured, parts[names[k]][i], parts[names[k - 1]][i])
                       for i in tight}
            claims.append(claim(f"{what}, up to a quarter of the prompt, {task}s",
                                f"{paper[48][k - 1]} at 48, {paper[128][k - 1]} at 128 (MMBench)",
                                sentence(figures), all(f[1] > 0 for f in figures.values())))
        figures = {BUDGETS[i]: difference(measured, shares["rho = 0"][i], shares["rho = 0.1"][i])
                   for i in tight}
        claims.append(claim(f"without a uniform share (rho = 0) accuracy collapses, {task}s",
                            "0.519 to 0.145 (Mistral)", sentence(figures),
                            all(f[2] < 0 for f in figures.values())))
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=claims)


def masking(run, seeds=10):
    """The visual heads switched off, against random sets of other heads."""
    size, num = run.reading_size(), max(1, run.pages // 2)
    sets = {"none": [], **head_sets(run.tables["aligned"], seeds)}
    tables, claims = [], []
    for task in TASKS:
        def work(i):
            image, text, _, ids = exercise(run.model, "test", run.seed, task, size, i)
            return masked_accuracy(run.model, image, text, ids[:48], sets.values())

        facts = dict(sets=list(sets.values()), task=task, size=size)
        done = np.array(run.per_page(f"masking-{task}-{size[0]}x{size[1]}", facts, num, work))
        measured, rows = dict(zip(sets, done.T)), []
        for count in sorted({key[0] for key in sets if key != "none"}):
            visual = measured[count, "visual"]
            control = np.mean([measured[count, seed] for seed in range(seeds)], axis=0)
            rows.append([f"{count} of {len(run.tables['aligned'].flatten())}", interval(visual),
                         interval(control), interval(visual - measured["none"]),
                         interval(control - measured["none"])])
        tables.append(table(f"Accuracy with masked heads, {task}s, {pixels(size)} pixels, {num} "
                            f"pages; nothing masked: {show(interval(measured['none']))} %",
                            ["masked", "visual heads", f"random heads, mean of {seeds} sets",
                             "visual minus none", "random minus none"], rows, readme=True))
        drop, control = rows[-2 if len(rows) > 1 else -1][3:]              # about 5 % of the heads
        claims += [claim(f"masking the top 5 % of heads hurts, {task}s",
                         "-20 points (OCRBench), -15 (TextVQA)", show(drop, sign="+"), drop[2] < 0),
                   claim(f"masking as many random heads does not, {task}s", "less than 3 points",
                         show(control, sign="+"), control[0] > -0.03)]
    return dict(facts=dict(pages=num, size=size, sets=[[str(key), heads] for key, heads
                                                       in sets.items()]),
                tables=tables, claims=claims)


def robustness(run):
    """Scores from other kinds of pages, from detection, and from fewer pages."""
    pages, _ = run.ocr_scores()
    num, size, budgets = len(pages) // len(KINDS), run.reading_size(), TIGHT
    if not num:
        raise ValueError(f"--scoring-pages: {len(pages)} are too few; {len(KINDS)} is right")
    of_kind = {f"OCR, {kind}": pages[KINDS.index(kind)::len(KINDS)][:num]
               for kind in ("lines", "receipt", "letter")}
    of_kind["detection"] = run.detection_scores(num)[0]
    sources = {"OCR, all kinds": pages, **of_kind}
    counts = [count for count in (10, 50, 100, 200) if count < len(pages)]
    sources.update({f"{count} pages": pages[:count] for count in counts})
    run.tables.update({name: mean_scores(scores) for name, scores in sources.items()})
    rng = np.random.default_rng(0)

    def agreement(a, b, of):
        """[figure, low, high] for two sets of scored pages, drawn again 200 times."""
        draws = [of(*(mean_scores(x[rng.integers(0, len(x), len(x))]) for x in (a, b)))
                 for _ in range(200)]
        return [of(mean_scores(a), mean_scores(b)), *np.percentile(draws, [2.5, 97.5])]

    rows, names = [], list(of_kind)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:]]
    pairs += [(f"{count} pages", "OCR, all kinds") for count in counts]
    for a, b in pairs:
        rows.append([f"{a} / {b}", *(agreement(sources[a], sources[b], of)
                                     for of in (rank_correlation, overlap))])
    tables = [table(f"Agreement of scores ({num} pages of a kind, {len(pages)} of all), %",
                    ["", "rank correlation", "common heads of the top 5 %"], rows, readme=True)]
    ocr = np.mean([row[1][0] for row in rows[:len(pairs)] if "detection" not in row[0]
                   and "pages" not in row[0]])
    detection = np.mean([row[1][0] for row in rows if "detection" in row[0]])
    claims = [claim("scores from different kinds of OCR agree more than those from detection",
                    "highly consistent", f"rank correlation {show(ocr)} %, with detection "
                    f"{show(detection)} %", ocr > detection)]
    rows = {name: [Setting(budget=b, scores=name) for b in budgets] for name in sources}
    for task in TASKS:
        measured, T = run.measure("robustness", task, size,
                                  [s for row in rows.values() for s in row])
        tables.append(grid(f"sparsemm by where its scores come from, {task}s, {pixels(size)} "
                           f"pixels, {T:.0f} prompt tokens, %", budgets, rows, measured,
                           readme=True))
        figures = {b: difference(measured, Setting(budget=b, scores="OCR, lines"),
                                 Setting(budget=b, scores="detection")) for b in budgets}
        claims.append(claim(f"scores from OCR (lines) serve better than from detection, {task}s",
                            "better", sentence(figures), all(f[1] > 0 for f in figures.values())))
    return dict(facts=dict(pages=run.pages, scoring_pages=len(pages), size=size), tables=tables,
                claims=claims)


def unique_words(pieces, words):
    """The authors' rule on whole words, for any tokenizer: a token counts if the word that it is
    part of, spaces being the limits, is contained in exactly one box."""
    found, start, text = [], 0, "".join(pieces)
    for piece in pieces:
        left = max(text.rfind(" ", 0, start), text.rfind("\n", 0, start)) + 1
        word = text[left:].split(maxsplit=1)[0] if text[start:start + 1].strip() else ""
        places = [j for j, box in enumerate(words) if word and word in box]
        found.append(places[0] if len(places) == 1 else None)
        start += len(piece)
    return found


MATCHES["unique words"] = unique_words


def redistribution(run):
    """What a head cannot hold: lost, or poured out again. And the rule for which tokens count."""
    size, num, rows = run.reading_size(), max(1, run.scoring_pages // 5), []
    aligned, _ = run.ocr_scores(num)
    sources = []
    for match in ("aligned", "unique", "unique words"):
        try:
            scores, tokens = run.ocr_scores(num, match)
        except ValueError:                                  # of characters, hardly any are unique
            rows.append([f"{match}", 0, None, None])
            continue
        sources.append(f"{match}, {num} pages")
        run.tables[sources[-1]] = s = mean_scores(scores)
        rows.append([match, tokens, rank_correlation(s, mean_scores(aligned)),
                     overlap(s, mean_scores(aligned))])
    tables = [table(f"Which tokens count, {num} pages", ["rule", "tokens", "rank correlation with "
                    "aligned", "common heads of the top 5 %"], rows, "", readme=True)]
    pours = {"poured out again": [Setting(budget=b) for b in BUDGETS],
             "lost (literal)": [Setting(budget=b, redistribute=False) for b in BUDGETS]}
    rules = {name: [Setting(budget=b, scores=name) for b in TIGHT] for name in sources}
    for task in TASKS:
        measured, T = run.measure("redistribution", task, size, [
            s for row in (*pours.values(), *rules.values()) for s in row])
        where = f"{task}s, {pixels(size)} pixels, {T:.0f} prompt tokens"
        tables += [grid(f"What a head cannot hold, {where}, %", BUDGETS, pours, measured,
                        readme=True),
                   grid(f"Entries really kept per head, {where}", BUDGETS, pours, measured, "kept",
                        readme=True),
                   differences(f"Poured out minus lost, {where}, points", BUDGETS,
                               {"": list(zip(*pours.values()))}, measured),
                   grid(f"sparsemm by the rule for which tokens count, {where}, %", TIGHT, rules,
                        measured, readme=True)]
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=[])


def beyond(run):
    """Changes to the method, compared on development pages; the same again on test pages."""
    size, G, s = run.reading_size(), run.model.config.kv_heads, run.tables["aligned"]
    for exponent in (0.5, 0.75, 2):
        run.tables[f"power {exponent:g}"] = power_of_scores(s, G, exponent)
    variants = {**{f"ranked by {rank}": dict(rank=rank) for rank in RANKS},
                **{f"scores to the power {e:g}": dict(scores=f"power {e:g}")
                   for e in (0.5, 0.75, 2)},
                "rho 0.3": dict(rho=0.3), "window 16": dict(window=16),
                "power 0.5 and window 16": dict(scores="power 0.5", window=16)}
    base = [Setting(budget=b) for b in BUDGETS]
    rows = {name: [replace(b, **change) for b in base] for name, change in variants.items()}
    rivals = [Setting(m, b) for m in ("snapkv", "adakv") for b in BUDGETS]
    everything = list(dict.fromkeys([*base, *(x for row in rows.values() for x in row), *rivals]))
    tables, verdicts = [], {name: [] for name in variants}
    for split in ("development", "test"):
        for task in TASKS:
            measured, T = run.measure("beyond", task, size, everything, split=split)
            where = f"{split} pages, {task}s, {pixels(size)} pixels, {T:.0f} prompt tokens"
            pairs = {name: list(zip(row, base)) for name, row in rows.items()}
            tables += [differences(f"Change of sparsemm's accuracy, {where}, points", BUDGETS,
                                   pairs, measured, readme=split == "test"),
                       grid(f"Accuracy, {where}, %", BUDGETS, {
                           "sparsemm": base, **rows, "snapkv": rivals[:len(BUDGETS)],
                           "adakv": rivals[len(BUDGETS):]}, measured)]
            for name, row in rows.items():
                verdicts[name] += [(split, difference(measured, x, b)) for x, b in zip(row, base)]
    names = [[name, *verdict(figures)] for name, figures in verdicts.items()]
    head = ["", "better by more than the interval", "worse by more than the interval",
            "chosen on development pages"]
    tables.insert(0, table(f"Budgets and tasks (of {2 * len(BUDGETS)}) at which a change of the "
                           "method shows on test pages", head, names, "", readme=True))
    return dict(facts=dict(pages=run.pages, size=size), tables=tables, claims=[])


def verdict(figures):
    """How often a change is better and worse on test pages, and whether the development pages had
    spoken for it: better somewhere, worse nowhere."""
    better, worse = ({split: sum(bool(outside(f)) for s, f in figures if s == split)
                      for split in ("development", "test")}
                     for outside in (lambda f: f[1] > 0, lambda f: f[2] < 0))
    chosen = better["development"] > 0 and worse["development"] == 0
    return better["test"], worse["test"], "yes" if chosen else "no"


PARTS = dict(heads=heads, main=main_part, ablation=ablation, masking=masking,
             robustness=robustness, redistribution=redistribution, beyond=beyond)


# ---- the README ----------------------------------------------------------------------------------

def stored_results(out):
    """{part: [results of each model]} from the JSON files of a folder, MHA before GQA."""
    found = {part: [] for part in PARTS}
    for part in PARTS:
        for path in sorted(out.glob(f"{part}-*.json")):
            found[part].append(json.loads(path.read_text(encoding="utf-8")))
        found[part].sort(key=lambda stored: stored["attention"] != "MHA")
    if not any(found.values()):
        raise ValueError(f"--out: no results in {out}; run the parts first")
    return found


def results_chapter(out, beside):
    """The results chapter as Markdown; links are relative to the folder `beside`."""
    found = stored_results(out)
    models = list(dict.fromkeys((r["model"], r["attention"]) for stored in found.values()
                                for r in stored))
    claims = {}
    for part, stored in found.items():
        for r in stored:
            for c in r["claims"]:
                claims.setdefault((part, c["claim"], c["paper"]), {})[r["model"]] = c
    lines = ["| claim of the paper | there | " + " | ".join(
        f"{name} ({attention})" for name, attention in models) + " | part |",
        "|---" * (3 + len(models)) + "|"]
    for (part, text, paper), of_model in claims.items():
        cells = [f"{'yes' if c['holds'] else '**no**'}: {c['ours']}" if c else "-"
                 for c in (of_model.get(name) for name, _ in models)]
        lines.append(f"| {text} | {paper} | {' | '.join(cells)} | `{part}` |")
    failed = [f"* {text} ({', '.join(name for name, c in of_model.items() if not c['holds'])})"
              for (_, text, _), of_model in claims.items()
              if not all(c["holds"] for c in of_model.values())]
    lines += ["", "What does not carry over:", "", *(failed or ["* nothing of the above"]), ""]
    for part, stored in found.items():
        for r in stored:
            lines += [f"#### {part}, {r['model']} ({r['attention']})", "",
                      f"`{r['command']}` ({r['machine']}, torch {r['versions']['torch']}, "
                      f"{r['seconds']:,.0f} s)", ""]
            if "picture" in r:
                path = os.path.relpath(out / r["picture"], beside)
                lines += [f"![{r['model']}: accuracy against kept entries]({path})", ""]
            lines += [markdown(t) + "\n" for t in r["tables"] if t["readme"]]
    return "\n".join(lines).rstrip() + "\n"


def write_readme(path, out):
    """Puts the results chapter between the two marks of a README."""
    start, end = "<!-- results -->", "<!-- /results -->"
    text = path.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"--readme: {path} must have {start} and {end}, once each")
    before, after = text.split(start)[0], text.split(end)[1]
    chapter = results_chapter(out, path.resolve().parent)
    temporary = Path(f"{path}.tmp")
    temporary.write_text(f"{before}{start}\n{chapter}{end}{after}", encoding="utf-8")
    os.replace(temporary, path)


# ---- the command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = OneLineParser(prog="reproduce.py",
                           description="Rerun the paper's claims; write JSON files and tables.")
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all", "readme"), default="all")
    parser.add_argument("--model", nargs="+", metavar="DIR", help="checkpoints (default: those in "
                        "tiny/)")
    parser.add_argument("--quick", action="store_true",
                        help="40 pages and 100 for the scores, instead of 200 and 1,000")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="default: experiments/results, or experiments/work/quick if --quick")
    parser.add_argument("--pages", type=whole_number(1), help="of each task and size")
    parser.add_argument("--scoring-pages", type=whole_number(1), help="for the visual scores")
    parser.add_argument("--sizes", nargs="+", type=page_size, metavar="WxH",
                        default=[(256, 128), (256, 256), (256, 384)], help="of pages, in pixels")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md", metavar="FILE",
                        help="what the part readme rewrites")
    parser.add_argument("--device", type=device_name, default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16",
                                                            "float16"))
    parser.add_argument("--seed", type=whole_number(0), default=0)
    args = parser.parse_args(argv)
    args.out = args.out or HERE / ("work/quick" if args.quick else "results")
    args.pages = args.pages or (40 if args.quick else 200)
    args.scoring_pages = args.scoring_pages or (100 if args.quick else 1000)
    args.sizes = sorted(set(args.sizes), key=lambda size: size[0] * size[1])
    args.model = args.model or [str(path) for path in SMALL_MODELS if path.is_dir()]
    return parser, args


def command(args, part):
    """The command that gives the same results, short of paths."""
    words = ["python experiments/reproduce.py", part, "--quick" * args.quick]
    words += [f"--pages {args.pages} --scoring-pages {args.scoring_pages} --sizes",
              *(f"{w}x{h}" for w, h in args.sizes), f"--seed {args.seed}"]
    return " ".join(word for word in words if word)


def machine(model):
    device = model.decoder.embed_tokens.weight.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def run_parts(args, name):
    """Runs the parts for one model, and writes their JSON, Markdown and pictures."""
    model = load(name, args.device, args.dtype)
    c = model.config
    run = Run(model, Path(name).name, args.out, args.seed, args.sizes, args.pages,
              args.scoring_pages, weights=checksum(model.decoder.embed_tokens.weight))
    about = dict(model=run.name, attention="MHA" if c.heads == c.kv_heads else "GQA",
                 layers=c.layers, heads=c.heads, kv_heads=c.kv_heads, seed=args.seed,
                 machine=machine(model), versions=dict(
                     python=platform.python_version(), torch=torch.__version__,
                     transformers=transformers.__version__))
    run.tables["aligned"] = mean_scores(run.ocr_scores()[0])
    for part in PARTS if args.part == "all" else [args.part]:
        start = time.monotonic()
        results = PARTS[part](run)
        results = dict(about, part=part, command=command(args, part),
                       seconds=time.monotonic() - start, **results)
        write_json(results, args.out / f"{part}-{run.name}.json")
        text = f"# {part}, {run.name} ({about['attention']})\n\n`{results['command']}`\n\n" + \
            "\n\n".join(map(markdown, results["tables"])) + "\n"
        (args.out / f"{part}-{run.name}.md").write_text(text, encoding="utf-8")
        print(text)


def main(argv=None):
    parser, args = parse_arguments(argv)
    try:
        if args.part == "readme":
            return write_readme(args.readme, args.out)
        if not args.model:
            raise ValueError(f"--model: there is none in {DEFAULT_MODEL.parent}; a checkpoint's "
                             "folder is right")
        for name in args.model:
            run_parts(args, name)
    except (ValueError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
