"""The paper's seven benchmarks on your own checkpoint and data.

    python experiments/evaluate.py --task docvqa --data validation.jsonl --images images/
        --model llava-hf/llava-v1.6-mistral-7b-hf --methods full,sparsemm,snapkv --budgets 64,256
    torchrun --nproc-per-node 8 -- experiments/evaluate.py ...      shares the rows among 8 GPUs

--data has rows with the fields of the public set, as JSONL or as a JSON list. `image` names a file
in the folder --images. Each row, method and budget is one run of sparsemm.generate; full has no
budget and runs once. TASKS holds the prompts and lengths, metrics.py the metrics. The folder --out:

    scores.jsonl              predictions, answers and scores, in the order of the rows
    table.json                the table that is printed
    scores.jsonl.journal0     a line for each prediction, written at once (journal1: process 1)

After a kill the same command goes on, and with further methods or budgets it runs only these.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from zlib import crc32

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, Method, reading
from experiments.metrics import (anls, choose, cider, circular, contains, relaxed_match,
                                 vqa_accuracy)
from model_llava import load, open_image
from score_heads import Journal, fingerprint, gather, process_and_processes
from sparsemm import (SCORES_FILE, OneLineParser, add_model_arguments, find_head_scores, generate,
                      out_of_memory, write_file, write_json)


# ---- the seven benchmarks ------------------------------------------------------------------------

@dataclass
class Example:
    """A row that can be asked."""
    number: int                 # of the row in the file, from 0
    image: Path
    prompt: str
    answers: list               # of texts
    row: dict


def each(metric):
    """A judge: metric(prediction, example) of every example, and the mean."""
    def judge(examples, predictions):
        scores = [metric(p, example) for p, example in zip(predictions, examples)]
        return scores, dict(score=fmean(scores), n=len(scores))
    return judge


def judge_chartqa(examples, predictions):
    """Besides the mean: those of the questions written by people and by a program."""
    scores, totals = each(lambda p, e: relaxed_match(p, e.answers[0]))(examples, predictions)
    for part in ("human", "augmented"):
        of_part = [s for s, e in zip(scores, examples) if e.row.get("type") == f"{part}_test"]
        totals[part] = fmean(of_part) if of_part else None
    return scores, totals


def judge_mmbench(examples, predictions):
    """A question counts if every rotation is answered correctly; n counts questions. unparsed:
    the share of the rows whose prediction names no option, or several."""
    chosen = [choose(p, options(e.row)) for p, e in zip(predictions, examples)]
    scores = [float(letter == e.answers[0]) for letter, e in zip(chosen, examples)]
    questions = circular([e.row["index"] for e in examples], scores)
    return scores, dict(score=fmean(questions.values()), n=len(questions),
                        unparsed=chosen.count(None) / len(chosen))


def judge_textcaps(examples, predictions):
    scores = cider(predictions, [e.answers for e in examples])
    return scores, dict(score=fmean(scores), n=len(scores))


def is_given(value):
    """Whether a field has a value. Tables write an empty one as null, NaN, "nan" or ""."""
    return str(value).strip().lower() not in ("none", "nan", "")


def options(row):
    """MMBench's options: {"A": text, ...}."""
    return {letter: str(row[letter]) for letter in "ABCDE" if is_given(row.get(letter))}


def ask_mmbench(row):
    """[hint ]question There are several options: ..."""
    hint = f"{row['hint']} " if is_given(row.get("hint")) else ""
    listed = "\n".join(f"{letter}. {text}" for letter, text in options(row).items())
    return f"{hint}{row['question']} There are several options:\n{listed}"


@dataclass
class Task:
    """One benchmark."""
    metric: str
    judge: Callable             # (examples, predictions) -> scores, {"score": ..., "n": ..., ...}
    max_new_tokens: int
    suffix: str                 # of the prompt
    answers: str = "answers"    # the field with the right answers
    listed: bool = True         # whether these are a list
    ask: Callable = lambda row: row["question"]


