"""Folders that transformers reads and writes; logits and gradients of its GPT-2 and GPT-NeoX."""

import json
import os
import shutil
import subprocess
import sys
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gpt import VARIANTS, VOCAB, small, tokens

from fedgpt.core.errors import FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.core.options import TokenizerOptions
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.data.tokenizer_files import END
from fedgpt.model.generate import generate
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model, import_model

transformers = pytest.importorskip("transformers")

GPT2_VARIANTS = {
    "tied": {},
    "untied": {"tie": False},
    "tanh": {"gelu": "tanh"},
    "dropout": {"dropout": 0.2},
}
NEOX_VARIANTS = {
    "rotary": {},
    "untied": {"tie": False},
    "no bias": {"bias": False},
    "tanh, dropout": {"gelu": "tanh", "dropout": 0.2},
    "untied, no bias, tanh": {"tie": False, "bias": False, "gelu": "tanh"},
}
NEOX_VARIANTS = {name: {"positions": "rotary"} | change for name, change in NEOX_VARIANTS.items()}


def load(folder):
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    assert not any(report.values()), report
    return theirs.eval()


@pytest.mark.parametrize("change", GPT2_VARIANTS.values(), ids=GPT2_VARIANTS.keys())
def test_logits_and_gradients_equal_transformers(tmp_path, change):
    model = small(**change)
    export_model(tmp_path, model)
    theirs = load(tmp_path).double()
    model = model.double().eval()
    ids, targets = tokens(3, 12), tokens(3, 12, seed=1)
    logits = theirs(ids).logits
    torch.testing.assert_close(model(ids), logits, rtol=1e-10, atol=1e-12)

    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model.loss(ids, targets).backward()
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        grad = expected[name].grad
        turned = (
            grad.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else grad
        )
        torch.testing.assert_close(p.grad, turned, rtol=1e-9, atol=1e-12)


def test_fp32_logits_equal_transformers(tmp_path):
    model = small().eval()
    export_model(tmp_path, model)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens(2, 16)), load(tmp_path)(tokens(2, 16)).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("change", NEOX_VARIANTS.values(), ids=NEOX_VARIANTS.keys())
def test_rotary_models_equal_transformers(tmp_path, change):
    model = small(**change).eval()
    export_model(tmp_path, model)
    theirs = load(tmp_path)
    assert isinstance(theirs, transformers.GPTNeoXForCausalLM)
    for seed, time in enumerate((1, 7, 16)):  # 16 is block_size
        ids = tokens(3, time, seed)
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
        prompt, more = ids[:, :4], 16 - min(time, 4)
        text = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=more,
            do_sample=False,
            eos_token_id=None,
        )
        for row, expected in zip(prompt.tolist(), text.tolist(), strict=True):
            assert row + generate(model, row, more, temperature=0)[0] == expected


def test_rotary_gradients_equal_transformers(tmp_path):
    model = small(positions="rotary")
    export_model(tmp_path, model)
    theirs, model = load(tmp_path).double(), model.double().eval()
    ids, targets = tokens(3, 16), tokens(3, 16, seed=1)
    torch.nn.functional.cross_entropy(
        theirs(ids).logits.flatten(0, 1), targets.flatten()
    ).backward()
    model.loss(ids, targets).backward()
    layers = theirs.gpt_neox.layers
    for ours, other in zip(model.blocks, layers, strict=True):
        for a, b in (
            (ours.mlp.c_fc, other.mlp.dense_h_to_4h),
            (ours.attn.c_proj, other.attention.dense),
            (ours.ln_1, other.input_layernorm),
        ):
            torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-4, atol=1e-7)
        # (heads, q k v, width, channels)
        by_head = other.attention.query_key_value.weight.grad.view(4, 3, 8, 32)
        for part, grad in enumerate(ours.attn.c_attn.weight.grad.chunk(3)):
            torch.testing.assert_close(grad, by_head[:, part].reshape(32, 32), rtol=1e-4, atol=1e-7)


