"""The commands from outside: what they answer and write, how they end in a shell, and one case for
each kind of mistake, which must end in one line and status 2, and never in a wrong answer."""

import io
import json
import math
import os
import shutil
import sys
from functools import reduce
from pathlib import Path
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import model_llava
import score_heads
import sparsemm
from cache import METHODS
from model_llava import open_image
from sparsemm import SCORES_FILE

SAMPLE = json.loads((HERE / "tiny" / "samples.json").read_text())[0]
PAGE = HERE / "tiny" / SAMPLE["image"]                               # 256 x 384: 16 x 24 tokens
PAGES = [{"image_name": str(PAGE), "2_coord": [{"chunk": "Rope", "coord": [[0, 0], [255, 383]]}]}]
SCORES = {f"{l}-{h}": [0.5, 1] for l in range(8) for h in range(8)}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4400000000\n"
QWEN, LLAVA, WEIGHTS, TOKENIZER = "qwen2-vl", "llava-next", "model.safetensors", "tokenizer.json"
CONFIG, ENDS, IMAGES = (f"{name}config.json" for name in ("", "generation_", "preprocessor_"))


@pytest.fixture
def folder(request, tmp_path):
    """A folder of links to the files of a shipped model, Qwen2-VL if the test names none."""
    path = HERE / "tiny" / getattr(request, "param", QWEN)
    return shutil.copytree(path, tmp_path / path.name, copy_function=os.symlink,
                           ignore=shutil.ignore_patterns("prompts.json"))


def change(path, content):
    """Puts another file in a link's place. content: None (no file), text, (key, ..., value) to set
    in its JSON, or tensors to add to it (None: to leave out)."""
    if isinstance(content, tuple):
        *keys, last, value = content
        whole = json.loads(path.read_text())
        reduce(dict.get, keys, whole)[last] = value
        content = json.dumps(whole)
    tensors = load_file(path) | content if isinstance(content, dict) else {}
    path.unlink(missing_ok=True)
    if tensors:
        save_file({key: w for key, w in tensors.items() if w is not None}, path)
    elif content is not None:
        path.write_text(content)


def run(capfd, *argv, main=sparsemm.main):
    """(stdout, stderr) of a command."""
    capfd.readouterr()
    model_llava.note.cache_clear()                                     # each is said once only
    main(list(map(str, argv)))
    return capfd.readouterr()


def refused(capfd, *argv, words="", main=sparsemm.main):
    """The command ends with status 2 and one line (or a bar and one), which holds all the words."""
    with pytest.raises(SystemExit) as end:
        run(capfd, *argv, main=main)
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (2, "") and ".py: error: " in err.splitlines()[-1], out + err
    assert err.count("\n") == 1 or "page/s" in err, err
    assert not [word for word in words.split() if word not in err], err


# ---- what the command answers --------------------------------------------------------------------

def test_the_whole_answer_is_out_before_the_report(capfd, monkeypatch):
    out, ask = io.BytesIO(), ("--image", PAGE, "--prompt", SAMPLE["prompt"])
    answer, report = run(capfd, *ask)
    assert answer == SAMPLE["answer"] + "\n" and "37% evicted" in report and "load" in report
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out))           # buffered, as a pipe is
    monkeypatch.setattr(sparsemm, "report", lambda result, model: out.getvalue().decode())
    assert run(capfd, *ask)[1] == SAMPLE["answer"] + "\n\n"


def test_images_questions_and_the_fields_of_json(capfd):
    """A further --image is one more image. A further question adds to what was kept, unless --fresh
    compresses everything anew."""
    ask = "--image", PAGE, "--prompt", "Total?", "--json", "--budget", 40, "--max-new-tokens", 3
    once, both, twice, two, fresh = (json.loads(run(capfd, *ask, *more)[0]) for more in (
        (), ("--image", PAGE, PAGE), ("--image", PAGE) * 2, ("--prompt", "Date?"),
        ("--prompt", "Date?", "--fresh")))
    assert set(once) == {*"""text token_ids new_tokens prompt_tokens image_tokens method budget kept
        cache_bytes full_cache_bytes allocated_bytes prefill_seconds decode_seconds""".split()}
    assert once["image_tokens"] == 16 * 24 and sum(map(sum, once["kept"])) == 8 * 4 * 40
    assert both["image_tokens"] == 3 * 16 * 24 and both["token_ids"] == twice["token_ids"]
    assert {str(x["runs"][0]["token_ids"]) for x in (two, fresh)} == {str(once["token_ids"])}
    assert [sum(map(sum, x["runs"][1]["kept"])) > 8 * 4 * 40 for x in (two, fresh)] == [True, False]


