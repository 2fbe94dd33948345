"""Figures with their intervals, Markdown tables and claims, and the pages that show them.

    python experiments/report.py        fills the tables in BENCHMARKS.md and tiny/README.md, and
                                        sets the lines that README.md links to

    cell        None, text, a number, or [mean, low, high]: a figure and its 95 % interval
    table       {"title", "head", "rows": [[label, cell, ...], ...], "unit"}
    claim       {"claim", "paper", "figures": {of what: [mean, low, high]}, "verdicts", "signed"}

experiments/reproduce.py stores these as JSON, and fills RESULTS.md and the README's table.
"""

import hashlib
import json
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import METHODS
from sparsemm import DEFAULT_MODEL, OneLineParser, write_file

HERE = Path(__file__).resolve().parent


def interval(values, draws=2000):
    """[mean, low, high]: a mean over pages and its 95 % bootstrap interval."""
    x = np.asarray(values, dtype=float)
    means = x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))].mean(1)
    return [float(x.mean()), *np.percentile(means, [2.5, 97.5]).tolist()]


def table(title, head, rows, unit="%"):
    """unit: "%" for shares, shown as per cent; "" for other numbers; "mean" for numbers and
    "mean %" for shares whose interval is stored, but not shown."""
    return dict(title=title, head=list(head), rows=rows, unit=unit)


def claim(text, paper, figures, above=-np.inf, below=np.inf, signed=True):
    """A claim, the paper's figure, and ours with one verdict each. above, below: the claimed range;
    signed: whether the figures are differences.

    significant: the whole interval lies in the range; contradicted: it lies outside of the range;
    not significant: neither."""
    verdicts = {of: "significant" if above < low and high < below else "contradicted"
                if high < above or below < low else "not significant"
                for of, (_, low, high) in figures.items()}
    return dict(claim=text, paper=paper, figures=figures, signed=signed, verdicts=verdicts)


def machine_name(device="cpu"):
    """What a result was measured on: the GPU, or the processor and the number of its cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = Path("/proc/cpuinfo")                                               # only on Linux
    text = processors.read_text(encoding="utf-8") if processors.exists() else ""
    name = re.search(r"^model name\s*: *(.+)", text, re.MULTILINE)
    name = name[1].strip() if name else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# ---- how they are shown --------------------------------------------------------------------------

def show(cell, unit="%", sign=""):
    """A cell as text: "91.2 [88.1, 94.0]"."""
    if cell is None or isinstance(cell, str):
        return cell or "-"
    if isinstance(cell, list):
        mean, low, high = cell
        if unit.startswith("mean"):
            return show(mean, unit[5:], sign)
        return f"{show(mean, unit, sign)} [{show(low, unit)}, {show(high, unit)}]"
    if unit == "%":
        return f"{100 * cell + 0:{sign}.1f}".replace("-0.0", "0.0")
    return f"{cell:,.1f}" if isinstance(cell, float) else f"{cell:,}"


def rows_of(head, rows):
    """Lines of a Markdown table of texts."""
    return ["| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def markdown(stored):
    """A stored table as Markdown."""
    rows = [[label, *(show(x, stored["unit"]) for x in cells)] for label, *cells in stored["rows"]]
    return "\n".join([f"**{stored['title']}**", "", *rows_of(stored["head"], rows)])


def figures_of(stored):
    """A claim's figures as text: "questions: +17.7 [13.2, 22.3]; transcripts: ..."."""
    sign = "+" if stored["signed"] else ""
    return "; ".join(f"{of}: {show(figure, sign=sign)}".removeprefix(": ")
                     for of, figure in stored["figures"].items())


def in_words(verdicts):
    """{of what: verdict} as text, the most frequent first: "significant; contradicted: a"."""
    words = list(verdicts.values())
    first, *others = sorted(dict.fromkeys(words), key=words.count, reverse=True)
    return "; ".join([first, *(f"{word}: {', '.join(of for of in verdicts if verdicts[of] == word)}"
                               for word in others)])


def results_page(results):
    """The results of one part and model as Markdown."""
    lines = [f"## {results['part']}, {results['model']}"]
    lines += [f"\n* {c['claim']} (paper: {c['paper']}). {figures_of(c)}. {in_words(c['verdicts'])}"
              for c in results["claims"]]
    return "\n".join([*lines, *("\n" + markdown(stored) for stored in results["tables"])]) + "\n"


# ---- RESULTS.md, and the README's table ----------------------------------------------------------

def stored_results(out, parts):
    """{part: [results of each model]} from the JSON files of a folder."""
    found = {part: [json.loads(path.read_text(encoding="utf-8"))
                    for path in sorted(out.glob(f"{part}-*.json"))] for part in parts}
    if not all(found.values()):
        raise ValueError(f"--out {out}: must hold results of all parts; run them first")
    return found


def claims_table(found):
    """Markdown: each claim, the paper's figure, ours for each model, and the verdict."""
    models, claims, rows = [results["model"] for results in found["main"]], {}, []
    for results in (results for stored in found.values() for results in stored):
        for c in results["claims"]:
            claims.setdefault((c["claim"], c["paper"]), {})[results["model"]] = c
    for (text, paper), of_model in claims.items():
        verdicts = {f"{of} {name}".strip(): word for name, c in of_model.items()
                    for of, word in c["verdicts"].items()}
        rows.append([text, paper, *(figures_of(c) for c in of_model.values()), in_words(verdicts)])
    return "\n".join(rows_of(["claim", "paper", *models, "verdict"], rows))


