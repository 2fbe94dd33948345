"""Facts about the method and the models, in the README's order. A test's name is the fact. All runs
offline, on small random models and on the two in tiny/: pytest test_sparsemm.py

Letters: L layers, H query heads, G KV heads, R = H/G, T prompt tokens, D head size, w window.
"""

import ast
import hashlib
import inspect
import json
import math
import random
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution

import cache
import model_llava
import score_heads
import sparsemm
from cache import (METHODS, KVCache, Method, Plan, allocate_budgets, attention_rows,
                   decode_attention, head_shares, make_plan, observed_attention, select_entries)
from model_llava import GRID, NEWLINE, hub_name, open_image, prefill_attention, prepare
from score_heads import align_tokens, score_transcript, tokens_in_box
from sparsemm import Conversation, PackedAttention, generate

torch.set_num_threads(1)                                               # enough for small models
HERE = Path(__file__).parent
TINY = ["llava-next", "qwen2-vl"]
SCRIPTS = ["cache", "model_llava", "sparsemm", "score_heads"]
README = (HERE / "README.md").read_text()
each_method = pytest.mark.parametrize("method", METHODS)
each_family = pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])       # MHA, GQA, GQA
each_shipped = pytest.mark.parametrize("name", TINY)


# ---- small random checkpoints, saved by transformers ---------------------------------------------

CHECKPOINTS = {     # files of a shipped model; L, H, G, D vary, so that no mix-up can hide
    "vicuna": ("llava-next", 3, 4, 4, 16, {}),
    "vicuna-tied": ("llava-next", 2, 3, 3, 8, {}),
    "mistral": ("llava-next", 2, 6, 2, 8, dict(model_type="mistral")),
    "qwen": ("qwen2-vl", 3, 6, 2, 16, dict(rope_parameters=dict(mrope_section=[2, 3, 3]))),
    "qwen-tied": ("qwen2-vl", 2, 4, 2, 24, dict(rope_parameters=dict(mrope_section=[2, 4, 6])))}
PINS = dict(image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]])
VISION = {           # LLaVA-NeXT: tiles of 28 pixels, 16 tokens; Qwen2-VL: tokens of 8 x 8 pixels
    "llava-next": dict(PINS, vision_feature_layer=-2, vision_config=dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3,
        image_size=28, patch_size=7)),
    "qwen2-vl": dict(vision_config=dict(
        hidden_size=96, embed_dim=32, num_heads=2, depth=2, patch_size=4))}
PREPROCESSOR = {
    "llava-next": dict(PINS, size=dict(shortest_edge=28), crop_size=dict(height=28, width=28)),
    "qwen2-vl": dict(patch_size=4, min_pixels=64, max_pixels=12800)}


def edit(path, **changes):
    """Changes a JSON file, or makes one. Of a dict in it only the given keys change."""
    def merge(old, new):
        return old | {key: merge(old.get(key) or {}, x) if isinstance(x, dict) else x
                      for key, x in new.items()}
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merge(content, changes)))


def write_checkpoint(folder, name):
    """Saves a random model with the tokenizer of characters of a shipped one. Returns transformers'
    model, whose weights let different inputs give different tokens."""
    (shipped, L, H, G, D, text), tied = CHECKPOINTS[name], name.endswith("tied")
    shutil.copytree(HERE / "tiny" / shipped, folder, dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("visual*", "evaluation*", "prompts*"))
    edit(folder / "preprocessor_config.json", **PREPROCESSOR[shipped])
    edit(folder / "config.json", **VISION[shipped], dtype="float32", tie_word_embeddings=tied,
         text_config=dict(text, hidden_size=H * D, intermediate_size=2 * H * D, num_hidden_layers=L,
                          num_attention_heads=H, num_key_value_heads=G, head_dim=D,
                          tie_word_embeddings=tied, layer_types=None))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).eval()
    for p in model.requires_grad_(False).parameters():
        p.normal_(0, 1.5 / p[0].numel() ** 0.5) if p.dim() > 1 else p.add_(torch.randn(len(p)) / 3)
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """name -> (folder, transformers' model, ours)"""
    folders = {name: tmp_path_factory.mktemp(name) for name in CHECKPOINTS}
    return {name: (folder, write_checkpoint(folder, name), model_llava.load(folder, "cpu"))
            for name, folder in folders.items()}


