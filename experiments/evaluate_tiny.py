"""How well a small model reads: exact answers and transcripts on pages that training never drew.

    python experiments/evaluate_tiny.py [--model tiny/qwen2-vl] [--num 50] [--out FILE.json]

For each kind and size of page it prints the share of questions that are answered exactly, one
question a page, and the mean character accuracy (1 - edit distance / length, not below 0) of the
transcript. The cache is full.
"""

import argparse
import os
import platform
import random
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.pages import KINDS, render_page
from model_llava import load
from score_heads import OCR_PROMPT, write_json
from sparsemm import DEFAULT_MODEL, generate

SIZES = ((256, 128), (256, 256), (256, 384))


def edit_distance(a, b):
    """Insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def evaluate(model, kind, size, num, seed):
    """Mean results on num pages of a kind and size (width, height)."""
    exact, asked, accuracy, image_tokens = 0, 0, 0.0, 0
    for i in tqdm(range(num), desc=f"{kind} {size[0]} x {size[1]}", leave=False):
        rng = random.Random(f"evaluation {seed} {kind} {size} {i}")
        page = render_page(rng, kind, *size)
        read = generate(model, [page.image], OCR_PROMPT, "full", max_new_tokens=768)
        accuracy += max(0, 1 - edit_distance(read["text"], page.text) / len(page.text)) / num
        image_tokens = read["image_tokens"]
        if page.questions:
            key, value = rng.choice(page.questions)
            answer = generate(model, [page.image], f"What is the {key}?", "full")["text"]
            asked, exact = asked + 1, exact + (answer == value)
    return dict(kind=kind, width=size[0], height=size[1], image_tokens=image_tokens, pages=num,
                questions=asked, exact=exact / asked if asked else None, characters=accuracy)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--num", type=int, default=50, help="pages of each kind and size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="default: evaluation.json in the model's folder")
    args = parser.parse_args()
    model = load(args.model, "auto", "float32")
    results = [evaluate(model, kind, size, args.num, args.seed) for kind in KINDS for size in SIZES]
    print(f"{'page':<8} {'pixels':>10} {'image tokens':>13} {'exact answers':>14} "
          f"{'characters':>11}")
    for r in results:
        exact = "-" if r["exact"] is None else f"{r['exact']:.2f}"
        print(f"{r['kind']:<8} {r['width']:>4} x {r['height']:<3} {r['image_tokens']:>13} "
              f"{exact:>14} {r['characters']:>11.3f}")
    about = dict(command=f"python experiments/evaluate_tiny.py --num {args.num} --seed {args.seed}",
                 machine=f"{platform.machine()}, {os.cpu_count()} cores", torch=torch.__version__,
                 transformers=transformers.__version__, seed=args.seed, results=results)
    write_json(about, Path(args.out or model.folder / "evaluation.json"))


if __name__ == "__main__":
    main()
