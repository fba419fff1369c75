"""The code of the MLflow model: MLflow keeps this file with the model and runs it to load it; nothing is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from distil_rank.errors import InputError
from distil_rank.serving.predictor import Predictor, Recipe


class ProteinModel(PythonModel):
    """Sequences in; vectors or codes out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load backbone and code map once, when the server starts."""
        self.predictor = Predictor.load(Recipe(**context.model_config), context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """One row for each line of the column `sequence`; a refused sequence is answered with status 400."""
        try:
            return self.predictor(list(model_input["sequence"]))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(ProteinModel())
