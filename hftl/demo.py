"""A page to try a finished run on: an input, the probabilities of the classes, and what the answer rests on."""

from __future__ import annotations

import html
import os
from typing import Any

from hftl import pages
from hftl.errors import UsageError
from hftl.folder import say
from hftl.inert import in_markdown, visible
from hftl.modality import AUDIO, IMAGE, IMAGE_TEXT, TEXT, VIDEO
from hftl.run import Run, load_run

#: classes whose probabilities are shown
_MOST_CLASSES = 10
_OF_PICTURES = "The second picture is bright where it speaks for the answer (Grad-CAM)."
_OF_TEXTS = "Coloured words speak for the answer, underlined ones against it (integrated gradients)."
#: as the report draws them, in the colours of either theme
_STYLE = """
.rests mark { color: inherit; border-radius: 3px; }
.rests mark.for { background: rgb(60 130 220 / calc(var(--weight) * 0.45)); }
.rests mark.against { text-decoration: underline dotted; background: rgb(220 110 30 / calc(var(--weight) * 0.45)); }
.rests .pictures { display: flex; gap: 0.5rem; flex-wrap: wrap; }
"""


def main(folder: str, port: int | None, trust_remote_code: bool) -> None:
    """Serve the page on this machine alone, until Ctrl-C.

    Args:
        folder: of a finished run.
        port: of 127.0.0.1; None takes a free one from 7860 on.
        trust_remote_code: as `load_run`.

    Raises:
        UsageError: there is no such run, gradio is not installed, or the port is taken.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    run = load_run(folder, trust_remote_code=trust_remote_code)
    run.require_one_of_several("hftl demo")
    page = build(run)
    try:
        _, address, _ = page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            css=_STYLE,
            theme=_theme(),
        )
    except OSError as error:
        where = "a port from 7860 to 7959" if port is None else f"port {port}"
        raise UsageError(f"hftl demo cannot listen on {where} of 127.0.0.1: choose another with --port.") from error
    say(f"{address} (Ctrl-C ends it)")
    page.block_thread()


def build(run: Run) -> Any:
    """The page, a `gradio.Interface`; everything that comes from the run or its user is escaped.

    Raises:
        UsageError: gradio is not installed, or the task has no page.
    """
    try:
        import gradio
    except ImportError as error:
        raise UsageError("hftl demo needs gradio, which is not installed: pip install 'hftl[demo]'") from error
    inputs: list[Any]
    if run.task.modality is IMAGE:
        inputs = [_picture()]
    elif run.task.modality is IMAGE_TEXT:
        inputs = [_picture(), gradio.Textbox(lines=4, label="Text")]
    elif run.task.modality is AUDIO:
        inputs = [gradio.Audio(type="numpy", label="Recording")]
    elif run.task.modality is VIDEO:
        inputs = [gradio.Video(label="Video")]
    elif run.task.modality is TEXT:
        inputs = [gradio.Textbox(lines=4, label="Text")]
        if getattr(run.task.arguments, "text_pair_column", None):
            inputs.append(gradio.Textbox(lines=4, label="Second text"))
    else:
        raise UsageError(f"hftl demo has no page for the task {run.task.name}.")

    def answer(*values: Any) -> tuple[dict[str, float] | None, str]:
        there = [value not in (None, "") if isinstance(value, str | None) else True for value in values]
        if not (any(there) if run.task.modality is IMAGE_TEXT else all(there)):
            return None, ""
        value = values[0] if len(values) == 1 else tuple(values)
        if run.task.modality is AUDIO:  # (rate, samples)
            value = {"array": value[1], "sampling_rate": value[0]}
        elif run.task.modality is IMAGE_TEXT:
            value = dict(zip(("image", "text"), values, strict=True))
        try:
            (prediction,) = run.predict([value])
        except UsageError as error:
            message = html.escape(visible(_without_place(str(error), values)))
            raise gradio.Error(message, print_exception=False) from error
        probabilities = {visible(name): value for name, value in prediction.probabilities.items()}
        return probabilities, _rests_on(run, value, run.label_names.index(prediction.label))

    return gradio.Interface(
        answer,
        inputs,
        [
            gradio.Label(num_top_classes=_MOST_CLASSES, label="Answer"),
            gradio.HTML(elem_classes="rests"),
        ],
        title=in_markdown(run.folder.resolve().name),
        description=f"{run.task.name}, {len(run.label_names)} classes. What is entered stays on this machine.",
        flagging_mode="never",
    )


def _picture() -> Any:
    """A place for a picture that gives its file as it is: what cannot be read is for hftl to say."""
    import gradio

    picture: Any = gradio.Image(label="Image")
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def _without_place(message: str, values: Any) -> str:
    """An error without the folder that the page put an upload into."""
    for value in values:
        if isinstance(value, str) and os.path.isabs(value):
            message = message.replace(value, os.path.basename(value))
    return message


def _rests_on(run: Run, value: Any, label: int) -> str:
    """What speaks for the answer, as HTML; nothing where another head than the model's own gave it."""
    if not run.is_explainable:
        return ""
    row = run.task.read_inputs([value])[0]
    shown = run.task.shown(row, run.model, label)
    note = _OF_PICTURES if shown.pictures else _OF_TEXTS
    example = pages.render("shown", example={"shown": shown, "id": "the input"})
    return f"<p>{note}</p>{example}" if shown.is_explained else ""


def _theme() -> Any:
    """Without fonts from elsewhere."""
    import gradio

    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
