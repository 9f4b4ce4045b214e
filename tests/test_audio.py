"""Sounds: read from any file, as pictures for image models and as waveforms for models of those."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import soundfile
import tiny_models
import torch
import transformers
from refusal import refused
from safetensors.torch import load_file
from torch.nn import functional

import hftl
from hftl import audio, cli, pages
from hftl.errors import UsageError
from hftl.tasks.audio_classification import filled_bands, new_extractor

QUICK = [
    "--report_to=none",
    "--precision=fp32",
    "--dataloader_num_workers=0",
    "--per_device_train_batch_size=4",
    "--clip_seconds=0.5",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    small_data.write_sounds(folder / "sounds", {"train": 8, "val": 3, "test": 3})
    torch.manual_seed(0)
    tiny_models.write_tiny_cnn(folder / "cnn")
    tiny_models.write_tiny_waveform_model(folder / "wav2vec2")
    tiny_models.write_tiny_text_model(folder / "bert")
    return folder


def trained(place: Path, model: str, output: Path, *flags: str) -> hftl.Run:
    words = [f"--model={place / model}", f"--dataset={place / 'sounds'}", f"--output_dir={output}", *QUICK, *flags]
    cli._run(["train", "audio-classification", *words])
    return hftl.load_run(output)


def recorded(samples: Any, rate: int = 16_000, kind: str = "WAV", **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, **options)
    return buffer.getvalue()


def tone(rate: int, seconds: float = 1.0) -> np.ndarray[Any, Any]:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 1), (44_100, 2)])
def test_a_tone_is_the_same_tone_from_any_file(kind: str, rate: int, channels: int) -> None:
    samples = np.stack([tone(rate)] * channels, axis=1)
    wave = audio.open_audio(recorded(samples, rate, kind), 16_000)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) < 1_000  # codecs add some silence
    spectrum = np.abs(np.fft.rfft(wave[2_000:14_000]))
    assert abs(spectrum.argmax() * 16_000 / 12_000 - 440) < 2
    assert 0.4 < np.abs(wave[2_000:14_000]).max() < 0.6


def test_samples_are_recordings_too() -> None:
    wave = tone(8_000)
    expected = audio.open_audio({"array": wave, "sampling_rate": 8_000}, 16_000)
    assert len(expected) == 16_000
    for array in (np.stack([wave, wave]), np.stack([wave, wave], axis=1), (wave * 32_767).astype(np.int16)):
        found = audio.open_audio({"array": array, "sampling_rate": 8_000}, 16_000)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(audio.open_audio(wave, 8_000), wave, atol=1e-6)
    assert len(audio.open_audio({"array": wave, "sampling_rate": 8_000}, 16_000, seconds=0.25)) == 4_000
    assert len(audio.open_audio(recorded(wave, 8_000), 16_000, seconds=0.25)) == 4_000
    for wrong in ({"array": wave}, {"array": np.zeros((2, 2, 2)), "sampling_rate": 8_000}, 3):
        with pytest.raises(UsageError, match="recording"):
            audio.open_audio(wrong, 16_000)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (recorded(tone(16_000)), None),
        (recorded(np.zeros(0)), "empty"),
        (recorded(np.zeros(800)), "silent"),
        (recorded(np.full(800, np.nan), subtype="FLOAT"), "its samples are no numbers"),
        (recorded(tone(16_000))[:8_000], "cut off: it holds less than its head says"),
        (recorded(np.random.default_rng(0).normal(0, 0.1, 40_000), kind="FLAC")[:9_000], "flac decoder lost sync"),
        (b"no sound here", "not a recording"),
        (recorded(np.ones(6 * 3_600), rate=1), "6.0 hours long; the limit is one hour: cut it into pieces"),
        (recorded(tone(8_000), 8_000, subtype="GSM610"), None),
    ],
)
def test_why_a_recording_cannot_be_used(content: bytes, problem: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    assert audio.audio_problem(content, full=True) == problem
    assert audio.audio_problem(str(tmp_path / "a.wav"), full=True) == problem


def test_a_bad_recording_ends_the_command_or_is_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_data.write_sounds(tmp_path / "sounds", {"train": 4})
    (tmp_path / "sounds" / "train" / "low" / "bad.wav").write_bytes(recorded(np.zeros(800)))
    words = ["train", "audio-classification", f"--model={place / 'cnn'}", f"--dataset={tmp_path / 'sounds'}"]
    words += [f"--output_dir={tmp_path / 'run'}", "--method=frozen", *QUICK]
    error = refused(words, capsys)
    assert "1 of 9 recordings cannot be read: train/low/bad.wav (silent)" in error
    assert "--skip_bad_files" in error
    cli._run([*words, "--skip_bad_files"])
    assert "recordings: 1 of 9 cannot be read and are left out: train/low/bad.wav (silent)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        (
            "bert",
            [],
            (
                "is a model neither of waveforms nor of images",
                "It is for text-classification; token-classification; multi",
            ),
        ),
        ("wav2vec2", ["--mixup=0.2"], ("--mixup mixes pictures",)),
        ("cnn", ["--clip_seconds=0"], ("--clip_seconds must be above 0",)),
        ("cnn", ["--test_time_windows=0"], ("--test_time_windows must be above 0",)),
        (
            "cnn",
            ["--test_time_windows=3", "--method=frozen", "--head=knn"],
            ("--head knn answers for the plain view alone: leave out --test_time_windows 3",),
        ),
        ("cnn", ["--feature_views=2", "--augmentation=none", "--method=frozen"], ("--feature_views needs an aug",)),
    ],
)
def test_one_line_for_what_does_not_fit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, flags: list[str], words: tuple[str]
) -> None:
    command = [f"--model={place / model}", f"--dataset={place / 'sounds'}", f"--output_dir={tmp_path / 'run'}"]
    error = refused(["train", "audio-classification", *command, *QUICK, *flags], capsys)
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [("wav2vec2", "Wav2Vec2", None), ("vit", "ViT", (224, 224)), ("resnet10t", "Timm", (176, 176))],
)
def test_architectures_without_weights(place: Path, tmp_path: Path, name: str, kind: str, side: Any) -> None:
    words = [f"--model=random:{name}", f"--dataset={place / 'sounds'}", f"--output_dir={tmp_path / 'run'}"]
    task = hftl.AudioClassification(hftl.parse(hftl.AudioArguments, words))
    model = task.build_model(task.load_splits())
    assert type(model).__name__.startswith(kind)
    assert task.side == side


KINDS = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("CAF", "ALAC_16"), ("WAV", "GSM610")]


@pytest.mark.parametrize(("kind", "subtype"), [*KINDS, (None, None)])
def test_a_window_is_that_part_of_the_recording(
    kind: str | None, subtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "_BLOCK", 3_000)  # what cannot seek is read in several pieces
    samples = np.random.default_rng(0).normal(0, 0.1, 20_000)
    value: Any = {"array": samples, "sampling_rate": 8_000}
    if kind is not None:
        value = recorded(samples, 8_000, kind, subtype=subtype)
    whole = audio.open_audio(value, 8_000)
    assert np.array_equal(audio.open_audio(value, 8_000, 0.5), whole[:4_000])
    for place, start in ((0.0, 0), (0.25, 0.25 * (len(whole) - 4_000)), (1.0, len(whole) - 4_000)):
        window = audio.open_audio(value, 8_000, 0.5, place)
        np.testing.assert_array_equal(window, whole[round(start) : round(start) + 4_000])
        np.testing.assert_array_equal(audio.open_audio(value, 8_000, 9.0, place), whole)  # all of it fits
    seconds = len(whole) / 8_000
    assert audio.is_longer(value, 16_000, seconds - 0.01)
    assert not audio.is_longer(value, 16_000, seconds)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused_in_prediction_too(value: float) -> None:
    wave = tone(8_000)
    wave[5] = value
    for given in (wave, {"array": wave, "sampling_rate": 8_000}, recorded(wave, subtype="FLOAT")):
        with pytest.raises(UsageError, match="its samples are no numbers"):
            audio.open_audio(given, 8_000, 2.0)


def test_of_a_long_recording_a_window_is_in_memory(tmp_path: Path) -> None:
    hour = np.random.default_rng(0).normal(0, 0.1, 100 * 3_600)
    soundfile.write(tmp_path / "long.flac", np.tile(hour, 6), 100)
    tracemalloc.start()
    try:
        window = audio.open_audio(tmp_path / "long.flac", 100, 10.0, 0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(window, np.tile(hour, 6)[3 * 360_000 - 500 :][:1_000], atol=1e-4)
    assert peak < 100_000  # all of it would take 8.6 MB


# ---- what the model takes --------------------------------------------------------------------------------------------


def test_pictures_are_those_of_plain_transformers(place: Path, tmp_path: Path) -> None:
    run = trained(place, "cnn", tmp_path / "run", "--method=full", "--max_steps=2")
    files = sorted((place / "sounds" / "test").rglob("*.wav"))
    check_card(run, files)
    row = {"audio": str(files[0]), "id": "a", "label": 0}
    # Of two classes at least one has something that speaks for it.
    shown = max((run.task.shown(row, run.model, label) for label in (0, 1)), key=lambda shown: len(shown.pictures))
    assert [what for _, what in shown.pictures] == ["the sound: time to the right, high notes above", "where it looked"]
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(shown.sounds[0].partition(",")[2])))
    assert rate == run.task.processor.sampling_rate
    np.testing.assert_allclose(heard, audio.open_audio(files[0], rate, 0.5), atol=1e-4)
    page = pages.render("shown", example={"shown": shown, "id": "<b>"})
    assert page.count("<audio controls") == 1
    assert "<b>" not in page


@pytest.mark.parametrize("masked", [False, True])
def test_waveforms_are_those_of_plain_transformers(place: Path, tmp_path: Path, masked: bool) -> None:
    model = place / "wav2vec2"
    if masked:
        tiny_models.write_tiny_waveform_model(tmp_path / "layer", feat_extract_norm="layer")
        config = tmp_path / "layer" / "preprocessor_config.json"
        config.write_text(config.read_text().replace('"return_attention_mask": false', '"return_attention_mask": true'))
        model = tmp_path / "layer"
    run = trained(place, str(model), tmp_path / "run", "--method=full", "--max_steps=2")
    files = sorted((place / "sounds" / "test").rglob("*.wav"))
    check_card(run, files)
    together, alone = run.logits(run.task.read_inputs([str(file) for file in files])), []
    for file in files:  # an answer does not depend on what else is in the batch
        alone.append(run.logits(run.task.read_inputs([str(file)]))[0])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_mask_made_in_a_batch_is_not_kept(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write_tiny_waveform_model(tmp_path / "layer", feat_extract_norm="layer")
    config = tmp_path / "layer" / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"return_attention_mask": false', '"return_attention_mask": true'))
    trained(
        place,
        str(tmp_path / "layer"),
        tmp_path / "run",
        "--method=frozen",
        "--num_train_epochs=1",
        "--clip_seconds=0.2",
    )
    assert "attention_mask is made from the inputs of a batch" in capsys.readouterr().out


def check_card(run: hftl.Run, files: list[Path]) -> None:
    """The lines of the card, as pasted but for the file's rate, say what hftl says."""
    (code,) = re.findall(r"```python\n(.*?)```", (run.folder / "README.md").read_text(), re.DOTALL)
    code = code.replace(f'"{run.folder.name}"', repr(str(run.folder))).replace("print(", "answers.append((")
    code = re.sub(r"answers\.append\(\((.*)\)$", r"answers.append((\1))", code.strip())
    for file in files[:3]:
        rate = run.task.processor.sampling_rate
        wave = audio.open_audio(file, rate, run.task.processor.clip_seconds)
        soundfile.write(run.folder.parent / "recording.wav", wave, rate, subtype="FLOAT")
        answers: list[Any] = []
        exec(code.replace('"recording.wav"', repr(str(run.folder.parent / "recording.wav"))), {"answers": answers})
        ((probabilities, names),) = answers
        (prediction,) = run.predict([str(file)])
        for index, name in names.items():
            assert float(probabilities[0, index].detach()) == pytest.approx(prediction.probabilities[name], abs=1e-5)


