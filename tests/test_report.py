"""report.html: what it says, that nothing in the data can act in it, and how it looks to a browser."""

from __future__ import annotations

import base64
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_data
import tiny_models
import torch
from browser import chromium
from forked import run_command
from PIL import Image
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)
from transformers import AutoModelForSequenceClassification

import hftl
from hftl import charts, data, examples, explain, feature_map, images, report
from hftl.answers import Answers, read_answers
from hftl.callbacks import LogFile
from hftl.charts import Line
from hftl.data import _without_folders
from hftl.folder import RECIPE
from hftl.label_errors import likely_label_errors
from hftl.metrics import ranking
from hftl.problems import SingleLabel
from hftl.report_parts import training_curves
from hftl.tables import aligned, as_csv
from hftl.tasks.text_classification import TextClassification, _pieces

#: what a data set may hold, and a page must not act on
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "{{ 7 * 7 }} & '\"</td>",
    '=HYPERLINK("http://example.com")',
    "\x1b[2Jgone \u202etxet",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    small_data.write_images(folder / "images", {"train": 8, "val": 3, "test": 5})
    torch.manual_seed(0)  # of whatever tests came before: one that answers all rows alike would show nothing
    tiny_models.write_tiny_cnn(folder / "convnet")
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    with (folder / "hostile.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"the film {row} {HOSTILE[row % 5]}", HOSTILE[row % 4 + 1]] for row in range(80))
    return folder


@pytest.fixture(scope="module")
def image_run(place: Path) -> Path:
    flags = ["--dataset=images", "--model=convnet", "--method=lp_ft", "--output_dir=image", "--logging_steps=1"]
    # It shall be wrong now and then.
    flags += ["--head_solver=sgd", "--learning_rate=1e-5", "--head_learning_rate=1e-4", "--precision=fp32"]
    return trained(place, "image-classification", *flags)


@pytest.fixture(scope="module")
def text_run(place: Path) -> Path:
    flags = ["--dataset=hostile.csv", "--model=bert", "--method=lora", "--output_dir=text", "--max_steps=3"]
    return trained(place, "text-classification", *flags)


def trained(place: Path, task: str, *flags: str) -> Path:
    done = run_command(["train", task, *flags], place)
    assert done.returncode == 0, done.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)
    return place / next(flag.partition("=")[2] for flag in flags if flag.startswith("--output_dir"))


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(element == tag for element, _ in self.elements)


@pytest.mark.slow
def test_what_it_says_is_what_was_measured(image_run: Path) -> None:
    page, metrics = Page(image_run / "report.html"), json.loads((image_run / "metrics.json").read_text())
    assert f"Accuracy{100 * metrics['test']['accuracy']:.1f} %" in re.sub(r"\s*\n\s*", "", page.text)
    assert "15 rows" in page.text  # of test
    for name in small_data.COLOURS:
        assert f"{100 * metrics['test'][f'f1/{name}']:.1f} %" in page.text
    with (image_run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(pictures) >= len(wrong[:12]) > 0
    assert all(str(picture["src"]).startswith("data:image/jpeg;base64,") and picture["alt"] for picture in pictures)
    assert "What right answers rest on" in page.text
    train = metrics["train"]
    assert f"Trained on {train['hardware']}, in {train['precision']}." in page.text
    assert f"{train['samples_per_second']:,.1f} rows a second" in page.text
    stages = train["stages"]
    assert [stage["name"] for stage in stages] == ["head", "all"]
    for stage in stages:
        assert stage["name"] in page.text
        assert sum(block["trainable"] for block in stage["blocks"]) == stage["trainable_parameters"]
        assert sum(block["total"] for block in stage["blocks"]) == stage["total_parameters"]
    assert [bool(block["trainable"]) for block in stages[0]["blocks"]].count(True) == 1  # the head alone
    assert "duplicates across splits: none" in page.text
    assert (image_run / "report.html").stat().st_size < 3e6


@pytest.mark.slow
def test_nothing_in_the_data_acts_and_nothing_is_fetched(place: Path, text_run: Path) -> None:
    page = Page(text_run / "report.html")
    assert page.count("script") == 1  # the page's own
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:"))
    assert "<script>alert(1)</script>" in page.text
    assert "\\x1b[2Jgone \\u202etxet" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.text)
    assert "49" not in re.findall(r"film \d+ \{\{.*?\}\}", page.text)
    assert str(place) not in (text_run / "report.html").read_text()
    answers = read_answers(text_run / "predictions.csv", sorted(HOSTILE[1:]))
    assert {sorted(HOSTILE[1:])[label] for label in answers.labels} == set(HOSTILE[1:])
    with (text_run / "predictions.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if re.search("^[=+@-]|[\x00-\x08\x0b-\x1f]", cell)]
    card = (text_run / "README.md").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]|<img|<script", card.split("---", 2)[2])


