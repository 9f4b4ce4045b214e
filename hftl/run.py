"""A finished run: predict, evaluate, push."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments

from hftl import backbones, batches, compute, data, merging
from hftl.arguments import argument_tokens, parse, stage_arguments
from hftl.errors import UsageError, did_you_mean
from hftl.finished import Finished, explained_damage, find_run
from hftl.folder import METRICS, RECIPE, say, scored_split
from hftl.joined import as_flags, wished
from hftl.metrics import normalised, written
from hftl.pretrained import LOAD_ERRORS
from hftl.probes.beside import FOLDER as PROBE
from hftl.probes.beside import Probe, load_probe
from hftl.problems import Gallery, Similarity
from hftl.tasks import TASKS, find_task
from hftl.tasks.classification import ClassificationTask

#: what only the person may say who uses the run
_NOT_FROM_A_RUN = {"trust_remote_code", "allow_pickle"}
#: rows whose two largest logits are nearer than this many times what half precision moved a logit in the first rows
#: are computed in float32: two may move towards one another, and other rows further than the first
_NEAR = 4
#: rows that are predicted before the first of them are given out: a few seconds of images on two cores
_PIECE = 256
#: … in each of several processes their share of that, so that few rows are shared too, but no fewer than this
_LEAST_PIECE = 32
#: … so many times the rows of short texts where one process predicts: of more the batches hold less padding
_TIMES = 4
#: characters that the first of those texts may have
_SHORT = 2**18
#: rows that tell how far half precision moves a logit
_MEASURED = 32


class Run(Finished):
    """A finished training: its folder, and what can be done with it."""

    def __init__(self, folder: Path, task: ClassificationTask, model: PreTrainedModel | None = None) -> None:
        """Keep the folder and the task; the model is loaded when it is needed."""
        super().__init__(folder, task.name, task.label_names)
        self.task = task
        self.task.is_training = False
        self._model = model
        self._folded: Any = None
        #: by precision: rows that were computed in float32 too, and the furthest that it moved a logit of them
        self._rounding: dict[str, tuple[int, float]] = {}
        #: texts that were longer than the model reads, of the inputs that were predicted last
        self.cut = 0
        #: of those inputs, how many had no image and no text, by these names
        self.missing: Counter[str] = Counter()

    def __repr__(self) -> str:
        """Folder, task and method."""
        return f"Run({str(self.folder)!r}, task={self.task.name!r}, method={self.task.arguments.method!r})"

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The fine-tuned model in eval mode, on the GPU where there is one."""
        model = self._model or self._loaded()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return backbones.to_channels_last(model.to(device or "cpu").eval())

    def _loaded(self) -> Any:
        try:
            return load_saved(self.task.auto_class, self.folder, self.task.arguments.trust_remote_code)
        except LOAD_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            if "trust_remote_code" in str(error):
                raise UsageError(
                    f"The model in {str(self.folder)!r} needs Python code that lies beside it: read that code, and "
                    "--trust_remote_code (of load_run: trust_remote_code=True) runs it."
                ) from error
            raise UsageError(
                f"The run in {str(self.folder)!r} is damaged, its model cannot be loaded: {reason}"
            ) from error

    @property
    def is_explainable(self) -> bool:
        """Whether the task says what answers rest on, the model gave them, and its weights are not packed."""
        return self.task.explains and self.probe is None and not backbones.is_quantised(self.model)

    @functools.cached_property
    def precision(self) -> str:
        """What predictions are computed in: as the run was, where this machine is made for it, else float32.

        It may be set to "fp32", "bf16" or "fp16". In half precision probabilities differ by some thousandths from those
        of float32, and labels do not: rows without a clear answer are computed again in float32.
        """
        # Not of a model by itself.
        known = (self.folder / METRICS).is_file() and not self.task.problem.is_exact
        trained = str(self.metrics["train"].get("precision")) if known else "fp32"
        return trained if compute.has_native(trained, self.model.device) else "fp32"

    def summary(self) -> str:
        """The result in a few lines, with what to do next."""
        lines = []
        for split in ("validation", "test"):
            if split in self.metrics:
                scores = self.metrics[split]
                shown = [*self.task.problem.headline, ("loss", "loss")]
                text = ", ".join(f"{words} {written(name, scores[name])}" for name, words in shown if name in scores)
                lines.append(f"{split + ':':<12}{text}")
        if self.probe is not None:
            split = self.scored_split
            flags = as_flags(wished(self.task.arguments))
            kind = (self.task.arguments.head or "logistic") + (f" ({flags})" if flags else "")
            scores = self.metrics[f"ordinary_head_{split}"]
            lines.append(
                f"{'head:':<12}these are answers of {kind}, which hftl alone gives; plain transformers has a "
                f"logistic head ({split} accuracy {scores['accuracy']:.4f})"
            )
        if "repeats" in self.metrics:
            lines.append(self._repeats_line())
        train = self.metrics["train"]
        lines.append(
            f"{'training:':<12}{train['seconds']:.0f} s, {train['samples_per_second']:.1f} rows/s, "
            f"{train['peak_memory_mb']:,.0f} MB, {train['trainable_parameters']:,} of {train['total_parameters']:,} "
            "parameters"
        )
        place = str(self.folder)
        own = f"hftl.load_run({place!r}, {type(self.task).__name__}).predict(…)"  # the command line does not know it
        advice = f"hftl predict {shlex.quote(place)} INPUT" if self.task.name in TASKS else own
        lines.append(f"{'saved in:':<12}{place} (try: {advice})")
        return "\n".join(lines)

    def _repeats_line(self) -> str:
        """Mean and interval over the seeds, and whose model this is."""
        repeats = self.metrics["repeats"]
        split = scored_split(repeats)
        shown = [(name, words) for name, words in self.task.problem.headline if name in repeats[split]]
        scores = [
            f"{words} {' ± '.join(written(name, repeats[split][name][key]) for key in ('mean', 'half_width_95'))}"
            for name, words in shown
        ]
        return (
            f"{'repeats:':<12}{split} {', '.join(scores)} (mean and 95 % interval of {len(repeats['seeds'])} seeds; "
            f"this is the model of seed {repeats['best_seed']}, the best on validation)"
        )

    def logits(self, rows: Any, batch_size: int | None = None) -> np.ndarray[Any, Any]:
        """Logits of shape (rows, classes) for rows as the task reads them, in their order."""
        return self._logits(rows, batch_size, skip_bad_files=False)[1]

    def _logits(
        self, rows: Any, batch_size: int | None, skip_bad_files: bool
    ) -> tuple[list[int], np.ndarray[Any, Any]]:
        """Numbers of the rows that could be read, in order, and their logits."""
        dataset: Any = self.task.test_data(self.task.dataset(rows, training=False))
        self.cut += getattr(dataset, "cut", 0)
        kept: list[int] = []
        logits: list[np.ndarray[Any, Any]] = []
        for group, inputs in self.prepared(dataset, rows, batch_size, skip_bad_files):
            answers = self._viewed(inputs, self.precision)
            if self.precision != "fp32":
                self._correct(answers, inputs)
            logits.append(self.task.by_row(answers.numpy(), dataset, group))
            kept += group
        if hasattr(dataset, "missing"):
            self.missing += dataset.missing(kept)
        order = np.argsort(kept, kind="stable")
        every = np.concatenate(logits)[order] if logits else np.zeros((0, len(self.label_names)), np.float32)
        return [kept[index] for index in order], every

    def _correct(self, answers: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Put float32's logits in the place of those in half precision that may give another label."""
        measured, moved = self._rounding.get(self.precision, (0, 0.0))
        first = torch.arange(len(answers)) < _MEASURED - measured
        if first.any():
            exact = self._exactly(first, inputs)
            moved = max(moved, float((answers[first] - exact).abs().nan_to_num(nan=torch.inf).max()))
            self._rounding[self.precision] = measured + len(exact), moved
            answers[first] = exact
        near = ~first & self.task.problem.unsure(answers, _NEAR * moved)
        if near.any():
            answers[near] = self._exactly(near, inputs)

    def _exactly(self, rows: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of some rows of a batch in float32."""
        return self._viewed({name: value[rows.to(value.device)] for name, value in inputs.items()}, "fp32")

    @torch.no_grad()
    def _viewed(self, inputs: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
        """Logits, the mean of those of the views that a row is looked at in."""
        views = self.task.test_views(inputs)
        network = self._network(views[0])
        with compute.autocast(precision, self.model.device):
            answers = [self._answers(network, view).float().cpu() for view in views]
        return torch.stack(answers).mean(dim=0)

    def prepared(
        self, dataset: Any, rows: Any, batch_size: int | None = None, skip_bad_files: bool = False
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Numbers of rows and what the model's forward takes of them, on its device; the next are read meanwhile.

        Args:
            dataset: what the task makes of the rows.
            rows: themselves.
            batch_size: rows at once; None chooses what is fast.
            skip_bad_files: leave out what cannot be read, named on stderr.

        Raises:
            UsageError: a row cannot be read.
        """
        device = next(self.model.parameters()).device
        lengths = getattr(dataset, "lengths", None)
        half = self.precision != "fp32"
        chosen = batches.groups(lengths, len(dataset), batch_size, device.type == "cpu", half)
        threads = batches.decoding_threads(rows) if lengths is None else 0  # texts are tokenised already
        for group, examples in batches.prepared(dataset, chosen, threads, skip_bad_files):
            if examples:
                yield group, backbones.inputs_of(self.task.collate(examples), device)

    @functools.cached_property
    def probe(self) -> Probe | None:
        """A head of `--head knn`, `mlp`, `tip` or `--feature_layers`, answering for the model's own; else None."""
        return load_probe(self.folder / PROBE)

    def _answers(self, network: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits of shape (rows, classes)."""
        if self.probe is None:
            return network(**inputs).logits
        name = backbones.structure(self.model).head[0]
        layer = network.get_submodule(name)
        features = self.probe.joined.features(network, name, inputs)
        return self.probe.logits(features, layer(features[:, : layer.in_features]))

    def _network(self, inputs: dict[str, torch.Tensor]) -> Any:
        """What predicts: the model, or once and for all a copy of it without the work of its BatchNorm layers."""
        if self._folded is None:
            convolutional = backbones.is_convolutional(self.model)
            two = {name: value[:2] for name, value in inputs.items()}
            self._folded = compute.folded(self.model, two) if convolutional else self.model
        return self._folded

    def predict(
        self, inputs: Any, batch_size: int | None = None, skip_bad_files: bool = False, **columns: str
    ) -> list[Any]:
        """Labels and probabilities of new inputs, in their order.

        Args:
            inputs: images as paths, PIL images or arrays, one or a list; texts as strings or pairs of them, one or a
                list; or a folder or table of either (for texts as a `pathlib.Path`).
            batch_size: inputs run through the model at once; None chooses what is fast.
            skip_bad_files: name images that cannot be read on stderr and leave them out, instead of stopping.
            columns: `text="review"`, … the columns of a table, where they are not those of the training data.

        Returns:
            A `Prediction` an input; of several labels a row `LabelsPrediction`, of a number `ValuePrediction`, of words
            `TagsPrediction`, of similarity `EmbeddingPrediction`, with a gallery `NeighboursPrediction`.

        Raises:
            UsageError: an input cannot be read.
        """
        pieces = self.predict_batches(inputs, batch_size, skip_bad_files, (0, 1), **columns)
        return [prediction for piece in pieces for prediction in piece]

    def use_gallery(
        self,
        inputs: Any,
        neighbours: int = 5,
        batch_size: int | None = None,
        skip_bad_files: bool = False,
        **columns: str,
    ) -> None:
        """From now on `predict` answers with the nearest of these inputs; of a run of image similarity.

        Args:
            inputs: as `predict`.
            neighbours: how many an input gets, or all where there are fewer.
            batch_size: as `predict`.
            skip_bad_files: as `predict`.
            columns: as `predict`.

        Raises:
            UsageError: the run is another one, or an input cannot be read; the gallery before stays.
        """
        problem = self.task.problem
        if not isinstance(problem, Similarity):
            raise UsageError(f"A gallery is searched by runs of image-similarity, not of {self.task.name}.")
        if not isinstance(neighbours, int) or neighbours < 1:
            raise UsageError(f"neighbours must be a whole number above 0, not {neighbours!r}.")
        rows = list(self.task.iter_inputs(inputs, columns))
        kept, logits = self._logits(rows, batch_size, skip_bad_files)
        if not kept:
            raise UsageError("The gallery is empty: there is nothing to find.")
        ids = [_name_of(rows[row], self.task.modality.name) for row in kept]
        problem.gallery = Gallery(ids, normalised(logits), min(neighbours, len(ids)))

    def predict_batches(
        self,
        inputs: Any,
        batch_size: int | None = None,
        skip_bad_files: bool = False,
        share: tuple[int, int] = (0, 1),
        **columns: str,
    ) -> Iterator[list[Any]]:
        """As `predict`, some hundred rows at a time: neither inputs nor predictions pile up in memory.

        The images or text files of a folder are found while others are predicted; a table is read and checked first.

        Args:
            inputs: as `predict`.
            batch_size: as `predict`.
            skip_bad_files: as `predict`.
            share: (i, n): of the pieces, only every n-th from the i-th on. n processes predict everything once.
            columns: as `predict`.

        Raises:
            UsageError: an input cannot be read.
        """
        self.cut, self.missing = 0, Counter()
        rows = iter(self.task.iter_inputs(inputs, columns))
        number, processes = share
        is_text = self.task.modality.is_text
        skip_bad_files = skip_bad_files and not is_text
        for turn in itertools.count():
            piece = list(itertools.islice(rows, max(_LEAST_PIECE, batch_size or 0, _PIECE // processes)))
            if is_text and processes == 1 and sum(len(str(value)) for row in piece for value in row.values()) <= _SHORT:
                piece += itertools.islice(rows, (_TIMES - 1) * _PIECE)
            if not piece:
                return
            if turn % processes == number:
                yield self._predictions(piece, batch_size, skip_bad_files)

    def _predictions(self, rows: list[Any], batch_size: int | None, skip_bad_files: bool) -> list[Any]:
        said, self.task.says_cut = self.task.says_cut, False  # once for all pieces, by whoever asked for them
        try:
            kept, logits = self._logits(rows, batch_size, skip_bad_files)
        finally:
            self.task.says_cut = said
        return self.task.problem.answers([rows[index] for index in kept], logits, self.label_names)

    def evaluate(
        self,
        dataset: str,
        split: str | None = None,
        batch_size: int | None = None,
        dataset_config_name: str | None = None,
        skip_bad_files: bool = False,
        **columns: str,
    ) -> dict[str, float]:
        """Scores on labelled data.

        Args:
            dataset: as `--dataset`.
            split: its name; test, else validation, else the only one.
            batch_size: as `predict`.
            dataset_config_name: as the flag of that name.
            skip_bad_files: as the flag of that name.
            columns: `label="class"`, `text="review"`, …, where they are not those of the training data.

        Raises:
            UsageError: the data cannot be read, or has labels that the model does not know.
        """
        roles = ("label", *data.input_roles(self.task.modality))
        for name in columns.keys() - set(roles):
            raise UsageError(
                f"{name!r} is no role of a column; there are {', '.join(roles)}.{did_you_mean(name, roles)}"
            )
        settings = stage_arguments(
            self.task.arguments,
            dataset_name=dataset,
            dataset_config_name=dataset_config_name,
            max_eval_samples=None,
            skip_bad_files=skip_bad_files,
            **{name: None for role, name in data.JOINED.items() if role in columns and role in roles},
            **{f"{role}_column": columns.get(role) for role in roles},
        )
        known = {role: getattr(self.task.arguments, f"{role}_column", None) for role in roles}
        problem = self.task.problem
        rows, _ = data.load_labelled(settings, split, self.label_names, self.task.modality, known, problem)
        return self.task.score(self.logits(rows, batch_size), data.labels_of(rows))

    def push(self, repository: str, **options: Any) -> str:
        """Push to the Hub in one commit, and give the address; see `hftl.push.push`."""
        from hftl.push import push

        return push(self, repository, **options)


def _name_of(row: dict[str, Any], column: str) -> str:
    """What a row is called: one of a table by its file, which says more than a number."""
    value = row[column]
    return value if row["id"].isdecimal() and isinstance(value, str) else row["id"]


def load_saved(auto_class: Any, folder: Path, trust_remote_code: bool = False) -> Any:
    """The model in a run folder: an ordinary one, or with an adapter that is not merged a `PeftModel`."""
    if (folder / merging.BASE).is_dir():
        return merging.load_unmerged(auto_class, folder, trust_remote_code)
    return auto_class.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
    )


def load_run(
    folder: str | Path, task_class: type[ClassificationTask] | None = None, trust_remote_code: bool = False
) -> Run:
    """A finished run from its folder.

    Args:
        folder: the `--output_dir` of the training.
        task_class: the task of a recipe of one's own; by default the built-in one named in the run's recipe.
        trust_remote_code: let Python code run that lies in the folder, as some models bring it. What the run's own
            recipe says of it does not count: the folder may come from elsewhere.

    Raises:
        UsageError: the folder holds no finished run, or one of a newer hftl.
    """
    found = find_run(folder)
    path, recipe = found.folder, found.recipe
    task_class = task_class or find_task(found.task_name)
    # How it was trained does not matter here, and may not be possible here (fp16, FSDP): only hftl's own settings do.
    # But the loss that is told, and the name of the model on the Hub.
    kept = {"seed", "label_smoothing_factor", "hub_model_id"}
    trainers = {item.name for item in dataclasses.fields(TrainingArguments)} - kept | {"precision"}
    own = {item.name for item in dataclasses.fields(task_class.arguments_class)} - trainers - _NOT_FROM_A_RUN
    tokens = [token for key, value in recipe.items() if key in own for token in argument_tokens(key, value)]
    try:
        arguments = parse(task_class.arguments_class, [*tokens, f"--output_dir={path}"])
    except UsageError as error:
        raise UsageError(f"The run in {str(path)!r} is damaged, its {RECIPE} cannot be used: {error}") from error
    arguments.trust_remote_code = trust_remote_code
    if trust_remote_code:
        say(f"--trust_remote_code: Python code in {str(path)!r} may run on this machine")
    task = task_class(arguments)
    task.label_names = found.label_names
    with explained_damage(path):
        task.problem.restore(found.metrics, found.label_names)
    try:
        task.load_processor(path)
    except (AttributeError, *LOAD_ERRORS) as error:  # its files hold other things than they should
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"The run in {str(path)!r} is damaged, its processor cannot be loaded: {reason}") from error
    run = Run(path, task)
    run.recipe = recipe
    return run
