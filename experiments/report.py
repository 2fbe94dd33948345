"""Figures with their intervals, tables and claims, and the pages that are made of stored ones.

    python experiments/report.py        rewrites the tables in BENCHMARKS.md (from results/bench-*
                                        and memory.json) and in tiny/README.md, and
                                        the lines that README.md links to

    cell        None, text, a number, or [mean, low, high]: a figure and its 95 % interval
    table       {"title", "head", "rows": [[label, cell, ...], ...], "unit"}
    claim       {"claim", "paper", "figures": {of what: [mean, low, high]}, "verdicts", "signed"}

experiments/reproduce.py stores these as JSON; `reproduce.py results` makes RESULTS.md of them, and
one table for the README. A verdict is

    yes         the whole interval is in the range that the claim says
    no          the whole interval is outside of it
    not shown   neither
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS
from experiments.draw import line_charts
from sparsemm import DEFAULT_MODEL, write_file

HERE = Path(__file__).resolve().parent


def interval(values, draws=2000):
    """[mean, low, high]: a mean over pages and its 95 % bootstrap interval."""
    x = np.asarray(values, dtype=float)
    means = x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))].mean(1)
    return [float(x.mean()), *np.percentile(means, [2.5, 97.5]).tolist()]


def table(title, head, rows, unit="%"):
    """unit: "%" for shares, which are shown as per cent, "" for other numbers, "entries" for those
    whose interval is only stored."""
    return dict(title=title, head=list(head), rows=rows, unit=unit)


def claim(text, paper, figures, above=None, below=None, signed=True):
    """A claim, the paper's figure for it, and ours with a verdict each.

    above, below: the range that the claim says; signed: whether the figures are differences."""
    return dict(claim=text, paper=paper, figures=figures, signed=signed,
                verdicts={of: verdict(figure, above, below) for of, figure in figures.items()})


def verdict(figure, above=None, below=None):
    """What an interval says of a claim: yes, no, or not shown."""
    _, low, high = figure
    above, below = (-np.inf if above is None else above), (np.inf if below is None else below)
    if above < low and high < below:
        return "yes"
    return "no" if high < above or below < low else "not shown"


def positive(figure):
    return figure[1] > 0


def negative(figure):
    return figure[2] < 0


# ---- how they are shown --------------------------------------------------------------------------

def show(cell, unit="%", sign=""):
    """A cell as text: "91.2 [88.1, 94.0]"."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list) and unit == "entries":
        return show(cell[0], "")
    if isinstance(cell, list):
        mean, low, high = cell
        return f"{show(mean, unit, sign)} [{show(low, unit)}, {show(high, unit)}]"
    if unit == "%":
        return f"{100 * cell + 0:{sign}.1f}".replace("-0.0", "0.0")
    return f"{cell:,.1f}" if isinstance(cell, float) else f"{cell:,}"


