"""A finished run on the Hub: its files, and a report without rows of the data, in one commit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # the HTTP library differs between releases
from huggingface_hub.utils import filter_repo_objects, parse_ratelimit_headers
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from hftl.arguments import TransferArguments
from hftl.card import EVALUATIONS, SOURCES, base_cards, forbids_changes, licence_of
from hftl.errors import UsageError
from hftl.finished import Finished, explained_damage
from hftl.folder import CHECKPOINTS, LOGS, PREDICTIONS, RECIPE, is_main_process, read_json, repository_of, say
from hftl.hub import ask_again, check_name
from hftl.inert import EVERYWHERE, public_name, public_value
from hftl.merging import BASE
from hftl.report import REPORT, render_report
from hftl.yaml_files import read_yaml

#: what of a run folder goes to the Hub
_PUSHED = (
    "*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md", RECIPE, EVALUATIONS,
    "adapter/*", "base/*", "probe/*", "image/*", "text/*",
)  # fmt: skip
#: … of which these are changed on the way
_CHANGED = ("README.md", RECIPE)
#: a * above also matches below folders
_KEPT_BACK = (f"{CHECKPOINTS}/*", f"{LOGS}/*", "repeats/*", "trials/*")
#: what a Hub answers that has trouble of its own or too much to do, or whose repository something else changes
_PASSING = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
#: seconds before each further try, where the Hub says nothing of it; its client has its own for every single file
_PAUSES = (1.0, 5.0)
_LONGEST_PAUSE = 60.0
#: what goes wrong on the way to the Hub, is refused there, or is what the client makes of answers about single files
_ERRORS = (HTTPError, OSError, ValueError, RuntimeError, KeyError)
_ADVICE = {
    401: "it wants a token: make one that may write at {endpoint}/settings/tokens, then `hf auth login`",
    403: "the token may not write there: make one that may at {endpoint}/settings/tokens, or name a place of yours",
    404: "there is no such repository or branch, or the token may not see it",
    413: "it takes no files as large as these",
    409: "something else is changing the repository: try again in a while",
    412: "something else is changing the repository: try again in a while",
    429: "it has had too many requests: try again in a while",
    507: "it has no room for the files",
}
#: where the model of a checkpoint stands while the training goes on
_IN_PROGRESS = "in-progress"
_Answer = TypeVar("_Answer")


def push(
    run: Finished,
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
    check_name(repository)
    with explained_damage(run.folder):
        files = _files(run.folder)
        _check_whole(run.folder, files)
        _check_licence(_card_of(run.folder), repository)
        operations: list[CommitOperationAdd | CommitOperationDelete]
        operations = [CommitOperationAdd(path, run.folder / path) for path in files if path not in _CHANGED]
        operations.append(CommitOperationAdd(RECIPE, _shared_recipe(run.folder)))
        if (run.folder / PREDICTIONS).is_file():  # which the page is made of
            operations.append(CommitOperationAdd(REPORT, render_report(run, None, shared=True).encode()))
    ask_again()
    api = HfApi(token=token)
    try:
        address = _tried(lambda: api.create_repo(repository, private=private, exist_ok=True))
        name = address.repo_id
        operations.append(CommitOperationAdd("README.md", _shared_card(run.folder, name)))
        if revision is not None:
            _tried(lambda: api.create_branch(name, branch=revision, exist_ok=True))
        there = _tried(lambda: api.list_repo_files(name, revision=revision))
        if any(path.startswith(f"{_IN_PROGRESS}/") for path in there):
            operations.append(CommitOperationDelete(f"{_IN_PROGRESS}/"))
        made = _tried(
            lambda: api.create_commit(
                name, operations, commit_message="Fine-tuned with hftl", revision=revision, create_pr=create_pr
            ),
            # Where the answer alone was lost, another try would propose the same once more.
            passing={429} if create_pr else _PASSING,
        )
    except _ERRORS as error:
        flags = ["--private"] * bool(private) + ([f"--revision={revision}"] if revision else [])
        words = ["hftl", "push", str(run.folder), repository, *flags, *(["--create_pr"] * create_pr)]
        raise UsageError(
            f"Pushing to {repository!r} failed: {reason(_cause(error))}. The run in {str(run.folder)!r} is whole; push "
            f"it again with `{shlex.join(words)}`."
        ) from error
    return str(made.pr_url or address)


def check_base(arguments: TransferArguments) -> None:
    """Refuse to begin a training that is to be pushed and may not be.

    Raises:
        UsageError: the licence of the base model forbids it, or no repository can have such a name.
    """
    repository = repository_of(arguments)
    check_name(repository)
    _check_licence(base_cards(arguments), repository)


def _check_whole(folder: Path, files: list[str]) -> None:
    """Refuse a run of which something is missing or damaged.

    Raises:
        UsageError: with the file.
    """
    if not any(Path(path).parent.name in ("", BASE) and path.endswith(".safetensors") for path in files):
        raise UsageError(f"The run in {str(folder)!r} is damaged: there are no weights in it.")
    for path in files:
        try:
            if path.endswith(".safetensors"):
                with safe_open(folder / path, "pt"):
                    pass
            elif path.endswith("config.json") and not isinstance(read_json(folder / path), dict):
                raise ValueError("it holds other things")
        except (SafetensorError, ValueError) as error:
            raise UsageError(f"The run in {str(folder)!r} is damaged, its {path} cannot be read: {error}") from error


def _check_licence(card: dict[str, Any], repository: str) -> None:
    if forbids_changes(licence_of(card)):
        raise UsageError(
            f"Pushing to {repository!r}: the licence of the base model lets no changed versions be shared (ND). Train "
            "from a base with another licence, or keep the run to yourself."
        )


def _card_of(folder: Path) -> dict[str, Any]:
    """The metadata of a run's card, in which its licence and its sources stand."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
        if not text.startswith("---\n"):
            raise ValueError("it has no metadata")
        return ModelCard(text).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"The card of the run in {str(folder)!r}, README.md, is missing or damaged ({reason}): without it nobody "
            "knows what the licence allows."
        ) from error