def test_augmentation_is_a_function_of_seed_epoch_and_row(place: Path) -> None:
    flags = [f"--model={place / 'cnn'}", f"--dataset={place / 'sounds'}", *QUICK, f"--output_dir={place / 'unused'}"]
    for kind in ("light", "strong"):
        arguments = hftl.parse(hftl.AudioArguments, [*flags, f"--augmentation={kind}"])
        task = hftl.AudioClassification(arguments)
        splits = task.load_splits()
        task.build_model(splits)
        rows: Any = task.dataset(splits.train, training=True)
        first, again = (rows[0]["pixel_values"] for _ in range(2))
        assert torch.equal(first, again)
        rows.set_epoch(1)
        assert not torch.equal(first, rows[0]["pixel_values"])
        plain: Any = task.dataset(splits.train, training=False)
        assert torch.equal(plain[0]["pixel_values"], plain[0]["pixel_values"])
        assert not torch.equal(first, plain[0]["pixel_values"])
        one, other = (view[0]["pixel_values"] for view in task.views(splits.train, 2, rows))
        assert not torch.equal(one, other)


def test_training_hears_a_random_place_of_a_long_recording(place: Path, tmp_path: Path) -> None:
    places: list[float] = []

    class Listening(hftl.AudioClassification):
        def waveform(self, value: Any, place: float = 0.0) -> audio.Waveform:
            places.append(place)
            return super().waveform(value, place)

    small_data.write_late_sounds(tmp_path / "sounds", {"train": 4, "val": 2})
    flags = [f"--model={place / 'cnn'}", f"--dataset={tmp_path / 'sounds'}", "--output_dir=unused"]
    task = Listening(hftl.parse(hftl.AudioArguments, [*flags, "--clip_seconds=0.5"]))
    splits = task.load_splits()
    task.build_model(splits)
    rows: Any = task.dataset(splits.train, training=True)
    rows[0], rows[0], rows[1]
    rows.set_epoch(1)
    rows[0]
    first, again, other, later = places
    assert first == again
    assert len({first, other, later}) == 3
    assert all(0 < drawn < 1 for drawn in places)
    places.clear()
    for view in [*task.views(splits.train, 3, rows), *task.views(splits.train, 3, rows)]:
        view[0]
    assert places[:3] == places[3:]
    assert len(set(places[:3])) == 3
    _, hint = task.inputs_in_words(splits, rows)
    assert hint.startswith("100% of the recordings are longer")
    assert hint.endswith("--test_time_windows 3 reads more, --clip_seconds takes longer windows")
    places.clear()
    for plain in (*task.views(splits.train, 1, rows), task.dataset(splits.validation, training=False)):
        plain[0]
    assert places == [0, 0]
    task.processor.clip_seconds = 2.0  # nothing is longer
    whole = audio.open_audio(splits.train[0]["audio"], 8_000)
    for place_of_it in (0.0, 0.7):
        np.testing.assert_array_equal(task.waveform(splits.train[0]["audio"], place_of_it), whole)