@pytest.mark.slow
def test_the_map_shows_rows_of_test_and_where_the_answers_are_wrong(image_run: Path, text_run: Path) -> None:
    for run in (image_run, text_run):
        page = (run / "report.html").read_text()
        (section,) = re.findall('<section aria-labelledby="map">(.*?)</section>', page, re.DOTALL)
        with (run / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        wrong = sum(row["label"] != row["prediction"] for row in rows)
        assert section.count("<circle") == len(rows) - wrong
        assert section.count("<path") == wrong


def test_a_map_has_the_directions_of_most_variance(image_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    monkeypatch.chdir(image_run.parent)

    run = hftl.load_run(image_run)
    splits = data.load_splits(run.task.arguments, run.task.modality)
    labels = np.asarray(splits.test["label"])
    features = feature_map.features_of(run, splits, np.arange(15))
    assert features.shape == (15, 32)
    found = feature_map.feature_map(features, labels)
    principal = PCA(2).fit(features)
    assert np.allclose(np.abs(found.points), np.abs(principal.transform(features)), atol=1e-5)
    assert found.explained == pytest.approx(principal.explained_variance_ratio_.sum(), abs=1e-6)
    nearest = NearestNeighbors(n_neighbors=2).fit(features).kneighbors(features)[1][:, 1]
    assert found.pure == pytest.approx((labels[nearest] == labels).mean())
    assert len(feature_map.draw_rows(5000)) == feature_map.MOST_ROWS


@pytest.mark.slow
def test_features_that_a_training_had_are_not_computed_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = trained(
        place, "image-classification", "--dataset=images", "--model=convnet", "--method=frozen", "--output_dir=frozen"
    )
    monkeypatch.chdir(place)
    run = hftl.load_run(frozen)
    splits = data.load_splits(run.task.arguments, run.task.modality)
    numbers = feature_map.draw_rows(len(splits.scored))
    kept = feature_map.features_of(run, splits, numbers)
    assert kept.shape == (15, 32)
    (frozen / "logs" / "features-test.npy").unlink()
    assert np.allclose(feature_map.features_of(run, splits, numbers), kept, rtol=1e-2, atol=1e-2)  # kept in 16 bits


@pytest.mark.slow
def test_it_can_be_made_anew(place: Path, image_run: Path) -> None:
    copy = Path(shutil.copytree(image_run, place / "copy"))
    before = Page(copy / "report.html")
    (copy / "report.html").unlink()
    done = run_command(["report", "copy"], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("written to copy/report.html\n")
    again = Page(copy / "report.html")
    assert again.text.replace("copy", "image") == before.text
    assert again.count("img") == before.count("img")

    # What single rows hold was kept; without it the data are read again.
    recipe, kept = copy / "recipe.yaml", copy / "logs" / "examples.json"
    recipe.write_text(recipe.read_text().replace("dataset_name: images", "dataset_name: gone"))
    done = run_command(["report", "copy"], place)
    assert done.returncode == 0, done.stderr
    assert Page(copy / "report.html").count("img") == before.count("img")
    kept.unlink()
    done = run_command(["report", "copy"], place)
    assert done.returncode == 0, done.stderr
    assert "no examples are shown, since the data cannot be read" in done.stdout
    assert "The data were not at hand" in Page(copy / "report.html").text

    recipe.write_text(recipe.read_text().replace("dataset_name: gone", "dataset_name: images"))
    moved = place / "images" / "test" / "red" / "0.png"
    moved.rename(moved.with_name("other.png"))
    done = run_command(["report", "copy"], place)
    moved.with_name("other.png").rename(moved)
    assert done.returncode == 0, done.stderr
    assert "or have changed since" in Page(copy / "report.html").text
    assert Page(copy / "report.html").count("img") == 0
    assert not kept.exists()

    table = copy / "predictions.csv"
    whole = table.read_text()
    table.unlink()
    done = run_command(["report", "copy"], place)
    assert done.returncode == 0, done.stderr
    assert "predictions.csv is missing: 15 rows are predicted" in done.stdout
    assert [line.split(",")[:3] for line in table.read_text().splitlines()] == [
        line.split(",")[:3] for line in whole.splitlines()
    ]
    assert Page(copy / "report.html").count("img") == before.count("img")

    table.unlink()
    more = place / "images" / "test" / "red" / "more.png"
    shutil.copy(moved, more)
    done = run_command(["report", "copy"], place)
    more.unlink()
    assert done.returncode == 2
    assert "has no predictions.csv, and the data that it was scored on are not at hand" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("predictions.csv", lambda text: text.replace("probability_red", "probability_pink"), "not of this run"),
        (
            "predictions.csv",
            lambda text: text.replace(",red,", ",pink,", 1),
            "line 12 names another class",
        ),
        ("predictions.csv", lambda text: text[: text.rindex(",") - 12], "is damaged"),
        ("predictions.csv", lambda text: re.sub(r"0\.\d+$", "nan", text.rstrip()), "probabilities do not sum to 1"),
        ("predictions.csv", lambda text: text[: text.rindex("\n", 0, -1)], "it has 14 rows, and the run answered 15"),
        ("predictions.csv", lambda text: re.sub(r"(?m)^(.*\n)(.*)$\Z", r"\1\1", text.rstrip()), "a row comes twice"),
        ("predictions.csv", lambda text: text.rstrip()[:-6], "probabilities do not sum to 1"),
        ("predictions.csv", lambda text: text[:200], "is damaged (line"),
        ("config.json", lambda text: "{{", "its config.json is no JSON"),
        ("config.json", lambda text: "[1]", "its config.json names no classes"),
        ("logs/data.json", lambda text: text[:9], "data.json' is damaged"),
        ("logs/data.json", lambda text: "{}", "data.json' is damaged (it names no rows)"),
        (RECIPE, lambda text: re.sub(r"(?m)^seed: .*$", "seed: much", text), "its recipe.yaml cannot be used"),
        ("logs/data.json", lambda text: '{"rows": {"test": [1]}}', "it names no rows"),
        ("logs/data.json", lambda text: '{"rows": {}, "scored": []}', "it does not say which rows were scored"),
        ("logs/data.json", lambda text: "[" * 100_000, "data.json' is damaged (it is nested too deeply)"),
        ("predictions.csv", lambda text: re.sub(r"0\.\d+,0\.\d+,", "-0.5,1.5,", text, count=1), "probabilit"),
        ("predictions.csv", lambda text: re.sub(r"(?m),(\w+),\w+,0", r",\1,\1,0", text), "not the most probable class"),
        (
            "metrics.json",
            lambda text: re.sub(r'"recall/red": [\d.]+', '"recall/red": 5.0', text),
            "does not fit metrics.json",
        ),
        ("metrics.json", lambda text: re.sub('"stages"', '"stagse"', text), "hold other things than a run's (KeyError"),
        ("metrics.json", lambda text: re.sub('"hftl": "[^"]*"', '"hftl": "new"', text), "(InvalidVersion"),
        ("metrics.json", lambda text: "{}", "its metrics.json has no 'train'"),
        ("metrics.json", lambda text: text[:-9], "its metrics.json is no JSON"),
        ("metrics.json", lambda text: re.sub('"hftl": "[^"]*"', '"hftl": "99.1.0"', text), "made by hftl 99.1.0"),
    ],
)
def test_a_damaged_run_is_told(place: Path, image_run: Path, name: str, change: Any, said: str) -> None:
    copy = Path(shutil.copytree(image_run, place / "damaged", dirs_exist_ok=True))
    (copy / name).write_text(change((copy / name).read_text()))
    if name == RECIPE:  # whose settings matter to whoever loads the model
        (copy / "logs" / "examples.json").unlink()
    done = run_command(["report", "damaged"], place)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_browser_shows_it(image_run: Path, text_run: Path) -> None:
    """No message, no request, no serious fault of accessibility, nothing wider than a phone; headings sort."""
    from axe_playwright_python.sync_playwright import Axe

    with chromium() as browser:
        for run, width, scheme in ((image_run, 390, "dark"), (text_run, 390, "light"), (image_run, 1280, "light")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            messages: list[str] = []
            requests: list[str] = []
            page.on("console", lambda message, seen=messages: seen.append(message.text))
            page.on("pageerror", lambda error, seen=messages: seen.append(str(error)))
            page.on("dialog", lambda dialog, seen=messages: (seen.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.goto((run / "report.html").as_uri())
            page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            faults = [
                f"{fault['id']}: {fault['nodes'][0]['html']}"
                for fault in Axe().run(page).response["violations"]
                if fault["impact"] in ("serious", "critical")
            ]
            assert (messages, faults) == ([], [])
            assert [url for url in requests if not url.startswith("data:")] == [(run / "report.html").as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert sorted_column(page, "F1")
            assert sorted_column(page, "F1", falling=True)
            context.close()


def sorted_column(page: Any, name: str, falling: bool = False) -> bool:
    """Press a heading; whether its column is in order then."""
    page.click(f".sortable th button:text-is('{name}')")
    cells = page.eval_on_selector_all(
        ".sortable tbody tr", "(rows) => rows.map((row) => row.lastElementChild.dataset.value)"
    )
    values = [float(cell) for cell in cells]
    return values == sorted(values, reverse=falling)


@pytest.mark.parametrize("name", [name for name in tiny_models.TINY if name not in ("wav2vec2", "ast")])
def test_every_architecture_says_what_its_answer_rests_on(name: str) -> None:
    model = tiny_models.TINY[name]().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = tiny_models.tiny_inputs(model, batch=2)
    one = {key: value[:1] for key, value in inputs.items()}  # without padding
    if model.main_input_name == "pixel_values":
        heat = explain.grad_cam(model, one, 1)
        assert heat is None or (heat.ndim == 2 and heat.min() >= 0 and heat.max() == 1)
    else:
        values = explain.token_attributions(model, one, 1)
        assert values is not None
        assert values.shape == one["input_ids"].shape[1:]
        with torch.no_grad():
            whole = model(**one).logits[0, 1]
            layer = model.get_input_embeddings()
            with explain.mixed_embeddings(layer, layer.weight.mean(dim=0), 0.0):
                nothing = model(**one).logits[0, 1]
        assert values.sum() == pytest.approx(float(whole - nothing), rel=0.05, abs=2e-3)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_models_that_do_not_embed_tokens_one_by_one_are_not_explained() -> None:
    from transformers import BartConfig, BartForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    small = {"vocab_size": 64, "d_model": 16}
    bart = BartConfig(**small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    xlnet = XLNetConfig(**small, n_layer=1, n_head=2, d_inner=32)
    ids = {"input_ids": torch.tensor([[5, 6, 7, 2]])}
    for model in (BartForSequenceClassification(bart).eval(), XLNetForSequenceClassification(xlnet).eval()):
        assert explain.token_attributions(model, ids, 1) is None


def test_the_pieces_of_a_text_are_the_text() -> None:
    tokens = [(0, 1, 1.0), (0, 1, 0.5), (1, 4, -1.0), (5, 6, 2.0)]  # two tokens for the bytes of one character
    assert _pieces("é la 😀!", tokens) == [("é", 1.5), (" la", -1.0), (" ", 0.0), ("😀", 2.0), ("!", 0.0)]
    assert _pieces("é la", [*tokens, (8, 9, 1.0)]) == [("é", 1.5), (" la", -1.0)]  # what is behind the end is not shown
    assert _pieces("", []) == []


def test_texts_without_a_word_and_pairs_are_shown(place: Path) -> None:
    tiny_models.write_tiny_text_model(place / "gpt2", kind="gpt2")
    task = TextClassification(hftl.parse(hftl.TextArguments, ["--model=x", "--output_dir=unused"]))
    task.load_processor(place / "gpt2")
    model = AutoModelForSequenceClassification.from_pretrained(place / "gpt2").eval()
    assert task.shown({"text": ""}, model, 0).texts == [[("", 0.0)]]
    shown = task.shown({"text": "a good film", "text_pair": "a bad day"}, model, 0)
    assert ["".join(piece for piece, _ in text) for text in shown.texts] == ["a good film", "a bad day"]
    assert max(abs(weight) for text in shown.texts for _, weight in text) == 1.0
    assert shown.is_explained


def test_a_thumbnail_holds_nothing_of_the_file() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(buffer, "JPEG", comment=b"by alice in /home/alice")
    address = images.data_address(Image.open(buffer))
    assert b"alice" not in base64.b64decode(address.partition(",")[2])


def test_steep_parts_of_a_line_are_drawn() -> None:
    xs, ys = np.arange(10_000) / 10_000, np.ones(10_000)
    ys[-20:] = np.linspace(1, 0, 20)
    points = np.array([pair.split(",") for pair in drawn(Line("", xs, ys))], float)
    assert len(points) <= 200
    assert (np.diff(points[:, 1]) > 5).sum() >= 15  # pixels down, at the end


def drawn(line: Line) -> list[str]:
    chart = charts.line_chart([line], "a line", "x", "y")
    return re.search(r'points="([^"]*)"', chart)[1].split()  # type: ignore[index]


def test_grad_cam_finds_the_place() -> None:
    """The last block hands on what it gets, and the head looks at brightness: the heat is where the bright spot is."""
    model = tiny_models.TINY["timm_resnet18"]().eval()
    network: Any = model.timm_model
    features = torch.zeros(1, network.fc.in_features, 3, 3)
    features[0, :, 2, 0] = 1.0
    network.layer4[0].register_forward_hook(lambda *_: features)
    with torch.no_grad():
        for part in (network.layer4[1].bn2, network.fc):
            part.weight.fill_(0.0)
            part.bias.fill_(0.0)
        network.fc.weight[1].fill_(1.0)
    picture = tiny_models.tiny_inputs(model, batch=1)
    heat = explain.grad_cam(model, picture, 1)
    assert heat is not None
    assert (heat[2, 0], heat.sum()) == (1.0, 1.0)
    assert explain.grad_cam(model, picture, 0) is None  # nothing speaks for it


def test_right_answers_of_several_classes_are_shown() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.6, 0.3], [0.4, 0.3, 0.3], [0.2, 0.1, 0.7]])
    answers = Answers(list("abcde"), np.array([0, 0, 1, 2, 0]), probabilities.argmax(axis=1), probabilities)
    assert examples.surest_of_classes(answers) == [0, 2]  # the third class has none
    assert examples.surest_mistakes(answers) == [4, 3]


def test_rounding_of_many_classes_is_no_damage(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(8_000)]
    head = ["id", "label", "prediction", *(f"probability_{name}" for name in names)]
    # 0.9968, and 0.0000004 for each of the others, of which six digits have nothing.
    cells = ["0", "c0", "c0", *(f"{0.9968 if number == 0 else 4e-7:.6f}" for number in range(8_000))]
    (tmp_path / "predictions.csv").write_text(as_csv([head, cells]))
    assert read_answers(tmp_path / "predictions.csv", names).correct.all()


def test_flipped_labels_come_first() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 300)
    scores = random.normal(size=(300, 3)) + 4 * np.eye(3)[truth]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    flipped = random.choice(300, 15, replace=False)
    labels = truth.copy()
    labels[flipped] = (labels[flipped] + 1) % 3
    found, rather = likely_label_errors(probabilities, labels)
    caught = [row in flipped for row in found[:15]]
    assert sum(caught) >= 12
    assert all(rather[: len(caught)][caught] == truth[found[:15][caught]])
    assert len(likely_label_errors(np.eye(3)[truth] * 0.9 + 0.03, truth)[0]) == 0


def test_what_a_suspicious_row_rather_is() -> None:
    """The class by which it is suspicious, which need not be the most probable one."""
    probabilities = np.array(
        [[0.95, 0.03, 0.02], [0.95, 0.03, 0.02], [0.3, 0.3, 0.4], [0.5, 0.05, 0.45], [0.1, 0.8, 0.1]]
    )
    found, rather = likely_label_errors(probabilities, np.array([0, 0, 2, 1, 1]))
    assert (found.tolist(), rather.tolist()) == ([3], [2])


def test_confusions_of_many_classes_are_those_that_occur() -> None:
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 30, (2, 500))
    names = [f"class {number}" for number in range(5_000)]  # a table of all pairs would take gigabytes
    answers = Answers([], labels, predictions, np.zeros((500, 0)))
    found = report._confusion(answers, names)
    counts = confusion_matrix(labels, predictions)
    assert not found["table"]
    assert [pair["count"] for pair in found["pairs"]] == sorted(counts[~np.eye(30, dtype=bool)])[::-1][:20]
    for pair in found["pairs"]:
        row, column = (names.index(pair[name]) for name in ("label", "other"))
        assert (pair["count"], pair["share"]) == (counts[row, column], counts[row, column] / counts[row].sum())
    few = report._confusion(Answers([], labels % 5, predictions % 5, np.zeros((500, 0))), names[:5])
    assert few["counts"] == confusion_matrix(labels % 5, predictions % 5).tolist()


@pytest.mark.slow
def test_what_is_derived_may_be_damaged(place: Path, image_run: Path) -> None:
    copy = Path(shutil.copytree(image_run, place / "torn", dirs_exist_ok=True))
    with (copy / "logs" / "log.jsonl").open("a") as log:
        log.write('{"stage": "x"}\n{"stage"')
    features = copy / "logs" / "features-test.npy"
    features.write_bytes(b"\x93NUMPY\x01")
    kept = copy / "logs" / "examples.json"
    whole = kept.read_text()
    content = json.loads(whole)
    address, _ = content["mistakes"][0]["pictures"][0]
    for hostile in (
        whole[:-9],
        whole.replace(address, "http://example.com/x.png"),
        whole.replace(address, "data:text/html;base64,PHNjcmlwdD4="),
        json.dumps({**content, "mistakes": content["mistakes"][1:]}),
        json.dumps({**content, "map": {**content["map"], "numbers": [99] * len(content["map"]["numbers"])}}),
        json.dumps({**content, "map": {**content["map"], "pure": float("nan")}}),
        json.dumps({**content, "map": {**content["map"], "pure": 10**400}}),
        json.dumps({**content, "map": {**content["map"], "points": [[1e308, 0.0]] * 15}}),
        json.dumps({**content, "map": {**content["map"], "numbers": [], "points": []}}),
        whole.replace('"the picture"', '"\\ud800"'),
        whole + " " * 3_000_000,
        "[" * 100_000,
        "[]",
    ):
        kept.write_text(hostile)
        done = run_command(["report", "torn"], place)
        assert done.returncode == 0, done.stderr
        assert "examples.json is damaged" in done.stdout
        assert kept.read_text() == whole
    assert "features-test.npy is damaged" in done.stdout
    assert "computed again" in done.stdout


@pytest.mark.slow
def test_a_run_that_has_not_kept_what_it_found(place: Path, image_run: Path) -> None:
    """As one of the Hub: its data are told by their rows, and without answers by the scores of new ones."""
    copy = Path(shutil.copytree(image_run, place / "bare", ignore=shutil.ignore_patterns("logs")))
    for missing in ((), ("predictions.csv",)):
        for name in missing:
            (copy / name).unlink()
        done = run_command(["report", "bare"], place)
        assert done.returncode == 0, done.stderr
        page = Page(copy / "report.html")
        assert page.count("img") > 6
        assert "What was found in the data is not known" in page.text
        shutil.rmtree(copy / "logs")
    labels = (copy / "predictions.csv").read_text()
    recipe = (copy / "recipe.yaml").read_text()
    shutil.copytree(place / "images", place / "swapped")
    for old, new in (("red", "x"), ("green", "red"), ("blue", "green"), ("x", "blue")):
        (place / "swapped" / "test" / old).rename(place / "swapped" / "test" / new)
    (copy / "recipe.yaml").write_text(recipe.replace("dataset_name: images", "dataset_name: swapped"))
    (copy / "predictions.csv").unlink()
    done = run_command(["report", "bare"], place)
    assert "the data that are there are not those that it was scored on" in done.stderr
    assert not (copy / "predictions.csv").exists()
    (copy / "recipe.yaml").write_text(recipe)
    (copy / "predictions.csv").write_text(re.sub(r"(?m)^test/red/0\.png", "test/red/00.png", labels))
    done = run_command(["report", "bare"], place)
    assert "or have changed since" in Page(copy / "report.html").text
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("image-cl", "my-cl"))
    done = run_command(["report", "bare"], place)
    assert (done.returncode, "no examples are shown: the task my-classification" in done.stdout) == (0, True)
    done = run_command(["compare", "image", "bare", "--output", "both.html"], place)
    assert "right where image is wrong" in done.stdout, done.stderr


