"""Audio classification, on two routes: models of waveforms, and any image model on log-mel pictures of the sound.

A model that `AutoModelForAudioClassification` takes (wav2vec 2.0, HuBERT, WavLM, Whisper's encoder, AST) gets what its
own feature extractor makes of the waveform. An image model (timm's, ViT) gets a picture of the sound, made by
transformers' `WhisperFeatureExtractor`, which is saved beside it: `AutoFeatureExtractor.from_pretrained(RUN)` and a
resize are all that plain transformers needs, see the card of a run. That networks for photos learn sounds well from
such pictures: Gong et al. 2021 (AST), Palanisamy et al. 2020.

Of a recording longer than `--clip_seconds` a model takes a window: in training with augmentation one at a random place,
otherwise the beginning, and with `--test_time_windows` several in the final scores and after (Hershey et al. 2017
average the scores of all windows of a sound track).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    PreTrainedModel,
    WhisperFeatureExtractor,
)

from hftl import audio, images, pretrained
from hftl.arguments import AudioArguments, has_checkpoint
from hftl.audio import Waveform
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.explain import grad_cam
from hftl.folder import say
from hftl.mixing import MixedImages
from hftl.modality import AUDIO
from hftl.tasks.classification import ClassificationTask, Mixing
from hftl.tasks.files import PreparedDataset
from hftl.tasks.image_classification import stack_pixels

#: of the training recordings that decide how much of one the model takes
_SAMPLE = 1_000
#: seconds of a recording that are taken where `--clip_seconds` says nothing
_LONGEST_CLIP = 10.0
#: as in AST: 128 bands, steps of 10 ms; shorter ones where a picture would have fewer columns than it is wide. Of 1,200
#: spoken digits a linear layer on EfficientNet-Lite0 learns 0.80 where a half of the picture is silence (1 s), 0.85 in
#: 0.7 s, and 0.87 without the bands that their rate has no sound for; windows of 25 to 64 ms are alike
_RATES, _BANDS, _WINDOW = (8_000, 16_000), 128, 0.064
_LONGEST_STEP, _SHORTEST_STEP, _COLUMNS = 0.010, 0.003, 224
#: part of the bands and of the columns that a mask covers at most (SpecAugment, Park et al. 2019: 27 of 80 bands)
_MASKED = 0.25
#: louder or quieter than the sound by so many decibels, and noise so far below it (strong augmentation)
_GAIN, _NOISE = 6.0, (10.0, 40.0)
#: samples that every model of waveforms can read
_SHORTEST = 1_600
#: part of the recordings that may be cut without a word
_CUT = 0.05
#: in an example: what is made of each window of a recording
_VIEWS = "views"
_OF_WAVEFORMS = """import soundfile
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification
extractor = AutoFeatureExtractor.from_pretrained({title})
model = AutoModelForAudioClassification.from_pretrained({title})
wave, rate = soundfile.read("recording.wav")  # one channel at {rate} Hz, its first {seconds:g} s
inputs = extractor(wave, sampling_rate=rate{padding}, return_tensors="pt")
print(model(**inputs).logits{activation}, model.config.id2label)"""
_OF_PICTURES = """import soundfile
from torch.nn.functional import interpolate
from transformers import AutoFeatureExtractor, AutoModelForImageClassification
extractor = AutoFeatureExtractor.from_pretrained({title})
model = AutoModelForImageClassification.from_pretrained({title})
wave, rate = soundfile.read("recording.wav")  # one channel at {rate} Hz
bands = extractor(wave, sampling_rate=rate, max_length={samples}, return_tensors="pt")["input_features"][:, :{bands}]
pixels = interpolate(bands[:, None], size=({height}, {width}), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
print(model(pixel_values=pixels).logits{activation}, model.config.id2label)"""
#: seconds of a sound in a report
_HEARD = 2.0


class AudioClassification(ClassificationTask):
    """One label a recording."""

    name = "audio-classification"
    modality = AUDIO
    explains = True
    auto_class = AutoModelForImageClassification
    #: height and width of the log-mel pictures that an image model gets; None for a model of waveforms
    side: tuple[int, int] | None = None
    batch_size = 16
    arguments_class = AudioArguments
    arguments: AudioArguments

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """The model and its feature extractor; how much of a recording is taken is settled here."""
        arguments = self.arguments
        name = str(arguments.model_name_or_path)
        lengths, rates = _headers(splits.train)
        seconds = arguments.clip_seconds or _usual_seconds(lengths)
        if has_checkpoint(arguments):
            source = pretrained.find_model(name)
            self._choose_route(source)
            model = pretrained.load_model(self.auto_class, source, self.label_names, arguments)
            self.processor = self._extractor_of(source) if self.side is None else None
        else:
            model = self._random_model(name.partition(":")[2])
        if self.side is not None:
            self.processor = new_extractor(seconds, rates)
        else:
            model.config.apply_spec_augment = False  # it fails for recordings shorter than one of its masks
            for name in ("layerdrop", "encoder_layerdrop"):  # DDP waits for gradients of layers left out at random
                if hasattr(model.config, name):
                    setattr(model.config, name, 0.0)
            if arguments.mixup is not None:
                raise UsageError("--mixup mixes pictures of sounds, which this model of waveforms does not take.")
        self.processor.clip_seconds = seconds  # it is saved with the others
        pictures = "" if self.side is None else f", as log-mel pictures of {self.side[0]} x {self.side[1]}"
        taken = f"sound: {seconds:g} s of a recording at {self.processor.sampling_rate:,} Hz{pictures}"
        say("; ".join(filter(None, [taken, self._cut_in_words(lengths)])))
        return model

    def _cut_in_words(self, lengths: np.ndarray[Any, Any]) -> str:
        """What part of the recordings is longer than the window, and what becomes of it; of few nothing."""
        cut, windows = float(np.mean(lengths > self.processor.clip_seconds)), self.arguments.test_time_windows
        if cut <= _CUT:
            return ""
        longer = f"{cut:.0%} of the recordings are longer"
        if windows > 1:
            return f"{longer}, and {windows} windows of each make a final answer"
        return f"{longer}, and their beginning alone makes a final answer: --test_time_windows 3 reads more"

    def _random_model(self, architecture: str) -> PreTrainedModel:
        if architecture not in CONFIG_MAPPING:
            source = pretrained.random_timm_folder(architecture, None)
            self._choose_route(source)
            return pretrained.load_model(self.auto_class, source, self.label_names, self.arguments)
        config_class = CONFIG_MAPPING[architecture]  # its `get` would give None for all that were not asked for before
        hears = config_class in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING
        auto_class = AutoModelForAudioClassification if hears else AutoModelForImageClassification
        config = pretrained.random_config(architecture, auto_class, self.label_names)
        self._set_route(config)
        if hears:
            self.processor = _extractor_class(config)()
        return auto_class.from_config(config)

    def _choose_route(self, source: str | Path) -> None:
        """By what the checkpoint's configuration is for.

        Raises:
            UsageError: it cannot be read, or is for something else.
        """
        with pretrained.explained_load(str(source), AutoModelForAudioClassification):
            self._set_route(AutoConfig.from_pretrained(source, **pretrained.hub_options(self.arguments, source)))

    def _set_route(self, config: Any) -> None:
        hears = type(config) in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING
        if not hears and type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            name = str(self.arguments.model_name_or_path)
            raise UsageError(
                f"--model {name!r} ({config.model_type}) is a model neither of waveforms nor of images: choose another."
                f"{pretrained.tasks_of(name)}"
            )
        self.auto_class = AutoModelForAudioClassification if hears else AutoModelForImageClassification
        self.side = None if hears else picture_side(config)

    def _extractor_of(self, source: str | Path) -> Any:
        with pretrained.explained_load(str(source), self.auto_class):
            return AutoFeatureExtractor.from_pretrained(source, **pretrained.hub_options(self.arguments, source))

    def load_processor(self, source: str | Path) -> None:
        """Set the feature extractor of a finished run, and by its model the route."""
        self._choose_route(source)
        self.processor = self._extractor_of(source)

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Recordings read when they are asked for."""
        if training and self.arguments.augmentation != "none":
            return AudioDataset(rows, self._inputs, self.arguments.augmentation, seed=self.arguments.seed)
        return AudioDataset(rows, self._inputs)

    def views(self, rows: Any, count: int, training: Any) -> list[Any]:
        """The plain view, or `count` augmented ones, whose draws are functions of the recording and the view's number.

        Raises:
            UsageError: nothing is augmented.
        """
        augmentation = self.arguments.augmentation
        if count > 1 and augmentation == "none":
            raise UsageError("--feature_views needs an augmentation: leave out --augmentation none.")
        if count == 1:
            return [self.dataset(rows, training=False)]
        return [AudioDataset(rows, self._inputs, augmentation, view=view) for view in range(count)]

    def test_data(self, dataset: Any) -> Any:
        """With `--test_time_windows`, recordings as windows that are spread evenly from the beginning to the end."""
        return dataset if self.arguments.test_time_windows == 1 else AudioDataset(dataset.rows, self._windows)

    def _windows(self, value: Any) -> dict[str, Any]:
        """What the model takes of each window of one recording; of a recording that fits into one, that again.

        Processes that train together have to run the model alike, whatever is in their batches.
        """
        count = self.arguments.test_time_windows
        if not self._is_longer(value):
            return {_VIEWS: [self._inputs(value)] * count}
        return {_VIEWS: [self._inputs(value, place=float(place)) for place in np.linspace(0, 1, count)]}

    def test_views(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The windows of a batch of `test_data`, as a batch each."""
        if self.arguments.test_time_windows == 1:
            return [inputs]
        windows = {name: values.unbind(dim=1) for name, values in inputs.items() if name != "labels"}
        views = range(self.arguments.test_time_windows)
        return [{**inputs, **{name: values[view] for name, values in windows.items()}} for view in views]

    def mixing(self) -> Mixing | None:
        """mixup of pictures."""
        return None if self.arguments.mixup is None else MixedImages(len(self.label_names), self.arguments.mixup, None)

    def preprocessing(self) -> Any:
        """The extractor's settings, the size of the pictures, and the augmentation of kept views."""
        arguments = self.arguments
        augmentation = arguments.feature_views > 1 and arguments.augmentation
        return [self.processor.to_dict(), self.side, augmentation]

    def waveform(self, value: Any, place: float = 0.0) -> Waveform:
        """The waveform of a row at the model's rate, shape (samples,); a task of one's own may prepare it further.

        Args:
            value: of the row.
            place: of the window in a recording that is longer, from 0, its beginning, to 1, its end.
        """
        return audio.open_audio(value, self.processor.sampling_rate, self.processor.clip_seconds, place)

    def _is_longer(self, value: Any) -> bool:
        """Whether a recording does not fit into the window."""
        return audio.is_longer(value, self.processor.sampling_rate, self.processor.clip_seconds)

    def _inputs(self, value: Any, augmentation: str = "none", place: float = 0.0) -> dict[str, Any]:
        """What the model takes of one window of a recording; what is random comes from torch's generator.

        Args:
            value: of the row.
            augmentation: none, light or strong; but for none the place is random too.
            place: as `waveform` takes it.
        """
        if augmentation != "none":
            place = float(torch.rand(()))
        wave = self.waveform(value, place)
        if augmentation == "strong":
            wave = _disturbed(wave)
        if self.side is not None:
            if augmentation == "none":
                return {"pixel_values": _picture(self._bands(wave), self.side)}
            bands = self._bands(_moved(wave, self._samples))
            return {"pixel_values": _picture(_silenced(bands, float(bands.min())), self.side)}
        if augmentation != "none":
            wave = _silenced(torch.from_numpy(wave)[None], 0.0)[0].numpy()
        wave = np.pad(wave, (0, max(0, _SHORTEST - len(wave))))
        (name, *_) = self.processor.model_input_names
        return {name: self.processor(wave, sampling_rate=self.processor.sampling_rate, **self._padding())[name][0]}

    @property
    def _takes_samples(self) -> bool:
        """Whether the model's own extractor hands on the samples of the waveform, as wav2vec 2.0's does."""
        return self.processor.feature_size == 1

    def _padding(self) -> dict[str, Any]:
        """Where padding is not masked all recordings come in one length, or an answer would depend on its batch."""
        if not self._takes_samples or self.processor.return_attention_mask:
            return {}
        return {"padding": "max_length", "max_length": max(self._samples, _SHORTEST), "truncation": True}

    @property
    def _samples(self) -> int:
        """Of a recording, that the model takes."""
        return math.ceil(self.processor.clip_seconds * self.processor.sampling_rate)

    def _bands(self, wave: Waveform) -> torch.Tensor:
        """The log-mel spectrogram, shape (bands, columns), without bands that the rate has no sound for."""
        rate, samples = self.processor.sampling_rate, self._samples
        found = self.processor(wave, sampling_rate=rate, max_length=samples, return_tensors="pt")["input_features"]
        return found[0, : filled_bands(self.processor)]

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The sound, its log-mel picture, and of an image model where it looked (Grad-CAM)."""
        rate = self.processor.sampling_rate
        value = row[self.modality.name]
        wave = self.waveform(value)
        if self.side is None:
            return Shown(sounds=[sound_address(wave[: int(_HEARD * rate)], rate)])
        pixels = _picture(self._bands(wave), self.side)
        low, high = pixels.amin(), pixels.amax()
        grey = (255 * (pixels[0] - low) / (high - low).clamp(min=1e-6)).byte().flip(0).numpy()  # high notes above
        picture = Image.fromarray(grey).convert("RGB")
        what = "the beginning of the sound" if self._is_longer(value) else "the sound"
        pictures = [(images.data_address(picture), f"{what}: time to the right, high notes above")]
        if model is not None:
            heat = grad_cam(model, {"pixel_values": pixels[None].to(model.device)}, label)
            if heat is not None:
                lit = images.spotlight(picture, np.ascontiguousarray(heat[::-1]))
                pictures.append((images.data_address(lit), "where it looked"))
        return Shown(pictures, sounds=[sound_address(wave[: int(_HEARD * rate)], rate)])

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (rows, 3, height, width), or what the extractor gives, padded; `labels` (rows,).

        Of `test_data` with windows, shape (rows, windows, …).
        """
        if _VIEWS in examples[0]:
            each = self._stacked([view for example in examples for view in example[_VIEWS]])
            batch = {name: values.unflatten(0, (len(examples), -1)) for name, values in each.items()}
        else:
            batch = self._stacked(examples)
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def _stacked(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model takes of several windows, without labels."""
        if self.side is not None:
            return {"pixel_values": stack_pixels([example["pixel_values"] for example in examples])}
        (name, *_) = self.processor.model_input_names
        inputs = [example[name] for example in examples]
        if self._takes_samples:
            return dict(self.processor.pad({name: inputs}, padding=True, return_tensors="pt"))
        return {name: torch.from_numpy(np.stack(inputs))}

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """How long the recordings are, and what to change about how much of them is taken."""
        lengths, _ = _headers(splits.train)
        middle, long = np.percentile(lengths, [50, 95])
        heard = self.processor.clip_seconds
        words = f"recordings of {middle:.1f} s (median), 95 % up to {long:.1f}; heard up to {heard:g}"
        cut = self._cut_in_words(lengths) if self.arguments.test_time_windows == 1 else ""
        return words, cut and f"{cut}, --clip_seconds takes longer windows"

    def usage(self, title: str) -> str:
        """Plain transformers on either route."""
        if self.side is None:
            padding = "".join(f", {name}={value!r}" for name, value in self._padding().items())
            return _OF_WAVEFORMS.format(
                title=json.dumps(title),
                rate=self.processor.sampling_rate,
                seconds=self.processor.clip_seconds,
                padding=padding,
                activation=self.problem.activation,
            )
        height, width = self.side
        return _OF_PICTURES.format(
            title=json.dumps(title), rate=self.processor.sampling_rate, samples=self._samples,
            bands=filled_bands(self.processor), height=height, width=width, activation=self.problem.activation,
        )  # fmt: skip


class AudioDataset(PreparedDataset):
    """Rows with a recording and perhaps a label."""

    column = AUDIO.name
    content_key = staticmethod(audio.content_key)


def new_extractor(seconds: float, rates: np.ndarray[Any, Any]) -> WhisperFeatureExtractor:
    """What makes log-mel pictures, with steps so short that a short clip fills its picture.

    At 8 kHz where the recordings have no more (telephones), else at 16: a fifth of the picture would be empty.
    """
    rate = _RATES[int(np.mean(rates > _RATES[0]) > _CUT)]
    step = int(min(_LONGEST_STEP * rate, max(_SHORTEST_STEP * rate, seconds * rate / _COLUMNS)))
    return WhisperFeatureExtractor(
        feature_size=_BANDS,
        sampling_rate=rate,
        hop_length=step,
        chunk_length=math.ceil(seconds),  # whole seconds; what is taken of them is said with each call
        n_fft=int(_WINDOW * rate),
    )


def filled_bands(extractor: WhisperFeatureExtractor) -> int:
    """Bands that the rate has sound for; the extractor's go up to 8 kHz whatever the rate."""
    return int((extractor.mel_filters.max(axis=0) > 0).sum())


def picture_side(config: Any) -> tuple[int, int]:
    """Height and width of the pictures that an image model was made for."""
    if config.model_type == "timm_wrapper":
        height, width = config.pretrained_cfg["input_size"][1:]
        return int(height), int(width)
    side = getattr(getattr(config, "vision_config", config), "image_size", 224)  # CLIP's stands there
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def sound_address(wave: Waveform, rate: int) -> str:
    """The sound as FLAC, standing in the page itself."""
    import base64

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _extractor_class(config: Any) -> Any:
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    return FEATURE_EXTRACTOR_MAPPING[type(config)]


def _headers(rows: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Seconds of some recordings, over all of the rows, and their samples a second."""
    chosen = np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(int)
    found = [audio.audio_header(rows[int(row)][AUDIO.name]) for row in chosen]
    seconds, rates = np.array([header for header in found if header is not None]).T
    return seconds, rates


def _usual_seconds(lengths: np.ndarray[Any, Any]) -> float:
    """What 95 % of the recordings fit in, to a tenth of a second, and at most ten."""
    return min(_LONGEST_CLIP, math.ceil(10 * float(np.percentile(lengths, 95))) / 10)


def _picture(bands: torch.Tensor, side: tuple[int, int]) -> torch.Tensor:
    """Bands and columns as a picture of three equal channels, shape (3, height, width)."""
    return functional.interpolate(bands[None, None], size=side, mode="bilinear", antialias=True)[0].expand(3, -1, -1)


def _moved(wave: Waveform, samples: int) -> Waveform:
    """The sound anywhere in its window; it begins at the beginning where nothing is random."""
    room = samples - len(wave)
    return np.pad(wave, (int(torch.randint(room + 1, ())), 0)) if room > 0 else wave


def _silenced(values: torch.Tensor, silence: float) -> torch.Tensor:
    """Some bands and some columns silenced (SpecAugment), or of one band some moments; shape (bands, columns)."""
    values = values.clone()
    for dimension, size in enumerate(values.shape):
        width = int(torch.randint(int(_MASKED * size) + 1, ()))
        start = int(torch.randint(size - width + 1, ()))
        values.narrow(dimension, start, width).fill_(silence)
    return values


def _disturbed(wave: Waveform) -> Waveform:
    """Louder or quieter, and with noise."""
    gain = 10 ** (float(torch.empty(()).uniform_(-_GAIN, _GAIN)) / 20)
    below = 10 ** (-float(torch.empty(()).uniform_(*_NOISE)) / 20)
    noise = torch.randn(len(wave)).numpy() * float(np.sqrt(np.mean(wave**2)))
    return (gain * (wave + below * noise)).astype(np.float32)
