"""Voice activity: the score's stream, and the gate that lets the lips rest in silence."""

import numpy as np
import pytest
import torch

from hicode.errors import FileFormatError
from hicode.files import save_tensors
from hicode.speech.voice_activity import SCHEMA, VERSION, VadConfig, VadGate, VoiceActivity


def score_of(dim: int = 6) -> VoiceActivity:
    g = torch.Generator().manual_seed(0)
    return VoiceActivity(torch.randn(dim, generator=g), torch.tensor(0.3))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 41])
def test_a_frames_score_is_the_mean_of_it_and_the_next(rows):
    model, features = score_of(), torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    each = (features @ model.weight + model.bias).double().numpy()
    expected = [each[2 * i : 2 * (i + 1 + model.AHEAD)].mean() for i in range(-(-rows // 2))]
    np.testing.assert_allclose(model.frames(features), expected, rtol=1e-5, atol=1e-6)


def test_scores_come_in_any_pieces_and_one_frame_late():
    model, features = score_of(), torch.randn(50, 6)
    stream, out = model.stream(), []
    for i, row in enumerate(features, 1):
        out.append(stream.push(row[None]))
        assert sum(map(len, out)) == max(0, i // 2 - model.AHEAD)
    np.testing.assert_allclose(np.concatenate([*out, stream.finish()]), model.frames(features), rtol=1e-5, atol=1e-6)


def test_what_is_saved_is_loaded(tmp_path):
    model = score_of()
    model.save(tmp_path / "p.safetensors", {"nobody": "no terms"})
    again = VoiceActivity.load(tmp_path / "p.safetensors")
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)
    assert again.encoder == model.encoder


def test_a_file_without_weights_is_refused(tmp_path):
    save_tensors(tmp_path / "p.safetensors", {"bias": torch.zeros(())}, SCHEMA, VERSION, {"encoder": "embedded"})
    with pytest.raises(FileFormatError, match="lacks 'weight'"):
        VoiceActivity.load(tmp_path / "p.safetensors")


def test_the_shipped_weights_load():
    model = VoiceActivity.load()
    assert model.encoder == "embedded" and model.weight.shape == (384,)


# --- the gate ---


def weights_of(rms, level: float | None = 0.1, scores=None) -> np.ndarray:
    gate = VadGate(level, scored=scores is not None)
    return np.concatenate([gate.push(np.array(rms), scores), gate.finish()])


def test_lips_rest_in_silence_and_speak_in_speech():
    weights = weights_of([0.0] * 20 + [0.1] * 20 + [0.0] * 20)
    assert len(weights) == 60
    assert not weights[:15].any() and (weights[20:40] == 1).all() and not weights[52:].any()


def test_the_mouth_opens_before_the_sound():
    weights = weights_of([0.0] * 20 + [0.1] * 20)
    assert weights[18] > 0 and weights[17] > 0 and weights[16] == 0  # three frames of look-ahead


def test_the_closure_of_a_plosive_is_not_silence():
    weights = weights_of([0.1] * 20 + [0.0] * 3 + [0.1] * 20)
    assert (weights[5:] == 1).all()  # 120 ms without sound


def test_weights_never_jump():
    rng = np.random.default_rng(0)
    weights = weights_of(rng.choice([0.0, 0.1], 300))
    assert np.abs(np.diff(weights)).max() <= 0.5  # half of the way a frame, eased


def test_weights_do_not_depend_on_how_levels_and_scores_arrive():
    rng = np.random.default_rng(0)
    rms, scores = rng.choice([0.0, 0.002, 0.01, 0.1], 100), rng.normal(-2, 1, 100)
    for level in (0.1, None):
        for scored in (False, True):
            gate = VadGate(level, scored=scored)
            pieces = [gate.push(part) for part in np.split(rms, [1, 2, 30, 77])]
            if scored:
                pieces += [gate.push(np.zeros(0), part) for part in np.split(scores, [3, 50])]
            pieces.append(gate.finish())
            np.testing.assert_array_equal(np.concatenate(pieces), weights_of(rms, level, scores if scored else None))


def test_loud_sound_that_is_no_speech_leaves_the_lips_at_rest():
    assert not weights_of([0.1] * 50, scores=np.full(50, -4.0)).any()
    assert weights_of([0.1] * 50, scores=np.full(50, 2.0))[5:].min() == 1


def test_with_scores_a_soft_part_of_speech_keeps_its_lips():
    soft = [0.1] * 10 + [0.1 * 10 ** (-36 / 20)] * 30  # -36 dB: silence by loudness alone
    assert weights_of(soft, scores=np.full(40, 2.0))[-5:].min() == 1
    assert weights_of(soft)[-5:].max() == 0


def test_quiet_recordings_still_move_the_mouth():
    quiet = np.full(200, 0.004)
    assert weights_of(quiet, level=0.004)[50:].min() == 1
    # 22 dB below a typical level: speech even before the estimate has adapted.
    assert VadGate(None).push(quiet)[-1] > 0.5


def test_the_config_says_when_the_gate_closes():
    gate = VadGate(0.1, VadConfig(hold=0, release=1, look_ahead=0))
    assert gate.push(np.array([0.1, 0.1, 0.0, 0.1])).tolist() == [0.5, 1.0, 0.0, 0.5]