SHORT = "\nAnswer the question using a single word or phrase."
soft_accuracy = each(lambda p, e: vqa_accuracy(p, e.answers))
TASKS = {
    "docvqa": Task("ANLS", each(lambda p, e: anls(p, e.answers)), 32, SHORT),
    "ocrbench": Task("containment", each(
        lambda p, e: contains(p, e.answers, e.row.get("dataset") == "HME100k")), 128, "", "answer",
        ask=lambda row: row["question"].strip()),
    "textvqa": Task("VQA accuracy", soft_accuracy, 32, SHORT,
                    ask=lambda row: row["question"].capitalize()),
    "chartqa": Task("relaxed accuracy", judge_chartqa, 16,
                    "\nAnswer the question with a single word.", "answer", listed=False),
    "textcaps": Task("CIDEr", judge_textcaps, 64,
                     "Provide a one-sentence caption for the provided image.", "caption_str",
                     ask=lambda row: ""),
    "mmbench": Task("circular accuracy", judge_mmbench, 1024,
                    "\n\nAnswer with the option's letter from the given choices directly.",
                    "answer", listed=False, ask=ask_mmbench),
    "vqav2": Task("VQA accuracy", soft_accuracy, 16, SHORT),
}


# ---- the data ------------------------------------------------------------------------------------

def read_rows(path):
    """The rows of a JSONL file, or of a list in a JSON file."""
    with reading(f"--data {path}"):
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)


def read_example(task, row, number, images):
    """Row `number` of the data as an Example. Raises ValueError that says what is wrong with it."""
    t = TASKS[task]
    with reading(f"row {number}"):
        found = row[t.answers] if t.listed else [row[t.answers]]
        if not isinstance(found, list) or not found:
            raise ValueError(f"{t.answers!r} must be a list of texts")
        answers = [str(entry["answer"] if isinstance(entry, dict) else entry) for entry in found]
        if task == "mmbench" and not (answers[0] in options(row) and "index" in row):
            raise ValueError("'answer' must name an option, and 'index' must be given")
        if not (images / row["image"]).is_file():
            raise ValueError(f"{images / row['image']}: no such file")
        return Example(number, images / row["image"], t.ask(row) + t.suffix, answers, row)


def read_examples(task, rows, images, limit):
    """The examples of the first `limit` questions (None: all), {row number: what is wrong}, and the
    question of every row: rows of one question, MMBench's rotations, are judged together."""
    examples, errors = [], {}
    questions = [row.get("index", number) % 1_000_000 if task == "mmbench" else number
                 for number, row in enumerate(rows)]
    wanted = set(list(dict.fromkeys(questions))[:limit])
    for number, row in enumerate(rows):
        if questions[number] in wanted:
            try:
                examples.append(read_example(task, row, number, images))
            except ValueError as error:
                errors[number] = str(error)
    return examples, errors, questions


def check_any(args, examples, errors):
    if not examples:
        raise ValueError(f"--data {args.data}: must have rows of --task {args.task}"
                         f"{'; ' * bool(errors)}{' '.join(errors[:1])}")


# ---- predictions and scores ----------------------------------------------------------------------

def predict(model, examples, runs, max_new_tokens, journal, quiet):
    """Answers the examples under all runs, {name: Method}, and adds to the journal what it does not
    have yet. Returns {row number: why it has no answer}."""
    errors = {}
    for example in tqdm(examples, unit="row", disable=quiet):
        try:
            for run, method in runs.items():
                key = f"{example.number} {run}"
                if key not in journal.done:
                    image = open_image(example.image)
                    r = generate(model, [image], example.prompt, method, max_new_tokens)
                    journal.add(key, dict(
                        prediction=r["text"], kept_entries=sum(map(sum, r["kept"])),
                        full_entries=sum(map(len, r["kept"])) * r["prompt_tokens"]))
        except (ValueError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ValueError) or out_of_memory(error)):
                raise
            reason = "too little memory" if out_of_memory(error) else str(error)
            errors[example.number] = f"row {example.number}: {reason}"
    return errors


def judge_runs(task, examples, runs, done):
    """The lines of scores.jsonl, and the rows of the table."""
    lines, results = [], []
    for run, method in runs.items():
        what = dict(method=method.name, budget=None if method.name == "full" else method.budget)
        made = [done[f"{e.number} {run}"] for e in examples]
        scores, totals = TASKS[task].judge(examples, [line["prediction"] for line in made])
        kept, full = (fmean(line[f"{part}_entries"] for line in made) for part in ("kept", "full"))
        results.append(dict(what, **totals, kept_entries=kept, share_kept=kept / full))
        lines += [dict(row=e.number, **what, **line, image=e.row["image"], prompt=e.prompt,
                       answers=e.answers, score=score)
                  for line, e, score in zip(made, examples, scores)]
    return sorted(lines, key=lambda line: line["row"]), results


