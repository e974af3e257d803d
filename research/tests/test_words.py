"""Claims about the measures of readability (`research/tools/words.py`)."""

from pathlib import Path

from research.tools.words import functions, sentence_lengths


def test_only_prose_counts():
    page = """# A heading of five words

Two words. Eq. 11 has five words.

| a table | counts | for nothing |
|---|---|---|

    indented code is not read

```
nor is fenced code. Never.
```

- a first item
- a second one, which
  goes on here. And a sentence `that has code`.
"""
    assert sentence_lengths(page) == [2, 5, 3, 7, 4]


def test_self_is_no_parameter_and_compiled_functions_are_left_out(tmp_path: Path):
    file = tmp_path / "part.py"
    method = "class A:\n    def f(self, a, *, b):\n        return a\n"
    file.write_text(method + "@numba.njit(cache=True)\ndef kernel(a, b, c):\n    pass\n")
    (function,) = functions(file, "part.py")
    assert (function.name, function.lines, function.parameters) == ("part.py:2 f", 2, 2)