def _shared_card(folder: Path, name: str) -> bytes:
    """The card, with the lines that load the model naming the repository."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    call = r'(pipeline\("[\w-]+", |from_pretrained\((?:base, )?|snapshot_download\()"(?:[^"\\]|\\.)*"'
    return re.sub(call, lambda found: found[1] + json.dumps(name), text).encode()


def _shared_recipe(folder: Path) -> bytes:
    """The recipe without the folders of this machine: model and data that came from one are left to who repeats it."""
    recipe = read_yaml(folder / RECIPE)
    card = _card_of(folder)
    own = [key for key in SOURCES if recipe.get(key) and not str(recipe[key]).startswith(EVERYWHERE)]
    local = [key for key in own if recipe[key] not in _listed(card.get(SOURCES[key][1]))]  # the Hub's are in the card
    settings = {key: public_value(value) for key, value in recipe.items() if key not in local}
    said = ", which is another one elsewhere\n"
    notes = [f"# {SOURCES[key][0]} was {public_name(recipe[key])!r}{said}" for key in local]
    return ("".join(notes) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)).encode()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class PushSaves(TrainerCallback):
    """`--hub_strategy every_save`: the model of each checkpoint goes to the Hub while the training goes on.

    A checkpoint that comes before the last one is there is left out, and so is one that fails: the training goes on.
    """

    def __init__(self, arguments: TransferArguments) -> None:
        """Keep where to push to."""
        self.repository = repository_of(arguments)
        self.private, self.revision = arguments.hub_private_repo, arguments.hub_revision
        self.api = HfApi(token=arguments.hub_token)
        self.upload: threading.Thread | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to push."""
        if not is_main_process() or (self.upload is not None and self.upload.is_alive()):
            return
        place = Path(args.output_dir, "pushed")
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in (*checkpoint.glob("*.safetensors"), *checkpoint.glob("*config.json")):
                _link(path, place / path.name)
        except OSError as error:
            self._left_out(state.global_step, error)
        else:
            # A daemon, so that a training that is stopped does not wait for it.
            self.upload = threading.Thread(target=self._push, args=(place, state.global_step), daemon=True)
            self.upload.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until what has begun is there, or has failed: the checkpoint is removed then."""
        if self.upload is not None:
            self.upload.join()

    def _push(self, place: Path, step: int) -> None:
        ask_again()
        try:
            name = _tried(lambda: self.api.create_repo(self.repository, private=self.private, exist_ok=True)).repo_id
            if self.revision is not None:
                _tried(lambda: self.api.create_branch(name, branch=self.revision, exist_ok=True))
            files = [CommitOperationAdd(f"{_IN_PROGRESS}/{path.name}", path) for path in sorted(place.iterdir())]
            message = f"Training in progress, step {step}"
            _tried(lambda: self.api.create_commit(name, files, commit_message=message, revision=self.revision))
        except _ERRORS as error:
            self._left_out(step, error)

    def _left_out(self, step: int, error: BaseException) -> None:
        say(f"the checkpoint of step {step} was not pushed: {reason(_cause(error))}. The training goes on.")


def _link(path: Path, target: Path) -> None:
    """The checkpoint is removed when the next ones are there; not every disk has links."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy(path, target)


def _files(folder: Path) -> list[str]:
    """Of the run's files those that go to the Hub, relative to it; nothing that is hidden but the scores."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    shown = (
        str(path) for path in paths if str(path) == EVALUATIONS or not any(part.startswith(".") for part in path.parts)
    )
    found: Iterable[str] = filter_repo_objects(shown, allow_patterns=list(_PUSHED), ignore_patterns=list(_KEPT_BACK))
    return list(found)


def _tried(call: Callable[[], _Answer], passing: Iterable[int] = _PASSING) -> _Answer:
    """What the call gives; it is tried again where the Hub or the way to it has trouble that may pass."""
    for pause in _PAUSES:
        try:
            return call()
        except _ERRORS as raised:
            error = _cause(raised)
            status = _status(error)
            may_pass = status in passing if status is not None else isinstance(error, HTTPError) and 408 in passing
            if not may_pass:
                raise
            seconds = _wanted_pause(error) or pause
            say(f"the Hub: {reason(error)}; another try in {seconds:.0f} s")
            time.sleep(seconds)
    return call()


def _wanted_pause(error: Any) -> float | None:
    """Seconds that the Hub wants its client to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit, wanted = parse_ratelimit_headers(headers), str(headers.get("Retry-After", ""))
    if limit is not None:
        return min(float(limit.reset_in_seconds), _LONGEST_PAUSE)
    return min(float(wanted), _LONGEST_PAUSE) if wanted.isdecimal() else None


def _cause(error: BaseException) -> BaseException:
    """The client says of a file's upload only that it failed, and what it failed by stands behind that."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


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
