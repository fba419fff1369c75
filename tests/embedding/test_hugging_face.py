"""Tiny random models of each family, written as their makers write them, through the generic encoder."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from distil_rank.embedding import hugging_face, precision
from distil_rank.embedding.backbone import load_backbone
from distil_rank.embedding.embedder import Embedder
from distil_rank.embedding.run import embed
from distil_rank.embedding.store import Store
from distil_rank.embedding.store_writer import StoreWriter
from distil_rank.embedding.weight_files import cache_folder
from distil_rank.errors import InputError
from tests.reader_files import write_fasta

transformers = pytest.importorskip("transformers", reason="an extra, hf, that `make test` installs")

PROTTRANS = "LAGVESIKRDTPNQFYMHCWXUBZO"
ESM = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "ACDXEFGHIKLMNPQRSTVWYBZUO", "GG", "MKTAYIAKQR" * 4]
FAMILIES = ("bert", "esm", "esm1b", "esmc", "prott5", "ankh")


def tokenizer_of(family: str, folder: Path) -> object:
    if family == "bert":  # ProtBERT, AntiBERTy
        lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROTTRANS]
        (folder / "vocab.txt").write_text("\n".join(lines))
        return transformers.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    if family in ("esm", "esm1b"):
        lines = ["<cls>", "<pad>", "<eos>", "<unk>", *ESM, "<null_1>", "<mask>"]
        (folder / "vocab.txt").write_text("\n".join(lines))
        return transformers.EsmTokenizer(str(folder / "vocab.txt"))
    if family == "esmc":
        return transformers.EsmcTokenizer()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    if family == "ankh":  # one piece a letter, whatever stands before it
        pieces.append(("▁", -1.0))
    pieces += [(("▁" if family == "prott5" else "") + letter, -2.0 - i / 10) for i, letter in enumerate(PROTTRANS)]
    return transformers.T5Tokenizer(vocab=pieces)


def model_of(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    t = transformers
    if family == "bert":
        config = t.BertConfig(vocab_size=30, max_position_embeddings=64, **SIZES)
        return t.BertModel(config, add_pooling_layer=False)
    if family in ("esm", "esm1b"):
        positions = "rotary" if family == "esm" else "absolute"
        config = t.EsmConfig(
            vocab_size=33,
            pad_token_id=1,
            mask_token_id=32,
            max_position_embeddings=66,
            position_embedding_type=positions,
            token_dropout=True,
            **SIZES,
        )
        return t.EsmModel(config, add_pooling_layer=False)
    if family == "esmc":
        return t.EsmcModel(t.EsmcConfig(num_key_value_heads=4, head_dim=8, **SIZES))
    config = t.T5Config(vocab_size=32, d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=64)
    return t.T5EncoderModel(config)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name and folder of one family's model."""
    folder = tmp_path_factory.mktemp(request.param)
    model_of(request.param).save_pretrained(folder)
    tokenizer_of(request.param, folder).save_pretrained(folder)
    return request.param, folder


def alone(family: str, folder: Path, text: str) -> list[torch.Tensor]:
    """Hidden states of each layer, (L + specials, 32), of one sequence through `transformers` itself, unpadded."""
    loader = transformers.T5EncoderModel if family in ("prott5", "ankh") else transformers.AutoModel
    model = loader.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if family in ("bert", "prott5"):  # as their makers' pages say
        text = " ".join(text.translate(str.maketrans("UZOB", "XXXX")))
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
    return [*[one[0] for one in output.hidden_states[1:-1]], output.last_hidden_state[0]]