def test_compare_runs_every_method_and_skips_those_without_scores(folder, capfd):
    ask = "--model", folder, "--image", PAGE, "--prompt", "Total?", "--compare"
    runs = json.loads(run(capfd, *ask, "--json")[0])["runs"]
    assert [result["method"] for result in runs] == list(METHODS)
    assert {sum(map(sum, result["kept"])) for result in runs[1:]} == {8 * 4 * 256}
    (folder / SCORES_FILE).unlink()
    lines = run(capfd, *ask)[0].splitlines()[1:]
    assert [line.split()[0] for line in lines if "skipped" in line] == ["sparsemm", "shuffled"]
    assert {line.split()[0] for line in lines} == set(METHODS)


def test_an_option_without_effect_is_no_error(capfd):
    options = "full", "snapkv --scores none", "full --budget 16 --rho 7 --no-redistribute --fresh"
    asks = [["--prompt", "Total?", "--method", *chosen.split()] for chosen in options]
    assert len({run(capfd, *ask)[0] for ask in asks}) == 1


def test_what_may_not_be_meant_is_said_once(folder, capfd):
    change(folder / CONFIG, ("text_config", "max_position_embeddings", 50))
    change(folder / "adapter_config.json", "{}")
    change(folder / "visual_head_scores.about.json", ("model", "someone/other"))
    _, err = run(capfd, "--model", folder, "--prompt", "d\u00e9j\u00e0")
    for words in ("someone/other", "'\u00e9' '\u00e0'", "the 50 tokens", "a picture", "adapter"):
        assert err.count(words) == 1, (words, err)
    asked = [run(capfd, "--prompt", prompt)[1] for prompt in ("Describe it.", "Rope?")]
    assert ["this small model knows" in err for err in asked] == [True, False]


# ---- mistakes: options, files of a model, pictures, pages, outputs -------------------------------

@pytest.mark.parametrize("options, words", [
    ("--budget 31", "--budget 31 32"), ("--rho nan", "nan 0 1"), ("--device gpu", "--device gpu"),
    ("--max-new-tokens 0", "--max-new-tokens 0"), ("--scores none", "none No such file"),
    ("--image none.png", "--image none.png No such file"), (f"--image {__file__}", __file__),
    ("--prompt \t", "empty"), ("--prompt <|image_pad|>", "--prompt <|image_pad|>")])
def test_bad_arguments(capfd, options, words):
    refused(capfd, "--prompt", "Hi", *options.split(" "), words=words)


@pytest.mark.parametrize("folder, file, content, words", [
    (QWEN, CONFIG, "junk", CONFIG), (QWEN, CONFIG, ("model_type", "llava"), "llava qwen2_vl"),
    (QWEN, CONFIG, ("quantization_config", {"bits": 4}), "quantized"),
    (LLAVA, CONFIG, ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}), "linear"),
    (QWEN, CONFIG, ("text_config", "rope_parameters", "mrope_section", [4, 2, 11]), "17 16"),
    (LLAVA, CONFIG, ("vision_feature_layer", 9), "vision_feature_layer 9"),
    (LLAVA, CONFIG, ("vision_feature_select_strategy", "full"), "select_strategy full"),
    (LLAVA, CONFIG, ("image_grid_pinpoints", [[160, 170]]), "image_grid_pinpoints"),
    (QWEN, CONFIG, ("text_config", "vocab_size", 100), "vocab_size 103 99"),
    (QWEN, ENDS, ("eos_token_id", [2, 500]), "500"), (QWEN, ENDS, ("eos_token_id", -1), "-1"),
    (QWEN, CONFIG, ("image_token_id", 8), "0"), (QWEN, ENDS, ("eos_token_id", []), "end token"),
    (QWEN, IMAGES, ("merge_size", 4), IMAGES), (QWEN, IMAGES, ("patch_size", 7), IMAGES),
    (QWEN, IMAGES, ("temporal_patch_size", 1), f"{IMAGES} temporal_patch_size 1 2"),
    (LLAVA, IMAGES, ("size", {"shortest_edge": 56}), f"{IMAGES} size 56 160"),
    (LLAVA, IMAGES, ("crop_size", {"height": 160, "width": 56}), f"{IMAGES} crop_size 56"),
    (LLAVA, IMAGES, ("image_grid_pinpoints", [[160, 160]]), IMAGES),
    (QWEN, TOKENIZER, ("version", "9.0"), "tokenizer 9.0"), (QWEN, TOKENIZER, POINTER, "tokenizer"),
    (QWEN, WEIGHTS, POINTER, f"{WEIGHTS} git-lfs"), (QWEN, WEIGHTS, None, f"{WEIGHTS} missing"),
    (QWEN, WEIGHTS, {"model.norm.weight": None}, "decoder.norm.weight"),
    (QWEN, WEIGHTS, {"model.norm.weight": torch.ones(5)}, "decoder.norm.weight 5 256"),
    (QWEN, WEIGHTS, {"model.norm.weight": torch.full((256,), math.nan)}, "finite float32"),
    (QWEN, WEIGHTS, {"surplus": torch.ones(2)}, "surplus"),
    (QWEN, WEIGHTS, {"model.norm.weight": torch.ones(256, dtype=torch.int8)}, "norm integers"),
    (QWEN, SCORES_FILE, None, f"{SCORES_FILE} score_heads.py"), *(
        (QWEN, SCORES_FILE, json.dumps(SCORES | damage), f"--scores {SCORES_FILE}") for damage in (
            {"2-8": [1]}, {"head": [1]}, {"1-1": [-1, 3]}, {"1-1": [math.nan]},
            dict.fromkeys(SCORES, [0])))], indirect=["folder"])
