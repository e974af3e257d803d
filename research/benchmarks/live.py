"""`hicode serve` measured in Chromium on this machine: delays, frames a second, lips against sound, memory, leaks.

    python -m research.benchmarks.live AVATAR -o docs/results/live.json

Delays are the page's own: from the key to the picture that shows, read from a stamp in the picture. Server, renderer
and browser share the machine, and with whatever else runs: the load is recorded beside the figures.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from hicode.audio import FPS
from research.reproduce.docs import save_results

FLAGS = (
    "--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
SENTENCES = (
    "Hello, it is good to see you.", "The weather is fine today.", "Tell me more about your work.",
    "I have learned this from a short video.", "Would you like to hear another sentence?",
)  # fmt: skip
TALK = " ".join(4 * (SENTENCES + ("This goes on for quite some time, so that queues would grow if they could.",)))
WAIT_MS = 180_000
Rows = list[tuple[str, str]]


def cpu_s(pid: int) -> float:
    """User and system time of a process, s."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Its renderer processes."""
    out = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in out.splitlines() if "spawn_main" in line]


def browser_cpu_s(server: int) -> float:
    """User and system time of this program's other children and theirs, s: the browser and what drives it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    total, family = 0.0, {os.getpid()}
    for pid in sorted(parents):  # children have larger numbers than their parents
        if parents[pid] in family and pid != server:
            family.add(pid)
            with contextlib.suppress(OSError):
                total += cpu_s(pid)
    return total


def memory_mb(pid: int) -> float:
    """Resident memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def resources(pid: int) -> dict[str, float]:
    """What a dropped session could leave."""
    return {
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "files and sockets": len(os.listdir(f"/proc/{pid}/fd")),
        "processes": len(children(pid)),
        "shared memory": len([name for name in os.listdir("/dev/shm") if name.startswith("psm_")]),
        "MB": memory_mb(pid),
    }


@contextlib.contextmanager
def running(folder: Path, training: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
    """A server of a folder of avatars: its process and link. `training`: options of what it learns."""
    command = [sys.executable, "-m", "research.benchmarks.live_server", str(folder), *training]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert server.stdout is not None
        found = re.search(r"(\d+) Open (http://\S+)", server.stdout.readline())
        assert found is not None, "the server did not start"
        yield int(found[1]), found[2]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


class Page:
    """The page with one conversation."""

    def __init__(self, browser, link: str):
        self.page = browser.new_page(viewport={"width": 1280, "height": 800}, bypass_csp=True)
        self.page.set_default_timeout(WAIT_MS)
        self.page.add_init_script(path=str(Path(__file__).with_suffix(".js")))
        self.page.goto(link)

    def begin(self) -> None:
        """Call the avatar; returns with the first picture."""
        self.page.get_by_role("button", name="Talk with Subject").click()
        self.page.wait_for_selector("#waiting", state="hidden")
        self.page.evaluate("live.watch()")

    def state(self, name: str) -> None:
        """Wait for it."""
        self.page.wait_for_function(f"document.getElementById('state').textContent === '{name}'")

    def shown(self) -> list[dict]:
        """Pictures shown, each once."""
        return self.page.evaluate("live.shown")

    def say(self, text: str) -> float:
        """Type a text; the time of its sending by the page's clock."""
        self.page.fill("#text", text)
        return self.page.evaluate("document.getElementById('say').requestSubmit(), performance.now()")

    def first_after(self, at: float, condition: str, timeout_ms: float = 30_000) -> float | None:
        """ms until a picture is shown for which the condition on `p` holds; None: not within the time."""
        find = f"live.shown.find((p) => p.at > {at} && {condition})?.at"
        with contextlib.suppress(Exception):
            self.page.wait_for_function(find, timeout=timeout_ms)
            return self.page.evaluate(find) - at
        return None


def delays(page: Page, count: int) -> Rows:
    """Text to the first spoken picture; interruption to the resting mouth."""
    spoken, rest, stale, lost = [], [], [], 0
    for k in range(count):
        page.state("idle")
        time.sleep(0.5)
        begun = page.say(SENTENCES[k % len(SENTENCES)])
        if (delay := page.first_after(begun, "p.speech")) is None:
            lost += 1
            continue
        spoken.append(delay)
        time.sleep(0.5)
        before = page.shown()[-1]["cleared"]
        at = page.page.evaluate("document.getElementById('interrupt').click(), performance.now()")
        # The first picture after the interruption is half-way to rest, the second is at rest.
        find = f"p.cleared !== {before} && !p.speech && live.shown.filter((q) => q.at > {at} && q.at <= p.at && q.cleared !== {before}).length >= 2"  # noqa: E501
        if (delay := page.first_after(at, find)) is not None:
            rest.append(delay)
            stale.append(sum(p["at"] > at and p["cleared"] == before for p in page.shown()))
    return [
        ("text to first spoken picture shown, ms: median / p95", _spread(spoken)),
        ("of how many texts", f"{len(spoken)}, {lost} not within 30 s"),
        ("interruption to resting mouth shown, ms: median / p95", _spread(rest)),
        ("pictures of before shown after an interruption: median / most", _most(stale)),
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.0f} / {np.percentile(values, 95):.0f}"


def _most(values: list[int]) -> str:
    return f"{statistics.median(values):.0f} / {max(values)}" if values else "–"


def beeps(path: Path, seconds: int) -> None:
    """A beep of 120 ms each second, at the beginning of a frame."""
    t = np.arange(48_000) / 48_000
    second = np.where(t < 0.12, 0.5 * np.sin(2 * np.pi * 600 * t), 0.0)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 48_000, 0, "NONE", ""))
        file.writeframes((np.tile(second, seconds) * 32767).astype(np.int16).tobytes())


