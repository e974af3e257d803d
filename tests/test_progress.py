"""Progress off a terminal: a line now and then with the time left, and nothing where it is not wanted."""

import hicode.progress as progress_module
from hicode.progress import progress_bar


def test_off_a_terminal_a_line_says_how_far_and_how_long(monkeypatch, capfd):
    monkeypatch.setattr(progress_module, "_QUIET_S", 0.0)
    with progress_bar("Working") as report:
        report(3, 10)
        report(10, 10)
    said = capfd.readouterr()
    assert "Working: 3 of 10" in said.err and "left" in said.err and said.out == ""
    assert "10 of 10" not in said.err, "the end needs no line"


def test_hidden_progress_says_nothing(monkeypatch, capfd):
    monkeypatch.setattr(progress_module, "_QUIET_S", 0.0)
    with progress_bar("Working", show=False) as report:
        report(3, 10)
    assert capfd.readouterr() == ("", "")
