"""From clips to a corpus of speech: made-up heads whose jaws follow tones, seen by a stand-in for the tracker."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from research.pretrain import espeak, synthetic
from research.pretrain.build import BuildConfig, BuildParts, Points, build
from research.pretrain.corpus import (
    VARIANTS,
    Step,
    encode_variants,
    learnable,
    load_corpus,
    load_examples,
    load_synthetic,
    synthesise,
)  # fmt: skip
from research.pretrain.pretraining import PretrainConfig, pretrain_folders
from research.pretrain.sources import OWN_TERMS, LeftOut, find_sources
from research.pretrain.voice_activity import Recording, VoiceActivityTraining, learn_voice_activity

from hicode.camera import Camera
from hicode.errors import AssetError, FileFormatError, InputError
from hicode.files import load_tensors, read_json, save_tensors
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.media.audio import read_audio
from hicode.preparation.clip import shift_audio
from hicode.speech.encoders import Window
from hicode.speech.encoders.logmel import LogMelEncoder
from hicode.tracking.fit import FitConfig
from hicode.tracking.head_model import HeadModel
from hicode.training import avatar as run
from hicode.training.adaptation import load_generic

FRAMES = 100
FAST = BuildConfig(fit=FitConfig(identity_steps=3, frame_steps=2), person_frames=12)
MANIFEST = """
anchor = "ann"
[[source]]
speaker = "ann"
pattern = "ann/*.mp4"
terms = "hers"
[[source]]
speaker = "bob"
pattern = "bob.mp4"
terms = "his"
test_part = true
evaluated = true
[[source]]
speaker = "cat"
pattern = "cat.mp4"
terms = "tests only"
learn = false
[[source]]
speaker = "dan"
pattern = "dan.mp4"
terms = "his too"
"""


def loudness(seed: int, frames: int) -> np.ndarray:
    """Of syllables, a value a frame in 0 … 1."""
    rng = np.random.default_rng(seed)
    smooth = np.convolve(rng.standard_normal(frames + 4), np.ones(5) / 5**0.5, "valid")
    return 1 / (1 + np.exp(-3 * smooth))


class Stage:
    """Videos (tones under a video's name) and their landmarks; `looks` are the videos that were tracked."""

    def __init__(self, folder: Path):
        self.folder, self.looks, self.later, self.head = folder, [], {}, HeadModel.load()

    def film(self, name: str, seed: int, later: int = 0, frames: int = FRAMES, mouth: int | None = None) -> Path:
        """The mouth is `later` frames after the sound; it follows the sound of another seed where `mouth` says so."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = np.interp(np.arange(640 * frames) / 640, np.arange(frames) + 0.5, loudness(seed, frames))
        tone = np.sin(2 * np.pi * 200 * np.arange(640 * frames) / 16000) + 0.3 * np.random.default_rng(
            seed
        ).standard_normal(640 * frames)
        with open(path, "wb") as f:
            soundfile.write(f, 0.3 * level * tone, 16000, format="WAV")
        self.later[path] = (seed if mouth is None else mouth, later, frames)
        return path

    def __call__(self, path: Path) -> Points:
        self.looks.append(path.name)
        seed, later, frames = self.later[path]
        if later is None:
            raise InputError(f"No face in {frames} frames.")
        head, time = self.head, torch.arange(frames) / 25
        expression = torch.zeros(frames, 64)
        opening = loudness(seed, frames)[np.clip(np.arange(frames) - later, 0, frames - 1)]
        expression[:, head.expression_names.index("jawOpen")] = torch.from_numpy(0.05 + 0.4 * opening).float()
        turn = torch.stack([0.05 * torch.sin(5 * time), 0.1 * torch.sin(3 * time), 0 * time], 1)
        poses = rigid(
            torch.tensor([1.0, -1.0, -1.0])[:, None] * rotation_from_axis_angle(turn),
            torch.tensor([0.0, 0.0, 8.0]).expand(frames, 3),
        )
        identity = 0.3 * torch.from_numpy(np.random.default_rng(seed).standard_normal(80)).float()
        pixels, depth = Camera(Camera.pinhole(1400.0, 512, 410).K.expand(frames, 3, 3), poses, 512, 410).project(
            head.landmarks(head.vertices(identity, expression))
        )
        points = torch.cat([pixels, (1400 / 8 * (depth - 8))[..., None]], -1).float()
        return Points(points, torch.ones(frames, dtype=torch.bool), 512, 410)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    try:
        HeadModel.load()
    except AssetError as error:
        pytest.skip(f"the head model's package cannot be had here: {error}")
    stage = Stage(tmp_path_factory.mktemp("clips"))
    stage.film("ann/one.mp4", 1)
    stage.film("ann/two.mp4", 2)
    stage.film("bob.mp4", 3, later=2)
    stage.film("cat.mp4", 4, later=-3)
    stage.film("dan.mp4", 5)
    (stage.folder / "sources.toml").write_text(MANIFEST)
    return stage


def made(stage, cache, encoder=None, config=FAST, **options):
    stage.looks.clear()
    parts = BuildParts(encoder or LogMelEncoder(), tracker=stage, progress=False, **options)
    return build(find_sources([stage.folder]), cache, config, parts)


@pytest.fixture(scope="module")
def corpus(stage, tmp_path_factory):
    """(cache, what the first build said of itself)."""
    cache = tmp_path_factory.mktemp("corpus")
    return cache, made(stage, cache)


@pytest.fixture
def copy(corpus, tmp_path):
    """A corpus to change."""
    shutil.copytree(corpus[0], tmp_path / "corpus")
    return tmp_path / "corpus"


# --- whom to learn from ----------------------------------------------------------------------------------------------


def test_a_manifest_says_who_speaks_and_on_which_terms(stage):
    sources = find_sources([stage.folder])
    ann, bob, cat, dan = sources.speakers
    assert sources.anchor == "ann" and list(ann.clips) == ["one", "two"] and dan.terms == "his too"
    assert bob.test_part and bob.evaluated and bob.learn and not cat.learn and not ann.test_part
    assert bob.learned_frames(220) == 195 and ann.learned_frames(220) == 220, "the last 1/11, at least a second"


def test_the_projects_own_manifest_reads():
    folder = Path(__file__).parent
    sources = find_sources([folder], folder.parent / "tools" / "speech_sources.toml")
    assert (
        sources.anchor == "grid-s1"
        and len(sources.missing) == 28
        and "no video matches hdtf/" in str(sources.missing[0])
    )


BAD_MANIFESTS = {
    "anchor = ": "is not TOML",
    "": "names no source",
    "speakers = 3": "'speakers', which means nothing",
    '[[source]]\nspeaker = "a"\npattern = "*.mp4"': "does not say its terms",
    '[[source]]\nspeaker = "a"\npattern = "*.mp4"\nterms = "x"\nlern = true': "'lern', which means nothing",
    '[[source]]\nspeaker = "a"\npattern = "*.mp4"\nterms = "x"\nlearn = "no"': "Write true or false",
    '[[source]]\nspeaker = "a"\npattern = "../*.mp4"\nterms = "x"': "leaves the folder",
    2 * '[[source]]\nspeaker = "a"\npattern = "*.mp4"\nterms = "x"\n': "a second time",
    'anchor = "b"\n[[source]]\nspeaker = "a"\npattern = "*.mp4"\nterms = "x"': "none of its speakers",
    'anchor = "a"\n[[source]]\nspeaker = "a"\npattern = "*.mp4"\nterms = "x"\nlearn = false': "may not be learned from",
}


@pytest.mark.parametrize("text", BAD_MANIFESTS, ids=BAD_MANIFESTS.values())
def test_a_manifest_that_makes_no_sense_is_refused(text, tmp_path):
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(InputError, match=BAD_MANIFESTS[text]) as error:
        find_sources([tmp_path], tmp_path / "m.toml")
    assert "\n" not in str(error.value)


def test_without_a_manifest_videos_and_sub_folders_are_speakers(tmp_path):
    speaks = ("a/jo.mp4", "a/kim/x.MOV", "a/kim/deep/y.mkv", "a/kim/x.mp4", "b/jo.webm", "b/le~o.avi")
    for name in (*speaks, "a/notes.txt", "a/.hidden.mp4", "a/none/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sources = find_sources([tmp_path / "a", tmp_path / "b"])
    assert {s.speaker: len(s.clips) for s in sources.speakers} == {"a-jo": 1, "kim": 3, "b-jo": 1, "le-o": 1}
    assert (
        all(s.terms == OWN_TERMS and s.learn and not s.evaluated for s in sources.speakers) and sources.anchor is None
    )
    kim = next(s for s in sources.speakers if s.speaker == "kim")
    assert sorted(kim.clips) == ["kim-x.MOV", "kim-x.mp4", "y"]
    assert kim.at_most(2) == kim.at_most(2) and len(kim.at_most(2).clips) == 2
    (tmp_path / "c" / "jo.mp4").mkdir(parents=True)
    with pytest.raises(InputError, match="No video in"):
        find_sources([tmp_path / "c"])


# --- what a corpus holds ---------------------------------------------------------------------------------------------


def test_offsets_are_found_against_the_anchor_also_of_whoever_is_only_judged(corpus):
    found = {t.speaker: t.offset_frames for t in corpus[1].taken}
    # Tones are a clear case, yet lag and smoothing of a hundred frames leave some tenths of a frame.
    assert (
        found["ann"] == 0.0 and found["bob"] == pytest.approx(2, abs=0.5) and found["cat"] == pytest.approx(-3, abs=0.5)
    )
    assert corpus[1].left_out == () and (corpus[0] / "sync.safetensors").exists()


def test_sound_in_the_examples_is_moved_onto_the_picture(stage, corpus):
    example, taken = load_examples(corpus[0])["bob"][0], next(t for t in load_corpus(corpus[0]) if t.speaker == "bob")
    moved = shift_audio(read_audio(stage.folder / "bob.mp4"), taken.offset_frames, FRAMES)
    expected = LogMelEncoder().encode(moved)
    torch.testing.assert_close(example.features[0], expected, atol=2e-3, rtol=0)  # kept in half precision
    assert example.features.shape == (len(VARIANTS), 2 * FRAMES, 160) and example.landmarks.shape == (FRAMES, 478, 3)


def test_only_what_may_be_is_learned_from(corpus):
    speakers = [e.speaker for e in learnable(corpus[0])]
    assert sorted(speakers) == ["ann", "ann", "bob", "dan"], "the terms of cat's clip allow tests only"
    assert {len(e) for e in learnable(corpus[0]) if e.speaker == "bob"} == {FRAMES - 25} and len(
        load_examples(corpus[0])["bob"][0]
    ) == FRAMES
    assert [e.speaker for e in learnable(corpus[0], without=("ann", "dan"))] == ["bob"]


def test_a_speakers_clips_are_fitted_under_one_head_and_others_under_theirs(corpus):
    def said(kind, schema, name):
        return load_tensors(corpus[0] / kind / f"{name}.safetensors", schema, 1)

    heads = {name: said("motion", "corpus-motion", name)[1]["person"] for name in ("ann~one", "ann~two", "dan~dan")}
    assert heads["ann~one"] == heads["ann~two"] != heads["dan~dan"]
    # Canonical landmarks lie where the identity puts them in depth, which no picture says: the tip of ann's nose is her
    # head's in both clips.
    identity = said("heads", "corpus-head", "ann")[0]["identity"].float()
    head = HeadModel.load()
    tip = head.landmarks(head.vertices(identity, torch.zeros(64)))[4, 2]
    for clip in ("one", "two"):
        assert said("motion", "corpus-motion", f"ann~{clip}")[0]["landmarks"][:, 4, 2].mean() == pytest.approx(
            float(tip), abs=0.02
        )


# --- what is made anew -----------------------------------------------------------------------------------------------


def counts(built) -> dict[str, int]:
    return {name: step.made for name, step in built.steps.items()}


def test_a_second_build_makes_nothing(stage, corpus):
    assert counts(corpus[1]) == {"track": 5, "fit": 5, "offsets": 5, "examples": 5}
    again = made(stage, corpus[0])
    assert stage.looks == [] and counts(again) == {"track": 0, "fit": 0, "offsets": 0, "examples": 0}
    assert again.taken == corpus[1].taken


@pytest.mark.slow
def test_other_settings_of_the_fit_make_motion_anew(stage, copy):
    again = made(stage, copy, config=replace(FAST, person_frames=14))
    assert stage.looks == [] and again.steps["fit"].made == 5


class WiderEncoder(LogMelEncoder):
    window = Window(8, 4, 0)


def test_another_window_makes_the_examples_anew_and_no_track_or_fit(stage, copy):
    again = made(stage, copy, WiderEncoder())
    assert stage.looks == [] and counts(again) == {"track": 0, "fit": 0, "offsets": 5, "examples": 5}


def test_other_variants_make_the_examples_anew_alone(stage, copy):
    again = made(stage, copy, config=replace(FAST, variants=VARIANTS[:2]))
    assert counts(again) == {"track": 0, "fit": 0, "offsets": 0, "examples": 5}
    assert load_examples(copy)["dan"][0].features.shape[0] == 2


def test_a_changed_video_is_tracked_again_and_nobody_elses(stage, copy):
    stage.film("dan.mp4", 6)
    try:
        again = made(stage, copy)
    finally:
        stage.film("dan.mp4", 5)
    assert stage.looks == ["dan.mp4"] and again.steps["track"].made == again.steps["fit"].made == 1


def test_a_new_clip_of_a_known_speaker_gets_their_head(stage, copy):
    before = (copy / "heads" / "ann.safetensors").read_bytes()
    path = stage.film("ann/three.mp4", 1)
    try:
        again = made(stage, copy)
    finally:
        path.unlink()
    assert (
        stage.looks == ["three.mp4"]
        and again.steps["fit"].made == 1
        and (copy / "heads" / "ann.safetensors").read_bytes() == before
    )


@pytest.mark.slow
def test_a_stopped_build_goes_on_where_it_was(stage, tmp_path):
    def stopping(path):
        if len(stage.looks) == 3:
            raise KeyboardInterrupt
        return stage(path)

    stage.looks.clear()
    with pytest.raises(KeyboardInterrupt):
        build(
            find_sources([stage.folder]), tmp_path, FAST, BuildParts(LogMelEncoder(), tracker=stopping, progress=False)
        )
    with pytest.raises(FileFormatError, match="no corpus was completed"):
        load_examples(tmp_path)
    first = list(stage.looks)
    assert made(stage, tmp_path).steps["track"].made == 2 and not set(first) & set(stage.looks)


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(stage, tmp_path):
    """Another stage, to film what cannot be used."""
    own = Stage(tmp_path / "clips")
    own.film("ann.mp4", 1), own.film("dan.mp4", 5)
    return own


@pytest.fixture(scope="module")
def judge(corpus):
    """A sync model that knows tones."""
    from hicode.speech.sync import SyncModel

    return SyncModel.load(corpus[0] / "sync.safetensors")


def test_what_cannot_be_used_is_left_out_and_named(alone, judge, tmp_path):
    alone.film("faceless.mp4", 7, later=None)
    alone.film("moment.mp4", 7, frames=12)
    alone.film("dubbed.mp4", 8, mouth=9)
    (alone.folder / "text.mp4").write_text("not a video")
    with open(alone.film("silent.mp4", 7), "wb") as file:
        soundfile.write(file, np.zeros(64000), 16000, format="WAV")
    built = made(alone, tmp_path / "c", sync=judge)
    reasons = {left.speaker: left.reason for left in built.left_out}
    assert {t.speaker for t in built.taken} == {"ann", "dan"} and len(reasons) == 5
    assert "No face in 100 frames" in reasons["faceless"] and "12 frames are too few" in reasons["moment"]
    assert "silent" in reasons["silent"] and "not a readable" in reasons["text"]
    assert "do not agree (sync margin" in reasons["dubbed"] and "0.33 is needed at 4.0 s" in reasons["dubbed"]
    assert {(row["speaker"], row["reason"]) for row in read_json(tmp_path / "c" / "corpus.json")["left_out"]} == set(
        reasons.items()
    )
    again = made(alone, tmp_path / "c", sync=judge)
    assert alone.looks == [] and again.left_out == built.left_out, "a video that failed is not tried again"


def test_of_one_speaker_several_clips_may_be_left_out(alone, judge, tmp_path):
    alone.film("eve/good.mp4", 7)
    (
        alone.film("eve/turned.mp4", 8, later=None),
        alone.film("eve/away.mp4", 9, later=None),
        alone.film("eve/brief.mp4", 10, frames=12),
    )
    built = made(alone, tmp_path / "c", sync=judge)
    assert sorted(left.clip for left in built.left_out) == ["away", "brief", "turned"]
    assert [t.clip for t in built.taken if t.speaker == "eve"] == ["good"]


def test_a_speaker_out_of_step_with_the_anchored_others_is_left_out(stage, copy):
    stage.film("dan.mp4", 8, mouth=9)
    try:
        built = made(stage, copy)
    finally:
        stage.film("dan.mp4", 5)
    assert [left.speaker for left in built.left_out] == ["dan"] and "dan" not in load_examples(copy)


def test_one_speaker_is_not_enough(alone, judge, tmp_path):
    alone.film("dan.mp4", 5, later=None)
    with pytest.raises(InputError, match=r"1 usable speaker, at least two are needed.*dan, dan: No face"):
        made(alone, tmp_path / "c", sync=judge)


def test_an_anchor_that_cannot_be_used_is_an_error(stage, copy):
    sources = find_sources([stage.folder])
    gone = replace(sources, speakers=sources.speakers[1:], missing=(LeftOut("ann", "", "no video matches ann/*.mp4"),))
    with pytest.raises(InputError, match="anchor ann"):
        build(gone, copy, FAST, BuildParts(LogMelEncoder(), tracker=stage, progress=False))


@pytest.mark.slow
def test_a_sync_model_of_another_encoder_is_not_asked(alone, tmp_path):
    with pytest.raises(InputError, match="hears by embedded, not logmel"):
        made(alone, tmp_path / "c")


# --- synthetic speakers ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not espeak.installed(), reason="espeakng-loader is not installed (pip install 'hicode[research]')")
def test_synthetic_speakers_are_kept_with_their_phones(tmp_path):
    config = synthetic.CorpusConfig(minutes=0.1, speakers=2, languages=("en", "de"))
    first = synthesise(tmp_path, config, encoder=LogMelEncoder(), progress=False)
    kept = synthesise(tmp_path, config, encoder=LogMelEncoder(), progress=False)
    assert first.made == kept.kept == len(load_synthetic(tmp_path)) and kept.made == 0
    rng = np.random.default_rng((0, 1))
    fresh = synthetic.corpus(
        lambda samples, frames: encode_variants(LogMelEncoder(), samples, frames, rng).half(), config
    )
    for a, b in zip(load_synthetic(tmp_path), fresh, strict=True):
        assert a.phones == b.phones and a.language == b.language and torch.equal(a.classes, b.classes)
        assert torch.equal(a.example.features, b.example.features.float()) and torch.equal(
            a.example.landmarks, b.example.landmarks
        )
        assert np.abs(a.samples - b.samples).max() <= 0.5 / 32767 + 1e-7  # 16 bits
    again = synthesise(tmp_path, config, encoder=WiderEncoder(), progress=False)
    assert again.made == first.made and {p.name for p in (tmp_path / "examples" / "synthetic").iterdir()} >= {
        "index.json"
    }


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_a_report(stage, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(espeak, "installed", lambda: False)
    config = PretrainConfig(steps=2, synthetic_minutes=1, seed=3, sources=stage.folder / "sources.toml")
    parts = BuildParts(LogMelEncoder(), tracker=stage, progress=False)

    def learn(folder):
        return pretrain_folders(
            [stage.folder],
            folder / "w.safetensors",
            copy,
            replace(config, sync_out=folder / "s.safetensors"),
            FAST,
            parts,
        )

    reports = [learn(tmp_path / name) for name in ("a", "b")]
    assert reports[0]["sha256"] == reports[1]["sha256"] and len(reports[0]["sha256"]) == 2
    models = load_generic(tmp_path / "a" / "w.safetensors")
    assert models.encoder.name == "logmel" and models.encoder.dim == 160
    report, page = read_json(tmp_path / "a" / "w.json", "hicode-pretraining", 2), (tmp_path / "a" / "w.md").read_text()
    assert {row["speaker"]: row["terms"] for row in report["learned_from"]} == {
        "ann": "hers",
        "bob": "his",
        "dan": "his too",
    }
    assert report["provenance"]["seed"] == 3 and "espeakng-loader is not installed" in report["note"]
    assert all(
        text in page
        for text in ("| bob | 3.0 | his |", "cat (not learned from)", "Nothing.", report["sha256"]["w.safetensors"])
    )
    assert all(row["landmarks"] <= row["landmarks_still"] + 1e-3 for row in report["errors_mm"]), (
        "a gain of nought is a still mouth"
    )


def test_the_score_of_speech_is_a_step_of_its_own(stage, copy, tmp_path, monkeypatch):
    monkeypatch.setattr(espeak, "installed", lambda: False)
    out, score = tmp_path / "w.safetensors", tmp_path / "p.safetensors"
    config = PretrainConfig(
        steps=1, synthetic_minutes=0, sources=stage.folder / "sources.toml", voice_activity_out=score
    )
    report = pretrain_folders(
        [stage.folder], out, copy, config, FAST, BuildParts(LogMelEncoder(), tracker=stage, progress=False)
    )
    page = out.with_suffix(".md").read_text()
    _, header = load_tensors(score, "hicode-voice-activity", 1)
    assert header["encoder"] == "logmel" and header["learned_from"] == {"bob": "his", "dan": "his too"}, (
        "not the anchor, nobody against their terms"
    )
    assert [clip[2] for clip in header["made_of"]["clips"]] == [75, 100], "bob's test part is left out"
    assert [row["speaker"] for row in report["voice_activity"]["speakers"]] == ["bob", "dan"]
    assert header["figures"] == report["voice_activity"]
    assert "| bob |" in page.split("## Voice activity")[1] and score.name in report["sha256"]
    assert report["steps"]["voice activity"]["made"] == 1


def test_the_score_of_speech_is_kept_while_what_it_was_made_of_holds(stage, tmp_path):
    clips = [Recording(name, "", stage.folder / f"{name}.mp4", 100) for name in ("bob", "dan")]
    config = VoiceActivityTraining(negatives_s=5.0)
    learn = lambda clips=clips, config=config: learn_voice_activity(
        clips, tmp_path, LogMelEncoder(), config, synthetic=False, progress=False
    )
    first, figures = learn()
    data = (tmp_path / "voice_activity.safetensors").read_bytes()
    assert first.made == 1 and learn() == (Step(kept=1), figures)
    shorter = [clips[0], replace(clips[1], frames=75)]
    assert learn(shorter)[0].made == learn(config=replace(config, seed=1))[0].made == 1
    assert learn()[0].made == 1 and (tmp_path / "voice_activity.safetensors").read_bytes() == data, (
        "the same again, byte for byte"
    )


def test_weights_that_hear_by_another_encoder_are_refused(tmp_path):
    models = load_generic()
    tensors, config = models.state()
    config["encoder"]["name"] = "hubert"
    save_tensors(tmp_path / "w.safetensors", tensors, "hicode-speech", 2, config)
    with pytest.raises(InputError, match="for the hubert encoder"):
        run._generic_speech(tmp_path / "w.safetensors")