def rules_table(found):
    """Markdown: each rule for the window by its mean accuracy on development pages."""
    of = {rule: [r["development"][rule] for r in found["window"]] for rule in
          found["window"][0]["development"]}
    mean = {rule: float(np.mean([figure[0] for figure in figures])) for rule, figures in of.items()}
    return "\n".join(rows_of(["window", *(r["model"] for r in found["window"]), "mean"], [
        [rule, *map(show, of[rule]), show(mean[rule])]
        for rule in sorted(mean, key=mean.get, reverse=True)]))


def methods_table(found):
    """Markdown for the README: methods by budgets on transcripts, without intervals."""
    [results] = [r for r in found["main"] if r["model"] == DEFAULT_MODEL.name] or found["main"][-1:]
    of = next(t for t in results["tables"] if t["title"].startswith("Accuracy (%), transcripts"))
    rows = {label: cells for label, *cells in of["rows"]}
    return "\n".join([f"{of['title']} (`{results['model']}`), by entries per head:", "", *rows_of(
        ["method", *of["head"][1:]], [[f"`{name}`", *(show(cell, "mean %") for cell in rows[name])]
                                      for name in (*METHODS[1:5], "full")])])


def write_results(found, out):
    """Fills RESULTS.md and the README's table; writes a page of all tables for each model."""
    every = [results for stored in found.values() for results in stored]
    made = dict.fromkeys(
        f"* `python experiments/{r['command']}` ({r['machine']}, torch {r['torch']})".replace(
            f".py {r['part']}", ".py PART").replace(f"/{r['model']}", "/MODEL") for r in every)
    summaries = {part: "\n\n".join(markdown(dict(t, title=f"{r['model']}: {t['title']}"))
                                   for r in stored for t in r["summary"])
                 for part, stored in found.items() if "summary" in stored[0]}
    models = [r["model"] for r in found["main"]]
    took = rows_of(["minutes", *(f"[{name}]({out.name}/tables-{name}.md)" for name in models)], [
        [part, *(f"{r['minutes']:.1f}" for r in stored)] for part, stored in found.items()])
    fill(out.parent / "RESULTS.md", dict(
        made="\n".join(made), claims=claims_table(found),
        rules=rules_table(found), **summaries, parts="\n".join(took)))
    fill(out.parent.parent / "README.md", dict(results=methods_table(found)))
    for name in models:
        pages = [results_page(results) for results in every if results["model"] == name]
        write_file(out / f"tables-{name}.md", "\n".join([f"# All tables of {name}\n", *pages]))


def fill(path, parts):
    """Puts texts between marks of a Markdown file: <!-- NAME --> ... <!-- /NAME -->, once each."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        text, n = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                          lambda marks: f"{marks[1]}{part}\n{marks[2]}", text, flags=re.DOTALL)
        if n != 1:
            raise ValueError(f"{path}: must have <!-- {name} --> and <!-- /{name} -->, once each")
    write_file(path, text)


# ---- BENCHMARKS.md, tiny/README.md, and README.md's links to lines -------------------------------

def bench_page(page):
    """Fills the marks of BENCHMARKS.md, each named like a stored benchmark."""
    parts = {}
    for name in re.findall(r"^<!-- (\w\S*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE):
        file = page.parent / "results" / f"{name}.json"
        of, text = json.loads(file.read_text()), file.with_suffix(".md").read_text().rstrip()
        dtype = of["dtype"] if isinstance(of["dtype"], str) else " and ".join(of["dtype"])
        parts[name] = (f"{text}\n\n`{of['command']}` ({of['machine']}, torch {of['torch']}, "
                       f"{dtype}, seed {of['seed']})")
    fill(page, parts)


def card(page):
    """Fills the models' card: how they read (means over kinds of pages), and checksums."""
    def mean(folder, file, transcripts):
        kinds = [kind["tasks"] for kind in json.loads((folder / file).read_text())["results"]]
        return show(float(np.mean([of["mean"] for of_kind in kinds for task, of in of_kind.items()
                                   if (task == "transcript") == transcripts
                                   and of["mean"] is not None])))

    folders = [page.parent / name for name in ("qwen2-vl", "llava-next")]
    columns = [(folder, what) for folder in folders
               for what in ("exact answers", "characters of transcripts")]
    reading = rows_of(["pages, %", *(f"{folder.name}: {what}" for folder, what in columns)], [
        [f"{size} x {size} pixels", *(mean(folder, file, what != "exact answers")
                                      for folder, what in columns)]
        for size, file in ((256, "evaluation.json"), (512, "evaluation-large.json"))])
    weights = {of.name: (of / "model.safetensors").read_bytes() for of in folders}
    checksums = rows_of(["weights of", "SHA-256"], [
        [f"`{name}`", f"`{hashlib.sha256(of).hexdigest()}`"] for name, of in weights.items()])
    fill(page, dict(reading="\n".join(reading), checksums="\n".join(checksums)))


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


if __name__ == "__main__":
    OneLineParser("report.py", description="Fill BENCHMARKS.md and tiny/README.md, and set the "
                  "README's links to lines.").run(lambda args: [
                      bench_page(HERE / "BENCHMARKS.md"), card(DEFAULT_MODEL.parent / "README.md"),
                      link_lines(HERE.parent / "README.md")])
