"""What the command line said."""


def the_one_line(capfd) -> str:
    """The complaint; progress may stand before it."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hicode:") or "Traceback" in line]
    assert len(lines) == 1, lines
    return lines[0]
