"""Any protein language model that `transformers` loads, behind the interface of the fused ESM-2 encoder.

A model is known by what it does, not by its name: how its tokeniser writes residues is found by asking it, its blocks
are the list of modules as long as its configuration says, and its limit of residues is the size of its position table.
Only safe weights are read (safetensors, or tensors alone of a `.bin`), and no code that comes with a model is run.
"""

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from distil_rank.embedding.model import Backbone, Encoder, ResidueTokens
from distil_rank.embedding.weight_files import hugging_face_files, sha256_of_files
from distil_rank.errors import DAMAGE, InputError, examples

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
OTHERS = "XBJOUZ"
RARE = "BOUZ"  # that models whose residues stand apart (ProtTrans') read as X, whatever their vocabulary has
METADATA = ("*.json", "*.txt", "*.model")


class _Stop(Exception):
    """Ends a pass behind the last layer that is wanted."""


def residue_tokens(tokenizer: Any) -> ResidueTokens | None:
    """How a tokeniser writes residues, as one token each, alone or between spaces; None where it does neither.

    The residues forwards and backwards have the tokens in between in opposite order; what both begin and end with is
    not of residues.
    """

    def ids(text: str, apart: str) -> list[int]:
        return list(tokenizer(apart.join(text))["input_ids"])

    for apart in ("", " "):
        forwards, backwards = ids(RESIDUES, apart), ids(RESIDUES[::-1], apart)
        before = next((i for i, pair in enumerate(zip(forwards, backwards, strict=False)) if len(set(pair)) > 1), 0)
        tokens, after = forwards[before : before + len(RESIDUES)], forwards[before + len(RESIDUES) :]
        if len(set(tokens)) != len(RESIDUES) or backwards != [*forwards[:before], *tokens[::-1], *after]:
            continue
        known = dict(zip(RESIDUES, tokens, strict=True))
        unknown = tokenizer.unk_token_id
        for letter in OTHERS:
            longer = ids(RESIDUES + letter, apart)
            single = len(longer) == len(forwards) + 1 and not (apart and letter in RARE)
            known[letter] = longer[before + len(RESIDUES)] if single else unknown
            if letter == "X":
                unknown = known[letter]
        if unknown is None:
            continue
        first = before > 0 and forwards[0] in tokenizer.all_special_ids
        return ResidueTokens.of(known, unknown, forwards[:before], after, bos=first)
    return None


class TransformersBackbone(Backbone):
    """An encoder of `transformers`."""

    def encoder(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", layers: Sequence[int] = ()
    ) -> Encoder:
        """The encoder in some precision on a device, for these layers; by default for the last."""
        return TransformersEncoder(self, dtype, device, layers or [self.num_layers])


