"""ESM-2 models written as Hugging Face writes them."""

import json
from pathlib import Path

import safetensors.torch
import torch
from esm import Alphabet
from esm.model.esm2 import ESM2
from torch import Tensor

from distil_rank.embedding.model import ResidueTokens


def tokenise(sequences: list[str], alphabet: Alphabet) -> tuple[Tensor, list[int]]:
    """Packed tokens, and how many each sequence has."""
    return ResidueTokens.of_alphabet(alphabet).pack(sequences)


def hugging_face_key(key: str) -> str:
    """What Hugging Face calls a parameter of fair-esm's."""
    inner = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn.rot_emb": "attention.self.rotary_embeddings",
        "self_attn_layer_norm": "attention.LayerNorm",
        "final_layer_norm": "LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }
    if not key.startswith("layers."):
        return {
            "embed_tokens.weight": "esm.embeddings.word_embeddings.weight",
            "emb_layer_norm_after.weight": "esm.encoder.emb_layer_norm_after.weight",
            "emb_layer_norm_after.bias": "esm.encoder.emb_layer_norm_after.bias",
        }.get(key, key)
    _, layer, rest = key.split(".", 2)
    module, _, parameter = rest.rpartition(".")
    return f"esm.encoder.layer.{layer}.{inner[module]}.{parameter}"


def hugging_face_folder(model: ESM2, folder: Path, pickled: bool = False) -> None:
    """Write a model as Hugging Face does, without the heads that embeddings do not need."""
    renamed: dict[str, Tensor] = {
        hugging_face_key(key): value.clone()
        for key, value in model.state_dict().items()
        if "lm_head" not in key and "contact" not in key
    }
    config = {
        "model_type": "esm",
        "position_embedding_type": "rotary",
        "num_attention_heads": model.attention_heads,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "token_dropout": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(renamed, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(renamed, folder / "model.safetensors")
