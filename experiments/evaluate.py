"""The paper's seven benchmarks on your own checkpoint and data.

    python experiments/evaluate.py --task docvqa --data validation.jsonl --images images/
        --model llava-hf/llava-v1.6-mistral-7b-hf --methods full,sparsemm,snapkv --budgets 64,256
    torchrun --nproc-per-node 8 -- experiments/evaluate.py ...      shares the rows among 8 GPUs
    python experiments/evaluate.py --make-miniature DIR             renders seven small sets to try

The data: JSONL, or JSON with a list, of rows with the fields of the public set; `image` is the name
of a file in the folder --images. Each row, method and budget is one run of sparsemm.generate; full
has no budget and runs once. Prompts, lengths and metrics (metrics.py) are those in TASKS.

The folder --out holds what is done, so that the same command goes on after a kill:

    settings.json             what all of it was made with; a run with other settings is refused
    predictions-0.jsonl       a line for each run of process 0, written as soon as it is there
    scores.jsonl              at the end: predictions, answers and scores, in the order of the rows
    table.json                and the table that is printed
"""

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS, NEEDS_HEAD_SCORES, OneLineParser
from experiments.arguments import output_folder, share, whole_number
from experiments.metrics import (anls, choose, cider, circular, contains, relaxed_match,
                                 vqa_accuracy)
from experiments.miniatures import make_miniatures
from model_llava import load, open_image, weight_files
from score_heads import checksum, gather, process_and_processes
from sparsemm import (SCORES_FILE, add_model_arguments, find_head_scores, generate, write_file,
                      write_json)


# ---- the seven benchmarks ------------------------------------------------------------------------

@dataclass
class Example:
    """One row that can be asked."""
    number: int                 # its place in the file, from 0
    question: int               # rows with the same one are judged together (MMBench's rotations)
    image: Path
    prompt: str
    answers: list               # of texts
    row: dict


def each(metric):
    """A judge that takes the mean of metric(prediction, example)."""
    def judge(examples, predictions):
        scores = [metric(p, example) for p, example in zip(predictions, examples)]
        return scores, dict(score=fmean(scores), n=len(scores))
    return judge


def judge_chartqa(examples, predictions):
    """The mean of all, and those of the questions that people and that a program wrote."""
    scores, totals = each(lambda p, e: relaxed_match(p, e.answers[0]))(examples, predictions)
    for part in ("human", "augmented"):
        of_part = [s for s, e in zip(scores, examples) if e.row.get("type") == f"{part}_test"]
        totals[part] = fmean(of_part) if of_part else None
    return scores, totals


def judge_mmbench(examples, predictions):
    """A question counts if it is answered right under every rotation; n is the number of questions.
    unparsed: the share of the rows that name no option, or several."""
    chosen = [choose(p, options(e.row)) for p, e in zip(predictions, examples)]
    scores = [float(letter == e.answers[0]) for letter, e in zip(chosen, examples)]
    questions = circular([e.row["index"] for e in examples], scores)
    return scores, dict(score=fmean(questions.values()), n=len(questions),
                        unparsed=chosen.count(None) / len(chosen))


def judge_textcaps(examples, predictions):
    scores = cider(predictions, [e.answers for e in examples])
    return scores, dict(score=fmean(scores), n=len(scores))


def is_given(value):
    """Whether a field of a table has a value; an empty one comes as null, NaN, "nan" or ""."""
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
    answers: str = "answer"     # the field with the right answers
    name: str = None            # the field that names a row, if there is one
    ask: Callable = lambda row: row["question"]


SHORT = "\nAnswer the question using a single word or phrase."
soft_accuracy = each(lambda p, e: vqa_accuracy(p, e.answers))
TASKS = {
    "docvqa": Task("ANLS", each(lambda p, e: anls(p, e.answers)), 32, SHORT, "answers",
                   "questionId"),
    "ocrbench": Task("containment", each(
        lambda p, e: contains(p, e.answers, e.row.get("dataset") == "HME100k")), 128, "",
        ask=lambda row: row["question"].strip()),
    "textvqa": Task("VQA accuracy", soft_accuracy, 32, SHORT, "answers", "question_id",
                    lambda row: row["question"].capitalize()),
    "chartqa": Task("relaxed accuracy", judge_chartqa, 16,
                    "\nAnswer the question with a single word."),
    "textcaps": Task("CIDEr", judge_textcaps, 64,
                     "Provide a one-sentence caption for the provided image.", "caption_str",
                     "image_id", lambda row: ""),
    "mmbench": Task("circular accuracy", judge_mmbench, 1024,
                    "\n\nAnswer with the option's letter from the given choices directly.",
                    name="index", ask=ask_mmbench),
    "vqav2": Task("VQA accuracy", soft_accuracy, 16, SHORT, "answers", "question_id"),
}