class TransformersEncoder(Encoder):
    """Hidden states of packed sequences; they are padded to a rectangle for the model, whose own attention it is.

    Args:
        backbone: The model; in its own precision and on its own device its weights are shared.
        dtype: Of the weights and of all that is computed.
        device: Where to compute.
        layers: Whose hidden states are wanted; nothing behind the last of them is computed.
    """

    def __init__(
        self, backbone: TransformersBackbone, dtype: torch.dtype, device: torch.device | str, layers: Sequence[int]
    ):
        self.dtype, self.device = dtype, torch.device(device)
        self.wanted, self.layer, self.depth = frozenset(layers), max(layers), backbone.num_layers
        own = dtype == torch.float32 and self.device.type == "cpu"  # then a copy of the modules alone, for the hooks
        theirs = (*backbone.model.parameters(), *backbone.model.buffers()) if own else ()
        self.model = copy.deepcopy(backbone.model, {id(one): one for one in theirs}).to(self.device, dtype)
        for number, block in enumerate(blocks_of(self.model, self.depth), start=1):
            block.register_forward_hook(partial(self._behind, number))
        self._pass = threading.local()  # threads compute batches side by side

    @torch.no_grad()
    def states(self, tokens: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Hidden states behind the embedding and each layer, (T, dim) float32; of layers that nobody wants (0, dim).

        The last layer's have the model's final norm.
        """
        padded = pad_sequence(tokens.split(lengths), batch_first=True)  # (N, longest)
        mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
        own = self._pass
        own.taken = mask.flatten().nonzero().flatten().to(self.device)  # found before: nothing waits for the device
        own.kept = {}
        with suppress(_Stop):
            result = self.model(input_ids=padded.to(self.device), attention_mask=mask.to(self.device, torch.long))
            own.kept[self.depth] = result.last_hidden_state.flatten(0, 1)[own.taken].float()
        nothing = torch.empty(0, 0)
        for number in range(self.layer + 1):
            yield own.kept.pop(number, nothing)

    def _behind(self, number: int, block: nn.Module, inputs: Any, output: Any) -> None:
        """Keeps a layer's states where they are wanted; ends the pass behind the last of these."""
        own = self._pass
        if number == self.depth:
            return
        if number in self.wanted:
            hidden = output[0] if isinstance(output, tuple) else output
            own.kept[number] = hidden.flatten(0, 1)[own.taken].float()
        if number == self.layer:
            raise _Stop


def blocks_of(model: nn.Module, depth: int) -> nn.ModuleList:
    """The transformer layers: the first list of modules of that length.

    Raises:
        InputError: there is none.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise InputError(
        f"Expected {depth} transformer layers in {type(model).__name__} but found no such list of modules."
    )


def load_transformers(source: str, name: str) -> TransformersBackbone:
    """Loads an encoder through `transformers`.

    Args:
        source: A folder as `save_pretrained` writes it, or ORG/NAME of the hub: from the user's cache, or fetched.
        name: What the user calls it.

    Raises:
        InputError: `transformers` is missing, or the model cannot be had, read or used.
    """
    if find_spec("transformers") is None:
        raise InputError(f"Expected transformers for {name} but it is missing; pip install 'distil-rank[hf]'.")
    import transformers  # noqa: PLC0415  (an extra, and slow)

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(source).expanduser()
    folder = folder if folder.is_dir() else _snapshot(source)
    files = hugging_face_files(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        encoders = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING  # T5 without its decoder
        loader = transformers.AutoModelForTextEncoding if type(config) in encoders else transformers.AutoModel
        model, info = loader.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = residue_tokens(tokenizer) or residue_tokens(
            transformers.AutoTokenizer.from_pretrained(folder, do_lower_case=False)  # a vocabulary alone does not say
        )
    except (*DAMAGE, SafetensorError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"Expected a model in {folder} that transformers loads but got: {reason}") from error
    missing = [key for key in info["missing_keys"] if not re.search(r"pooler|head\.", key)]  # no embedding needs these
    if missing:
        raise InputError(
            f"Expected the weights of {type(model).__name__} in {folder} but these are missing: {examples(missing)}."
        )
    if tokens is None:
        raise InputError(f"Expected a tokeniser with one token for each residue in {folder} but it has not.")
    blocks_of(model, config.num_hidden_layers)
    model.eval().requires_grad_(False)
    tables = [table for key, table in model.named_modules() if key.endswith("position_embeddings")]
    first = {table: 0 if table.padding_idx is None else table.padding_idx + 1 for table in tables}
    limit = min((table.num_embeddings - first[table] - tokens.specials for table in tables), default=None)
    size = config.hidden_size, config.num_hidden_layers
    return TransformersBackbone(name, model, tokens, *size, sha256_of_files(files), limit)


def _snapshot(source: str) -> Path:
    """The hub's files of a model: fetched, or from the user's cache."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    try:
        folder = Path(snapshot_download(source, allow_patterns=[*METADATA, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=[*METADATA, "pytorch_model*.bin"])
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(
            f"Expected the model {source} in the cache or on the hub but got: {' '.join(str(error).split())[:120]}; "
            "download it where there is a network, or give hf:FOLDER."
        ) from error
    return folder
