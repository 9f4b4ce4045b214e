"""Heads that the model's own output layer cannot hold: kept beside it as plain arrays, and used by hftl alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hftl.folder import read_json, write_json
from hftl.joined import Joined
from hftl.probes.linear import fit_temperature
from hftl.probes.logistic import LinearHead, standardisation

#: of a run, where they are
FOLDER = "probe"
_ARRAYS, _SETTINGS = "probe.safetensors", "probe.json"
#: neighbours that are tried; 20 is the best of Caron et al. 2021 (DINO), few rows want fewer
_NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100)
#: how fast the weight of a neighbour falls with its cosine (Wu et al. 2018, DINO)
_SHARPNESS = 1 / 0.07
#: width of the hidden layer: scikit-learn's default is 100, for features of fewer numbers than the 384 to 1,280 here
_WIDTH = 256
#: weights of its penalty, in scikit-learn's terms, around the default of 1e-4
_PENALTIES = (1e-4, 1e-2, 1.0, 100.0)
#: above so many rows a pass over all of them for each step of L-BFGS is slower than Adam's small batches
_ROWS_FOR_LBFGS = 10_000
#: Tip-Adapter's alpha and beta; 0 is the linear head alone. The paper starts from 1 and 5.5, with sums over 16 shots a
#: class, which are means here, so that the same alpha suits any number of them. Its cosines are those of CLIP, near 1;
#: texts of a sentence encoder have 0.2 or so, of which little is left, hence the large ones
_BLENDS, _FOCUSES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0), (1.0, 3.0, 5.5, 10.0, 30.0)
#: numbers of a matrix of rows against all kept rows held at once
_PIECE = 2**24


@dataclass(frozen=True)
class Probe:
    """A fitted head.

    Attributes:
        kind: knn, mlp, tip, or linear, which is what is fitted on joined features in place of an output layer.
        arrays: what it knows; see the function of its kind.
        settings: what validation chose.
        joined: which outputs of blocks its features hold, beside what the output layer reads.
    """

    kind: str
    arrays: dict[str, torch.Tensor]
    settings: dict[str, float]
    joined: Joined = Joined()

    def logits(self, features: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
        """Logits of shape (rows, classes).

        Args:
            features: what `joined.features` gives, shape (rows, features).
            linear: what the model's output layer makes of those that it reads, shape (rows, classes).
        """
        rows = len(self.arrays["keys"]) if "keys" in self.arrays else 1
        piece = max(1, _PIECE // rows)
        arrays = {name: value.to(features.device) for name, value in self.arrays.items()}
        parts = zip(features.float().split(piece), linear.float().split(piece), strict=True)
        return torch.cat([_LOGITS[self.kind](arrays, self.settings, *part) for part in parts])

    def save(self, folder: Path) -> None:
        """Write arrays and settings into a folder, which is made."""
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in self.arrays.items()}, folder / _ARRAYS)
        joined = {} if self.joined == Joined() else {"joined": dataclasses.asdict(self.joined)}
        write_json(folder / _SETTINGS, {"kind": self.kind, **self.settings, **joined})


def load_probe(folder: Path) -> Probe | None:
    """The head in a folder, or None where there is none."""
    if not (folder / _SETTINGS).is_file():
        return None
    settings = read_json(folder / _SETTINGS)
    joined = settings.pop("joined", {})
    joined |= {name: tuple(joined[name]) for name in ("inputs", "outputs") if name in joined}
    return Probe(settings.pop("kind"), load_file(folder / _ARRAYS), settings, Joined(**joined))


def linear_probe(head: LinearHead, joined: Joined) -> Probe:
    """A linear head with a bias, on features that no output layer reads."""
    assert head.bias is not None
    settings = {"penalty": head.strength} | ({} if head.temperature is None else {"temperature": head.temperature})
    return Probe("linear", {"weight": head.weight.float(), "bias": head.bias.float()}, settings, joined)


def fit_probe(
    kind: str,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    linear: torch.Tensor,
    score: Callable[[torch.Tensor, torch.Tensor], float],
    seed: int,
) -> Probe:
    """The best of its kind on validation by `score`, of equal ones that with the lowest log loss.

    Args:
        kind: knn, mlp or tip.
        train: features of shape (rows, features) and class ids of shape (rows,).
        validation: the same of the rows that choose the settings.
        linear: logits of the model's own output layer for the rows of validation.
        score: of logits of shape (rows, classes) and class ids; more is better.
        seed: of the weights that the hidden layer starts from.
    """
    best, best_key = None, (-math.inf, -math.inf)
    for probe in BESIDE[kind](train, validation, linear.shape[1], seed):
        logits = probe.logits(validation[0], linear)
        found = score(logits, validation[1])
        key = (-math.inf if math.isnan(found) else found, -float(nn.functional.cross_entropy(logits, validation[1])))
        if best is None or key > best_key:
            best, best_key = probe, key
    assert best is not None
    return best


Rows = tuple[torch.Tensor, torch.Tensor]
Arrays = dict[str, torch.Tensor]
Settings = dict[str, float]


def _cache(train: Rows, classes: int) -> Arrays:
    """The training rows: features of length 1, shape (rows, features), and one-hot labels, shape (rows, classes)."""
    keys = nn.functional.normalize(train[0].float(), dim=1)
    return {"keys": keys, "values": nn.functional.one_hot(train[1], classes).float()}


def _knn(train: Rows, validation: Rows, classes: int, seed: int) -> Iterator[Probe]:
    arrays = _cache(train, classes)
    for count in sorted({min(count, len(train[1])) for count in _NEIGHBOURS}):
        yield Probe("knn", arrays, {"neighbours": count})


def _knn_logits(arrays: Arrays, settings: Settings, features: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """Votes of the nearest by cosine, each weighed by its own (Wu et al. 2018).

    The nearest votes with a weight of 1, and one more vote is shared by all classes, so that none is impossible.
    """
    cosines, found = (nn.functional.normalize(features, dim=1) @ arrays["keys"].T).topk(int(settings["neighbours"]))
    weights = ((cosines - cosines[:, :1]) * _SHARPNESS).exp()
    votes = (weights.unsqueeze(2) * arrays["values"][found]).sum(dim=1) + 1 / linear.shape[1]
    return (votes / votes.sum(dim=1, keepdim=True)).log()


def _tip(train: Rows, validation: Rows, classes: int, seed: int) -> Iterator[Probe]:
    arrays = _cache(train, classes)
    arrays["values"] = arrays["values"] / arrays["values"].sum(dim=0).clamp(min=1)
    for blend, focus in itertools.product(_BLENDS, _FOCUSES):
        yield Probe("tip", arrays, {"alpha": blend, "beta": focus})


def _tip_logits(arrays: Arrays, settings: Settings, features: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The linear head's logits + alpha x the mean over each class of exp(-beta (1 - cosine)) (Zhang et al. 2022)."""
    cosines = nn.functional.normalize(features, dim=1) @ arrays["keys"].T
    return linear + settings["alpha"] * (settings["beta"] * (cosines - 1)).exp() @ arrays["values"]


