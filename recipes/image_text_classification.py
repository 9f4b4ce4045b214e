r"""Fine-tune a classifier of images with texts: any image backbone and any text backbone, joined by gates.

Full fine-tuning, on a table with a column of paths, one of texts and one of labels:

    accelerate launch recipes/image_text_classification.py \
        --model timm/efficientnet_b0.ra_in1k --text_model distilbert/distilbert-base-uncased \
        --dataset path/to/table.csv --output_dir runs/posts

The layers that join them alone, on data and weights that need no download:

    python recipes/image_text_classification.py \
        --model builtin:efficientnet_lite0 --text_model builtin:minilm --dataset builtin:captions --method frozen

LoRA, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/image_text_classification.py \
        --config recipes/configs/image_text_classification_lora.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, setfit,
auto, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.ImageTextArguments, argv, description=__doc__)
    task = hftl.ImageTextClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
