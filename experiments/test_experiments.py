"""Facts about the experiments: answers forced through one prefill, the paper rerun, FastV,
pictures, speed, and the seven benchmarks. (About the method itself: test_sparsemm.py.)

    pytest experiments/test_experiments.py
"""

import importlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model_llava
import score_heads
import sparsemm
from cache import (METHODS, KVCache, allocate_budgets, kv_head_scores, make_method,
                   observed_attention, pyramid_budgets)
from experiments import (bench, compress, draw, evaluate, evaluate_tiny, fastv, metrics, miniatures,
                         progress, report, reproduce)
from experiments.arguments import as_typed
from experiments.compress import (Setting, forced_accuracy, forced_logits, masked_accuracy,
                                  masked_heads, prefill, written)
from experiments.pages import render_page
from experiments.report import show
from experiments.sources import Rendered
from model_llava import open_image
from sparsemm import DEFAULT_MODEL
from test_sparsemm import (HERE, TINY, checkpoints, picture, rejected, run, tiny,   # fixtures, too
                           two_ranks)


# ---- one prefill, many settings ------------------------------------------------------------------

PAGE = picture(64, 50)


def read_once(ours, text="What is it?"):
    return prefill(ours, model_llava.prepare(ours, [PAGE], text))


def compressed(ours, prompt, method, window):
    """A real cache after a real prefill."""
    held = KVCache(method, window)
    with torch.inference_mode():
        sparsemm.prefill(ours, prompt, held)
    return held


