r"""Few-shot text classification: tune a sentence encoder by pairs, then solve the head (SetFit, Tunstall et al. 2022).

Sixteen reviews of each class, on real data and weights that need no Hub:

    python recipes/text_few_shot.py --model builtin:minilm --dataset builtin:movie-snippets

Five draws of eight, with the mean of the scores and its 95 % interval:

    accelerate launch recipes/text_few_shot.py --model sentence-transformers/all-mpnet-base-v2 \
        --dataset path/to/table.csv --shots 8 --repeats 5

It is text classification with other defaults: --method setfit and --shots 16. What pairs are worth says --method frozen
beside it, the linear probe.
"""

from dataclasses import dataclass

import hftl


@dataclass
class Arguments(hftl.TextArguments):
    """The arguments of text classification, for a few rows a class."""

    method: str = "setfit"
    shots: int | None = 16


class FewShotText(hftl.TextClassification):
    """Text classification with these defaults."""

    arguments_class = Arguments


def main(argv: list[str] | None = None) -> hftl.Run:
    """From the command line to the finished run."""
    arguments = hftl.parse(Arguments, argv, description=__doc__)
    task = FewShotText(arguments)
    splits = task.load_splits()
    model = task.build_model(splits)
    return hftl.fit(task, hftl.build_plan(model, arguments), splits, arguments)


if __name__ == "__main__":
    hftl.launch(main)
