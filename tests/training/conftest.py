"""Fixtures of speech training."""

from helpers.speech_world import generic, world

__all__ = ["generic", "world"]