# ---- the data ------------------------------------------------------------------------------------

def read_rows(path):
    """The rows of a JSONL file, or of a list in a JSON file. A line that is not JSON is None."""
    def row_of(line):
        try:
            return json.loads(line)
        except ValueError:
            return None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        rows = ([row_of(line) for line in text.split("\n") if line.strip()]
                if Path(path).suffix == ".jsonl" else json.loads(text))
    except OSError as error:
        raise ValueError(f"--data {path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ValueError(f"--data {path}: not JSON in UTF-8; for one row a line, the file's name "
                         "must end in .jsonl") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--data {path}: not a list of rows")
    return rows


def question_of(task, row, number):
    """What a row is judged together with: a number that rotations of one MMBench question share."""
    rotates = task == "mmbench" and isinstance(row, dict) and isinstance(row.get("index"), int)
    return row["index"] % 1_000_000 if rotates else number


def read_example(task, row, number, images):
    """Row `number` of the data as an Example. Raises ValueError that says what is wrong with it."""
    t = TASKS[task]
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for field in ("image", t.answers) + (() if task == "textcaps" else ("question",)):
        if field not in row:
            raise ValueError(f"no field {field!r}")
    for field in ("image", "question"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"{field!r} is not a text")
    found = row[t.answers] if isinstance(row[t.answers], list) else [row[t.answers]]
    found = [entry.get("answer") if isinstance(entry, dict) else entry for entry in found]
    if not found or not all(isinstance(answer, (str, int, float)) for answer in found):
        raise ValueError(f"{t.answers!r} is not a text or a list of texts")
    if task == "mmbench" and not isinstance(row.get("index"), int):
        raise ValueError("'index' is not a whole number")
    if task == "mmbench" and found[0] not in options(row):
        raise ValueError(f"answer {found[0]!r} is none of the options {', '.join(options(row))}")
    if not os.path.isfile(images / row["image"]):
        raise ValueError(f"{images / row['image']}: no such file")
    return Example(number, question_of(task, row, number), images / row["image"],
                   t.ask(row) + t.suffix, [str(answer) for answer in found], row)


def read_examples(task, rows, images, limit):
    """The examples of the first `limit` questions (None: all), and {row number: what is wrong}."""
    numbered = [(number, row, question_of(task, row, number)) for number, row in enumerate(rows)]
    wanted = set(list(dict.fromkeys(question for _, _, question in numbered))[:limit])
    examples, errors = [], {}
    for number, row, question in numbered:
        if question in wanted:
            try:
                examples.append(read_example(task, row, number, images))
            except ValueError as error:
                errors[number] = str(error)
    return examples, errors


def row_name(task, rows, number):
    """For messages: "row 3 (questionId 337)"."""
    field, row = TASKS[task].name, rows[number]
    named = field and isinstance(row, dict) and field in row
    return f"row {number} ({field} {row[field]})" if named else f"row {number}"


def check_any(args, rows, examples, errors):
    """Raises ValueError if no example is left."""
    if not examples:
        number, error = min(errors.items())
        raise ValueError(f"--data {args.data}: nothing in it can be asked as --task {args.task}; "
                         f"{row_name(args.task, rows, number)}: {error}")


# ---- predictions, and the folder that keeps them -------------------------------------------------

def check_settings(folder, settings, process):
    """Raises ValueError if the folder holds predictions made with other settings; a setting of None
    was not used. Process 0 writes the settings down."""
    path = folder / "settings.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise ValueError(f"--out {folder}: settings.json is not a file of ours") from None
    other = [key for key, value in settings.items()
             if None not in (before.get(key), value) and before[key] != value]
    if other:
        raise ValueError(f"--out {folder}: holds predictions made with another {', '.join(other)}; "
                         "another folder is right, or this one emptied")
    if process == 0:
        write_json(before | {key: value for key, value in settings.items() if value is not None},
                   path)


def whole_lines(path):
    """The bytes of a file up to its last newline: a kill may have cut the line after it."""
    content = path.read_bytes() if path.exists() else b""
    return content[:content.rfind(b"\n") + 1]


def read_predictions(folder):
    """{(row, method, budget): line} of all processes that wrote here before."""
    done = {}
    for path in sorted(folder.glob("predictions-*.jsonl")):
        for text in whole_lines(path).splitlines():
            try:
                line = json.loads(text)
                done[line["row"], line["method"], line["budget"]] = line
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"--out {folder}: {path.name} is not a file of ours") from None
    return done


