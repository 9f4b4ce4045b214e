r"""Fine-tune a text classifier.

First the new head, then everything, of a model from the Hub on a table with texts and labels:

    accelerate launch recipes/text_classification.py \
        --model google-bert/bert-base-uncased --dataset path/to/table.csv --output_dir runs/reviews

The head alone, on real data and weights that need no Hub:

    python recipes/text_classification.py \
        --model builtin:minilm --dataset builtin:movie-snippets --method frozen

LoRA, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/text_classification.py \
        --config recipes/configs/text_classification_lora.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, setfit,
auto, or one of your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.TextArguments, argv, description=__doc__)
    task = hftl.TextClassification(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
