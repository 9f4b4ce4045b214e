r"""Fine-tune an image classifier.

First the new head, then everything, of a model from the Hub on a folder of class folders:

    accelerate launch recipes/image_classification.py \
        --model timm/resnet50.a1_in1k --dataset path/to/folder --output_dir runs/pets

The head alone, on real data and weights that need no download:

    python recipes/image_classification.py \
        --model builtin:efficientnet_lite0 --dataset builtin:digits --method frozen --horizontal_flip false

LoRA, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/image_classification.py \
        --config recipes/configs/image_classification_lora.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, setfit,
zero_shot, auto, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.ImageArguments, argv, description=__doc__)
    task = hftl.ImageClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