def rows_of(head, rows):
    """Lines of a Markdown table of texts."""
    return ["| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(row) + " |" for row in rows)]


def markdown(stored):
    """A stored table as Markdown."""
    rows = [[label, *(show(x, stored["unit"]) for x in cells)] for label, *cells in stored["rows"]]
    return "\n".join([f"**{stored['title']}**", "", *rows_of(stored["head"], rows)])


def figures_of(stored):
    """A claim's figures as text: "questions: +17.7 [13.2, 22.3]; transcripts: ..."."""
    sign = "+" if stored["signed"] else ""
    return "; ".join(f"{of}: {show(figure, sign=sign)}".removeprefix(": ")
                     for of, figure in stored["figures"].items())


def holds(verdicts):
    """{(of what, model): verdict} in a few words: "yes", or "yes; not shown: questions qwen2-vl";
    the most frequent one first, and of the others what they are of."""
    first, *others = [word for word, _ in Counter(verdicts.values()).most_common()]
    return "; ".join([first, *(f"{word}: {whose(verdicts, word)}" for word in others)])


def whose(verdicts, word):
    """What a verdict is of: models or figures where it is all of theirs, else one by one."""
    left, names = [key for key in verdicts if verdicts[key] == word], []
    for i in (1, 0):
        for name in dict.fromkeys(key[i] for key in verdicts):
            of_name = [key for key in verdicts if key[i] == name]
            if name and len(of_name) > 1 and set(of_name) <= set(left):
                names.append(name)
                left = [key for key in left if key not in of_name]
    return ", ".join([*names, *(" ".join(filter(None, key)) for key in left)])


def results_page(results):
    """All of a part's results as Markdown."""
    lines = [f"# {results['part']}, {results['model']} ({results['attention']})", "", made(results)]
    lines += [f"\n* {c['claim']} (paper: {c['paper']}). {figures_of(c)}. "
              + holds({(of, ""): word for of, word in c["verdicts"].items()})
              for c in results["claims"]]
    lines += ["\n" + markdown(stored) for stored in results["tables"]]
    return "\n".join(lines) + "\n"


def made(results):
    """Where results come from, in one line."""
    return (f"`{results['command']}` ({results['machine']}, torch {results['versions']['torch']}, "
            f"{results['seconds']:,.0f} s)")


# ---- RESULTS.md, and the README's table ----------------------------------------------------------

def stored_results(out, parts):
    """{part: [results of each model]} from the JSON files of a folder, MHA before GQA."""
    found = {part: [json.loads(path.read_text(encoding="utf-8"))
                    for path in sorted(out.glob(f"{part}-*.json"))] for part in parts}
    for stored in found.values():
        stored.sort(key=lambda results: results["attention"] != "MHA")
    if not any(found.values()):
        raise ValueError(f"--out: no results in {out}; run the parts first")
    for results in (results for stored in found.values() for results in stored):
        if any("verdicts" not in c for c in results["claims"]):
            raise ValueError(f"--out: {results['part']}-{results['model']}.json in {out} is of an "
                             "earlier version; run that part again")
    return {part: stored for part, stored in found.items() if stored}


def models_of(found):
    """[(name, "MHA" or "GQA")] of stored results, MHA first."""
    models = {(results["model"], results["attention"]) for stored in found.values()
              for results in stored}
    return sorted(models, key=lambda model: (model[1] != "MHA", model[0]))


def claims_table(found):
    """Lines of Markdown: each claim, the paper's figure, each model's, and whether it holds."""
    models, claims = models_of(found), {}
    for results in (results for stored in found.values() for results in stored):
        for c in results["claims"]:
            claims.setdefault((c["claim"], c["paper"]), {})[results["model"]] = c
    rows = []
    for (text, paper), of_model in claims.items():
        verdicts = {(of, name): word for name, c in of_model.items()
                    for of, word in c["verdicts"].items()}
        rows.append([text, paper, *(figures_of(of_model[name]) if name in of_model else "-"
                                    for name, _ in models), holds(verdicts)])
    return rows_of(["claim", "paper", *(f"{name} ({kind})" for name, kind in models), "holds?"],
                   rows)


def split_table(found):
    """Lines of Markdown: what of sparsemm's gain over snapkv layers give, and what heads add."""
    rows, names = [], []
    for results in (results for stored in found.values() for results in stored):
        for where, figures in results.get("split", {}).items():
            names = names or list(figures)
            rows.append([where, results["model"], *(show(figures[name], sign="+")
                                                    for name in names)])
    return rows_of(["", "model", *names], sorted(rows, key=lambda row: "large" in row[0])) \
        if rows else []


def unevenness_table(found, out):
    """Lines of Markdown: how uneven scores are, of published files and of our models."""
    columns = json.loads((out / "published.json").read_text(encoding="utf-8")) \
        if (out / "published.json").exists() else {}
    columns = {f"{name}, published": of for name, of in columns.items()}
    columns |= {r["model"]: r["unevenness"] for r in found.get("heads", []) if "unevenness" in r}
    if not columns:
        return []
    names = list(next(iter(columns.values())))
    return rows_of(["", *columns], [
        [name, *(show(of[name]) for of in columns.values())] for name in names])


def parts_table(found, link):
    """Lines of Markdown: links to the tables of each part and model, and the minutes they took."""
    rows = [[f"`{part}`", ", ".join(
        f"[{r['model']}]({link(part + '-' + r['model'] + '.md')})"
        + (f" and its [chart]({link(r['picture'])})" if "picture" in r else "")
        + f" ({max(1, round(r['seconds'] / 60))} min)" for r in stored)]
        for part, stored in found.items()]
    return rows_of(["part", "all tables, and how long they took"], rows)


def commands_of(found):
    """How the results were made, with PART and MODEL where commands differ in nothing else."""
    every = [results for stored in found.values() for results in stored]
    commands = dict.fromkeys(
        r["command"].replace(f"reproduce.py {r['part']} ", "reproduce.py PART ").replace(
            f"{r['model']} --pages", "MODEL --pages") for r in every)
    machines = dict.fromkeys(f"{r['machine']}, torch {r['versions']['torch']}, seed {r['seed']}"
                             for r in every)
    return [*(f"    {command}" for command in commands), "", "(" + "; ".join(machines) + ".)"]


def write_results(out, parts, readme):
    """Writes RESULTS.md beside the folder of the stored results, and the README's table."""
    found, page = stored_results(out, parts), out.parent / "RESULTS.md"
    short = methods_table(found)
    fill(readme, dict(results=short), "--readme")

    def link(name):
        return Path(os.path.relpath(out / name, page.parent)).as_posix()

    uneven = unevenness_table(found, out)
    lines = ["# Results", "", "Made by `python experiments/reproduce.py results` of what these "
             "commands have stored:", "", *commands_of(found), "", ACCURACY, "", "## Claims", "",
             VERDICTS, "", *claims_table(found), *pyramid(found)]
    if split := split_table(found):
        lines += ["", "## Layers and heads", "", SPLIT, "", *split]
    bytes_chart(found, out / "bytes.png")
    lines += ["", "## Accuracy and bytes", "",
              f"![Accuracy against bytes held]({link('bytes.png')})"]
    if uneven:
        lines += ["", "## How uneven head scores are, %", "", UNEVEN, "", *uneven]
    lines += ["", "## All tables", "", *parts_table(found, link)]
    write_file(page, "\n".join(lines) + "\n")


def pyramid(found):
    """Why pyramidkv loses so much here."""
    shares = [f"{show(r['unevenness'][STRONGEST])} % of the scores of {r['model']}"
              for r in found.get("heads", []) if "unevenness" in r]
    return ["", "`pyramidkv` gives the last layers the least, and in the small models the last one "
            f"looks most (it has {' and '.join(shares)}): part of what `pyramidkv` loses here is "
            "due to the shape of these models (in the tables of the part main, `pyramidkv upside "
            "down` loses less)."] if shares else []


STRONGEST = "the strongest layer's share"
ACCURACY = """Accuracy is the share of an answer's tokens that are predicted from the right ones
before them, from the second on (the first always sees the full cache). Figures are per cent or
points, with their 95 % interval (bootstrap over pages; differences are paired). A budget is entries
per KV head on average. Pages have the size that the command names, or are large ones where a row
says so."""
VERDICTS = """*yes*: the whole interval says so; *no*: the whole interval contradicts it; *not
shown*: neither. One budget a row; the others are in the tables of the parts."""
SPLIT = """What `sparsemm` gains over `snapkv`, in points: what the layers' shares alone give
(`layers`: every head has its layer's mean score), and what heads add to that. `within` has a
layer's scores dealt anew among its heads."""
UNEVEN = """Of KV heads, which have the sum of their query heads' scores. What is published comes
from the authors' files (`reproduce.py published FILE`), and is what large models come to by
themselves; the small models were taught that few heads look."""


def methods_table(found):
    """One table of a model's transcripts: methods by budgets, without intervals."""
    results = next((r for r in found.get("main", []) if r["model"] == DEFAULT_MODEL.name),
                   found.get("main", [None])[-1])
    if results is None:
        raise ValueError("--out: no results of the part main; run it first")
    width, height = results["facts"]["size"]
    start = f"Accuracy, transcripts, {width} x {height} pixels"
    stored = next(t for t in results["tables"] if t["title"].startswith(start))
    rows = {label: [show(cell[0] if cell else None) for cell in cells]
            for label, *cells in stored["rows"] if label in METHODS}
    rows["full"] = rows.pop("full")                                                 # the last row
    return "\n".join([f"{stored['title']} (`{results['model']}`), by entries per head:", "",
                      *rows_of(["method", *stored["head"][1:]],
                               [[f"`{name}`", *cells] for name, cells in rows.items()])])


def bytes_chart(found, path):
    """A PNG: accuracy on transcripts against the kB of cache held, a panel for each model."""
    panels, ticks = {}, (25, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12800)
    for results in found.get("main", []):
        width, height = results["facts"]["size"]
        kb = results["layers"] * results["kv_heads"] * results["entry_bytes"] / 1000
        accuracy, kept = (next(t["rows"] for t in results["tables"] if t["title"].startswith(
            f"{what}, transcripts, {width} x {height} pixels"))
            for what in ("Accuracy", "Entries really kept per head"))
        kept = {label: cells for label, *cells in kept}
        panels[f"{results['model']} ({results['attention']})"] = {
            label: sorted({(kb * n[0], of[0]) for n, of in zip(kept[label], cells) if n and of})
            for label, *cells in accuracy if label in METHODS}
    line_charts(panels, path, "Accuracy on transcripts (%) against bytes of cache",
                "kB of keys and values held", ticks)


def fill(path, parts, argument):
    """Puts texts between marks of a Markdown file: <!-- NAME --> ... <!-- /NAME -->, once each."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(f"{argument}: {path} must have {start} and {end}, once each")
        text = f"{text.split(start)[0]}{start}\n{part}\n{end}{text.split(end)[1]}"
    write_file(path, text)


# ---- BENCHMARKS.md -------------------------------------------------------------------------------

def benchmark(path):
    """The table of a stored benchmark, and where it comes from."""
    from experiments import bench, memory
    if not path.exists():
        return "Not measured yet."
    stored = json.loads(path.read_text(encoding="utf-8"))
    results = stored["results"]
    if path.stem == "memory":
        return (f"{memory.table(results)}\n\nGB of 10^9 bytes. `python experiments/memory.py` "
                f"(torch {stored['torch']}, {stored['dtype']}, budget {stored['budget']})")
    part = path.stem.split("-")[1]
    earlier = False
    for row in (row for result in results for row in result["rows"]) if part == "decode" else ():
        earlier |= "ideal" in row
        row["byte_ratio"] = row.get("byte_ratio", row.get("ideal"))     # its name in earlier code
    shown = "\n".join(line for line in getattr(bench, f"{part}_table")(results).split("\n")
                      if not line.startswith("byte ratio: ")).rstrip()
    dtype = stored["dtype"] if isinstance(stored["dtype"], str) else " and ".join(stored["dtype"])
    return (f"{shown}\n\n`{stored['command']}` ({stored['machine']}, torch {stored['torch']}, "
            f"{dtype}, seed {stored['seed']}){'. Measured with earlier code.' * earlier}")


def bench_page(page):
    """Fills the marks of BENCHMARKS.md, each named like a file in results/."""
    names = [line.removeprefix("<!-- ").removesuffix(" -->")
             for line in page.read_text(encoding="utf-8").splitlines()
             if line.startswith("<!-- ") and not line.startswith("<!-- /")]
    fill(page, {name: benchmark(page.parent / "results" / f"{name}.json") for name in names},
         "BENCHMARKS.md")


# ---- tiny/README.md ------------------------------------------------------------------------------

READ = {"256 x 256 pixels": "evaluation.json", "512 x 512 pixels": "evaluation-large.json",
        "like other people's": "evaluation-wild.json"}


def reading_table(folders):
    """Lines of Markdown: exact answers and characters of transcripts, means over kinds of pages."""
    what = {"exact answers": lambda task: task != "transcript",
            "characters of transcripts": lambda task: task == "transcript"}

    def mean(path, wanted):
        if not path.exists():
            return None
        kinds = [kind["tasks"] for kind in json.loads(path.read_text())["results"]]
        return float(np.mean([of["mean"] for tasks in kinds for task, of in tasks.items()
                              if wanted(task) and of["mean"] is not None]))

    return rows_of(["pages, %", *(f"{folder.name}: {name}" for folder in folders for name in what)],
                   [[name, *(show(mean(folder / file, wanted)) for folder in folders
                             for wanted in what.values())] for name, file in READ.items()])


def card(page):
    """Fills the tables of the models' card: how they read, and the weights' checksums."""
    folders = [page.parent / name for name in ("qwen2-vl", "llava-next")]
    checksums = [[f"`{folder.name}`", f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`"]
                 for folder in folders for weights in [folder / "model.safetensors"]]
    fill(page, dict(reading="\n".join(reading_table(folders)),
                    checksums="\n".join(rows_of(["weights of", "SHA-256"], checksums))),
         "tiny/README.md")


# ---- README.md's links to lines ------------------------------------------------------------------

def link_lines(readme):
    """Sets the line in each link [`name`](file.py#L123), or [`Class.name`](...), to where the name
    is defined."""
    def found(match):
        name, file = match[1], match[2]
        text = (readme.parent / file).read_text(encoding="utf-8")
        *owner, last = name.split("(")[0].split(".")
        start = text.index(f"class {owner[0]}") if owner else 0
        defined = rf"^\s*(?:(?:def|class) {last}\b|{last} = )"
        place = re.compile(defined, re.MULTILINE).search(text, start)
        if place is None:
            raise ValueError(f"{readme}: {file} does not define {name}")
        return f"[`{name}`]({file}#L{text[:place.end()].count(chr(10)) + 1})"
    text = readme.read_text(encoding="utf-8")
    write_file(readme, re.sub(r"\[`([^`]+)`\]\((\w+\.py)(?:#L\d+)?\)", found, text))


def main():
    bench_page(HERE / "BENCHMARKS.md")
    card(DEFAULT_MODEL.parent / "README.md")
    link_lines(HERE.parent / "README.md")


if __name__ == "__main__":
    main()
