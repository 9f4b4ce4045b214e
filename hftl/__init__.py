"""hftl: transfer learning with the Hugging Face stack."""

from __future__ import annotations

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from hftl.launch import launch, quick_imports  # the function of that name, before its module can take its place

__version__ = "0.1.0"

# DDP's C++ part prints a warning for each process in the midst of training, which asks nothing of the person.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# So does bitsandbytes, which peft imports where it is installed: it names kernels that could be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

#: public name → module; imported when first used, so that `import hftl` and `hftl --help` cost nothing
_PUBLIC = {
    "AudioArguments": "hftl.arguments",
    "AudioClassification": "hftl.tasks.audio_classification",
    "ChoiceArguments": "hftl.arguments",
    "ClassificationTask": "hftl.tasks.classification",
    "CrossEntropyLoss": "hftl.losses",
    "EmbeddingPrediction": "hftl.problems",
    "FileDataset": "hftl.tasks.files",
    "ImageArguments": "hftl.arguments",
    "ImageClassification": "hftl.tasks.image_classification",
    "ImageSimilarity": "hftl.tasks.image_similarity",
    "ImageTextArguments": "hftl.arguments",
    "ImageTextClassification": "hftl.tasks.image_text_classification",
    "Modality": "hftl.modality",
    "MultipleChoice": "hftl.tasks.multiple_choice",
    "NeighboursPrediction": "hftl.problems",
    "Plan": "hftl.methods",
    "LabelsPrediction": "hftl.problems",
    "TagsPrediction": "hftl.problems",
    "Prediction": "hftl.problems",
    "Run": "hftl.run",
    "SimilarityArguments": "hftl.arguments",
    "Stage": "hftl.methods",
    "TextArguments": "hftl.arguments",
    "TextClassification": "hftl.tasks.text_classification",
    "TokenArguments": "hftl.arguments",
    "TokenClassification": "hftl.tasks.token_classification",
    "TransferArguments": "hftl.arguments",
    "TransferTrainer": "hftl.trainer",
    "UsageError": "hftl.errors",
    "ValuePrediction": "hftl.problems",
    "VideoArguments": "hftl.arguments",
    "VideoClassification": "hftl.tasks.video_classification",
    "build_plan": "hftl.methods",
    "finetune": "hftl.cli",
    "fit": "hftl.fitting",
    "load_run": "hftl.run",
    "parse": "hftl.arguments",
}

if TYPE_CHECKING:
    from hftl.arguments import (
        AudioArguments,
        ChoiceArguments,
        ImageArguments,
        ImageTextArguments,
        SimilarityArguments,
        TextArguments,
        TokenArguments,
        TransferArguments,
        VideoArguments,
        parse,
    )
    from hftl.cli import finetune
    from hftl.errors import UsageError
    from hftl.fitting import fit
    from hftl.losses import CrossEntropyLoss
    from hftl.methods import Plan, Stage, build_plan
    from hftl.modality import Modality
    from hftl.problems import (
        EmbeddingPrediction,
        LabelsPrediction,
        NeighboursPrediction,
        Prediction,
        TagsPrediction,
        ValuePrediction,
    )
    from hftl.run import Run, load_run
    from hftl.tasks.audio_classification import AudioClassification
    from hftl.tasks.classification import ClassificationTask
    from hftl.tasks.files import FileDataset
    from hftl.tasks.image_classification import ImageClassification
    from hftl.tasks.image_similarity import ImageSimilarity
    from hftl.tasks.image_text_classification import ImageTextClassification
    from hftl.tasks.multiple_choice import MultipleChoice
    from hftl.tasks.text_classification import TextClassification
    from hftl.tasks.token_classification import TokenClassification
    from hftl.tasks.video_classification import VideoClassification
    from hftl.trainer import TransferTrainer

__all__ = ["__version__", "launch", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        with quick_imports():
            return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hftl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
