"""How fast? Measured on this machine, next to what others do and to what the machine allows.

    python experiments/bench.py scoring [--model DIR ...] [--num 10]      images/s of score_heads.py

`scoring` compares score_heads.py with the procedure of the authors' code, in transformers: eager
attention that returns its maps, one forward pass for every token of the transcript. Both count the
same hits, which is checked. The transcript is the page's text (truth) or the model's own (model).

Times are medians over pages, both sides in turn in one process. Results go to --out as JSON.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.pages import render_page
from model_llava import load, prepare
from score_heads import OCR_PROMPT, align_tokens, score_page, tokens_in_box, transcribe, write_json
from sparsemm import DEFAULT_MODEL

MACHINE = f"{platform.machine()}, {torch.get_num_threads()} threads"


# ---- scoring -------------------------------------------------------------------------------------

class Force(LogitsProcessor):
    """Makes generate write given tokens, one a step."""

    def __init__(self, ids, start):
        self.ids, self.start = ids, start

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0
        return forced


@torch.no_grad()
def score_step_by_step(reference, ours, image, words, ids=None):
    """Visual scores (L, H) of one page from attention maps: transformers' generate returns those of
    the prompt (T x T) and of every token after it. ids: the transcript, None for the model's own.
    Returns scores and the transcript's tokens."""
    prompt = prepare(ours, [image], OCR_PROMPT)
    T, ends = len(prompt.ids), ours.processor.end_tokens
    inputs = dict(ours.processor.image_processor(image, return_tensors="pt"))
    if ours.config.family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (prompt.ids == ours.config.image_token).int()[None]
    steps = 1024 if ids is None else len(ids)
    out = reference.generate(
        input_ids=prompt.ids[None], **inputs, do_sample=False, max_new_tokens=steps,
        eos_token_id=sorted(ends), pad_token_id=0, output_attentions=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([] if ids is None else [Force(ids, T)]))
    written = [i for i in out.sequences[0, T:].tolist() if i not in ends]
    pieces = [ours.processor.tokenizer.decode([i], skip_special_tokens=True) for i in written]
    scores = torch.zeros(ours.config.layers, ours.config.heads, dtype=torch.float64)
    regions = [tokens_in_box(prompt.images[0], box) + prompt.starts[0] for _, box in words]
    for i, word in enumerate(align_tokens(pieces, [text for text, _ in words])):
        if word is None or len(regions[word]) == 0:
            continue
        for l, maps in enumerate(out.attentions[i]):                             # (1, H, rows, keys)
            hit = torch.isin(maps[0, :, -1].argmax(-1), regions[word])
            scores[l] += hit / len(regions[word])
    return scores, written


def bench_scoring(folder, num, seed):
    """Seconds a page of both procedures with both transcripts, on receipts of 256 x 384."""
    ours = load(folder, "cpu", "float32")
    kind = (transformers.Qwen2VLForConditionalGeneration if ours.config.family == "qwen2_vl"
            else transformers.LlavaNextForConditionalGeneration)
    reference = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer, seconds = ours.processor.tokenizer, {}
    tokens = 0
    for i in tqdm(range(num + 1), desc=Path(folder).name):
        page = render_page(random.Random(f"bench {seed} {i}"), "receipt", 256, 384)
        words = [(word.text, word.box) for line in page.lines for word in line]
        for whose in ("truth", "model"):
            start = time.perf_counter()
            ids = transcribe(ours, page.image, page.text, whose)
            scores, *_ = score_page(ours, page.image, words, ids)
            middle = time.perf_counter()
            truth = tokenizer(page.text, add_special_tokens=False).input_ids
            expected, written = score_step_by_step(reference, ours, page.image, words,
                                                   truth if whose == "truth" else None)
            end = time.perf_counter()
            assert written == ids and torch.allclose(scores, expected), (i, whose)
            if i > 0:                                                        # the first one warms up
                tokens += len(ids)
                for side, taken in (("ours", middle - start), ("step by step", end - middle)):
                    seconds.setdefault((whose, side), []).append(taken)
    medians = {key: statistics.median(taken) for key, taken in seconds.items()}
    rows = [dict(transcript=whose, images_per_second=1 / medians[whose, "ours"],
                 step_by_step_images_per_second=1 / medians[whose, "step by step"],
                 times_faster=medians[whose, "step by step"] / medians[whose, "ours"])
            for whose in ("truth", "model")]
    return dict(model=Path(folder).name, pages=num, tokens=tokens / (2 * num), rows=rows)


def scoring_table(results):
    lines = ["| model | transcript | score_heads.py, images/s | step by step, images/s | ratio |",
             "|---|---|---|---|---|"]
    for result in results:
        for row in result["rows"]:
            lines.append(f"| {result['model']} | {row['transcript']} "
                         f"| {row['images_per_second']:.2f} "
                         f"| {row['step_by_step_images_per_second']:.2f} "
                         f"| {row['times_faster']:.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scoring"])
    parser.add_argument("--model", nargs="+", help="default: the small models in tiny/")
    parser.add_argument("--num", type=int, default=10, help="pages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="default: results/bench-PART.json beside this file")
    args = parser.parse_args()
    models = args.model or sorted(map(str, DEFAULT_MODEL.parent.glob("*/")))
    results = [bench_scoring(folder, args.num, args.seed) for folder in models]
    print(scoring_table(results))
    out = Path(args.out or Path(__file__).parent / "results" / f"bench-{args.part}.json")
    out.parent.mkdir(exist_ok=True)
    write_json(dict(command="python experiments/bench.py " + " ".join(sys.argv[1:]),
                    machine=MACHINE, cores=os.cpu_count(), torch=torch.__version__,
                    transformers=transformers.__version__, seed=args.seed, results=results), out)


if __name__ == "__main__":
    main()