@pytest.fixture
def copied(checkpoints, tmp_path):
    """copied(name): a copy of a checkpoint's folder, to be changed."""
    return lambda name: Path(shutil.copytree(checkpoints[name][0], tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny():
    return {name: model_llava.load(HERE / "tiny" / name, "cpu") for name in TINY}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def picture(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def method_of(name, ours, *budget_and_window):
    scores = torch.rand(ours.config.layers, ours.config.heads)
    return Method(name, *budget_and_window, head_scores=scores)


@torch.no_grad()
def ask_transformers(call, ours, prompt, images, **more):
    """transformers' model, or its `generate`, called with the same ids and images."""
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt")) if images else {}
    if ours.config.family == "qwen2_vl" and images:
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    return call(**inputs, **more, input_ids=prompt.ids[None])


def assert_equal_transformers(reference, ours, images, question, atol=1e-4):
    """The same logits of a prompt, and the same 16 tokens after it."""
    prompt, end = prepare(ours, images, question), sorted(ours.processor.end_tokens)
    with torch.inference_mode():
        logits = ours.logits(ours.hidden_states(prompt))
    expected = ask_transformers(reference, ours, prompt, images).logits[0]
    assert expected.std() > 0.5 and (logits - expected).abs().max() < atol
    written = ask_transformers(reference.generate, ours, prompt, images, max_new_tokens=16,
                               do_sample=False, eos_token_id=end, pad_token_id=0)
    answer = generate(ours, images, question, Method("full"), 16)["token_ids"]
    assert answer == written[0, len(prompt.ids):].tolist()


class Operations(TorchDispatchMode):
    """The names of all operations, views aside, and the most bytes of results alive at once."""
    VIEWS = """view _unsafe_view t numpy_T mT transpose permute split split_with_sizes chunk slice
        select unbind expand flatten unflatten unsqueeze to detach alias lift_fresh item""".split()

    def __init__(self):
        super().__init__()
        self.names, self.alive, self.peak_bytes = [], {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if (name := function.__name__.split(".")[0]) not in self.VIEWS:
            self.names.append(name)
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and not x.is_meta:
                    x = x.untyped_storage()
                    self.alive[x.data_ptr()] = StorageWeakRef(x), x.nbytes()
            alive = sum(nbytes for ref, nbytes in self.alive.values() if not ref.expired())
            self.peak_bytes = max(self.peak_bytes, alive)
        return out


# ---- 1. visual heads -----------------------------------------------------------------------------

@each_family
def test_scores_equal_counting_with_attention_maps(checkpoints, name):
    """Of transformers, token by token. A token is emitted by the row of the one before it."""
    _, reference, ours = checkpoints[name]
    image, words = picture(60, 45), [("ab", (2, 2, 30, 40)), ("cd", (31, 2, 58, 40))]
    ids = ours.processor.tokenizer("ab cd").input_ids
    prompt = prepare(ours, [image], score_heads.OCR_PROMPT)
    shown, start = prompt.images[0], prompt.starts[0]
    maps = ask_transformers(reference, ours, prompt.extended(ids), [image],
                            output_attentions=True).attentions
    expected, hit = torch.zeros(len(maps), ours.config.heads, dtype=torch.float64), 0
    for i, word in [(0, 0), (1, 0), (3, 1), (4, 1)]:
        x0, y0, x1, y1 = words[word][1]
        region = [start + j for j, (a, b, c, d) in enumerate(shown.boxes.tolist())
                  if shown.kinds[j] == GRID and min(c, x1) > max(a, x0) and min(d, y1) > max(b, y0)]
        for l, attention in enumerate(maps):
            for h, row in enumerate(attention[0, :, len(prompt.ids) - 1 + i]):
                expected[l, h] += (int(row.argmax()) in region) / len(region)
                hit += int(row.argmax()) in region
    scores, counted, hits = score_transcript(ours, image, words, ids)
    assert (counted, hits) == (4, hit) and hit > 0 and torch.allclose(scores, expected)


@each_family
def test_a_planted_head_scores_and_no_other(checkpoints, monkeypatch, name):
    """Head 2 of layer 1 looks at the middle of the word that it writes, all others elsewhere. The
    words stand at all four edges of a wide image, so that LLaVA's padding and newlines matter."""
    ours, image = checkpoints[name][2], picture(150, 60)
    words = [("a", (0, 0, 20, 14)), ("b", (130, 0, 150, 14)), ("a", (0, 46, 20, 60)),
             ("c", (130, 46, 150, 60))]
    prompt = prepare(ours, [image], score_heads.OCR_PROMPT)
    shown, start = prompt.images[0], prompt.starts[0]
    targets = [start + tokens_in_box(shown, (x + 9, y + 6, x + 11, y + 8))[0]
               for _, (x, y, _, _) in words]
    newlines = (shown.kinds == NEWLINE).nonzero()[:, 0].tolist()
    elsewhere = start + newlines[0] if newlines else start - 1
    def hidden_states(prompt, attend):
        T, c = len(prompt.ids), ours.config
        k, q = torch.eye(T).expand(c.kv_heads, T, T), torch.zeros(c.layers, c.heads, T, T)
        q[..., elsewhere] = 1
        q[1, 2, -4:] = F.one_hot(torch.stack(targets), T).float()
        for layer in range(c.layers):
            attend(layer, q[layer], k, k)
    monkeypatch.setattr(ours, "hidden_states", hidden_states)
    ids = ours.processor.tokenizer("abac").input_ids
    scores, counted, hits = score_transcript(ours, image, words, ids)
    assert (counted, hits) == (4, 4) and scores.sum() == scores[1, 2] == \
        pytest.approx(sum(1 / len(tokens_in_box(shown, box)) for _, box in words))


def test_alignment_gives_every_token_its_word():
    """Repeated words and faults in the transcript are survived."""
    assert align_tokens(list("to be"), ["to", "be"]) == [0, 0, None, 1, 1]
    assert align_tokens(["the", " ca", "t the"], ["the", "cat", "the"]) == [0, 1, 2]
    assert align_tokens(list("tXtal 5"), ["total", "5"]) == [0, None, 0, 0, 0, None, 1]


def test_a_box_is_shown_by_the_grid_tokens_that_it_overlaps(checkpoints):
    """With positive area. No thumbnail token, and no newline."""
    shown = prepare(checkpoints["qwen"][2], [picture(80, 64)], "Hi").images[0]     # cells of 8 x 8
    for box in [(90, 0, 120, 10), (-20, -20, -1, -1), (5, 5, 5, 30), (5, 5, 30, 5), (9, 9, 4, 4)]:
        assert len(tokens_in_box(shown, box)) == 0
    assert len(tokens_in_box(shown, (-50, -50, 500, 500))) == len(shown) == 80
    assert tokens_in_box(shown, (8, 8, 16, 16)).tolist() == [11]                 # edges only touch
    assert tokens_in_box(shown, (7, 8, 16, 17)).tolist() == [10, 11, 20, 21]
    shown = prepare(checkpoints["vicuna"][2], [picture(150, 60)], "Hi").images[0]
    assert torch.equal(tokens_in_box(shown, (0, 0, 150, 60)), (shown.kinds == GRID).nonzero()[:, 0])


def test_a_score_file_reads_as_the_mean_over_its_pages_with_sum_one(tmp_path):
    per_page = [torch.tensor([[0.2, 0.0], [0.4, 0.0]]), torch.tensor([[1.2, 0.2], [0.0, 0.0]])]
    score_heads.write_scores(per_page, tmp_path / "s.json")
    table = json.loads((tmp_path / "s.json").read_text())
    assert table["0-1"] == [0, pytest.approx(0.2)]                              # layer 0, head 1
    s = cache.read_head_scores(tmp_path / "s.json", 2, 2)
    assert torch.allclose(s, torch.tensor([[0.7, 0.1], [0.2, 0.0]]).double())
    assert score_heads.top_share(s, 0.5) == (2, pytest.approx(0.9))
    # Gini, sorted 0, .1, .2, .7: 2 * (0*1 + .1*2 + .2*3 + .7*4) / 4 - 5/4
    assert score_heads.gini(s) == pytest.approx(2 * 3.6 / 4 - 1.25)


# ---- 2. budgets ----------------------------------------------------------------------------------

def test_budgets_by_hand():
    """2 layers x 2 heads, b = 64, w = 32, rho = 0.1: r = 3.2, by score 4 * 32 * 0.9 = 115.2."""
    s = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    #  32 + 3.2 + 28.8 = 64    35.2    35.2    32 + 3.2 + 86.4 = 121.6: the last takes the odd one
    assert allocate_budgets(s, 64, 500).tolist() == [[64, 35], [35, 122]]
    assert allocate_budgets(s, 64, 100, redistribute=False).tolist() == [[64, 35], [35, 100]]
    #  21.6 do not fit the last head; the first, the only other one with a score, takes them: 85.6
    assert allocate_budgets(s, 64, 100).tolist() == [[86, 35], [35, 100]]
    #  b = 90, T = 100: both visual heads are full, 160 are left for the two others
    assert allocate_budgets(s, 90, 100).tolist() == [[100, 80], [80, 100]]
    #  rho = 0: heads without a score keep their window only; rho = 1: all alike, as in SnapKV
    assert allocate_budgets(s, 64, 500, rho=0.0).tolist() == [[64, 32], [32, 128]]
    assert allocate_budgets(s, 64, 500, rho=1.0).tolist() == [[64, 64], [64, 64]]
    #  equal remainders: 32 + 1/3 each of three heads, and one entry goes to the first
    assert cache.round_to_total(torch.tensor([[97 / 3] * 3]), 97).tolist() == [[33, 32, 32]]
    #  everything fits; the prompt is shorter than the window
    assert allocate_budgets(s, 200, 120).tolist() == [[120, 120], [120, 120]]
    assert allocate_budgets(s, 64, 20).tolist() == [[20, 20], [20, 20]]


def slow_budgets(s, b, T, w, rho, redistribute):
    """The budgets in exact fractions, head by head, the surplus handed out over and over."""
    heads, N, rho = [Fraction(x) for x in s.flatten().tolist()], s.numel(), Fraction(rho)
    total, free = b * N, b * N - N * w
    ideal = [w + rho * free / N + (free - rho * free) * x / sum(heads) for x in heads]
    if redistribute:
        total = min(total, N * T)
        while (surplus := sum(max(Fraction(0), x - T) for x in ideal)) > 0:
            ideal = [min(x, Fraction(T)) for x in ideal]
            shares = {i: heads[i] for i in range(N) if ideal[i] < T}
            if sum(shares.values()) == 0:
                shares = dict.fromkeys(shares, Fraction(1))
            for i in shares:
                ideal[i] += surplus * shares[i] / sum(shares.values())
    whole = [x.numerator // x.denominator for x in ideal]
    ranked = sorted(range(N), key=lambda i: (whole[i] - ideal[i], i))
    for i in ranked[:total - sum(whole)]:
        whole[i] += 1
    return torch.tensor([min(x, T) for x in whole]).view(s.shape)


def test_budgets_sum_to_B_and_equal_a_slow_twin():
    rng = random.Random(0)
    for _ in range(400):
        L, G, w, T = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 40), rng.randint(1, 300)
        s = torch.tensor([[rng.choice([0, 0, 1, 2, 5, 50, 1000]) / rng.choice([1, 2, 4, 8])
                           for _ in range(G)] for _ in range(L)], dtype=torch.float64)
        s[rng.randrange(L), rng.randrange(G)] += 1
        b, rho = w + rng.randint(0, 200), rng.choice([0.0, 0.125, 0.5, 1.0])
        for redistribute in (True, False):
            budgets = allocate_budgets(s, b, T, w, rho, redistribute)
            assert torch.equal(budgets, slow_budgets(s, b, T, w, rho, redistribute))
            assert budgets.sum() == min(b, T) * L * G or not redistribute


# ---- 3. entries ----------------------------------------------------------------------------------

def rows_by_hand(q, k):
    """Attention rows (n, T) of one query head, one by one in float64: q (n, D), k (T, D)."""
    (n, D), T = q.shape, len(k)
    seen = range(T - n + 1, T + 1)                            # its own position and those before it
    rows = [(k[:t].double() @ x.double() / math.sqrt(D)).softmax(0) for t, x in zip(seen, q)]
    return torch.stack([F.pad(row, (0, T - len(row))) for row in rows])


def position_scores_by_hand(q, k, w, kernel=5):
    (H, T, _), G, half = q.shape, len(k), kernel // 2
    rows = [rows_by_hand(q[h, -w:], k[h * G // H])[:, :T - w].mean(0) for h in range(H)]
    a = torch.stack(rows).view(G, H // G, -1).mean(1)
    sums = [a[:, max(0, j - half):j + half + 1].sum(1) for j in range(T - w)]
    return torch.stack(sums, dim=1) / kernel


@pytest.mark.parametrize("H, G, T, D, w, kernel", [(4, 4, 20, 8, 5, 5), (6, 2, 17, 4, 3, 3),
                                                   (2, 1, 9, 16, 8, 5), (3, 3, 12, 8, 1, 1)])
def test_attention_rows_and_observed_attention_equal_brute_force(H, G, T, D, w, kernel):
    """In every dtype up to float32's rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (3 * torch.randn(H, T, D)).to(dtype), torch.randn(G, T, D).to(dtype)
        A, a = attention_rows(q[:H // G, -w:], k[0]), observed_attention(q, k, w, kernel)
        rows = torch.stack([rows_by_hand(q[h, -w:], k[0]) for h in range(H // G)])
        assert A.dtype == a.dtype == torch.float32 and (A - rows).abs().max() < 1e-6
        assert (a - position_scores_by_hand(q, k, w, kernel)).abs().max() < 1e-6


def test_selected_are_the_best_and_the_window():
    a = torch.tensor([[0.1, 0.9, 0.3, 0.9, 0.3], [0.0, 0, 0, 0, 0]])             # T - w = 5
    keep = select_entries(a, torch.tensor([5, 4]), 7)
    assert keep.int().tolist() == [[0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1]]   # tie: the lower
    for _ in range(50):
        a, budgets = torch.randint(0, 6, (3, 30)).float(), torch.randint(4, 35, (3,))
        for scores, n, kept in zip(a, budgets.tolist(), select_entries(a, budgets, 34)):
            best = sorted(range(30), key=lambda i: (-scores[i].item(), i))[:n - 4]
            assert kept.nonzero()[:, 0].tolist() == sorted(best) + [30, 31, 32, 33]


@each_shipped
def test_kept_positions_are_those_that_nvidia_kvpress_keeps(tiny, name):
    """By SnapKVPress of kvpress 0.5.5: window 32, kernel 5, 96 of T entries, the receipt's tokens
    at positions 0, 1, 2 ... (Pillow 12 rounds pixels differently, which moves 4 of 6,144.)"""
    stored, kept = json.loads((HERE / "experiments/kvpress-snapkv.json").read_text())[name], []
    prompt = prepare(tiny[name], [open_image(HERE / "tiny/receipt.png")], "What is the Total?")
    T = len(prompt.ids)
    def attend(layer, q, k, v):
        kept.extend(select_entries(observed_attention(q, k), torch.full((len(k),), 96), T))
        return prefill_attention(q, k, v)
    with torch.inference_mode():
        tiny[name].decoder(tiny[name].embed(prompt), torch.arange(T).expand(3, -1), attend)
    assert len(kept) == sum(map(len, stored))
    same = sum(keep[a:b + 1].sum() for keep, runs in zip(kept, sum(stored, [])) for a, b in runs)
    assert same >= 96 * len(kept) - 4 * (Image.__version__ < "13")     # a, b: ends of each run


# ---- 4. the cache, and decoding from it ----------------------------------------------------------

def filled_cache(q, k, v, lengths, w=4):
    """A cache of one layer whose heads keep lengths[g] entries, window included."""
    held = KVCache(Plan(lambda layer, a: torch.tensor(lengths), observed_attention, w))
    held.compress(0, q, k, v)
    return held


@pytest.mark.parametrize("lengths", [[9, 9], [4, 21]])
def test_heads_hold_what_was_selected_and_room_grows_in_steps(lengths):
    """Appending moves nothing while there is room. How much there is depends on what came."""
    q, k, v = torch.randn(4, 30, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    held, entry_bytes, moves = filled_cache(q, k, v, lengths), 2 * 8 * 4, []
    keep = select_entries(observed_attention(q, k, 4), torch.tensor(lengths), 30)
    expected = [torch.stack([k[g, keep[g]], v[g, keep[g]]]) for g in range(2)]
    assert held.allocated_bytes() == (sum(lengths) + 2 * cache.ROOM) * entry_bytes
    for step in range(5 * cache.ROOM):
        assert held.held_bytes() == (sum(lengths) + 2 * step) * entry_bytes
        pointers, new = [x.data_ptr() for head in held[0] for x in head], torch.randn(2, 2, 1, 8)
        if held.reserve():
            moves.append(step)
        else:
            assert [x.data_ptr() for head in held[0] for x in head] == pointers
        held.append(0, *new)
        expected = [torch.cat([old, new[:, g]], 1) for g, old in enumerate(expected)]
        assert all(torch.equal(torch.stack(x), y) for x, y in zip(held[0], expected))
    assert moves == [cache.ROOM, 2 * cache.ROOM, 4 * cache.ROOM]
    assert held.allocated_bytes() == (sum(lengths) + 2 * 8 * cache.ROOM) * entry_bytes


@pytest.mark.parametrize("H, G", [(4, 4), (6, 2), (5, 1)])
def test_decode_attention_and_its_packed_twin_equal_softmax_by_hand(H, G):
    """For heads of equal and of unequal lengths, before and after their tensors move."""
    for lengths in ([4] * G, [11] * G, [4 + (13 * g) % 40 for g in range(1, G + 1)]):
        held, packed = filled_cache(*(torch.randn(n, 60, 8) for n in (H, G, G)), lengths), None
        for _ in range(cache.ROOM + 3):
            q, new = torch.randn(H, 1, 8), torch.randn(2, G, 1, 8)
            packed = PackedAttention(held) if held.reserve() or packed is None else packed
            out = packed.append_and_attend(0, q, *new)
            assert torch.equal(torch.stack([K[-1:] for K, _ in held[0]]), new[0])
            heads = [held[0][h * G // H] for h in range(H)]
            expected = [rows_by_hand(q[h], K) @ V.double() for h, (K, V) in enumerate(heads)]
            assert (out - torch.stack(expected)).abs().max() < 1e-5
            assert (decode_attention(q, held[0]) - out).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [100, 5000])
@pytest.mark.parametrize("lengths", [[30, 30], [5, 51]])
def test_large_logits_are_exact_in_half_precision(dtype, size, lengths):
    """A constant in one channel, as biases make it in Qwen2-VL, lifts all logits to `size`."""
    G, R, T, root = 2, 3, 60, math.sqrt(size * math.sqrt(32))
    q, k, v = torch.randn(G * R, T, 32), torch.randn(G, T, 32), torch.randn(G, T, 32)
    q[:, :, 0], k[:, :, 0] = root, root * (1 + torch.rand(G, T) / 500)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    held, newest = filled_cache(q, k, v, lengths), (q[:, -1:], k[:, -1:], v[:, -1:])
    held.reserve()
    packed = PackedAttention(held).append_and_attend(0, *newest)
    for h, found in enumerate(zip(packed, decode_attention(newest[0], held[0]))):
        K, V = held[0][h // R]
        exact = rows_by_hand(q[h, -1:], K) @ V.double()
        assert all((out - exact).norm() < 0.01 * exact.norm() for out in found)
    exact = prefill_attention(q.double(), k.double(), v.double())
    assert (prefill_attention(q, k, v) - exact).norm() < 0.01 * exact.norm()
    a, exact = observed_attention(q, k, 4), position_scores_by_hand(q, k, 4)
    assert a.dtype == torch.float32 and (a - exact).abs().max() < 0.01 * exact.max()


def test_greedy_decode_by_hand():
    """Each time the likeliest token; the first comes from the prefill's logits. Token i stands i
    places behind the prompt. The end token, or the last that is allowed, is never read."""
    read, one_hot = [], torch.eye(10)
    step = lambda token, position: read.append((token, position)) or one_hot[token + 1]
    assert sparsemm.greedy_decode(step, one_hot[3], 100, {5, 9}, 8) == [3, 4, 5]
    assert read == [(3, 100), (4, 101)]
    assert sparsemm.greedy_decode(step, one_hot[3], 100, {9}, 4) == [3, 4, 5, 6]
    assert sparsemm.greedy_decode(step, one_hot[9], 100, {9}, 4) == [9] and len(read) == 5


@torch.inference_mode()
def forced_logits(model, prompt, tokens, held, packed=False):
    """Logits (n, vocabulary) while n tokens are forced after a prefill; packed: by CUDA's twin."""
    logits = []
    sparsemm.prefill(model, prompt, held)
    for position, token in enumerate(tokens, prompt.next_position):
        if packed and (held.reserve() or not logits):
            attend = PackedAttention(held).append_and_attend
        logits.append(model.decode(token, position, attend) if packed else
                      sparsemm.decode(model, held, token, position))
    return torch.stack(logits)


@each_method
@each_family
def test_evicted_decode_equals_masked_attention(checkpoints, monkeypatch, name, method):
    """Eviction is a mask: transformers' full attention, with those entries hidden from new tokens
    that a head dropped, gives the same logits; for the loop and for its packed twin."""
    _, reference, ours = checkpoints[name]
    c, images, tokens, kept = ours.config, [picture(64, 50)], [40, 41, 60, 33, 70], []
    prompt = prepare(ours, images, "What is it?")
    T, n = len(prompt.ids), len(tokens)
    monkeypatch.setattr(cache, "select_entries",                                 # (G, T) per layer
                        lambda *arguments: kept.append(select_entries(*arguments)) or kept[-1])
    plan = make_plan(method_of(method, ours, 20, 6), c.layers, c.kv_heads, T)
    loop, packed = (forced_logits(ours, prompt, tokens, KVCache(plan), twin) for twin in (0, 1))
    assert torch.stack(kept).sum() == 2 * c.layers * c.kv_heads * (T if method == "full" else 20)
    for kept_here, layer in zip(kept, reference.model.language_model.layers):
        seen = torch.ones(T + n, T + n).tril().bool().repeat(c.heads, 1, 1)
        seen[:, T:, :T] &= kept_here.repeat_interleave(c.heads // c.kv_heads, 0)[:, None]
        mask = torch.zeros(1, c.heads, T + n, T + n).masked_fill(~seen, -torch.inf)
        forward = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda *rest, forward=forward, mask=mask,
                            **named: forward(*rest, **{**named, "attention_mask": mask}))
    expected = ask_transformers(reference, ours, prompt.extended(tokens), images).logits[0, T:]
    assert (loop - expected).abs().max() < 1e-4 and (packed - expected).abs().max() < 1e-4


@each_method
def test_a_budget_beyond_the_prompt_equals_the_full_cache(checkpoints, method):
    ours, arguments = checkpoints["mistral"][2], ([picture(60, 60)], "What?")
    full = generate(ours, *arguments, Method("full"), 6)
    T = full["prompt_tokens"]
    for budget, window in ((T, 32), (T + 100, T + 50)):
        found = generate(ours, *arguments, method_of(method, ours, budget, window), 6)
        assert (found["token_ids"], found["kept"]) == (full["token_ids"], [[T] * 2] * 2)
        assert found["cache_bytes"] == full["cache_bytes"] == full["full_cache_bytes"]


def test_the_first_token_is_that_of_the_full_cache(checkpoints):
    """A layer is compressed behind its prefill attention: whatever is kept, prefill saw it all."""
    ours, arguments = checkpoints["qwen"][2], ([picture(90, 120)], "What is it?")
    answers = {tuple(generate(ours, *arguments, method_of(name, ours, 33), 6)["token_ids"])
               for name in METHODS}
    assert len(answers) > 1 and len({answer[0] for answer in answers}) == 1


def test_a_layer_is_compressed_before_the_next_one_has_keys(checkpoints, monkeypatch):
    """So that no more than one layer's full keys and values exist at a time."""
    ours, order, compress = checkpoints["mistral"][2], [], KVCache.compress
    monkeypatch.setattr(KVCache, "compress",
                        lambda self, l, *rest: order.append(l) or compress(self, l, *rest))
    hooks = [layer.self_attn.k_proj.register_forward_hook(lambda *_: order.append("keys"))
             for layer in ours.decoder.layers]
    generate(ours, [picture(40, 40)], "Hi", Method("snapkv", 40), max_new_tokens=1)
    assert order == ["keys", 0, "keys", 1] and [hook.remove() for hook in hooks]


@each_family
def test_second_question_equals_one_long_prompt_in_transformers(checkpoints, name):
    """Nothing evicted: what was appended is what a single long conversation would have been."""
    _, reference, ours = checkpoints[name]
    images, processor = [picture(45, 60), picture(30, 31, seed=1)], ours.processor
    talk = Conversation(ours, images, Method("full"), max_new_tokens=5)
    first, second = talk.ask("What is it?"), talk.ask("So?")
    long, answer = talk.inputs.ids[:second["prompt_tokens"]], second["token_ids"]
    said = [t for t in first["token_ids"] if t not in processor.end_tokens]
    assert long[first["prompt_tokens"]:].tolist() == \
        said + processor.next_turn_ids(2, ["Hi", "Yes", "So?"])
    prompt = replace(prepare(ours, images, "Hi"), ids=torch.cat([long, torch.tensor(answer[:-1])]))
    logits = ask_transformers(reference, ours, prompt, images).logits[0, len(long) - 1:]
    assert logits.argmax(-1).tolist() == answer
    assert second["kept"] == [[len(long)] * ours.config.kv_heads] * ours.config.layers


def test_second_question_goes_on_from_what_was_kept(checkpoints):
    """Its tokens are appended to every head. With fresh=True the whole conversation is compressed
    instead."""
    arguments = checkpoints["qwen"][2], [picture(90, 120)], Method("snapkv", 40), 4
    talk, fresh = Conversation(*arguments), Conversation(*arguments, fresh=True)
    first, pointers = talk.ask("What is it?"), [keys.data_ptr() for keys in talk.cache.keys]
    second, again = talk.ask("So?"), (fresh.ask("What is it?"), fresh.ask("So?"))
    assert [keys.data_ptr() for keys in talk.cache.keys] == pointers
    new = second["prompt_tokens"] - first["prompt_tokens"]
    assert second["kept"] == [[n + new for n in layer] for layer in first["kept"]]
    assert again[0]["token_ids"] == first["token_ids"] and again[1]["kept"] == [[40] * 2] * 3


@each_family
@torch.inference_mode()
def test_a_decoding_step_dispatches_few_operations(checkpoints, name):
    """Outside the layers 11. In a layer 2 norms, 7 products, 6 for rotary positions, 2 to append, 2
    in the MLP, 2 sums; by the loop 4 for each KV head and 1 to join them, by the twin 6 for all."""
    ours = checkpoints[name][2]
    prompt, L, G = prepare(ours, [], "What?" * 12), ours.config.layers, ours.config.kv_heads
    held = sparsemm.new_cache(ours, len(prompt.ids), method_of("sparsemm", ours, 40), 9)
    forced_logits(ours, prompt, [30], held)
    with Operations() as loop:
        sparsemm.decode(ours, held, 30, 99)
    held.reserve()
    twin = PackedAttention(held)
    with Operations() as packed:
        ours.decode(30, 99, twin.append_and_attend)
    assert len(loop.names) <= 11 + L * (22 + 4 * G) and len(packed.names) <= 10 + L * 27


def test_memory_of_prefill_grows_with_the_prompt_not_with_its_square(checkpoints):
    ours, peaks = checkpoints["qwen"][2], []
    for T in (1000, 2000):
        prompt = prepare(ours, [], "x" * T)
        held = sparsemm.new_cache(ours, len(prompt.ids), Method("snapkv"), 9)
        with torch.inference_mode(), Operations() as seen:
            sparsemm.prefill(ours, prompt, held)
        peaks.append(seen.peak_bytes)
    assert peaks[1] <= 2.05 * peaks[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_that_are_not_finite_are_an_error_and_no_answer(checkpoints, dtype):
    model = model_llava.load(checkpoints["qwen"][0], "cpu", dtype)
    model.decoder.layers[1].mlp.down_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"finite.*torch.{dtype}"):
        generate(model, [picture(40, 40)], "Hi", Method("snapkv"))
    model.decoder.layers[0].self_attn.q_proj.weight[3, 3] = math.nan
    with pytest.raises(ValueError, match=f"finite.*torch.{dtype}"):
        score_transcript(model, picture(40, 40), [("a", (0, 0, 9, 9))], [40, 41])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@each_method
@each_family
def test_cuda_equals_cpu(checkpoints, name, method):
    folder, _, ours = checkpoints[name]
    method, there = method_of(method, ours, 40), model_llava.load(folder, "cuda", "float32")
    here, there = (generate(model, [picture(64, 50)], "What is it?", method, cache.ROOM + 6)
                   for model in (ours, there))
    assert here["token_ids"] == there["token_ids"] and here["kept"] == there["kept"]


# ---- the other methods ---------------------------------------------------------------------------

def test_budgets_of_pyramidkv_and_adakv_by_hand():
    # n = 32 a head beyond the window: n_min = 32 // 20 = 1, n_max = 63; 63, 42.33, 21.67, 1
    assert cache.pyramid_budgets(4, 64, 1000, 32).tolist() == [95, 74, 54, 33]
    # no more than 50 - 32 = 18 fit; n = 12, n_min is raised to 6: 18, 14, 10, 6
    assert cache.pyramid_budgets(4, 44, 50, 32).tolist() == [50, 46, 42, 38]
    assert cache.pyramid_budgets(1, 64, 1000, 32).tolist() == [64]
    # n = 2 a head. Head 0 holds 9 of 10 in its best two, head 1 only 2 of 8: weights 0.9 and 0.25
    a = torch.tensor([[5.0, 4, 0.5, 0.5, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    # ranked: 4.5, 3.6, 0.45, 0.45 | 0.25 ...: the best four are head 0's; 0.8 * 4 + 0.4 = 3.6, 0.4
    assert cache.adakv_budgets(a, 6, 4).tolist() == [8, 4]


def test_random_and_shuffled_are_drawn_once_from_the_seed():
    """And the visual score of a KV head is the sum over the query heads that share it."""
    scores = torch.rand(4, 6, dtype=torch.float64) ** 4
    shares = lambda name, seed=0: head_shares(Method(name, head_scores=scores, seed=seed), 4, 3)
    visual, ranked = shares("sparsemm"), lambda x: x.flatten().sort().values
    assert torch.allclose(visual[:, 0], scores[:, 0] + scores[:, 1])
    assert torch.equal(ranked(shares("shuffled")), ranked(visual))
    for name in ("random", "shuffled"):
        assert torch.equal(shares(name, 1), shares(name, 1))
        assert not torch.equal(shares(name, 1), shares(name, 2))


@pytest.mark.parametrize("name, first", [("window", 0), ("streaming", 4)])
def test_window_keeps_the_last_positions_and_streaming_the_first_four_too(name, first):
    plan, q = make_plan(Method(name, 40, window=8), L=1, G=2, T=60), torch.randn(2, 60, 8)
    a = plan.position_scores(q, q, 8)
    kept = select_entries(a, plan.budgets(0, a), 60)[0].nonzero()[:, 0].tolist()
    assert kept == [*range(first), *range(20 + first, 60)]


# ---- the models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[(50, 50)], [(200, 30)], [(20, 90)], [(9, 9)], [(37, 53)],
                                   [(60, 33), (31, 77)], []], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(checkpoints, monkeypatch, name, sizes):
    monkeypatch.setattr(model_llava, "MLP_SLICE", 40)          # of longer prompts, in several parts
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    assert_equal_transformers(*checkpoints[name][1:], images, "What is it?")


PUBLISHED = json.loads((HERE / "experiments/published.json").read_text())
VICUNA = "llava-hf/llava-v1.6-vicuna-7b-hf"


def published_model(folder, name):
    """Our model of a published config.json, without memory for its weights."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    c = model_llava.read_config(folder)
    with torch.device("meta"):
        return model_llava.MODELS[c.family](c)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_have_exactly_our_tensors(tmp_path, name):
    """But for a tied output embedding, which they leave out. Some names are copied from the hub."""
    model = published_model(tmp_path, name)
    c = model.config
    assert [c.layers, c.heads, c.kv_heads, c.head_dim, c.rope_theta] == PUBLISHED[name]["geometry"]
    with torch.device("meta"):
        reference = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs = {hub_name(key): p.shape for key, p in reference.named_parameters()}
    assert {*map(hub_name, PUBLISHED[name]["tensors"])} <= theirs.keys()
    assert ("lm_head.weight" in theirs) == (not c.tied)
    theirs["lm_head.weight"] = theirs["decoder.embed_tokens.weight"]
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == theirs


def test_layout_counts_the_tokens_that_transformers_counts(tmp_path):
    model, rng = published_model(tmp_path, VICUNA), random.Random(0)
    for size in [(336, 672), (1, 700), (700, 1), *((rng.randint(20, 3000), rng.randint(20, 3000))
                                                   for _ in range(200))]:
        best = select_best_resolution(size, PUBLISHED[VICUNA]["config"]["image_grid_pinpoints"])
        grid, newlines = LlavaNextProcessor._get_unpadded_features(
            None, *size, 24, 24, best[0] // 336, best[1] // 336)
        image = model.image_layout(size, None)
        assert (len(image), image.grid[0]) == (24 * 24 + grid + newlines, newlines), size


def test_a_padded_page_by_hand(tmp_path):
    """1,344 x 896 pixels (width x height) fit into 672 x 672 at half their size: 672 x 448. The 224
    rows left are padding, 112 above and 112 below, 8 rows of cells each."""
    model, size = published_model(tmp_path, VICUNA), (896, 1344)
    assert model.tile_grid(size)[1:] == (2, 2)                                   # tiles of 336
    assert model_llava.unpadded(48, 48, size) == (slice(8, 40), slice(0, 48))
    image = model.image_layout(size, None)
    assert image.grid == (32, 48) and len(image) == 576 + 32 * (48 + 1) == 2144
    grid = image.boxes[576:].view(32, 49, 4)                     # a cell of 14 shows 28 x 28 pixels
    assert grid[0, 0].tolist() == [0, 0, 28, 28] and grid[10, 3].tolist() == [84, 280, 112, 308]
    assert grid[31, 47].tolist() == [1316, 868, 1344, 896] and not grid[:, 48].any()    # newlines
    for words in ("1,344 x 896", "2,144"):                # the docstring has the same example drawn
        assert words in model_llava.LlavaNext.image_layout.__doc__


@pytest.mark.parametrize("size", [(50, 40), (130, 30), (25, 99), (61, 61)])
@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_a_box_is_where_the_pixels_of_its_token_come_from(checkpoints, name, size):
    """Red rises from left to right and green from top to bottom; blue is 1, but 0 in the padding.
    So the mean colour of what the vision tower sees for a token says where that was."""
    ours, (x, y) = checkpoints[name][2], (np.arange(n) / n + 0.5 / n for n in size)
    ramp = np.stack([*np.meshgrid(x, y), np.ones((size[1], size[0]))], axis=-1)
    prompt = prepare(ours, [Image.fromarray((255 * ramp).round().astype(np.uint8))], "Hi")
    image, seen = prompt.images[0], prompt.pixels[0] / 2 + 0.5    # undo mean and deviation of 0.5
    if name == "qwen":                                              # (P, 3 * 2 * p * p), 4 a token
        seen = seen.view(len(image), 4, 3, -1).mean((1, 3))
    else:                                                          # (tiles, 3, 28, 28), cells of 7
        seen, (_, down, across) = F.avg_pool2d(seen, 7), ours.tile_grid(image.size)
        visible = model_llava.unpadded(4 * down, 4 * across, image.size)
        grid = seen[1:].view(down, across, 3, 4, 4).permute(0, 3, 1, 4, 2)
        grid = grid.reshape(4 * down, 4 * across, 3)[visible].flatten(0, 1)
        seen = torch.cat([seen[0].flatten(1).T, grid])
    boxes = image.boxes[image.kinds != NEWLINE].view(-1, 2, 2)
    places = torch.tensor(size) * seen[:, :2] / seen[:, 2:]
    assert len(places) == len(boxes) and (places - boxes.mean(1)).abs().max() < 1


@pytest.mark.parametrize("dtype, rows, detour", [
    (torch.float32, 1, "bmm"), (torch.bfloat16, 40, "_to_copy"), (torch.float16, 40, "_to_copy")])
def test_products_take_detours_on_a_cpu(monkeypatch, dtype, rows, detour):
    """One float32 row on two threads goes in parts. Without units for half precision, many rows go
    through float32."""
    linear = model_llava.Linear(50, 96).requires_grad_(False).to(dtype)
    x = torch.rand(rows, 50).to(dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    for taken in (False, True):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1 + taken)
        monkeypatch.setattr(model_llava, "has_units", lambda dtype: not taken)
        with Operations() as seen:
            product = linear(x)
        assert product.dtype == dtype and (detour in seen.names) == taken
        assert (product - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


# ---- loading a checkpoint ------------------------------------------------------------------------

@pytest.mark.parametrize("spelling", ["hub", "memory", "shards"])
@pytest.mark.parametrize("name", ["mistral", "qwen"])
def test_all_spellings_of_a_checkpoint_load_alike(checkpoints, copied, name, spelling):
    """As on the hub, with a constant that old files hold; as transformers has it in memory; and in
    several files, as transformers saves it."""
    folder, (_, reference, ours) = copied(name), checkpoints[name]
    tensors, file = reference.state_dict(), folder / "model.safetensors"
    if spelling == "hub":
        tensors = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor
                   for key, tensor in load_file(file).items()}
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file({key: t.clone() for key, t in tensors.items()}, file)
    if spelling == "shards":
        file.unlink()
        reference.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    for key, tensor in model_llava.load(folder, "cpu").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


@pytest.mark.parametrize("name, dtype", [("qwen-tied", "float32"), ("vicuna", "bfloat16")])
def test_loading_holds_the_weights_once(checkpoints, name, dtype):
    """While it loads, no more is alive than the weights and the tensor that is being read. A tied
    output embedding is the input embedding's memory."""
    with Operations() as seen:
        model = model_llava.load(checkpoints[name][0], "cpu", dtype)
    weights = {w.data_ptr(): w.nbytes for w in model.parameters()}
    assert seen.peak_bytes <= sum(weights.values()) + 2 * max(weights.values())
    shared = model.lm_head.weight.data_ptr() == model.decoder.embed_tokens.weight.data_ptr()
    assert shared == model.config.tied == (name == "qwen-tied")


@pytest.mark.parametrize("name, mark", [("vicuna", "<image>"),
                                        ("qwen", "<|vision_start|><|image_pad|><|vision_end|>")])
def test_a_prompt_is_one_turn_and_a_further_question_another(checkpoints, name, mark):
    """In the chat template's words: one placeholder for each image, the images first."""
    processor = checkpoints[name][2].processor
    first, next_ = processor.token_ids(2, "Hi"), processor.next_turn_ids(2, ["Hi", "Yes", "So?"])
    assert [processor.tokenizer.decode(ids) for ids in (first, next_)] == \
        [f"<|im_start|>{mark}{mark}Hi<|im_end|>", "<|im_end|><|im_start|>So?<|im_end|>"]


def test_a_list_of_chat_templates_has_a_default_and_a_prompt_has_one_bos(copied):
    """Even if both the template and the tokenizer put one in front, as Llama's do."""
    folder, bos, template = copied("vicuna"), "<|endoftext|>", (
        "{{ bos_token }}USER: {% for part in messages[0].content %}{% if part.type == 'image' %}"
        "<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} ASSISTANT:")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink()
    named = [dict(name="rag", template="<image>"), dict(name="default", template=template)]
    for file in ("tokenizer_config.json", "chat_template.json"):
        edit(folder / file, chat_template=named, bos_token=bos)
        processor = model_llava.load(folder, "cpu").processor
        assert processor.tokenizer.decode(processor.token_ids(1, "Hi")) == \
            f"{bos}USER: <image>\nHi ASSISTANT:"


def test_end_tokens_are_found_where_transformers_finds_them(copied):
    """In generation_config.json, else in config.json, else the tokenizer's; none is an error."""
    folder = copied("vicuna")
    for file, changes, expected in (
            ("config", dict(eos_token_id=7, text_config=dict(eos_token_id=[6, 8])), {0, 2}),
            ("generation_config", dict(eos_token_id=None), {7}),
            ("config", dict(eos_token_id=None), {6, 8}),
            ("config", dict(text_config=dict(eos_token_id=None)), {2})):
        edit(folder / f"{file}.json", **changes)
        assert model_llava.load(folder, "cpu").processor.end_tokens == expected
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="eos_token_id"):
        model_llava.load(folder, "cpu")


# ---- the shipped models --------------------------------------------------------------------------

@each_shipped
def test_shipped_weights_are_those_of_the_model_card(name):
    weights, card = HERE / "tiny" / name / "model.safetensors", HERE / "tiny/README.md"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert re.search(rf"\b{name}\b.*\b{checksum}\b", card.read_text())


@each_shipped
def test_sample_questions_are_answered_from_a_cache_that_evicts(tiny, name):
    method = Method(head_scores=sparsemm.find_head_scores(tiny[name]))          # sparsemm, 256 each
    for sample in json.loads((HERE / "tiny/samples.json").read_text()):
        image, c = open_image(HERE / "tiny" / sample["image"]), tiny[name].config
        result = generate(tiny[name], [image], sample["prompt"], method)
        assert result["text"] == sample["answer"] and result["prompt_tokens"] > 256
        assert sum(map(sum, result["kept"])) == 256 * c.layers * c.kv_heads


@each_shipped
def test_shipped_model_writes_what_transformers_writes(tiny, name):
    ours, images = tiny[name], [open_image(HERE / "tiny/receipt.png")]
    reference = AutoModelForImageTextToText.from_pretrained(ours.folder, dtype=torch.float32)
    assert_equal_transformers(reference, ours, images, "What is the Total?", atol=1e-3)


# ---- the command, the README and the code --------------------------------------------------------

def test_the_readme_quotes_what_the_commands_print_and_what_the_loop_is(capfd):
    """But for times, which every machine has its own of. Only full and sparsemm answer 5.25."""
    question = ["--image", str(HERE / "tiny/receipt.png"), "--prompt", "What is the Rope?",
                "--budget", "64"]
    sparsemm.main(question)
    answer, report = capfd.readouterr()
    assert answer + report[:report.index("time")] in README
    sparsemm.main([*question, "--compare"])
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(METHODS)
    assert [row[0] for row in rows if row[-1] == "5.25"] == ["full", "sparsemm"]
    loop = inspect.getsource(sparsemm.greedy_decode)
    assert loop.replace(f'    """{sparsemm.greedy_decode.__doc__}"""\n', "") in README


def test_links_of_the_readme_name_what_is_there():
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)(?:#L(\d+))?\)", README)
    assert links
    for name, file, number in links:
        lines = (HERE / file).read_text().splitlines()[int(number or 1) - 1:int(number or -1)]
        last = name.split(".")[-1]
        assert any(re.match(rf"\s*((def|class) {last}\b|{last} = )", line) for line in lines), name


def test_the_readme_lists_every_difference_from_the_paper_and_the_authors_code():
    """One link for every NOTE of the four scripts, to its line."""
    section = re.search(r"^## Differences\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    notes = [(f"{script}.py", str(number)) for script in SCRIPTS
             for number, line in enumerate((HERE / f"{script}.py").read_text().splitlines(), 1)
             for _ in range(line.count("NOTE("))]
    assert sorted(re.findall(r"\((\w+\.py)#L(\d+)\)", section[1])) == sorted(notes)


def imports_of(path, nodes=ast.walk):
    """The modules, and module.name, that a file imports, by default inside functions, too."""
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names, module = [alias.name for alias in node.names], getattr(node, "module", None)
            yield from [module, *(f"{module}.{name}" for name in names)] if module else names


def test_no_file_imports_one_that_imports_it():
    """Of experiments/ the four scripts import only the pages that score_heads.py renders when it is
    given none, and that inside a function. The renderer imports none of the four."""
    files = {path.relative_to(HERE).with_suffix("").as_posix().replace("/", "."): path
             for path in (*HERE.glob("*.py"), *HERE.glob("experiments/*.py"))}
    imports = {name: {*imports_of(path)} & files.keys() for name, path in files.items()}
    beyond = {(script, other) for script in SCRIPTS for other in imports[script] - {*SCRIPTS}}
    assert beyond == {("score_heads", "experiments.pages")}
    assert "experiments.pages" not in imports_of(files["score_heads"], ast.iter_child_nodes)
    assert not imports["experiments.pages"]
    while (rest := {a: found for a, found in imports.items() if found & imports.keys()}) != imports:
        imports = rest
    assert not imports                                              # who imports one another
