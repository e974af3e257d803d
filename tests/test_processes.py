"""Runs that meet each other, are stopped, or find no place to write."""

import io
import os
import signal
import sys
import threading

import pytest

from hicode import cli, files, runtime
from hicode.errors import OutputError
from hicode.files import atomic_path, in_use, temporary_folder


def run_command(monkeypatch, body, name="speak") -> int:
    def command() -> None:
        """Do it."""
        body()

    monkeypatch.setitem(cli.COMMANDS, name, (lambda argv: command, ""))
    return cli.main([name])


def test_a_folder_in_use_is_refused_and_named(tmp_path):
    with in_use(tmp_path / "clip"):
        with (
            pytest.raises(OutputError, match=f"in use by another hicode .process {os.getpid()}"),
            in_use(tmp_path / "clip"),
        ):
            pass
        with in_use(tmp_path / "other"):
            pass
        assert (tmp_path / ".clip.lock").exists(), "the refused one leaves the lock"
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_does_not_hold(tmp_path):
    (tmp_path / ".clip.lock").write_text("123\n")
    with in_use(tmp_path / "clip"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Also what it left within: a video that is written, then signed, has temporary files of temporary files."""
    left = tmp_path / ".hicode-tmp-0123456789ab"
    (left / ".hicode-tmp-ba9876543210").mkdir(parents=True)
    (left / "other.mp4").write_text("half")
    (tmp_path / ".hicode-tmp-of-somebody").mkdir()
    with atomic_path(tmp_path / "out.mp4") as first, temporary_folder(tmp_path) as second:
        assert first.parent.exists() and second.exists() and not left.exists()
        first.write_text("a")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hicode-tmp-of-somebody", "out.mp4"]


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), ("SIGHUP", 143), ("SIGINT", 130)])
def test_a_signal_cleans_up_and_says_what_is_kept(tmp_path, monkeypatch, capfd, request, number, status):
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("this runner runs tests beside the main thread, where Python sets no signal handlers")

    # Background jobs of a shell begin with some of them ignored, and those stay so.
    usual = signal.default_int_handler if number == "SIGINT" else signal.SIG_DFL
    before = signal.signal(getattr(signal, number), usual)
    request.addfinalizer(lambda: signal.signal(getattr(signal, number), before))

    def stopped() -> None:
        with atomic_path(tmp_path / "out.mp4"):
            signal.raise_signal(getattr(signal, number))

    assert run_command(monkeypatch, stopped) == status
    assert list(tmp_path.iterdir()) == [] and "Nothing is kept" in capfd.readouterr().err
    assert run_command(monkeypatch, stopped, "train") == status
    assert "The avatar so far and the last checkpoint are kept; to go on: hicode train" in capfd.readouterr().err
    assert signal.getsignal(getattr(signal, number)) == usual


def test_a_name_that_the_console_cannot_print_fails_nothing(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert run_command(monkeypatch, lambda: print("声.mp4 \udcff: 10 frames")) == 0
    console.flush()
    assert b"u58f0.mp4" in console.buffer.getvalue()


def test_compiled_code_gets_a_folder_where_there_is_none(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    with runtime.find_compile_cache() as place:
        assert place is None
    monkeypatch.setattr(runtime, "can_write", lambda folder: False)
    with runtime.find_compile_cache() as place:
        assert place is not None
        assert os.environ["NUMBA_CACHE_DIR"] == str(place) and place.stat().st_mode & 0o077 == 0
    assert place is not None and "NUMBA_CACHE_DIR" not in os.environ and not place.exists()


def test_no_place_for_temporary_files_is_one_line(monkeypatch, capfd):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(runtime, "can_write", lambda folder: False)

    def full(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(files, "temporary_folder", full)
    assert run_command(monkeypatch, lambda: None) == 2
    assert "Set TMPDIR" in capfd.readouterr().err