def predict(examples, runs, answer, path, done, quiet):
    """Answers each example under each of the runs [(method, budget), ...] that is not done yet.

    answer: called with image, prompt, method and budget, as generate; path: file to which each
    prediction is appended at once. Returns the new predictions, as read_predictions does, and the
    errors {row number: text}.
    """
    new, errors = {}, {}
    path.touch()
    os.truncate(path, len(whole_lines(path)))
    with open(path, "a", encoding="utf-8") as file:
        for example in tqdm(examples, unit="row", disable=quiet):
            missing = [run for run in runs if (example.number, *run) not in done]
            try:
                image = open_image(example.image) if missing else None
                for method, budget in missing:
                    result = answer([image], example.prompt, method, budget)
                    kept, T = result["kept"], result["prompt_tokens"]
                    line = dict(row=example.number, method=method, budget=budget,
                                prediction=result["text"], kept_entries=sum(map(sum, kept)),
                                full_entries=len(kept) * len(kept[0]) * T)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    new[example.number, method, budget] = line
            except ValueError as error:
                errors[example.number] = str(error).removeprefix("--image ")
    return new, errors


# ---- scores --------------------------------------------------------------------------------------

def judge_runs(task, examples, runs, done):
    """The lines of scores.jsonl, and the rows of the table."""
    lines, results = [], []
    for method, budget in runs:
        made = [done[e.number, method, budget] for e in examples]
        scores, totals = TASKS[task].judge(examples, [line["prediction"] for line in made])
        kept, full = (fmean(line[f"{what}_entries"] for line in made) for what in ("kept", "full"))
        results.append(dict(method=method, budget=budget, **totals, kept_entries=kept,
                            share_kept=kept / full))
        lines += [dict(line, image=e.row["image"], prompt=e.prompt, answers=e.answers,
                       score=score) for line, e, score in zip(made, examples, scores)]
    return sorted(lines, key=lambda line: line["row"]), results


def table(metric, results):
    """Text: a line for each method and budget."""
    extra = [key for key in results[0] if key not in (
        "method", "budget", "score", "n", "kept_entries", "share_kept")]
    width = max(8, len(metric))
    lines = [f"{'method':<10} {'budget':>6}  {metric:>{width}}  "
             + "".join(f"{name:>9}  " for name in extra)
             + f"{'kept entries':>12}  {'of full':>7}  {'n':>6}"]
    for r in results:
        budget = "-" if r["budget"] is None else r["budget"]
        parts = "".join(f"{'-' if r[name] is None else format(r[name], '.3f'):>9}  "
                        for name in extra)
        lines.append(f"{r['method']:<10} {budget:>6}  {r['score']:>{width}.3f}  {parts}"
                     f"{r['kept_entries']:>12,.0f}  {r['share_kept']:>7.1%}  {r['n']:>6}")
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = OneLineParser(prog="evaluate.py", description="The paper's seven benchmarks.")
    parser.add_argument("--task", choices=tuple(TASKS), help="which fields, prompt and metric")
    parser.add_argument("--data", metavar="FILE", help="rows: JSONL, or JSON with a list")
    parser.add_argument("--images", metavar="DIR", help="default: the folder of the data")
    parser.add_argument("--methods", default="full,sparsemm", metavar="NAMES",
                        help=f"with commas between: {', '.join(METHODS)} (default %(default)s)")
    parser.add_argument("--budgets", default="256", metavar="NUMBERS",
                        help="cache entries per KV head on average, with commas between")
    parser.add_argument("--limit", type=whole_number(1), metavar="N",
                        help="the first N questions only (MMBench: with all their rotations)")
    parser.add_argument("--out", metavar="DIR", help="default: experiments/work/TASK")
    parser.add_argument("--window", type=whole_number(1), default=32, metavar="N")
    parser.add_argument("--rho", type=share, default=0.1)
    parser.add_argument("--no-redistribute", action="store_true",
                        help="lose what exceeds the prompt's length, as the authors' code does")
    parser.add_argument("--scores", metavar="FILE",
                        help=f"visual head scores (default: {SCORES_FILE} in the model's folder)")
    parser.add_argument("--make-miniature", metavar="DIR",
                        help="render a small set of our own for each task, and do nothing else")
    parser.add_argument("--num", type=whole_number(1), default=20,
                        help="questions in each of these (default 20)")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    for name in () if args.make_miniature else ("task", "data"):
        if getattr(args, name) is None:
            parser.error(f"argument --{name}: is required; {', '.join(TASKS)} are right"
                         if name == "task" else "argument --data: is required; a file is right")
    args.methods = list(dict.fromkeys(name.strip() for name in args.methods.split(",")))
    for name in args.methods:
        if name not in METHODS:
            parser.error(f"argument --methods: {name!r} is none of {', '.join(METHODS)}")
    budgets = list(dict.fromkeys(text.strip() for text in args.budgets.split(",")))
    for text in budgets:
        if not text.isdecimal() or int(text) < args.window:
            parser.error(f"argument --budgets: {text!r} is not a whole number of at least "
                         f"{args.window} (--window)")
    args.runs = [(method, budget) for method in args.methods
                 for budget in ([None] if method == "full" else map(int, budgets))]
    args.out = Path(args.out or Path(__file__).parent / "work" / str(args.task))
    args.images = Path(args.images or Path(str(args.data)).parent)
    if args.data and not args.images.is_dir():
        parser.error(f"argument --images: {args.images} is no folder; that of the images is right")
    return parser, args


