"""`hftl demo`: a page that answers, in a real browser."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import small_data
import tiny_models
from browser import chromium
from forked import Command, run_command

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{ 7 * 7 }} good film"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_data.write_both(tmp_path_factory.mktemp("demo"))
    tiny_models.write_tiny_text_model(folder / "bert", kind="bert")
    tiny_models.write_tiny_cnn(folder / "convnet")
    (folder / "broken.png").write_bytes(b"no picture")
    for task, flags in (
        ("text", ["--dataset=texts", "--model=bert", "--max_steps=2"]),
        ("image", ["--dataset=images", "--model=convnet", "--method=frozen"]),
    ):
        done = run_command(
            ["train", f"{task}-classification", *flags, f"--output_dir={task}", "--report_to=none"], folder
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text", "image"])
def test_a_page_to_try_a_run(place: Path, task: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    command = Command(["demo", task, f"--port={port}"], place)
    try:
        wait_for(port)
        with chromium() as browser:
            page = browser.new_page()
            messages: list[str] = []
            requests: list[str] = []
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: requests.append(request.url))
            page.goto(address)
            if task == "text":
                page.get_by_label("Text", exact=True).fill(HOSTILE)
            else:
                page.set_input_files("input[type=file]", place / "broken.png")
                page.get_by_role("button", name="Submit").click()
                page.get_by_text("broken.png").first.wait_for(timeout=60_000)
                assert str(place) not in page.inner_text("body")
                page.goto(address)
                page.set_input_files("input[type=file]", place / "images" / "test" / "red" / "0.png")
                page.wait_for_selector("img")
            page.get_by_role("button", name="Submit").click()
            page.wait_for_selector(".rests mark" if task == "text" else ".rests img", timeout=60_000)
            text = page.inner_text("body")
            for name in ("good", "bad") if task == "text" else small_data.COLOURS:
                assert name in text
            assert "%" in text
            if task == "text":
                assert "<img src=x onerror=alert(1)> ${alert(2)} {{ 7 * 7 }}" in page.inner_text(".rests")
            assert messages == []
            elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
            assert elsewhere == []
    finally:
        command.process.terminate()
        done = command.wait(30)
    assert done.stdout.startswith(f"http://127.0.0.1:{port}")
    assert "Traceback" not in done.stderr


def wait_for(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(port)


def test_bad_input(place: Path) -> None:
    missing = run_command(["demo", "nothing"], place)
    assert missing.returncode == 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run_command(["demo", "text", f"--port={port}"], place)
    assert refused.returncode == 2
    assert str(port) in refused.stderr
    assert "Traceback" not in refused.stderr + missing.stderr