def lips(page: Page, folder: Path) -> str:
    """Sound against picture, ms: a flash in the picture and the beep of the same tick. + : the picture is late."""
    beeps(folder / "beeps.wav", 12)
    page.page.evaluate("live.hear(); live.loud.length = 0")
    begun = page.page.evaluate("performance.now()")
    page.page.set_input_files("#sound", str(folder / "beeps.wav"))
    page.state("speaking")
    page.state("idle")
    page.page.evaluate("live.audio.close()")
    heard = [at for at in page.page.evaluate("live.loud") if at > begun]
    shown, flashes, dark = page.shown(), [], True
    for p in shown:
        if p["at"] > begun and p["loud"] and dark:
            flashes.append(p["at"])
        dark = not p["loud"]
    offsets = [min((flash - at for flash in flashes), key=abs) for at in heard] if flashes else []
    offsets = [offset for offset in offsets if abs(offset) < 450]
    if not offsets:
        return "–"
    return f"{statistics.median(offsets):+.0f} ({len(offsets)} of {len(heard)} beeps)"


def counters(link: str) -> dict[str, float]:
    """The server's metrics."""
    address = link.split("/?")[0] + "/metrics"
    with urllib.request.urlopen(address.replace("localhost", "127.0.0.1"), timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def talk(page: Page, link: str, pid: int, minutes: float) -> Rows:
    """Talk without a pause."""
    sent = counters(link)
    start, (renderer, *_) = page.page.evaluate("performance.now()"), children_of_session(pid)
    cpu, began = (cpu_s(pid), cpu_s(renderer), browser_cpu_s(pid)), time.monotonic()
    before = page.page.evaluate("live.stats()")
    memory: list[float] = []
    while time.monotonic() - began < 60 * minutes:
        page.say(TALK)
        page.state("speaking")
        if time.monotonic() - began > 45 * minutes / 10 or not memory:
            memory.append(memory_mb(pid) + memory_mb(renderer))
        page.state("idle")
    memory.append(memory_mb(pid) + memory_mb(renderer))
    took = time.monotonic() - began
    sent = {name: value - sent[name] for name, value in counters(link).items()}
    frames = max(sent["hicode_frames_total"], 1)
    after = page.page.evaluate("live.stats()")
    end = page.page.evaluate("performance.now()")
    pictures = sum(start < p["at"] < end for p in page.shown())
    energy = after["audio"]["totalAudioEnergy"] - before["audio"]["totalAudioEnergy"]
    decoded = after["video"]["framesDecoded"] - before["video"]["framesDecoded"]
    jitter = [1e3 * after[k]["jitterBufferDelay"] / max(after[k]["jitterBufferEmittedCount"], 1) for k in after]
    return [
        ("minutes of talk", f"{took / 60:.1f}"),
        ("frames sent a second", f"{frames / took:.1f}"),
        ("of them late by, ms: mean", f"{1e3 * sent['hicode_late_seconds_total'] / frames:.0f}"),
        ("of them with a picture of their own", f"{100 - 100 * sent['hicode_frames_repeated_total'] / frames:.0f} %"),
        ("pictures received a second", f"{decoded / took:.1f}"),
        ("new pictures shown a second", f"{pictures / took:.1f}"),
        ("sound: energy received", f"{energy:.2f}"),
        ("browser's buffer, ms: " + " / ".join(after), " / ".join(f"{value:.0f}" for value in jitter)),
        ("server and renderer, MB: after a tenth / at the end", f"{memory[0]:.0f} / {memory[-1]:.0f}"),
        ("server, share of a core", f"{(cpu_s(pid) - cpu[0]) / took:.2f}"),
        ("renderer, share of a core", f"{(cpu_s(renderer) - cpu[1]) / took:.2f}"),
        ("browser, share of a core", f"{(browser_cpu_s(pid) - cpu[2]) / took:.2f}"),
        ("renderer, ms of a core a new picture", f"{1e3 * (cpu_s(renderer) - cpu[1]) / max(pictures, 1):.0f}"),
    ]


def children_of_session(pid: int) -> list[int]:
    """Renderers, the busiest first."""
    return sorted(children(pid), key=cpu_s, reverse=True)


def dropped(browser, link: str, pid: int, count: int) -> Rows:
    """Sessions that begin and are left in any state: what stays."""

    def once(k: int) -> None:
        page = Page(browser, link)
        page.page.get_by_role("button", name="Talk with Subject").click()
        if k % 3:
            page.page.wait_for_selector("#waiting", state="hidden")
        if k % 3 == 2:
            page.say(SENTENCES[0])
            time.sleep(1)
        page.page.close()

    def settled() -> dict[str, float]:
        deadline = time.monotonic() + 90
        while len(children(pid)) > 1 and time.monotonic() < deadline:
            time.sleep(1)
        time.sleep(3)
        return resources(pid)

    once(1)
    before = settled()
    for k in range(count):
        once(k)
    after = settled()
    change = ", ".join(f"{name} {after[name] - before[name]:+.0f}" for name in before)
    return [(f"left by {count} dropped sessions", change)]


def measure(avatar: Path, texts: int, minutes: float, drops: int, folder: Path) -> Rows:
    """All of it."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] - for this benchmark

    rows: Rows = [("machine's load before", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")]
    (folder / "avatars").mkdir()
    shutil.copy(avatar, folder / "avatars/Subject.hicode")
    with sync_playwright() as started, running(folder / "avatars") as (pid, link):
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        page = Page(browser, link)
        began = time.monotonic()
        page.begin()
        rows.append(("from the click to the first picture, s", f"{time.monotonic() - began:.1f}"))
        rows += delays(page, texts)
        rows.append(("picture against sound at the beginning, ms", lips(page, folder)))
        rows += talk(page, link, pid, minutes)
        rows.append(("picture against sound at the end, ms", lips(page, folder)))
        page.page.close()
        rows += dropped(browser, link, pid, drops)
        browser.close()
    rows.append(("machine's load after", f"{os.getloadavg()[0]:.1f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatar", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results/live.json"))
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--drops", type=int, default=10)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        rows = measure(options.avatar, options.texts, options.minutes, options.drops, Path(folder))
    for name, value in rows:
        print(f"{name}: {value}")
    command = f"python -m research.benchmarks.live AVATAR --texts {options.texts} --minutes {options.minutes:g}"
    save_results(options.out, ("figure", f"512 px, {FPS:.0f} frames a second"), rows, command)


if __name__ == "__main__":
    main()