def fingerprint(content):
    """A short text that differs if the content (bytes) does."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_scores(args, model):
    """The visual head scores (L, H), or None if no method needs them."""
    if not set(args.methods) & set(NEEDS_HEAD_SCORES):
        return None
    scores = find_head_scores(model, args.scores)
    if scores is None:
        raise ValueError(f"--scores: no {model.folder / SCORES_FILE}; python score_heads.py "
                         f"--model {args.model} makes it, and --methods full,snapkv needs none")
    return scores


def prepare_folder(args, model, scores, process):
    """Makes the folder --out, or checks that what it holds was made with the same settings."""
    settings = dict(
        task=args.task, data=fingerprint(Path(args.data).read_bytes()),
        model=Path(args.model).name if Path(args.model).is_dir() else args.model,
        weights=checksum(weight_files(model.folder)), dtype=str(model.dtype),
        window=args.window, rho=args.rho,
        redistribute=not args.no_redistribute, seed=args.seed,
        scores=None if scores is None else fingerprint(scores.numpy().tobytes()))
    try:
        output_folder(args.out)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument --out: {error}") from None
    check_settings(args.out, settings, process)
    return settings


def evaluate(args, process, processes):
    """Answers this process's share of the rows; process 0 then judges those of all."""
    rows = read_rows(args.data)
    examples, errors = read_examples(args.task, rows, args.images, args.limit)
    check_any(args, rows, examples, errors)
    model = load(args.model, args.device, args.dtype)
    scores = read_scores(args, model)
    settings = prepare_folder(args, model, scores, process)

    def answer(images, prompt, method, budget):
        return generate(model, images, prompt, method, budget or args.window, window=args.window,
                        rho=args.rho, redistribute=not args.no_redistribute, head_scores=scores,
                        max_new_tokens=TASKS[args.task].max_new_tokens, seed=args.seed)

    done = read_predictions(args.out)
    new, unread = predict(examples[process::processes], args.runs, answer,
                          args.out / f"predictions-{process}.jsonl", done, quiet=process > 0)
    for new_of_one, unread_of_one in gather((new, unread)):
        done |= new_of_one
        errors |= unread_of_one
    if process == 0:
        finish(args, settings, rows, examples, errors, done)


def finish(args, settings, rows, examples, errors, done):
    """Judges all predictions, writes the two result files, and prints the table. A question of
    which one row cannot be read is left out."""
    broken = {question_of(args.task, rows[number], number) for number in errors}
    examples = [example for example in examples if example.question not in broken]
    check_any(args, rows, examples, errors)
    lines, results = judge_runs(args.task, examples, args.runs, done)
    write_file(args.out / "scores.jsonl",
               "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    metric = TASKS[args.task].metric
    skipped = {row_name(args.task, rows, number): text for number, text in sorted(errors.items())}
    write_json(dict(settings, metric=metric, skipped=skipped, results=results),
               args.out / "table.json")
    for name, text in list(skipped.items())[:10]:
        print(f"skipped {name}: {text}")
    print(f"{args.task}, {settings['model']}: {len(examples)} rows, {len(errors)} skipped; wrote "
          f"{args.out / 'scores.jsonl'} and table.json")
    print(table(metric, results))


def main(argv=None):
    parser, args = parse_arguments(argv)
    warnings.filterwarnings("ignore")                      # the user's input is not at fault there
    process, processes = process_and_processes(args)
    try:
        if args.make_miniature:
            make_miniatures(Path(args.make_miniature), args.num, args.seed)
        else:
            evaluate(args, process, processes)
    except ValueError as error:
        parser.error(error)


if __name__ == "__main__":
    main()
