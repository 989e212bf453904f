"""Folders that transformers reads and writes; the same logits and gradients as its GPT-2."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gpt import VARIANTS, VOCAB, small, tokens

from fedgpt.core.errors import FedGPTError
from fedgpt.model.hf import export_model, import_model

transformers = pytest.importorskip("transformers")

GPT2_VARIANTS = {"tied": {}, "untied": {"tie": False}, "tanh": {"gelu": "tanh"}, "dropout": {"dropout": 0.2}}


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
        turned = grad.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else grad
        torch.testing.assert_close(p.grad, turned, rtol=1e-9, atol=1e-12)


def test_fp32_logits_equal_transformers(tmp_path):
    model = small().eval()
    export_model(tmp_path, model)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 16)), load(tmp_path)(tokens(2, 16)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [*VARIANTS.values(), *GPT2_VARIANTS.values()])
def test_round_trip_is_exact(tmp_path, change):
    model = small(**change)
    export_model(tmp_path, model, card="# A model\n", end_of_text=7)
    again = import_model(tmp_path)
    assert again.options == model.options
    assert again.vocab_size == VOCAB
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == 7
    assert (tmp_path / "README.md").read_text() == "# A model\n"


def test_bf16_round_trip_keeps_the_dtype(tmp_path):
    model = small().to(torch.bfloat16)
    export_model(tmp_path, model)
    again = import_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert again.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("tie", [True, False])
def test_reads_what_transformers_saves(tmp_path, tie):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tie, eos_token_id=0
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = import_model(tmp_path).eval()
    assert (model.options.gelu, model.options.tie, model.options.dropout) == ("tanh", tie, 0.1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 16)), theirs(tokens(2, 16)).logits, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    sharded = import_model(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(sharded.parameters(), model.parameters(), strict=True))


def test_reads_the_names_of_the_published_gpt2(tmp_path):
    model = small()
    export_model(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): p for name, p in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_file(bare, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(import_model(tmp_path).parameters(), model.parameters(), strict=True))


def test_tokenizer_goes_along(tmp_path):
    import tokenizers

    source = tmp_path / "tokenizer"
    source.mkdir()
    words = {"<|endoftext|>": 2, "a": 0, "b": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    export_model(tmp_path / "model", small(), tokenizer_folder=source, end_of_text=2)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs("a b b")["input_ids"] == [0, 1, 1]
    assert theirs.eos_token_id == 2
    with pytest.raises(FedGPTError, match="no tokenizer found"):
        export_model(tmp_path / "other", small(), tokenizer_folder=tmp_path / "model" / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported; allowed are gpt2 and fedgpt"),
        ({"activation_function": "relu"}, "activation_function='relu': must be one of"),
        ({"n_inner": 100}, "n_inner=100: must be 4"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06: must be 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True: must be False"),
        ({"resid_pdrop": 0.3}, "must be one rate"),
        ({"n_head": 5}, "must be a multiple of model.n_head=5"),
        ({"n_layer": 3}, r"missing \['transformer\.h\.2"),
        ({"n_layer": 1}, r"unexpected \['transformer\.h\.1"),
        ({"vocab_size": 24}, r"wte\.weight has shape \(23, 32\), config\.json says \(24, 32\)"),
    ],
)
def test_unsupported_folders_say_why(tmp_path, change, message):
    export_model(tmp_path, small())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FedGPTError, match=message):
        import_model(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FedGPTError, match=r"no config\.json"):
        import_model(tmp_path)
    export_model(tmp_path, small())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FedGPTError, match="only safetensors is read"):
        import_model(tmp_path)
