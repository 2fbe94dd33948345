"""The page of explore.py shows what sparsemm.py computes. `pytest experiments/test_explore.py`"""

import contextlib
import io
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch

import sparsemm
from experiments import explore
from sparsemm import DEFAULT_MODEL

TINY = DEFAULT_MODEL.parent
SAMPLE = ["--image", str(TINY / "receipt.png"), "--prompt", "What is the Rope?"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--virtual-time-budget=8000", "--dump-dom")


@pytest.fixture(scope="module", params=["qwen2-vl", "llava-next"])
def made(request, tmp_path_factory):
    """(model's folder, page) of the sample."""
    model = str(TINY / request.param)
    out = tmp_path_factory.mktemp("explore") / "page.html"
    explore.main([*SAMPLE, "--model", model, "--out", str(out)])
    return model, out


def shown(page, state, profile):
    """{id: text} of what a browser shows of the page at this address."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"{page.as_uri()}#{state}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    texts = re.findall(r'<(?:output|b|h2|p|span) [^>]*id="([\w-]+)"[^>]*>([^<]*)<', dom)
    address = re.findall(r'id="(address)"[^>]*href="([^"]*)"', dom)
    labels = re.findall(r'data-head="(\d+-\d+)"[^>]*aria-label="([^"]*)"', dom)
    return {name: unescape(text) for name, text in texts + labels + address}


def command(*options):
    """What sparsemm.py --json prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        sparsemm.main([*SAMPLE, "--json", "--max-new-tokens", "64", *options])
    return json.loads(out.getvalue())


@pytest.mark.skipif(BROWSER is None, reason="no browser")
@pytest.mark.parametrize("method, budget", [("sparsemm", 64), ("snapkv", 128), ("full", 96)])
def test_page_shows_the_numbers_of_the_command(made, tmp_path, method, budget):
    model, page = made
    result = command("--model", model, "--method", method, "--budget", str(budget))
    see = shown(page, f"method={method}&budget={budget}&head=7-1", tmp_path)
    assert see["answer"] == result["text"]
    assert see["entries"] == f"{sum(map(sum, result['kept'])):,}"
    assert see["bytes"] == f"{result['cache_bytes']:,}"
    assert see["bytes-of"] == f"of {result['full_cache_bytes']:,}"
    T = result["prompt_tokens"]
    assert see["head-name"] == f"Layer 7 head 1: {result['kept'][7][1]} of {T} kept"
    for l, row in enumerate(result["kept"]):
        for g, n in enumerate(row):
            assert see[f"{l}-{g}"] == f"layer {l} head {g}: {n} of {T} entries kept"


MOVES = """<script>setTimeout(() => {
  const slider = document.getElementById("budget");
  slider.value = 2, slider.dispatchEvent(new Event("input", { bubbles: true }));
  document.querySelector('[value="snapkv"]').click();
  const cell = document.querySelector('[data-head="7-1"]');
  cell.click(), cell.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowUp", bubbles: true }));
  document.querySelector('[data-head="0-2"]').dispatchEvent(
    new PointerEvent("pointerover", { pointerType: "mouse", bubbles: true }));
}, 2000)</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_slider_method_and_keys_move_what_is_shown(made, tmp_path):
    """The cursor over a head shows it for as long as it is there."""
    moved = tmp_path / "moved.html"
    moved.write_text(made[1].read_text(encoding="utf-8") + MOVES, encoding="utf-8")
    there = shown(made[1], "method=snapkv&budget=96&head=0-2", tmp_path / "a")
    here = shown(moved, "method=full&budget=48&head=0-0", tmp_path / "b")
    assert here.pop("address") == "#method=snapkv&budget=96&head=6-1&query=0&token=1"
    assert there.pop("address") == "#method=snapkv&budget=96&head=0-2&query=0&token=1"
    assert here == there and "96 of" in here["budget-now"]


def test_page_is_small_and_loads_nothing(made):
    text = made[1].read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    assert not re.search(r"https?:|<link|\ssrc=|@import|@DATA@|@PARTS@", text)


def test_weights_are_those_of_the_attention_that_decoded(monkeypatch):
    """weights @ values is what decode_attention returns."""
    q, K, V = torch.randn(2, 1, 8), torch.randn(30, 8), torch.randn(30, 8)
    out = explore.decode_attention(q, [(K, V)])[:, 0]
    assert torch.allclose(explore.weights(q, K[None]) @ V, out, atol=1e-6)


def test_what_does_not_fit_is_left_out_weights_first(monkeypatch):
    model, image = explore.load(DEFAULT_MODEL, "cpu"), explore.open_image(TINY / "receipt.png")
    smallest_loss, sizes = explore.smallest_loss, []
    monkeypatch.setattr(explore, "smallest_loss", lambda *parts: parts)
    parts = explore.explore(model, image, "What is the Rope?", None, limit=4)
    html = "x" * 3_000_000
    for _ in range(3):
        monkeypatch.setattr(explore, "LIMIT", limit := len(html) - 1)
        html = smallest_loss(*parts)
        data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
        sizes.append((*data["detail"], len(data["budgets"])))
        assert len(html) <= limit
    assert sizes[0] == (*explore.DETAIL[0], 5) and sizes[0] > sizes[1] > sizes[2]
    monkeypatch.setattr(explore, "LIMIT", 20_000)
    with pytest.raises(ValueError, match="a smaller picture is right"):
        smallest_loss(*parts)


def test_without_head_scores_methods_that_need_them_are_left_out():
    model, image = explore.load(DEFAULT_MODEL, "cpu"), explore.open_image(TINY / "receipt.png")
    html = explore.explore(model, image, "What is the Rope?", None, limit=2)
    assert '"snapkv 64"' in html and '"sparsemm 64"' not in html and "<script>alert" not in html


@pytest.mark.parametrize("options", [
    ["--image", "missing.png"], ["--prompt", " "], ["--out", "page.txt"], ["--out", "no/page.html"],
    ["--max-new-tokens", "0"], ["--model", "missing"], ["--scores", "missing.json"],
    ["--prompt", "a <|image_pad|> b"], ["--device", "abacus"]])
def test_bad_input_is_one_line_and_no_file(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        explore.main([*SAMPLE, "--out", "page.html", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(Path(tmp_path).iterdir())
