r"""Learn which images are alike: a vector for every image, to search by (metric learning).

Full fine-tuning, of a model from the Hub on a folder of class folders; those of its test split may be other classes:

    accelerate launch recipes/image_similarity.py \
        --model timm/resnet50.a1_in1k --dataset path/to/products --output_dir runs/products

Then what of a catalogue is most like some pictures, which nothing was trained on:

    hftl predict runs/products path/to/pictures --gallery path/to/catalogue --neighbours 5

On real data and weights that need no download, on kept features:

    python recipes/image_similarity.py \
        --model builtin:efficientnet_lite0 --dataset builtin:digits --method frozen --horizontal_flip false

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft,
zero_shot, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.SimilarityArguments, argv, description=__doc__)
    task = hftl.ImageSimilarity(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
