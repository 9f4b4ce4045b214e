r"""Fine-tune a classifier of sounds.

Any image model, on log-mel pictures of the sounds; the head alone, on a folder of class folders with recordings:

    accelerate launch recipes/audio_classification.py \
        --model timm/efficientnet_b0.ra_in1k --dataset path/to/folder --method frozen --output_dir runs/birds

A model of waveforms, on a table with paths and labels:

    accelerate launch recipes/audio_classification.py \
        --model facebook/wav2vec2-base --dataset path/to/table.csv --output_dir runs/commands

Full fine-tuning, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/audio_classification.py \
        --config recipes/configs/audio_classification_full.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, setfit,
auto, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.AudioArguments, argv, description=__doc__)
    task = hftl.AudioClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
