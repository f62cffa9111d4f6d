"""Makes the skeleton of a technique: python3 tools/new_technique.py NAME [--attention], and README's table of files.

Writes files that load, pass the house's tests and do something small; nothing that is there is overwritten. --attention
adds a patch for the attention layers. --table only writes README's table anew, after files came, went or were renamed.
"""
from __future__ import annotations

import argparse
import ast
import json
import keyword
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from commands import ROOT, Failure, guarded, say

ROOMS = ("samplers", "attention_patches", "host", "nodes")
SKELETON = Path(__file__).resolve().parent / "skeleton"
FILES = {"samplers/{name}.py": "samplers", "host/{name}.py": "host", "nodes/{name}.py": "nodes",
         "tests/test_{name}_math.py": "test_math", "tests/test_{name}_host.py": "test_host",
         "web/docs/{node}.md": "help", "web/docs/{node}/zh.md": "help_zh", "bench/{name}.py": "bench"}
FILES_ATTENTION = {**FILES, "attention_patches/{name}.py": "attention_patches"}
ADDED = ("test_host",)  # what --attention adds to; it has its own of all others
HOUSE_TEST, EXTENSION, README = Path("tests/test_house.py"), Path("nodes/__init__.py"), Path("README.md")
LISTED = re.compile(r"^TECHNIQUES = \((.*?)\)$", re.DOTALL | re.MULTILINE)
OFFERED = re.compile(r"^        return \[(.*?)\]$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"(?<=<!-- files -->\n).*?(?=<!-- end of files -->)", re.DOTALL)
MOST_LETTERS = 24
LEFT = """
{title} stands, as a skeleton. python3 tools/test.py -- tests/test_house.py {tests}
What is left to do:
  - the arithmetic in samplers/{name}.py, with equation numbers, then its inputs in nodes/{name}.py
  - every input again in web/docs/{node}.md and {node}/zh.md and in locales/zh/nodeDefs.json; the category in
    locales/zh/main.json
  - words by which people look for it in nodes/search.py, and search_aliases=search_words("{node}") in its schema
  - {node} in CONTRACT of tests/test_house.py, NODES of tests/test_fuzz.py and WHERE of tests/test_wiring.py;
    TECHNIQUES of tests/test_strangers.py says how it is run beside other packs' nodes
  - tests/test_{name}_meaning.py: what it does on the demo checkpoint, against a baseline, over many seeds
  - its templates in tools/templates_{name}.py with titles in tools/titles.py, one of them without files (run
    tools/templates.py), a square picture of the same name each, and a blueprint in tools/blueprints.py
  - a show in tools/shows/{name}.py, for the gallery
  - README.md: a row in "What is in it", a section with its limits and figures; CHANGELOG.md: a line"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="in lower case, such as soft_focus")
    parser.add_argument("--attention", action="store_true", help="with a patch for the attention layers")
    parser.add_argument("--table", action="store_true", help="only write README's table of files anew")
    options = parser.parse_args()
    if options.table == bool(options.name):
        parser.error("give a NAME, or --table")
    if options.name:
        make(ROOT, options.name, options.attention)
    write_table(ROOT)
    return 0


def make(root: Path, name: str, attention: bool) -> None:
    """Writes a technique's skeleton into a checkout, all of it or nothing.

    Raises:
        Failure: on a name that is none, or taken; if a list that it belongs to is not where it was.
    """
    words = name_technique(root, name)
    new = {Path(path.format_map(words)): fill(kind, words, attention)
           for path, kind in (FILES_ATTENTION if attention else FILES).items()}
    there = [str(path) for path in new if (root / path).exists()]
    if there:
        raise Failure(f"{name} is taken: {', '.join(there)} is there; nothing was written.")
    changed = {HOUSE_TEST: list_technique(root, name), EXTENSION: offer_node(root, words)}
    for path in sorted((root / "locales").glob("*/nodeDefs.json")):
        if path.parent.name == "en":  # it holds what a schema cannot: the sockets of groups
            continue
        changed[path.relative_to(root)] = translate(path, words)
    for path, text in new.items():
        (root / path).parent.mkdir(exist_ok=True)
        with (root / path).open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        say(f"wrote    {path}")
    for path, text in changed.items():
        (root / path).write_text(text, encoding="utf-8", newline="\n")
        say(f"extended {path}")
    say(LEFT.format(**words, tests=" ".join(str(path) for path in new if path.parts[0] == "tests")))


def name_technique(root: Path, name: str) -> dict[str, str]:
    """What the skeleton calls a technique. Raises Failure on a name that is none, or that another file claims."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > MOST_LETTERS:
        raise Failure(f"NAME expects up to {MOST_LETTERS} lower case letters and digits, words joined by _, got "
                      f"{name[:60]!a}: choose one such as soft_focus.")
    if keyword.iskeyword(name) or name in sys.stdlib_module_names or name in (*ROOMS, "comfy", "torch"):
        raise Failure(f"{name} is a word or module of Python's or the host's: choose another name.")
    stems = {path.stem for room in ROOMS for path in (root / room).glob("*.py")}
    claimed = sorted(stem for stem in {*stems, *read_techniques(root)}
                     if stem == name or name.startswith(f"{stem}_") or stem.startswith(f"{name}_"))
    if claimed:
        raise Failure(f"{name} is taken: files are told apart by how their names begin, and there is "
                      f"{', '.join(claimed)}; choose another name.")
    title = name.replace("_", " ").title()
    joined = title.replace(" ", "")
    return {"name": name, "title": title, "Class": joined, "node": f"Mixology{joined}"}


def fill(kind: str, words: dict[str, str], attention: bool) -> str:
    """A file of the skeleton, with the technique's names in it."""
    plain, own = SKELETON / f"{kind}.txt", SKELETON / "attention" / f"{kind}.txt"
    paths = [plain] if not (attention and own.exists()) else [plain, own] if kind in ADDED else [own]
    return "".join(Template(path.read_text(encoding="utf-8")).substitute(words) for path in paths)


def read_techniques(root: Path) -> list[str]:
    return re.findall(r'"(\w+)"', find(LISTED, root / HOUSE_TEST).group(1))


def find(pattern: re.Pattern[str], path: Path) -> re.Match[str]:
    found = pattern.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise Failure(f"{path.name} has no {pattern.pattern[:40]!a} any more: correct tools/new_technique.py.")
    return found


def put(found: re.Match[str], text: str) -> str:
    """The text that was searched, with another in the place of what was found."""
    return found.string[:found.start()] + text + found.string[found.end():]


def wrap(begin: str, names: Iterable[str], end: str) -> str:
    """A list of names in lines of 120 letters."""
    return textwrap.fill(begin + ", ".join(names) + end, 120, subsequent_indent=" " * len(begin))


def list_technique(root: Path, name: str) -> str:
    """tests/test_house.py with the technique in its list."""
    names = [f'"{known}"' for known in (*read_techniques(root), name)]
    return put(find(LISTED, root / HOUSE_TEST), wrap("TECHNIQUES = (", names, ")"))


def offer_node(root: Path, words: dict[str, str]) -> str:
    """nodes/__init__.py with the node imported and in its list."""
    found = find(OFFERED, root / EXTENSION)
    names = re.findall(r"\w+", found.group(1))
    if words["Class"] in names:
        raise Failure(f"{words['name']} is taken: there is a node {words['node']}; choose another name.")
    lines = put(found, wrap("        return [", [*names, words["Class"]], "]")).split("\n")
    line = "from .{name} import {Class}".format_map(words)
    own = [i for i, other in enumerate(lines) if other.startswith("from .")]
    lines.insert(next((i for i in own if lines[i].split()[1] > line.split()[1]), own[-1] + 1), line)
    return "\n".join(lines)


def translate(path: Path, words: dict[str, str]) -> str:
    """A nodeDefs.json with the node in it."""
    definitions = json.loads(path.read_text(encoding="utf-8"))
    definitions[words["node"]] = json.loads(fill(f"locale_{path.parent.name}", words, False))
    return json.dumps(definitions, indent=2, ensure_ascii=False) + "\n"


def write_table(root: Path) -> None:
    """Puts the table of files into README.md."""
    (root / README).write_text(put(find(TABLE, root / README), draw_table(root)), encoding="utf-8", newline="\n")


def draw_table(root: Path) -> str:
    """Which files a technique has in each room: those of its name, those that it alone uses, and those for all."""
    paths = [path for room in ROOMS for path in sorted((root / room).rglob("*.py")) if path.name != "__init__.py"]
    techniques = [*read_techniques(root), "demo"]
    reached = {name: reach([path for path in paths if is_of(path, name)]) for name in techniques}
    lines = ["| technique | nodes | " + " | ".join(f"`{room}/`" for room in ROOMS) + " |", "|---" * 6 + "|"]
    for name in techniques:
        alone = reached[name] - set().union(*(reached[other] for other in techniques if other != name))
        own = [path for path in paths if path in alone or is_of(path, name)]
        titles = [title for path in own for title in re.findall(
            r'node_id="\w+",\s+display_name="([^"]+)"', path.read_text(encoding="utf-8"))]
        lines.append(draw_row(f"`{name}`", titles, root, own, name))
        paths = [path for path in paths if path not in own]
    return "\n".join(["", *lines, draw_row("shared", [], root, paths, ""), "", ""])


def draw_row(first: str, titles: Sequence[str], root: Path, paths: Sequence[Path], name: str) -> str:
    """A row of the table; what bears the technique's name comes first."""
    cells = [first, ", ".join(titles)]
    for room in ROOMS:
        inside = [path for path in paths if path.is_relative_to(root / room)]
        inside.sort(key=lambda path: (not is_of(path, name), path))
        cells.append(" ".join(path.relative_to(root / room).as_posix().removesuffix(".py") for path in inside))
    return "| " + " | ".join(cells) + " |"


def is_of(path: Path, name: str) -> bool:
    return path.stem == name or path.stem.startswith(f"{name}_")


def reach(paths: Sequence[Path]) -> set[Path]:
    """These files and all of the pack's that they import, and those import, and so on."""
    found, waiting = set(paths), list(paths)
    while waiting:
        path = waiting.pop()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                files = {base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)}
                fresh = {file for file in files if file.is_file()} - found
                found |= fresh
                waiting += fresh
    return found


if __name__ == "__main__":
    sys.exit(guarded(main))