@pytest.mark.parametrize(("rates", "rate", "filled"), [([8_000] * 9, 8_000, 100), ([8_000, 44_100], 16_000, 128)])
@pytest.mark.parametrize(("seconds", "columns"), [(0.7, 233), (2, 224), (10, 1_000)])
def test_a_short_clip_fills_its_picture(rates: list[int], rate: int, filled: int, seconds: float, columns: int) -> None:
    extractor = new_extractor(seconds, np.array(rates))
    assert extractor.sampling_rate == rate
    assert filled_bands(extractor) == pytest.approx(filled, abs=1)
    wave = np.random.default_rng(0).normal(0, 0.1, rate).astype(np.float32)
    bands = extractor(wave, sampling_rate=rate, max_length=int(seconds * rate), return_tensors="pt")["input_features"]
    assert bands.shape[:2] == (1, 128)
    assert bands.shape[2] == pytest.approx(columns, rel=0.05)
    assert (bands[0, : filled_bands(extractor)].amax(dim=1) > bands.min()).all()


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_convolutions_below_the_transformer_stay_as_they_are(place: Path, tmp_path: Path) -> None:
    before = load_file(place / "wav2vec2" / "model.safetensors")
    for frozen, flags in ((True, []), (False, ["--freeze_feature_encoder=false"])):
        run = trained(place, "wav2vec2", tmp_path / f"run{frozen}", "--method=full", "--max_steps=2", *flags)
        after = load_file(run.folder / "model.safetensors")
        encoder = [name for name in before if name.startswith("feature_extractor.")]
        assert len(encoder) >= 3
        for name in encoder:
            assert torch.equal(before[name], after[f"wav2vec2.{name}"]) == frozen, name
        layer = "encoder.layers.0.attention.v_proj.weight"
        assert not torch.equal(before[layer], after[f"wav2vec2.{layer}"])


