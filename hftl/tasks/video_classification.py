"""Video classification: models of `AutoModelForVideoClassification`, and networks of torchvision and PyTorchVideo.

Of a video some frames are read, one from each of as many equal parts of it (Wang et al. 2016, "Temporal Segment
Networks"); in training at a random place in its part. The image processor that is saved beside the model is that of
VideoMAE, or the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForVideoClassification,
    PreTrainedModel,
)

from hftl import images, pretrained, video, video_models
from hftl.arguments import VideoArguments, has_checkpoint
from hftl.data import Splits
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.folder import say
from hftl.modality import VIDEO
from hftl.tasks.classification import ClassificationTask
from hftl.tasks.files import PreparedDataset
from hftl.tasks.image_classification import crop_settings, decoded_side, resized_processor
from hftl.video import Frames
from hftl.video_models import VideoConfig, VideoModel

#: of the training videos that say how long they are
_SAMPLE = 200
#: least part of the area that a training crop takes, as for images
_LEAST_CROP = 0.5
#: frames that a report shows of a video, a square of so many a side, and pixels of one
_SHOWN = 2
_THUMBNAIL = 160
_USAGE = """import numpy as np
from transformers import AutoImageProcessor
from {module} import {model}
processor = AutoImageProcessor.from_pretrained({title})
model = {model}.from_pretrained({title})
frames = np.load("frames.npy")  # {count} frames over all of a video, shape ({count}, height, width, 3)
inputs = processor(list(frames), return_tensors="pt")
print(model(**inputs).logits{activation}, model.config.id2label)"""


class VideoClassification(ClassificationTask):
    """One label a video."""

    name = "video-classification"
    modality = VIDEO
    auto_class: Any = AutoModelForVideoClassification
    # A video of 16 frames takes what 16 pictures do.
    batch_size = 8
    arguments_class = VideoArguments
    arguments: VideoArguments
    #: frames that the model reads
    frames: int

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """The model and its image processor, for the frames and the size that were asked for."""
        arguments = self.arguments
        name = str(arguments.model_name_or_path)
        if has_checkpoint(arguments):
            source = pretrained.find_model(name)
            self.load_processor(source)
            flag = pretrained.few_bits_flag(arguments)
            if self.auto_class is VideoModel and flag:
                raise UsageError(f"{flag}: {name} is not quantised. Leave it out.")
            model = pretrained.load_model(self.auto_class, source, self.label_names, arguments)
            self._resize(model)
        else:
            model = self._random_model(name.partition(":")[2])
        self.frames = model.config.num_frames
        self._try(model)
        height, width = crop_settings(self.processor)[0]
        say(f"video: {self.frames} frames over all of it, {height} x {width}")
        return model

    def _random_model(self, architecture: str) -> PreTrainedModel:
        sizes = {"num_frames": self.arguments.frames, "image_size": self.arguments.image_size}
        asked = {name: value for name, value in sizes.items() if value is not None}
        if architecture in CONFIG_MAPPING:
            model = self._random_transformer(architecture, asked)
            self.processor = video_models.processor(model.config.image_size)
            return model
        settings = video_models.settings(architecture, self.label_names, **asked)
        self.processor = video_models.processor(settings.image_size, video_models.normalisation(architecture))
        self.auto_class = VideoModel
        return VideoModel(settings)

    def _random_transformer(self, architecture: str, sizes: dict[str, Any]) -> PreTrainedModel:
        config = pretrained.random_config(architecture, self.auto_class, self.label_names, **sizes)
        if not hasattr(config, "num_frames"):
            raise self._other_inputs(config)
        return self.auto_class.from_config(config)

    def _resize(self, model: PreTrainedModel) -> None:
        """Set frames and size of a pretrained model to those that were asked for.

        Raises:
            UsageError: its positions belong to its own, or it reads something else.
        """
        config, arguments = model.config, self.arguments
        if not hasattr(config, "num_frames") or model.main_input_name != "pixel_values":
            raise self._other_inputs(config)
        for flag, wanted, own in (
            ("frames", arguments.frames, "num_frames"),
            ("image_size", arguments.image_size, "image_size"),
        ):
            if wanted is not None and wanted != getattr(config, own):
                if config.model_type != VideoConfig.model_type:
                    raise UsageError(
                        f"--{flag} {wanted}: {arguments.model_name_or_path} was trained for {getattr(config, own)}, to "
                        "which its positions belong. Leave it out."
                    )
                setattr(config, own, wanted)
                if flag == "image_size":
                    self.processor = resized_processor(model, self.processor, wanted)

    def _try(self, model: PreTrainedModel) -> None:
        """Run the model once: some architectures fail for few frames or pixels.

        Raises:
            UsageError: it fails.
        """
        height, width = crop_settings(self.processor)[0]
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, self.frames, 3, height, width, device=model.device))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise UsageError(
                f"--model {str(self.arguments.model_name_or_path)!r} does not work for {self.frames} frames of "
                f"{height} x {width} pixels: choose others with --frames and --image_size."
            ) from error

    def _other_inputs(self, config: Any) -> UsageError:
        known = type(config) in AutoModelForVideoClassification._model_mapping
        what = "reads videos in a way that hftl does not know" if known else "is not a model for videos"
        name = str(self.arguments.model_name_or_path)
        return UsageError(
            f"--model {name!r} ({config.model_type}) {what}: choose another, such as MCG-NJU/videomae-base or "
            f"torchvision:r3d_18.{'' if known else pretrained.tasks_of(name)}"
        )

    def load_processor(self, source: str | Path) -> None:
        """Set the image processor of a checkpoint, and how many frames it reads."""
        options = pretrained.hub_options(self.arguments, source)
        with pretrained.explained_load(str(source), self.auto_class):
            config = AutoConfig.from_pretrained(source, **options)
            if not hasattr(config, "num_frames"):
                raise self._other_inputs(config)
            self.processor = AutoImageProcessor.from_pretrained(source, **options)
        self.frames = config.num_frames
        self.auto_class = VideoModel if config.model_type == VideoConfig.model_type else AutoModelForVideoClassification

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Videos read when they are asked for."""
        if training and self.arguments.augmentation != "none":
            return VideoDataset(rows, self._inputs, self._augmentation(), seed=self.arguments.seed)
        return VideoDataset(rows, self._inputs)

    def views(self, rows: Any, count: int, training: Any) -> list[Any]:
        """The plain view, or `count` augmented ones, whose draws are functions of the video and the view's number.

        Raises:
            UsageError: nothing is augmented.
        """
        if count > 1 and self.arguments.augmentation == "none":
            raise UsageError("--feature_views needs an augmentation: leave out --augmentation none.")
        if count == 1:
            return [self.dataset(rows, training=False)]
        return [VideoDataset(rows, self._inputs, self._augmentation(), view=view) for view in range(count)]

    def _augmentation(self) -> v2.Compose:
        """The same crop of every frame, mirrored perhaps."""
        size, interpolation = crop_settings(self.processor)
        steps: list[Any] = [
            v2.RandomResizedCrop(size, scale=(_LEAST_CROP, 1.0), interpolation=interpolation, antialias=True)
        ]
        steps += [v2.RandomHorizontalFlip()] if self.arguments.horizontal_flip else []
        steps += [v2.RandAugment(num_ops=2, magnitude=9)] if self.arguments.augmentation == "strong" else []
        return v2.Compose(steps)

    def preprocessing(self) -> Any:
        """The processor's settings, the frames, and the augmentation of kept views."""
        arguments = self.arguments
        augmentation = arguments.feature_views > 1 and [arguments.augmentation, arguments.horizontal_flip]
        return [self.processor.to_dict(), self.frames, augmentation]

    def open_video(self, value: Any, shares: Any = 0.5) -> Frames:
        """The frames of a row, shape (frames, height, width, 3); a task of one's own may prepare them further."""
        side = decoded_side(self.processor, least=0)  # frames are resized, rather than decoded coarsely as a JPEG is
        return video.open_video(value, self.frames, shares, side)

    def _inputs(self, value: Any, augmentation: Any = None) -> dict[str, torch.Tensor]:
        """What the model takes of one video: `pixel_values` of shape (frames, 3, height, width)."""
        if augmentation is None:
            return self._pixels(self.open_video(value))
        frames = self.open_video(value, torch.rand(self.frames).double().numpy())
        cropped = augmentation(torch.from_numpy(frames).permute(0, 3, 1, 2))
        return self._pixels(cropped, do_resize=False, do_center_crop=False)

    def _pixels(self, frames: Any, **settings: bool) -> dict[str, torch.Tensor]:
        """Frames as the processor makes them."""
        pixels = self.processor(list(frames), return_tensors="pt", **settings)["pixel_values"]
        return {"pixel_values": pixels[0].float()}

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """Some frames, row by row."""
        frames = video.open_video(row[self.modality.name], _SHOWN**2, least_side=_THUMBNAIL)
        lines = frames.reshape(_SHOWN, _SHOWN, *frames.shape[1:]).swapaxes(1, 2)
        square = lines.reshape(_SHOWN * frames.shape[1], _SHOWN * frames.shape[2], 3)
        return Shown([(images.data_address(Image.fromarray(square)), f"{_SHOWN**2} frames, row by row")])

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (rows, frames, 3, height, width), `labels` of shape (rows,)."""
        # The channels last in memory, as for pictures: 3-d convolutions run 1.4 to 2.6 times as fast (measured).
        frames = torch.stack([example["pixel_values"].permute(0, 2, 3, 1) for example in examples])
        batch = {"pixel_values": frames.permute(0, 1, 4, 2, 3)}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """How long and how large the videos are."""
        chosen = np.linspace(0, len(splits.train) - 1, min(_SAMPLE, len(splits.train))).astype(int)
        found = [video.video_header(splits.train[int(row)][VIDEO.name]) for row in chosen]
        seconds, width, height = np.median([header for header in found if header is not None], axis=0)
        size = f"{width:.0f} x {height:.0f}"
        return f"videos of {seconds:.1f} s and {size} (median), of which {self.frames} frames are read", ""

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """A folder or table, or one or a list of: path, array (frames, height, width[, 3])."""
        is_batch = isinstance(inputs, np.ndarray) and inputs.ndim == 5
        return super().read_inputs(list(inputs) if is_batch else inputs, columns)

    def usage(self, title: str) -> str:
        """Plain transformers, or of hftl the model where the network is another library's."""
        kind = self.auto_class
        module = "transformers" if kind is AutoModelForVideoClassification else kind.__module__
        return _USAGE.format(
            title=json.dumps(title), count=self.frames, module=module, model=kind.__name__,
            activation=self.problem.activation,
        )  # fmt: skip


class VideoDataset(PreparedDataset):
    """Rows with a video and perhaps a label."""

    column = VIDEO.name
    content_key = staticmethod(video.content_key)
