"""The numbered examples: short, explained, and they run."""

import ast
import asyncio
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.fake_avatar import FakeAvatar, speechlike

FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hello(tmp_path) -> str:
    path = tmp_path / "hello.wav"
    soundfile.write(path, np.float32(0.5) * speechlike(2.0), 16_000)
    return str(path)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_an_example_is_short_and_explained(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60 and ast.get_docstring(ast.parse(text))


def test_examples_are_numbered():
    assert [int(file.stem[:2]) for file in EXAMPLES] == list(range(1, len(EXAMPLES) + 1))


@pytest.mark.slow
def test_speak(hello, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # the machine's key
    assert load("01_speak").main(FakeAvatar(), hello, str(tmp_path / "out.mp4")).stat().st_size > 1000


def test_stream(hello):
    assert load("02_stream").main(FakeAvatar(), hello) == 50


def test_live_loop(hello):
    spoke = load("03_live_loop").main(FakeAvatar(), hello, 2.0)
    assert any(spoke) and not spoke[0] and not spoke[-1]


def test_livekit(hello):
    pytest.importorskip("livekit.agents", reason="livekit-agents is not installed: pip install 'hicode[livekit]'")
    example = load("04_livekit")
    assert asyncio.iscoroutinefunction(example.entrypoint) and asyncio.iscoroutinefunction(example.worker)


def test_pipecat(hello):
    pytest.importorskip("pipecat", reason="pipecat-ai is not installed: pip install 'hicode[pipecat]'")
    counter = asyncio.run(asyncio.wait_for(load("05_pipecat").main(FakeAvatar(), hello), 100))
    assert counter.sound == 50 and counter.pictures > 5


def test_fastrtc():
    pytest.importorskip("fastrtc", reason="fastrtc is not installed; 06_fastrtc.py needs it")

    async def scenario():
        handler = load("06_fastrtc").Echo(FakeAvatar()).copy()
        await handler.start_up()
        await handler.receive((24_000, np.zeros((1, 4800), np.int16)))
        picture, (rate_hz, sound) = await handler.video_emit(), await handler.emit()
        await handler.shutdown()
        return picture, rate_hz, sound

    picture, rate_hz, sound = asyncio.run(asyncio.wait_for(scenario(), 100))
    assert picture.ndim == 3 and rate_hz == 24_000 and sound.shape == (1, 960)
