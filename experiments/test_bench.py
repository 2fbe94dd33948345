"""The benchmarks measure what they say: by hand where a figure can be had by hand."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlavaNextConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import Method
from experiments import bench
from experiments.pages import Rendered


def run(tmp_path, *arguments):
    """The rows of a part, and its Markdown."""
    bench.main([*arguments, "--num", "1", "--out", str(tmp_path / "bench.json")])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert " ".join(arguments) in stored["command"] and stored["torch"] == torch.__version__
    return stored["results"], (tmp_path / "bench.md").read_text()


def test_decode_has_the_bytes_that_a_step_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "bandwidth", lambda model: 1e9)
    rows, page = run(tmp_path, "decode", "--lengths", "64", "--budgets", "32", "--prefill")
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2048 + 2 * 1024
    weights, full = 4 * (8 * layer + 1024 * 1024), 2 * 64 * 4 * 64 * 16 * 8
    for row in rows:
        read = weights + (full if row["method"] in ("full", "transformers") else full / 2)
        assert row["floor, ms"] == pytest.approx(read / 1e6)
        assert row["byte ratio"] == pytest.approx((weights + full) / read)
        assert row["prefill, s"] > 0 and row["peak, GB"] == "-"
    assert [row["method"] for row in rows][::5] == ["full", "transformers"] and len(rows) == 6
    assert page.splitlines()[2].startswith("| small-mha | 64 | full | 64 | ")


def test_scores_of_geometries_are_as_concentrated_as_published_ones():
    s = bench.concentrated_scores(32, 32, seed=0).flatten().sort(descending=True).values
    assert s[:51].sum() / s.sum() == pytest.approx(0.55, abs=0.002) and s.min() > 0


@pytest.mark.parametrize("method", ["full", "sparsemm"])
def test_tensors_without_contents_take_what_real_ones_take(monkeypatch, method):
    config = LlavaNextConfig(image_token_index=1, text_config=LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=100))
    method = Method(method, 64, head_scores=torch.rand(3, 4))
    told = bench.peaks(config, 600, method, torch.float32)
    monkeypatch.setattr(bench, "FakeTensorMode", nullcontext)
    assert told == bench.peaks(config, 600, method, torch.float32)
    kept = 3 * 4 * (64 if method.name == "sparsemm" else 600) * 2 * 16 * 4 / 1e9
    assert told["kept"] == pytest.approx(kept + 3 * 4 * 2 * 16 * 4 / 1e9)   # one token was decoded
    assert told["weights"] + kept < told["prefill"] < told["weights"] + kept + 0.01


def test_both_procedures_of_scoring_find_the_same_scores(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "Rendered", lambda kinds, seed, size, num: Rendered(
        ("form",), seed, (128, 96), num))
    rows, _ = run(tmp_path, "scoring", "--dtype", "float32")
    assert {row["scores differ by"] for row in rows} == {"0.0%"} and len(rows) == 8


def test_attention_holds_the_mean_and_one_long_head(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "SHAPES", ((4, 2, 8, 40),))
    (row,), _ = run(tmp_path, "attention")
    assert 40 < row["largest head"] < 80
    assert row["ratio"] == row["decode_attention, ms"] / row["plain product, ms"]
