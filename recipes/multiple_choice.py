r"""Fine-tune a model that chooses one of several texts: answers to a question, endings of a story.

Full fine-tuning, of a model from the Hub on a folder with train.jsonl, validation.jsonl and test.jsonl:

    accelerate launch recipes/multiple_choice.py \
        --model google-bert/bert-base-uncased --dataset path/to/folder --output_dir runs/answers

On made questions and weights that need no download:

    python recipes/multiple_choice.py --model builtin:minilm --dataset builtin:riddles

LoRA, on two processes of one machine without a GPU, with the settings of a file:

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml recipes/multiple_choice.py \
        --config recipes/configs/multiple_choice_lora.yaml

Every argument: --help. Methods: full, frozen, partial, lp_ft, gradual, surgical, bitfit, norm, lora, peft, or one of
your own as my_file.py:my_method.
"""

import hftl


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(hftl.ChoiceArguments, argv, description=__doc__)
    task = hftl.MultipleChoice(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    plan = hftl.build_plan(model, arguments)
    return hftl.fit(task, plan, splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
