"""HuBERT (Hsu et al. 2021), the paper's encoder, through transformers and from a local folder of weights."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from hicode.audio import SAMPLES_PER_FEATURE
from hicode.errors import InputError
from hicode.files import sha256_of
from hicode.speech.encoders.windowed import Window, WindowedEncoder

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_variant(folder: Path | str) -> str:
    """Hash of the weights in a folder. Raises InputError where there are none."""
    folder = Path(folder)
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise InputError(
            f"No HuBERT model at {folder}: a folder with config.json and {' or '.join(WEIGHT_FILES)} is needed. "
            "Name it with --encoder-weights, or use --encoder embedded."
        )
    return sha256_of(file)[:16]


class HubertEncoder(WindowedEncoder):
    """The last hidden layer of a HuBERT model, 768-d for the base model.

    It sees 8 s, of which 2 s are read, so a live stream is 4 s late. `variant` is a hash of the weights. Raises
    InputError where transformers or the weights are missing.
    """

    name = "hubert"
    window = Window(lead=200, hop=100, look=100)
    batch = 2

    def __init__(self, weights: str | Path):
        folder = Path(weights)
        variant = weights_variant(folder)
        try:
            from transformers import HubertModel
        except ImportError as error:
            raise InputError(
                "The hubert encoder needs transformers: pip install 'hicode[hubert]', or use --encoder embedded."
            ) from error
        try:
            self._model = HubertModel.from_pretrained(str(folder), local_files_only=True).eval()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"The HuBERT model at {folder} cannot be read ({reason}). Copy it anew, or use --encoder embedded."
            ) from error
        self.dim = self._model.config.hidden_size
        self.weights, self.variant = str(folder.resolve()), variant

    def _rows(self, audio: Float[Tensor, "n"], state: Any) -> Float[Tensor, "t c"]:
        return audio.reshape(-1, SAMPLES_PER_FEATURE)

    @torch.no_grad()
    def _features(self, rows: Float[Tensor, "b w c"]) -> Float[Tensor, "b hop d"]:
        # A row's receptive field is 400 samples: 40 more at each end of the window centre every row on its own 20 ms.
        audio = F.pad(rows.flatten(1), (40, 40))
        hidden = self._model(audio).last_hidden_state
        assert hidden.shape[1] == self.window.rows, hidden.shape
        return hidden[:, self.window.lead : self.window.lead + self.window.hop]
