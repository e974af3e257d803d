"""AVConf: SyncNet's confidence (LSE-C), distance (LSE-D) and offset, with weights that the user brings.

Chung & Zisserman 2016, "Out of time". Two towers map a fifth of a second each to 1024 numbers: five frames of a face
crop, 224 x 224, and the 20 rows of 13 MFCC that sound with them. Window i starts at frame i and at MFCC row 4i; t
frames give t - 5 windows, as the published code counts them. For each of 31 offsets -15 ... 15 the distances of picture
window i and sound window i - offset are averaged over the clip (the clip's ends against zeros):

    LSE-D   the least mean distance            LSE-C   the median over offsets less the least
    offset  where the least is; positive: the mouth comes after its sound (as in hicode.speech.sync)

The weights, `syncnet_v2.model` of the authors, may not be shipped; without that file nothing is called AVConf. It is
read with torch's `weights_only`, which runs no code.

What differs from the authors' pipeline, and moves LSE-C and LSE-D a little: the face box is that of the landmarks (brow
to chin, cheek to cheek, as WIDER FACE draws boxes) and not S3FD's; nothing is re-encoded on the way (the authors store
crops as XVID and JPEG); scenes are not cut. Compare a figure with the ground-truth row, not with a table.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from scipy.fft import dct
from scipy.signal import medfilt
from torch import Tensor, nn

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.errors import FileFormatError

MAX_OFFSET = 15  # frames; 31 offsets in all
WINDOW_FRAMES, WINDOW_ROWS, ROWS_PER_FRAME = 5, 20, 4
CROP_PX, CROP_SCALE, MEDIAN_FRAMES, PAD_LEVEL = 224, 0.4, 13, 110
MIN_FRAMES = 2 * MAX_OFFSET + WINDOW_FRAMES + 1  # below it the zeros at the ends decide
BATCH = 8


@dataclass(frozen=True)
class AVConf:
    """LSE-C (higher is better), LSE-D (lower is better), and the offset: positive where the mouth is later."""

    confidence: float
    distance: float
    offset_frames: int


def _block(convolution: nn.Module, norm: type[nn.Module]) -> list[nn.Module]:
    return [convolution, norm(convolution.out_channels), nn.ReLU()]


class SyncNet(nn.Module):
    """Both towers. The names of the parts are those in the weights' file; nothing trains here."""

    def __init__(self, dim: int = 1024):
        super().__init__()
        c2, c3 = nn.BatchNorm2d, nn.BatchNorm3d
        self.netcnnaud = nn.Sequential(  # 13 x 20 → 512
            *_block(nn.Conv2d(1, 64, 3, padding=1), c2), nn.MaxPool2d(1, 1),
            *_block(nn.Conv2d(64, 192, 3, padding=1), c2), nn.MaxPool2d(3, (1, 2)),
            *_block(nn.Conv2d(192, 384, 3, padding=1), c2),
            *_block(nn.Conv2d(384, 256, 3, padding=1), c2),
            *_block(nn.Conv2d(256, 256, 3, padding=1), c2), nn.MaxPool2d(3, 2),
            *_block(nn.Conv2d(256, 512, (5, 4)), c2),
        )  # fmt: skip
        self.netcnnlip = nn.Sequential(  # 5 x 224 x 224 → 512
            *_block(nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2)), c3), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), c3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)), c3),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)), c3),
            *_block(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1)), c3), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_block(nn.Conv3d(256, 512, (1, 6, 6)), c3),
        )  # fmt: skip
        self.netfcaud, self.netfclip = (
            nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, dim)) for _ in range(2)
        )
        self.eval().requires_grad_(False)

    @staticmethod
    def load(path: Path | str) -> "SyncNet":
        """The user's weights. FileFormatError, naming file and finding, for anything else; no code in it is run."""
        path = Path(path)
        if not path.is_file():
            raise FileFormatError(
                f"{path} does not exist or is no file. Give SyncNet's syncnet_v2.model with --syncnet, or leave it out."
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file fails in any of a dozen ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileFormatError(
                f"{path} is not a file of plain tensors ({reason}). Give SyncNet's syncnet_v2.model with --syncnet."
            ) from error
        net = SyncNet()
        target = net.state_dict()
        optional = {k for k in target if k.endswith("num_batches_tracked")}  # older files lack them; nothing reads them
        finding = _unlike(state, target, optional)
        if finding is None:
            net.load_state_dict({k: v for k, v in state.items() if k not in optional}, strict=False)
            bad = next((k for k, v in net.state_dict().items() if not torch.isfinite(v.float()).all()), None)
            finding = bad and f"has values in {bad} that are not numbers"
        if finding:
            raise FileFormatError(f"{path} {finding}: not SyncNet's weights. Give an undamaged syncnet_v2.model.")
        return net

    def stream(self, points: Float[np.ndarray, "t 478 c"]) -> "LipStream":
        """See `hicode.evaluation.config.LipScores`."""
        return LipStream(self, crop_boxes(points))

    @torch.inference_mode()
    def hear(self, rows: Float[Tensor, "n 13"]) -> Float[Tensor, "m d"]:
        """Sound windows: four MFCC rows apart, 20 long; as many as fit."""
        windows = rows.T.unfold(1, WINDOW_ROWS, ROWS_PER_FRAME).permute(1, 0, 2)[:, None].float()
        return torch.cat([self.netfcaud(self.netcnnaud(w).flatten(1)) for w in windows.split(64)])

    @torch.inference_mode()
    def see(self, windows: Float[Tensor, "b 3 5 224 224"]) -> Float[Tensor, "b 1024"]:
        """Picture windows of BGR in 0 ... 255, as the network was taught."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))


def _unlike(state: object, target: dict[str, Tensor], optional: set[str]) -> str | None:
    """What distinguishes a file's content from SyncNet's tensors; None if nothing does."""
    if not isinstance(state, dict):
        return f"holds a {type(state).__name__}"
    for name, tensor in target.items():
        found = state.get(name)
        if name in optional and found is None:
            continue
        if not isinstance(found, Tensor) or found.shape != tensor.shape:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else "nothing"
            return f"has {what} for {name}, not {tuple(tensor.shape)}"
    extra = sorted(set(state) - set(target))
    return f"holds {extra[0]}, which SyncNet has not" if extra else None


class LipStream:
    """Frames in, one at a time, in constant memory; the windows' features, or the score, out at the end."""

    def __init__(self, net: SyncNet, boxes: Float[np.ndarray, "t 3"] | None = None):
        """`boxes`: the face in each frame, as `crop_boxes` has them."""
        self.net, self.boxes, self.frames = net, boxes, 0
        self._recent: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []
        self._done: list[Tensor] = []

    def push(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """The next frame, RGB; without boxes it is the crop itself."""
        picture = frame if self.boxes is None else crop(frame, self.boxes[self.frames])
        self.frames += 1
        self._recent = [*self._recent[-(WINDOW_FRAMES - 1) :], picture[..., ::-1]]
        if len(self._recent) == WINDOW_FRAMES:
            self._waiting.append(np.stack(self._recent))
            if len(self._waiting) == BATCH:
                self._run()

    def finish(self) -> Float[Tensor, "m d"]:
        """t - 4 windows of t frames."""
        if self._waiting:
            self._run()
        return torch.cat(self._done) if self._done else torch.zeros(0, 1024)

    def score(self, samples: Float32[np.ndarray, "n"]) -> dict | str:
        """AVConf with the sound at 16 kHz, or why there is none."""
        frames = min(self.frames, len(samples) // SAMPLES_PER_FRAME)
        if frames < MIN_FRAMES:
            return f"{frames} frames, at least {MIN_FRAMES} are needed"
        last = frames - WINDOW_FRAMES
        return asdict(score(self.finish()[:last], self.net.hear(torch.from_numpy(mfcc(samples)))[:last]))

    def _run(self) -> None:
        batch = torch.from_numpy(np.stack(self._waiting)).permute(0, 4, 1, 2, 3).float()
        self._done.append(self.net.see(batch))
        self._waiting = []


def score(seen: Float[Tensor, "n d"], heard: Float[Tensor, "m d"]) -> AVConf:
    """LSE-C, LSE-D and the offset from the windows' features; the longer of the two is cut."""
    n = min(len(seen), len(heard))
    seen, padded = seen[:n], F.pad(heard[:n], (0, 0, MAX_OFFSET, MAX_OFFSET))
    # Distance of picture i and sound i + k, for shifts k from -15 to 15; the 1e-6 is torch's and the published code's.
    mean = torch.stack([F.pairwise_distance(seen, padded[k : k + n]).mean() for k in range(2 * MAX_OFFSET + 1)])
    best = int(mean.argmin())
    return AVConf(float(mean.median() - mean[best]), float(mean[best]), MAX_OFFSET - best)


# --- the sound

_FRAME, _STEP, _FFT, _FILTERS, _CEPSTRA, _LIFTER, _EMPHASIS = 400, 160, 512, 26, 13, 22, 0.97


def mfcc(samples: Float32[np.ndarray, "n"]) -> Float[np.ndarray, "rows 13"]:
    """13 MFCC of 25 ms every 10 ms, as SyncNet was trained on; sound is padded with zeros to whole frames.

    16-bit scale, pre-emphasis .97, no window, 26 triangles on the HTK mel scale up to 8 kHz, orthonormal DCT-II, lifter
    22, the first coefficient the log of the frame's energy.
    """
    x = np.round(np.clip(np.asarray(samples, np.float64), -1, 1) * 32768).clip(-32768, 32767)
    x = np.concatenate([x[:1], x[1:] - _EMPHASIS * x[:-1]])
    rows = 1 + max(0, -(-(len(x) - _FRAME) // _STEP))
    x = np.pad(x, (0, max(0, (rows - 1) * _STEP + _FRAME - len(x))))
    frames = np.lib.stride_tricks.sliding_window_view(x, _FRAME)[::_STEP][:rows]
    power = np.abs(np.fft.rfft(frames, _FFT)) ** 2 / _FFT
    smallest = np.finfo(float).eps
    energy, bands = power.sum(1), power @ _triangles().T
    energy, bands = np.where(energy == 0, smallest, energy), np.where(bands == 0, smallest, bands)
    out = np.asarray(dct(np.log(bands), type=2, axis=1, norm="ortho"))[:, :_CEPSTRA]
    out *= 1 + _LIFTER / 2 * np.sin(np.pi * np.arange(_CEPSTRA) / _LIFTER)
    out[:, 0] = np.log(energy)
    return out


def _triangles() -> Float[np.ndarray, "26 257"]:
    """Triangles between whole FFT bins that lie evenly on the mel scale."""
    top = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, _FILTERS + 2) / 2595) - 1)
    corners = np.floor((_FFT + 1) * hertz / SAMPLE_RATE_HZ)
    bins = np.arange(_FFT // 2 + 1)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    # Each edge counts its own half only, its lower corner in and its upper one out.
    up = (bins >= corners[:-2, None]) & (bins < corners[1:-1, None])
    down = (bins >= corners[1:-1, None]) & (bins < corners[2:, None])
    return np.where(up, rising, 0) + np.where(down, falling, 0)


# --- the pictures


def crop_boxes(points: Float[np.ndarray, "t 478 c"]) -> Float[np.ndarray, "t 3"]:
    """Centre x, y and half the side of each frame's face box in px; NaN everywhere where no frame has a face.

    Gaps (NaN) are interpolated, then SyncNet's running median of 13 frames is taken.
    """
    points = np.asarray(points, np.float64)[:, :468, :2]
    known = np.isfinite(points).all((1, 2))
    if not known.any():
        return np.full((len(points), 3), np.nan)
    low, high = points[known].min(1), points[known].max(1)
    boxes = np.concatenate([(low + high) / 2, (high - low).max(1, keepdims=True) / 2], 1)
    times = np.arange(len(points))
    whole = np.stack([np.interp(times, times[known], column) for column in boxes.T], 1)
    return np.stack([medfilt(column, MEDIAN_FRAMES) for column in whole.T], 1) if len(whole) >= MEDIAN_FRAMES else whole


def crop(frame: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "3"]) -> UInt8[np.ndarray, "224 224 3"]:
    """SyncNet's crop: 1.4 box sizes wide about the face, from its top to 1.4 sizes below, so that the mouth is in the
    middle; grey (110) outside the frame."""
    x, y, half = box
    pad = int(half * (1 + 2 * CROP_SCALE))
    padded = cv2.copyMakeBorder(frame, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(PAD_LEVEL,) * 3)
    x, y = x + pad, y + pad
    rows = slice(max(int(y - half), 0), int(y + half * (1 + 2 * CROP_SCALE)))
    columns = slice(max(int(x - half * (1 + CROP_SCALE)), 0), int(x + half * (1 + CROP_SCALE)))
    part = padded[rows, columns]
    assert part.size, (box, frame.shape)
    return cv2.resize(part, (CROP_PX, CROP_PX))
