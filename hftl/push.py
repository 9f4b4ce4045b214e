"""A finished run on the Hub: its files, and a report without rows of the data, in one commit."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library, which is not the same in all releases
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback

from hftl.arguments import TransferArguments
from hftl.card import EVALUATIONS, forbids_changes
from hftl.errors import UsageError
from hftl.folder import CHECKPOINTS, LOGS, RECIPE, is_main_process, say
from hftl.report import REPORT, render_report

if TYPE_CHECKING:
    from hftl.run import Run

#: what of a run folder goes to the Hub
_PUSHED = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", RECIPE, EVALUATIONS,
    "adapter/*", "base/*", "probe/*",
)  # fmt: skip
#: a * above also matches below folders
_KEPT_BACK = (f"{CHECKPOINTS}/*", f"{LOGS}/*", "repeats/*", "trials/*", ".partial/*", ".replaced/*")
#: what a Hub answers that has trouble of its own or too much to do, or meets two commits at once
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
#: seconds before each further try, where the Hub says nothing of it; its client has its own for every single file
_PAUSES = (1.0, 5.0)
_LONGEST_PAUSE = 60.0
#: what goes wrong on the way to the Hub, or is refused there
_ERRORS = (
    HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError,
    ValueError, RuntimeError,  # what the client makes of the Hub's answers about single files
)  # fmt: skip
_ADVICE = {
    401: "it wants a token: make one that may write at {endpoint}/settings/tokens, then `hf auth login`",
    403: "the token may not write there: make one that may at {endpoint}/settings/tokens, or name a place of yours",
    404: "there is no such repository or branch, or the token may not see it",
    409: "something else is changing the repository: try again in a while",
    429: "it has had too many requests: try again in a while",
    507: "it has no room for the files",
}
#: where the model of a checkpoint stands while the training goes on, as Trainer calls it
_IN_PROGRESS = "last-checkpoint"
_Answer = TypeVar("_Answer")


def push(
    run: Run,
    repository: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push model or adapter, processor, card, recipe, scores and report to the Hub in one commit.

    Files that an earlier try has brought there are not sent again.

    Args:
        run: a finished run.
        repository: NAME or USER/NAME; it is made where it is not there.
        private: whether a new repository is.
        token: of the Hub; None takes that of `hf auth login` or HF_TOKEN.
        revision: a branch, which is made where it is not there; None is the main one.
        create_pr: propose the commit instead of making it.

    Returns:
        The address of the repository, or of the proposal.

    Raises:
        UsageError: the Hub refused, or could not be reached, or the base model's licence forbids it; the run stays as
            it is.
    """
    if forbids_changes(ModelCard.load(run.folder / "README.md").data.get("license")):
        raise UsageError(
            f"Pushing to {repository!r}: the licence of the base model lets no changed versions be shared (ND). Train "
            "from a base with another licence, or keep the run to yourself."
        )
    api = HfApi(token=token)
    page = render_report(run, None, shared=True).encode()
    operations: list[CommitOperationAdd | CommitOperationDelete]
    operations = [CommitOperationAdd(path, run.folder / path) for path in _files(run.folder)]
    operations.append(CommitOperationAdd(REPORT, page))
    try:
        address = _tried(lambda: api.create_repo(repository, private=private, exist_ok=True))
        name = address.repo_id
        if any(path.startswith(f"{_IN_PROGRESS}/") for path in _tried(lambda: api.list_repo_files(name))):
            operations.append(CommitOperationDelete(f"{_IN_PROGRESS}/"))
        if revision is not None and not create_pr:
            _tried(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        made = _tried(
            lambda: api.create_commit(
                name, operations, commit_message="Fine-tuned with hftl", revision=revision, create_pr=create_pr
            )
        )
    except _ERRORS as error:
        again = f"hftl push {shlex.quote(str(run.folder))} {shlex.quote(repository)}"
        raise UsageError(
            f"Pushing to {repository!r} failed: {reason(_cause(error))}. The run in {str(run.folder)!r} is whole; push "
            f"it again with `{again}`."
        ) from error
    return str(made.pr_url or address)


class PushSaves(TrainerCallback):
    """`--hub_strategy every_save`: the model of each checkpoint goes to the Hub while the training goes on.

    A checkpoint that comes before the last one is there is left out, and so is one that fails: the training goes on.
    """

    def __init__(self, arguments: TransferArguments) -> None:
        """Keep where to push to."""
        self.repository = arguments.hub_model_id or Path(str(arguments.output_dir)).name
        self.private = arguments.hub_private_repo
        self.api = HfApi(token=arguments.hub_token)
        self.pool = ThreadPoolExecutor(1)
        self.upload: Future[None] | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to push."""
        if not is_main_process() or (self.upload is not None and not self.upload.done()):
            return
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        place = Path(args.output_dir, "pushed")  # linked, since the checkpoint is removed when the next ones are there
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob("*config.json")):
            os.link(path, place / path.name)
        self.upload = self.pool.submit(self._push, place, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for what has begun."""
        self.pool.shutdown()

    def _push(self, place: Path, step: int) -> None:
        try:
            name = _tried(lambda: self.api.create_repo(self.repository, private=self.private, exist_ok=True)).repo_id
            files = [CommitOperationAdd(f"{_IN_PROGRESS}/{path.name}", path) for path in sorted(place.iterdir())]
            _tried(lambda: self.api.create_commit(name, files, commit_message=f"Training in progress, step {step}"))
        except _ERRORS as error:
            say(f"the checkpoint of step {step} was not pushed: {reason(_cause(error))}. The training goes on.")


def _files(folder: Path) -> list[str]:
    """Of the run's files those that go to the Hub, relative to it."""
    paths = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    found: Iterable[str] = filter_repo_objects(paths, allow_patterns=list(_PUSHED), ignore_patterns=list(_KEPT_BACK))
    return list(found)


def _tried(call: Callable[[], _Answer]) -> _Answer:
    """What the call gives; it is tried again where the Hub or the way to it has trouble that may pass."""
    for pause in _PAUSES:
        try:
            return call()
        except _ERRORS as raised:
            error = _cause(raised)
            if not _may_pass(error):
                raise
            wanted = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
            seconds = min(float(wanted), _LONGEST_PAUSE) if wanted.isdecimal() else pause
            say(f"the Hub: {reason(error)}; another try in {seconds:.0f} s")
            time.sleep(seconds)
    return call()


def _cause(error: BaseException) -> BaseException:
    """The client says of a file's upload only that it failed, and what it failed by stands behind that."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return status in _PASSING if status is not None else isinstance(error, HTTPError)


def reason(error: BaseException) -> str:
    """What went wrong, and what helps, in one sentence without an end."""
    status = _status(error)
    said = (" ".join(str(error).split())[:200] or type(error).__name__).rstrip(".")
    if status in _ADVICE:
        return f"the Hub answers {status}, {_ADVICE[status].format(endpoint=constants.ENDPOINT)}"
    if isinstance(error, LocalTokenNotFoundError):
        return _ADVICE[401].format(endpoint=constants.ENDPOINT)
    if status is not None and status >= 500:
        return f"the Hub answers {status}, it has trouble of its own"
    if isinstance(error, HTTPError) and status is None:
        return f"the connection to the Hub failed ({type(error).__name__}: {said})"
    return said