def test_answers_made_anew_may_differ_a_little(place: Path, image_run: Path) -> None:
    """Which the page says; more than that is no answer of this run."""
    copy = Path(shutil.copytree(image_run, place / "near", dirs_exist_ok=True))
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["test"]["accuracy"] += 1 / 15
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert run_command(["report", "near"], place).returncode == 0
    assert "whose accuracy is -6.7 points from this score" in Page(copy / "report.html").text


@pytest.mark.slow
def test_what_is_kept_needs_no_model(place: Path, image_run: Path) -> None:
    """Reports and comparisons are made in a moment, since neither torch nor transformers is imported."""
    loaded = "sorted({'torch', 'transformers', 'sklearn', 'datasets'} & {*sys.modules})"
    code = f"import sys; from hftl.cli import main; main(); print({loaded})"
    for command in (["report", "image"], ["compare", "image", "image"]):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\n[]\n"), done.stdout


def test_curves_of_a_class_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for rows, digits in ((7, 1), (500, 2), (500, 9)):
        own = random.random(rows) < 0.3
        own[:2] = True, False
        scores = np.round(random.random(rows) + 0.3 * own, digits)
        found = ranking(own, scores)
        assert found.roc_auc == pytest.approx(roc_auc_score(own, scores))
        assert found.average_precision == pytest.approx(average_precision_score(own, scores))
        false, true, _ = roc_curve(own, scores, drop_intermediate=False)
        assert np.allclose([found.false, found.true], [false, true])
        precision, recall, _ = precision_recall_curve(own, scores)
        assert np.allclose([[*found.precision[::-1], 1.0], found.true[::-1]], [precision, recall])


