"""Errors a person can act on: each names the thing, the finding and the remedy.

A `HicodeError` is the user's to mend: the command line prints it as one line and exits with status 2. Broken invariants
of our own are assertions, and stay tracebacks.
"""


class HicodeError(Exception):
    """A finding the user can act on; `str(error)` is the whole message, one line."""


class InputError(HicodeError):
    """A video, audio or option that cannot be used as it is."""


class FileFormatError(HicodeError):
    """A clip, avatar or other file of ours that is damaged, foreign, or from a newer version."""


class AssetError(HicodeError):
    """A pretrained part that could not be fetched or whose checksum is wrong."""


class OutputError(HicodeError):
    """A place that cannot be written: missing rights, full disk."""


class ResourceError(HicodeError):
    """Memory that will not suffice, foreseen: says how much is needed, how much is free, and what needs less."""


class TrainingError(HicodeError):
    """Training that cannot go on: a NaN (names step, term and tensor)."""
