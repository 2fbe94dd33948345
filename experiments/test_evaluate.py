"""Facts about the seven benchmarks, the rendered pages, how well small models read, and FastV."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import KVCache, Method, make_plan
from experiments import evaluate, evaluate_tiny, fastv, metrics
from experiments.pages import KINDS, render_page
from model_llava import open_image, prepare
from sparsemm import generate
from test_sparsemm import HERE, TINY, checkpoints, picture, tiny                    # fixtures, too

CASES = [(metric, *case) for metric, of in {                    # by hand: *arguments, score
    metrics.anls: [(" HELLO \n World", ["hello world"], 1), ("", [""], 1), ("abc", ["axx"], 0),
                   ("abcd", ["abxx"], 0.5), ("abcd", ["zzzz", "abcx"], 0.75)],
    metrics.contains: [("It says OPEN.", ["closed", "open"], 1), ("open", ["Open now"], 0),
                       ("x ^ {2}", ["x^{2}"], 0), ("so x ^ {2} + 1", ["x ^{ 2\n}"], True, 1)],
    metrics.normalise_answer: [("The Two dogs.", "2 dogs"), ("$1,000.50", "$1000.50"),
        ("red-green", "red green"), ("re-do - it", "redo it"), ("couldnt've", "couldn't've")],
    metrics.vqa_accuracy: [("RED!", ["The Red."] * n + [f"blue {i}" for i in range(10 - n)], score)
                           for n, score in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1))],
    metrics.relaxed_match: [("105", "100", 1), ("105.1", "100", 0), ("95", "-100", 0),
                            ("5%", "0.05", 1), ("0.0", "0", 0), ("Yes", "yes", 1), ("y ", "y", 0)],
    metrics.choose: [(text, {"A": "cat", "B": "dog"}, letter) for text, letter in (
        ("(B).", "B"), ("b", None), ("A or B", None), ("A DOG is in it", "B"), ("cat, dog", None))],
    metrics.cider: [(["a dog"], [["a dog"]], [0]),                                  # a single image
        (["A red dog runs!", "one cow eats"], [["a red dog runs"], ["one cow eats"]], [10, 7.5]),
        # "a" weighs 0, "dog" ln 2, for n = 1 of 4; bigrams: none against one. In the last case
        # 2 ln 2 is clipped to ln 2, which halves, and so does the reference that shares nothing
        (["dog", "cat"], [["a dog"], ["a cat"]], [10 / 4 * math.exp(-1 / 72)] * 2),
        (["dog dog", ""], [["a dog", "a cow"], ["a cat"]], [10 / 16, 0])]}.items() for case in of]


def test_metrics_by_hand():
    for metric, *arguments, expected in CASES:
        assert metric(*arguments) == pytest.approx(expected), (metric, arguments)


SHORT = "\nAnswer the question using a single word or phrase."
ROW = dict(image=f"{HERE}/tiny/form.png", question="Which Shop? ", answers=["B"] * 10, index=5,
           answer="B", caption_str=["B"], type="human_test", A="x", B="y", C="nan", D=None, E="")
ASKED = {"docvqa": (f"Which Shop? {SHORT}", 32), "ocrbench": ("Which Shop?", 128),
         "textvqa": (f"Which shop? {SHORT}", 32), "vqav2": (f"Which Shop? {SHORT}", 16),
         "chartqa": ("Which Shop? \nAnswer the question with a single word.", 16),
         "textcaps": ("Provide a one-sentence caption for the provided image.", 64),
         "mmbench": ("Which Shop?  There are several options:\nA. x\nB. y\n\nAnswer with the option"
                     "'s letter from the given choices directly.", 1024)}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(task, rows, *options): table.json of a model that says "B", or raises an error."""
    def says_b(model, images, prompt, method, max_new_tokens):
        run.calls.append((prompt, max_new_tokens, method.name))
        if prompt[0] in run.errors:
            raise run.errors[prompt[0]]
        return dict(text="B", kept=[[3, 4], [5, 6]], prompt_tokens=9)

    def run(task, rows, *options):
        run.calls, data, out = [], tmp_path / "data.jsonl", tmp_path / "out"
        data.write_text("\n".join(map(json.dumps, rows)))
        evaluate.main([f"--task={task}", f"--data={data}", f"--out={out}", *options])
        return json.loads((out / "table.json").read_text()) if any(out.glob("*.json")) else None

    run.errors = {}
    monkeypatch.setattr(evaluate, "generate", says_b)
    return run


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_right_answers_to_the_right_prompts(command, task):
    row = dict(ROW, answer=["B"]) if task == "ocrbench" else ROW
    (result,) = command(task, [row], "--methods", "full")["results"]
    assert command.calls == [(*ASKED[task], "full")]
    assert (result["score"], result["share_kept"]) == (0 if task == "textcaps" else 1, 0.5)
    assert result.get("human", 1) == 1 and result.get("augmented") is None


