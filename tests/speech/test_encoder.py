"""Speech encoders: one contract for all three, and the embedded one against the graph it was rebuilt from."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.hubert import tiny_hubert
from hicode import assets
from hicode.errors import AssetError, InputError
from hicode.speech.encoders import EncoderSpec, create_encoder, default_spec, encoder_of, match_frames, onnx_weights
from hicode.speech.encoders.logmel import MelPower, log_mel, mel_filters
from hicode.speech.loudness import LoudnessEstimator, speech_level


def _sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise and a gliding tone, switched on and off like syllables."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    syllables = np.clip(np.sin(2 * np.pi * 3 * t), 0, 1)
    return (syllables * (0.1 * np.sin(2 * np.pi * (200 + 100 * t) * t) + 0.03 * rng.standard_normal(len(t)))).astype(
        np.float32
    )


@pytest.fixture(scope="module", params=["embedded", "hubert", "logmel"])
def encoder(request, tmp_path_factory):
    if request.param == "hubert":
        return _tiny_hubert(tmp_path_factory.mktemp("hubert"))
    if request.param == "embedded":
        return _embedded()
    return create_encoder(request.param)


def _embedded():
    try:
        return create_encoder("embedded")
    except AssetError as error:
        pytest.skip(f"the embedded encoder's package cannot be had here: {error}")


def _tiny_hubert(folder, seed: int = 0):
    tiny_hubert(folder, seed)
    return create_encoder("hubert", folder)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_fifty_features_a_second_of_the_declared_size(encoder):
    for samples in (0, 1, 319, 320, 321, 16000, 40001):
        features = encoder.encode(_sound(3)[:samples])
        assert features.shape == (-(-samples // 320), encoder.dim)
        assert features.isfinite().all()


def test_silence_gives_finite_features(encoder):
    assert encoder.encode(np.zeros(8000, np.float32)).isfinite().all()


def test_a_stream_in_any_pieces_equals_the_whole(encoder):
    sound, rng = _sound(4), np.random.default_rng(1)
    stream, parts, at = encoder.stream(speech_level(sound)), [], 0
    while at < len(sound):
        size = int(rng.integers(1, 4000))
        parts.append(stream.push(sound[at : at + size]))
        at += size
    # Batches of another size round differently: float32 sums of a few hundred terms of size one.
    torch.testing.assert_close(torch.cat([*parts, stream.finish()]), encoder.encode(sound), atol=1e-4, rtol=1e-4)


def test_a_running_level_does_not_depend_on_the_pieces(encoder):
    sound = _sound(3)

    def run(size: int) -> torch.Tensor:
        stream = encoder.stream()
        parts = [stream.push(sound[i : i + size]) for i in range(0, len(sound), size)]
        return torch.cat([*parts, stream.finish()])

    torch.testing.assert_close(run(777), run(48000), atol=1e-4, rtol=1e-4)


def test_loudness_does_not_matter(encoder):
    sound = _sound(2)
    torch.testing.assert_close(encoder.encode(sound), encoder.encode(5 * sound), atol=2e-3, rtol=1e-3)


def test_an_offset_does_not_matter(encoder):
    """A constant is no sound: neither level nor features hear it. Before the sound, where it did not sound either, is
    silence.
    """
    sound = _sound(2)
    offset = (sound + 0.3).astype(np.float32)
    assert speech_level(offset) == pytest.approx(speech_level(sound), rel=1e-3)
    # float32 holds .3 + x to 3e-8
    torch.testing.assert_close(encoder.encode(offset), encoder.encode(sound), atol=5e-3, rtol=2e-3)


def test_a_stream_is_late_by_no_more_than_it_says(encoder):
    sound, window = _sound(12 if encoder.name == "hubert" else 2), encoder.window
    late = window.hop + window.look + -(-encoder.margin // 320)
    assert len(encoder.stream(0.05).push(sound)) >= len(sound) // 320 - late


def test_the_past_beyond_the_window_is_forgotten(encoder):
    sound = _sound(20)
    other = sound.copy()
    other[: 6 * 16000] = _sound(6, seed=5)
    level = speech_level(sound)
    a, b = encoder.encode(sound, level), encoder.encode(other, level)
    settled = 6 * 50 + encoder.window.rows + 50  # the high-pass forgets within a second
    # What is remembered of steady noise fades within some seconds: a hundredth of what features differ by is left of
    # it.
    atol = 2e-2 if encoder.name == "embedded" else 1e-4
    torch.testing.assert_close(a[settled:], b[settled:], atol=atol, rtol=1e-4)


def test_a_later_sound_gives_the_same_features_later(encoder):
    """Whole hops of delay move the features and change nothing else: only what a window sees matters."""
    hop = encoder.window.hop
    sound = _sound(3)
    later = np.concatenate([np.zeros(hop * 320, np.float32), sound])
    a, b = encoder.encode(sound, 0.05), encoder.encode(later, 0.05)
    torch.testing.assert_close(a, b[hop:], atol=1e-4, rtol=1e-4)


@pytest.mark.wrong_shapes
def test_sound_that_is_not_a_number_is_refused(encoder):
    sound = _sound(1)
    sound[100] = np.nan
    with pytest.raises(InputError, match=r"1 samples that are not numbers.*first at 100"):
        encoder.encode(sound)
    with pytest.raises(InputError, match="mono"):
        encoder.encode(np.zeros((100, 2), np.float32))


# --- particulars ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embedded", "logmel"])
def test_a_click_shows_in_its_own_feature(name):
    """A burst in the middle of span j changes feature j most: features are aligned with the picture's frames."""
    encoder = _embedded() if name == "embedded" else create_encoder(name)
    base = 0.01 * _sound(3)
    burst = base.copy()
    j = 75
    burst[320 * j + 120 : 320 * j + 200] += 0.5
    change = (encoder.encode(burst, 0.05) - encoder.encode(base, 0.05)).norm(dim=1)
    assert abs(int(change.argmax()) - j) <= 1


