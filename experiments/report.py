"""Figures with their intervals, tables, claims, and the chapter of the README that is made of them.

    cell        None, text, a number, or [mean, low, high]: a figure and its 95 % interval
    table       {"title", "head", "rows": [[label, cell, ...], ...], "unit", "readme"}
    claim       {"claim", "paper", "figures": {where: [mean, low, high]}, "holds"}

experiments/reproduce.py stores these as JSON; what is shown is made from what is stored.
"""

import json
import os
from pathlib import Path

import numpy as np

from sparsemm import write_file

START, END = "<!-- results -->", "<!-- /results -->"


def interval(values, draws=2000):
    """[mean, low, high]: a mean over pages and its 95 % bootstrap interval."""
    x = np.asarray(values, dtype=float)
    means = x[np.random.default_rng(0).integers(0, len(x), (draws, len(x)))].mean(1)
    return [float(x.mean()), *np.percentile(means, [2.5, 97.5]).tolist()]


def table(title, head, rows, unit="%", readme=False):
    """unit: "%" for shares, which are shown as per cent, "" for other numbers, "entries" for those
    whose interval is only stored; readme: whether the README shows the table."""
    return dict(title=title, head=list(head), rows=rows, unit=unit, readme=readme)


def claim(text, paper, figures, holds, signed=True):
    """A claim, the paper's figure for it, ours, and whether all of ours agree.

    holds: function of one figure; signed: whether the figures are differences."""
    return dict(claim=text, paper=paper, figures={str(k): f for k, f in figures.items()},
                holds=all(map(holds, figures.values())), signed=signed)


def positive(figure):
    return figure[1] > 0


def negative(figure):
    return figure[2] < 0


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


def markdown(stored):
    """A stored table as Markdown."""
    lines = [f"**{stored['title']}**", "", "| " + " | ".join(map(str, stored["head"])) + " |",
             "|---" * len(stored["head"]) + "|"]
    for label, *cells in stored["rows"]:
        lines.append("| " + " | ".join([label, *(show(x, stored["unit"]) for x in cells)]) + " |")
    return "\n".join(lines)


def verdict(stored):
    """A stored claim in a few words: "yes (48: +45.5 [40.2, 50.9]; ...)"."""
    sign = "+" if stored["signed"] else ""
    figures = "; ".join(f"{where}: {show(figure, sign=sign)}"
                        for where, figure in stored["figures"].items())
    return f"{'yes' if stored['holds'] else '**no**'} ({figures})"


def results_page(results):
    """All of a part's results as Markdown."""
    lines = [f"# {results['part']}, {results['model']} ({results['attention']})", "", made(results)]
    lines += [f"\n* {c['claim']} (paper: {c['paper']}). {verdict(c)}" for c in results["claims"]]
    lines += ["\n" + markdown(stored) for stored in results["tables"]]
    return "\n".join(lines) + "\n"


def made(results):
    """Where results come from, in one line."""
    return (f"`{results['command']}` ({results['machine']}, torch {results['versions']['torch']}, "
            f"{results['seconds']:,.0f} s)")


# ---- the README ----------------------------------------------------------------------------------

def stored_results(out, parts):
    """{part: [results of each model]} from the JSON files of a folder, MHA before GQA."""
    found = {part: [json.loads(path.read_text(encoding="utf-8"))
                    for path in sorted(out.glob(f"{part}-*.json"))] for part in parts}
    for stored in found.values():
        stored.sort(key=lambda results: results["attention"] != "MHA")
    if not any(found.values()):
        raise ValueError(f"--out: no results in {out}; run the parts first")
    return found


def claims_table(found):
    """Lines of Markdown: each claim, the paper's figure, each model's; then those that fail."""
    models = sorted({(results["model"], results["attention"]) for stored in found.values()
                     for results in stored}, key=lambda model: (model[1] != "MHA", model[0]))
    claims = {}
    for part, stored in found.items():
        for results in stored:
            for c in results["claims"]:
                claims.setdefault((part, c["claim"], c["paper"]), {})[results["model"]] = c
    lines = ["| claim | paper | " + " | ".join(f"{name} ({kind})" for name, kind in models)
             + " | part |", "|---" * (3 + len(models)) + "|"]
    failed = []
    for (part, text, paper), of_model in claims.items():
        cells = [verdict(of_model[name]) if name in of_model else "-" for name, _ in models]
        lines.append(f"| {text} | {paper} | {' | '.join(cells)} | `{part}` |")
        if against := [name for name, c in of_model.items() if not c["holds"]]:
            failed.append(f"* {text}: not on {', '.join(against)}")
    return lines + ["", "What does not carry over:", "", *(failed or ["* nothing of the above"])]


def results_chapter(out, parts, beside):
    """The results chapter as Markdown; its links are relative to the folder `beside`."""
    def link(name):
        return Path(os.path.relpath(out.resolve() / name, beside)).as_posix()

    found = stored_results(out, parts)
    lines = claims_table(found) + [""]
    for part, stored in found.items():
        for results in stored:
            name, chosen = results["model"], [t for t in results["tables"] if t["readme"]]
            if chosen or "picture" in results:
                lines += [f"#### {part}, {name} ({results['attention']})", ""]
            if "picture" in results:
                lines += [f"![{name}: accuracy against kept entries]({link(results['picture'])})",
                          ""]
            lines += [markdown(t) + "\n" for t in chosen]
    lines += ["#### All tables, and the commands that made them", ""]
    lines += [f"* [{part}, {results['model']}]({link(part + '-' + results['model'] + '.md')}): "
              f"{made(results)}" for part, stored in found.items() for results in stored]
    return "\n".join(lines).rstrip() + "\n"


def write_readme(path, out, parts):
    """Puts the results chapter between the two marks of a README."""
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"--readme: {path} must have {START} and {END}, once each")
    before, after = text.split(START)[0], text.split(END)[1]
    chapter = results_chapter(out, parts, path.resolve().parent)
    write_file(path, f"{before}{START}\n{chapter}{END}{after}")