def _mlp(train: Rows, validation: Rows, classes: int, seed: int) -> Iterator[Probe]:
    """scikit-learn's `MLPClassifier`: one hidden layer."""
    from sklearn.neural_network import MLPClassifier

    mean, scale = standardisation(train[0].double(), intercept=True)
    rows = ((train[0].double() - mean) * scale).numpy()
    solver = "lbfgs" if len(rows) <= _ROWS_FOR_LBFGS else "adam"
    for penalty in _PENALTIES:
        fitted = MLPClassifier((_WIDTH,), alpha=penalty, solver=solver, random_state=seed).fit(rows, train[1].numpy())
        (first, second), (bias, last) = (
            [torch.from_numpy(value).double() for value in values] for values in (fitted.coefs_, fitted.intercepts_)
        )
        if second.shape[1] == 1:  # of two classes scikit-learn gives the log odds of the second
            second, last = torch.cat([-second, second], dim=1) / 2, torch.cat([-last, last]) / 2
        first = first * scale.unsqueeze(1)
        whole = {"first": first, "first_bias": bias - mean @ first, "second": second, "second_bias": last}
        scores = _mlp_logits(whole, {}, validation[0].double(), validation[0])
        temperature = fit_temperature(scores, validation[1])  # with 384 features it may know every row by heart
        arrays = {name: value.float() for name, value in whole.items()}
        arrays |= {name: (whole[name] / temperature).float() for name in ("second", "second_bias")}
        yield Probe("mlp", arrays, {"penalty": penalty, "temperature": temperature})


def _mlp_logits(arrays: Arrays, settings: Settings, features: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """One hidden layer; standardisation and temperature are folded in."""
    hidden = (features @ arrays["first"] + arrays["first_bias"]).relu()
    return hidden @ arrays["second"] + arrays["second_bias"]


def _linear_logits(arrays: Arrays, settings: Settings, features: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """Standardisation and temperature are folded in."""
    return features @ arrays["weight"].T + arrays["bias"]


#: kind → the candidates among which validation chooses
BESIDE: dict[str, Callable[[Rows, Rows, int, int], Iterator[Probe]]] = {"knn": _knn, "mlp": _mlp, "tip": _tip}
_LOGITS: dict[str, Callable[..., torch.Tensor]] = {
    "knn": _knn_logits,
    "mlp": _mlp_logits,
    "tip": _tip_logits,
    "linear": _linear_logits,
}
