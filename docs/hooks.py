"""What mkdocs cannot do by itself: pages from the root's documents, tables from results, equations without a script."""

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Imported here and not later: once a hook is loaded, mkdocs takes its additions to the path back.
sys.path.insert(0, str(ROOT))
from benchmarks.records import read_csv  # noqa: E402
from benchmarks.speed import processes, report  # noqa: E402

# The root's documents have absolute links, which hold on a registry's page, too; here they become the site's own.
GITHUB = r"\]\(https://(?:github\.com|raw\.githubusercontent\.com)/[\w-]+/rsd-loss/(?:blob/)?main/"
GITHUB_REFERENCE = GITHUB.replace(r"\]\(", r"\]: ")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are kept at the root, and all results, to which pages link."""
    for name, page in {"README": "index.md", "CONTRIBUTING": "contributing.md", "CHANGELOG": "changelog.md"}.items():
        files.append(File.generated(config, page, content=site_links((ROOT / f"{name}.md").read_text())))
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def site_links(text: str) -> str:
    """A root document with links to the site's pages."""
    text = re.sub(GITHUB, "](", re.sub(GITHUB_REFERENCE, "]: ", text))
    moved = {"docs/": "", "benchmarks/results/": "results/", "README.md": "index.md"}
    moved |= {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    for old, new in moved.items():
        text = re.sub(rf"(\]\(|\]: ){old}", rf"\g<1>{new}", text)
    return text


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills in `<!-- table: results.csv -->` and `<!-- diff: example.py -->`, and makes links to results the site's."""
    markdown = re.sub(r"<!-- table: (\w+)\.csv -->", lambda found: table(found[1]), markdown)
    markdown = re.sub(r"<!-- diff: ([\w/.]+) -->", lambda found: diff(ROOT / "docs" / found[1]), markdown)
    return markdown.replace("](../benchmarks/results/", "](results/")


def on_page_content(content: str, **_: Any) -> str:
    """Marks figures in tables; equations to MathML, which browsers draw without a script or a font from elsewhere."""
    content = re.sub(r"<td(?=[^>]*>[-+]?\d[^<]{0,20}</td>)", "<td data-figure", content)
    content = re.sub(r"<thead>\s*<tr>\s*(?:<th[^>]*></th>\s*)+</tr>\s*</thead>", "", content)  # nothing but empty cells
    for wrap, display in ((r'<div class="arithmatex">\\\[(.*?)\\\]</div>', "block"), (INLINE, "inline")):
        content = re.sub(
            wrap, lambda m, d=display: convert(html.unescape(m[1]).strip(), display=d), content, flags=re.S
        )
    return content


INLINE = r'<span class="arithmatex">\\\((.*?)\\\)</span>'


def table(name: str) -> str:
    """A results file as the benchmark that wrote it shows it."""
    path = RESULTS / f"{name}.csv"
    for start, module in (("throughput", report), ("distributed", processes)):
        if name.startswith(start):
            return module.markdown(read_csv(path, module.Row))
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
        if last is not None and any(line.strip() for line in lines[last + 1 : number]):
            shown.append("  ...")
        elif last is not None and number > last + 1:
            shown.append("")
        last = number
        shown.append(f"+ {line.removesuffix('# rsd').rstrip()}" if marked[number] else f"  {line}")
    whole = "\n".join(f"    {line}".rstrip() for line in ["```python", *lines, "```"])
    return "\n".join(["```diff", *shown, "```", "", f'??? example "The whole script: examples/{path.name}"', "", whole])