def decode_logits(ours, prompt, tokens, held):
    """Logits (len(tokens), vocabulary) while `tokens` are forced after a prefill into `held`."""
    with torch.inference_mode():
        return torch.stack([sparsemm.decode(ours, held, token, prompt.next_position + i)
                            for i, token in enumerate(tokens)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_one_prefill_keeps_what_the_method_keeps(checkpoints, name, method):
    """Budgets below and above the prompt's length, windows small, large, and beyond it: of every
    head the very keys and values that a prefill into the real cache leaves."""
    ours = checkpoints[name][2]
    c, prompt = ours.config, model_llava.prepare(ours, [PAGE], "What is it?")
    tables = {"aligned": torch.rand(c.layers, c.heads, dtype=torch.float64) ** 4}
    read = read_once(ours)
    for budget, window, rho, pour in ((20, 6, 0.1, True), (50, 50, 0.1, True), (64, 8, 0.0, False),
                                      (500, 32, 0.1, True)):
        setting = Setting(method, budget, window, rho, pour)
        plan = make_method(method, c.layers, c.kv_heads, len(prompt.ids), budget, window, rho, pour,
                           tables["aligned"], seed=3)
        real, keep = compressed(ours, prompt, plan, window), read.keep(setting, tables, seed=3)
        again = read.cache(setting, tables, seed=3)
        assert again.held() == real.held() == keep.sum(-1).tolist()
        for l in range(c.layers):
            for (k, v), (k_again, _), k_all, v_all, kept in zip(
                    real[l], again[l], read.k[l], read.v[l], keep[l]):
                assert torch.equal(k, k_all[kept]) and torch.equal(v, v_all[kept])
                assert torch.equal(k, k_again)


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen", "qwen-tied"])
def test_forced_answers_equal_decoding_token_by_token(checkpoints, name):
    """All methods in one batch of masks, against the real cache."""
    ours = checkpoints[name][2]
    c, tokens = ours.config, [40, 41, 60, 33, 70, 35]
    prompt = model_llava.prepare(ours, [PAGE], "What is it?")
    tables = {"aligned": torch.rand(c.layers, c.heads, dtype=torch.float64) ** 4}
    settings = [Setting(method, budget, window=6) for budget in (20, 300) for method in METHODS]
    read = read_once(ours)
    keep = torch.stack([read.keep(s, tables) for s in settings])
    logits, expected = forced_logits(read, keep, tokens), []
    for s in settings:
        plan = make_method(s.method, c.layers, c.kv_heads, len(prompt.ids), s.budget, 6,
                           head_scores=tables["aligned"])
        expected.append(decode_logits(ours, prompt, tokens, compressed(ours, prompt, plan, 6)))
    assert (logits - torch.stack(expected)).abs().max() < 1e-4
    changed = (logits[:len(METHODS)] - logits[0]).abs().amax((1, 2))       # logits[0]: full
    assert (changed[1:] > 0.1).all() and changed[0] == 0
    # the answer that a setting itself would give, but for the first token, is right to the end
    some = [0, 1, 4, 6, 10]
    for s in (0, 4):
        answer = [40, *logits[s, :1].argmax(-1).tolist(), 41]
        right = [(decode_logits(ours, prompt, answer[:-1],
                                read.cache(settings[i], tables)).argmax(-1)
                  == torch.tensor(answer[1:])).double().mean().item() for i in some]
        got = forced_accuracy(read, keep, answer, rows=5)
        assert got[some].tolist() == pytest.approx(right)
        assert got[s] > 0 and len(set(got.tolist())) > 1


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_writing_from_one_prefill_equals_generate(checkpoints, name):
    ours = checkpoints[name][2]
    scores = torch.rand(ours.config.layers, ours.config.heads, dtype=torch.float64)
    read, texts = read_once(ours), []
    for method in METHODS:
        expected = sparsemm.generate(ours, [PAGE], "What is it?", method, 20, window=6,
                                     head_scores=scores, max_new_tokens=9, seed=2)["text"]
        held = read.cache(Setting(method, 20, window=6), {"aligned": scores}, 2)
        texts.append(written(read, held, 9))
        assert texts[-1] == expected, method
    assert len(set(texts)) > 2


def test_other_position_scores():
    torch.manual_seed(0)
    q, k, s = torch.randn(6, 60, 8), torch.randn(3, 60, 8), torch.rand(6)
    A, usual = compress.attention_rows(q, k, 10), observed_attention(q, k, 10)
    mean = compress.pool(A.mean(1).unflatten(0, (3, 2)).mean(1))
    assert torch.allclose(mean, usual, atol=1e-6)
    # all the weight on one head of a group: its own attention; no scores at all: the mean
    alone = compress.by_scored_heads(A, k, torch.tensor([0, 1, 1, 1, 0, 0]).float())
    assert torch.allclose(alone[0], compress.pool(A.mean(1))[1], atol=1e-6)
    assert torch.allclose(alone[1:], usual[1:], atol=1e-6)
    # one query head a group: nothing to weigh
    A, usual = compress.attention_rows(q[:3], k, 10), observed_attention(q[:3], k, 10)
    for by in ("heads by score", "best head"):
        assert torch.allclose(compress.BY[by](A, k, s[:3]), usual, atol=1e-6)
    assert torch.allclose(compress.by_last_query(A, k, s, share=0.0), usual, atol=1e-6)
    last = compress.by_last_query(A, k, s, share=1.0)
    assert torch.allclose(last, observed_attention(q[:3], k, 1)[:, :50], rtol=0.3, atol=0.01)
    # of keys of which one stands apart, with attention alike, that one is the most diverse
    same = torch.ones(1, 60, 8) + 0.01 * torch.randn(1, 60, 8)
    same[0, 17] = -1
    diverse = compress.by_diversity(torch.full((1, 10, 50), 1 / 60), same, s)
    assert diverse[0].argmax() == 17


def test_power_of_scores():
    """The root of a KV head's score, 4 and 9 of two query heads each."""
    table = compress.power_of_scores(torch.tensor([[1.0, 3.0, 9.0, 0.0]]), 2, 0.5)
    assert kv_head_scores(table, 2).tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("G", [4, 8])
def test_tables_that_tell_layers_from_heads(G):
    """The mean of a layer and the permuted scores keep each layer's sum, scores divided by it make
    layers equal; heads keep their order only in the last, and permuted ones another for a seed."""
    s = torch.rand(6, 8, dtype=torch.float64) ** 4
    s[3] = 0
    layers, within, heads = (compress.only_layers(s), compress.within_layers(s, G, seed=1),
                             compress.only_heads(s))
    for table in (layers, within):
        assert torch.allclose(table.sum(1), s.sum(1))
    assert torch.allclose(heads.sum(1), torch.ones(6, dtype=torch.float64))
    assert (layers == layers[:, :1]).all()
    kv, permuted = kv_head_scores(s, G), kv_head_scores(within, G)
    assert torch.allclose(permuted.sort(1).values, kv.sort(1).values)
    assert not torch.allclose(permuted, kv)
    assert torch.equal(within, compress.within_layers(s, G, seed=1))
    assert not torch.equal(within, compress.within_layers(s, G, seed=2))
    some = s.sum(1) > 0
    assert torch.equal(heads[some].argsort(1), s[some].argsort(1))
    assert (heads[3] == 1 / 8).all()


def test_a_rising_pyramid_is_pyramidkv_upside_down():
    table = kv_head_scores(compress.rising_pyramid(torch.zeros(8, 8)), 4)
    for budget in (48, 100, 256):
        rising = allocate_budgets(table, budget, 5000, 32, rho=0)
        falling = pyramid_budgets(8, budget, 5000, 32)[:, None].flip(0)
        assert (rising - falling).abs().max() <= 1 and rising.sum() == 4 * falling.sum()


def test_drawn_tables_are_drawn_with_the_seed(checkpoints):
    read, s = read_once(checkpoints["qwen"][2]), torch.rand(3, 6, dtype=torch.float64) ** 4
    tables = {"a": s, "b": lambda seed: s if seed == 5 else s.flip(0)}
    a, b = (Setting(budget=20, window=6, scores=name) for name in "ab")
    assert torch.equal(read.keep(a, tables), read.keep(b, tables, seed=5))
    assert not torch.equal(read.keep(a, tables), read.keep(b, tables, seed=4))


def test_position_scores_by_head_scores_follow_their_own_table(checkpoints):
    """Position scores are shared between settings, but not between tables of head scores."""
    ours = checkpoints["qwen"][2]
    shape = ours.config.layers, ours.config.heads
    tables = {name: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** 4
              for seed, name in enumerate("ab")}
    read, fresh = read_once(ours), read_once(ours)
    a, b = (Setting(budget=20, window=6, rho=1.0, scores=name, by="heads by score")
            for name in "ab")
    kept = read.keep(a, tables)
    assert torch.equal(read.keep(b, tables), fresh.keep(b, tables))
    assert not torch.equal(read.keep(b, tables), kept)


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_masked_heads_contribute_nothing(checkpoints, name):
    """Masking equals o_proj without the head's columns."""
    folder, _, ours = checkpoints[name]
    prompt, D = model_llava.prepare(ours, [PAGE], "Hi"), ours.config.head_dim
    other = model_llava.load(folder, "cpu", "float32")
    for l, h in ((0, 1), (1, 0), (1, 3)):
        other.decoder.layers[l].self_attn.o_proj.weight.data[:, h * D:(h + 1) * D] = 0
    with torch.inference_mode():
        before, expected = ours.hidden_states(prompt), other.hidden_states(prompt)
        masked = ours.hidden_states(prompt, masked_heads([(0, 1), (1, 0), (1, 3)]))
        right = ours.logits(before[-1]).argmax().item()
        shares = masked_accuracy(ours, PAGE, "Hi", [right], [[], [(0, 1), (1, 0), (1, 3)]])
        still_right = float(ours.logits(masked[-1]).argmax() == right)
    assert (masked - expected).abs().max() < 1e-4 < (masked - before).abs().max()
    assert shares == [1.0, still_right]


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_a_head_without_its_query_averages_all_values(checkpoints, name):
    """As in the authors' code: the same as q_proj without the head's rows, and unlike the mask of
    its output."""
    folder, _, ours = checkpoints[name]
    prompt, D = model_llava.prepare(ours, [PAGE], "Hi"), ours.config.head_dim
    other = model_llava.load(folder, "cpu", "float32")
    for l, h in ((0, 1), (1, 3)):
        for parameter in other.decoder.layers[l].self_attn.qkv_proj.parameters():   # weight, bias
            parameter.data[h * D:(h + 1) * D] = 0                            # q's rows come first
    with torch.inference_mode():
        masked = ours.hidden_states(prompt, masked_heads([(0, 1), (1, 3)], query=True))
        silent = ours.hidden_states(prompt, masked_heads([(0, 1), (1, 3)]))
        expected = other.hidden_states(prompt)
    assert (masked - expected).abs().max() < 1e-4 < (masked - silent).abs().max()


def test_random_masks_leave_the_visual_heads_out():
    s = torch.rand(8, 8)
    sets = compress.head_sets(s, seeds=10)
    assert sorted({count for count, _ in sets}) == [1, 2, 3, 6] and len(sets) == 4 * 11
    best = [divmod(i, 8) for i in s.flatten().argsort(descending=True).tolist()]
    for (count, which), chosen in sets.items():
        assert len(set(chosen)) == count
        assert chosen == best[:count] if which == "visual" else not set(chosen) & set(best[:6])
    assert len({tuple(sets[6, seed]) for seed in range(10)}) == 10
    assert sets == compress.head_sets(s, 10)


# ---- the paper rerun -----------------------------------------------------------------------------

def test_figures_by_hand():
    assert report.interval([0.5] * 7) == [0.5, 0.5, 0.5]
    mean, low, high = report.interval([0.0, 1.0] * 50)              # a standard error of 0.05
    assert mean == 0.5 and low == pytest.approx(0.402, abs=0.02) \
        and high == pytest.approx(0.598, abs=0.02)
    assert reproduce.characters("12.5", "12.50") == pytest.approx(0.8)
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert reproduce.rank_correlation(a, a.exp()) == pytest.approx(1)
    assert reproduce.rank_correlation(a, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    assert reproduce.rank_correlation(a, torch.tensor([0.0, 0.0, 1.0, 1.0])) == pytest.approx(
        0.8944, abs=1e-4)
    ten = torch.arange(10)
    assert reproduce.overlap(ten, ten.flip(0), 0.6) == pytest.approx(2 / 6)
    # "to" twice on the page, "5" within "55" too; of "be" both characters count
    assert reproduce.unique_words(list("to be 5"), ["to", "be", "to", "55", "5"]) == \
        [None, None, None, 1, 1, None, None]
    assert reproduce.unique_words(["to", " be", "e x"], ["to", "bee", "x"]) == [0, 1, 1]
    settings = [reproduce.Setting(budget=b) for b in (1, 2)]
    measured = {s: dict(accuracy=np.array(x)) for s, x in zip(settings, ([0.9, 0.4], [0.7, 0.2]))}
    assert reproduce.figure(measured, tuple(settings)) == pytest.approx([0.2] * 3)      # paired
    assert report.show([0.912, 0.88, 0.94]) == "91.2 [88.0, 94.0]" and report.show(-1e-9) == "0.0"


def test_a_claim_holds_fails_or_is_not_shown():
    """By its interval alone; a difference that is zero within its interval decides nothing."""
    for figure, above, expected in (
            ([0.1, 0.05, 0.15], 0, "yes"), ([-0.1, -0.15, -0.05], 0, "no"),
            ([0.1, -0.05, 0.25], 0, "not shown"), ([0.0, 0.0, 0.0], 0, "not shown"),
            ([0.0, 0.0, 0.0], -0.01, "yes"), ([0.6, 0.4, 0.8], 0.5, "not shown")):
        assert report.verdict(figure, above=above) == expected
        assert report.verdict([-x for x in figure][:1] + [-figure[2], -figure[1]],
                              below=-above) == expected                            # mirrored
    assert report.verdict([0.0, -0.02, 0.02], above=-0.03, below=0.03) == "yes"
    assert report.verdict([0.04, 0.02, 0.06], above=-0.03, below=0.03) == "not shown"
    assert report.verdict([0.05, 0.04, 0.06], above=-0.03, below=0.03) == "no"
    of = {("questions", "a"): "yes", ("questions", "b"): "no", ("transcripts", "a"): "yes",
          ("transcripts", "b"): "yes"}
    assert report.holds(of) == "yes; no: questions b"
    assert report.holds(of | {("questions", "a"): "no"}) in ("no; yes: transcripts",
                                                             "yes; no: questions")
    assert report.holds(of | {("transcripts", "b"): "no"}) in ("yes; no: b", "no; yes: a")
    assert report.holds({("", "a"): "no", ("", "b"): "no"}) == "no"


def test_unevenness_by_hand(tmp_path, capsys):
    """Two layers of two KV heads: all alike, one layer alone, one head of each layer."""
    def of(s):
        return reproduce.unevenness(torch.tensor(s, dtype=torch.float64))
    between, by_chance = "variance of the scores between layers", 1 / 3
    assert of([[1, 1], [1, 1]])[between] == 0 == of([[1, 1], [1, 1]])[
        "Gini coefficient of the heads"]
    assert of([[1, 1], [0, 0]])[between] == pytest.approx(1)
    assert of([[1, 1], [0, 0]])[report.STRONGEST] == 1
    assert of([[1, 0], [1, 0]])[between] == pytest.approx(0)
    assert of([[1, 0], [1, 0]])["Gini coefficients inside layers, weighted by the layers' sums"] \
        == pytest.approx(0.5)
    assert of([[1, 0], [0, 0]])[between] == pytest.approx(by_chance)
    assert of([[1, 0], [0, 0]])["the same if heads were dealt to layers by chance"] == by_chance
    assert of([[1, 0.1], [0.09, 0]])["heads with a tenth of the best head's score"] == 0.5
    assert of([[1, 0.1], [0.09, 0]])["the same in the layer that has most"] == 1
    # a file of query heads, and what is stored of it
    file = tmp_path / "some.json"
    file.write_text(json.dumps({f"{l}-{h}": [1.0, 2.0 * h] for l in range(2) for h in range(4)}))
    reproduce.main(["published", str(file), "--kv-heads", "2", "--out", str(tmp_path / "out")])
    stored = json.loads((tmp_path / "out" / "published.json").read_text())
    assert stored == {"some": of([[4, 12], [4, 12]])} and "some" in capsys.readouterr().out


REPRODUCE = ["--pages", "1", "--scoring-pages", "8", "--sizes", "128x64"]


def reproduced(folder, out, *arguments):
    """What a part writes, without the time it took."""
    reproduce.main([arguments[0], "--model", str(folder), "--out", str(out), *REPRODUCE,
                    *arguments[1:]])
    return {path.name: json.loads(path.read_text()) | {"seconds": 0}
            for path in sorted(out.glob("*.json"))}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says so there")
def test_results_name_the_processor():
    name, cores = progress.machine_name().rsplit(", ", 1)
    assert cores == f"{os.cpu_count()} cores"
    assert name and (name in Path("/proc/cpuinfo").read_text() or name == platform.machine())


def test_every_claim_is_rerun_and_reaches_the_readme(checkpoints, tmp_path, capsys):
    for name, part in (("qwen", "all"), ("vicuna", "masking")):
        shutil.copytree(checkpoints[name][0], tmp_path / name)
        stored = reproduced(tmp_path / name, tmp_path / "out", part)
    assert set(stored) == {f"{part}-qwen.json" for part in reproduce.PARTS} | {
        "masking-vicuna.json"}
    for results in stored.values():
        assert results["tables"] and results["versions"]["torch"] == torch.__version__
        assert "--seed 0" in results["command"] and results["machine"] == progress.machine_name()
        for _, *cells in (row for t in results["tables"] for row in t["rows"]):
            assert all(cell is None or isinstance(cell, (str, int)) or cell[1] <= cell[2]
                       for cell in cells)
    kept = next(t for t in stored["main-qwen.json"]["tables"] if "really kept" in t["title"])
    assert [row[1][0] for row in kept["rows"]][1:] == [48.0] * (len(METHODS) + 3)    # 4 controls
    split = next(t for t in stored["main-qwen.json"]["tables"] if "Layers and heads" in t["title"])
    (_, *whole), (_, *layers), (_, *heads), _ = split["rows"]
    assert all(a[0] == pytest.approx(b[0] + c[0]) for a, b, c in zip(whole, layers, heads))
    assert Image.open(tmp_path / "out" / "main-qwen.png").width > 800
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text("before\n<!-- results -->\nprevious\n<!-- /results -->\nafter\n")
    for _ in range(2):                                                   # again changes nothing
        reproduce.main(["results", "--readme", str(readme), "--out", str(tmp_path / "out")])
        text, results = readme.read_text(), page.read_text()
        assert text.startswith("before\n<!-- results -->\nAccuracy, transcripts, 128 x 64 pixels")
        assert text.endswith("<!-- /results -->\nafter\n") and "previous" not in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(METHODS) and rows[-1].startswith("| `full` |")
    assert all(row.count("|") == len(reproduce.BUDGETS) + 2 and "[" not in row for row in rows)
    assert "| vicuna (MHA) | qwen (GQA) | holds? |" in results and "(out/main-qwen.png)" in results
    assert all(f"[qwen](out/{part}-qwen.md)" in results for part in reproduce.PARTS)
    claims = {c["claim"]: c for part in stored.values() for c in part["claims"]}
    assert 15 <= len(claims) <= 25
    for text, c in claims.items():                              # one row each, with its intervals
        [line] = [line for line in results.splitlines() if line.startswith(f"| {text} |")]
        assert line.count("|") == 6 and report.figures_of(c) in line
        assert c["figures"].keys() == c["verdicts"].keys() <= {"", "questions", "transcripts"}
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must have <!-- results -->"):
        report.write_results(tmp_path / "out", reproduce.PARTS, readme)
    assert "| questions, 64 entries | qwen |" in results
    assert "| transcripts, large pages, 128 entries | qwen |" in results
    assert "512 x 512 pixels" in stored["large-qwen.json"]["tables"][0]["title"]
    assert "| the strongest layer's share | " in results and "published" not in stored


def test_generated_tables_are_those_of_what_is_stored(tmp_path):
    """BENCHMARKS.md and the models' card say what `python experiments/report.py` writes."""
    shutil.copytree(HERE / "experiments" / "results", tmp_path / "results",
                    ignore=shutil.ignore_patterns("pages"))
    for source, rewrite in ((HERE / "experiments" / "BENCHMARKS.md", report.bench_page),
                            (DEFAULT_MODEL.parent / "README.md", report.card)):
        for folder in source.parent.iterdir() if rewrite is report.card else ():
            if folder.is_dir():
                (tmp_path / folder.name).symlink_to(folder)
        page = tmp_path / source.name
        shutil.copy(source, page)
        rewrite(page)
        assert page.read_text() == source.read_text()
    page.write_text(page.read_text().replace("<!-- reading -->", ""))
    with pytest.raises(ValueError, match="<!-- reading -->"):
        report.card(page)


def test_stored_commands_name_the_model_as_it_is_typed():
    assert as_typed(DEFAULT_MODEL) == "tiny/qwen2-vl"
    assert as_typed("someone/some-model") == "someone/some-model"


def test_a_stopped_reproduction_goes_on(checkpoints, monkeypatch, tmp_path, capsys):
    folder = checkpoints["mistral"][0]
    whole = reproduced(folder, tmp_path / "whole", "masking")
    real, calls = reproduce.masked_accuracy, []

    def dies(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(reproduce, "masked_accuracy", dies)
    with pytest.raises(KeyboardInterrupt):
        reproduced(folder, tmp_path / "cut", "masking")
    assert not list((tmp_path / "cut").glob("*.json"))
    assert reproduced(folder, tmp_path / "cut", "masking") == whole
    assert len(calls) == 5                # a page of each task and kind of mask, and the failure
    capsys.readouterr()
    for arguments, expected in (
            (["masking", "--seed", "1"], "other settings"), (["masks"], "masks"),
            (["results"], "part main"), (["masking", "--pages", "0"], "--pages"),
            (["published"], "FILE"), (["masking", "--seed", "0", "some.json"], "some.json"),
            (["published", "none.json"], "none.json"),
            (["main", "--sizes", "9x9"], "at least 32")):
        with pytest.raises(SystemExit) as end:
            reproduced(folder, tmp_path / "cut", *arguments)
        err = capsys.readouterr().err.split("\r")[-1]
        assert end.value.code == 2 and err.strip().count("\n") == 0 and expected in err, err


# ---- FastV, pictures, pages, speed ---------------------------------------------------------------

@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_fastv_hides_the_image_tokens_that_the_last_query_looks_at_least(checkpoints, monkeypatch,
                                                                         name):
    """Which ones: by transformers' attention maps. What then: full attention under a mask that
    hides them from layer K on."""
    _, reference, ours = checkpoints[name]
    K, share, images = 1, 0.4, [picture(60, 50)]
    prompt = model_llava.prepare(ours, images, "What is it?")
    image, T = prompt.ids == ours.config.image_token, len(prompt.ids)
    inputs = dict(ours.processor.image_processor(images, return_tensors="pt"))
    if name == "qwen":
        inputs["mm_token_type_ids"] = image.int()[None]
    with torch.no_grad():
        maps = reference(input_ids=prompt.ids[None], output_attentions=True, **inputs).attentions
    looked_at = maps[K - 1][0, :, -1].mean(0)
    stays = looked_at >= looked_at[image].sort(descending=True).values[
        round(share * int(image.sum())) - 1]
    left = (stays | ~image).nonzero()[:, 0]

    chosen, run_layers = [], ours.decoder.run_layers

    def spy(x, positions, attend, first=0, last=None):
        if first == K:
            chosen.append(positions)
        return run_layers(x, positions, attend, first, last)

    monkeypatch.setattr(ours.decoder, "run_layers", spy)
    lengths = torch.full((ours.config.layers,), T)
    lengths[K:] = fastv.fastv_length(image, share)
    with torch.inference_mode():
        held = KVCache(make_method("full", ours.config.layers, ours.config.kv_heads, lengths))
        logits = fastv.fastv_prefill(ours, prompt, held, K, share)
    assert torch.equal(chosen[0], prompt.positions[:, left])
    assert len(left) == fastv.fastv_length(image, share) < T

    def hiding(layer, q, k, v):
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if layer >= K:
            seen[:, ~(stays | ~image)] = False
            seen |= torch.eye(T, dtype=torch.bool)                  # rows that nobody will read
        return torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, enable_gqa=True)[0]

    with torch.inference_mode():
        expected = ours.logits(ours.hidden_states(prompt, hiding)[-1])
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_fastv_leaves_its_layers_less_to_share(checkpoints, method):
    ours, images = checkpoints["qwen"][2], [picture(90, 120)]
    c, scores = ours.config, torch.rand(3, 6, dtype=torch.float64)
    prompt = model_llava.prepare(ours, images, "What is it?")
    T, left = len(prompt.ids), fastv.fastv_length(prompt.ids == c.image_token, 0.25)
    for budget in (40, 150, 10000):
        result = fastv.generate(ours, images, "What is it?", 1, 0.25, method, budget,
                                head_scores=scores, max_new_tokens=3)
        kept = result["kept"]
        assert max(kept[0]) <= T and max(map(max, kept[1:])) <= left
        if method in ("full", "sparsemm", "shuffled", "random"):
            most = (T + 2 * left) * c.kv_heads
            assert sum(map(sum, kept)) == min(most, (10000 if method == "full" else budget) * 6)
    assert kept == [[T] * 2, [left] * 2, [left] * 2]
    with pytest.raises(ValueError, match="fastv"):
        fastv.generate(ours, images, "What is it?", 3, 0.25)


def test_fastv_that_keeps_all_changes_nothing(checkpoints, capfd, tmp_path):
    """And its command answers what the other one does."""
    folder, _, ours = checkpoints["vicuna"]
    PAGE.save(tmp_path / "a.png")
    arguments = ["--model", str(folder), "--image", str(tmp_path / "a.png"), "--prompt", "Hi",
                 "--method", "snapkv", "--budget", "40", "--max-new-tokens", "5"]
    expected = sparsemm.generate(ours, [PAGE], "Hi", "snapkv", 40, max_new_tokens=5)
    fastv.main([*arguments, "--fastv-layer", "1", "--fastv-keep", "1"])
    out, err = capfd.readouterr()
    assert out == expected["text"] + "\n" and "evicted" in err
    line = rejected(capfd, *arguments, "--fastv-layer", 3, main=fastv.main)
    assert "--fastv-layer 3" in line and "from 1 to 2" in line


def test_pictures(checkpoints, tmp_path):
    for L, H in ((32, 32), (28, 28), (8, 8)):
        draw.heat_map(torch.rand(L, H) ** 6, tmp_path / "map.png")
        assert Image.open(tmp_path / "map.png").width > 16 * H
    ours = checkpoints["vicuna"][2]
    scores = torch.rand(ours.config.layers, ours.config.heads)
    for name in ("a.png", "a.gif"):
        draw.show_heads(ours, picture(90, 60), "Hi", scores, tmp_path / name, token=1,
                        token_ids=[40, 41, 42])
    assert Image.open(tmp_path / "a.gif").n_frames == 3
    assert Image.open(tmp_path / "a.png").size == Image.open(tmp_path / "a.gif").size
    draw.heat_maps({"a": torch.rand(8, 8), "b": torch.rand(32, 32)}, tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").width > 2 * 224


def test_shown_heads_are_the_best_of_several_layers_and_one_of_the_worst():
    scores = torch.tensor([[0.1, 0.3], [0.0, 0.2], [0.9, 0.8], [0.7, 0.6]])
    assert draw.heads_to_show(scores) == [(2, 0), (3, 0), (0, 1), (1, 0)]


def test_the_picture_of_what_is_kept_darkens_what_is_evicted(checkpoints, tmp_path, monkeypatch):
    """A white page at a budget that evicts most of it: as many patches are dark as are evicted, and
    a larger page makes no larger picture."""
    ours, scores = checkpoints["qwen"][2], torch.rand(3, 6, dtype=torch.float64)
    shades, painted = [], draw.painted
    monkeypatch.setattr(draw, "painted", lambda picture, image, shade: shades.append(shade)
                        or painted(picture, image, shade))
    for side in (160, 640):
        draw.show_kept(ours, Image.new("RGB", (side, side), "white"), "Hi", scores, 40,
                       tmp_path / f"{side}.png")
    page = draw.prepare(ours, [Image.new("RGB", (160, 160), "white")], "Hi")
    keep = draw.prefill(ours, page).keep(draw.Setting("snapkv", 40), {})
    image = slice(page.starts[0], page.starts[0] + len(page.images[0]))
    best = int(draw.kv_head_scores(scores, 2).argmax())
    evicted = ~keep.flatten(0, 1)[best, image]
    assert [covered > 0 for _, covered in shades[0]] == evicted.tolist() and evicted.any()
    assert Image.open(tmp_path / "160.png").size == Image.open(tmp_path / "640.png").size


def test_pictures_are_written_whole_or_not_at_all(monkeypatch, tmp_path):
    draw.heat_map(torch.rand(4, 4), tmp_path / "map.png")
    before = (tmp_path / "map.png").read_bytes()

    def dies(image, file, *arguments, **options):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(OSError):
        draw.heat_map(torch.rand(4, 4), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_rows_in_pictures_are_attention_maps(checkpoints):
    _, reference, ours = checkpoints["mistral"]
    prompt = model_llava.prepare(ours, [PAGE], "Hi")
    inputs = dict(ours.processor.image_processor([PAGE], return_tensors="pt"))
    with torch.no_grad():
        maps = reference(input_ids=prompt.ids[None], output_attentions=True, **inputs).attentions
        rows = draw.attention_rows(ours, prompt, [(0, 1), (1, 5)], 4)
    assert all((rows[l, h] - maps[l][0, h, -4:]).abs().max() < 1e-4 for l, h in ((0, 1), (1, 5)))


def test_command_shows_heads(checkpoints, capfd, tmp_path):
    picture(50, 70).save(tmp_path / "a.png")
    score_heads.write_scores([torch.rand(2, 6, dtype=torch.float64)], tmp_path / "scores.json")
    run(capfd, "--model", checkpoints["mistral"][0], "--image", tmp_path / "a.png",
        "--prompt", "Hi", "--scores", tmp_path / "scores.json", "--max-new-tokens", 4,
        "--show-heads", tmp_path / "look.png", "--show-token", 2)
    assert Image.open(tmp_path / "look.png").width > 6 * 50


def test_the_scoring_benchmark_lets_each_procedure_take_the_numbers_that_suit_it():
    row = dict(pages="letters", transcript="truth", tokens=9, times_faster=3, differ=0)
    results = [dict(model="tiny", dtype=dtype, num=1, rows=[dict(
        row, images_per_second=ours, step_by_step_images_per_second=theirs)])
        for dtype, ours, theirs in (("float32", 6, 2), ("bfloat16", 9, 1))]
    assert bench.scoring_table(results).endswith("* tiny, letters, truth: 9.00 / 2.00 = 4.5")
    assert bench.scoring_table(results[:1]).endswith(
        "| letters | truth | 9 | 6.00 | 2.00 | 3.0 | 0.0% |")


def test_pages_in_other_fonts(tiny, monkeypatch, tmp_path, capsys):
    """The built-in font's own file gives the same evaluation."""
    fonts = tmp_path / "fonts" / "family"
    fonts.mkdir(parents=True)
    for name in ("a.ttf", "b.ttf"):
        (fonts / name).write_bytes(ImageFont.load_default(16).font_bytes)
    monkeypatch.setattr(evaluate_tiny, "load", lambda *arguments: tiny[TINY[0]])
    about = []
    for more in ((), ("--fonts", str(fonts.parent))):
        evaluate_tiny.main(["--num", "2", "--kinds", "form", "--sizes", "96x48", *more,
                            "--out", str(tmp_path / "evaluation.json")])
        about.append(json.loads((tmp_path / "evaluation.json").read_text()))
    assert about[0]["results"] == about[1]["results"]
    assert about[1]["fonts"] == ["a.ttf", "b.ttf"] != about[0]["fonts"]
    assert "--fonts" in about[1]["command"] and "--fonts" not in about[0]["command"]


FLOORS = [(name, kind, size, floor) for kind, size, *floors in (          # right of ten, by model
    ("form", (256, 128), 9, 9), ("form", (256, 256), 8, 8), ("receipt", (256, 256), 9, 9),
    ("table", (256, 256), 8, 9), ("form", (512, 512), 8, 8)) for name, floor in zip(TINY, floors)]


@pytest.mark.parametrize("name, kind, size, floor", FLOORS)
def test_new_pages_are_read(tiny, name, kind, size, floor):
    """One question each about pages that no training batch has drawn. The floor lies under the
    share that tiny/NAME/evaluation*.json state, where they have that size."""
    right = 0
    for i in range(10):
        rng = random.Random(f"new page {i}")
        page = render_page(rng, kind, *size)
        key, value = rng.choice(page.questions)
        answer = sparsemm.generate(tiny[name], [page.image], f"What is the {key}?", "full")["text"]
        right += answer == value
    assert right >= floor


@pytest.mark.parametrize("name", TINY)
def test_a_page_that_is_read_once_is_answered_as_if_each_question_were_alone(tiny, name):
    samples = json.loads((HERE / "tiny" / "samples.json").read_text())[:2]
    image = open_image(HERE / "tiny" / samples[0]["image"])
    assert {sample["image"] for sample in samples} == {samples[0]["image"]}
    page = evaluate_tiny.Page(tiny[name], image)
    assert page.image_tokens == model_llava.prepare(tiny[name], [image], "What?").image_tokens
    for sample in samples:
        alone = sparsemm.generate(tiny[name], [image], sample["prompt"], method="full")["text"]
        for right in (alone, alone[:-1], alone + "1", "wrong"):
            assert page.is_answered(sample["prompt"], right) == (right == alone)
            distance = evaluate_tiny.edit_distance(alone, right)
            assert page.transcribed(sample["prompt"], right) == pytest.approx(
                max(0, 1 - distance / len(right)))


def test_pages_are_rendered_where_there_are_none(checkpoints, tmp_path, capsys):
    """The same ones each time; for score_heads.py unless it is given --data."""
    pages = Rendered(("form", "sign"), 0, (64, 48), 3)
    assert len(pages) == 3 and pages[2][0].tobytes() == pages[2][0].tobytes()
    score_heads.main(["--model", str(checkpoints["qwen"][0]), "--synthetic", "form", "--num", "3",
                      "--width", "64", "--height", "48", "--transcript", "truth", "--out",
                      str(tmp_path / "s.json"), "--heatmap", str(tmp_path / "s.png")])
    assert "3 pages, 0 skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.about.json").read_text())["synthetic"] == ["form"]
    assert Image.open(tmp_path / "s.png").width > 16 * 6


def test_bench_tries_out_without_touching_what_is_stored(monkeypatch, tmp_path, capsys):
    """Where nothing is said, tables go where git does not look; and what they say by hand."""
    assert "experiments/work/" in (HERE / ".gitignore").read_text().split()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    monkeypatch.setattr(bench, "SHAPES", ((4, 2, 8, 40),))
    monkeypatch.setattr(bench, "LAYERS", 3)
    bench.main(["attention", "--num", "1"])
    stored = json.loads((tmp_path / "work" / "bench-attention.json").read_text())
    (row,) = stored["results"]
    assert row["ratio"] == pytest.approx(row["ms"] / row["plain_ms"]) and row["largest"] > 40
    assert (tmp_path / "work" / "bench-attention.md").read_text() in capsys.readouterr().out
    assert sum(bench.unequal_cache(2, 8, 40, 0).held()[1]) == 2 * 40


def test_bench_decodes_with_the_same_cache_as_generate(monkeypatch, tmp_path):
    """A small geometry: bytes by hand, and full is its own measure."""
    monkeypatch.setattr(bench, "bandwidth", lambda model: 1e10)        # which takes its time
    out = tmp_path / "decode.json"
    bench.main(["decode", "--geometry", "small-mha", "--lengths", "64", "--budgets", "32",
                "--num", "1", "--device", "cpu", "--out", str(out)])
    (result,) = json.loads(out.read_text())["results"]
    full, *others, theirs = result["rows"]
    assert full["cache_bytes"] == 2 * 4 * 64 * 64 * 16 * 8 == theirs["cache_bytes"]
    assert {row["cache_bytes"] for row in others} == {full["cache_bytes"] / 2}
    assert full["speedup"] == full["byte_ratio"] == 1 < others[0]["byte_ratio"]


@pytest.mark.parametrize("script, argument, value", [
    ("evaluate_tiny", "--model", "none"), ("evaluate_tiny", "--num", 0),
    ("evaluate_tiny", "--out", "none/evaluation.json"), ("evaluate_tiny", "--sizes", "9x9"),
    ("evaluate_tiny", "--fonts", "none"), ("evaluate_tiny", "--fonts", "broken"),
    ("train_tiny", "--work", "file/work"), ("train_tiny", "--out", "file"),
    ("train_tiny", "--device", "gpu"), ("train_tiny", "--threads", 0),
    ("train_tiny", "--workers", -1), ("train_tiny", "--report", 0),
    ("reproduce", "--out", "file/results"),
    ("bench scoring", "--model", "none"), ("bench scoring", "--num", 0),
    ("bench decode", "--lengths", 31), ("bench decode", "--budgets", "few"),
    ("bench decode", "--out", "none/bench.json"),
    ("pages", "--out", "page.bmp"), ("pages", "--width", 31),
    ("fastv", "--fastv-keep", 1.5), ("fastv", "--image", "none.png")])
def test_scripts_refuse_in_one_line(capfd, monkeypatch, tmp_path, script, argument, value):
    """And before they do any work."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("broken").mkdir()
    Path("broken", "font.ttf").write_text("no font")
    name, *part = script.split()
    main = importlib.import_module(f"experiments.{name}").main
    required = {"pages --width": ["--out", "page.png"], "fastv --image": ["--prompt", "Hi"],
                "fastv --fastv-keep": ["--prompt", "Hi", "--image", "file"]}
    line = rejected(capfd, *part, argument, value, *required.get(f"{name} {argument}", []),
                    main=main)
    assert argument.strip("-") in line and str(value) in line
    assert {path.name for path in Path().iterdir()} == {"file", "broken"}


# ---- the seven benchmarks ------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, answers, expected", [
    ("hello", ["hello"], 1),
    ("  HELLO \n World", ["hello world"], 1),
    ("abcd", ["abxx"], 0.5),                                           # exactly 0.5 still counts
    ("abc", ["axx"], 0),                                               # 1/3 does not
    ("abcdefg", ["abcdxxx"], 4 / 7),
    ("abcd", ["zzzz", "abcx", "abxx"], 0.75),                          # the best answer
    ("", ["abc"], 0),
    ("", [""], 1),
    ("total 5", ["5"], 0),                                             # 1 - 6/7
])
def test_anls_by_hand(prediction, answers, expected):
    assert metrics.anls(prediction, answers) == pytest.approx(expected)


def test_ocrbench_containment():
    assert metrics.contains("It says OPEN now.", ["closed", "open"]) == 1
    assert metrics.contains("open", ["Open now"]) == 0                 # not the other way round
    assert metrics.contains("first\nsecond", ["First second"]) == 1
    assert metrics.contains("x ^ { 2 }", ["x^{2}"]) == 0
    assert metrics.contains("so x ^ {2} + 1", ["x ^{ 2\n}"], ignore_spaces=True) == 1
    assert metrics.contains("firstsecond", ["first second"]) == 0


@pytest.mark.parametrize("text, expected", [
    ("The Two dogs.", "2 dogs"), ("an apple", "apple"), ("None", "0"), ("ten", "10"),
    ("1,000", "1000"), ("$3.50", "$3.50"), ("U.S.A.", "usa"), ("is it?", "is it"),
    ("red-green", "red green"), ("red - green", "red green"), ("re-do - it", "redo it"),
    ("(yes)", "yes"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("oclock", "o'clock"),
    ("what's up", "what 's up"), (" two\nlines\there ", "2 lines here"), ("the", ""),
])
def test_vqa_answers_are_normalised_as_by_evalai(text, expected):
    assert metrics.normalise_answer(text) == expected


@pytest.mark.parametrize("matching, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1),
                                                (10, 1)])
def test_vqa_accuracy_votes_among_nine_of_ten(matching, expected):
    """With 3 of 10: left-out answers that match see 2 others, 2/3; the seven others see 3, 1."""
    answers = ["The Red."] * matching + [f"blue {i}" for i in range(10 - matching)]
    assert metrics.vqa_accuracy("red", answers) == pytest.approx(expected)
    assert metrics.vqa_accuracy("RED!", answers) == pytest.approx(expected)


@pytest.mark.parametrize("prediction, answer, expected", [
    ("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1), ("95", "-100", 0),
    ("5%", "0.05", 1), ("5%", "5", 0), ("5.2%", "5%", 1), ("0", "0", 1), ("0.0", "0", 0),
    ("0%", "0", 0), ("0.01", "0", 0), ("Yes", "yes", 1), ("yes ", "yes", 0), ("1,000", "1000", 0),
    ("1,000", "1,000", 1), ("ten", "10", 0), ("%", "%", 1), ("", "", 1),
])
def test_chartqa_relaxed_accuracy(prediction, answer, expected):
    assert metrics.relaxed_match(prediction, answer) == expected


@pytest.mark.parametrize("prediction, letter", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("B: dog", "B"), ("The answer is B.", "B"),
    ("b", None), ("E", None), ("", None), ("A or B", None), ("A. cat, B. dog", None),
    ("a dog", "B"), ("It is a DOG", "B"), ("cat and dog", None), ("A dog is in the picture", "B"),
    ("Ah, Bats", None),
])
def test_mmbench_choice_is_a_unique_letter_or_text(prediction, letter):
    assert metrics.choose(prediction, {"A": "cat", "B": "dog", "C": "cow"}) == letter


def test_mmbench_is_circular():
    indices = [7, 1_000_007, 2_000_007, 8, 1_000_008, 3_000_009]
    assert metrics.circular(indices, [1, 1, 1, 1, 0, 1]) == {7: 1, 8: 0, 9: 1}


def test_cider_by_hand():
    red, cat, cow = "a red dog runs fast", "the blue cat sleeps", "one cow eats"
    references = [[red], [cat], [cow]]
    # identical; the last has no 4-grams, which count 0
    assert metrics.cider([red.upper() + "!", cat, cow], references) == pytest.approx([10, 10, 7.5])
    assert metrics.cider([cat, cow, red], references) == [0, 0, 0]                     # disjoint
    assert metrics.cider([red], [[red]]) == [0]                      # one image: ln 1 - ln 1 = 0
    assert metrics.cider(["", cat], [[red], [cat]]) == pytest.approx([0, 10])
    # "a" is common to both images and weighs 0, "dog" weighs ln 2; bigrams: none against one
    two = [["a dog"], ["a cat"]]
    assert metrics.cider(["dog", "cat"], two) == pytest.approx([10 / 4 * math.exp(-1 / 72)] * 2)
    # 2 ln 2 is clipped to ln 2: ln 2 * ln 2 / (2 ln 2 * ln 2) = 1/2; no bigram in common
    assert metrics.cider(["dog dog", ""], two) == pytest.approx([10 / 4 / 2, 0])
    # the mean over references: the other one shares nothing
    assert metrics.cider(["dog", ""], [["a dog", "a cow"], ["a cat"]]) == \
        pytest.approx([10 / 4 / 2 * math.exp(-1 / 72), 0])
    assert metrics.tokenize("It's 3.50, a co-op.") == ["it", "'s", "3.50", "a", "co-op"]


ASKED = {"docvqa": (32, "\nAnswer the question using a single word or phrase."),
         "ocrbench": (128, ""),
         "textvqa": (32, "\nAnswer the question using a single word or phrase."),
         "chartqa": (16, "\nAnswer the question with a single word."),
         "textcaps": (64, "Provide a one-sentence caption for the provided image."),
         "mmbench": (1024, "\n\nAnswer with the option's letter from the given choices directly."),
         "vqav2": (16, "\nAnswer the question using a single word or phrase.")}


HIGHEST = {"textcaps": lambda score: 2 < score <= 10, "textvqa": lambda score: score >= 0.9,
           "vqav2": lambda score: score >= 0.9}


def evaluate_on(capfd, *argv):
    """What the command prints."""
    capfd.readouterr()
    evaluate.main([str(a) for a in argv])
    return capfd.readouterr().out


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_right_answers_get_the_highest_score(tiny, monkeypatch, capfd, tmp_path, task):
    """From a miniature's file to the table, with a model that knows the answers."""
    data = miniatures.make_miniature(task, tmp_path, 4)
    assert "miniature" in data.name and "miniature" in data.parent.name
    rows, asked = evaluate.read_rows(data), []

    def knows(model, images, prompt, method, budget, **more):
        answers = evaluate.read_example(task, rows[len(asked)], len(asked), data.parent).answers
        assert images[0].tobytes() == \
            open_image(data.parent / rows[len(asked)]["image"]).tobytes()
        asked.append((prompt, more["max_new_tokens"]))
        return dict(text=max(answers, key=answers.count), kept=[[3, 4], [5, 6]], prompt_tokens=9)

    monkeypatch.setattr(evaluate, "load", lambda *arguments: tiny[TINY[-1]])
    monkeypatch.setattr(evaluate, "generate", knows)
    printed = evaluate_on(capfd, "--task", task, "--data", data, "--methods", "full",
                          "--out", tmp_path / "out")
    result = json.loads((tmp_path / "out" / "table.json").read_text())["results"][0]
    assert HIGHEST.get(task, lambda score: score == 1)(result["score"]), result
    assert (result["n"], result["kept_entries"], result["share_kept"]) == (4, 18, 0.5)
    assert printed.splitlines()[-1].split()[:2] == ["full", "-"]
    assert {(tokens, prompt.endswith(ASKED[task][1])) for prompt, tokens in asked} == \
        {(ASKED[task][0], True)}
    lines = (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(len(rows)))


def test_prompts_by_hand():
    def prompt(task, **row):
        row = {"image": "a.png", "question": "Which Shop is it?", "answer": "A", "index": 1, **row}
        return evaluate.TASKS[task].ask(row)
    assert prompt("textvqa") == "Which shop is it?"
    assert prompt("docvqa") == prompt("vqav2") == prompt("chartqa") == "Which Shop is it?"
    assert prompt("ocrbench", question=" Read it.\n") == "Read it."
    assert prompt("textcaps") == ""
    assert prompt("mmbench", hint="nan", A="Aldi", B=7, C=None, D=math.nan, E="") == \
        "Which Shop is it? There are several options:\nA. Aldi\nB. 7"
    assert prompt("mmbench", hint="Look.", A="x", B="y") == \
        "Look. Which Shop is it? There are several options:\nA. x\nB. y"


def test_chartqa_and_mmbench_report_their_parts():
    def example(number, answers, **row):
        return evaluate.Example(number, 0, Path("a"), "", answers, row)
    charts = [example(i, ["100"], type=kind)
              for i, kind in enumerate(["human_test", "human_test", "augmented_test"])]
    assert evaluate.judge_chartqa(charts, ["101", "no", "100"]) == \
        ([1, 0, 1], dict(score=pytest.approx(2 / 3), n=3, human=0.5, augmented=1))
    assert evaluate.judge_chartqa(charts[:1], ["1"])[1]["augmented"] is None
    rows = [example(i, [answer], index=index, A="cat", B="dog") for i, (index, answer) in
            enumerate([(5, "A"), (1_000_005, "B"), (6, "A"), (1_000_006, "B")])]
    assert evaluate.judge_mmbench(rows, ["A", "dog", "A", "what"]) == \
        ([1, 1, 1, 0], dict(score=0.5, n=2, unparsed=0.25))


def write_data(folder, num):
    """A file in VQAv2's fields, of `num` rows about random pictures."""
    for i in range(num):
        picture(40 + 8 * i, 50, seed=i).save(folder / f"{i}.png")
    rows = [dict(question_id=100 + i, question=f"What {i}?", image=f"{i}.png",
                 answers=[{"answer": "x"}, {"answer": "yz"}]) for i in range(num)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def contents(folder):
    return [(folder / name).read_text() for name in ("scores.jsonl", "table.json")]


def test_an_evaluation_is_resumed_after_a_kill(checkpoints, monkeypatch, capfd, tmp_path):
    folder, _, ours = checkpoints["qwen"]
    write_data(tmp_path, 3)
    monkeypatch.setattr(evaluate, "load", lambda *arguments: ours)
    real, calls = sparsemm.generate, []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    command = ("--task", "vqav2", "--data", tmp_path / "data.jsonl", "--model", folder,
               "--methods", "full,snapkv", "--budgets", "40, 50")
    evaluate_on(capfd, *command, "--out", tmp_path / "whole")
    monkeypatch.setattr(evaluate, "generate", dies)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate_on(capfd, *command, "--out", cut)
    kept = (cut / "predictions-0.jsonl").read_text()
    assert kept.count("\n") == 5 and not (cut / "scores.jsonl").exists()
    (cut / "predictions-0.jsonl").write_text(kept + '{"row": 1, "method": "snapkv", "pred')
    evaluate_on(capfd, *command, "--out", cut)
    assert len(calls) == 6 + 4                                        # 9 runs, 5 of which were done
    assert contents(cut) == contents(tmp_path / "whole")
    line = json.loads(contents(cut)[0].splitlines()[0])
    picture_0 = open_image(tmp_path / "0.png")
    expected = real(ours, [picture_0], f"What 0?{ASKED['vqav2'][1]}", "full", max_new_tokens=16)
    assert (line["prediction"], line["kept_entries"]) == \
        (expected["text"], sum(map(sum, expected["kept"])))
    # a further budget asks only for what is new; other settings are not mixed in
    evaluate_on(capfd, *command[:-1], "40,60", "--out", cut)
    assert len(calls) == 10 + 3
    assert [r["budget"] for r in json.loads(contents(cut)[1])["results"]] == [None, 40, 60]
    assert [r["kept_entries"] for r in json.loads(contents(cut)[1])["results"]][1:] == \
        [40 * 3 * 2, 60 * 3 * 2]
    line = rejected(capfd, *command, "--out", cut, "--window", 20, main=evaluate.main)
    assert "--out" in line and "another window" in line
    other = tmp_path / "other" / folder.name                      # a folder of the same name
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors")
    monkeypatch.setattr(ours, "folder", other)
    line = rejected(capfd, *command, "--out", cut, main=evaluate.main)
    assert "--out" in line and "another weights" in line


def evaluation(checkpoints, folder):
    """Of three rows, written to the folder, too."""
    write_data(folder, 3)
    return ["--task", "vqav2", "--data", folder / "data.jsonl", "--methods", "full,snapkv",
            "--model", checkpoints["qwen"][0], "--budgets", "40"]


def test_an_evaluation_in_two_processes_equals_one(checkpoints, capfd, tmp_path):
    arguments = evaluation(checkpoints, tmp_path)
    evaluate_on(capfd, *arguments, "--out", tmp_path / "one")
    two = subprocess.run(
        [sys.executable, *two_ranks("experiments/evaluate.py", *arguments, "--out",
                                    tmp_path / "two")],
        cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("kept entries") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert [len((tmp_path / "two" / f"predictions-{process}.jsonl").read_text().splitlines())
            for process in range(2)] == [4, 2]


def test_unreadable_rows_are_named_and_left_out(checkpoints, monkeypatch, capfd, tmp_path):
    rows = write_data(tmp_path, 3)
    (tmp_path / "bad.png").write_bytes(b"junk")
    unreadable = [dict(rows[0], image="none.png"), dict(rows[0], image="bad.png"),
                  dict(rows[0], question="<|image_pad|>"), dict(rows[0], answers=[]), [1],
                  dict(image="0.png", answers=["x"]), dict(rows[0], question=7)]
    lines = [json.dumps(row) for row in [*unreadable, *rows]]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines[:7] + ['{"cut'] + lines[7:]))
    monkeypatch.setattr(evaluate, "load", lambda *arguments: checkpoints["qwen"][2])
    command = ("--task", "vqav2", "--data", data, "--methods", "full", "--out", tmp_path / "out")
    printed = evaluate_on(capfd, *command)
    assert "3 rows, 8 skipped" in printed and "row 0 (question_id 100): " in printed
    skipped = json.loads(contents(tmp_path / "out")[1])["skipped"]
    for name, reason in {"row 0 (question_id 100)": "none.png: no such file",
                         "row 1 (question_id 100)": "bad.png: not a picture",
                         "row 2 (question_id 100)": "<|image_pad|>",
                         "row 3 (question_id 100)": "answers", "row 4": "not a JSON object",
                         "row 5": "'question'", "row 6 (question_id 100)": "'question'",
                         "row 7": "not a JSON object"}.items():
        assert reason in skipped[name]
    data.write_text("\n".join(lines[1:3]))                           # found out while running
    with pytest.raises(SystemExit) as end:
        evaluate_on(capfd, *command[:-1], tmp_path / "other")
    assert end.value.code == 2 and not (tmp_path / "other" / "scores.jsonl").exists()
    data.write_text("\n".join(lines[:1] + lines[3:7]))                                 # and before
    line = rejected(capfd, *command[:-1], tmp_path / "other", main=evaluate.main)
    assert "--data" in line and "none.png" in line


def test_mmbench_limit_counts_questions_and_a_broken_one_is_left_out(tiny, monkeypatch, capfd,
                                                                     tmp_path):
    data = miniatures.make_miniature("mmbench", tmp_path, 3)
    rows = evaluate.read_rows(data)
    assert [row["index"] for row in rows[:4]] == [0, 1, 2, 1_000_000]
    examples, errors = evaluate.read_examples("mmbench", rows, data.parent, limit=2)
    assert {e.row["index"] % 1_000_000 for e in examples} == {0, 1} and not errors
    assert len(examples) == len([row for row in rows if row["index"] % 1_000_000 < 2]) > 4
    rows[3]["image"] = "none.png"                                    # a rotation of question 0
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(evaluate, "load", lambda *arguments: tiny[TINY[-1]])
    monkeypatch.setattr(evaluate, "generate",
                        lambda *a, **b: dict(text="A", kept=[[1]], prompt_tokens=1))
    evaluate_on(capfd, "--task", "mmbench", "--data", data, "--methods", "full", "--out", tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["results"][0]["n"] == 2 and list(table["skipped"]) == ["row 3 (index 1000000)"]


@pytest.mark.parametrize("arguments, expected", [
    (["--task", "gqa"], ["--task", "gqa", "docvqa"]),
    (["--methods", "full,best"], ["--methods", "best", "snapkv"]),
    (["--budgets", "64,x"], ["--budgets", "'x'", "32"]),
    (["--budgets", "64,"], ["--budgets", "''"]),
    (["--budgets", "31"], ["--budgets", "31", "32"]),
    (["--limit", 0], ["--limit", "0"]),
    (["--images", "no/such"], ["--images", "no/such"]),
    (["--data", "none.jsonl"], ["--data", "none.jsonl", "cannot be read"]),
    (["--data", HERE / "sparsemm.py"], ["--data", "sparsemm.py", "not JSON"]),
    (["--data", HERE / "tiny" / "qwen2-vl" / "config.json"], ["--data", "config.json", "list"]),
    (["--data", HERE / "tiny" / "samples.json"], ["--data", "samples.json", "vqav2", "answers"]),
    (["--model", "no/such/folder"], ["no/such/folder"]),
    (["--out", HERE / "README.md"], ["--out", "README.md"]),
    (["--make-miniature", HERE / "README.md"], ["--make-miniature", "README.md"]),
])
def test_bad_arguments_of_the_evaluation(capfd, tmp_path, arguments, expected):
    write_data(tmp_path, 1)
    line = rejected(capfd, "--task", "vqav2", "--data", tmp_path / "data.jsonl", "--out", tmp_path,
                    "--methods", "full", *arguments, main=evaluate.main)
    assert all(word in line for word in expected), line


def test_evaluation_needs_scores_and_a_file(checkpoints, monkeypatch, capfd, tmp_path):
    write_data(tmp_path, 1)
    command = ("--task", "vqav2", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out")
    line = rejected(capfd, *command, "--model", checkpoints["qwen"][0], main=evaluate.main)
    assert "--scores" in line and "score_heads.py" in line
    assert "--data" in rejected(capfd, "--task", "docvqa", main=evaluate.main)
    assert "--task" in rejected(capfd, "--data", tmp_path / "data.jsonl", main=evaluate.main)
