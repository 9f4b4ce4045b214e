"""Image classification with any model of `AutoModelForImageClassification`, timm's included."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from hftl import compute, images, pretrained
from hftl.arguments import NO_PROMPTS, ImageArguments, has_checkpoint
from hftl.data import Splits
from hftl.dual_encoder import (
    PROMPTS,
    DualEncoderConfig,
    DualEncoderForImageClassification,
    has_two_parts,
    is_dual_encoder,
    load_dual_encoder,
)
from hftl.errors import UsageError
from hftl.examples import Shown
from hftl.explain import grad_cam
from hftl.folder import say
from hftl.image_cache import ImageCache, at_working_size, pays, working_size
from hftl.mixing import MixedImages
from hftl.modality import IMAGE
from hftl.tasks.classification import ClassificationTask, Mixing
from hftl.tasks.files import FileDataset

#: pictures whose headers are read to see how large they are
_SAMPLE = 1_000
_OF_DUAL_ENCODER = "import hftl.dual_encoder  # plain transformers does not have this model\n"
#: pictures are drawn larger than they are by this, or more: a smaller size costs little and saves the square of it
_ENLARGED = 2.0
#: by which a model is tried
_ANY_PICTURE = Image.fromarray(np.random.default_rng(0).integers(256, size=(256, 256, 3), dtype=np.uint8))


class ImageClassification(ClassificationTask):
    """One label an image."""

    name = "image-classification"
    modality = IMAGE
    explains = True
    auto_class = AutoModelForImageClassification
    # 32 rows: enough for a quiet gradient, and 224-pixel activations of common backbones fit 8 GB.
    batch_size = 32
    arguments_class = ImageArguments
    arguments: ImageArguments

    def load_splits(self) -> Splits:
        """As every task; that there are no texts to start from is said before any data is read."""
        arguments = self.arguments
        finds = self.problem.answers_untrained
        asks = arguments.prompts not in (None, NO_PROMPTS)
        if asks and finds:
            raise UsageError(f"--prompts are texts of classes, which {self.name} has not in its head. Leave it out.")
        if asks and arguments.head not in (None, "logistic", "tip"):
            raise UsageError(f"--prompts: --head {arguments.head} knows the training rows alone. Leave one out.")
        zero_shot = arguments.method == "zero_shot" and not finds
        if zero_shot or asks:
            flag = "--method zero_shot" if zero_shot else "--prompts"
            pretrained.check_model_name(arguments.model_name_or_path, arguments.trust_remote_code)
            if reason := self._why_no_texts():
                raise UsageError(f"{flag}: {reason}.")
        return super().load_splits()

    def _why_no_texts(self) -> str:
        """What keeps a model from being the image part of a dual encoder with a head that goes with it; else nothing.

        Of vectors to search by the head is fresh, but the pretrained vector is the one to start from.
        """
        arguments = self.arguments
        for flag, given in {
            "--prompts none": arguments.prompts == NO_PROMPTS,
            "--keep_head": arguments.keep_head,
            "--weights": arguments.weights is not None,
        }.items():
            if given:
                return f"{flag} leaves no head of texts"
        if not (self.problem.is_one_of_several or self.problem.answers_untrained):
            return f"a head of texts is for rows of one class each, not for --problem_type {arguments.problem_type}"
        name = str(arguments.model_name_or_path)
        if has_checkpoint(arguments):
            source = pretrained.find_model(name)
            with pretrained.explained_load(name, self.auto_class):
                kind, options = pretrained.model_kind(arguments, source), pretrained.hub_options(arguments, source)
                if has_two_parts(kind) and is_dual_encoder(AutoConfig.from_pretrained(source, **options)):
                    return ""
            if kind == DualEncoderConfig.model_type:
                return f"{name!r} has its image part alone: --model has to be the dual encoder that it was made from"
        return f"--model {name!r} reads no texts. It is for dual encoders: CLIP, SigLIP and their kin"

    def load_model(self, splits: Splits) -> PreTrainedModel:
        """The model and its image processor, at `--image_size` where that is given."""
        name = str(self.arguments.model_name_or_path)
        if not has_checkpoint(self.arguments):
            return self._random_model(name.partition(":")[2])
        source = pretrained.find_model(self.arguments.model_name_or_path)
        if reason := self._why_no_texts():
            model = pretrained.load_model(self.auto_class, source, self.label_names, self.arguments)
            self.load_processor(source)
            if isinstance(model.config, DualEncoderConfig) and not self.arguments.keep_head:
                model.config.prompts = None
            asked = {"prompts", "weights", "problem_type"} & self.arguments.given
            if asked and is_dual_encoder(model.config):
                say(f"head: fresh, since {reason}")
        else:
            self.load_processor(source)
            pixels = self.plain_transform(_ANY_PICTURE)[None]
            prompts = self.arguments.prompts or PROMPTS
            texts = None if self.problem.answers_untrained else prompts
            model = load_dual_encoder(source, self.label_names, pixels, texts, self.arguments)
            self.auto_class = type(model)
        if self.arguments.image_size is not None:
            shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
            model = _resize(model, self.arguments.image_size)
            changed = [name for name, tensor in model.named_parameters() if tensor.shape != shapes[name]]
            if changed:
                model.config.resized_parameters = changed  # the checkpoint has others: an adapter has to bring them
        self._set_size(model)
        return model

    def _random_model(self, architecture: str) -> PreTrainedModel:
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

        if architecture not in CONFIG_MAPPING:
            source = pretrained.random_timm_folder(architecture, self.arguments.image_size)
            model = pretrained.load_model(self.auto_class, source, self.label_names, self.arguments)
            self.load_processor(source)
            self._set_size(model)
            return model
        size = {"image_size": self.arguments.image_size} if self.arguments.image_size else {}
        config = pretrained.random_config(architecture, self.auto_class, self.label_names, **size)
        model = self.auto_class.from_config(config)
        backends = IMAGE_PROCESSOR_MAPPING[type(config)]
        self.processor = (backends.get("torchvision") or backends["pil"])()  # as AutoImageProcessor chooses
        self._set_size(model)
        return model

    def _set_size(self, model: PreTrainedModel) -> None:
        """Set the processor to `--image_size`, and try the model at it: some architectures fail at some sizes.

        Raises:
            UsageError: the model does not work at that size.
        """
        size = self.arguments.image_size
        if size is None:
            return
        self.processor = resized_processor(model, self.processor, size)
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise UsageError(f"--image_size {size}: {type(model).__name__} does not work at this size.") from error

    def load_processor(self, source: str | Path) -> None:
        """Set the image processor of a checkpoint, and by its model what loads it."""
        options = pretrained.hub_options(self.arguments, source)
        with pretrained.explained_load(str(source), self.auto_class):
            self.processor = AutoImageProcessor.from_pretrained(source, **options)
            own = pretrained.model_kind(self.arguments, source) == DualEncoderConfig.model_type
        self.auto_class = DualEncoderForImageClassification if own else type(self).auto_class

    def dataset(self, rows: Any, training: bool) -> Dataset[dict[str, Any]]:
        """Images decoded when they are asked for."""
        if training and self.arguments.augmentation != "none":
            return ImageDataset(rows, self._opener(), self._training_transform(), seed=self.arguments.seed)
        return ImageDataset(rows, self._opener(), self.plain_transform)

    def _training_transform(self) -> v2.Compose:
        arguments = self.arguments
        transform = training_transform(
            self.processor, arguments.augmentation, arguments.horizontal_flip, arguments.random_erasing
        )
        if type(self).collate is not ImageClassification.collate:  # which expects what the model takes
            transform.transforms.append(_Scaled(self.processor))
        return transform

    def views(self, rows: Any, count: int, training: Any) -> list[Any]:
        """The plain view, or `count` augmented ones, whose draws are functions of the image and the view's number."""
        if count > 1 and self.arguments.augmentation == "none":
            raise UsageError("--feature_views needs an augmentation: leave out --augmentation none.")
        if count == 1:
            return [self.dataset(rows, training=False)]
        transform = self._training_transform()
        return [ImageDataset(rows, self._opener(), transform, view=view) for view in range(count)]

    def mixing(self) -> Mixing | None:
        """mixup, cutmix, or one of them for each batch."""
        if self.arguments.mixup is None and self.arguments.cutmix is None:
            return None
        return MixedImages(len(self.label_names), self.arguments.mixup, self.arguments.cutmix)

    def test_views(self, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The images, with `--test_time_flip` their mirror images too (Krizhevsky et al. 2012)."""
        if not self.arguments.test_time_flip:
            return [inputs]
        return [inputs, {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}]

    def preprocessing(self) -> Any:
        """The processor's settings, the size at which files are decoded, and the augmentation of kept views."""
        processor = self.processor
        settings = processor.data_config if hasattr(processor, "data_config") else processor.to_dict()
        decoded = None if self._opens_images_its_own_way() else decoded_side(processor)
        arguments = self.arguments
        augmentation = [arguments.augmentation, arguments.horizontal_flip, arguments.random_erasing]
        return [settings, decoded, arguments.feature_views > 1 and augmentation]

    def open_image(self, value: Any) -> Image.Image:
        """The RGB picture of a row, in training and after; a task of one's own may prepare it further here.

        Where this is overridden it sees every picture in full size, each time it is used; otherwise large JPEG files
        are decoded smaller, and training pictures may be kept.
        """
        return images.open_image(value)

    def _opener(self) -> Callable[[Any], Image.Image]:
        if self._opens_images_its_own_way():
            return self.open_image
        return functools.partial(images.open_image, least_side=decoded_side(self.processor))

    def _opens_images_its_own_way(self) -> bool:
        return getattr(self.open_image, "__func__", None) is not ImageClassification.open_image

    def kept_for_epochs(self, data: dict[str, Any]) -> dict[str, Any]:
        """Training pictures at working size, and validation as what the model takes of it: made once, where that pays.

        See `--image_cache`. The test split, and predictions, read the files.
        """
        if self._opens_images_its_own_way() or type(self).dataset is not ImageClassification.dataset:
            return data
        kept = {**data, "train": self._kept(data["train"], "images")}
        if self.arguments.eval_strategy != "no" and "validation" in data:
            others = getattr(kept["train"].open_image, "missing_bytes", 0.0)
            kept["validation"] = self._kept(data["validation"], "images of validation", others)
        return kept

    def _kept(self, dataset: ImageDataset, what: str, others: float = 0.0) -> ImageDataset:
        """Augmented pictures at working size, others as the processor makes them; unchanged where it does not pay."""
        arguments, side = self.arguments, training_side(self.processor)
        epochs = (arguments.num_train_epochs or 0) + (arguments.head_epochs or 0)
        if not pays(dataset.rows, side, arguments.image_cache, epochs):
            return dataset
        if dataset.seed is not None:
            make = functools.partial(at_working_size, side=side, open_image=dataset.open_image)
            cache = ImageCache(make, f"{side} {decoded_side(self.processor)}")
            cache.plan(
                dataset.rows, lambda size: 3 * math.prod(working_size(size, side)), arguments.image_cache_gb, what
            )
            return ImageDataset(dataset.rows, cache, dataset.transform, seed=dataset.seed)
        plain = type(self).plain_transform is ImageClassification.plain_transform
        if not plain or not type(self.processor).__module__.startswith("transformers."):  # code that may change
            return dataset
        made_by = [type(self.processor).__name__, self.preprocessing(), compute.library_versions()]
        cache = ImageCache(dataset.pixels, json.dumps(made_by, default=str))
        each = dataset[0]["pixel_values"].nbytes
        cache.plan(dataset.rows, lambda _: each, arguments.image_cache_gb, what, others)
        return ImageDataset(dataset.rows, cache, torch.from_numpy)

    def plain_transform(self, image: Any) -> torch.Tensor:
        """The processor's own transform, so that plain transformers sees the same pixels; shape (3, height, width)."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()

    def shown(self, row: Mapping[str, Any], model: Any = None, label: int = 0) -> Shown:
        """The picture, and as the model sees it, dark where nothing speaks for the class (Grad-CAM)."""
        picture = self.open_image(row["image"])
        pictures = [(images.data_address(picture), "the picture")]
        if model is not None:
            pixels = self.plain_transform(picture)
            heat = grad_cam(model, {"pixel_values": pixels[None].to(model.device)}, label)
            if heat is not None:
                pictures.append((images.data_address(images.spotlight(self._seen(pixels), heat)), "where it looked"))
        return Shown(pictures)

    def _seen(self, pixels: torch.Tensor) -> Image.Image:
        """A picture of what the model takes, shape (3, height, width); its range is spread over that of a picture."""
        if getattr(self.processor, "do_flip_channel_order", False):  # MobileViT's takes blue first
            pixels = pixels.flip(0)
        spread = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin()).clamp(min=1e-6)
        return Image.fromarray((255 * spread).byte().permute(1, 2, 0).numpy())

    def inputs_in_words(self, splits: Splits, rows: Any) -> tuple[str, str]:
        """How large the pictures are, and whether they are read much larger than that."""
        chosen = np.linspace(0, len(splits.train) - 1, min(_SAMPLE, len(splits.train))).astype(int)
        sizes = [images.image_header_size(splits.train[int(row)]["image"]) for row in chosen]
        sizes = [size for size in sizes if size is not None]
        side = int(rows[0]["pixel_values"].shape[-1])
        if not sizes:
            return f"pictures, read at {side} pixels", ""
        width, height = np.median(np.array(sizes), axis=0).astype(int)
        larger = side / min(width, height)
        hint = f"the pictures are drawn {larger:.1f} times as large as they are: a smaller --image_size may be as good "
        hint += "and faster (hftl rank with MODEL@SIDE tells)"
        words = f"pictures of {width} x {height} (median), read at {side}"
        return words, hint if larger >= _ENLARGED else ""

    def usage(self, title: str) -> str:
        """Plain transformers, for a dual encoder with hftl's model."""
        own = self.auto_class is DualEncoderForImageClassification
        return (_OF_DUAL_ENCODER if own else "") + self._usage(title)

    def _usage(self, title: str) -> str:
        """The lines behind that."""
        return super().usage(title)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape (rows, 3, height, width), `labels` of shape (rows,)."""
        pixels = stack_pixels([example["pixel_values"] for example in examples])
        batch = {"pixel_values": scaled(self.processor, pixels) if pixels.dtype is torch.uint8 else pixels}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    def read_inputs(self, inputs: Any, columns: Mapping[str, str] | None = None) -> Any:
        """A folder or table, or one or a list of: path, PIL image, array (height, width[, 3]); or an array of rows."""
        is_batch = isinstance(inputs, np.ndarray) and inputs.ndim == 4
        return super().read_inputs(list(inputs) if is_batch else inputs, columns)


class ImageDataset(FileDataset):
    """Rows with an image and perhaps a label, as pixels; of 8 bits where those of a batch are scaled together."""

    column = IMAGE.name
    content_key = staticmethod(images.content_key)

    def __init__(
        self, rows: Any, open_image: Any, transform: Any, seed: int | None = None, view: int | None = None
    ) -> None:
        """`transform` takes what `open_image` gives for a row's image."""
        super().__init__(rows, seed, view)
        self.open_image, self.transform = open_image, transform

    def example(self, value: Any) -> dict[str, Any]:
        """`pixel_values` of shape (3, height, width)."""
        return {"pixel_values": self.transform(self.open_image(value))}

    def pixels(self, value: Any) -> np.ndarray[Any, Any]:
        """The pixels of an example, as an array."""
        return self.example(value)["pixel_values"].numpy()


def stack_pixels(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pictures of shape (channels, height, width) as one batch, its channels last in memory.

    Convolutions run almost twice as fast in this layout (measured, float32 on a CPU), and the others do not mind.
    Training pictures come in it, so that stacking them so is a plain copy.
    """
    return torch.stack([picture.permute(1, 2, 0) for picture in pictures]).permute(0, 3, 1, 2)


#: least part of the area that a training crop takes; gentler than ImageNet's 8 % (Szegedy et al. 2015), at which a
#: small data set loses the object
_LEAST_CROP = 0.5
#: pixels of the shorter side, to no fewer of which a photo is decoded: of photos of 500 x 375 at a half, for 64 pixels,
#: each holds so much detail that it moves by 1 of 255 on average, and 7 of 140 answers of a ridge head change
_LEAST_DECODED = 448


def training_transform(
    processor: Any, augmentation: str, horizontal_flip: bool, random_erasing: float | None = None
) -> v2.Compose:
    """Augmentation of one picture, to 8-bit pixels of the size that the model takes, which are still to be `scaled`.

    light: a crop of half to all of the area, ratio 3/4 to 4/3, and a flip. strong: RandAugment (Cubuk et al. 2020; 2
    operations of strength 9 of 30) and random erasing of a quarter of the images (Zhong et al. 2020) on top. trivial:
    one operation of any strength (TrivialAugmentWide, Müller and Hutter 2021) on top. `random_erasing` is the part of
    the images that are erased in any of them, which sets pixels to 0, the mean: where some are, pictures come
    scaled. It works on 8-bit tensors: the crop takes a quarter of the time that Pillow needs (0.2 against 0.9 ms,
    500 x 375 pixels).
    """
    size, interpolation = crop_settings(processor)
    strong = augmentation == "strong"
    crop = v2.RandomResizedCrop(size, scale=(_LEAST_CROP, 1.0), interpolation=interpolation, antialias=True)
    steps: list[Any] = [_to_tensor, crop]
    steps += [v2.RandomHorizontalFlip()] if horizontal_flip else []
    steps += [v2.RandAugment(num_ops=2, magnitude=9)] if strong else []
    steps += [v2.TrivialAugmentWide()] if augmentation == "trivial" else []
    erased = random_erasing if random_erasing is not None else 0.25 * strong
    steps += [_Scaled(processor), v2.RandomErasing(p=erased)] if erased else []
    return v2.Compose(steps)


def _to_tensor(image: Image.Image | np.ndarray[Any, Any]) -> torch.Tensor:
    """An RGB picture as uint8 of shape (3, height, width), its channels side by side in memory as they come."""
    return torch.from_numpy(np.array(image) if isinstance(image, Image.Image) else image).permute(2, 0, 1)


def training_side(processor: Any) -> int:
    """Shorter side in pixels at which the smallest training crop has as many of them as the model takes."""
    return math.ceil(max(crop_settings(processor)[0]) / math.sqrt(_LEAST_CROP))


def decoded_side(processor: Any, least: int = _LEAST_DECODED) -> int | None:
    """The shorter side that a decoded picture has at least, where its file is larger: twice what is made of it.

    Twice, as in Pillow's own thumbnails (`reducing_gap=2.0`, "nearly indistinguishable"), of the larger of what the
    processor resizes to and `training_side`: the same for both, so that a run predicts on the pixels that it was scored
    on. It is `least` where that is more. None where the processor does not resize.
    """
    if hasattr(processor, "data_config"):  # timm's
        side, crop = max(processor.data_config["input_size"][1:]), processor.data_config["crop_pct"]
    elif getattr(processor, "do_resize", False) and getattr(processor, "size", None):
        side = max(value for value in dict(processor.size).values() if value)
        crop = getattr(processor, "crop_pct", None) or 1
    else:
        return None
    return max(2 * math.ceil(side / min(crop, math.sqrt(_LEAST_CROP))), least)


def crop_settings(processor: Any) -> tuple[tuple[int, int], InterpolationMode]:
    """Size (height, width) and interpolation of a processor."""
    if hasattr(processor, "data_config"):  # timm's
        return processor.data_config["input_size"][1:], InterpolationMode(processor.data_config["interpolation"])
    settings = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
    edge = settings.get("shortest_edge")
    height, width = settings.get("height") or edge or 224, settings.get("width") or edge or 224
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    return (int(height), int(width)), InterpolationMode(names[int(processor.resample)])


def scaled(processor: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a processor makes of 8-bit pictures of the right size, of shape (rows, 3, height, width).

    Of a batch at once it takes half the time that it takes one by one (0.22 against 0.43 ms a picture of 224 pixels; of
    transformers' processors 0.30 against 0.43).
    """
    if not hasattr(processor, "data_config"):  # in ways of their own
        batch = processor(images=[*pixels], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        return batch.float().to(memory_format=torch.channels_last)
    mean, deviation = (
        torch.tensor(processor.data_config[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std")
    )
    return pixels.float().mul_(1 / (255 * deviation)).sub_(mean / deviation)


class _Scaled:
    """`scaled`, of one picture; a class, so that workers can be sent it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return scaled(self.processor, image[None])[0] if image.dtype is torch.uint8 else image


def _resize(model: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same weights for another image size; position embeddings are interpolated (Dosovitskiy et al. 2021, 3.2)."""
    config = model.config
    patch = getattr(config, "patch_size", 1)
    if isinstance(patch, int) and image_size < patch:
        raise UsageError(f"--image_size {image_size} is less than one patch of the model ({patch} pixels).")
    if config.model_type == "timm_wrapper":
        if hasattr(model.timm_model, "set_input_size"):
            sizes: dict[str, Any] = {"img_size": (image_size, image_size)}
            if "window_size" in inspect.signature(model.timm_model.set_input_size).parameters:
                # Swin: the windows that the weights are for; timm would choose others, and not when it loads.
                windows = (part.window_size for part in model.timm_model.modules() if hasattr(part, "window_size"))
                sizes["window_size"] = next(windows)
            model.timm_model.set_input_size(**sizes)
            config.model_args = {**(config.model_args or {}), **sizes, "img_size": image_size}
        elif config.pretrained_cfg.get("fixed_input_size"):
            raise UsageError(
                f"--image_size: {config.architecture} works at {config.pretrained_cfg['input_size'][1]} only."
            )
        config.pretrained_cfg["input_size"] = [3, image_size, image_size]
        config.pretrained_cfg.pop("test_input_size", None)
        return model
    if not hasattr(config, "image_size"):
        return model  # fully convolutional
    config.image_size = image_size
    resized = type(model)(config)
    weights, shapes = model.state_dict(), {key: value.shape for key, value in resized.state_dict().items()}
    for key, value in weights.items():
        if key in shapes and value.shape != shapes[key]:
            weights[key] = _resample_positions(key, value, shapes[key][1])
    resized.load_state_dict(weights)
    return resized


def _resample_positions(key: str, value: torch.Tensor, length: int) -> torch.Tensor:
    """Position embeddings (1, prefix + side², width) for another number of positions."""
    from timm.layers import resample_abs_pos_embed

    prefix = next(
        (count for count in range(3) if int((value.shape[1] - count) ** 0.5) ** 2 == value.shape[1] - count), None
    )
    if "position" not in key or value.ndim != 3 or prefix is None:
        raise UsageError(f"--image_size: this architecture cannot be resized ({key} depends on the size).")
    side = int((length - prefix) ** 0.5)
    return resample_abs_pos_embed(value, new_size=[side, side], num_prefix_tokens=prefix)


def resized_processor(model: PreTrainedModel, processor: Any, image_size: int) -> Any:
    """A processor for another image size, in the terms in which this one gives its own."""
    if hasattr(processor, "data_config"):
        model.config.pretrained_cfg["input_size"] = [3, image_size, image_size]
        return type(processor)(pretrained_cfg=model.config.pretrained_cfg, architecture=model.config.architecture)
    crops = getattr(processor, "do_center_crop", False)
    before = dict(processor.crop_size if crops else processor.size)
    edge = int(before.get("height") or before.get("shortest_edge") or image_size)
    for name in ("size", "crop_size") if crops else ("size",):
        # What is resized larger before a crop stays larger in the same proportion.
        scaled = {
            key: round(value * image_size / edge) for key, value in dict(getattr(processor, name)).items() if value
        }
        setattr(processor, name, scaled)
    return processor