def test_what_was_done_twice_counts_once_in_the_curves(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"stage": "all", "step": 0, "loss": 9.0}) + "\n" + '{"stage": "al')
    LogFile(log, "all")  # cuts off what a kill left
    entries = [{"stage": "all", "step": step, "loss": float(step)} for step in (1, 2, 3, 4, 3, 4, 5)]
    with log.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in [*entries, {"stage": "next", "step": 1, "loss": 1.0}])
    chart = training_curves(log, SingleLabel.headline)["loss"]
    assert len(re.search(r'points="([^"]*)"', chart)[1].split()) == 7  # type: ignore[index]
    assert "training 9 to 1" in chart


def test_curves_of_runs_side_by_side_are_those_one_after_the_other(tmp_path: Path) -> None:
    """Which write their lines in turns."""
    steps = [(stage, step) for stage in ("all, run 1", "all, run 2") for step in (10, 20, 30)]
    logs = {"turns": sorted(steps, key=lambda entry: entry[1]), "after": steps}
    for name, entries in logs.items():
        lines = [json.dumps({"stage": stage, "step": step, "loss": step / 10}) for stage, step in entries]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    turns, after = (training_curves(tmp_path / name, SingleLabel.headline) for name in logs)
    assert turns == after


def test_notes_of_the_data_name_no_folder(tmp_path: Path) -> None:
    home = Path.home()
    notes = {
        f"1 cannot be read: {tmp_path}/pets/gone.png (not an image)": "1 cannot be read: gone.png (not an image)",
        f"test: {home}/a b/test.csv has no labels": "test: a b/test.csv has no labels",
        "test: /data/alice/test.csv has no labels": "test: test.csv has no labels",
        "validation: 3 of 24 train rows": "validation: 3 of 24 train rows",
        "a/b.png and 1/2": "a/b.png and 1/2",
        "labels that differ: 'yes / no', 'and/or'": "labels that differ: 'yes / no', 'and/or'",
    }
    (tmp_path / "pets").mkdir()
    for note, expected in notes.items():
        assert _without_folders(note, str(tmp_path / "pets")) == expected
    assert _without_folders("meta/x and and/or", "") == "meta/x and and/or"


def test_what_a_terminal_obeys_is_written_out_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(as_csv([["id", "label"], ["a\rb", "\x1b[2Jc"], ["1", "d\ne"]]).encode())
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["id", "label"], ["a\\rb", "\\x1b[2Jc"], ["1", "d\ne"]]


def test_no_name_makes_a_line_of_a_table() -> None:
    assert aligned([["class", "rows"], ["b\nc: accuracy 1", "3"]], left=[0]) == [
        "class             rows",
        "b\\nc: accuracy 1     3",
    ]