@pytest.mark.parametrize("pooling", ["mean", "residue", "bos"])
def test_vectors_are_those_of_single_sequences_without_padding(family, pooling):
    name, folder = family
    backbone = load_backbone(f"hf:{folder}")
    if pooling == "bos" and not backbone.tokens.bos:
        pytest.skip("this family has no first token that stands for the protein")
    start, stop = len(backbone.tokens.before), len(backbone.tokens.after)
    result = Embedder(backbone, pooling, layers=[1, 2, 3]).embed(SEQUENCES)
    for layers, text in zip(result.layers.split(result.counts, dim=1), SEQUENCES, strict=True):
        for found, states in zip(layers, alone(name, folder, text), strict=True):
            residues = states[start : len(states) - stop]
            assert len(residues) == len(text)
            wanted = {"mean": residues.mean(0, keepdim=True), "residue": residues, "bos": states[:1]}[pooling]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one_equals_a_batch_of_many_and_an_early_end_a_whole_pass(family):
    backbone = load_backbone(f"hf:{family[1]}")
    together = Embedder(backbone, layers=[2, 3]).embed(SEQUENCES).layers
    one_by_one = Embedder(backbone, layers=[2, 3], max_tokens=1).embed(SEQUENCES).layers
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)
    ran = []
    embedder = Embedder(backbone, layers=[2])
    blocks = hugging_face.blocks_of(embedder.encoder.model, 3)
    blocks[2].register_forward_pre_hook(lambda *_: ran.append("layer 3"))
    torch.testing.assert_close(embedder.embed(SEQUENCES).layers[0], together[0], atol=1e-6, rtol=1e-6)
    assert not ran, "nothing behind the last wanted layer is computed"


def test_an_encoder_in_bf16_leaves_the_weights_as_they_are(family):
    backbone = load_backbone(f"hf:{family[1]}")
    before = Embedder(backbone).embed(SEQUENCES).vectors
    Embedder(backbone, precision="bf16").embed(SEQUENCES)
    assert torch.equal(Embedder(backbone).embed(SEQUENCES).vectors, before)


def test_threads_share_one_encoder(family):
    backbone = load_backbone(f"hf:{family[1]}")
    embedder = Embedder(backbone, layers=[1, 3])
    texts = [[text[:length]] for text in SEQUENCES for length in range(2, len(text))]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        streamed = [found.layers for _, found in embedder.stream(enumerate(texts))]
    finally:
        torch.set_num_threads(threads)
    for text, found in zip(texts, streamed, strict=True):
        torch.testing.assert_close(found, embedder.embed(text).layers, atol=1e-6, rtol=1e-6)


def test_embed_makes_the_same_store_after_an_interruption(family, tmp_path, monkeypatch):
    name, folder = family
    fasta = tmp_path / "some.fasta"
    write_fasta(fasta, [(f"p{i}", text) for i, text in enumerate(SEQUENCES)])
    options = {"backbone": f"hf:{folder}", "layer": "1,3", "precision": "fp32", "max_tokens": 30}
    whole = embed(fasta, tmp_path / "whole", **options)
    assert (whole.dim, whole.layers, whole.precision) == (32, "1, 3", "fp32")
    write, written = StoreWriter.write_part, []

    def write_once(self, *part):
        if written:
            raise KeyboardInterrupt
        written.append(write(self, *part))

    monkeypatch.setattr(StoreWriter, "write_part", write_once)
    with pytest.raises(KeyboardInterrupt):
        embed(fasta, tmp_path / "again", **options)
    monkeypatch.undo()
    assert embed(fasta, tmp_path / "again", **options).digest == whole.digest
    manifest = Store.open(tmp_path / "whole").manifest
    limit = {"bert": 62, "esm1b": 62}.get(name, 1022)
    assert manifest["max_length"] == limit, "a model with a table of positions takes no more residues than that"


def test_several_layers_in_bf16_follow_those_in_fp32(family, tmp_path, monkeypatch):
    """The encoder that was compared with fp32 is the one that goes on, for all the layers that are wanted."""
    monkeypatch.setattr(precision, "native_precision", lambda device: "bf16")
    monkeypatch.setattr(precision, "MIN_BF16_COSINE", 0.9)  # random weights are small
    fasta = tmp_path / "some.fasta"
    write_fasta(fasta, [(f"p{i}", text) for i, text in enumerate(SEQUENCES)])
    for name in ("auto", "fp32"):
        summary = embed(fasta, tmp_path / name, f"hf:{family[1]}", layer="1,3", precision=name)
        assert summary.precision == {"auto": "bf16"}.get(name, name)
    for layer in (1, 3):
        rounded, exact = (
            torch.from_numpy(np.array(Store.open(f"{tmp_path / name}:{layer}").embeddings()))
            for name in ("auto", "fp32")
        )
        assert torch.nn.functional.cosine_similarity(rounded, exact).min() > 0.99


