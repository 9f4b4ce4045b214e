"""The command line: see `_HELP`.

Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hftl import __version__
from hftl.errors import UsageError, did_you_mean, nearest_choice
from hftl.hub import check_name
from hftl.inert import on_one_line, without_home
from hftl.launch import launch, quick_imports
from hftl.tasks import TASKS, check_task

if TYPE_CHECKING:
    from hftl.examples import Examples
    from hftl.finished import Finished
    from hftl.run import Run


class _Parser(argparse.ArgumentParser):
    """Errors as `UsageError`; no flag stands for a longer one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].partition("=")[0]
        flags = self._option_string_actions
        near = did_you_mean(unknown, flags) if unknown.startswith("--") else nearest_choice(message)
        raise UsageError(f"{message[0].upper()}{message[1:]}.{near} See hftl --help.")


def _positive(text: str) -> int:
    """A number above 0, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    """A port, for argparse."""
    if _positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, not {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `hftl` command."""
    launch(_run, list(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> None:
    commands = _commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
    elif argv[0] == "--version":
        print(f"hftl {__version__}")
    elif argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        raise UsageError(f"Unknown command {argv[0]!r}.{did_you_mean(argv[0], commands)} See hftl --help.")


def _commands() -> dict[str, Callable[[list[str]], None]]:
    return {
        "train": _train,
        "predict": _predict,
        "evaluate": _evaluate,
        "report": _report,
        "compare": _compare,
        "demo": _demo,
        "push": _push,
        "ls": _list,
        "cp": _copy,
        "cache": _cache,
        "rank": _rank,
        "advise": _advise,
        "check-labels": _check_labels,
        "lr-find": _lr_find,
        "tune": _tune,
        "completion": _completion,
    }


_HELP = f"""usage: hftl COMMAND …

Fine-tune pretrained models with the Hugging Face stack.

Train
  hftl train TASK --model M --dataset D --method full|frozen|partial|lora|peft|auto|…
  hftl train my_recipe.py …         a recipe of your own
  hftl train --config RUN/recipe.yaml --output_dir NEW

Choose
  hftl rank --models A B C --dataset D
                                    which model suits the data, without training; --output table.csv
  hftl advise TASK --model M --dataset D
                                    which method suits both, measured, and the command to paste
  hftl check-labels TASK --model M --dataset D
                                    training rows whose label is likely wrong; --output suspects.csv
  hftl lr-find TASK --model M --dataset D …
                                    a range test of the learning rate; --output lr_find.png, --steps 100
  hftl tune TASK --model M --dataset D --trials N --search 'learning_rate=log(1e-5,1e-3) method=lora,partial'

Use a finished run
  hftl predict RUN INPUT            a file, a folder, or a text; --output out.csv
  hftl evaluate RUN --dataset D     scores on labelled data; --split NAME
  hftl report RUN                   its report.html made anew: scores, mistakes, curves
  hftl compare RUN RUN …            scores with intervals, settings, who is right where; --output page.html
  hftl demo RUN                     a page to try it on, in the browser; --port
  hftl push RUN REPOSITORY          to the Hub; --private, --revision BRANCH, --create_pr

Other
  hftl ls                           the recipes and configurations that come with hftl
  hftl cp RECIPE my_recipe.py       a copy of a recipe, or of a configuration, to change
  hftl cache ls|size|rm             what is kept of models and data; rm NAME, rm --all
  hftl completion bash|zsh|fish     a script by which the shell completes these commands and their flags
  hftl --version

tasks: {", ".join(TASKS)}
every flag of a task: hftl train TASK --help"""


def recipes_folder() -> Path:
    """The recipes that came with the package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())


def find_recipe(name: str) -> Path:
    """The file of a recipe: of a task, by its own name, or a path.

    Raises:
        UsageError: there is none.
    """
    if name.endswith(".py"):
        return Path(name)
    if name in TASKS:
        return recipes_folder() / f"{TASKS[name][2]}.py"
    names = {path.stem: path for path in recipes_folder().glob("*.py")}
    if name not in names:
        raise UsageError(
            f"Unknown task or recipe {name!r}.{did_you_mean(name, [*TASKS, *names])} There are: "
            f"{', '.join([*TASKS, *names])}, and the path of a file."
        )
    return names[name]


def run_recipe(path: Path, argv: list[str]) -> Run:
    """Call the `main(argv)` of a recipe.

    Raises:
        UsageError: there is no such file, or no `main` in it.
    """
    with quick_imports():
        from hftl.loading import load_file

    recipe = load_file(path, "Recipe")
    main = getattr(recipe, "main", None)
    try:
        inspect.signature(main).bind(argv)  # type: ignore[arg-type]
    except TypeError as error:
        advice = "copy one with `hftl cp` to see its shape"
        raise UsageError(f"Recipe {str(path)!r} has no function main(argv): {advice}.") from error
    return recipe.main(argv)


def finetune(task: str, **settings: Any) -> Run:
    """Fine-tune from Python, as `hftl train` does from the command line.

    Args:
        task: name of a task, or path of a recipe.
        settings: any flag by its name, such as `model=…, dataset=…, method="lora", num_train_epochs=3`.

    Returns:
        The finished run.

    Raises:
        UsageError: bad input.
    """
    from hftl.arguments import argument_tokens

    tokens = [token for name, value in settings.items() for token in argument_tokens(name, value)]
    return run_recipe(find_recipe(task), tokens)


def _train(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-"):
        run_recipe(find_recipe(argv[0]), argv[1:])
        return
    if argv in (["--help"], ["-h"]):
        print(f"usage: hftl train TASK …\n\ntasks: {', '.join(TASKS)}\nevery flag of a task: hftl train TASK --help")
        return
    run_recipe(find_recipe(_task_of_config(argv)), argv)


def _task_of_config(argv: list[str]) -> str:
    """The task that a configuration file names."""
    task = _config_of(argv).get("task")
    if not task:
        raise UsageError(
            f"Name the task: hftl train TASK …, with one of {', '.join(TASKS)}, or `task:` in the --config file."
        )
    check_task(str(task))
    return str(task)


def _config_of(argv: list[str]) -> dict[str, Any]:
    """What the file of `--config` says; nothing without one."""
    path = next((token.partition("=")[2] for token in argv if token.startswith("--config=")), None)
    if "--config" in argv[:-1]:
        path = argv[argv.index("--config") + 1]
    if not path:
        return {}
    from hftl.arguments import find_config
    from hftl.yaml_files import read_yaml

    return read_yaml(find_config(path))


#: what `hftl predict` does not write
_OTHER_FORMATS = {".json", ".jsonl", ".parquet", ".tsv", ".xls", ".xlsx"}
#: no text: a name without spaces that begins or ends as a path does
_IS_PATH = re.compile(r"(~|\.{0,2})/\S*$|\S+/$")


def _predict(argv: list[str]) -> None:
    parser = _Parser(prog="hftl predict", description="Labels and probabilities of new inputs.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("input", help="image, recording, video, folder, table or text file; or a text")
    parser.add_argument("--output", help="CSV file to write (default: print)")
    parser.add_argument("--gallery", help="image-similarity: what to search, as the input (default: give the vectors)")
    parser.add_argument("--neighbours", type=_positive, help="of the gallery for each input (default: 5)")
    parser.add_argument("--batch_size", type=_positive, help="rows through the model at once (default: what is fast)")
    parser.add_argument("--skip_bad_files", action="store_true", help="leave out files that cannot be read")
    parser.add_argument("--follow_links", action="store_true", help="as for hftl train")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32"),
        default="auto",
        help="auto: that of the training where this machine is made for it, with the labels of fp32",
    )
    _add_columns(parser, "text", "text_pair", "choices", "image", "audio", "video")
    _add_trust(parser)
    options = parser.parse_args(argv)
    _check_output(options.output, options.input)
    if options.output is not None and Path(options.output).suffix.lower() in _OTHER_FORMATS:
        raise UsageError(f"--output {options.output!r}: predictions are written as CSV: name a file that ends in .csv.")
    with quick_imports():
        from hftl.predictions import write_predictions
        from hftl.run import load_run
        from hftl.suffixes import TABLE_SUFFIXES
        from hftl.words import CONLL_SUFFIXES

    _choose_device()
    run = load_run(options.run, trust_remote_code=options.trust_remote_code)
    run.task.arguments.follow_links |= options.follow_links
    if options.precision == "fp32":
        run.precision = options.precision
    of_texts = {*TABLE_SUFFIXES, *CONLL_SUFFIXES}
    looks_like_path = Path(options.input).suffix.lower() in of_texts or _IS_PATH.match(options.input)
    is_file = not run.task.modality.is_text or looks_like_path or os.path.exists(options.input)
    source = Path(options.input) if is_file else options.input
    output = None if options.output is None else Path(options.output)
    settings = {"batch_size": options.batch_size, "skip_bad_files": options.skip_bad_files}
    settings |= _columns(options, run)
    if options.gallery is not None:
        run.use_gallery(Path(options.gallery), options.neighbours or 5, **settings)
    elif options.neighbours is not None:
        raise UsageError("--neighbours are those of a --gallery, which is missing.")
    write_predictions(run, source, output, **settings)


def _choose_device() -> None:
    """Give each process of a launcher a GPU of its own, or on the CPU its share of the cores."""
    import torch

    from hftl.compute import share_threads

    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    share_threads(on_cpu=not torch.accelerator.is_available())


#: files of a run that end as what commands write
_OF_RUNS = ("predictions.csv", "trials.csv", "report.html")


def _check_output(output: str | None, source: str = "", endings: Sequence[str] = ()) -> None:
    """Refuse a place that cannot be written, or must not be, before anything is computed."""
    if output is not None and endings and not output.lower().endswith(tuple(endings)):
        raise UsageError(f"--output {output!r}: name a file that ends in {' or '.join(endings)}.")
    if output is not None and Path(output).name in _OF_RUNS and os.path.exists(output) and _is_run(Path(output).parent):
        raise UsageError(f"--output {output!r} is a file of a run: name another.")
    if output is not None and os.path.exists(output) and os.path.exists(source) and os.path.samefile(output, source):
        raise UsageError(f"--output {output!r} is the input itself: name another file.")
    if output is not None and not Path(output).parent.is_dir():
        raise UsageError(f"--output {output!r}: there is no folder {str(Path(output).parent)!r}.")
    if output is not None and Path(output).is_dir():
        raise UsageError(f"--output {output!r} is a folder: name a file in it.")
    if output is not None and os.path.exists(output) and not Path(output).is_file():
        raise UsageError(f"--output {output!r} is no ordinary file, and would be replaced by one: name another.")


def _is_run(place: Path) -> bool:
    """Whether a folder holds a finished run."""
    from hftl.folder import METRICS, RECIPE

    return (place / METRICS).is_file() and (place / RECIPE).is_file()


def _evaluate(argv: list[str]) -> None:
    parser = _Parser(prog="hftl evaluate", description="Scores of a finished run on labelled data.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--dataset", "--dataset_name", required=True, help="as for hftl train")
    parser.add_argument("--split", help="its name (default: test, else validation, else the only one)")
    parser.add_argument("--dataset_config_name", help="as for hftl train")
    parser.add_argument("--skip_bad_files", action="store_true", help="as for hftl train")
    parser.add_argument("--follow_links", action="store_true", help="as for hftl train")
    parser.add_argument("--batch_size", type=_positive, help="rows through the model at once (default: what is fast)")
    _add_columns(parser, "label", "text", "text_pair", "choices", "image", "audio", "video")
    _add_trust(parser)
    options = parser.parse_args(argv)
    with quick_imports():
        from hftl.run import load_run

    run = load_run(options.run, trust_remote_code=options.trust_remote_code)
    run.task.arguments.follow_links |= options.follow_links
    scores = run.evaluate(
        options.dataset,
        options.split,
        options.batch_size,
        options.dataset_config_name,
        options.skip_bad_files,
        **_columns(options, run),
    )
    from hftl.metrics import written

    for name, value in scores.items():
        print(f"{on_one_line(name):<27} {written(name, value)}")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that lies in the run's folder"
    )


def _add_columns(parser: argparse.ArgumentParser, *roles: str) -> None:
    for role in roles:
        parser.add_argument(f"--{role}_column", dest=role, help="where it is not found by its name")


def _columns(options: argparse.Namespace, run: Run) -> dict[str, str]:
    """The columns that were named, by role."""
    named = {
        role: getattr(options, role, None)
        for role in ("label", "text", "text_pair", "choices", "image", "audio", "video")
    }
    for role, name in named.items():
        if name is not None and not hasattr(run.task.arguments, f"{role}_column"):
            raise UsageError(f"--{role}_column does not belong to the task {run.task.name} of this run.")
    return {role: name for role, name in named.items() if name is not None}


def _rank(argv: list[str]) -> None:
    parser = _Parser(
        prog="hftl rank",
        description="Which model suits the data, before any is trained. Other flags: as for hftl train.",
    )
    parser.add_argument("--task", choices=tuple(TASKS), help="default: what the files of the data are for")
    parser.add_argument(
        "--models", required=True, nargs="+", metavar="MODEL", help="as --model; for images and videos MODEL@SIDE"
    )
    from hftl import folder, ranked

    parser.add_argument("--by", default="logme", choices=ranked.MEASURES)
    parser.add_argument("--output", help="CSV file to write, beside the table that is printed")
    options, rest = parser.parse_known_args(argv)
    _check_output(options.output, endings=[".csv"])
    config = _config_of(rest)
    named = config.get("dataset") or config.get("dataset_name")
    dataset = ranked.dataset_of(rest) or (str(named) if named else None)
    folder.check_not_data(options.output, dataset)
    models = list(dict.fromkeys(options.models))
    task = options.task or str(config.get("task") or ranked.task_of_data(dataset))
    check_task(task)
    identities = ranked.identify(task, models, rest)  # as the files are before they are read
    found = ranked.known(identities)
    if found:
        folder.say(f"ranked before, from the same files and versions: {', '.join(found)}")
    others = [model for model in models if model not in found]
    if others:
        with quick_imports():
            from hftl import ranking

        found |= {entry.model: entry for entry in ranking.rank(task, others, rest, identities)}
    ranked.show([found[model] for model in models], options.by, task, rest, options.output)


def _advise(argv: list[str]) -> None:
    task = _named_task(argv, "advise")
    with quick_imports():
        from hftl import advice

    advice.main(task, argv[1:])


def _check_labels(argv: list[str]) -> None:
    task = _named_task(argv, "check-labels")
    parser = _training_parser("check-labels", "Training rows whose label is likely wrong.")
    parser.add_argument("--output", help="CSV file to write, with all of them")
    options, rest = parser.parse_known_args(argv[1:])
    _check_output(options.output, endings=[".csv"])
    with quick_imports():
        from hftl import check_labels

    check_labels.main(task, rest, options.output)


def _lr_find(argv: list[str]) -> None:
    task = _named_task(argv, "lr-find")
    parser = _training_parser("lr-find", "A range test of the learning rate.")
    parser.add_argument("--output", default="lr_find.png", help="picture, .png, .svg or .pdf (default: lr_find.png)")
    parser.add_argument("--steps", type=_positive, default=100, help="of the test (default: 100)")
    options, rest = parser.parse_known_args(argv[1:])
    _check_output(options.output, endings=[".png", ".svg", ".pdf"])
    with quick_imports():
        from hftl.fitting import find_learning_rate

    find_learning_rate(task, rest, Path(options.output), options.steps)


def _tune(argv: list[str]) -> None:
    task = _named_task(argv, "tune")
    parser = _training_parser("tune", "A search for settings, by trials that are stopped early.")
    parser.add_argument("--trials", type=_positive, required=True, help="how many")
    parser.add_argument(
        "--search",
        nargs="+",
        required=True,
        metavar="NAME=RANGE",
        help="log(1e-5,1e-3), uniform(0,1), int(1,8) or a list a,b,c, in which default leaves the flag out",
    )
    options, rest = parser.parse_known_args(argv[1:])
    with quick_imports():
        from hftl import tuning

    tuning.main(task, rest, " ".join(options.search), options.trials)


def _training_parser(command: str, description: str) -> _Parser:
    """The parser of a command that also takes the flags of a training, which are left to it."""
    return _Parser(
        prog=f"hftl {command} TASK",
        description=f"{description} Other flags: those of hftl train TASK, see hftl train TASK --help.",
    )


def _named_task(argv: list[str], command: str) -> str:
    """The task that a command is for; only its help can do without."""
    if argv[:1] in (["--help"], ["-h"]):
        argv.insert(0, next(iter(TASKS)))
    if not argv or argv[0].startswith("-"):
        raise UsageError(f"Name the task: hftl {command} TASK --model M --dataset D …, with one of {', '.join(TASKS)}.")
    check_task(argv[0])
    return argv[0]


def _report(argv: list[str]) -> None:
    parser = _Parser(prog="hftl report", description="Make the report.html of a finished run anew.")
    parser.add_argument("run", help="folder of a finished run")
    _add_trust(parser)
    options = parser.parse_args(argv)
    from hftl.finished import explained_damage, find_run
    from hftl.report import write_report

    run = find_run(options.run)
    examples = _examples(run, options.trust_remote_code) if run.is_one_of_several else None
    with explained_damage(run.folder):
        path = write_report(run, examples)
    print(without_home(f"written to {path}"))


def _examples(run: Finished, trust_remote_code: bool) -> Examples | None:
    """What a report shows of single rows: as it was kept, else made of the data and the model."""
    from hftl.examples import read_examples
    from hftl.folder import PREDICTIONS

    there = (run.folder / PREDICTIONS).is_file()
    examples = read_examples(run) if there else None
    if examples is not None:
        return examples
    if there and run.task_name not in TASKS:
        print(f"no examples are shown: the task {run.task_name} is of a recipe of its own, which makes the report")
        return None
    with quick_imports():
        from hftl.known_rows import look, read_splits
        from hftl.run import load_run

    loaded = load_run(run.folder, trust_remote_code=trust_remote_code)
    return look(loaded, read_splits(loaded))


def _compare(argv: list[str]) -> None:
    parser = _Parser(
        prog="hftl compare", description="Finished runs beside each other, on the test rows that all have."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", help="page to write, beside the table that is printed")
    _add_trust(parser)
    options = parser.parse_args(argv)
    _check_output(options.output, endings=[".html"])
    from hftl import compare

    compare.main(options.runs, options.output, options.trust_remote_code)


def _demo(argv: list[str]) -> None:
    parser = _Parser(prog="hftl demo", description="A page to try a finished run on, on this machine alone.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("--port", type=_port, help="of 127.0.0.1 (default: a free one from 7860 on)")
    _add_trust(parser)
    options = parser.parse_args(argv)
    with quick_imports():
        from hftl import demo

    demo.main(options.run, options.port, options.trust_remote_code)


def _push(argv: list[str]) -> None:
    parser = _Parser(prog="hftl push", description="Push a finished run to the Hub.")
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("repository", help="NAME or USER/NAME")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; it is made where it is not there")
    parser.add_argument("--create_pr", action="store_true", help="propose the commit instead of making it")
    _add_trust(parser)
    options = parser.parse_args(argv)
    check_name(options.repository)
    from hftl.finished import find_run

    run = find_run(options.run)
    with quick_imports():
        from hftl.push import push
        from hftl.run import load_run

    if run.task_name in TASKS:  # what is damaged is not pushed; of other tasks only their recipe can tell
        run = load_run(options.run, trust_remote_code=options.trust_remote_code)
    how = {"private": options.private, "revision": options.revision, "create_pr": options.create_pr}
    print(push(run, options.repository, **how))


def _completion(argv: list[str]) -> None:
    parser = _Parser(
        prog="hftl completion",
        description="Print a script by which a shell completes hftl's commands. Write it to a file once, and let "
        "~/.bashrc (or what the shell reads) source that file.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    options = parser.parse_args(argv)
    with quick_imports():
        from hftl.completion import script

    print(script(options.shell, _commands()), end="")


def _list(argv: list[str]) -> None:
    _Parser(prog="hftl ls", description="List recipes and configurations.").parse_args(argv)
    for path in sorted(recipes_folder().glob("*.py")):
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"{path.stem:<40}{first}")
    print("\n".join(_configurations()))


def _configurations() -> dict[str, Path]:
    """The files of settings that come with hftl, by the names that `hftl ls` shows."""
    recipes = recipes_folder()
    files = [*recipes.glob("configs/*.yaml"), *recipes.parent.glob("accelerate_configs/*.yaml")]
    return {f"{path.parent.name}/{path.name}": path for path in sorted(files)}


def _copy(argv: list[str]) -> None:
    parser = _Parser(prog="hftl cp", description="Copy a recipe or configuration, to change it.")
    parser.add_argument("name", help="as hftl ls shows it")
    parser.add_argument("target", help="file or folder")
    options = parser.parse_args(argv)
    known = _configurations()
    if options.name.endswith(".yaml") and options.name not in known:
        raise UsageError(f"There is no {options.name!r}.{did_you_mean(options.name, known)} See hftl ls.")
    source = known.get(options.name) or find_recipe(options.name)
    target = Path(options.target)
    target = target / source.name if os.path.isdir(target) else target
    if os.path.lexists(target):
        raise UsageError(f"{str(target)!r} exists already: name another file.")
    if not target.parent.is_dir():
        raise UsageError(f"{str(target)!r}: there is no folder {str(target.parent)!r}.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UsageError(f"{str(target)!r} cannot be written: {error.strerror}.") from error
    print(without_home(f"copied to {target}"))


#: entries of the cache that are of no one model
_SHARED_BY_ALL = {
    "images": "pictures of training and validation",
    "tokens": "texts as tokens",
    "precision.json": "what --precision auto measured",
}


def _cache(argv: list[str]) -> None:
    parser = _Parser(prog="hftl cache", description="The features, pictures and tokens that are kept.")
    parser.add_argument("action", choices=("ls", "size", "rm"))
    parser.add_argument("name", nargs="?", help="rm: the beginning of a name that hftl cache ls shows")
    parser.add_argument("--all", action="store_true", help="rm: everything")
    options = parser.parse_args(argv)
    from hftl.builtin import cache_folder
    from hftl.folder import folder_bytes

    shared = [entry for kind in _SHARED_BY_ALL for entry in cache_folder().glob(f"*{kind}")]
    entries = [*sorted(cache_folder().glob("features/*/")), *shared]
    if options.action == "size":
        print(without_home(f"{sum(map(folder_bytes, entries)) / 1e6:,.1f} MB in {cache_folder()}"))
    elif options.action == "ls":
        for entry in entries:
            print(f"{entry.name:<32}  {folder_bytes(entry) / 1e6:9,.1f} MB  {_cached(entry)}")
    else:
        for entry in entries if options.all else [_named_entry(entries, options.name)]:
            try:
                aside = entry.rename(entry.with_name(f".{uuid.uuid4().hex}-{entry.name}"))  # runs may write meanwhile
                size = folder_bytes(aside)
                aside.unlink() if aside.is_file() else shutil.rmtree(aside)
            except OSError as error:
                raise UsageError(f"hftl cache rm: {entry} cannot be removed: {error.strerror}.") from error
            print(f"removed {entry.name}, {size / 1e6:,.1f} MB")


def _cached(entry: Path) -> str:
    """What is kept in a folder of the cache: last use, model and place."""
    import datetime

    from hftl.builtin import cache_folder
    from hftl.yaml_files import read_yaml

    path = entry / "settings.json"
    if entry.parent == cache_folder():
        return next(content for kind, content in _SHARED_BY_ALL.items() if entry.name.endswith(kind))
    if not path.is_file():
        return "unfinished"
    settings = read_yaml(path)  # JSON is YAML too
    used = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(sep=" ", timespec="minutes")
    return f"{used}  {settings['model']}, {settings['entry']}"


def _named_entry(entries: list[Path], name: str | None) -> Path:
    if not name:
        raise UsageError("hftl cache rm needs a name that hftl cache ls shows, or --all.")
    found = [entry for entry in entries if entry.name.startswith(name)]
    if len(found) != 1:
        state = "several names begin" if found else "there is no name that begins"
        raise UsageError(f"hftl cache rm: {state} with {name!r}. See hftl cache ls.")
    return found[0]