def test_what_only_the_end_tells_is_learned_from_windows(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--dataset={small_data.write_late_sounds(tmp_path / 'sounds', {'train': 16, 'val': 6, 'test': 6})}"
    torch.manual_seed(1)
    model = str(tiny_models.write_tiny_cnn(tmp_path / "cnn"))
    flags = [data, "--num_train_epochs=8", "--learning_rate=5e-3", "--metric_for_best_model=loss"]
    run = trained(place, model, tmp_path / "beginnings", *flags)
    assert run.metrics["test"]["accuracy"] == run.metrics["validation"]["accuracy"] == 0.5  # all beginnings are alike
    assert "100% of the recordings are longer, and their beginning alone makes a final" in capsys.readouterr().out
    run = trained(place, model, tmp_path / "windows", *flags, "--test_time_windows=3")
    assert "100% of the recordings are longer, and 3 windows of each make a final" in capsys.readouterr().out
    assert run.metrics["test"]["accuracy"] > 0.8
    assert run.metrics["validation"]["accuracy"] > 0.8
    answers = run.predict(tmp_path / "sounds" / "test")
    right = [answer.label == label for answer, label in zip(answers, ["high"] * 6 + ["low"] * 6, strict=True)]
    assert np.mean(right) == run.metrics["test"]["accuracy"]


@pytest.mark.parametrize(("model", "method"), [("cnn", "frozen"), ("cnn", "full"), ("wav2vec2", "full")])
def test_answers_are_means_over_the_windows(place: Path, tmp_path: Path, model: str, method: str) -> None:
    """Of recordings of which some fit into the window, computed by plain transformers too."""
    data = small_data.write_late_sounds(tmp_path / "sounds", {"train": 4, "val": 2, "test": 3})
    for split in ("train", "val", "test"):
        soundfile.write(data / split / "low" / "short.wav", tone(8_000, 0.4), 8_000)
    # Weights of hundreds, which a head solved on a random network may have, magnify rounding.
    flags = [f"--dataset={data}", f"--method={method}"]
    flags += ["--head_solver=sgd", "--num_train_epochs=1"] if method == "frozen" else ["--max_steps=2"]
    flags += ["--augmentation=none"] if method == "full" else []
    plain = trained(place, model, tmp_path / "plain", *flags)
    run = trained(place, model, tmp_path / "run", *flags, "--test_time_windows=3")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run"))
    assert [name for name in one if not one[name].equal(other[name])] == []
    assert "Of 3 windows of each longer recording" in (run.folder / "README.md").read_text()
    assert "windows" not in (plain.folder / "README.md").read_text()

    files = sorted((data / "test").rglob("*.wav"))
    rate, expected, beginnings = run.task.processor.sampling_rate, [], []
    for file in files:
        samples, found = soundfile.read(file, dtype="float32")
        room = max(0, len(samples) - found // 2)
        starts = [0, round(room / 2), room] if room else [0]
        windows = [audio.open_audio(samples[start : start + found // 2], found) for start in starts]
        resampled = [audio._resampled(window, found, rate) for window in windows]
        logits = np.concatenate([plain_logits(run, window) for window in resampled])
        expected.append(logits.mean(axis=0))
        beginnings.append(logits[0])
    assert len(windows) == 1  # the short one is the last
    rows = run.task.read_inputs([str(file) for file in files])
    np.testing.assert_allclose(run.logits(rows), expected, atol=1e-5)
    np.testing.assert_allclose(plain.logits(rows), beginnings, atol=1e-5)
    assert np.abs(np.subtract(expected, beginnings)).max() > 1e-3
    labels = torch.tensor([run.task.label_names.index(file.parent.name) for file in files])
    for scored, logits in ((run, expected), (plain, beginnings)):  # in the run as after it
        loss = functional.cross_entropy(torch.from_numpy(np.array(logits)), labels)
        assert scored.metrics["test"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    # Kept features are those of beginnings; where the whole model runs, windows choose the best weights.
    chosen = (plain if method == "frozen" else run).metrics["validation"]["loss"]
    lines = [json.loads(line) for line in (run.folder / "logs" / "log.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [pytest.approx(chosen, abs=1e-5)]
    assert abs(run.metrics["validation"]["loss"] - plain.metrics["validation"]["loss"]) > 1e-4


def plain_logits(run: hftl.Run, wave: audio.Waveform) -> np.ndarray[Any, Any]:
    """What the model that transformers loads says of a window, shape (1, classes)."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(run.folder)
    rate, samples = extractor.sampling_rate, extractor.sampling_rate // 2
    if run.task.side is None:
        network: Any = transformers.AutoModelForAudioClassification.from_pretrained(run.folder)
        settings = {"padding": "max_length", "max_length": samples, "truncation": True}
        inputs = dict(extractor(wave, sampling_rate=rate, return_tensors="pt", **settings))
    else:
        network = transformers.AutoModelForImageClassification.from_pretrained(run.folder)
        bands = extractor(wave, sampling_rate=rate, max_length=samples, return_tensors="pt")["input_features"]
        pixels = bands[:, None, : filled_bands(extractor)]
        pixels = functional.interpolate(pixels, size=run.task.side, mode="bilinear", antialias=True)
        inputs = {"pixel_values": pixels.expand(-1, 3, -1, -1)}
    with torch.inference_mode():
        return network.eval()(**inputs).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cnn", "wav2vec2"])
@pytest.mark.parametrize("method", ["partial", "lora", "lp_ft", "frozen"])
def test_methods(place: Path, tmp_path: Path, model: str, method: str) -> None:
    flags = ["--unfreeze_blocks=1"] if method == "partial" else []
    steps = [] if method == "frozen" else ["--num_train_epochs=1"]
    run = trained(place, model, tmp_path / "run", f"--method={method}", *flags, *steps)
    assert run.metrics["test"]["accuracy"] >= 0
    predictions = run.predict(place / "sounds" / "test")
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for prediction in predictions:
        for name in ("high", "low"):
            kept = float(rows[f"test/{prediction.id}"][f"probability_{name}"])
            assert prediction.probabilities[name] == pytest.approx(kept, abs=2e-2)  # training may have been in bf16
