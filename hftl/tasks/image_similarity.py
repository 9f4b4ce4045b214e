"""Image similarity (metric learning): a vector for every image, near to those of images that are alike.

The model is one of `AutoModelForImageClassification`, whose output layer gives the vector in the place of classes:
every method, and plain transformers, take it as they take any other.
"""

from __future__ import annotations

import json

from hftl.arguments import SimilarityArguments
from hftl.tasks.image_classification import ImageClassification

_USAGE = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
processor = AutoImageProcessor.from_pretrained({title})
model = AutoModelForImageClassification.from_pretrained({title})
pictures = [Image.open(name).convert("RGB") for name in ("one.jpg", "another.jpg")]
with torch.no_grad():
    vectors = model(**processor(images=pictures, return_tensors="pt")).logits
one, another = torch.nn.functional.normalize(vectors, dim=1)
print(float(one @ another))  # how alike they are, from -1 to 1"""


class ImageSimilarity(ImageClassification):
    """Which images are alike, learned from labels; the labels to come may be others."""

    name = "image-similarity"
    hub_name = "image-feature-extraction"
    explains = False
    arguments_class = SimilarityArguments
    arguments: SimilarityArguments

    def _usage(self, title: str) -> str:
        """The lines that compare two images; transformers has no pipeline for it."""
        return _USAGE.format(title=json.dumps(title))
