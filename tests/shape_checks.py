"""The type checker that the tests run under: array shapes and types, and nothing else.

Other annotations stay the static checker's: at run time an int is a good float, and tests pass fakes.
"""

import typing

from beartype import beartype
from jaxtyping import AbstractArray


def mentions_an_array(annotation: object) -> bool:
    """Whether an annotation is a jaxtyping array, or a union or container of some."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(mentions_an_array, typing.get_args(annotation)))


def check(function):
    """`beartype`, told only of the annotations with arrays."""
    annotations = getattr(function, "__annotations__", None)
    if annotations is not None and not isinstance(function, type):
        function.__annotations__ = {k: v for k, v in annotations.items() if mentions_an_array(v)}
    return beartype(function)
