"""A layer of a saved model compressed into a folder that deploys, as an MLflow run."""

import logging
from collections import OrderedDict
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

from torch import nn

from distil_rank.commands.train_teacher import open_data
from distil_rank.compression.compress import CompressionReport
from distil_rank.compression.compress import compress as compress_model
from distil_rank.compression.own_layer import load_linear
from distil_rank.compression.saved import save
from distil_rank.errors import InputError
from distil_rank.evaluation.comparison import HeldOut, compare
from distil_rank.lowrank.low_rank import LowRankLinear
from distil_rank.options.compression import CompressOptions
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage
from distil_rank.tracking.training import log_student

log = logging.getLogger(__name__)


def compress(options: CompressOptions) -> CompressionReport:
    """Compress one layer of a saved model into a folder that deploys."""
    o = options
    dense = load_linear(o.model if o.layer is None else f"{o.model}:{o.layer}").requires_grad_(False)
    data = open_data(o.data)
    if data.dim != dense.in_features:
        raise InputError(
            f"Expected inputs of width {dense.in_features} for this layer but the data have {data.dim}; embed with"
            " the model that the layer belongs to."
        )
    about = data.description()
    name = " ".join(filter(None, [Path(o.model).stem, o.layer]))
    title = f"{name} r{o.rank} {Path(about.source).stem}"
    params = {"teacher": name, "backbone": about.backbone, "source": about.source, "rank_requested": o.rank}
    with start_run("distil", title, params=params, tags=lineage(asdict(about))) as run:
        fit = (x.to(dense.weight) for x in chain(data.stream("train"), data.stream("val")))
        test = data.rows("test").to(dense.weight)
        model = nn.Sequential(OrderedDict(layer=dense))
        report = compress_model(model, {"layer": o.rank}, fit, held_out=test)
        row, student = replace(report.layers[0], name=o.layer or Path(o.model).stem), model.get_submodule("layer")
        report = replace(report, layers=[row], outputs=None)  # there is no model behind the layer
        if not isinstance(student, LowRankLinear) or student.input_mean is None:
            raise InputError(f"Expected a rank that saves something but {row.note}; ask for a lower one.")
        assert row.predicted_r2 is not None and row.dense_us is not None and row.student_us is not None

        (measured,) = compare(dense, {"closed_form": [student]}, dense(student.input_mean), HeldOut.of(data))
        r2 = measured.metrics["r2"]
        metrics = {"held_out_r2": asdict(r2), "layers": [asdict(row)]}
        folder = save(student, o.output, metrics=metrics, data=asdict(about))
        run.log_params({"rank": row.rank})
        figures = {"r2": r2.value, "one_minus_r2": 1 - r2.value, "predicted_r2": row.predicted_r2}
        figures["parameter_ratio"] = row.dense_parameters / row.parameters
        run.log_metrics({**figures, "speed_up": row.dense_us / row.student_us})
        run.keep(o, sorted(folder.iterdir()), str(report))
        log_student(run, student, data.rows("test").numpy()[:4], metrics={"r2": r2.value})
    print(report)
    log.info("Saved: %s (distil_rank.load reads it; `export` turns it into ONNX and others).", folder)
    return report