def table(metric, results):
    """Text: a line for each method and budget."""
    extra = [key for key in results[0] if key in ("human", "augmented", "unparsed")]
    head = ["method", "budget", metric, *extra, "kept entries", "of full", "n"]
    rows = [[r["method"], "-" if r["budget"] is None else str(r["budget"]), f"{r['score']:.3f}",
             *("-" if r[key] is None else f"{r[key]:.3f}" for key in extra),
             f"{r['kept_entries']:,.0f}", f"{r['share_kept']:.1%}", str(r["n"])] for r in results]
    widths = [6, max(8, len(metric)), *[9 for _ in extra], 12, 7, 6]
    return "\n".join("  ".join([name.ljust(9), *map(str.rjust, cells, widths)])
                     for name, *cells in [head, *rows])


# ---- the command ---------------------------------------------------------------------------------

def evaluate(args):
    """What the command does: every process answers its share of the rows, process 0 judges all."""
    with reading("--methods, --budgets"):       # refused before the model is loaded; scores follow
        methods = [Method(name, int(budget), head_scores=(), seed=args.seed)
                   for name in args.methods.split(",") for budget in args.budgets.split(",")]
    images, limit = args.images or Path(args.data).parent, TASKS[args.task].max_new_tokens
    examples, errors, questions = read_examples(args.task, read_rows(args.data), images, args.limit)
    check_any(args, examples, [*errors.values()])
    process, processes = process_and_processes(args)
    model = load(args.model, args.device, args.dtype)
    scores = find_head_scores(model, args.scores)
    runs = {m.name if m.name == "full" else f"{m.name} {m.budget}": replace(m, head_scores=scores)
            for m in methods}
    out = args.out or Path(__file__).parent / "work" / args.task
    out.mkdir(parents=True, exist_ok=True)
    settings = dict(task=args.task, data=crc32(Path(args.data).read_bytes()), model=model.name,
                    weights=fingerprint(model), dtype=str(model.dtype), seed=args.seed,
                    scores=None if scores is None else crc32(scores.numpy().tobytes()))
    journal, done = Journal(out / "scores.jsonl", settings, process), {}
    errors |= predict(model, examples[process::processes], runs, limit, journal, process > 0)
    for done_by_one, errors_of_one in gather((journal.done, errors)):
        done, errors = done | done_by_one, errors | errors_of_one
    if process > 0:
        return
    broken, skipped = {questions[n] for n in errors}, [errors[n] for n in sorted(errors)]
    examples = [example for example in examples if questions[example.number] not in broken]
    check_any(args, examples, skipped)
    lines, results = judge_runs(args.task, examples, runs, done)
    write_file(out / "scores.jsonl",
               "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    metric = TASKS[args.task].metric
    write_json(dict(settings, metric=metric, skipped=skipped, results=results), out / "table.json")
    print(*(f"skipped {text}" for text in skipped[:10]),
          f"{args.task}, {model.name}: {len(examples)} rows, {len(skipped)} skipped; wrote "
          f"{out / 'scores.jsonl'} and table.json", table(metric, results), sep="\n")


def main(argv=None):
    parser = OneLineParser(prog="evaluate.py", description="The paper's seven benchmarks.")
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), required=True, help="which fields, prompt and metric")
    add("--data", required=True, metavar="FILE", help="rows: .jsonl, or JSON with a list")
    add("--images", type=Path, metavar="DIR", help="default: the folder of the data")
    add("--methods", default="full,sparsemm", help=f"with commas: {','.join(METHODS)}")
    add("--budgets", default="256", help="cache entries per KV head on average, with commas")
    add("--limit", type=int, metavar="N", help="the first N questions (MMBench: all rotations)")
    add("--out", type=Path, metavar="DIR", help="default: experiments/work/TASK")
    add("--scores", metavar="FILE", help=f"default: {SCORES_FILE} in the model's folder")
    add_model_arguments(parser)
    parser.run(evaluate, argv)


if __name__ == "__main__":
    main()
