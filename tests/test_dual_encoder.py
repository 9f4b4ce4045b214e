"""CLIP and SigLIP as image classifiers: a head made of the classes' texts, alone and as the start of every method."""

from __future__ import annotations

import ast
import itertools
import json
import math
from pathlib import Path
from typing import Any

import cells
import pytest
import small_data
import tiny_models
import torch
import transformers
from peft import PeftModel
from refusal import refused
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPForImageClassification, CLIPModel

import hftl
from hftl import backbones, cli
from hftl.dual_encoder import PROMPTS, DualEncoderForImageClassification, is_dual_encoder
from hftl.losses import CrossEntropyLoss
from hftl.probes import solve_linear_head

WORDS = ["photo", "of", "many", "close", "up", "cropped", "small", "large", "square", *small_data.COLOURS]
NAMES = [f"{size} {colour} square" for size, colour in itertools.product(small_data.SIZES, small_data.COLOURS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares, a CLIP and a SigLIP that know nothing, and a CLIP that has learned from squares with captions."""
    folder = tmp_path_factory.mktemp("dual")
    small_data.write_squares(folder / "squares", {"train": 8, "val": 6, "test": 10})
    small_data.write_images(folder / "images", {"train": 4, "val": 2, "test": 2}, size=32)
    for kind in ("clip", "siglip"):
        tiny_models.write_tiny_dual_encoder(folder / kind, kind, WORDS)
    learn(tiny_models.write_tiny_dual_encoder(folder / "trained", "clip", WORDS, hidden_size=32, intermediate_size=64))
    tiny_models.write_tiny_image_model(folder / "vit")
    tiny_models.write_tiny_text_model(folder / "bert")
    return folder


def learn(folder: Path, steps: int = 120) -> None:
    """Train a CLIP on pictures of squares, each told from the captions of the others, but for one kind of them."""
    random = small_data.np.random.default_rng(5)
    kinds = [kind for kind in itertools.product(small_data.SIZES, small_data.COLOURS) if kind != ("large", "green")]
    pictures = [small_data.square(*kind, random) for kind in kinds for _ in range(80)]
    labels = torch.arange(len(kinds)).repeat_interleave(80)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    captions = [prompt.format(label=" ".join((*kind, "square"))) for kind in kinds for prompt in PROMPTS]
    texts = processor(text=captions, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    torch.manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(pictures), (32,))
        said = torch.arange(len(kinds)) * len(PROMPTS) + torch.randint(len(PROMPTS), (len(kinds),))
        outputs = model(pixel_values=pixels[rows], **{name: value[said] for name, value in texts.items()})
        torch.nn.functional.cross_entropy(outputs.logits_per_image, labels[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def words_of(place: Path, model: str, *flags: str) -> list[str]:
    return ["image-classification", f"--dataset={place / 'squares'}", f"--model={place / model}", *flags]


def train(place: Path, output: Path, model: str, *flags: str) -> hftl.Run:
    words = [*words_of(place, model, *flags), *cells.QUICK, f"--output_dir={output}"]
    cli._run(["train", *words])
    return hftl.load_run(output)


@pytest.fixture(scope="module")
def zero_shot(place: Path, tmp_path_factory: pytest.TempPathFactory) -> hftl.Run:
    return train(place, tmp_path_factory.mktemp("run") / "run", "trained", "--method=zero_shot")


@pytest.mark.parametrize("kind", ["clip", "siglip", "trained"])
def test_logits_are_those_of_the_dual_encoder(place: Path, tmp_path: Path, kind: str) -> None:
    prompt = "a cropped photo of {label}"
    run = train(place, tmp_path / "run", kind, "--method=zero_shot", f"--prompts={prompt}")
    whole, processor = AutoModel.from_pretrained(place / kind).eval(), AutoProcessor.from_pretrained(place / kind)
    rows = run.task.read_inputs(str(place / "squares" / "test"))
    names = [name.replace("_", " ") for name in run.label_names]
    assert sorted(names) == sorted(NAMES)
    inputs = processor(
        text=[prompt.format(label=name) for name in names],
        images=[run.task.open_image(row["image"]) for row in rows],
        padding="max_length" if kind == "siglip" else True,
        max_length=whole.config.text_config.max_position_embeddings if kind == "siglip" else None,
        return_tensors="pt",
    )
    with torch.no_grad():
        own = whole(**inputs).logits_per_image - (whole.logit_bias if kind == "siglip" else 0.0)
    assert float((torch.from_numpy(run.logits(rows)) - own).abs().max()) < 1e-4
    assert float(own.std(dim=0).max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "architecture", "found"),
    [
        ("CLIP", "CLIPModel", True),
        ("CLIP", None, True),
        ("CLIP", "CLIPForImageClassification", False),
        ("Siglip", "SiglipModel", True),
        ("ChineseCLIP", "ChineseCLIPModel", True),
        ("CLIPSeg", "CLIPSegForImageSegmentation", False),
        ("OwlViT", "OwlViTForObjectDetection", False),
        ("CLIPVision", "CLIPVisionModel", False),
        ("XCLIP", "XCLIPModel", False),
        ("Clap", "ClapModel", False),
        ("ViT", "ViTModel", False),
    ],
)
def test_a_dual_encoder_is_known_by_its_parts(kind: str, architecture: str | None, found: bool) -> None:
    config = getattr(transformers, f"{kind}Config")(architectures=architecture and [architecture])
    assert is_dual_encoder(config) is found


def test_several_prompts_are_averaged_on_the_sphere(place: Path) -> None:
    model = built(place, "clip")
    whole, processor = AutoModel.from_pretrained(place / "clip").eval(), AutoProcessor.from_pretrained(place / "clip")
    inputs = processor(
        text=[prompt.format(label="large red square") for prompt in PROMPTS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        vectors = whole.get_text_features(**inputs).pooler_output
    mean = torch.nn.functional.normalize(torch.nn.functional.normalize(vectors, dim=1).mean(dim=0), dim=0)
    row = model.head.weight[model.config.label2id["large_red_square"]]
    assert torch.allclose(row, whole.logit_scale.exp() * mean, atol=1e-4)
    assert not model.head.bias.any()


def built(place: Path, kind: str, *flags: str) -> Any:
    """The model as a method gets it."""
    arguments = hftl.parse(hftl.ImageArguments, [*words_of(place, kind, *flags)[1:], "--output_dir=unused"])
    task = hftl.ImageClassification(arguments)
    return task.build_model(task.load_splits())


def test_zero_shot_trains_nothing_and_knows_what_the_checkpoint_learned(
    place: Path, tmp_path: Path, zero_shot: hftl.Run
) -> None:
    guessing = 1 / len(NAMES)
    assert zero_shot.metrics["test"]["accuracy"] > 4 * guessing
    assert train(place, tmp_path / "run", "clip", "--method=zero_shot").metrics["test"]["accuracy"] < 2 * guessing
    stage = zero_shot.metrics["train"]["stages"][0]
    assert (stage["trainable_parameters"], stage["steps"]) == (0, 0)
    before, after = (
        load_file(place / "trained" / "model.safetensors"),
        load_file(zero_shot.folder / "model.safetensors"),
    )
    body = {name.removeprefix("image."): value for name, value in after.items() if not name.startswith("head.")}
    assert all(value.equal(before[name]) for name, value in body.items())
    assert {name for name in before if name.startswith("vision_model.")} <= set(body)
    assert not any("text" in name for name in body)


def test_a_run_without_training_is_a_run(
    place: Path, tmp_path: Path, zero_shot: hftl.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = zero_shot.evaluate(str(place / "squares"))
    assert scores["accuracy"] == zero_shot.metrics["test"]["accuracy"]
    again = tmp_path / "again"
    cli._run(["train", f"--config={zero_shot.folder / 'recipe.yaml'}", f"--output_dir={again}"])
    assert "zero-shot: scored in" in capsys.readouterr().out
    assert (again / "predictions.csv").read_bytes() == (zero_shot.folder / "predictions.csv").read_bytes()
    card = (zero_shot.folder / "README.md").read_text(encoding="utf-8")
    assert "It has learned from no rows of squares" in card
    assert "Fewer than" not in card
    assert "library_name: hftl" in card
    config = (zero_shot.folder / "config.json").read_text(encoding="utf-8")
    assert str(place) not in config
    assert json.loads(config)["prompts"] == list(PROMPTS)
    picture = place / "squares" / "test" / "large_red_square" / "0.png"
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace(f'"{zero_shot.folder.name}"', repr(str(zero_shot.folder))).replace("image.jpg", str(picture))
    exec(code, {})
    (best, *_) = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    (answer,) = zero_shot.predict(str(picture))
    assert best["label"] == answer.label
    assert best["score"] == pytest.approx(answer.probabilities[answer.label], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("clip", method) for method in ("full", "partial", "lora", "frozen")),
        ("siglip", "lora"),
        ("trained", "lp_ft"),
    ],
)
def test_methods_start_from_the_texts(place: Path, tmp_path: Path, kind: str, method: str) -> None:
    model = built(place, kind)
    blocks = backbones.parameter_blocks(model)
    assert {name for name, block in blocks.items() if block == max(blocks.values())} == {"head.weight", "head.bias"}
    assert len(set(blocks.values())) == 5  # the stem, three layers, the head
    record = cells.cell(words_of(place, kind), method, tmp_path / "run")
    assert "refused" not in record, record
    assert (record["wrong"], record["still"]) == ([], [])
    assert record["difference"] < (1e-3 if method == "lora" else 1e-5)
    trained = {"full": range(5), "lp_ft": range(5), "partial": (3, 4), "lora": (1, 2, 3, 4), "frozen": (4,)}
    assert record["trained"] == [*trained[method]]
    after = load_file(tmp_path / "run" / "model.safetensors")
    # A few steps of 1e-3 from weights of length exp(logit_scale); a fresh head would be somewhere else.
    near = float((after["head.weight"] - model.head.weight.detach()).abs().max())
    assert near > 0
    assert (near < 0.1) == (method != "frozen")


def test_an_adapter_goes_on_the_checkpoint_it_was_trained_from(place: Path, tmp_path: Path) -> None:
    run = train(place, tmp_path / "run", "trained", "--method=lora", "--num_train_epochs=1")
    config = AutoConfig.from_pretrained(run.folder / "adapter")
    base = DualEncoderForImageClassification.from_pretrained(place / "trained", config=config)
    model = PeftModel.from_pretrained(base, run.folder / "adapter").eval()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = [either(pixel_values=pixels).logits for either in (model, run.model.eval())]
    assert torch.allclose(*logits, atol=1e-4)


def test_the_head_is_solved_from_the_texts(place: Path, tmp_path: Path, zero_shot: hftl.Run) -> None:
    solved = train(place, tmp_path / "solved", "trained", "--method=frozen")
    before = zero_shot.metrics["validation"]
    assert solved.metrics["validation"]["accuracy"] >= before["accuracy"]
    body = load_file(zero_shot.folder / "model.safetensors")
    assert all(
        value.equal(body[name])
        for name, value in load_file(solved.folder / "model.safetensors").items()
        if not name.startswith("head.")
    )
    tip = train(place, tmp_path / "tip", "trained", "--method=frozen", "--head=tip")
    assert tip.metrics["validation"]["accuracy"] >= solved.metrics["validation"]["accuracy"]
    assert tip.metrics["ordinary_head_test"]["accuracy"] == solved.metrics["test"]["accuracy"]
    picture = str(place / "squares" / "test" / "large_red_square" / "0.png")
    assert hftl.load_run(tip.folder).predict(picture)[0].label in tip.label_names


def test_a_layer_that_knows_the_classes_stays_where_no_row_speaks_against_it() -> None:
    random = torch.Generator().manual_seed(0)
    direction = torch.randn(2, 8, generator=random)
    features = torch.randn(400, 8, generator=random)
    labels = (features @ direction.T).argmax(dim=1)
    labels[:12] = 1 - labels[:12]  # the few rows to train on say the contrary
    score = lambda logits, ids: float((logits.argmax(dim=1) == ids).float().mean())  # noqa: E731
    settings: Any = ((features[:12], labels[:12]), (features[12:], labels[12:]), 2, CrossEntropyLoss(), score)
    known = solve_linear_head(*settings, start=(3 * direction, torch.zeros(2)))
    assert (known.strength, known.weight.equal(3 * direction)) == (math.inf, True)
    assert known.path[0][1] == 1.0 > solve_linear_head(*settings).path[0][1]
    # With rows that agree there is something better than a layer that is a little wrong.
    agreeing: Any = ((features[12:200], labels[12:200]), *settings[1:])
    wrong = direction + 0.5 * torch.randn(2, 8, generator=random)
    assert math.isfinite(solve_linear_head(*agreeing, start=(wrong, torch.zeros(2))).strength)


def test_wise_ft_mixes_in_the_zero_shot_model(place: Path, tmp_path: Path, zero_shot: hftl.Run) -> None:
    run = train(place, tmp_path / "run", "trained", "--method=full", "--wise_ft", "--num_train_epochs=2")
    (stage,) = run.metrics["train"]["stages"]
    first, last = (next(entry for entry in stage["wise_ft"]["tried"] if entry["mix"] == mix) for mix in (0.0, 1.0))
    assert first["score"] == zero_shot.metrics["validation"]["accuracy"]
    assert first["loss"] == pytest.approx(zero_shot.metrics["validation"]["loss"], abs=1e-5)
    assert first["loss"] != pytest.approx(last["loss"], abs=1e-5)


def test_prompts_none_is_the_classifier_of_transformers(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(place, tmp_path / "run", "clip", "--method=frozen", "--prompts", "none")
    assert "head: fresh, since --prompts none leaves no head of texts" in capsys.readouterr().out
    assert type(run.model) is CLIPForImageClassification
    assert "library_name: transformers" in (run.folder / "README.md").read_text(encoding="utf-8")


def test_a_run_is_gone_on_with(place: Path, tmp_path: Path, zero_shot: hftl.Run) -> None:
    flags = ["--method=full", "--num_train_epochs=1", "--learning_rate=1e-9"]
    kept = train(place, tmp_path / "kept", str(zero_shot.folder), *flags, "--keep_head")
    assert kept.metrics["test"]["accuracy"] == zero_shot.metrics["test"]["accuracy"]
    fresh = built(place, str(zero_shot.folder))
    assert float(fresh.head.weight.abs().max()) < 0.5
    assert not backbones.starts_from_texts(fresh)


def test_names_that_are_no_words_are_said(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, colour in enumerate(small_data.COLOURS):
        for split in ("train", "val", "test"):
            target = tmp_path / "digits" / split / str(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(place / "images" / split / colour, target_is_directory=True)
    flags = [f"--dataset={tmp_path / 'digits'}", "--follow_links", "--method=zero_shot"]
    train(place, tmp_path / "run", "clip", *flags)
    assert "prompts: '0' is the name of a class and no word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("vit", ["--method=zero_shot"], ("--method zero_shot: --model", "reads no texts", "CLIP, SigLIP")),
        ("vit", ["--prompts={label}"], ("--prompts: --model", "reads no texts")),
        ("random:clip", ["--method=zero_shot"], ("random:clip' reads no texts",)),
        ("clip", ["--prompts=a photo"], ("--prompts: 'a photo' must hold {label}",)),
        ("clip", ["--prompts=a {colour} {label}"], ("must hold {label}", "nothing else in braces")),
        ("clip", ["--prompts=a {label"], ("--prompts: expected '}'", "is doubled")),
        (
            "clip",
            ["--prompts=" + "very " * 30 + "{label}"],
            ("is longer than the 40 tokens", "shorten the name, or the --prompts"),
        ),
        ("clip", ["--method=zero_shot", "--prompts=none"], ("--method zero_shot: --prompts none leaves no head",)),
        ("clip", ["--method=zero_shot", "--keep_head"], ("--keep_head leaves no head of texts",)),
        ("clip", ["--method=zero_shot", "--num_train_epochs=2"], ("--num_train_epochs", "trains nothing")),
        ("clip", ["--method=zero_shot", "--average=ema"], ("--average: --method zero_shot trains nothing",)),
        ("clip", ["--method=zero_shot", "--learning_rate=1e-3"], ("does not use --learning_rate",)),
        ("clip", ["--method=zero_shot", "--learning_rate=auto"], ("--method zero_shot trains nothing",)),
        ("clip", ["--method=zero_shot", "--head=tip"], ("--method zero_shot does not use --head", "frozen")),
        ("clip", ["--method=lora", "--load_in_4bit"], ("--load_in_4bit: a dual encoder", "--prompts none")),
        ("clip", ["--image_size=64"], ("--image_size 64", "does not work at this size")),
        (
            "clip",
            ["--method=zero_shot", "--problem_type=multi_label_classification"],
            ("--method zero_shot: a head of texts is for rows of one class each",),
        ),
        ("broken", [], ("its weights fill not all of CLIPModel", "text", "--prompts none")),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    place: Path, tmp_path: Path, model: str, flags: list[str], said: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name = model if ":" in model else str(place / model)
    if model == "broken":
        whole = AutoModel.from_pretrained(place / "clip")
        state = {key: value for key, value in whole.state_dict().items() if not key.startswith("text_projection")}
        AutoProcessor.from_pretrained(place / "clip").save_pretrained(tmp_path / model)
        whole.save_pretrained(tmp_path / model, state_dict=state)
        name = str(tmp_path / model)
    words = [*words_of(place, "", *flags), f"--model={name}", f"--output_dir={tmp_path / 'run'}"]
    error = refused(["train", *words], capsys)
    assert all(part in error for part in said), error
    assert not (tmp_path / "run").exists()


def test_a_model_that_compares_in_another_way_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = CLIPModel.forward

    def squared(self: Any, *values: Any, **named: Any) -> Any:
        outputs = forward(self, *values, **named)
        outputs.logits_per_image = outputs.logits_per_image.square()
        return outputs

    monkeypatch.setattr(CLIPModel, "forward", squared)
    error = refused(["train", *words_of(place, "trained"), f"--output_dir={tmp_path / 'run'}"], capsys)
    assert "(CLIPModel) cannot get a head of texts" in error
    assert "its own logits are others, by" in error


def test_other_tasks_have_no_texts_to_start_from(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "text-classification", f"--model={place / 'bert'}", "--dataset=any", "--method=zero_shot"]
    assert "--method zero_shot is for image-classification" in refused(words, capsys)


def test_of_similarity_the_vector_is_the_one_that_texts_are_compared_with(place: Path, tmp_path: Path) -> None:
    whole = AutoModel.from_pretrained(place / "trained").eval()
    words = words_of(place, "trained", "--method=zero_shot", f"--embedding_size={whole.config.projection_dim}")
    cli._run(
        [
            "train",
            "image-similarity",
            *words[1:],
            "--report_to=none",
            "--precision=fp32",
            f"--output_dir={tmp_path / 'run'}",
        ]
    )
    run = hftl.load_run(tmp_path / "run")
    files = sorted((place / "squares" / "test").rglob("*.png"))[::10]
    vectors = torch.stack([torch.from_numpy(one.embedding) for one in run.predict([*map(str, files)])])
    processor = AutoProcessor.from_pretrained(place / "trained")
    pixels = processor(images=[small_data.Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(whole.get_image_features(pixel_values=pixels).pooler_output, dim=1)
    torch.testing.assert_close(vectors @ vectors.T, expected @ expected.T, atol=1e-4, rtol=0)
    assert "import hftl.dual_encoder" in (run.folder / "README.md").read_text()


def test_it_is_a_part_of_other_tasks(place: Path, tmp_path: Path) -> None:
    small_data.write_sounds(tmp_path / "sounds", {"train": 6, "test": 3})
    small_data.write_pairs(tmp_path / "both", {"train": 6, "test": 2})
    for task, *flags in (
        ("audio-classification", f"--dataset={tmp_path / 'sounds'}", "--clip_seconds=0.5"),
        ("image-text-classification", f"--dataset={tmp_path / 'both'}", f"--text_model={place / 'bert'}"),
    ):
        words = [f"--model={place / 'clip'}", "--method=full", "--max_steps=1", *flags, *cells.QUICK]
        cli._run(["train", task, *words, f"--output_dir={tmp_path / task}"])
        run = hftl.load_run(tmp_path / task)
        assert 0 <= run.metrics["test"]["accuracy"] <= 1
    image = AutoModel.from_pretrained(tmp_path / "image-text-classification" / "image")
    assert type(image).__name__ == "CLIPVisionModel"


def test_classes_that_read_the_same_are_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("a_b", "a b", "red square")):
        for split in ("train", "test"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = small_data.np.random.default_rng(9 * number + index).integers(256, size=(32, 32, 3))
                small_data.Image.fromarray(pixels.astype("uint8")).save(folder / f"{split}{index}.png")
    words = [f"--dataset={tmp_path / 'data'}", f"--model={place / 'clip'}", "--method=zero_shot", *cells.QUICK]
    cli._run(["train", "image-classification", *words, f"--output_dir={tmp_path / 'run'}"])
    assert "prompts: of 'a b' and 'a_b' the texts say the same" in capsys.readouterr().out
