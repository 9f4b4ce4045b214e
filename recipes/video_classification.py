r"""Fine-tune a classifier of videos.

A model of transformers (VideoMAE, TimeSformer, ViViT), on a folder of class folders with videos:

    accelerate launch recipes/video_classification.py \
        --model MCG-NJU/videomae-base --dataset path/to/folder --method frozen --output_dir runs/sports

A network of torchvision (R3D, MViT, Video Swin) or PyTorchVideo (SlowFast, X3D), on a table with paths and labels:

    accelerate launch recipes/video_classification.py \
        --model torchvision:r3d_18 --dataset path/to/table.csv --output_dir runs/gestures

From nothing, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/video_classification.py \
        --config recipes/configs/video_classification_full.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, setfit,
auto, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.VideoArguments, argv, description=__doc__)
    task = hftl.VideoClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
