"""The predictor: a student with the head behind it, and how far its answers can be trusted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from distil_rank.errors import InputError, check_share
from distil_rank.options.evaluation import Kind
from distil_rank.origin import check_origin

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}


@dataclass(frozen=True)
class Predictions:
    """What a predictor says of N proteins.

    Attributes:
        predicted: the class of each, its labels as `A|B`, or its value.
        probabilities: of each class or label, `(N, K)`; None for values.
        sets: for each protein the classes that it may have at the confidence asked for; none where no class is
            likely enough. None for values.
        low, high: ends of the interval of each value, `(N,)`; None for classes.
        distance: how far each vector is from the training vectors, as the share of validation proteins that are
            nearer, `(N,)`: at 1 none of them was as unusual.
    """

    predicted: list[Any]
    probabilities: np.ndarray | None
    sets: list[tuple[str, ...]] | None
    low: np.ndarray | None
    high: np.ndarray | None
    distance: np.ndarray


class Predictor(nn.Module):
    """Vectors `(N, n)` to classes, labels or values: a student, an activation, a linear layer, and calibration.

    Probabilities are of logits over a temperature (Guo et al. 2017). A set holds every class whose probability reaches
    the level that the true classes of enough validation proteins reached; an interval is as wide as enough validation
    residuals (split conformal prediction: Vovk, Gammerman and Shafer 2005; Sadinle, Lei and Wasserman 2019). Proteins
    of a group are alike, so that groups are what new proteins are exchangeable with: each of G validation groups weighs
    1 / (G + 1), and the largest possible score the rest (Dunn, Wasserman and Ramdas 2023).

    Args:
        layer: the student, `LowRankLinear`, or a dense layer.
        kind: classification, multilabel or regression.
        classes: names of the classes or labels.
        activation: behind the layer, before a linear layer of its own; without one the layer's outputs are the result.
        calibration: number of conformal scores.

    Attributes:
        scores, weights: the conformal scores, ascending, and their weights.
        distances: percentiles of the validation vectors' distances, from 0 to 100.
        provenance: of the vectors and the training, plain JSON; saved with the predictor.
    """

    temperature: Tensor
    scores: Tensor
    weights: Tensor
    mean: Tensor
    spread: Tensor
    distances: Tensor

    def __init__(
        self,
        layer: nn.Module,
        kind: Kind,
        classes: Sequence[str] = (),
        activation: str | None = None,
        calibration: int = 0,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("classification", "multilabel", "regression") or (len(classes) < 1) != (kind == "regression"):
            raise InputError(f"Expected classes to predict, or values, but got {len(classes)} for a {kind}.")
        self.layer, self.kind, self.classes, self.activation = layer, kind, tuple(map(str, classes)), activation
        self.in_features = n = int(layer.in_features)  # type: ignore[arg-type]
        m = int(layer.out_features)  # type: ignore[arg-type]
        self.head = nn.Sequential()
        if activation is not None:
            self.head = nn.Sequential(ACTIVATIONS[activation](), nn.Linear(m, max(len(classes), 1), device=device))
        elif m != max(len(classes), 1):
            raise InputError(f"Expected a layer of {max(len(classes), 1)} outputs but got {m}; give its activation.")
        self.register_buffer("temperature", torch.ones((), device=device))
        self.register_buffer("scores", torch.zeros(calibration, device=device))
        self.register_buffer("weights", torch.zeros(calibration, device=device))
        self.register_buffer("mean", torch.zeros(n, device=device))
        self.register_buffer("spread", torch.ones(n, device=device))
        self.register_buffer("distances", torch.zeros(101, device=device))
        self.provenance: dict[str, Any] = {}
        self.eval().requires_grad_(False)

    def description(self) -> dict[str, Any]:
        """What builds an empty one, for a manifest."""
        shape = [self.layer.in_features, self.layer.out_features]
        facts = {"kind": self.kind, "classes": list(self.classes), "activation": self.activation, "shape": shape}
        return {**facts, "calibration": len(self.scores), "provenance": self.provenance}

    @classmethod
    def empty(cls, description: Mapping[str, Any]) -> Self:
        """A predictor of the right shape without numbers, whose layer is dense."""
        options = {key: description[key] for key in ("kind", "classes", "activation", "calibration")}
        inputs, outputs = map(int, description["shape"])
        layer = nn.Linear(inputs, outputs, device="meta")
        predictor = cls(layer, device="meta", **options)
        predictor.provenance = dict(description["provenance"])
        return predictor

    @classmethod
    def linear(cls, weight: np.ndarray, offset: np.ndarray, kind: Kind, classes: Sequence[str]) -> Self:
        """Of one layer alone, `x W + b` with `W (n, K)`."""
        predictor = cls(nn.Linear(*weight.shape), kind, classes)
        predictor.layer.load_state_dict({"weight": torch.from_numpy(weight.T), "bias": torch.from_numpy(offset)})
        return predictor

    def check_origin(self, facts: Mapping[str, Any], what: str) -> None:
        """Raises `InputError` unless made for vectors like those that `facts` tell of; `what` is whose they are."""
        check_origin({**self.provenance, "dim": self.in_features}, facts, what, "this predictor learned from")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes or labels, or values: `(N, n)` → `(N, K)`."""
        return self.head(self.layer(x)) / self.temperature

    def read_out(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, which exclude one another, or of the labels, which do not; values as are."""
        if self.kind == "regression":
            return logits
        return logits.softmax(-1) if self.kind == "classification" else logits.sigmoid()

    def distance(self, x: Tensor) -> Tensor:
        """Of each vector from the mean of the training vectors, in their spread per dimension, `(N,)`."""
        return (((x - self.mean) / self.spread) ** 2).mean(-1).sqrt()

    def threshold(self, confidence: float) -> float:
        """The conformal score that stays inside at this confidence.

        It is interpolated between scores, so that the confidence is met on average however few the groups are; the
        score of a class ends at 1, that of a value nowhere.

        >>> predictor = Predictor(nn.Linear(2, 1), "regression", calibration=9)
        >>> predictor.scores, predictor.weights = torch.arange(1.0, 10.0), torch.full((9,), 0.1)
        >>> round(predictor.threshold(0.85), 3), predictor.threshold(0.95)
        (8.5, inf)
        """
        reached = self.weights.double().cumsum(0).tolist()
        if self.kind == "regression" and confidence > reached[-1] + 1e-6:
            return math.inf
        return float(np.interp(confidence, [*reached, 1], [*self.scores.tolist(), max(1, self.scores[-1])]))

    @torch.no_grad()
    def predict(self, vectors: np.ndarray | Tensor, confidence: float = 0.9) -> Predictions:
        """Predictions for vectors `(N, n)`, with sets or intervals at this confidence.

        Raises:
            InputError: another width, numbers that are not finite, or a confidence out of (0, 1).
        """
        x = torch.as_tensor(np.array(vectors) if isinstance(vectors, np.ndarray) else vectors).float()
        if x.ndim != 2 or x.shape[1] != self.in_features or not len(x):
            raise InputError(f"Expected vectors (N, {self.in_features}) to predict from but got {tuple(x.shape)}.")
        if not x.isfinite().all():
            raise InputError("Expected finite vectors to predict from but got NaN or infinity.")
        check_share("a confidence", confidence)
        p, limit = self.read_out(self(x)), self.threshold(confidence)
        distance = (torch.searchsorted(self.distances, self.distance(x)) / len(self.distances)).numpy()
        if self.kind == "regression":
            values = p[:, 0].double().numpy()
            return Predictions(values.tolist(), None, None, values - limit, values + limit, distance)
        within = (1 - p <= limit).tolist()
        if self.kind == "classification":
            predicted = [self.classes[k] for k in p.argmax(-1).tolist()]
        else:
            predicted = ["|".join(self._names(row)) for row in (p > 0.5).tolist()]
        return Predictions(predicted, p.numpy(), list(map(self._names, within)), None, None, distance)

    def _names(self, row: list[bool]) -> tuple[str, ...]:
        return tuple(name for name, yes in zip(self.classes, row, strict=True) if yes)