def test_files_of_a_model_that_do_not_fit_or_cannot_be_read(folder, file, content, words, capfd):
    change(folder / file, content)
    refused(capfd, "--model", folder, "--image", PAGE, "--prompt", "Hi", words=words)


def test_what_is_missing_or_too_large_is_said_before_weights_are_read(folder, capfd, monkeypatch):
    monkeypatch.setattr(model_llava, "safe_open", None)
    index, shards = folder / "model.safetensors.index.json", {"a": WEIGHTS, "b": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    refused(capfd, "--model", folder, "--prompt", "Hi", words="2.safetensors missing")
    index.unlink()
    monkeypatch.setattr(model_llava, "machine_memory", lambda: 1e6)
    refused(capfd, "--model", folder, "--prompt", "Hi", words="memory float32 bfloat16")
    monkeypatch.setattr(sparsemm, "open_image", lambda path: torch.empty(2**50))        # 4,000 TB
    refused(capfd, "--image", PAGE, "--prompt", "Hi", words="too little memory")


def test_pictures_are_read_as_they_look(tmp_path, capfd, monkeypatch):
    """Transparency is white. Greys of 16 bits are scaled by the range that they use."""
    grey = Image.fromarray(np.uint8([[0, 128]]))
    pale = Image.merge("LA", [grey, Image.fromarray(np.uint8([[0, 255]]))])
    palette = grey.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    deep = [Image.fromarray(np.uint16([[0, top // 2 + 1, top]])) for top in (255, 4095, 65535)]
    for image in (pale, pale.convert("RGBA"), palette, *deep):
        image.save(tmp_path / "a.png")
        seen = np.asarray(open_image(tmp_path / "a.png"))[0].T.tolist()
        assert seen == [[0, 128, 255] if image in deep else [255, 128]] * 3, image.mode
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)                 # PIL refuses twice as many
    assert open_image(PAGE).size == (256, 384)
    (tmp_path / "cut.png").write_bytes(PAGE.read_bytes()[:5000])
    refused(capfd, "--prompt", "Hi", "--image", tmp_path / "cut.png", words="--image cut.png")


def test_bad_pages_are_named_and_a_run_without_hits_leaves_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.png").write_bytes(PAGE.read_bytes()[:5000])
    bad = [*(PAGES[0] | damage for damage in (
        {"image_name": "cut.png"}, {"image_name": 3}, {"2_coord": [{"chunk": "x"}]})), "nothing"]
    ask = "--data", "data.json", "--out", "s.json", "--transcript", "truth"
    for content, words in (("junk", "data.json"), ("{}", "data.json"), (bad, "0 of 4 pages")):
        Path("data.json").write_text(content if content is not bad else json.dumps(bad))
        refused(capfd, *ask, main=score_heads.main, words=words)
        assert {path.name for path in tmp_path.iterdir()} == {"cut.png", "data.json"}
    Path("data.json").write_text(json.dumps(bad + PAGES))
    out, _ = run(capfd, *ask, main=score_heads.main)
    assert "1 pages, 4 skipped, 4 tokens" in out and "entry 0: --image cut.png" in out
    assert {len(numbers) for numbers in json.loads(Path("s.json").read_text()).values()} == {1}


def test_an_output_never_overwrites_an_input_or_what_is_no_file(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for data, out in (("a.json", "a.json"), ("a.about.json", "a.json"), ("a.json", "none/s.json"),
                      ("a.json", tmp_path), ("a.json", "pipe")):
        Path(data).write_text(json.dumps(PAGES))
        refused(capfd, "--data", data, "--out", out, main=score_heads.main, words="--out")
        assert json.loads(Path(data).read_text()) == PAGES
    assert len({sparsemm.about_file(f"llava-v1.{i}") for i in (5, 6)}) == 2


# ---- shells: all commands run at once, in processes of their own ---------------------------------

SHELLS = {
    "pipe": "python sparsemm.py --prompt Hi | true; exit ${PIPESTATUS[0]}",
    "full disk": "python sparsemm.py --prompt Hi >/dev/full",
    "hub": "HF_ENDPOINT=http://0:9 HF_HUB_CACHE=$OUT python sparsemm.py --model a/b --prompt Hi",
    "torchrun": "python -m torch.distributed.run --standalone --nproc-per-node 2 -- score_heads.py "
                "--transcript truth --num 6 --out $OUT/s.json",
    "killed": """set -m
        for signal in INT KILL; do
            python score_heads.py --transcript truth --out $OUT/s.json &
            before=$(cat $OUT/*journal0 | wc -l)
            until [ $(cat $OUT/*journal0 | wc -l) -gt $((before + 1)) ]; do sleep 0.1; done
            kill -$signal %%; wait %%; echo $?
        done
        printf '\\n["5", {"sc' >>$OUT/s.json.journal0""",
    "alone": """cp {cache,model_llava,sparsemm,score_heads}.py $OUT; ln -s $PWD/tiny $OUT; cd $OUT
        python -c 'import sparsemm, sys; sparsemm.main(sys.argv[1:])
print([name for name in sys.modules if "_qwen2_vl" in name and "modeling" in name])' \
            --image tiny/receipt.png --prompt "What is the Total?" && python cache.py &&
        python score_heads.py --data data.json --transcript truth --out s.json"""}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """name of a command -> (its folder $OUT, stdout, stderr, status)"""
    started, path = {}, f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command in SHELLS.items():
        out = tmp_path_factory.mktemp("shell")
        (out / "data.json").write_text(json.dumps(PAGES))
        environment = os.environ | dict(OMP_NUM_THREADS="1", PATH=path, OUT=str(out))
        started[name] = out, Popen(["bash", "-c", command], cwd=HERE, env=environment,
                                   stdout=PIPE, stderr=PIPE, text=True)
    return {name: (out, *process.communicate(timeout=280), process.returncode)
            for name, (out, process) in started.items()}


def test_shells_see_one_line_and_no_traceback(ended):
    assert ended["pipe"][1:] == ("", "", 141)
    for name, lines, words in (("full disk", 1, "No space left on device"), ("hub", 2, "a/b")):
        _, out, err, status = ended[name]
        assert (status, out) == (2, "") and words in err and err.count("\n") <= lines, err


def test_the_four_scripts_need_neither_experiments_nor_models_of_transformers(ended):
    out, answer, err, status = ended["alone"]
    assert status == 0 and answer.startswith("74.18\n[]\n") and (out / "s.json").exists(), err


def test_killed_runs_go_on_and_two_processes_equal_one(ended, tmp_path, capfd, monkeypatch):
    """The same command goes on after Ctrl-C and after a kill in the middle of a line."""
    (cut, statuses, err, _), (two, _, errors, status) = ended["killed"], ended["torchrun"]
    assert statuses == "130\n137\n" and "pages are saved" in err and "Traceback" not in err
    real, calls, ask = score_heads.score_transcript, [], "--transcript truth --num 6 --out".split()
    monkeypatch.setattr(score_heads, "score_transcript", lambda *a: calls.append(1) or real(*a))
    refused(capfd, *ask, cut / "s.json", "--seed", 1, main=score_heads.main, words="settings")
    for folder, least, most in ((cut, 0, 3), (tmp_path, 6, 6)):                # pages scored anew
        run(capfd, *ask, folder / "s.json", main=score_heads.main)
        assert least <= len(calls) <= most and not calls.clear(), calls
        assert {path.name for path in folder.glob("s.*")} == {"s.about.json", "s.json"}
    assert status == 0, errors
    assert len({(folder / "s.json").read_text() for folder in (cut, tmp_path, two)}) == 1
