"""What the rows of a task hold, and what a person calls it in folders and tables."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets

from hftl.audio import audio_problem
from hftl.images import image_problem
from hftl.suffixes import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from hftl.video import video_problem


def is_missing(value: Any) -> bool:
    """Whether a row has no file: an empty cell, or nothing in a data set that holds files."""
    return (
        value is None or (isinstance(value, str) and not value) or (isinstance(value, dict) and not any(value.values()))
    )


@dataclass(frozen=True)
class Modality:
    """One kind of input. One of one's own: `Modality("cloud", "point clouds", frozenset({".npy"}), …)`.

    Attributes:
        name: of the column that holds the inputs, in every data set that `hftl.data` returns.
        plural: of an input, in messages.
        suffixes: of files that hold one input each, in small letters; without any, inputs are texts, in tables.
        columns: names that people give to the column, likeliest first; compared without case.
        problem: `(value, full)` → why a file (a path, or `{"bytes", "path"}`) cannot be read, or None; without `full`
            by its beginning alone.
        feature: the type that `datasets` has for it.
        example: an input, in the lines of the card that load the model.
        has_texts: whether a text goes with each file, in the same table; either of them may be missing.
        has_choices: whether a text comes with a list of others, of which one is right.
        has_words: whether a text is a list of words, each with a label of its own.
        label_columns: names that people give to the column of labels here, before those of every task.
    """

    name: str
    plural: str
    suffixes: frozenset[str] = frozenset()
    columns: tuple[str, ...] = ()
    problem: Callable[[Any, bool], str | None] = lambda value, full: None
    feature: Any = None
    example: str = ""
    has_texts: bool = False
    has_choices: bool = False
    has_words: bool = False
    label_columns: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the inputs stand in tables, and not in files of their own."""
        return not self.suffixes

    def names_file(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path ends as files of this kind do."""
        return os.path.splitext(path)[1].lower() in self.suffixes


#: names of columns with paths, whatever the files hold
_PATHS = ("file", "path", "filename", "file_name", "filepath", "file_path")

# fmt: off
IMAGE = Modality(
    "image", "images",
    IMAGE_SUFFIXES,
    ("image", "img", *_PATHS, "image_path", "image_file", "picture", "photo"),
    image_problem, datasets.Image, '"image.jpg"',
)
AUDIO = Modality(
    "audio", "recordings",
    AUDIO_SUFFIXES,
    ("audio", "sound", "speech", "recording", *_PATHS, "audio_path", "audio_file", "clip", "wav"),
    audio_problem, datasets.Audio, '"recording.wav"',
)
VIDEO = Modality(
    "video", "videos",
    VIDEO_SUFFIXES,
    ("video", "clip", "movie", *_PATHS, "video_path", "video_file"),
    video_problem, datasets.Video, '"video.mp4"',
)
TEXT = Modality(
    "text", "texts",
    columns=(
        "text", "sentence", "review", "content", "question", "comment", "tweet", "message", "utterance", "document",
        "query", "body", "title", "description", "headline", "snippet", "input", "prompt", "caption",
    ),
    example='"A text.", truncation=True',
)
# fmt: on
#: an image, a text, or both
IMAGE_TEXT = dataclasses.replace(
    IMAGE,
    problem=lambda value, full: None if is_missing(value) else image_problem(value, full),
    example='{"image": "image.jpg", "text": "A text."}',
    has_texts=True,
)

#: words in a row; in the column they stand one a line
WORDS = dataclasses.replace(
    TEXT,
    plural="sentences",
    columns=("tokens", "words", *TEXT.columns),
    example='"A text."',
    has_words=True,
    label_columns=("ner_tags", "ner", "tags", "labels", "label", "pos_tags", "upos", "chunk_tags"),
)

#: a text with several others, of which one goes with it
CHOICES = dataclasses.replace(
    TEXT,
    plural="questions",
    columns=("question", "context", "ctx", "premise", "startphrase", "goal", *TEXT.columns),
    has_choices=True,
    label_columns=("label", "answer", "answerkey", "answer_key", "answer_idx", "correct", "gold"),
)

#: the kinds that files are recognised by, whatever the task, with the task that reads them
FILES = {"image-classification": IMAGE, "audio-classification": AUDIO, "video-classification": VIDEO}
