"""The whole way in one browser: upload, capture report, training, talk, interruption, download, verification.

    python -m research.benchmarks.live_journey VIDEO [--quick] [-o docs/results/live-journey.json] [--shots FOLDER]

`--quick` trains for some iterations only: it shows that the way is open, not what the avatar looks like.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import av
import numpy as np

from hicode.trust.verify import verify
from research.benchmarks.live import FLAGS, Rows, running
from research.reproduce.docs import save_results

QUICK = (
    "--head.initialise", "20", "--head.deform", "20", "--head.refine", "60", "--head.gaussians", "8000",
)  # fmt: skip
HOURS_MS = 3 * 3600 * 1000


def check(video: Path) -> str:
    """What a downloaded video holds and says of itself. AssertionError where it does not play."""
    with av.open(str(video)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    with av.open(str(video)) as container:
        loudest = max(float(np.abs(frame.to_ndarray()).max()) for frame in container.decode(audio=0))
    found = verify(video)
    assert frames > 10 and loudest > 0.01 and found.verdict == "synthetic"
    marks = f"manifest {found.manifest.state}, watermark {'found' if found.watermark.present else 'not found'}"
    return f"{frames} frames, {marks}, `hicode verify`: {found.verdict}"


def journey(video: Path, folder: Path, shots: Path, quick: bool) -> Rows:
    """Each step with its time."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] - for this benchmark

    rows: Rows = [("machine's load before", f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")]
    began = time.monotonic()

    def step(name: str, value: str = "") -> None:
        nonlocal began
        page.screenshot(path=str(shots / f"{len(rows):02}.png"), full_page=True)
        rows.append((name, f"{value}{', ' if value else ''}{time.monotonic() - began:.0f} s"))
        print(*rows[-1], sep=": ", flush=True)
        began = time.monotonic()

    with sync_playwright() as started, running(folder, QUICK if quick else ()) as (_, link):
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page.set_default_timeout(HOURS_MS)
        page.goto(link)
        page.wait_for_selector("#first", state="visible")
        page.locator("#first").click()
        page.set_input_files("#file", str(video))
        page.fill("#name", "Subject")
        page.fill("#consent", "A benchmark of public data")
        page.check("#agreed")
        page.get_by_role("button", name="Upload and learn").click()
        page.wait_for_function("document.getElementById('chosen').textContent.includes('is uploaded')")
        step("uploaded", f"{video.stat().st_size / 1e6:.1f} MB")
        page.wait_for_function("/Capture report|has failed/.test(document.getElementById('jobs').innerText)")
        step("prepared", page.inner_text("#jobs summary"))
        page.reload()  # the job is still there
        page.wait_for_function("/is done|has failed/.test(document.getElementById('jobs').innerText)")
        assert "has failed" not in page.inner_text("#jobs"), page.inner_text("#jobs")
        step("trained", "some iterations" if quick else "draft")
        page.get_by_role("button", name="Talk", exact=True).click()
        page.get_by_role("button", name="Talk with Subject").click()
        page.wait_for_selector("#waiting", state="hidden")
        step("first picture")
        page.fill("#text", "Hello. I was learned from a video, and now I say whatever you type. Stop me if you like.")
        page.get_by_role("button", name="Send").click()
        page.wait_for_function("document.getElementById('state').textContent === 'speaking'")
        page.wait_for_timeout(3000)
        step("speaks")
        page.keyboard.press("Escape")
        page.wait_for_function("document.getElementById('state').textContent === 'idle'")
        step("interrupted")
        page.wait_for_selector("#download", state="visible")
        with page.expect_download() as download:
            page.locator("#download").click()
        download.value.save_as(str(shots / "said.mp4"))
        step("downloaded", check(shots / "said.mp4"))
        browser.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shots", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/results/live-journey.json"))
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        shots = options.shots or Path(temporary) / "shots"
        shots.mkdir(parents=True, exist_ok=True)
        rows = journey(options.video, Path(temporary), shots, options.quick)
    command = f"python -m research.benchmarks.live_journey VIDEO{' --quick' if options.quick else ''}"
    save_results(options.out, ("step", "result and time"), rows, command)


if __name__ == "__main__":
    main()