def test_rotary_config_says_what_gpt_neox_needs(tmp_path):
    export_model(
        tmp_path, small(positions="rotary", bias=False, gelu="tanh", dropout=0.2), end_of_text=7
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "hidden_act": "gelu_new",
        "hidden_dropout": 0.2,
        "attention_dropout": 0.2,
        "attention_bias": False,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
        "eos_token_id": 7,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (1.0, 10_000.0)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "gpt2"),
        ({"positions": "rotary"}, "gpt_neox"),
        ({"positions": "rotary", "bias": False}, "gpt_neox"),
        ({"bias": False}, "fedgpt"),
        ({"norm": "rmsnorm"}, "fedgpt"),
        ({"positions": "rotary", "norm": "rmsnorm"}, "fedgpt"),
        ({"n_kv_head": 2}, "fedgpt"),
        ({"positions": "rotary", "mlp_bias": False}, "fedgpt"),
        (VARIANTS["pythia"], "gpt_neox"),
        (VARIANTS["llama"], "llama"),
        (VARIANTS["llama"] | {"bias": True, "mlp_bias": False}, "llama"),
        (VARIANTS["llama"] | {"partial_rotary_factor": 0.5}, "fedgpt"),
        (VARIANTS["llama"] | {"bias": True, "qkv_bias": False}, "fedgpt"),
        (VARIANTS["qwen2"], "qwen2"),
        (VARIANTS["qwen2"] | {"mlp_bias": True}, "fedgpt"),
        (VARIANTS["qwen2"] | {"parallel_residual": True}, "fedgpt"),
    ],
)
def test_model_type_follows_the_architecture(tmp_path, change, kind):
    export_model(tmp_path, small(**change))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind


@pytest.mark.parametrize(
    "change", [*VARIANTS.values(), *GPT2_VARIANTS.values(), *NEOX_VARIANTS.values()]
)
def test_round_trip_is_exact(tmp_path, change):
    model = small(**change)
    export_model(tmp_path, model, card="# A model\n", end_of_text=7)
    again = import_model(tmp_path)
    assert again.options == model.options
    assert again.vocab_size == VOCAB
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert torch.equal(flatten(again)[1], flatten(model)[1])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 7
    assert (tmp_path / "README.md").read_text() == "# A model\n"


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_bf16_export_is_read_in_float32_without_a_change(tmp_path, positions):
    model = small(positions=positions).to(torch.bfloat16)
    export_model(tmp_path, model)
    assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    again = import_model(tmp_path)
    assert all(
        torch.equal(a, b.float())
        for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):  # the second is for transformers before 4.56
        one = {key: value for key, value in config.items() if "dtype" not in key or key == name}
        (tmp_path / "config.json").write_text(json.dumps(one))
        assert transformers.AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


MIXED = {
    "bf16 first": [torch.bfloat16, torch.float32],
    "bf16 second": [torch.float32, torch.bfloat16],
    "fp16 and fp32": [torch.float16, torch.float32],
    "fp64": [torch.float64],
    "all four": [torch.bfloat16, torch.float32, torch.float64, torch.float16],
}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtypes", MIXED.values(), ids=MIXED.keys())
def test_each_tensor_keeps_its_own_precision_as_in_transformers(
    tmp_path, dtypes, shards, positions
):
    export_model(tmp_path, small(positions=positions))
    weights = {
        name: torch.randn(p.shape, dtype=torch.float64).to(dtypes[number % len(dtypes)])
        for number, (name, p) in enumerate(load_file(tmp_path / "model.safetensors").items())
    }
    save_again(tmp_path, weights, shards)
    found = dict(import_model(tmp_path).named_parameters())
    export_model(tmp_path / "again", import_model(tmp_path))
    again = load_file(tmp_path / "again" / "model.safetensors")
    theirs = {name: p for name, p in load(tmp_path).state_dict().items() if name in weights}
    assert {p.dtype for p in found.values()} == {torch.float32}
    for name, p in weights.items():
        assert torch.equal(again[name], p.float())
    assert theirs and all(torch.equal(again[name], p) for name, p in theirs.items())


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_ordinary_numbers_are_refused(tmp_path, kind):
    export_model(tmp_path, small())
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].to(kind)
    save_again(tmp_path, weights)
    with pytest.raises(FedGPTError, match=r"wpe\.weight has dtype \w+; allowed are F64, F32, F16"):
        import_model(tmp_path)


