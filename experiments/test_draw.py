"""Pictures stay small whatever the page. `pytest experiments/test_draw.py`"""

import pytest
from PIL import Image

from experiments import draw
from sparsemm import DEFAULT_MODEL


@pytest.mark.parametrize("size", [(256, 384), (9000, 5000), (3, 20000), (20000, 3)])
def test_a_panel_is_as_large_as_it_is_looked_at(size):
    panel, scale = draw.panel_of(Image.new("RGB", size))
    assert panel.width <= 2 * draw.PANEL and panel.height <= 8 * draw.PANEL
    assert panel.size == tuple(max(1, round(scale * side)) for side in size)


@pytest.mark.parametrize("options", [["--image", "missing.png"], ["--budget", "8"],
                                     ["--out", "kept.gif"], ["--scores", "missing.json"]])
def test_bad_input_is_one_line_and_no_picture(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        draw.main(["kept", "--out", "kept.png", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_kept_and_heads_are_drawn(tmp_path):
    draw.main(["kept", "--out", str(tmp_path / "kept.png")])
    files = sorted(map(str, DEFAULT_MODEL.parent.glob("*/visual_head_scores.json")))
    draw.main(["heads", *files, "--out", str(tmp_path / "heads.png")])
    for name in ("kept.png", "heads.png"):
        with Image.open(tmp_path / name) as image:
            assert 600 <= image.width <= 900 and len(image.getcolors(1 << 20)) > 20