def test_mel_filters_have_unit_area_and_known_centres():
    filters = mel_filters()
    assert filters.shape == (80, 201)
    # Above 3 kHz filters are several 40 Hz bins wide, so the sum over bins is close to the integral.
    np.testing.assert_allclose((filters * 40).sum(1)[60:], 1, atol=0.03)
    # 1 kHz is 15 mels of 45.245 in 81 steps: filter 15 / 45.245 * 81 - 1 = 25.9
    assert abs(int(filters[:, 25].argmax()) - 26) <= 1


def test_log_mel_follows_its_definition():
    """One frame against a plain discrete Fourier transform."""
    rng = np.random.default_rng(0)
    audio = rng.standard_normal(400)
    n, f = np.arange(400), np.arange(201)[:, None]
    spectrum = (audio * (0.5 - 0.5 * np.cos(2 * np.pi * n / 400)) * np.exp(-2j * np.pi * f * n / 400)).sum(1)
    expected = (np.log10(np.maximum(mel_filters() @ np.abs(spectrum) ** 2, 10**-6)) + 4) / 4
    np.testing.assert_allclose(log_mel(MelPower()(torch.from_numpy(audio).float()))[:, 0], expected, atol=1e-4)


def test_the_embedded_encoder_matches_the_graph_it_was_taken_from():
    """onnxruntime on the same 8 s window, asked for `add_268`. Its activations are int8, ours float: close only."""
    ort = pytest.importorskip("onnxruntime")
    ours = _embedded()
    path = assets.path("speech_encoder")
    # A ValueInfoProto that has only a name, appended to GraphProto.output (12) inside ModelProto.graph (7).
    tap = b"add_268"
    output = bytes([12 << 3 | 2, len(tap) + 2, 1 << 3 | 2, len(tap)]) + tap
    model = b""
    for number, value in onnx_weights._fields(memoryview(path.read_bytes())):
        if isinstance(value, int):
            model += _encode_varint(number << 3) + _encode_varint(value)
        else:
            value = bytes(value) + (output if number == 7 else b"")
            model += _encode_varint(number << 3 | 2) + _encode_varint(len(value)) + value
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    sound = _sound(8)
    mel = log_mel(ours._power(F.pad(torch.from_numpy(sound) / speech_level(sound), (200, 200))))[:, :800][None]
    (theirs,) = session.run(["add_268"], {"input_features": mel.numpy()})

    weights = onnx_weights.onnx_weights(path)
    with torch.no_grad():
        h = F.gelu(
            F.conv1d(F.gelu(F.conv1d(mel, *ours._conv1, padding=1)), *ours._conv2, stride=2, padding=1)
        ).transpose(1, 2)
        h = h + weights["inner.encoder.embed_positions.weight"]
        for layer in ours._layers:
            h = ours._layer(h, layer, slice(None))
    theirs = torch.from_numpy(theirs)
    centred = [x[0] - x[0].mean(0) for x in (h, theirs)]
    assert F.cosine_similarity(*(x.flatten() for x in centred), dim=0) > 0.9
    assert F.cosine_similarity(h.flatten(), theirs.flatten(), dim=0) > 0.95


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def test_features_are_fitted_to_the_picture():
    features = torch.arange(10.0)[:, None]
    assert match_frames(features, 3).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert match_frames(features, 6).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


def test_unknown_encoders_and_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="embedded, hubert, logmel"):
        create_encoder("wav2vec")
    with pytest.raises(InputError, match=r"needs its weights.*--encoder-weights"):
        create_encoder("hubert")
    with pytest.raises(InputError, match="No HuBERT model at"):
        create_encoder("hubert", tmp_path / "nothing")
    with pytest.raises(InputError, match="Prepare the clip with that encoder"):
        default_spec("hubert")


def test_damaged_hubert_weights_are_refused_in_one_line(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read") as refused:
        create_encoder("hubert", tmp_path)
    assert "\n" not in str(refused.value)


def test_a_spec_survives_json_and_gives_the_same_encoder(encoder):
    spec = EncoderSpec.from_json(json.loads(json.dumps(encoder.spec.to_json())))
    assert spec == encoder.spec and spec.dim == encoder.encode(_sound(0.1)).shape[1]
    assert encoder_of(spec).spec == spec
    if encoder.name != "hubert":
        assert default_spec(encoder.name) == spec


def test_hubert_weights_may_move_but_not_change(tmp_path):
    spec = _tiny_hubert(tmp_path / "one").spec
    _tiny_hubert(tmp_path / "two", seed=1)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert encoder_of(spec, tmp_path / "moved").spec == spec
    with pytest.raises(InputError, match="No HuBERT model at"):
        encoder_of(spec)
    with pytest.raises(InputError, match="not those of this avatar"):
        encoder_of(spec, tmp_path / "two")


def test_a_second_stream_begins_at_the_loudness_that_the_first_found():
    """Of a quiet speaker, whom the first second of a fresh stream takes for loud noise."""
    encoder, loudness = create_encoder("logmel"), LoudnessEstimator()
    sound = 0.1 * _sound(2)
    right = encoder.encode(sound)
    errors = []
    for _ in range(2):
        stream = encoder.stream(loudness=loudness)
        heard = torch.cat([stream.push(sound), stream.finish()])
        errors.append(float((heard - right)[:25].abs().mean()))
    assert errors[1] < 0.75 * errors[0], errors  # what is left is the first syllable, which the running level lags
