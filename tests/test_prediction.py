"""Prediction of any number of rows: in order, in pieces, in several processes, and whole or not at all."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from forked import LAUNCH, ROOT, Command, run_command, run_ranks
from PIL import Image
from refusal import refused

import hftl
from hftl import batches, cli

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    small_data.write_images(folder / "images", {"train": 4, "val": 2}, size=16)
    tiny_models.write_tiny_cnn(folder / "convnet")
    small_data.write_texts(folder / "texts", {"train": 16, "dev": 8})
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    random = np.random.default_rng(0)
    for index in range(600):  # three pieces
        path = folder / "many" / f"{index % 3}" / f"{index:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = random.choice(["good", "bad", "film", "day"], size=int(random.integers(1, 20)))
        for file in (path, folder / "notes" / path.name):
            file.parent.mkdir(exist_ok=True)
            file.write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def text_run(place: Path) -> hftl.Run:
    common = {"dataset": place / "texts", "max_steps": 2, "output_dir": place / "text"}
    return hftl.load_run(hftl.finetune("text-classification", model=place / "bert", **common).folder)


@pytest.fixture(scope="module")
def image_run(place: Path) -> hftl.Run:
    common = {"dataset": place / "images", "image_size": 32, "max_steps": 2, "output_dir": place / "image"}
    return hftl.load_run(hftl.finetune("image-classification", model=place / "convnet", **common).folder)


def write_pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = np.random.default_rng(1)
    for index in range(count):
        Image.fromarray(random.integers(0, 255, (8, 8, 3)).astype("uint8")).save(folder / f"{index:04}.png")
    return folder


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_texts_keep_their_order_and_their_answers(place: Path, text_run: hftl.Run) -> None:
    texts = [path.read_text() for path in sorted((place / "notes").iterdir())]
    alone = [text_run.predict(text, batch_size=1)[0].probability for text in texts[:40]]
    assert len(set(alone)) > 5
    together = text_run.predict(texts)
    assert [entry.id for entry in together] == [str(index) for index in range(600)]
    assert [entry.probability for entry in together[:40]] == pytest.approx(alone, abs=1e-5)
    of_folder = text_run.predict(place / "notes")
    assert [entry.id for entry in of_folder] == [f"{index:03}.txt" for index in range(600)]
    assert [entry.probability for entry in of_folder] == pytest.approx([e.probability for e in together], abs=1e-5)


def test_half_precision_gives_the_labels_of_float32(place: Path, text_run: hftl.Run) -> None:
    assert text_run.precision == "fp32"  # as it was trained: too few rows for anything else
    settings = {"dataset": place / "texts", "max_steps": 40, "learning_rate": 1e-2, "output_dir": place / "clear"}
    run = hftl.finetune("text-classification", model=place / "bert", **settings)
    rows = run.task.read_inputs(place / "notes")
    gaps = run.logits(rows) @ [1, -1]
    with torch.no_grad():
        middle = float(np.sort(gaps)[len(gaps) // 2])
        run.model.classifier.bias[1] += middle - 1e-3  # a row is next to a tie, and half of the others on each side
    exact = run.logits(rows)
    run.precision = "bf16"
    half = run.logits(rows)
    moved = np.abs(half - exact).max(axis=1) > 1e-4
    assert moved.sum() > 50  # in half precision
    assert not moved[np.abs(exact @ [1, -1]).argmin()]  # nearest to a tie
    assert half.argmax(axis=1).tolist() == exact.argmax(axis=1).tolist()


def test_what_is_no_number_in_half_precision_is_computed_again(
    text_run: hftl.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = hftl.load_run(text_run.folder)
    texts = [f"good film {index}" for index in range(40)]
    expected = [entry.probabilities for entry in run.predict(texts, batch_size=10)]
    plain = run._viewed

    def viewed(inputs: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        answers = plain(inputs, "fp32")
        return answers * torch.nan if precision == "bf16" and len(answers) > 1 else answers

    monkeypatch.setattr(run, "_viewed", viewed)
    run.precision = "bf16"
    found = [entry.probabilities for entry in run.predict(texts, batch_size=10)]
    assert [list(row.values()) for row in found] == [pytest.approx(list(row.values()), abs=1e-5) for row in expected]


def test_one_row_does_not_tell_how_far_half_precision_goes(text_run: hftl.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = hftl.load_run(text_run.folder)
    plain, exact = run._viewed, []

    def viewed(inputs: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        exact.extend([precision == "fp32"] * len(inputs["input_ids"]))
        return plain(inputs, precision)

    monkeypatch.setattr(run, "_viewed", viewed)
    run.precision = "bf16"
    for index in range(31):
        run.predict([f"good film {index}"])
    assert sum(exact) == 31  # all of them again
    run.predict(["bad film"])
    monkeypatch.setattr(run.task.problem, "unsure", lambda answers, distance: torch.zeros(len(answers), dtype=bool))
    exact.clear()
    run.predict(["bad film"])
    assert exact == [False]
    run.precision = "fp16"  # another one has to be seen anew
    run.predict(["bad film"])
    assert exact[1:] == [False, True]


def test_short_texts_come_in_larger_pieces(place: Path, text_run: hftl.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(piece) for piece in text_run.predict_batches(place / "notes")] == [600]
    assert [len(piece) for piece in text_run.predict_batches(place / "notes", share=(0, 2))] == [128, 128, 88]
    monkeypatch.setattr("hftl.run._SHORT", 1000)
    assert [len(piece) for piece in text_run.predict_batches(place / "notes")] == [256, 256, 88]


@pytest.mark.parametrize(
    ("capabilities", "precision", "expected"),
    [
        ({"avx512_bf16": True}, "bf16", True),
        ({"bf16": True}, "bf16", True),  # of ARM
        ({"avx512_bf16": False, "avx2": True}, "bf16", False),
        ({"avx512_bf16": True}, "fp16", False),
        ({}, "fp32", True),
    ],
)
def test_a_precision_is_used_where_the_machine_is_made_for_it(
    capabilities: dict[str, bool],
    precision: str,
    expected: bool,
    text_run: hftl.Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    run = hftl.load_run(text_run.folder)
    run.metrics["train"]["precision"] = precision  # what it was trained in, maybe elsewhere
    assert run.precision == (precision if expected else "fp32")


@pytest.mark.parametrize(("batch_size", "on_cpu"), [(None, True), (None, False), (7, True)])
def test_groups_hold_every_row_once(batch_size: int | None, on_cpu: bool) -> None:
    lengths = np.random.default_rng(0).integers(0, 600, 500).tolist()
    for known in (lengths, None):
        groups = batches.groups(known, 500, batch_size, on_cpu)
        assert sorted(itertools.chain(*groups)) == list(range(500))
        if batch_size:
            assert max(map(len, groups)) == batch_size
    if batch_size is None and on_cpu:
        for half, tokens in ((False, 512), (True, 2048)):
            groups = batches.groups(lengths, 500, None, True, half)
            longest = [max(lengths[row] for row in group) for group in groups]
            assert longest == sorted(longest, reverse=True)
            assert all(len(group) == 1 or len(group) * lengths[group[0]] <= tokens for group in groups)


def test_the_next_rows_are_decoded_while_one_batch_is_computed() -> None:
    decoded = [threading.Event() for _ in range(8)]

    class Files:
        def __getitem__(self, row: int) -> int:
            decoded[row].set()
            return row

    found = []
    for group, rows in batches.prepared(Files(), [[0, 1], [2, 3], [4, 5], [6, 7]], 1, skip_bad_files=False):
        assert all(decoded[row].wait(10) for row in range(min(8, group[0] + 4)))  # nobody has asked for them yet
        assert not decoded[7].is_set() or group[0] >= 2  # nor is everything read at once
        found += rows
    assert found == [*range(8)]


def test_first_predictions_come_before_the_last_rows_are_read(place: Path, image_run: hftl.Run) -> None:
    folder = write_pictures(place / "last-is-bad", 300)
    (folder / "0299.png").write_bytes(b"no image")
    pieces = image_run.predict_batches(folder)
    first = next(pieces)
    assert [entry.id for entry in first] == [f"{index:04}.png" for index in range(256)]
    with pytest.raises(hftl.UsageError, match=r"0299\.png"):
        next(pieces)
    with pytest.raises(hftl.UsageError, match=r"0299\.png"):
        cli._run(["predict", str(image_run.folder), str(folder), "--output", str(place / "bad.csv")])
    assert not (place / "bad.csv").exists()
    assert hidden(place) == []


def test_unreadable_images_are_named_and_left_out(place: Path, image_run: hftl.Run, capsys: Any) -> None:
    folder = write_pictures(place / "some-are-bad", 12)
    for index in (0, 5, 11):
        (folder / f"{index:04}.png").write_bytes(b"no image")
    kept = image_run.predict(folder, skip_bad_files=True)
    assert [entry.id for entry in kept] == [f"{index:04}.png" for index in (1, 2, 3, 4, 6, 7, 8, 9, 10)]
    assert capsys.readouterr().err.count("left out: ") == 3
    alone = [image_run.predict(folder / entry.id)[0].probability for entry in kept]
    assert [entry.probability for entry in kept] == pytest.approx(alone, abs=1e-5)
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    assert image_run.predict(folder, skip_bad_files=True) == []
    capsys.readouterr()
    with pytest.raises(hftl.UsageError, match=r"no image|cannot be read"):
        cli._run(["predict", str(image_run.folder), str(folder)])
    assert capsys.readouterr().out == ""


def test_shares_make_up_the_whole(place: Path, text_run: hftl.Run) -> None:
    whole = [entry.id for entry in text_run.predict(place / "notes")]
    shares = [list(text_run.predict_batches(place / "notes", share=(number, 2))) for number in range(2)]
    joined = itertools.chain(*(piece for pair in itertools.zip_longest(*shares, fillvalue=[]) for piece in pair))
    assert [entry.id for entry in joined] == whole


def test_long_texts_are_counted_once_and_not_in_the_table(place: Path, text_run: hftl.Run, capsys: Any) -> None:
    table = place / "long.csv"
    table.write_text("text\n" + "\n".join(["good day " * 400, "a film"] * 300))
    cli._run(["predict", str(text_run.folder), str(table)])
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 601
    assert output.err.count("300 texts") == 1


@pytest.mark.slow
def test_two_processes_write_one_table(place: Path, text_run: hftl.Run) -> None:
    cli._run(["predict", str(text_run.folder), str(place / "notes"), "--output", str(place / "one.csv")])
    stale = place / ".two.csv.stale"  # of a command that was killed
    stale.mkdir()
    (stale / "1.csv").write_text("not of this command")
    result = run_command([*LAUNCH, "-m", "hftl", "predict", "text", "notes", "--output", "two.csv"], place)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("600 predictions written to two.csv") == 1
    assert hidden(place) == [stale.name]
    (stale / "1.csv").unlink()
    stale.rmdir()
    one, two = (list(csv.DictReader((place / name).open(newline=""))) for name in ("one.csv", "two.csv"))
    assert [row["id"] for row in two] == [row["id"] for row in one]
    for name in ("probability_bad", "probability_good"):
        assert [float(row[name]) for row in two] == pytest.approx([float(row[name]) for row in one], abs=1e-5)


@pytest.mark.slow
def test_a_process_that_fails_leaves_no_table(place: Path, text_run: hftl.Run) -> None:
    for index in range(300):
        path = place / "broken" / f"{index:03}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("good")
    table = place / "broken" / "299.txt"
    table.write_bytes(b"\xff\xfe\xff")
    results = run_ranks(["predict", "text", "broken", "--output", "broken.csv"], place)
    assert [result.returncode for result in results] == [2, 2]
    assert "299.txt" in "".join(result.stderr for result in results)
    assert not (place / "broken.csv").exists()
    assert hidden(place) == []


@pytest.mark.slow
def test_sigterm_leaves_no_half_table(place: Path, image_run: hftl.Run) -> None:
    folder = write_pictures(place / "interrupted", 1500)
    command = Command(["predict", "image", folder.name, "--output", "half.csv"], place)
    waited = time.monotonic() + 120
    while not any(path.stat().st_size > 2000 for path in place.glob(".half.csv.*")):
        assert command.process.is_alive()
        assert time.monotonic() < waited
        time.sleep(0.01)
    command.process.terminate()
    done = command.wait(60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in done.stderr
    assert not (place / "half.csv").exists()
    assert hidden(place) == []


MEMORY = """
import resource, sys
import hftl
run = hftl.load_run(sys.argv[1])
for folder in sys.argv[2:]:
    print(sum(len(piece) for piece in run.predict_batches(__import__("pathlib").Path(folder))),
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(place: Path, text_run: hftl.Run) -> None:
    """1,280 texts of 50 kB: 64 MB, if they were kept."""
    for name, count in (("few", 256), ("lots", 1280)):
        (place / name).mkdir()
        for index in range(count):
            (place / name / f"{index}.txt").write_text(f"{index} " + "x" * 50_000)
    command = [sys.executable, "-c", MEMORY, str(text_run.folder), str(place / "few"), str(place / "lots")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (few, before), (lots, after) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert (few, lots) == (256, 1280)
    kilobytes = 1024 if sys.platform == "darwin" else 1
    assert (after - before) / kilobytes < 30_000


def test_flags_are_suggested_and_not_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean '--gallery'?" in refused(["predict", "run", "a.jpg", "--gallry", "b"], capsys)
    assert "Did you mean '--skip_bad_files'?" in refused(["predict", "run", "a.jpg", "--skip_bad_file"], capsys)
