"""Pushing to a Hub and loading from it, through the real client, against a server on 127.0.0.1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hub_server
import pytest
import small_data
import tiny_models
import yaml
from forked import run_command
from huggingface_hub import ModelCard, constants

import hftl
from hftl import card, cli, push
from hftl import hub as hub_client
from hftl.card import EVALUATIONS, forbids_changes
from hftl.errors import UsageError
from hftl.push import PushSaves

ROOT = Path(__file__).resolve().parent.parent
TOKEN, GIVEN_TOKEN = "hf_PlantedInTheEnvironment", "hf_PlantedOnTheCommandLine"
#: what holds rows of the data, and what is for going on with a run
NEVER_PUSHED = ("logs/", "checkpoints/", "predictions.csv")


def process(place: Path, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A real process: the client reads the address of the Hub when it is imported."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HOME": str(place),
        "HF_ENDPOINT": url,
        "HF_HOME": str(place / "hf"),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=240)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, models and three finished runs."""
    folder = small_data.write_both(tmp_path_factory.mktemp("hub"))
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    tiny_models.write_tiny_cnn(folder / "convnet")
    small_data.write_pairs(folder / "both", {"train": 8, "val": 3, "test": 3})
    (folder / "rated").mkdir()
    for path in (folder / "texts").iterdir():
        table = path.read_text().replace(",good\n", ",1.5\n").replace(",bad\n", ",-0.5\n")
        (folder / "rated" / path.name).write_text(table)
    text = ["text-classification", "--dataset=texts", "--model=bert", "--max_steps=2"]
    runs = {
        "image": ["image-classification", "--dataset=images", "--model=convnet", "--method=frozen"],
        "fused": [
            "image-text-classification",
            "--dataset=both",
            "--model=convnet",
            "--text_model=bert",
            "--max_steps=2",
        ],
        "text": [*text, "--method=full"],
        "labels": [*text, "--problem_type=multi_label_classification"],
        "numbers": [*text[:1], "--dataset=rated", *text[2:], "--problem_type=regression"],
        "adapter": [*text, "--method=lora"],
        "elsewhere": [*text[:1], f"--dataset={folder / 'texts'}", f"--model={folder / 'bert'}", "--max_steps=1"],
    }
    for name, flags in runs.items():
        done = run_command(["train", *flags, f"--output_dir={name}", "--report_to=none"], folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """A running server to which this process's client talks, and no waiting between tries."""
    with hub_server.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, which the server does not speak
        monkeypatch.setattr(push, "_PAUSES", (0.0, 0.0))
        yield running


_SAME_ANSWERS = """
import sys
import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
for auto_class, name, inputs in (
    (AutoModelForImageClassification, "image", torch.randn(2, 3, 224, 224)),
    (AutoModelForSequenceClassification, "text", torch.randint(5, 30, (2, 9))),
    (AutoModelForSequenceClassification, "labels", torch.randint(5, 30, (2, 9))),
    (AutoModelForSequenceClassification, "numbers", torch.randint(5, 30, (2, 9))),
):
    mine, theirs = (auto_class.from_pretrained(place).eval() for place in (name, f"tester/{name}"))
    with torch.no_grad():
        assert torch.equal(mine(inputs).logits, theirs(inputs).logits), name
print("equal")
"""


@pytest.mark.slow
def test_what_is_pushed_loads_with_equal_logits(place: Path, hub: hub_server.Hub) -> None:
    for name in ("image", "text", "labels", "numbers"):
        assert hftl.load_run(place / name).push(f"tester/{name}") == f"{hub.url}/tester/{name}"
        assert set(hub.commits[-1]) == {path for path in files_in(place / name) if not path.startswith(NEVER_PUSHED)}
    assert hub.uploads == 4  # the weights go by themselves
    done = process(place, hub.url, "-c", _SAME_ANSWERS)
    assert done.stdout == "equal\n", done.stderr


_SAME_ADAPTER = """
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification as Model
config = AutoConfig.from_pretrained("tester/adapter", subfolder="adapter")
base = Model.from_pretrained("bert", config=config, ignore_mismatched_sizes=True)
theirs = PeftModel.from_pretrained(base, "tester/adapter", subfolder="adapter").eval()
merged = Model.from_pretrained("tester/adapter").eval()
mine = Model.from_pretrained("adapter").eval()
inputs = torch.randint(5, 30, (2, 9))
with torch.no_grad():
    expected = mine(inputs).logits
    assert torch.equal(merged(inputs).logits, expected)
    assert torch.allclose(theirs(inputs).logits, expected, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
def test_an_adapter_comes_back_by_the_lines_of_its_card(place: Path, hub: hub_server.Hub) -> None:
    run = hftl.load_run(place / "adapter")
    run.push("tester/adapter")
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(hub.commits[0])
    done = process(place, hub.url, "-c", _SAME_ADAPTER)
    assert done.stdout == "equal\n", done.stderr
    for name in ("image", "fused"):
        hftl.load_run(place / name).push(f"tester/{name}")
    for name in ("adapter", "image", "fused"):
        page = hub.files[f"tester/{name}"]["README.md"].decode()
        assert f'"tester/{name}"' in page
        card = ModelCard(page)
        card.validate()  # asks the Hub
        (lines,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
        (place / "image.jpg").write_bytes((place / "images" / "test" / "red" / "0.png").read_bytes())
        done = process(place, hub.url, "-c", lines)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_folder_of_this_machine_is_pushed(place: Path, hub: hub_server.Hub) -> None:
    hftl.load_run(place / "elsewhere").push("tester/elsewhere")
    assert str(place) in (place / "elsewhere" / "recipe.yaml").read_text()  # with which the run is repeated here
    for path, content in hub.files["tester/elsewhere"].items():
        assert str(place).encode() not in content, path
    recipe = hub.files["tester/elsewhere"]["recipe.yaml"].decode()
    # Elsewhere these names might be those of something else on the Hub.
    assert recipe.startswith("# --model was 'bert', which is another one elsewhere\n# --dataset was 'texts', which")
    assert not {"model_name_or_path", "dataset_name"} & set(yaml.safe_load(recipe))


@pytest.mark.parametrize("name", ["bad repo", "a/b/c", "-a", "a" * 97])
def test_a_name_that_no_repository_has(name: str, place: Path, hub: hub_server.Hub) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        cli._run(["push", str(place / "text"), *(["--"] if name == "-a" else []), name])
    assert not hub.requests
    arguments = hftl.parse(hftl.TextArguments, ["--model=bert", f"--output_dir={place / name}"])
    if Path(name).name == name:  # under which the run would be pushed
        with pytest.raises(UsageError, match="no name of a repository"):
            push.check_base(arguments)


def test_one_of_two_models_may_be_of_this_machine(tmp_path: Path) -> None:
    recipe = {"model_name_or_path": "acme/base", "text_model": "/srv/mine", "dataset_name": "builtin:captions"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "README.md").write_text("---\nbase_model: acme/base\n---\n")
    shared = push._shared_recipe(tmp_path).decode()
    assert yaml.safe_load(shared) == {"model_name_or_path": "acme/base", "dataset_name": "builtin:captions"}
    assert "# --text_model was 'mine'" in shared


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", None, "there are no weights in it"),
        ("model.safetensors", 1_000, "its model.safetensors cannot be read"),
        ("adapter/adapter_model.safetensors", 1_000, "its adapter/adapter_model.safetensors cannot be read"),
        ("adapter/adapter_config.json", 9, "its adapter/adapter_config.json cannot be read"),
        ("README.md", None, "README.md, is missing or damaged"),
        ("README.md", b"# hello", "README.md, is missing or damaged"),
    ],
)
def test_a_damaged_run_is_not_pushed(
    name: str, content: int | bytes | None, said: str, place: Path, hub: hub_server.Hub
) -> None:
    path = place / "adapter" / name
    whole = path.read_bytes()
    run = hftl.load_run(place / "adapter")
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(whole[:content] if isinstance(content, int) else content)
        with pytest.raises(UsageError, match=re.escape(said)):
            run.push("tester/damaged")
    finally:
        path.write_bytes(whole)
    assert not hub.requests


@pytest.mark.slow
def test_the_pushed_report_shows_no_row(place: Path, hub: hub_server.Hub) -> None:
    hftl.load_run(place / "text").push("tester/text")
    page = hub.files["tester/text"]["report.html"].decode()
    own = (place / "text" / "report.html").read_text()
    assert "Confusion matrix" in page
    for text in ("test0", "surest of the wrong", "Labels that are likely wrong"):
        assert text not in page
    assert "surest of the wrong" in own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_words", "status", "said"),
    [
        ("repos/create", 401, "hf auth login"),
        ("repos/create", 403, "may not write"),
        ("/commit/", 409, "something else is changing"),
        ("/commit/", 429, "too many requests"),
        ("/commit/", 500, "trouble of its own"),
        ("repos/create", 503, "trouble of its own"),
        ("/commit/", hub_server.CUT, "connection to the Hub failed"),
        ("PUT /large", 507, "no room"),
    ],
)
def test_a_refused_push_says_why_and_can_be_repeated(
    place: Path, hub: hub_server.Hub, request_words: str, status: int, said: str
) -> None:
    before = {path: (place / "text" / path).read_bytes() for path in files_in(place / "text")}
    run = hftl.load_run(place / "text")
    hub.faults = [(request_words, status, 1000)]
    with pytest.raises(UsageError, match=said) as raised:
        run.push("tester/text", private=True)
    assert f"hftl push {place / 'text'} tester/text --private" in str(raised.value)
    assert "is whole" in str(raised.value)
    tries = sum(request_words in request for request, _ in hub.requests)
    assert tries == (3 if status in (409, 429, 500, 503, hub_server.CUT) else 1)
    assert {path: (place / "text" / path).read_bytes() for path in files_in(place / "text")} == before

    sent = hub.uploads
    hub.faults = []
    run.push("tester/text")
    assert "model.safetensors" in hub.commits[-1]
    assert hub.uploads == max(sent, 1)  # what came through is not sent again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_words", "status"),
    [
        *(("/commit/", status) for status in (409, 429, 500, 503, hub_server.CUT)),
        *(("repos/create", status) for status in (429, 500, hub_server.CUT)),  # 409 there: it is there already
    ],
)
def test_what_may_pass_is_tried_again(
    place: Path, hub: hub_server.Hub, request_words: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [(request_words, status, 2)]
    hftl.load_run(place / "text").push("tester/text")
    assert len(hub.commits) == 1
    assert capsys.readouterr().out.count("another try in 0 s") == 2


@pytest.mark.slow
def test_a_branch_and_a_proposal(place: Path, hub: hub_server.Hub) -> None:
    run = hftl.load_run(place / "text")
    run.push("tester/text", revision="trial")
    assert not hub.files["tester/text"]
    assert "model.safetensors" in hub.branches["tester/text", "trial"]
    assert run.push("tester/text", create_pr=True) == f"{hub.url}/tester/text/discussions/1"
    assert "model.safetensors" in hub.branches["tester/text", "refs/pr/1"]
    assert not hub.files["tester/text"]
    hub.faults = [("/commit/", hub_server.CUT, 1)]  # a second proposal could be a second time the same
    with pytest.raises(UsageError, match="--create_pr"):
        run.push("tester/text", create_pr=True)
    with pytest.raises(UsageError, match="no good name"):
        run.push("no good name")


@pytest.mark.slow
def test_a_licence_that_forbids_it(place: Path, hub: hub_server.Hub) -> None:
    (place / "strict").mkdir()
    for path in (place / "bert").iterdir():
        (place / "strict" / path.name).write_bytes(path.read_bytes())
    (place / "strict" / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\nlanguage: de\n---\n")
    train = ["train", "text-classification", "--dataset=texts", "--model=strict", "--max_steps=1", "--report_to=none"]
    done = run_command([*train, "--output_dir=forbidden"], place)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(place / "forbidden" / "README.md")
    assert card.data.license == "cc-by-nc-nd-4.0"
    assert card.data.language == "de"
    assert "does not let changed versions be shared" in card.text
    with pytest.raises(UsageError, match="licence of the base model"):
        hftl.load_run(place / "forbidden").push("tester/forbidden")
    early = [*train, "--output_dir=early", "--push_to_hub", "--hub_model_id=tester/early"]
    refused = run_command(early, place)
    assert refused.returncode == 2
    assert not (place / "early").exists()
    assert not hub.requests


@pytest.mark.parametrize(
    ("licence", "shared", "said"),
    [
        ("apache-2.0", True, "licence is that of the base model, apache-2.0."),
        ("cc-by-nd-4.0", False, "does not let changed versions be shared"),
        ("CC BY-NC-ND 4.0", False, "does not let changed versions be shared"),
        ("cc_by_nd_4.0", False, "does not let changed versions be shared"),
        ("CC BY-NC 4.0", True, "does not allow commercial use"),
        ("non-commercial", True, "does not allow commercial use"),
        ("mistral-ai-research-license", True, "does not allow commercial use"),
        ("llama3", True, "has terms of its own"),
        ("apache-2.0, mit", True, "is that of the base model, apache-2.0, mit."),
        (None, True, "is not known here"),
    ],
)
def test_what_a_licence_means_is_said(licence: str | None, shared: bool, said: str) -> None:
    assert forbids_changes(licence) != shared
    assert said in card._of_licence(licence)


def test_of_two_licences_the_stricter_holds() -> None:
    free, bound = {"license": "apache-2.0", "language": "en"}, {"license": "cc-by-nc-nd-4.0", "language": "en"}
    assert card._common([free, bound]) == {"license": "cc-by-nc-nd-4.0", "language": "en"}
    assert card._common([bound, {}]) == {"license": "cc-by-nc-nd-4.0"}
    assert card._common([free, {"license": "mit"}]) == {}


def test_a_licence_may_be_several_or_have_a_name() -> None:
    assert card.licence_of({"license": ["apache-2.0", "mit"]}) == "apache-2.0, mit"
    assert card.licence_of({"license": "other", "license_name": "mine"}) == "mine"
    assert card.licence_of({"license": "other"}) == "other"
    assert card.licence_of({"license": False}) is None  # `license: no` of YAML


def test_a_checkpoint_that_cannot_be_copied_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = hftl.parse(hftl.TextArguments, ["--model=m", "--dataset=d", "--hub_model_id=me/seen"])
    saves = PushSaves(arguments)
    place, state = SimpleNamespace(output_dir=str(tmp_path / "gone")), SimpleNamespace(global_step=7)
    saves.on_save(place, state, None)
    saves.on_train_end(place, state, None)
    assert "the checkpoint of step 7 was not pushed" in capsys.readouterr().out


def test_a_hub_that_did_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_client, "_wanted_offline", None)
    hub_client.check_hub.cache_clear()
    hub_client.check_hub()
    assert constants.HF_HUB_OFFLINE
    hub_client.ask_again()
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.slow
def test_data_of_the_hub_load_by_name(place: Path) -> None:
    with hub_server.serve() as hub:
        paths = sorted((place / "texts").glob("*.csv"))
        hub.files["datasets/tester/reviews"] = {path.name: path.read_bytes() for path in paths}
        train = ["-m", "hftl", "train", "text-classification", "--model=bert", "--max_steps=1", "--output_dir=named"]
        done = process(place, hub.url, *train, "--dataset=tester/reviews")
        assert done.returncode == 0, done.stderr
        assert "data: tester/reviews" in done.stdout
        card = ModelCard.load(place / "named" / "README.md")
        assert card.data.datasets == ["tester/reviews"] or card.data.datasets == "tester/reviews"
        (entry,) = yaml.safe_load((place / "named" / EVALUATIONS).read_text())
        scores = hftl.load_run(place / "named").metrics["test"]
        assert entry["dataset"] == {"id": "tester/reviews", "task_id": "default"}
        assert entry["value"] == pytest.approx(scores["accuracy"], abs=1e-4)
        pushed = process(place, hub.url, "-m", "hftl", "push", "named", "tester/named")
        assert pushed.returncode == 0, pushed.stderr
        assert EVALUATIONS in hub.files["tester/named"]


@pytest.mark.slow
def test_checkpoints_are_pushed_while_it_trains(place: Path) -> None:
    train = ["-m", "hftl", "train", "text-classification", "--dataset=texts", "--model=bert", "--num_train_epochs=2"]
    pushes = ["--push_to_hub", "--hub_model_id=tester/seen", "--hub_strategy=every_save", "--output_dir=seen"]
    with hub_server.serve() as hub:
        done = process(place, hub.url, *train, *pushes)
        assert done.returncode == 0, done.stderr
        assert "in-progress/model.safetensors" in hub.commits[0]
        assert all(path.startswith("in-progress/") for commit in hub.commits[:-1] for path in commit)
        # Of two checkpoints one is the run's; the second is not pushed while the first still is.
        assert 1 <= hub.uploads <= 2
        assert set(hub.files["tester/seen"]) == set(hub.commits[-1])  # what was in progress is gone
        hub.faults = [("/commit/", 403, 1)]
        done = process(place, hub.url, *train, *pushes, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert "was not pushed: the Hub answers 403" in done.stdout


@pytest.mark.slow
def test_from_the_command_line_and_no_token_and_no_home_folder_anywhere(place: Path) -> None:
    train = ["-m", "hftl", "train", "text-classification", f"--dataset={place / 'texts'}", "--max_steps=2"]
    second = ["--push_to_hub", "--hub_model_id=tester/second", f"--hub_token={GIVEN_TOKEN}"]
    with hub_server.serve() as hub:
        pushed = process(place, hub.url, "-m", "hftl", "push", "text", "tester/mine", "--private")
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{hub.url}/tester/mine"
        again = process(place, hub.url, *train, "--model=tester/mine", f"--output_dir={place / 'again'}", *second)
        assert again.returncode == 0, again.stderr
        assert f"{hub.url}/tester/second" in again.stdout
        tokens = {token for request, token in hub.requests if "/commit/" in request}
        assert tokens == {f"Bearer {TOKEN}", f"Bearer {GIVEN_TOKEN}"}  # so that they could have got anywhere
        hub.faults = [("/commit/", 401, 1000)]
        refused = process(place, hub.url, *train, f"--model={place / 'bert'}", "--output_dir=refused", *second)
        assert refused.returncode == 2
        assert "Traceback" not in refused.stderr
        assert (place / "refused" / "metrics.json").is_file()  # the run is whole
        missing = process(place, hub.url, *train, "--model=tester/nothing", "--output_dir=none")
        assert missing.returncode == 2
        assert "tester/nothing" in missing.stderr
        assert not (place / "none").exists()
    said = "".join(done.stdout + done.stderr for done in (pushed, again, refused, missing))
    kept = [path.read_bytes() for run in ("again", "refused") for path in sorted((place / run).rglob("*.*"))]
    public = [content for files in hub.files.values() for content in files.values()]
    for token in (TOKEN, GIVEN_TOKEN):
        assert token not in said
        assert not any(token.encode() in content for content in [*kept, *public])
    assert not any(str(place).encode() in content for content in [*kept, *public])
    assert {"recipe.yaml", "report.html"} <= set(hub.files["tester/second"])
