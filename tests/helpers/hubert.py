"""A tiny HuBERT with random weights, in a folder, as its users have a trained one."""

from pathlib import Path

import pytest
import torch


def tiny_hubert(folder: Path, seed: int = 0) -> Path:
    """Skips the test where transformers is missing."""
    transformers = pytest.importorskip("transformers", reason="the hubert encoder needs transformers")
    torch.manual_seed(seed)
    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.HubertModel(config).save_pretrained(folder)
    return folder
