"""GGUF files for tests: bytes by hand, to damage, and miniatures by llama.cpp's own writer.

`hand_written` follows the specification (docs/gguf.md of ggml), so that it can also write what no
writer would. `miniature` gives a model of transformers the names that the `gguf` package has for
them, and random values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Pair = tuple[str, int, bytes]  # of metadata: key, type, content
Row = tuple[str, Sequence[int], int, int]  # of the table: name, dimensions, type, offset
U32, F32, BOOL, TEXT, LIST = 4, 6, 7, 8, 9  # types of metadata


def text(content: str | bytes) -> bytes:
    encoded = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(encoded)) + encoded


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def texts(items: Sequence[str]) -> bytes:
    return struct.pack("<IQ", TEXT, len(items)) + b"".join(map(text, items))


def hand_written(
    pairs: Sequence[Pair] = (),
    rows: Sequence[Row] = (),
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
    begin: bytes = b"GGUF\x03\0\0\0",
) -> bytes:
    """A file; `counts` are the numbers of tensors and of metadata that it claims to have."""
    header = begin + struct.pack("<QQ", *(counts or (len(rows), len(pairs))))
    header += b"".join(text(key) + u32(kind) + content for key, kind, content in pairs)
    for name, dimensions, kind, offset in rows:
        header += text(name) + u32(len(dimensions))
        header += b"".join(struct.pack("<Q", size) for size in dimensions)
        header += u32(kind) + struct.pack("<Q", offset)
    return header + bytes(-len(header) % 32) + data


def miniature(
    path: Path, model: Any, kind: str = "F32", tokenizer: Mapping[str, Any] | None = None, seed=0
) -> Path:
    """Write a GGUF file of the shapes of a Llama, Qwen2 or GPT-2 of transformers.

    Matrices whose rows have whole blocks have the type `kind`, as llama.cpp writes them. The values
    are random, so the file is no other layout of `model`.
    """
    config = model.config
    arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        head = getattr(config, "head_dim", None)
        if head and head * config.num_attention_heads != config.hidden_size:
            writer.add_key_length(head)
            writer.add_value_length(head)
            writer.add_rope_dimension_count(head)
    for name, value in (tokenizer or {}).items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    random = np.random.default_rng(seed)
    for full in model.state_dict():
        if full == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, end = full.rsplit(".", 1)
        shape = tuple(model.get_parameter(full).shape)
        if config.model_type == "gpt2" and ".c_" in name and end == "weight":
            shape = shape[::-1]
        values = random.standard_normal(shape).astype(np.float32)
        used = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        try:
            packed = gguf.quantize(values, used)
        except gguf.QuantError:
            used = gguf.GGMLQuantizationType.F16
            packed = gguf.quantize(values, used)
        writer.add_tensor(f"{names.get_name(name)}.{end}", packed, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