def save_again(folder, weights, shards=1):
    """Weights in another file or files, as a user would save them."""
    for name in ("model.safetensors", "SHA256SUMS"):
        (folder / name).unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    shard_of = {name: f"part-{n * shards // len(weights)}" for n, name in enumerate(weights)}
    for shard in set(shard_of.values()):
        part = {name: p for name, p in weights.items() if shard_of[name] == shard}
        save_file(part, folder / f"{shard}.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {name: f"{shard}.safetensors" for name, shard in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))


@pytest.mark.parametrize("tie", [True, False])
def test_reads_what_transformers_saves(tmp_path, tie):
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tie,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = import_model(tmp_path).eval()
    assert (model.options.gelu, model.options.tie, model.options.dropout) == ("tanh", tie, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens(2, 16)), theirs(tokens(2, 16)).logits, rtol=1e-5, atol=1e-5
        )
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    sharded = import_model(tmp_path / "shards")
    assert all(
        torch.equal(a, b) for a, b in zip(sharded.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_reads_what_transformers_saves_of_gpt_neox(tmp_path, tie, bias):
    export_model(tmp_path / "ours", small(positions="rotary", tie=tie, bias=bias))
    load(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = import_model(tmp_path / "theirs")
    assert again.options == small(positions="rotary", tie=tie, bias=bias).options
    assert torch.equal(flatten(again)[1], flatten(import_model(tmp_path / "ours"))[1])


def test_the_head_of_gpt_neox_is_read_under_both_of_its_names(tmp_path):
    """Its module is called lm_head since transformers 5, whose files still say embed_out."""
    model = small(positions="rotary", tie=False)
    export_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("embed_out.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "SHA256SUMS").unlink()
    assert torch.equal(import_model(tmp_path).lm_head.weight, model.lm_head.weight)
    assert torch.equal(load(tmp_path).get_output_embeddings().weight, model.lm_head.weight)


def test_old_gpt_neox_buffers_are_skipped_and_mlp_biases_are_not(tmp_path):
    model = small(positions="rotary", bias=False)
    export_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    layer = "gpt_neox.layers.1."
    buffers = {
        "attention.bias": torch.ones(1, 1, 16, 16).bool(),
        "attention.rotary_emb.inv_freq": torch.ones(4),
    }
    save_again(tmp_path, weights | {layer + name: p for name, p in buffers.items()})
    assert torch.equal(flatten(import_model(tmp_path))[1], flatten(model)[1])
    weights[layer + "mlp.dense_4h_to_h.bias"][3] = 1.0
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        FedGPTError,
        match=r"layers\.1\.mlp\.dense_4h_to_h\.bias must be 0 where attention_bias is false",
    ):
        import_model(tmp_path)


def test_reads_the_names_of_the_published_gpt2(tmp_path):
    model = small()
    export_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): p for name, p in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_again(tmp_path, bare)
    assert all(
        torch.equal(a, b)
        for a, b in zip(import_model(tmp_path).parameters(), model.parameters(), strict=True)
    )


@pytest.fixture
def exported(tmp_path):
    """A folder with the model and the tokenizer of a run; its context is 16 tokens."""
    ours = make_tokenizer(TokenizerOptions(name="bytes"), [])
    export_model(tmp_path, GPT(small().options, ours.vocab_size))
    ours.save(tmp_path, length=16)
    return tmp_path


def test_transformers_cuts_a_long_text_to_the_length_of_the_model(exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    assert theirs.model_max_length == 16
    ids = theirs("a text that is longer than the context", truncation=True, return_tensors="pt")
    assert ids["input_ids"].shape == (1, 16)
    assert load(exported)(**ids).logits.shape == (1, 16, 257)


def test_transformers_pads_a_batch_with_the_end_token(exported):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    batch = theirs(["a", "river stone"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == [97] + [256] * 10
    assert batch["attention_mask"].sum(1).tolist() == [1, 11]
    model = load(exported)
    assert model.config.pad_token_id == theirs.pad_token_id == 256
    one = model(**theirs("a", return_tensors="pt")).logits
    torch.testing.assert_close(model(**batch).logits[0, :1], one[0])


def test_the_pipeline_of_transformers_stops_at_the_end_of_the_context(exported):
    pipeline = transformers.pipeline("text-generation", model=str(exported))
    (text,) = pipeline("The", do_sample=False, return_tensors=True)
    assert 3 < len(text["generated_token_ids"]) <= 16
    long = pipeline("x" * 40, handle_long_generation="hole", max_new_tokens=5, return_tensors=True)
    assert len(long[0]["generated_token_ids"]) <= 16


def test_a_second_export_leaves_nothing_of_the_first_in_force(tmp_path):
    """A changed model in the same folder is read again, and its checksum is the new one."""
    export_model(tmp_path, small())
    other = small()
    other.init_weights(5)
    export_model(tmp_path, other)
    assert torch.equal(flatten(import_model(tmp_path))[1], flatten(other)[1])


def test_an_export_that_cannot_write_changes_no_model(tmp_path):
    export_model(tmp_path, small())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(OSError):
        export_model(tmp_path, GPT(small().options, 99))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_export_that_is_killed_leaves_a_whole_model_or_none(tmp_path):
    """The other model has the same shapes and other heads, so that its config.json would fit."""
    ours = make_tokenizer(TokenizerOptions(name="bytes"), [])
    models = {n: GPT(small(positions="learned", n_head=n).options, ours.vocab_size) for n in (2, 4)}
    for heads, model in models.items():
        model.init_weights(heads)
        ours.save(tmp_path / str(heads))
        export_model(tmp_path / str(heads), model)
    ours.save(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "2", tmp_path / "left")
    command = [sys.executable, "-m", "support.stopped_export"]
    command += [str(tmp_path / name) for name in ("left", "4", "tokenizer")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    stopped = sorted(tmp_path.glob("left-*"), key=lambda path: int(path.name[5:]))
    whole = [loaded_by_both(folder, models) for folder in stopped]
    assert [heads for heads, _ in groupby(whole)] == [2, None, 4], whole
    left = [folder for folder in stopped if list(folder.glob(".*"))]
    assert len(left) > 3, "kill -9 leaves temporary files"
    for folder in left:
        export_model(folder, models[4])
        assert not list(folder.glob(".*"))


def loaded_by_both(folder, models) -> int | None:
    """The number of heads of the model that fedgpt and transformers read; None if neither does."""
    try:
        found = import_model(folder)
    except FedGPTError as error:
        assert "no config.json" in str(error)
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        return None
    heads = found.options.n_head
    assert torch.equal(flatten(found)[1], flatten(models[heads])[1])
    assert (folder / "tokenizer.json").is_file()
    assert load(folder).config.n_head == heads
    return heads


@pytest.mark.parametrize("change", [{}, {"positions": "rotary"}], ids=["gpt2", "gpt_neox"])
def test_our_tokenizer_reads_the_same_in_transformers(tmp_path, change):
    ours = make_tokenizer(
        TokenizerOptions(name="bpe", vocab_size=300), ["the cat sat on the mat, naïve\n"] * 9
    )
    export_model(tmp_path / "model", small(**change), end_of_text=ours.end)
    ours.save(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("the cat sat", "  two  spaces\n\n", "na\u00efve cafe\u0301 \u2603"):
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (END, ours.end)
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "'mamba' is not supported; allowed are gpt2, gpt_neox, llama, qwen2 and fedgpt",
        ),
        ({"activation_function": "relu"}, "activation_function='relu': must be one of"),
        ({"n_inner": 100}, r"c_fc\.weight has shape \(32, 128\), config\.json says \(32, 100\)"),
        ({"layer_norm_epsilon": 2}, "model.norm_eps=2.0: must be above 0 and at most 1"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True: must be False",
        ),
        ({"resid_pdrop": 0.3}, "must be one rate"),
        ({"n_head": 5}, "must be a multiple of model.n_head=5"),
        ({"n_layer": 3}, r"missing \['transformer\.h\.2"),
        ({"n_layer": 1}, r"unexpected \['transformer\.h\.1"),
        ({"vocab_size": 24}, r"wte\.weight has shape \(23, 32\), config\.json says \(24, 32\)"),
    ],
)
def test_unsupported_folders_are_refused_with_the_reason(tmp_path, change, message):
    export_model(tmp_path, small())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedGPTError, match=message):
        import_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_parallel_residual": 1}, "use_parallel_residual=1: must be true or false"),
        ({"rotary_pct": 0.1}, r"factor=0\.1: rotates 0 of the 8 channels of a head"),
        ({"rotary_pct": 0.4}, r"factor=0\.4: rotates 3 of the 8 channels of a head, .* try 0\.5$"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rotary_emb_base='big': must be a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling has rope_type='linear'",
        ),
        ({"intermediate_size": 64}, r"has shape \(128, 32\), config\.json says \(64, 32\)"),
        ({"hidden_act": "relu"}, "hidden_act='relu': must be one of"),
        ({"hidden_dropout": 0.3}, "hidden_dropout and attention_dropout are .*: must be one rate"),
        ({"num_hidden_layers": 3}, r"missing \['gpt_neox\.layers\.2.*unexpected \[\]$"),
        (
            {"num_attention_heads": 1, "hidden_size": 34, "intermediate_size": 136},
            r"has shape \(\d+, 32\), config\.json says \(\d+, 34\)",
        ),
    ],
)
def test_unsupported_gpt_neox_folders_are_refused_with_the_reason(tmp_path, change, message):
    export_model(tmp_path, small(positions="rotary"))
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedGPTError, match=message):
        import_model(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json is damaged"),
        ("[1]", "damaged: it has a list, not an object"),
        ("null", "damaged: it has null, not an object"),
        ("3", "damaged: it has a number, not an object"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "damaged: it has a number of 5,000 digits$"),
        ("1" * 4001, "damaged: it has a number of 4,001 digits$"),
    ],
)
def test_a_config_that_is_not_a_mapping_is_refused(tmp_path, text, message):
    export_model(tmp_path, small())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FedGPTError, match=message):
        import_model(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FedGPTError, match=r"no config\.json"):
        import_model(tmp_path)
    export_model(tmp_path, small())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FedGPTError, match="only safetensors is read"):
        import_model(tmp_path)
