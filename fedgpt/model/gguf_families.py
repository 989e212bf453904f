"""What a GGUF file says of its model, in the words of Hugging Face: config.json and tensor names.

Metadata and tensors have the names of docs/gguf.md of ggml, and the layouts that llama.cpp's
convert_hf_to_gguf.py writes. A family that can be read is one `Family`, at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgpt.core.errors import FedGPTError
from fedgpt.core.gguf_file import EMBEDDING, GGUFFile, Metadata

Shape = tuple[int, ...]
HEAD, LAYER = "output.weight", "blk"
ROPE_FACTORS = "rope_freqs.weight"
# keys behind the name of the architecture that are read, or that only describe
READ = {
    *("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "tensor_data_layout"),
}
NORMS = ("attn_norm", "ffn_norm", "output_norm")
LLAMA_NAMES = {  # parts of names in the file -> parts of Hugging Face's names
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "blk": "transformer.h",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


@dataclass(frozen=True)
class Sizes:
    """The widths of a model, which determine the shape of every tensor."""

    layers: int
    width: int  # of a token's vector
    heads: int
    kv_heads: int
    head_width: int
    inner: int  # width inside the feed-forward part
    context: int  # tokens
    vocab: int  # rows of the embedding

    def shapes(self) -> dict[str, Shape]:
        """The shape of each weight in a file, by the part of its name that says what it is."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return dict.fromkeys(NORMS, (self.width,)) | {
            "token_embd": (self.vocab, self.width),
            "position_embd": (self.context, self.width),
            "output": (self.vocab, self.width),
            "attn_q": (queries, self.width),
            "attn_k": (keys, self.width),
            "attn_v": (keys, self.width),
            "attn_qkv": (queries + 2 * keys, self.width),
            "attn_output": (self.width, queries),
            "ffn_gate": (self.inner, self.width),
            "ffn_up": (self.inner, self.width),
            "ffn_down": (self.width, self.inner),
        }


