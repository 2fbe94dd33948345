"""How well a small model reads, by task, kind and size of page, on pages that training never drew.

    python experiments/evaluate_tiny.py [--model tiny/qwen2-vl] [--num 50] [--kinds form receipt]
                                        [--sizes 256x256 256x384] [--fonts DIR]
                                        [--out FILE.json]

For each kind and size of page it prints the mean character accuracy (1 - edit distance / length,
not below 0) of the transcript and, for every other task (pages.WORDINGS), the share of exact
answers, one question a page and task. The cache is full. A page is read once for all questions
about it. Whether an answer is exact takes a single pass over the right one, token by token forced:
the model writes it by itself if and only if each of its tokens is the likeliest after those before.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import OneLineParser
from experiments.arguments import as_typed, font_files, whole_number
from experiments.compress import forced_logits, prefill
from experiments.pages import KINDS, WORDINGS, prompt, tasks
from experiments.progress import machine_name
from experiments.wild_pages import render_mixed_page
from model_llava import load, prepare
from sparsemm import DEFAULT_MODEL, check_output, generate, write_json

QUESTIONS = [task for task in WORDINGS if task != "transcript"]


def edit_distance(a, b):
    """Insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def page_size(text):
    """An argparse type: "256x384" -> (256, 384)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) >= 32 and int(height) >= 32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and a height in pixels, of at "
                                         "least 32, as 256x384 is")
    return int(width), int(height)


class Page:
    """A page that is read once for all questions about it."""

    def __init__(self, model, image):
        self.model, self.image, asked = model, image, prepare(model, [image], "")
        self.image_tokens = asked.image_tokens
        self.end = asked.starts[0] + asked.image_tokens     # all prompts begin with the same tokens
        self.read = prefill(model, replace(asked, ids=asked.ids[:self.end],
                                           positions=asked.positions[:, :self.end]))

    def is_answered(self, text, right):
        """Whether the model answers a question with exactly the right answer."""
        c, processor = self.model.config, self.model.processor
        asked = processor.token_ids(1, text)
        asked = asked[asked.index(c.image_token) + 1:]
        answer = processor.tokenizer(right, add_special_tokens=False).input_ids
        keep = torch.ones(1, c.layers, c.kv_heads, self.end, dtype=torch.bool)
        logits = forced_logits(self.read, keep, asked + answer)[0, len(asked) - 1:]
        *written, end = logits.argmax(-1).tolist()
        return written == answer and end in processor.end_tokens

    def transcribed(self, text, right):
        """The character accuracy of what the model writes."""
        if self.is_answered(text, right):
            return 1.0
        written = generate(self.model, [self.image], text, "full",
                           max_new_tokens=len(right) + 32)["text"]
        return max(0.0, 1 - edit_distance(written, right) / len(right))


def evaluate(model, kind, size, num, seed, transcripts, fonts=(None,), wild=0):
    """Results on num pages of a kind and size (width, height), of which the first `transcripts` are
    transcribed, too: of each task the number of pages that have it and the mean score. fonts,
    wild: as render_mixed_page takes them."""
    scores, image_tokens = {task: [] for task in WORDINGS}, 0
    for i in tqdm(range(num), desc=f"{kind} {size[0]} x {size[1]}", leave=False):
        rng = random.Random(f"evaluation {seed} {kind} {size} {i}")
        page = render_mixed_page(rng, kind, *size, wild, fonts=fonts)
        possible, chosen = tasks(page), []
        for task in WORDINGS:
            entries = [entry for entry in possible if entry[0] == task]
            if entries and (task != "transcript" or i < transcripts):
                chosen.append(rng.choice(entries))
        if not chosen:
            continue
        read = Page(model, page.image)
        image_tokens = read.image_tokens
        for task, about, right in chosen:
            judge = read.transcribed if task == "transcript" else read.is_answered
            scores[task].append(float(judge(prompt(None, task, about), right)))
    means = {task: dict(pages=len(of_task), mean=sum(of_task) / len(of_task) if of_task else None)
             for task, of_task in scores.items()}
    return dict(kind=kind, width=size[0], height=size[1], image_tokens=image_tokens, tasks=means)


def table(results):
    """Markdown: a row for each kind and size."""
    lines = ["| page | pixels | image tokens | transcript, characters | "
             + " | ".join(f"{task}, exact" for task in QUESTIONS) + " |",
             "|---" * (4 + len(QUESTIONS)) + "|"]
    for r in results:
        means = (r["tasks"][task]["mean"] for task in ["transcript", *QUESTIONS])
        cells = " | ".join("-" if mean is None else f"{mean:.3f}" for mean in means)
        where = f"{r['kind']} | {r['width']} x {r['height']} | {r['image_tokens']}"
        lines.append(f"| {where} | {cells} |")
    return "\n".join(lines)


def main(argv=None):
    parser = OneLineParser(prog="evaluate_tiny.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--num", type=whole_number(1), default=50,
                        help="pages of each kind and size")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sizes", nargs="+", type=page_size, default=[(256, 256), (256, 384)],
                        metavar="WxH", help="in pixels (default 256x256 256x384)")
    parser.add_argument("--transcripts", type=whole_number(0), metavar="N",
                        help="how many of the pages are transcribed, which takes most of the time "
                             "(default: all)")
    parser.add_argument("--fonts", type=font_files, default=[None], metavar="DIR",
                        help="TrueType files to draw the pages with, instead of the built-in font")
    parser.add_argument("--wild", action="store_true",
                        help="pages that look like other people's (wild_pages.py); no shapes")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--out", metavar="FILE",
                        help="default: in the model's folder, evaluation.json, with --fonts "
                             "evaluation-fonts.json, with --wild evaluation-wild.json")
    args = parser.parse_args(argv)
    transcripts = args.num if args.transcripts is None else args.transcripts
    try:
        if args.out:
            check_output(args.out, "--out")
        model = load(args.model, "auto", "float32")
    except ValueError as error:
        parser.error(error)
    if args.wild:
        args.kinds = [kind for kind in args.kinds if kind != "shapes"]
    results = [evaluate(model, kind, size, args.num, args.seed, transcripts, args.fonts, args.wild)
               for kind in args.kinds for size in args.sizes]
    print(table(results))
    fonts = [Path(file).name for file in args.fonts if file]
    sizes = " ".join(f"{width}x{height}" for width, height in args.sizes)
    about = dict(command=f"python experiments/evaluate_tiny.py --model {as_typed(args.model)} "
                         f"--num {args.num} --transcripts {transcripts} --seed {args.seed} "
                         f"--kinds {' '.join(args.kinds)} --sizes {sizes}"
                         + " --fonts DIR" * bool(fonts) + " --wild" * args.wild,
                 fonts=fonts or ["Pillow's built-in"],
                 machine=machine_name(model.device),
                 torch=torch.__version__, transformers=transformers.__version__, seed=args.seed,
                 results=results)
    name = f"evaluation{'-fonts' * bool(fonts)}{'-wild' * args.wild}.json"
    write_json(about, args.out or model.folder / name)


if __name__ == "__main__":
    main()
