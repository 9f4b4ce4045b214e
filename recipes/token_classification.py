r"""Fine-tune a model that tags words: names of people and places, parts of speech.

Full fine-tuning, of a model from the Hub on a folder with train.conll, validation.conll and test.conll:

    accelerate launch recipes/token_classification.py \
        --model google-bert/bert-base-cased --dataset path/to/folder --output_dir runs/names

On made sentences and weights that need no download (F1 on test 0.91, of names that no other split has):

    python recipes/token_classification.py --model builtin:minilm --dataset builtin:travel-notes

LoRA, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/token_classification.py \
        --config recipes/configs/token_classification_lora.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, or one of
your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.TokenArguments, argv, description=__doc__)
    task = hftl.TokenClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
