"""Tasks: what is predicted from what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hftl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from hftl.tasks.classification import ClassificationTask

#: task name → module and class, and the recipe that runs it; strings, so that a name costs no import
TASKS = {
    "image-classification": ("hftl.tasks.image_classification", "ImageClassification", "image_classification"),
    "image-similarity": ("hftl.tasks.image_similarity", "ImageSimilarity", "image_similarity"),
    "audio-classification": ("hftl.tasks.audio_classification", "AudioClassification", "audio_classification"),
    "image-text-classification": (
        "hftl.tasks.image_text_classification",
        "ImageTextClassification",
        "image_text_classification",
    ),
    "video-classification": ("hftl.tasks.video_classification", "VideoClassification", "video_classification"),
    "text-classification": ("hftl.tasks.text_classification", "TextClassification", "text_classification"),
    "multiple-choice": ("hftl.tasks.multiple_choice", "MultipleChoice", "multiple_choice"),
    "token-classification": ("hftl.tasks.token_classification", "TokenClassification", "token_classification"),
}


def check_task(name: str) -> None:
    """Refuse a name that is no task.

    Raises:
        UsageError: as said.
    """
    if name not in TASKS:
        raise UsageError(
            f"Unknown task {name!r}.{did_you_mean(name, TASKS)} There are: {', '.join(TASKS)}. A recipe of "
            "your own: hftl train my_recipe.py --config …, hftl.load_run(RUN, task_class=…)."
        )


def find_task(name: str) -> type[ClassificationTask]:
    """The class of a task.

    Raises:
        UsageError: no such task.
    """
    import importlib

    check_task(name)
    module, class_name, _ = TASKS[name]
    return getattr(importlib.import_module(module), class_name)
