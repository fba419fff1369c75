"""New proteins through a predictor: embedded as far as its layer, predicted, and how far they are from training."""

import csv
import io
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from distil_rank.artefact import write_atomically
from distil_rank.commands.train_teacher import TRAINING
from distil_rank.compression.saved import load, read_manifest
from distil_rank.data.files import Embeddings, layer_names
from distil_rank.data.mmseqs import best_hits, mmseqs_binary
from distil_rank.embedding.run import embed, options_like
from distil_rank.embedding.sequences import read_proteins
from distil_rank.errors import InputError
from distil_rank.evaluation.labelled import load_vectors
from distil_rank.lowrank.predictor import Predictor
from distil_rank.options.prediction import PredictOptions
from distil_rank.report.writer import Table, show_notes
from distil_rank.tracking.run import start_run
from distil_rank.tracking.run_store import lineage

log = logging.getLogger(__name__)

SHOWN = 10  # lines on the terminal


def predict(options: PredictOptions) -> Path:
    """Predict the labels of new proteins into a table; returns its path."""
    o = options
    predictor, manifest = load_predictor(o.model), read_manifest(o.model)
    if o.fasta is not None:
        proteins = embed_new(predictor, o.fasta)
    else:
        proteins = load_vectors(_at_layer(str(o.data), predictor.provenance.get("layer")))
        facts = {"dim": proteins.x.shape[1], **proteins.provenance}
        if facts.get("weights_sha256") is None:
            show_notes([f"NOTE: {o.data} does not say which model its vectors are of: only their width was checked."])
            facts = {**predictor.provenance, "dim": facts["dim"]}
        predictor.check_origin(facts, str(o.data))
    params = {"model": o.model, "fasta": o.fasta, "data": o.data, "confidence": o.confidence}
    tags = {**lineage(predictor.provenance), "student_run": str(manifest["data"].get("run"))}
    name = f"{Path(o.model).name} {len(proteins.ids):,}"
    with start_run("predict", name, params=params, tags=tags) as run:
        records = predictions(predictor, proteins, Path(o.model), o.confidence)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        Path(o.output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(o.output, text.getvalue().encode())
        run.log_metrics({"proteins": len(records)})
        run.keep(o, [Path(o.output)], f"Predictions of {len(records):,} proteins")
    columns = [name for name in records[0] if not name.startswith("p(")]
    rows = [[str(record[name])[:40] for name in columns] for record in records[:SHOWN]]
    Table(f"The first {len(rows)} of {len(records):,} predictions", columns, rows, columns[:2:-1]).show()
    if mmseqs_binary() is None:
        show_notes(["NOTE: MMseqs2 is not installed: distance is that of the vector, not of the sequence."])
    log.info("Predictions: %s", o.output)
    return Path(o.output)


def load_predictor(folder: str) -> Predictor:
    """The predictor in a folder; `InputError` where it holds something else."""
    predictor = load(folder) if "predictor" in read_manifest(folder) else None
    if not isinstance(predictor, Predictor):
        raise InputError(f"Expected a predictor in {folder} but it holds a layer; distil a teacher from labels.")
    return predictor


def embed_new(predictor: Predictor, fasta: str | Path) -> Embeddings:
    """Vectors of new proteins, as those that the predictor learned from were made, no further than its layer."""
    about = predictor.provenance
    if about.get("backbone") is None:
        raise InputError(
            "Expected a predictor whose backbone is known for --fasta but it was trained on vectors of an unknown one; "
            "give vectors of the same kind with --data."
        )
    proteins, cleaning = read_proteins(fasta)
    foreign, records = cleaning.counts["nucleotides"], cleaning.counts["records"]
    if not proteins or foreign * 2 > records:
        raise InputError(
            f"Expected new proteins in {fasta} but {foreign:,} of {records:,} records look like DNA or RNA; translate."
        )
    with TemporaryDirectory(prefix="distil-rank-") as folder:
        store = Path(folder) / "new"
        embed(fasta, store, about["backbone"], **options_like(about, about.get("source")))
        vectors = load_vectors(_at_layer(str(store), about.get("layer")))
        predictor.check_origin(vectors.provenance, str(fasta))
        return Embeddings(vectors.ids, np.array(vectors.x), vectors.sequences, provenance=vectors.provenance)


def _at_layer(source: str, layer: Any) -> str:
    """A source of several layers at the predictor's; anything else as it is."""
    return f"{source}:{layer}" if layer is not None and layer_names(source) else source


def predictions(predictor: Predictor, proteins: Embeddings, folder: Path, confidence: float) -> list[dict[str, Any]]:
    """A record for each protein: id, prediction, probabilities or interval, set, distance from training."""
    result = predictor.predict(proteins.x, confidence)
    training, identity = folder / TRAINING, None
    if proteins.sequences is not None and training.is_file() and mmseqs_binary() is not None:
        known, _ = read_proteins(training)
        hit, share = best_hits(proteins.sequences, [one.sequence for one in known])
        identity = [f"{value:.3f}" if index >= 0 else "none" for index, value in zip(hit, share, strict=True)]
    records = []
    for row, (name, predicted) in enumerate(zip(proteins.ids, result.predicted, strict=True)):
        record: dict[str, Any] = {"id": name, "prediction": predicted}
        if result.low is not None and result.high is not None:
            record["prediction"] = f"{predicted:.6g}"
            record |= {"low": f"{result.low[row]:.6g}", "high": f"{result.high[row]:.6g}"}
        if result.probabilities is not None and result.sets is not None:
            p = result.probabilities[row]
            record["probability"] = f"{p.max():.4f}"
            record["set"] = "|".join(result.sets[row])
            record |= {f"p({one})": f"{value:.4f}" for one, value in zip(predictor.classes, p, strict=True)}
        record["distance_percentile"] = f"{100 * result.distance[row]:.0f}"
        if identity is not None:
            record["nearest_training_identity"] = identity[row]
        records.append(record)
    return records


def predict_sequences(folder: str, sequences: list[str]) -> list[dict[str, Any]]:
    """Records of sequences, in their order: what a served model answers."""
    predictor = load_predictor(folder)
    with TemporaryDirectory(prefix="distil-rank-") as place:
        fasta = Path(place) / "sequences.fasta"
        fasta.write_text("".join(f">{number}\n{one}\n" for number, one in enumerate(sequences)))
        proteins = embed_new(predictor, fasta)
    records = {record["id"]: record for record in predictions(predictor, proteins, Path(folder), 0.9)}
    if len(records) < len(sequences):
        raise InputError(f"Expected residues in {len(sequences)} sequences but only {len(records)} have some.")
    return [records[str(number)] for number in range(len(sequences))]
