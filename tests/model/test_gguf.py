"""Models in GGUF files: config and tensors equal to those that transformers reads from the file."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import BOOL, F32, LIST, TEXT, U32, hand_written, miniature, text, u32

from fedgpt.core.errors import FedGPTError
from fedgpt.model.gguf import read_gguf

transformers = pytest.importorskip("transformers")

SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 40, "vocab_size": 70}
LLAMA = SMALL | {"num_attention_heads": 6, "hidden_size": 96, "intermediate_size": 160}
GPT2 = {"n_layer": 2, "n_head": 3, "n_embd": 96, "n_positions": 40, "vocab_size": 70}
MODELS = {
    "llama": ("llama", LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "as many kv heads, untied": ("llama", LLAMA | {"tie_word_embeddings": False}),
    "biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5}),
    "width of heads": ("llama", LLAMA | {"head_dim": 22, "num_key_value_heads": 3}),
    "one layer, one head": (
        "llama",
        LLAMA | {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    ),
    "qwen2": ("qwen2", LLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", LLAMA | {"num_key_value_heads": 1, "rms_norm_eps": 1e-6}),
    "gpt2": (
        "gpt2",
        {"n_layer": 2, "n_head": 3, "n_embd": 96, "n_positions": 40, "vocab_size": 70},
    ),
    "gpt2 untied, inner": (
        "gpt2",
        {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_inner": 64, "vocab_size": 70}
        | {"tie_word_embeddings": False},
    ),
}


def theirs(kind, settings):
    """A model of transformers with random weights."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def read_by_transformers(path, model):
    """The tensors that AutoModelForCausalLM.from_pretrained(gguf_file=...) would load."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    return load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]


def config_in(model, folder):
    (folder / "config.json").write_text(json.dumps(model.config))
    return transformers.AutoConfig.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small file, to damage."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return miniature(path, theirs(*MODELS["llama"]))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(("kind", "settings"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("numbers", ["F32", "Q4_1"])
def test_config_and_tensors_are_those_of_transformers(tmp_path, path, kind, settings, numbers):
    model = theirs(kind, settings)
    found = read_gguf(miniature(path, model, numbers))
    tensors = read_by_transformers(path, model)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].shape == tuple(tensor.shape)
        values = found.read(name)
        assert values.flags.c_contiguous
        assert values.dtype == np.float32
        assert np.array_equal(values, tensor.numpy()), name
    config = config_in(found, tmp_path)
    expected = model.config
    for name in settings.keys() | {"tie_word_embeddings", "hidden_act", "activation_function"}:
        assert getattr(config, name, None) == getattr(expected, name, None), name
    assert config.architectures == [type(model).__name__]
    if kind != "gpt2":
        assert config.rope_parameters == expected.rope_parameters
        assert config.rms_norm_eps == expected.rms_norm_eps


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_logits_are_those_of_the_model_that_transformers_reads(tmp_path, path, kind):
    model = theirs(*MODELS[kind])
    found = read_gguf(miniature(path, model, "Q8_0"))
    model.load_state_dict(read_by_transformers(path, model), strict=False)
    ours = transformers.AutoModelForCausalLM.from_config(config_in(found, tmp_path)).eval()
    missing, unexpected = ours.load_state_dict(
        {name: torch.from_numpy(found.read(name)) for name in found.tensors}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    for each in (model, ours):
        each.tie_weights()
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, model(ids).logits)


def test_rows_of_queries_and_keys_are_put_back_into_hugging_faces_order(path):
    """One head of width 6: llama.cpp stores rows 0, 3, 1, 4, 2, 5 of Hugging Face's."""
    order = [0, 3, 1, 4, 2, 5]
    width, rows = 4, np.repeat(np.array(order, np.float32)[:, None], 4, axis=1)
    config = LLAMA | {"num_hidden_layers": 1, "hidden_size": width, "head_dim": 6}
    config |= {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": True}
    content = bytearray(miniature(path, theirs("llama", config)).read_bytes())
    file = read_gguf(path).file
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        tensor = file.tensors[name]
        content[tensor.start : tensor.end] = rows.tobytes()
    path.write_bytes(content)
    for name in ("q_proj", "k_proj"):
        values = read_gguf(path).read(f"model.layers.0.self_attn.{name}.weight")
        assert values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_numbers_of_the_config_are_as_short_as_they_were(path):
    """1e-05 is stored as a float32, 9.999999747378752e-06."""
    found = read_gguf(miniature(path, theirs("llama", LLAMA | {"rms_norm_eps": 1e-5})))
    assert found.config["rms_norm_eps"] == 1e-5
    assert found.config["rope_theta"] == 10_000


def altered(path, source, changes, without=(), more=()):
    """A copy of a file with other metadata, without tensors whose names have a part, and with more
    tensors of 8 numbers.
    """
    reader = gguf.GGUFReader(source)
    names = {gguf.GGUFValueType.UINT32: U32, gguf.GGUFValueType.FLOAT32: F32}
    pairs = {
        key: (names.get(field.types[0], TEXT), bytes(field.parts[field.data[0]]))
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    pairs = {k: (n, v if n != TEXT else text(v)) for k, (n, v) in pairs.items()} | changes
    rows, data = [], b""
    for tensor in reader.tensors:
        if not any(part in tensor.name for part in without):
            rows.append((tensor.name, tensor.shape.tolist(), tensor.tensor_type.value, len(data)))
            data += tensor.data.tobytes()
            data += bytes(-len(data) % 32)
    for name in more:
        rows.append((name, [8], 0, len(data)))
        data += bytes(32)
    pairs = [(key, *pair) for key, pair in pairs.items() if pair]
    path.write_bytes(hand_written(pairs, rows, data))
    return path


def n32(number):
    return U32, u32(number)


def f32(number):
    return F32, np.float32(number).tobytes()


WHOLE = ("block_count", "context_length", "embedding_length", "feed_forward_length")
ARCHITECTURES = "allowed are llama, qwen2 and gpt2"
CHANGES = {
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "other architecture": (
        {"general.architecture": (TEXT, text("gemma3"))},
        f"general.architecture='gemma3' is not supported; {ARCHITECTURES}",
    ),
    "adapter": ({"general.type": (TEXT, text("adapter"))}, "general.type='adapter'; must be"),
    **{f"no {name}": ({f"llama.{name}": None}, f"llama.{name} is missing") for name in WHOLE},
    **{f"{name} 0": ({f"llama.{name}": n32(0)}, f"llama.{name}=0: must be") for name in WHOLE},
    "no heads": ({"llama.attention.head_count": None}, "llama.attention.head_count is missing"),
    "heads by layer": (
        {"llama.attention.head_count": (LIST, u32(4) + b"\2" + bytes(7) + u32(6) + u32(6))},
        "llama.attention.head_count is a list; must be a whole number",
    ),
    "kv heads": (
        {"llama.attention.head_count_kv": n32(4)},
        "=4: must divide .*head_count=6",
    ),
    "values' width": ({"llama.attention.value_length": n32(8)}, "=8: must be 16 in this"),
    "rotary width": ({"llama.rope.dimension_count": n32(8)}, "=8: must be 16 in this model"),
    "vocabulary": ({"llama.vocab_size": n32(71)}, "vocab_size=71: must be 70 in this"),
    "more layers": ({"llama.block_count": n32(3)}, r"missing \['blk.2.attn_k.weight'"),
    "fewer layers": ({"llama.block_count": n32(1)}, r"unexpected \['blk.1.attn_k.weight'"),
    "a billion layers": ({"llama.block_count": n32(10**9)}, "20 tensors for 1,000,000,000"),
    "a billion wide": ({"llama.embedding_length": n32(10**9)}, "has shape .* metadata says"),
    "no epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        "llama.attention.layer_norm_rms_epsilon is missing",
    ),
    "epsilon 0": ({"llama.attention.layer_norm_rms_epsilon": f32(0)}, "=0.0: must be above 0"),
    "epsilon NaN": ({"llama.attention.layer_norm_rms_epsilon": f32(np.nan)}, "=nan: must be above"),
    "infinite base": ({"llama.rope.freq_base": f32(np.inf)}, "freq_base=inf: must be above 0"),
    "rope scaling": (
        {"llama.rope.scaling.type": (TEXT, text("yarn"))},
        "llama.rope.scaling.type='yarn' is rope scaling that is not supported",
    ),
    "factor": ({"llama.rope.scaling.factor": f32(4)}, "factor=4.0 is rope scaling that is not"),
    "old rope scaling": ({"llama.rope.scale_linear": f32(2)}, "scale_linear=2.0 is rope scaling"),
    "experts": ({"llama.expert_count": n32(8)}, "llama.expert_count=8 is a setting that is"),
    "window": (
        {"llama.attention.sliding_window": n32(512)},
        "llama.attention.sliding_window=512 is a setting that is not supported",
    ),
    "eos": ({"tokenizer.ggml.eos_token_id": n32(70)}, "eos_token_id=70: must be one of 70"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_metadata_that_does_not_fit_is_refused_by_name(llama, path, changes, message):
    with pytest.raises(FedGPTError, match=message) as caught:
        read_gguf(altered(path, llama, changes))
    assert str(path) in str(caught.value)


def test_an_odd_width_of_heads_is_refused(path):
    """transformers makes no such model, so it is one head of width 10, called two of width 5."""
    config = LLAMA | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 10}
    source = miniature(path.with_name("source.gguf"), theirs("llama", config))
    keys = dict.fromkeys(("attention.head_count", "attention.head_count_kv"), 2)
    keys |= dict.fromkeys(("attention.key_length", "attention.value_length"), 5)
    changes = {f"llama.{key}": n32(number) for key, number in keys.items()}
    with pytest.raises(FedGPTError, match="key_length=5: must be even for rotary positions"):
        read_gguf(altered(path, source, changes | {"llama.rope.dimension_count": n32(5)}))


def test_metadata_that_changes_nothing_is_accepted(llama, path):
    """Settings that are off, sizes that are stated twice, and defaults of what is not there."""
    off = {
        "llama.rope.scaling.type": (TEXT, text("none")),
        "llama.expert_count": n32(0),
        "llama.use_parallel_residual": (BOOL, b"\0"),
        "llama.attention.key_length": n32(16),
        "llama.attention.value_length": n32(16),
        "llama.rope.dimension_count": n32(16),
        "llama.vocab_size": n32(70),
        "general.type": (TEXT, text("model")),
        "llama.rope.freq_base": None,
    }
    assert read_gguf(altered(path, llama, off)).config == read_gguf(llama).config
    bos = read_gguf(altered(path, llama, {"tokenizer.ggml.bos_token_id": n32(3)}))
    assert bos.config == read_gguf(llama).config | {"bos_token_id": 3}


def test_tensors_that_are_missing_or_too_many_are_named(llama, path):
    for without in ("output_norm", "blk.1.attn_q", "ffn_down"):
        with pytest.raises(FedGPTError, match=rf"missing \['(blk.\d.)?{re.escape(without)}"):
            read_gguf(altered(path, llama, {}, without=[without]))
    with pytest.raises(FedGPTError, match=r"the tensor token_embd.weight is missing"):
        read_gguf(altered(path, llama, {}, without=["token_embd"]))
    for name, message in {"x": r"unexpected \['x'\]", "rope_freqs.weight": "rope scaling"}.items():
        with pytest.raises(FedGPTError, match=message):
            read_gguf(altered(path, llama, {}, more=[name]))


def test_biases_of_some_layers_only_are_refused(path):
    model = theirs(*MODELS["biases"])
    source = miniature(path.with_name("source.gguf"), model)
    with pytest.raises(FedGPTError, match=r"missing \['blk.0.attn_q.bias'\]"):
        read_gguf(altered(path, source, {}, without=["blk.0.attn_q.bias"]))
    found = read_gguf(
        altered(path, source, {}, without=["attn_q.b", "attn_k.b", "attn_v.b", "t.b"])
    )
    assert (found.config["attention_bias"], found.config["mlp_bias"]) == (False, True)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_changed_bytes_give_a_model_or_a_message(llama, tmp_path_factory, data):
    content = bytearray(llama.read_bytes())
    header = min(t.start for t in read_gguf(llama).file.tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        model = read_gguf(path)
        for name, tensor in model.tensors.items():
            assert model.read(name).shape == tensor.shape
        json.dumps(model.config)
    except FedGPTError as error:
        assert str(path) in str(error)
