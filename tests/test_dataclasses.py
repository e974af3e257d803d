"""Dataclasses that hold arrays compare by identity.

The generated `__eq__` compares tuples of arrays: it raises ValueError where the first arrays differ in more than one
element, and `list.remove` and `in` call it unasked.
"""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "hicode"
ARRAY = re.compile(r"\b(ndarray|Tensor)\b")


def compares_arrays(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass with a generated `__eq__` and a field that is an array, or holds some."""
    decorators = [ast.unparse(d) for d in node.decorator_list if ast.unparse(d).startswith("dataclass")]
    if not decorators or "eq=False" in decorators[0]:
        return False
    if any(isinstance(item, ast.FunctionDef) and item.name == "__eq__" for item in node.body):
        return False
    fields = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
    return any(ARRAY.search(field) and not field.startswith(("Callable", "ClassVar")) for field in fields)


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_dataclasses_that_hold_arrays_compare_by_identity(file):
    classes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
    wrong = [node.name for node in classes if compares_arrays(node)]
    assert not wrong, f"{file.name}: give {', '.join(wrong)} eq=False"
