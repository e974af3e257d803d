"""Measures of readability: words a sentence in the documents, and the size and shape of the wheel's source.

    python -m research.tools.words            # the whole report
    python -m research.tools.words README.md  # words a sentence of the files named

Only prose counts: tables, code, headings, comments and pictures are taken out; a piece of `code` in a sentence is one
word. A list item ends a sentence. A function's length runs from its `def` to its last line, docstring included;
`self` and `cls` are no parameters. Functions that Numba compiles are left out: they cannot take dataclasses.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORDS_TARGET = 18.0  # a sentence, over all documents
MAX_LINES, MAX_PARAMETERS = 60, 7

_ABBREVIATION = re.compile(r"\b(Eqs?|Fig|Sec|e\.g|i\.e|vs|cf|al|approx)\.", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[A-Z0-9])")
_BLOCK_START = re.compile(r"^\s*([-*+]|\d+\.)\s+")


@dataclass(frozen=True)
class Prose:
    """Sentences of one document, each as its number of words."""

    name: str
    words: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Words a sentence; 0 for a document without prose."""
        return sum(self.words) / len(self.words) if self.words else 0.0

    @property
    def long(self) -> int:
        """Sentences of more than 30 words."""
        return sum(n > 30 for n in self.words)


@dataclass(frozen=True)
class Function:
    """A function of the source, with what makes it hard to read."""

    name: str
    """FILE:LINE NAME"""
    lines: int
    parameters: int

    @property
    def too_large(self) -> bool:
        """Whether it is beyond either limit."""
        return self.lines > MAX_LINES or self.parameters > MAX_PARAMETERS


def blocks(markdown: str) -> Iterator[str]:
    """Paragraphs and list items, as plain text."""
    text = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines: list[str] = []
    in_list = False
    for line in [*text.splitlines(), ""]:
        starts_item = bool(_BLOCK_START.match(line))
        ends_block = not line.strip() or line.lstrip().startswith(("|", "#", "<", "![")) or starts_item
        if not ends_block and line.startswith("    ") and not lines and not in_list:
            continue  # indented code
        if ends_block and lines:
            yield " ".join(lines)
            lines = []
        if starts_item:
            in_list = True
            lines = [_BLOCK_START.sub("", line)]
        elif not ends_block:
            in_list = in_list and line.startswith(" ")
            lines.append(line.strip())
        elif line.strip():
            in_list = False


def sentence_lengths(markdown: str) -> list[int]:
    """Words of each sentence of a document's prose."""
    lengths = []
    for block in blocks(markdown):
        text = re.sub(r"`[^`]+`", "Code", block)  # a capital: it may begin a sentence
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = _ABBREVIATION.sub(r"\1", text)
        for sentence in _SENTENCE_END.split(text):
            words = [w for w in sentence.split() if re.search(r"\w", w)]
            if words:
                lengths.append(len(words))
    return lengths


def documents(root: Path) -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG and all pages under docs/."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").glob("*.md"))]


def functions(file: Path, name: str) -> Iterator[Function]:
    """All functions of a file, nested ones and methods too, but not those that Numba compiles."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_compiled(node):
            continue
        a = node.args
        names = [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs]]
        parameters = len([n for n in names if n not in ("self", "cls")]) + sum(
            p is not None for p in (a.vararg, a.kwarg)
        )
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        yield Function(f"{name}:{node.lineno} {node.name}", lines, parameters)


def _is_compiled(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(re.search(r"\b(n?jit|vectorize|intrinsic|overload)\b", ast.unparse(d)) for d in node.decorator_list)


def main(names: list[str]) -> None:
    """Print the report, or the words a sentence of the files named."""
    files = [Path(n) for n in names] or documents(ROOT)
    prose = []
    for file in files:
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
        prose.append(Prose(name, tuple(sentence_lengths(file.read_text(encoding="utf-8")))))
    print(f"{'words a sentence':<32}{'mean':>6}{'sentences':>11}{'over 30':>9}")
    total = Prose("all", tuple(n for page in prose for n in page.words))
    for page in [*prose, total]:
        print(f"{page.name:<32}{page.mean:>6.1f}{len(page.words):>11}{page.long:>9}")
    print(f"target: under {WORDS_TARGET:.0f} words")
    if names:
        return
    source = sorted((ROOT / "src" / "hicode").rglob("*.py"))
    lines = sum(len(f.read_text(encoding="utf-8").splitlines()) for f in source)
    print(f"\nwheel's source: {lines} lines in {len(source)} files")
    large = [f for s in source for f in functions(s, str(s.relative_to(ROOT / "src" / "hicode"))) if f.too_large]
    print(f"functions over {MAX_LINES} lines or {MAX_PARAMETERS} parameters: {len(large)}")
    for function in sorted(large, key=lambda f: -f.lines):
        print(f"  {function.lines:>4} lines {function.parameters:>3} parameters  {function.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