def test_an_esm2_folder_gives_the_same_vectors_on_both_ways(tiny_esm2, tmp_path):
    config = json.loads((tiny_esm2.safetensors / "config.json").read_text())
    model = tiny_esm2.model
    facts = {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "intermediate_size": model.layers[0].fc1.out_features,
    }
    folder = tmp_path / "esm2"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(config | facts | {"layer_norm_eps": 1e-5, "emb_layer_norm_before": False})
    )
    (folder / "model.safetensors").write_bytes((tiny_esm2.safetensors / "model.safetensors").read_bytes())
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", *ESM, "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    layers = list(range(1, model.num_layers + 1))
    ours = Embedder(load_backbone(str(folder)), layers=layers).embed(SEQUENCES).layers
    theirs = Embedder(load_backbone(f"hf:{folder}"), layers=layers).embed(SEQUENCES).layers
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def bert(tmp_path):
    folder = tmp_path / "bert"
    model_of("bert").save_pretrained(folder)
    tokenizer_of("bert", folder).save_pretrained(folder)
    return folder


def test_what_is_no_usable_model_is_refused_in_one_line(bert, tmp_path):
    for name in ("hf:nowhere", "hf:"):
        with pytest.raises(InputError, match=rf"Expected hf:FOLDER or hf:ORG/NAME of the hub but got '{name}'"):
            load_backbone(name)
    weights = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(InputError, match=r"Expected a model in .*bert that transformers loads but got: [^\n]*$"):
        load_backbone(f"hf:{bert}")
    state = {"encoder.layer.0.output.dense.bias": torch.zeros(32)}
    safetensors.torch.save_file(state, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"Expected the weights of BertModel in .* but these are missing: "):
        load_backbone(f"hf:{bert}")
    (bert / "model.safetensors").write_bytes(weights)
    (bert / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"Expected a model in .* that transformers loads but got"):
        load_backbone(f"hf:{bert}")


def test_words_are_no_residues(bert):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "protein"]
    (bert / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    with pytest.raises(InputError, match=r"Expected a tokeniser with one token for each residue in "):
        load_backbone(f"hf:{bert}")


def test_a_model_of_the_hub_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"Expected the model no/such in the cache or on the hub but got: [^\n]*$"):
        load_backbone("hf:no/such")


def test_bos_of_a_model_without_one_is_refused_and_int8_falls_back_aloud(tmp_path):
    folder = tmp_path / "t5"
    model_of("prott5").save_pretrained(folder)
    tokenizer_of("prott5", folder).save_pretrained(folder)
    fasta = tmp_path / "some.fasta"
    write_fasta(fasta, [("a", "MKTAYIAKQR")])
    with pytest.raises(InputError, match=r"Expected --pooling mean or residue with hf:.*, which has no BOS"):
        embed(fasta, tmp_path / "s", f"hf:{folder}", "bos")
    summary = embed(fasta, tmp_path / "s", f"hf:{folder}", precision="auto-int8")
    assert summary.precision in ("fp32", "bf16")
    assert "int8" in (summary.precision_note or "")


def test_antiberty_equals_transformers():
    """Real weights, of a second real transformer: what the generic encoder makes of them is what theirs makes."""
    folder = cache_folder() / "antiberty-0.1.3"
    if not (folder / "pytorch_model.bin").exists():
        pytest.skip("AntiBERTy is not cached; `distil-rank embed --backbone antiberty` fetches it")
    heavy = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    backbone = load_backbone("antiberty")
    assert (backbone.dim, backbone.num_layers, backbone.limit) == (512, 8, 510)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    vocabulary = (folder / "vocab.txt").read_text().split()
    tokens = torch.tensor([[2, *(vocabulary.index(letter) for letter in heavy), 3]])
    with torch.no_grad():
        expected = model(tokens, output_hidden_states=True).hidden_states
    found = Embedder(backbone, layers=[4, 8]).embed([heavy, heavy[:50]]).layers
    for layer, vector in zip((4, 8), found[:, 0], strict=True):
        torch.testing.assert_close(vector, expected[layer][0, 1:-1].mean(0), atol=1e-5, rtol=1e-5)
    assert np.isfinite(found.numpy()).all()
