"""How well a small model reads, by task, kind and size of page, on pages that are new to it.

    python experiments/evaluate_tiny.py [--model DIR] [--num 50] [--kinds form] [--sizes 256x256]

For transcripts it prints the mean character accuracy (1 - edit distance / length, not below 0), for
every other task (pages.WORDINGS) the share of exact answers to one question a page. The cache is
full. A page is prefilled once, and one pass with teacher forcing tells whether an answer is exact:
it is if each token of the right answer is the likeliest after those before it.
"""

import random
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.compress import forced_logits, prefill
from experiments.metrics import edit_distance
from experiments.pages import KINDS, WORDINGS, prompt, render_page, tasks
from experiments.report import machine_name, rows_of
from model_llava import load, prepare
from sparsemm import OneLineParser, add_model_arguments, check_output, generate, write_json


class Page:
    """A page that is prefilled once for all its questions."""

    def __init__(self, model, image):
        self.model, self.image, asked = model, image, prepare(model, [image], "?")
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
        written = generate(self.model, [self.image], text, max_new_tokens=len(right) + 32)["text"]
        return max(0.0, 1 - edit_distance(written, right) / len(right))


def evaluate(model, kind, width, height, num, seed, transcripts):
    """Of every task the mean score, and how many of num pages of a kind and size have it. Only the
    first `transcripts` pages (None: all) are transcribed."""
    scores = {task: [] for task in WORDINGS}
    for i in tqdm(range(num), desc=f"{kind} {width} x {height}", leave=False):
        rng = random.Random(f"evaluation {seed} {kind} {width, height} {i}")
        page = render_page(rng, kind, width, height)
        read = Page(model, page.image)
        for task in WORDINGS:
            entries = [entry for entry in tasks(page) if entry[0] == task]
            if entries and (task != "transcript" or i in range(num)[:transcripts]):
                _, about, right = rng.choice(entries)
                judge = read.transcribed if task == "transcript" else read.is_answered
                scores[task].append(float(judge(prompt(task, about), right)))
    means = {task: dict(pages=len(of_task), mean=sum(of_task) / len(of_task) if of_task else None)
             for task, of_task in scores.items()}
    return dict(kind=kind, width=width, height=height, image_tokens=read.image_tokens, tasks=means)


def table(results):
    """Markdown: a row for each kind and size."""
    head = ["page", "pixels", "image tokens", "transcript, characters",
            *(f"{task}, exact" for task in WORDINGS if task != "transcript")]
    rows = [[r["kind"], f"{r['width']} x {r['height']}", str(r["image_tokens"]),
             *("-" if of["mean"] is None else f"{of['mean']:.3f}" for of in r["tasks"].values())]
            for r in results]
    return "\n".join(rows_of(head, rows))


def work(args):
    model = load(args.model, args.device, args.dtype)
    out = model.folder / "evaluation.json" if args.out is None else args.out
    check_output(out, "--out")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    results = [evaluate(model, kind, width, height, args.num, args.seed, args.transcripts)
               for kind in args.kinds for width, height in sizes]
    print(table(results))
    write_json(dict(command=shlex.join(["python", "experiments/evaluate_tiny.py", *sys.argv[1:]]),
                    machine=machine_name(model.device), torch=torch.__version__,
                    transformers=transformers.__version__, seed=args.seed, results=results), out)


def main(argv=None):
    parser = OneLineParser(prog="evaluate_tiny.py", description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=50, help="pages of each kind and size")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "256x384"], metavar="WxH")
    parser.add_argument("--transcripts", type=int, metavar="N",
                        help="pages to transcribe, which takes most of the time (default: all)")
    parser.add_argument("--out", help="default: evaluation.json in the model's folder")
    add_model_arguments(parser)
    parser.run(work, argv)


if __name__ == "__main__":
    main()
