"""Finished cells of a table, with made-up figures."""


def a_cell(name="one", row="full", seed=0, psnr=30.0, cross=None) -> dict:
    figures = {r: {"psnr": psnr, "ssim": 0.9, "lpips": 0.1} for r in ("frame", "head", "mouth")}
    figures |= {"lmd_px": 2.0, "sync_margin": None, "jitter_px": 0.5}
    figures["motion"] = {"opening_ccc": 0.6, "width_ccc": 0.5, "opening_amplitude": 0.8, "width_amplitude": 0.7}
    figures["motion"]["closed_share_ratio"] = 0.9
    report = {m: dict(figures) for m in ("control", "tracked", "audio")} | {
        "ground_truth": dict(figures, frame={"psnr": None, "ssim": 1.0, "lpips": 0.0})
    }
    return {
        "clip": {"name": name},
        "row": row,
        "preset": "draft",
        "seed": seed,
        "cross": cross,
        "report": report | {"fps": 12.0, "seconds": {"head": 60.0}},
    }