@dataclass(frozen=True)
class Family:
    """One general.architecture: its config.json, and the names and layouts of its tensors."""

    settings: Callable[[GGUFFile, Sizes], dict[str, Any]]  # config.json without what all have
    names: Mapping[str, str]
    biases: tuple[str, ...] = ()  # parts that always have a bias
    optional_biases: tuple[tuple[str, ...], ...] = ()  # groups in which all parts have one, or none
    paired: tuple[str, ...] = ()  # parts whose rows are ordered for llama.cpp's rotation
    transposed: tuple[str, ...] = ()  # parts whose weight Hugging Face stores as (in, out)

    def theirs(self, name: str) -> str:
        """Hugging Face's name of a tensor: blk.0.attn_q.weight is ...0.self_attn.q_proj.weight."""
        return ".".join(self.names.get(part, part) for part in name.split("."))

    def their_shape(self, name: str, shape: Shape) -> Shape:
        """The shape of a tensor of the file in the layout of Hugging Face."""
        return shape[::-1] if _part(name) in self.transposed else shape

    def to_theirs(self, name: str, values: np.ndarray, sizes: Sizes) -> np.ndarray:
        """The values of a tensor of the file in the layout of Hugging Face."""
        part = _part(name)
        if part in self.paired:
            # llama.cpp rotates channels (2 i, 2 i + 1) of a head, Hugging Face (i, i + width / 2)
            heads = values.reshape(-1, sizes.head_width // 2, 2, *values.shape[1:])
            return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(values.shape)
        return np.ascontiguousarray(values.T) if part in self.transposed else values

    def expected(self, found: Iterable[str], sizes: Sizes) -> dict[str, Shape]:
        """Name and shape of every tensor of a file.

        The names that were `found` decide on the biases that are optional and on the head.
        """
        biases = set(self.biases)
        biased = {_part(name) for name in found if name.endswith(".bias")}
        for group in self.optional_biases:
            biases |= set(group) if biased.intersection(group) else set()
        tensors: dict[str, Shape] = {}
        for part, shape in sizes.shapes().items():
            if part not in self.names or (part == "output" and HEAD not in found):
                continue
            in_layers = part.startswith(("attn_", "ffn_"))
            places = [f"{LAYER}.{n}." for n in range(sizes.layers)] if in_layers else [""]
            tensors |= {f"{place}{part}.weight": shape for place in places}
            if part in biases:
                tensors |= {f"{place}{part}.bias": shape[:1] for place in places}
        return tensors


def family_of(file: GGUFFile) -> tuple[Family, Sizes]:
    """The family and the sizes that a file names, after comparing every tensor with them.

    Raises FedGPTError for another architecture, for metadata that changes what the model computes
    and is not supported (such as rope scaling), and for tensors that do not fit the metadata.
    """
    said = file.metadata
    kind = said.value("general.type", str, default="model")
    architecture = said.value("general.architecture", str)
    if kind != "model":
        raise FedGPTError(f"{file.path}: general.type={kind!r:.60}; must be 'model'")
    if architecture not in FAMILIES:
        *others, last = FAMILIES
        raise FedGPTError(
            f"{file.path}: general.architecture={architecture!r:.60} is not supported; allowed are"
            f" {', '.join(others)} and {last}"
        )
    family = FAMILIES[architecture]
    _refuse_other_keys(said, architecture)
    sizes = _sizes(file, architecture)
    _check_tensors(file, family.expected(file.tensors, sizes))
    return family, sizes


def config_of(file: GGUFFile, family: Family, sizes: Sizes) -> dict[str, Any]:
    """The content of config.json, as transformers writes it for this family."""
    special = file.metadata.special_ids(sizes.vocab)
    return family.settings(file, sizes) | {
        "vocab_size": sizes.vocab,
        "tie_word_embeddings": HEAD not in file.tensors,
        **{f"{name}_token_id": special[name] for name in ("bos", "eos", "pad") if name in special},
    }


def _refuse_other_keys(said: Metadata, architecture: str) -> None:
    for key, value in said.entries.items():
        name = key.removeprefix(f"{architecture}.")
        nothing = isinstance(value, str | int | float) and value in (0, "", "none")
        if name != key and name not in READ and not nothing:
            what = "rope scaling" if name.startswith("rope.scal") else "a setting"
            shown = f"={value!r:.60}" if isinstance(value, str | int | float) else ""
            raise FedGPTError(f"{said.path}: {key}{shown} is {what} that is not supported")


def _sizes(file: GGUFFile, architecture: str) -> Sizes:
    def whole(name: str, default: int | None = None) -> int:
        number = file.metadata.value(f"{architecture}.{name}", int, default)
        if number < 1:
            raise FedGPTError(f"{file.path}: {architecture}.{name}={number}: must be at least 1")
        return number

    def must_be(name: str, needed: int) -> None:
        if (number := whole(name, needed)) != needed:
            raise FedGPTError(
                f"{file.path}: {architecture}.{name}={number}: must be {needed} in this model"
            )

    layers, width, heads = map(whole, ("block_count", "embedding_length", "attention.head_count"))
    if EMBEDDING not in file.tensors:
        raise FedGPTError(f"{file.path}: the tensor {EMBEDDING} is missing")
    if layers > len(file.tensors):  # before the names of that many layers are listed
        raise FedGPTError(
            f"{file.path} has {len(file.tensors)} tensors for {layers:,} layers"
            f" ({architecture}.block_count)"
        )
    vocab = file.tensors[EMBEDDING].shape[0]
    kv_heads = whole("attention.head_count_kv", heads)
    head_width = whole("attention.key_length", max(1, width // heads))
    if heads % kv_heads:
        raise FedGPTError(
            f"{file.path}: {architecture}.attention.head_count_kv={kv_heads}: must divide"
            f" attention.head_count={heads}"
        )
    must_be("vocab_size", vocab)
    must_be("attention.value_length", head_width)
    must_be("rope.dimension_count", head_width)
    inner, context = whole("feed_forward_length"), whole("context_length")
    return Sizes(layers, width, heads, kv_heads, head_width, inner, context, vocab)


def _check_tensors(file: GGUFFile, expected: Mapping[str, Shape]) -> None:
    missing = sorted(expected.keys() - file.tensors.keys())
    unexpected = sorted(file.tensors.keys() - expected.keys())
    if ROPE_FACTORS in unexpected:
        raise FedGPTError(f"{file.path}: {ROPE_FACTORS} is rope scaling that is not supported")
    if missing or unexpected:
        raise FedGPTError(
            f"{file.path}: the tensors do not fit the metadata: missing {missing[:5]}, unexpected"
            f" {unexpected[:5]}"
        )
    for name, shape in expected.items():
        if file.tensors[name].shape != shape:
            raise FedGPTError(
                f"{file.path}: {name} has shape {file.tensors[name].shape}, the metadata says"
                f" {shape}"
            )


def _part(name: str) -> str:
    """The part of a tensor's name that says what it is: attn_q of blk.0.attn_q.weight."""
    return name.split(".")[-2] if "." in name else name


def _positive(said: Metadata, key: str, default: float | None = None) -> float:
    """A number above 0 with as few digits as its float32 needs: 1e-05, not 9.999999747378752e-06.

    So it is the number of the config.json from which the file was made.
    """
    with np.errstate(over="ignore"):
        number = float(str(np.float32(said.value(key, float, default))))
    if not (math.isfinite(number) and number > 0):
        raise FedGPTError(f"{said.path}: {key}={number}: must be above 0 and finite")
    return number


def _rotary_settings(file: GGUFFile, sizes: Sizes, architecture: str) -> dict[str, Any]:
    said = file.metadata
    if sizes.head_width % 2:
        raise FedGPTError(
            f"{file.path}: {architecture}.attention.key_length={sizes.head_width}: must be even for"
            " rotary positions"
        )
    settings = {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": _positive(said, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(said, f"{architecture}.rope.freq_base", default=10_000.0),
    }
    own_width = sizes.head_width * sizes.heads != sizes.width
    return settings | ({"head_dim": sizes.head_width} if own_width else {})


def _llama(file: GGUFFile, sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **_rotary_settings(file, sizes, "llama"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _qwen2(file: GGUFFile, sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_rotary_settings(file, sizes, "qwen2"),
        "use_sliding_window": False,
    }


def _gpt2(file: GGUFFile, sizes: Sizes) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": sizes.width,
        "n_inner": sizes.inner,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "n_positions": sizes.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": _positive(file.metadata, "gpt2.attention.layer_norm_epsilon"),
        # a GGUF file has none; without these, config.json would mean 0.1
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


FAMILIES = {
    "llama": Family(
        _llama,
        LLAMA_NAMES,
        optional_biases=(
            ("attn_q", "attn_k", "attn_v", "attn_output"),
            ("ffn_gate", "ffn_up", "ffn_down"),
        ),
        paired=("attn_q", "attn_k"),
    ),
    "qwen2": Family(_qwen2, LLAMA_NAMES, biases=("attn_q", "attn_k", "attn_v")),
    "gpt2": Family(
        _gpt2,
        GPT2_NAMES,
        biases=(*NORMS, "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    ),
}
