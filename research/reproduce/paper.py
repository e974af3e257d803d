"""The figures of the paper's tables, as printed.

They follow the paper's own protocol: its videos, split and driving are not stated. They are orientation, not a
comparison.
"""

PAPER = "(paper, its own protocol)"
COLUMNS = ("SSIM", "PSNR", "LPIPS", "LMD", "AVConf")


def _row(*values: float | None) -> dict[str, float | None]:
    return dict(zip(COLUMNS, values, strict=True))


# Table 1: {data set: {method: row}}. Only the third data set has Geneface++.
PAPER_TABLE1: dict[str, dict[str, dict[str, float | None]]] = {
    "HDTF": {
        "Ground Truth": _row(1, None, 0, 0, 8.960),
        "Wav2Lip": _row(0.759, 20.354, 0.138, 4.452, 8.451),
        "PC-AVS": _row(0.756, 22.483, 0.154, 4.926, 8.694),
        "ER-NeRF": _row(0.932, 30.214, 0.035, 2.914, 6.936),
        "RAD-NeRF": _row(0.939, 29.911, 0.063, 2.976, 6.480),
        "GaussianTalker": _row(0.964, 32.622, 0.024, 2.074, 7.507),
        "HiCoDe": _row(0.983, 37.767, 0.013, 1.819, 8.428),
    },
    "Testset 1": {
        "Ground Truth": _row(1, None, 0, 0, 8.610),
        "Wav2Lip": _row(0.659, 15.950, 0.289, 5.309, 7.809),
        "PC-AVS": _row(0.787, 21.579, 0.140, 6.678, 7.544),
        "ER-NeRF": _row(0.965, 35.221, 0.018, 2.619, 5.708),
        "RAD-NeRF": _row(0.959, 33.849, 0.039, 2.824, 6.644),
        "GaussianTalker": _row(0.973, 36.637, 0.019, 2.211, 6.389),
        "HiCoDe": _row(0.983, 38.107, 0.010, 1.528, 7.961),
    },
    "Testset 2": {
        "Ground Truth": _row(1, None, 0, 0, 8.442),
        "Wav2Lip": _row(0.647, 19.507, 0.217, 3.544, 7.943),
        "PC-AVS": _row(0.757, 22.557, 0.156, 4.771, 8.809),
        "ER-NeRF": _row(0.819, 28.297, 0.060, 2.850, 6.309),
        "RAD-NeRF": _row(0.838, 28.715, 0.133, 3.207, 6.443),
        "Geneface++": _row(0.825, 28.763, 0.119, 3.019, 7.229),
        "GaussianTalker": _row(0.962, 33.195, 0.021, 2.095, 6.579),
        "HiCoDe": _row(0.985, 39.892, 0.014, 1.216, 7.861),
    },
}
# Table 1: (training time, frames per second), on the paper's GPU.
PAPER_SPEED = {
    "Wav2Lip": ("–", 15), "PC-AVS": ("–", 31), "ER-NeRF": ("3 h", 34), "RAD-NeRF": ("8 h", 38),
    "Geneface++": ("22 h", 24), "GaussianTalker": ("2 h", 98), "HiCoDe": ("30 min", 157),
}  # fmt: skip
# Table 2: {row of ABLATIONS: figures}.
PAPER_TABLE2: dict[str, dict[str, float | None]] = {
    "without-3dmm": _row(0.970, 35.042, 0.023, 2.187, 5.706),
    "without-landmarks": _row(0.979, 37.564, 0.018, 1.868, 7.460),
    "none": _row(0.969, 32.614, 0.027, 5.281, 3.597),
    "addition": _row(0.970, 34.749, 0.021, 2.418, 3.847),
    "attention": _row(0.968, 33.511, 0.026, 2.966, 2.934),
    "random-init": _row(0.974, 37.141, 0.013, 1.998, 7.386),
    "without-hfec": _row(0.957, 31.738, 0.037, 4.258, 3.476),
    "full": _row(0.984, 38.285, 0.011, 1.511, 8.403),
}
