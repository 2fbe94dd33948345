"""Facts about compress.py, reproduce.py and report.py: answers forced through one prefill, controls
and figures by hand, the paper rerun on a random model: pytest experiments/test_reproduce.py"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sparsemm
from cache import (METHODS, Method, allocate_budgets, kv_head_scores, observed_attention,
                   pyramid_budgets)
from experiments import compress, report, reproduce
from experiments.compress import Setting, forced_accuracy, forced_logits, masked_heads, prefill
from model_llava import load, prepare
from score_heads import write_scores
from test_sparsemm import checkpoints, picture, seeded                              # fixtures, too

HERE = Path(__file__).resolve().parent
PAGE = picture(64, 50)


def read_once(ours):
    scores = torch.rand(ours.config.layers, ours.config.heads, dtype=torch.float64) ** 4
    return prefill(ours, prepare(ours, [PAGE], "What is it?")), {"aligned": scores}


@torch.inference_mode()
def compressed(ours, read, s, tables, seed=0):
    method = Method(s.method, s.budget, s.window, s.rho, s.redistribute, tables["aligned"], seed)
    held = sparsemm.new_cache(ours, len(read.inputs.ids), method, 9)
    sparsemm.prefill(ours, read.inputs, held)
    return held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_one_prefill_keeps_the_very_entries_that_the_real_cache_keeps(checkpoints, name, method):
    ours = checkpoints[name][2]
    read, tables = read_once(ours)
    for numbers in (20, 6, 0.1, True), (50, 50, 0.1, True), (64, 8, 0, False), (500, 32, 0.1, True):
        setting = Setting(method, *numbers)
        real, keep = compressed(ours, read, setting, tables, 3), read.keep(setting, tables, seed=3)
        again = read.cache(setting, tables, seed=3)
        assert again.held() == real.held() == keep.sum(-1).tolist()
        for l in range(ours.config.layers):
            for g, ((k, v), (k_again, _)) in enumerate(zip(real[l], again[l])):
                assert torch.equal(k, read.k[l][g, keep[l, g]]) and torch.equal(k, k_again)
                assert torch.equal(v, read.v[l][g, keep[l, g]])


@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen", "qwen-tied"])
def test_forced_answers_equal_prefill_compression_and_decoding_token_by_token(checkpoints, name):
    ours, tokens = checkpoints[name][2], [40, 41, 60, 33, 70, 35]
    read, tables = read_once(ours)
    settings = [Setting(method, budget, window=6) for budget in (20, 300) for method in METHODS]
    keep = torch.stack([read.keep(s, tables) for s in settings])
    logits, first = forced_logits(read, keep, tokens), read.inputs.next_position
    for s, forced in zip(settings, logits):
        held = compressed(ours, read, s, tables)
        with torch.inference_mode():
            expected = torch.stack([sparsemm.decode(ours, held, token, first + i)
                                    for i, token in enumerate(tokens)])
        assert (forced - expected).abs().max() < 1e-4
    assert ((logits[1:len(METHODS)] - logits[0]).abs().amax((1, 2)) > 0.1).all()   # logits[0]: full
    second = logits[0, 0].argmax().item()     # what the full cache would write, and some would not
    right = (logits[:, 0].argmax(-1) == second).double() / 2
    assert torch.equal(forced_accuracy(read, keep, [40, second, 0], rows=5), right)
    assert right[0] == 0.5 and right.min() == 0


def test_other_ways_to_rank_positions():
    q, k = torch.randn(3, 60, 8), torch.randn(3, 60, 8)       # one head per group, then one query
    for by, w in ("best head", 10), ("last query", 1):
        got = compress.observed_by(compress.BY[by], q, k, w)
        assert torch.allclose(got, observed_attention(q, k, w))


@pytest.mark.parametrize("G", [4, 8])
def test_controls_keep_what_they_say(G):
    s = torch.rand(8, 8, dtype=torch.float64) ** 4
    tables, kv = compress.score_tables(s, G), kv_head_scores(s, G)
    layers, within = tables["layers"], tables["within"](1)
    assert torch.allclose(layers.sum(1), s.sum(1)) and (layers == layers[:, :1]).all()
    permuted = kv_head_scores(within, G)
    assert torch.allclose(permuted.sort(1).values, kv.sort(1).values)
    assert not torch.allclose(permuted, kv) and not torch.equal(within, tables["within"](2))
    assert torch.allclose(kv_head_scores(tables["squared"], G), kv ** 2)
    for budget in (48, 100, 256):
        rising = allocate_budgets(kv_head_scores(tables["rising pyramid"], G), budget, 5000, 32, 0)
        falling = pyramid_budgets(8, budget, 5000, 32)[:, None].flip(0)
        assert (rising - falling).abs().max() <= 1 and rising.sum() == G * falling.sum()


@pytest.mark.parametrize("name", ["vicuna", "qwen"])
def test_masked_heads_add_nothing(checkpoints, name):
    folder, _, ours = checkpoints[name]
    prompt, D, other = prepare(ours, [PAGE], "Hi"), ours.config.head_dim, load(folder, "cpu")
    for l, h in (0, 1), (1, 3):
        other.decoder.layers[l].self_attn.o_proj.weight.data[:, h * D:(h + 1) * D] = 0
    with torch.inference_mode():
        masked = ours.hidden_states(prompt, masked_heads([(0, 1), (1, 3)]))
        assert (masked - other.hidden_states(prompt)).abs().max() < 1e-4
        assert (masked - ours.hidden_states(prompt)).abs().max() > 0.01


def test_random_masks_leave_the_visual_heads_out():
    s = torch.rand(8, 8)
    sets, best = compress.head_sets(s, seeds=10), compress.best_heads(s)
    assert s[tuple(zip(*best))].tolist() == sorted(s.flatten().tolist(), reverse=True)
    assert [*sets] == [(n, which) for n in (1, 2, 3, 6) for which in ("visual", *range(10))]
    for (n, which), of in sets.items():
        assert of == best[:n] if which == "visual" else len({*of} | {*best[:6]}) == n + 6


def test_figures_by_hand():
    mean, low, high = report.interval([0.0, 1.0] * 50)              # a standard error of 0.05
    assert (mean, low, high) == pytest.approx((0.5, 0.402, 0.598), abs=0.02)
    for b, r in ([1, 9, 10, 99], 1), ([1, 3, 2, 4], 0.8), ([0, 0, 1, 1], 0.8944):
        got = reproduce.rank_correlation(torch.arange(4), torch.tensor(b))
        assert got == pytest.approx(r, abs=1e-4)
    row, other = reproduce.row((8, 32, 48)), reproduce.row((8, 32, 48), lambda b: b // 4)
    pairs = reproduce.minus(row, other)
    assert [*row] == [*pairs] == [32, 48] and [s.window for s in other.values()] == [2, 8, 12]
    measured = dict(zip(pairs[48], [dict(accuracy=np.array(x)) for x in ([0.9, 0.4], [0.7, 0.2])]))
    assert reproduce.figure(measured, pairs[48]) == pytest.approx([0.2] * 3)                # paired
    assert report.show([0.912, 0.88, 0.94]) == "91.2 [88.0, 94.0]" and report.show(-1e-9) == "0.0"
    of = reproduce.unevenness(torch.tensor([[1, 0.1], [0.09, 0]], dtype=torch.float64))
    assert list(of.values())[-3:] == [pytest.approx(1.1 / 1.19), 0.5, 1]


@pytest.mark.parametrize("figure, above, expected", [
    ([0.1, 0.05, 0.15], 0, "significant"), ([-0.1, -0.15, -0.05], 0, "contradicted"),
    ([0.1, -0.05, 0.25], 0, "not significant"), ([0.0, 0.0, 0.0], 0, "not significant"),
    ([0.0, 0.0, 0.0], -0.01, "significant"), ([0.6, 0.4, 0.8], 0.5, "not significant")])
def test_a_verdict_needs_the_whole_interval(figure, above, expected):
    mirrored = [-figure[0], -figure[2], -figure[1]]
    assert report.claim("", "", {"": figure}, above=above)["verdicts"] == {"": expected}
    assert report.claim("", "", {"": mirrored}, below=-above)["verdicts"] == {"": expected}
    assert report.in_words({"a": expected, "b": "x", "c": expected}) == f"{expected}; x: b"


@pytest.fixture
def rerun(checkpoints, monkeypatch, tmp_path):
    folder, home = shutil.copytree(checkpoints["qwen"][0], tmp_path / "qwen"), tmp_path / "e"
    write_scores(list(torch.rand(16, 3, 6) ** 4), folder / sparsemm.SCORES_FILE)
    home.mkdir()
    shutil.copy(HERE / "RESULTS.md", home)
    (tmp_path / "README.md").write_text("before\n<!-- results -->\n<!-- /results -->\nafter\n")
    monkeypatch.setattr(reproduce, "HERE", home)
    return lambda part: reproduce.main([part, "--model", str(folder), "--pages", "1"])


def test_every_claim_and_table_reaches_the_pages(rerun, tmp_path):
    out = tmp_path / "e" / "results"
    rerun("all")
    rerun("results")
    page, tables = (tmp_path / "e" / "RESULTS.md").read_text(), (out / "tables-qwen.md").read_text()
    readme = (tmp_path / "README.md").read_text().split("\n")
    assert [readme[0], readme[-2]] == ["before", "after"]
    assert [line.split("`")[1] for line in readme if line[:3] == "| `"] == [*METHODS[1:5], "full"]
    for part in reproduce.PARTS:
        results = json.loads((out / f"{part}-qwen.json").read_text())
        for c in results["claims"]:
            assert f"| {c['claim']} | {c['paper']} | {report.figures_of(c)} | " in page
        for t in results["tables"]:
            assert report.markdown(t) in tables and " pages" in t["title"]
    assert {"main-qwen.png", "bytes.png", "window.png"} < {path.name for path in out.iterdir()}


def test_a_stopped_part_goes_on(rerun, monkeypatch, tmp_path):
    work, calls, out = reproduce.masked_accuracy, [], tmp_path / "e" / "results"

    def dies(*arguments):
        calls.append(1)
        return work(*arguments) if len(calls) != 2 else {}["the end"]

    monkeypatch.setattr(reproduce, "masked_accuracy", dies)
    with pytest.raises(SystemExit):
        rerun("masking")
    assert [path.suffix for path in out.iterdir()] == [".journal0"]
    rerun("masking")
    assert [path.suffix for path in out.iterdir()] == [".json"] and len(calls) == 3


@pytest.mark.parametrize("name", ["experiments/BENCHMARKS.md", "tiny/README.md"])
def test_generated_tables_are_those_of_what_is_stored(tmp_path, name):
    shutil.copytree((HERE.parent / name).parent, (tmp_path / name).parent)
    (report.card if "tiny" in name else report.bench_page)(tmp_path / name)
    assert (tmp_path / name).read_text() == (HERE.parent / name).read_text()


def test_the_rule_for_the_window_is_the_best_on_development_pages():
    of = [json.loads(path.read_text()) for path in HERE.glob("results/window-*.json")]
    a, b = (results["development"] for results in of)
    assert max(a, key=lambda rule: a[rule][0] + b[rule][0]) == reproduce.RULE
