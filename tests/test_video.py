"""Videos: frames of any file, models of transformers and networks of torchvision and PyTorchVideo."""

from __future__ import annotations

import csv
import io
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import small_data
import tiny_models
import torch
import torchvision
from refusal import refused

import hftl
from hftl import backbones, cli, data, demo, origins, pretrained, video, video_models
from hftl.builtin import moving_digits
from hftl.errors import UsageError
from hftl.modality import VIDEO

QUICK = ["--report_to=none", "--dataloader_num_workers=0", "--per_device_train_batch_size=4", "--precision=fp32"]
SMALL = ["--frames=4", "--image_size=32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    small_data.write_videos(folder / "videos", {"train": 6, "val": 3, "test": 3})
    for kind in ("VideoMAE", "Timesformer", "Vivit"):
        tiny_models.write_tiny_video_model(folder / kind, kind)
    tiny_models.write_tiny_text_model(folder / "bert")
    torch.manual_seed(0)
    networks = {"x3d_xs": video_models.pytorchvideo_network("x3d_xs"), "mc3_18": torchvision.models.get_model("mc3_18")}
    for name, network in networks.items():
        (folder / name).mkdir()
        video_models.write_checkpoint(name, network.state_dict(), folder / name)
    return folder


def trained(place: Path, model: str, output: Path, *flags: str) -> hftl.Run:
    words = [f"--model={place / model}", f"--dataset={place / 'videos'}", f"--output_dir={output}", *QUICK, *flags]
    cli._run(["train", "video-classification", *words])
    return hftl.load_run(output)


def numbered(count: int, kind: str = "matroska", codec: str = "ffv1") -> bytes:
    """A video each of whose frames says by its brightness which one it is."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 32, 16
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        for number in range(count):
            pixels = np.full((16, 32, 3), 20 + 200 * number // count, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def of_sizes(*sizes: int) -> bytes:
    """Pictures of several sizes, one behind the other, as cameras send them (Motion JPEG)."""
    from PIL import Image

    file = io.BytesIO()
    for size in sizes:
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_frames_come_back_as_they_were() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 20, 30, 3), dtype=np.uint8)
    assert np.array_equal(video.open_video(video.as_video(frames), 7), frames)
    assert video.as_video(frames) == video.as_video(frames)  # by which caches and comparisons know a video
    assert np.array_equal(video.open_video(frames, 7), frames)
    assert np.array_equal(video.open_video(frames / 255, 7), frames)
    assert np.array_equal(video.open_video(frames[..., 0], 7), np.repeat(frames[..., :1], 3, axis=-1))
    # One from the middle of each of as many parts; of fewer frames some come twice.
    assert np.array_equal(video.open_video(video.as_video(frames), 3), frames[[1, 3, 5]])
    assert np.array_equal(video.open_video(video.as_video(frames), 14), frames[np.arange(14) // 2])
    small = video.open_video(np.zeros((3, 60, 40, 3), np.uint8), 3, least_side=20)
    assert video.open_video(video.as_video(small), 3, least_side=20).shape == (3, 30, 20, 3)
    nothing = np.full((2, 4, 4, 3), np.nan)
    for wrong in (np.zeros((2, 2)), np.zeros((0, 4, 4, 3)), frames.astype(int) - 300, frames[0], nothing, 3):
        with pytest.raises(UsageError, match="a video cannot be made"):
            video.open_video(wrong, 4)


@pytest.mark.parametrize(
    ("kind", "codec"), [("matroska", "ffv1"), ("mp4", "mpeg4"), ("avi", "mpeg4"), ("mpegts", "mpeg2video")]
)
@pytest.mark.parametrize("count", [50, 1_000])
def test_the_frames_of_a_file_are_those_at_their_places(kind: str, codec: str, count: int, tmp_path: Path) -> None:
    """Whether all is decoded, or the file is long and each is looked for."""
    content = numbered(count, kind, codec)
    (tmp_path / "a.mp4").write_bytes(content)
    for source in (content, str(tmp_path / "a.mp4")):
        found = video.open_video(source, 5).mean(axis=(1, 2, 3))
        places = np.array([int((part + 0.5) * count / 5) for part in range(5)])
        assert np.abs(found - (20 + 200 * places // count)).max() < 4
    assert video.video_problem(content, full=True) is None
    seconds, width, height = video.video_header(content) or (0, 0, 0)
    assert (seconds, width, height) == (pytest.approx(count / 25, abs=0.2), 32, 16)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"no video here", "not a video"),
        (numbered(20, "mp4", "mpeg4")[:400], "not a video"),
        (of_sizes(16, 16, 32, 32), "its frames change size"),
        (numbered(60)[: len(numbered(60)) // 3], "cut off"),
        (
            b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=video 5004 RTP/AVP 96\r\n"
            b"a=rtpmap:96 H264/90000\r\n",
            "not a video",
        ),
    ],
)
def test_why_a_video_cannot_be_used(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.mjpeg").write_bytes(content)
    for value in (content, str(tmp_path / "a.mjpeg")):
        assert (video.video_problem(value, full=True) or "").startswith(problem)
        with pytest.raises(UsageError, match=f"cannot be read as a video: {problem}" if value else "no video is named"):
            video.open_video(value, 4)
    assert video.video_problem(str(tmp_path / "gone.mp4"), full=False) == f"no such file: {tmp_path / 'gone.mp4'}"


def uneven(kind: str, options: dict[str, str]) -> bytes:
    """600 frames in 20 s, then as many in 200: their brightness says when they are."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options) as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 30)
        for number in range(1_200):
            moment = number if number < 600 else 600 + (number - 600) * 10
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 20 + moment // 33, np.uint8), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize(("kind", "options"), [("matroska", {}), ("mp4", {}), ("mp4", {"movflags": "frag_keyframe"})])
def test_parts_of_a_long_video_are_as_long(kind: str, options: dict[str, str]) -> None:
    """Also where frames come at uneven times, or the head does not say how many there are."""
    found = video.open_video(uneven(kind, options), 5).mean(axis=(1, 2, 3))
    moments = (np.arange(5) + 0.5) / 5 * 6_600
    assert np.abs(found - (20 + moments // 33)).max() < 6


def test_pictures_of_a_camera_that_was_turned() -> None:
    turned = SimpleNamespace(
        width=4, height=2, rotation=90, to_ndarray=lambda **_: np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    )
    assert video._pixels(turned, None).shape == (4, 2, 3)


def test_sounds_are_no_videos(tmp_path: Path) -> None:
    small_data.write_sounds(tmp_path / "sounds", {"train": 1})
    assert video.video_problem(str(tmp_path / "sounds/train/low/0.wav"), full=False) == "it holds no video"


def test_a_bad_video_ends_the_command_or_is_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_data.write_videos(tmp_path / "videos", {"train": 4})
    (tmp_path / "videos" / "train" / "left" / "bad.mp4").write_bytes(b"no video here")
    words = ["train", "video-classification", f"--model={place / 'VideoMAE'}", f"--dataset={tmp_path / 'videos'}"]
    words += [f"--output_dir={tmp_path / 'run'}", "--method=frozen", *QUICK]
    error = refused(words, capsys)
    assert "1 of 9 videos cannot be read: train/left/bad.mp4 (not a video" in error
    assert not (tmp_path / "run").exists()
    cli._run([*words, "--skip_bad_files"])
    assert "videos: 1 of 9 cannot be read and are left out: train/left/bad.mp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("bert", [], "(bert) is not a model for videos"),
        ("VideoMAE", ["--frames=8"], "was trained for 4, to which its positions belong"),
        ("VideoMAE", ["--frames=0"], "--frames must be"),
        ("mc3_18", ["--load_in_8bit", "--method=lora"], "is not quantised"),
        ("VideoMAE", ["--image_size=48"], "was trained for 32, to which its positions belong"),
        ("random:mvit_v1_b", SMALL, "does not work for 4 frames of 32 x 32 pixels"),
        ("VideoMAE", ["--feature_views=2", "--augmentation=none", "--method=frozen"], "--feature_views 2 cannot be"),
        ("random:r3d", [], "Did you mean 'r3d_18'"),
        ("random:bert", [], "is not a model for videos: choose another, such as random:videomae"),
        ("torchvision:resnet50", ["--method=frozen"], "cannot be fetched"),
        ("pytorchvideo:slowfast", [], "Did you mean 'slowfast_r50'"),
    ],
)
def test_one_line_for_what_does_not_fit(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    flags: list[str],
    words: str,
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HFTL_HOME", str(tmp_path))
    name = model if ":" in model else str(place / model)
    command = [f"--model={name}", f"--dataset={place / 'videos'}", f"--output_dir={tmp_path / 'run'}"]
    assert words in refused(["train", "video-classification", *command, *QUICK, *flags], capsys)
    assert not (tmp_path / "run").exists()


# ---- what the model takes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["VideoMAE", "x3d_xs"])
def test_the_lines_of_the_card_say_what_hftl_says(
    place: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = SMALL[1:] if model == "x3d_xs" else []
    run = trained(place, model, tmp_path / "run", "--method=frozen", *flags)
    (code,) = re.findall(r"```python\n(.*?)```", (run.folder / "README.md").read_text(), re.DOTALL)
    code = code.replace(f'"{run.folder.name}"', repr(str(run.folder))).strip()
    code = re.sub(r"print\((.*)\)$", r"answers.append((\1))", code)
    monkeypatch.chdir(tmp_path)
    for file in sorted((place / "videos" / "test").rglob("*.mkv"))[:3]:
        np.save("frames.npy", video.open_video(file, run.task.frames))
        answers: list[Any] = []
        exec(code, {"answers": answers})
        ((probabilities, names),) = answers
        (prediction,) = run.predict([str(file)])
        for index, name in names.items():
            assert float(probabilities[0, index].detach()) == pytest.approx(prediction.probabilities[name], abs=1e-5)
    (picture,) = run.task.shown({"video": str(file), "id": "a", "label": 0}).pictures
    assert picture[0].startswith("data:image/jpeg;base64,")
    frames = video.open_video(file, 9)
    assert run.predict([frames])[0].probabilities.keys() == {"left", "right"}
    assert len(run.predict(np.stack([frames, frames]))) == 2


def test_a_page_to_try_a_run(place: Path, tmp_path: Path) -> None:
    page = demo.build(trained(place, "VideoMAE", tmp_path / "run", "--method=frozen"))
    file = place / "videos" / "test" / "left" / "0.mkv"
    probabilities, _ = page.fn(str(file))
    assert set(probabilities) == {"left", "right"}
    assert page.fn(None) == (None, "")


def test_augmentation_is_a_function_of_seed_epoch_and_row(place: Path) -> None:
    flags = [f"--model={place / 'VideoMAE'}", f"--dataset={place / 'videos'}", *QUICK, f"--output_dir={place / 'no'}"]
    for kind in ("light", "strong"):
        arguments = hftl.parse(hftl.VideoArguments, [*flags, f"--augmentation={kind}"])
        task = hftl.VideoClassification(arguments)
        splits = task.load_splits()
        task.build_model(splits)
        rows: Any = task.dataset(splits.train, training=True)
        first, again = (rows[0]["pixel_values"] for _ in range(2))
        assert first.shape == (4, 3, 32, 32)
        assert torch.equal(first, again)
        rows.set_epoch(1)
        assert not torch.equal(first, rows[0]["pixel_values"])
        plain: Any = task.dataset(splits.train, training=False)
        assert not torch.equal(first, plain[0]["pixel_values"])
        one, other = (view[0]["pixel_values"] for view in task.views(splits.train, 2, rows))
        assert not torch.equal(one, other)


def test_the_size_that_a_model_has_changes_nothing(place: Path) -> None:
    """Another one keeps what is cut off in the same proportion."""
    sizes = {}
    for flags in ((), ("--image_size=112",), ("--image_size=56",)):
        words = [f"--model={place / 'mc3_18'}", f"--dataset={place / 'videos'}", f"--output_dir={place / 'no'}", *flags]
        task = hftl.VideoClassification(hftl.parse(hftl.VideoArguments, [*words, *QUICK]))
        task.build_model(task.load_splits())
        sizes[flags] = (task.processor.size["shortest_edge"], task.processor.crop_size["height"])
    assert list(sizes.values()) == [(128, 112), (128, 112), (64, 56)]


def test_models_are_ranked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(place / "VideoMAE"), f"{place / 'mc3_18'}@32"]
    data_flags = [f"--dataset={place / 'videos'}", *QUICK[1:2]]
    cli._run(["rank", "--task=video-classification", "--models", *models, *data_flags])
    assert "mc3_18@32" in capsys.readouterr().out


def test_no_single_frame_of_the_moving_digits_says_where_they_go() -> None:
    """A linear layer on a frame finds nothing; on the difference of two, which direction it is."""
    from sklearn.linear_model import LogisticRegression

    parts = moving_digits()
    frames = {
        name: np.stack([video.open_video(row, 16) for row in part["video"]])[..., 0].astype(float)
        for name, part in parts.items()
    }

    def score(view: Any) -> float:
        fitted = LogisticRegression(max_iter=200).fit(view(frames["train"]), parts["train"]["label"][:])
        return float(fitted.score(view(frames["test"]), parts["test"]["label"][:]))

    assert abs(score(lambda videos: videos[:, 8].reshape(len(videos), -1) / 255) - 0.25) < 0.1

    def steps(videos: Any) -> Any:  # how well the next frame fits this one, moved in each of the four directions
        ways = [np.roll(videos[:, :-1], 1, 2), np.roll(videos[:, :-1], -1, 3), np.roll(videos[:, :-1], 1, 3)]
        return np.stack([np.abs(videos[:, 1:] - way).mean(axis=(1, 2, 3)) for way in [*ways, videos[:, :-1]]], axis=1)

    assert score(steps) > 0.7


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*video_models.TORCHVISION, *video_models.PYTORCHVIDEO])
def test_every_network_is_known_by_its_parts(architecture: str) -> None:
    with torch.device("meta"):
        model = video_models.VideoModel(video_models.settings(architecture, ["a", "b", "c"]))
    parts = backbones.structure(model)
    assert parts.head == ("classifier",)
    assert len(parts.blocks) >= 9
    assert backbones.is_convolutional(model) == (not architecture.startswith(("mvit", "swin")))
    assert backbones.adaptable_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method"),
    [("Timesformer", "full"), ("Timesformer", "lora"), ("Vivit", "partial"), ("Vivit", "lora"), ("x3d_xs", "full"),
     ("x3d_xs", "lora"), ("mc3_18", "lora"), ("mc3_18", "frozen"), ("random:slowfast_r50", "frozen")],
)  # fmt: skip
def test_methods_train_what_they_say(place: Path, tmp_path: Path, model: str, method: str) -> None:
    flags = ["--unfreeze_blocks=1"] if method == "partial" else []
    flags += [] if method == "frozen" else ["--num_train_epochs=1"]
    own = not model[0].isupper()
    flags += ["--frames=8", "--image_size=32"] if own else []
    name = f"--model={model}" if ":" in model else f"--model={place / model}"
    words = [name, f"--dataset={place / 'videos'}", f"--output_dir={tmp_path / 'run'}", *QUICK, f"--method={method}"]
    if (model, method) == ("x3d_xs", "lora"):
        with pytest.raises(UsageError, match="VideoModel has to offer: grouped 3-d convolution, "):
            cli._run(["train", "video-classification", *words, *flags])
        return
    cli._run(["train", "video-classification", *words, *flags])
    run = hftl.load_run(tmp_path / "run")
    with (run.folder / "predictions.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for prediction in run.predict(place / "videos" / "test"):
        kept = float(rows[f"test/{prediction.id}"]["probability_left"])
        assert prediction.probabilities["left"] == pytest.approx(
            kept, abs=2e-3
        )  # features may have been kept in 16 bits
    if ":" in model:
        return
    head = backbones.structure(run.model).trained_head
    before, after = type(run.model).from_pretrained(place / model).state_dict(), run.model.state_dict()
    changed = {key for key in before if not backbones.is_below_any(key, head)}
    changed = {key for key in changed if not torch.equal(before[key], after[key])}
    if method == "frozen":
        assert not changed  # statistics of BatchNorm too
    elif method == "partial":
        last = backbones.structure(run.model).blocks[-1]
        assert changed
        assert not [key for key in changed if not backbones.is_below_any(key, last)]
    else:
        assert len(changed) > 5


@pytest.mark.parametrize(("library", "name"), [("torchvision", "mc3_18"), ("pytorchvideo", "x3d_s")])
def test_the_weights_of_other_libraries(
    library: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fetched lies in an ordinary folder, made once; pickles are read as tensors alone."""
    monkeypatch.setenv("HFTL_HOME", str(tmp_path / "hftl"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    if library == "torchvision":
        network: Any = torchvision.models.get_model(name)
        address, content = torchvision.models.get_model_weights(name).DEFAULT.url, network.state_dict()
    else:
        network = video_models.pytorchvideo_network(name)
        address, content = video_models.pytorchvideo_address(name), {"model_state": network.state_dict()}
    file = tmp_path / "torch" / "hub" / "checkpoints" / Path(address).name
    file.parent.mkdir(parents=True)
    torch.save(content, file)
    folder = pretrained.find_model(f"{library}:{name}")
    model = video_models.VideoModel.from_pretrained(folder).eval()
    pixels = torch.rand(1, model.config.num_frames, 3, model.config.image_size, model.config.image_size)
    expected = []
    last = network.fc if library == "torchvision" else network.blocks[-1].proj
    last.register_forward_pre_hook(lambda module, values: expected.append(values[0]))
    found = []
    model.classifier.register_forward_pre_hook(lambda module, values: found.append(values[0]))
    with torch.no_grad():
        network.eval()(pixels.transpose(1, 2))
        model(pixels)
    assert torch.allclose(found[0].flatten(), expected[0].flatten(), atol=1e-4)
    file.unlink()
    monkeypatch.setattr(origins, "_explained_fetch", pytest.fail)
    assert pretrained.find_model(f"{library}:{name}") == folder


def test_a_folder_of_videos_is_for_the_task_of_videos(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "image-classification", f"--model={place / 'VideoMAE'}", f"--dataset={place / 'videos'}"]
    assert "holds videos, not images: use video-classification" in refused(words, capsys)
    assert data.input_roles(VIDEO) == ["video"]