def test_answers_are_a_list_of_texts_or_of_dicts():
    row = dict(ROW, answers=[{"answer": "a b", "answer_id": 1}, "it's"])
    assert evaluate.read_example("vqav2", row, 0, HERE).answers == ["a b", "it's"]
    for bad in ("['a', 'b']", [], None):
        with pytest.raises(ValueError, match="row 7: 'answers' must be a list of texts"):
            evaluate.read_example("docvqa", dict(ROW, answers=bad), 7, HERE)


def test_an_evaluation_goes_on_after_a_kill_and_after_rows_that_cannot_be_asked(command, capfd):
    rows = [dict(ROW, question=f"{i}?", index=10 * i) for i in range(4)]
    rows += [dict(ROW, index=1000030, image="none.png"), dict(ROW, index=1000020, answer="A")]
    command.errors = {"1": KeyboardInterrupt()}
    with pytest.raises(SystemExit):
        command("mmbench", rows, "--methods", "full")
    command.errors = {"1": RuntimeError("DefaultCPUAllocator: can't allocate memory")}
    table = command("mmbench", rows, "--methods", "full,snapkv")
    assert "".join(p[0] + name[0] for p, _, name in command.calls) == "0s1f2f2s3f3sWfWs"
    assert [text[:6] for text in table["skipped"]] == ["row 1:", "row 4:"]
    assert [(r["score"], r["n"]) for r in table["results"]] == [(0.5, 2)] * 2    # questions 0 and 2
    with pytest.raises(SystemExit):
        command("mmbench", rows, "--seed", "1")
    assert "other settings" in capfd.readouterr().err


def test_processes_share_the_rows_and_the_first_judges_all(command, monkeypatch):
    for process, rows in ((1, 1), (0, 2)):
        monkeypatch.setattr(evaluate, "process_and_processes", lambda args: (process, 2))
        table = command("docvqa", [ROW] * 3, "--methods", "full")
        assert len(command.calls) == rows and (table is None) == (process == 1)


def test_pages_have_their_words_on_ink_and_the_answers_among_them():
    for seed, kind in ((seed, kind) for seed in range(4) for kind in KINDS):
        page = render_page(random.Random(seed), kind, 256, 192, noise=0)
        for word in (word for line in page.lines for word in line):
            assert np.ptp(np.asarray(page.image.crop(word.box)).sum(-1, dtype=int)) > 60, word
        assert all(value in page.text for _, value in page.questions)
    again = np.asarray(render_page(random.Random(9), "receipt", 256, 384).image)
    assert (again == np.asarray(open_image(HERE / "tiny" / "receipt.png"))).mean() > 0.95


@pytest.mark.parametrize("name", TINY)
def test_new_pages_are_read_and_judged_as_if_each_question_were_alone(tiny, name):
    page = evaluate_tiny.Page(tiny[name], open_image(HERE / "tiny" / "receipt.png"))
    alone = generate(tiny[name], [page.image], "Hi?")["text"]
    answered = [page.is_answered("Hi?", a) for a in (alone, alone[:-1], "x" + alone[1:])]
    results = evaluate_tiny.evaluate(tiny[name], "form", 256, 128, num=10, seed=1, transcripts=0)
    assert answered == [True, False, False] and results["tasks"]["value"]["mean"] >= 0.8


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vicuna", "mistral", "qwen"])
def test_fastv_hides_the_image_tokens_at_which_the_last_query_looks_least(checkpoints, name):
    ours, asked = checkpoints[name][2], ([picture(90, 120)], "What is it?")
    c, prompt = ours.config, prepare(ours, *asked)
    T, gone = len(prompt.ids), prompt.image_tokens - round(prompt.image_tokens / 2)
    hidden, left = torch.ones(T, T, dtype=torch.bool).triu(1), T - gone

    def hide(layer, q, k, v):                              # half of them, from the second layer on
        k, v = (x.repeat_interleave(c.heads // c.kv_heads, dim=0) for x in (k, v))
        p = (q @ k.mT / math.sqrt(c.head_dim)).masked_fill(hidden, -math.inf).softmax(-1)
        if layer == 0:
            looked_at = p[:, -1].mean(0).masked_fill(prompt.ids != c.image_token, 1)
            hidden[:, looked_at.argsort()[:gone]] = True
            hidden.fill_diagonal_(False)                   # every position sees itself
        return p @ v

    cache = KVCache(make_plan(Method("full"), c.layers, c.kv_heads, T))
    expected = ours.logits(ours.hidden_states(prompt, hide)[-1])
    assert (fastv.prefill(ours, prompt, cache, 1, left) - expected).abs().max() < 1e-4
    method = Method(budget=60, head_scores=torch.eye(c.layers * c.heads)[-1].view(c.layers, -1))
    kept = torch.tensor(fastv.generate(ours, *asked, 1, 0.5, method, 4)["kept"])          # (L, G)
    assert kept.sum() == 60 * kept.numel() and kept[1:].max() == left
