"""What mkdocs cannot do by itself: pages from the root's documents, tables from results, equations without a script."""

import html
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are kept at the root, and all results, to which pages link."""
    home = (ROOT / "README.md").read_text().partition("\n## What it computes")[0]
    pages = {"index.md": home}
    pages |= {f"{name.lower()}.md": (ROOT / f"{name}.md").read_text() for name in ("CONTRIBUTING", "CHANGELOG")}
    moved = {"docs/": "", "benchmarks/results/": "results/", "README": "index", "CONTRIBUTING": "contributing"}
    for name, text in pages.items():
        for old, new in moved.items():
            text = text.replace(f"]({old}", f"]({new}")
        files.append(File.generated(config, name, content=text))
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in `<!-- table: module.csv -->` and `<!-- diff: example.py -->`, and makes links to results the site's."""
    markdown = re.sub(r"<!-- table: (\w+)\.csv -->", lambda found: table(found[1]), markdown)
    markdown = re.sub(r"<!-- diff: ([\w/.]+) -->", lambda found: diff(ROOT / "docs" / found[1]), markdown)
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_page_content(content: str, **_: Any) -> str:
    """Marks figures in tables; equations to MathML, which browsers draw without a script or a font from elsewhere."""
    content = re.sub(r"<td(?=[^>]*>[-+]?[\d.])", "<td data-figure", content)
    content = re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: mathml(m[1], "block"), content, flags=re.S
    )
    return re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: mathml(m[1], "inline"), content, flags=re.S
    )


def mathml(equation: str, display: str) -> str:
    return convert(html.unescape(equation).strip(), display=display)


def table(name: str) -> str:
    """A results file as the benchmark that wrote it shows it."""
    path = RESULTS / f"{name}.csv"
    report, distributed = (importlib.import_module(f"benchmarks.{module}") for module in ("report", "distributed"))
    if name.startswith("throughput"):
        return report.markdown(report.read_csv(path))
    if name.startswith("distributed"):
        return distributed.markdown(report.read_csv(path, distributed.Row))
    lines = [line.split(",") for line in path.read_text().splitlines()]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))


def diff(path: Path) -> str:
    """A recipe's lines that are there for the loss, with a line of context, and the whole script folded away."""
    lines = path.read_text().splitlines()
    marked = [line.rstrip().endswith("# rsd") for line in lines]
    shown, last = [], None
    for number, line in enumerate(lines):
        # A comment is not cut in half, and a lone quote says nothing.
        context = line.strip() not in ("", '"""') and not line.lstrip().startswith("#")
        if not (marked[number] or (context and any(marked[max(0, number - 1) : number + 2]))):
            continue
        if last is not None and number > last + 1:
            shown.append("  ...")
        last = number
        shown.append(f"+ {line.removesuffix('# rsd').rstrip()}" if marked[number] else f"  {line}")
    whole = "\n".join(f"    {line}".rstrip() for line in ["```python", *lines, "```"])
    return "\n".join(["```diff", *shown, "```", "", f'??? example "The whole script: examples/{path.name}"', "", whole])
