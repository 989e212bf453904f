"""Models of transformers' families: folders it writes compute the same here, and go back as they
were.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_gpt import tokens
from torch.nn import functional as F

from fedgpt.core.errors import FedGPTError
from fedgpt.model.families.base import with_bias
from fedgpt.model.generate import generate
from fedgpt.model.hf import export_model, import_model
from fedgpt.model.hf_folder import read_folder
from fedgpt.model.hf_formats import family_for

transformers = pytest.importorskip("transformers")
# Small configurations of each family, with sizes that do not divide one another
SMALL = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {
    **SMALL,
    **{"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"num_hidden_layers": 2, "intermediate_size": 52, "max_position_embeddings": 24},
}
NEOX = {
    **SMALL,
    **{"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2},
    **{"intermediate_size": 56, "max_position_embeddings": 24},
}
GPT2 = SMALL | {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 24}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
CONFIGS = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2, inner width and epsilon": (
        "GPT2Config",
        GPT2 | {"n_inner": 44, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "pythia": ("GPTNeoXConfig", NEOX),  # parallel residual, a quarter of the channels rotated
    "neox, sequential": (
        "GPTNeoXConfig",
        NEOX
        | {"use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 500}
        | {"layer_norm_eps": 1e-3, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "llama": ("LlamaConfig", LLAMA),
    "smollm2": (
        "LlamaConfig",
        LLAMA | {"tie_word_embeddings": True, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5},
    ),
    "llama with biases": ("LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama, attention with biases": ("LlamaConfig", LLAMA | {"attention_bias": True}),
    "llama, MLP with biases": ("LlamaConfig", LLAMA | {"mlp_bias": True}),
    "llama, wide heads": ("LlamaConfig", LLAMA | {"head_dim": 6, "num_key_value_heads": 1}),
    "llama, all heads": ("LlamaConfig", LLAMA | {"num_key_value_heads": 9}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2, tied": ("Qwen2Config", LLAMA | {"tie_word_embeddings": True, "rope_theta": 1e6}),
}
every_config = pytest.mark.parametrize(("kind", "config"), CONFIGS.values(), ids=CONFIGS.keys())


def written(folder, kind, config, seed=0):
    """A random model of transformers, in which every parameter has an effect, and its folder."""
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**config), attn_implementation="eager"
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(folder)
    return theirs.eval()


def theirs_from(folder):
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return loaded.eval()


@every_config
def test_logits_and_every_gradient_equal_those_of_transformers(tmp_path, kind, config):
    theirs = written(tmp_path, kind, config).double()
    model = import_model(tmp_path).double().eval()
    ids, targets = tokens(3, 24), tokens(3, 24, seed=1)
    logits = theirs(ids).logits
    torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-6)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model.loss(ids, targets).backward()
    family, grads = family_for(model.options), {}
    for name, p in theirs.named_parameters():
        # files have another name for this one than modules
        grads[name.replace("lm_head", "embed_out") if kind == "GPTNeoXConfig" else name] = p.grad
    for name, p in model.named_parameters():
        expected = tuple(grads.pop(part) for part in family.theirs(name))
        expected = family.from_file(name, expected, model.options)
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-7, msg=name)
    assert not grads  # each of theirs was compared


@every_config
def test_generation_with_and_without_the_cache_equals_transformers(tmp_path, kind, config):
    theirs = written(tmp_path, kind, config)
    model = import_model(tmp_path)
    prompt = tokens(1, 5)
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=18,
        do_sample=False,
        eos_token_id=None,
    )[0, 5:].tolist()
    for cache in (True, False):
        assert generate(model, prompt[0].tolist(), 18, temperature=0, cache=cache)[0] == expected


@every_config
def test_a_folder_goes_through_export_and_transformers_byte_by_byte(tmp_path, kind, config):
    theirs = written(tmp_path / "theirs", kind, config)
    model = import_model(tmp_path / "theirs")
    export_model(tmp_path / "ours", model)
    kept, ours = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    if not config.get("tie_word_embeddings", kind == "GPT2Config"):
        assert kept.keys() == ours.keys()
    assert all(torch.equal(kept[name], ours[name]) for name in ours)
    again = theirs_from(tmp_path / "ours")
    assert type(again) is type(theirs)
    ids = tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    export_model(tmp_path / "back", import_model(tmp_path / "again"))
    assert import_model(tmp_path / "back").options == model.options
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sharded_weights_of_16_bits_are_read_exactly(tmp_path, dtype):
    theirs = written(tmp_path / "whole", "LlamaConfig", LLAMA).to(dtype)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    model = import_model(tmp_path / "shards")
    expected = torch.cat([p.flatten() for p in theirs.state_dict().values()]).float()
    found = torch.cat(
        [
            part.flatten()
            for name, p in model.named_parameters()
            for part in family_for(model.options).to_file(name, p, model.options)
        ]
    )
    assert p_sorted(found).equal(p_sorted(expected)) and model.lm_head.weight.dtype == torch.float32


def p_sorted(values):
    return values.detach().sort().values


SCALED = {
    "old name": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama 3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "new name": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config", "GPTNeoXConfig"])
@pytest.mark.parametrize("change", SCALED.values(), ids=SCALED.keys())
def test_scaled_rotary_positions_are_refused_by_name(tmp_path, kind, change):
    written(tmp_path, kind, NEOX if kind == "GPTNeoXConfig" else LLAMA)
    config = json.loads((tmp_path / "config.json").read_text())
    config = {name: config[name] for name in config if name != "rope_parameters"} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    [(place, rope)] = change.items()
    name = rope.get("rope_type", rope.get("type"))
    with pytest.raises(FedGPTError, match=f"{place} has rope_type='{name}': scaled rotary posi"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("LlamaConfig", {"hidden_act": "gelu"}, "hidden_act='gelu': must be 'silu'"),
        ("LlamaConfig", {"num_key_value_heads": 2}, "model.n_kv_head=2: must be a divisor of"),
        ("LlamaConfig", {"head_dim": 5}, "model.head_dim=5: model.positions=rotary needs an even"),
        ("LlamaConfig", {"num_key_value_heads": 0}, "num_key_value_heads=0: must be at least 1"),
        ("LlamaConfig", {"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ("Qwen2Config", {"use_sliding_window": True}, "use_sliding_window=True: must be False"),
        (
            "Qwen2Config",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=.*: all must be 'full_attention'",
        ),
        ("Qwen2Config", {"layer_types": 3}, "layer_types=3: all must be 'full_attention'"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(tmp_path, kind, change, message):
    written(tmp_path, kind, LLAMA)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedGPTError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen2Config"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path, kind):
    theirs = getattr(transformers, kind)()
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 64}
    written(tmp_path, kind, LLAMA | heads)
    config = json.loads((tmp_path / "config.json").read_text())
    needed = {
        *("model_type", "vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"),
        *("intermediate_size", "max_position_embeddings"),
    }
    least = {name: config[name] for name in needed}
    found = read_folder(tmp_path)
    bare = found.family.options(least)
    assert (bare.kv_heads, bare.width) == (theirs.num_key_value_heads, 2)
    assert bare.norm_eps == theirs.rms_norm_eps and bare.rope_theta == 10_000
    assert bare.tie == theirs.tie_word_embeddings and bare.dropout == theirs.attention_dropout
    assert with_bias(bare) == ({True, False} if kind == "Qwen2Config" else {False})
    assert found.options == bare
