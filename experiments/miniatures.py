"""Miniatures of the paper's seven benchmarks: a few rows each, in the fields of the public sets, on
pages rendered by pages.py. They try out the whole way from a file to a table, offline; a score on
them says nothing about the real sets, whose names their folders carry with "-miniature" behind.

    DIR/docvqa-miniature/docvqa-miniature.jsonl, 0.png, 1.png, ...

The questions are "What is the <Key>?", which the small model in tiny/ knows; captions, options and
the benchmarks' instructions behind the question may be new to it.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.pages import render_page


def page_with_questions(rng, kind, at_least=1):
    """A page of 256 x 256 pixels that answers so many questions, and these in random order."""
    while True:
        page = render_page(rng, kind, 256, 256)
        if len(page.questions) >= at_least:
            return page, rng.sample(page.questions, len(page.questions))


def people(rng, value, others):
    """Ten people's answers: most alike, some in another spelling, up to four other ones."""
    wrong = rng.randint(0, 4) if others else 0
    answers = ([rng.choice((value, value, value, f"{value.lower()}.")) for _ in range(10 - wrong)]
               + [rng.choice(others) for _ in range(wrong)])
    return rng.sample(answers, 10)


def docvqa_rows(rng, i, name):
    page, [(key, value), *_] = page_with_questions(rng, rng.choice(("form", "receipt")))
    return page, [dict(questionId=str(i), question=f"What is the {key}?", image=name,
                       answers=[value])]


def ocrbench_rows(rng, i, name):
    page, [(key, value), *_] = page_with_questions(rng, "receipt")
    return page, [dict(image=name, question=f"What is the {key}?", answer=[value],
                       question_type="Key Information Extraction", dataset="miniature")]


def textvqa_rows(rng, i, name):
    page, [(key, value), *rest] = page_with_questions(rng, rng.choice(("label", "receipt")))
    return page, [dict(image=name, question=f"what is the {key}?", question_id=i,
                       answers=people(rng, value, [v for _, v in rest]))]


def chartqa_rows(rng, i, name):
    page, [(key, value), *_] = page_with_questions(rng, "table")
    return page, [dict(image=name, question=f"What is the {key}?", answer=value,
                       type=("human_test", "augmented_test")[i % 2])]


def textcaps_rows(rng, i, name):
    page, [(key, value), *_] = page_with_questions(rng, "receipt")
    first = " ".join(word.text for word in page.lines[0])
    return page, [dict(image=name, image_id=str(i), caption_str=[
        f"A receipt that begins with {first}.", f"A receipt with the {key} {value}.",
        f"On a receipt the {key} is {value}.", f"{first} is written on a receipt.",
        f"A piece of paper says {first} and {key} {value}."])]


def mmbench_rows(rng, i, name):
    """One question with four options, which its four rows rotate."""
    page, [(key, value), *rest] = page_with_questions(rng, "receipt", at_least=3)
    others = list(dict.fromkeys(v for _, v in rest if v != value))[:3]
    texts = [value] + others
    rows = []
    for turn in range(len(texts)):
        turned = texts[turn:] + texts[:turn]
        rows.append(dict(index=i + turn * 1_000_000, question=f"What is the {key}?",
                         hint="The picture shows a receipt." if i % 2 else "nan",
                         **dict(zip("ABCDE", turned + ["nan"] * 5)),
                         answer="ABCD"[turned.index(value)], image=name))
    return page, rows


def vqav2_rows(rng, i, name):
    page, [(key, value), *rest] = page_with_questions(rng, "form")
    answers = people(rng, value, [v for _, v in rest])
    return page, [dict(image=name, question=f"What is the {key}?", question_id=i, answers=[
        dict(answer=answer, answer_id=number) for number, answer in enumerate(answers, 1)])]


ROWS = {"docvqa": docvqa_rows, "ocrbench": ocrbench_rows, "textvqa": textvqa_rows,
        "chartqa": chartqa_rows, "textcaps": textcaps_rows, "mmbench": mmbench_rows,
        "vqav2": vqav2_rows}


def make_miniature(task, folder, num, seed=0):
    """Writes `num` questions of a task, with their images, into folder/TASK-miniature. Returns the
    path of the rows."""
    folder = Path(folder) / f"{task}-miniature"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num):
        page, new = ROWS[task](random.Random(f"miniature {task} {seed} {i}"), i, f"{i}.png")
        page.image.save(folder / f"{i}.png")
        rows += new
    rows.sort(key=lambda row: row.get("index", 0))      # as in MMBench: unrotated ones come first
    path = folder / f"{folder.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_miniatures(folder, num, seed=0):
    """All seven; prints the command that evaluates each."""
    for task in ROWS:
        try:
            path = make_miniature(task, folder, num, seed)
        except OSError as error:
            raise ValueError(f"--make-miniature {folder}: cannot be written "
                             f"({error.strerror})") from None
        print(f"python experiments/evaluate.py --task {task} --data {path}")
