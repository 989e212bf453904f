"""Damaged and unsupported Hugging Face folders: one message each, which names file and reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.advice import advises
from test_gpt import VARIANTS, small

from fedgpt.core.errors import FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.model.hf import export_model, import_model, load_model
from fedgpt.model.hf_folder import read_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WTE = "transformer.wte.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in one file, without the checksum that only fedgpt's own exports have."""
    export_model(tmp_path, small())
    (tmp_path / "SHA256SUMS").unlink()
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in two files and an index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shard_of = {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(sorted(weights))}
    for shard in set(shard_of.values()):
        save_file({n: p for n, p in weights.items() if shard_of[n] == shard}, folder / shard)
    write_index(folder, shard_of)
    return folder


def write_index(folder: Path, shard_of: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def change(folder: Path, change_them) -> None:
    """Save the folder's weights again after `change_them(weights)`."""
    weights = load_file(folder / WEIGHTS)
    change_them(weights)
    save_file({name: p.contiguous() for name, p in weights.items()}, folder / WEIGHTS)


def config(folder: Path, **values: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


def refused(folder: Path, message: str) -> None:
    """Both the check without torch and the import refuse the folder, naming it, in one line."""
    for read in (read_folder, import_model):
        with pytest.raises(FedGPTError, match=message) as caught:
            read(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 548105171\n"
CONTENTS = {
    "Git LFS pointer": (
        POINTER.encode(),
        "is a Git LFS pointer.*fetch it with: git lfs pull",
    ),
    "empty": (b"", "is empty"),
    "text": (b"This file was here once.\n" * 9, "is damaged: .*eader"),
    "git-annex pointer": (
        b"/annex/objects/MD5E-s1--a\n",
        "is a git-annex pointer.*fetch it with: git annex get",
    ),
    "web page": (
        b"<!DOCTYPE html><html><body>404</body></html>",
        "is a web page or XML; fetch the file again",
    ),
    "zip of torch.save": (b"PK\x03\x04" + bytes(400), "is damaged: .*eader"),
    "header longer than the file": ((10**6).to_bytes(8, "little") + b"{", "is damaged: .*eader"),
    "header that is no JSON": ((4).to_bytes(8, "little") + b"nope", "is damaged: .*eader"),
    "header that is too short": (b"\x01\x02", "is damaged: .*eader"),
    "dtype with a line break": (
        (54).to_bytes(8, "little") + b'{"a":{"dtype":"F\\n7","shape":[],"data_offsets":[0,0]}}',
        "is damaged: .*unknown variant `F 7`",
    ),
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("file", [WEIGHTS, "b.safetensors"])
def test_a_file_that_is_not_the_weights_is_refused(request, file, content, message):
    folder = request.getfixturevalue("folder" if file == WEIGHTS else "sharded")
    (folder / file).write_bytes(content)
    refused(folder, f"{file} {message}")


def test_a_file_that_was_cut_off_is_refused(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for kept in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:kept])
        refused(folder, f"{WEIGHTS} is damaged")
    (folder / WEIGHTS).write_bytes(whole + b"more")
    refused(folder, f"{WEIGHTS} is damaged")


def test_a_git_lfs_pointer_in_place_of_the_config_or_the_index_is_reported(sharded):
    index = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(POINTER)
    refused(sharded, "index.json is a Git LFS pointer")
    with pytest.raises(FedGPTError) as caught:
        import_model(sharded)
    advises(caught.value, "the file itself is elsewhere; fetch it with")
    (sharded / INDEX).write_text(index)  # as the command does
    import_model(sharded)
    (sharded / "config.json").write_text(POINTER)
    refused(sharded, "config.json is a Git LFS pointer")


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_model_is_read_after_a_web_page_or_a_link_of_git_annex_is_replaced(folder, file):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(b"\n<html><body>404 Not Found</body></html>")
    refused(folder, f"{file} is a web page or XML")
    with pytest.raises(FedGPTError) as caught:
        import_model(folder)
    advises(caught.value, "is a web page or XML; fetch the file again")
    (folder / file).unlink()
    (folder / file).symlink_to("../.git/annex/objects/Mk/3w/MD5E-s1--a/MD5E-s1--a")
    refused(folder, f"{file} is a git-annex pointer.*fetch it with: git annex get")
    (folder / file).unlink()
    (folder / file).write_bytes(content)  # as both commands do
    import_model(folder)


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def put_a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def put_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("file", [WEIGHTS, INDEX, "a.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("put", "message"),
    [
        (put_a_folder, "is not a file"),
        (put_a_pipe, "is not a file"),
        (put_a_loop, "cannot be read: Too many levels of symbolic links"),
        (put_a_broken_link, "cannot be read: No such file"),
    ],
)
def test_a_path_that_is_no_file_is_refused(request, file, put, message):
    folder = request.getfixturevalue("folder" if file == WEIGHTS else "sharded")
    put(folder / file)
    refused(folder, f"{file} {message}")


def test_weights_that_are_damaged_after_their_headers_were_read_are_refused(folder):
    """A run reads them when its options, its text and its tokenizer are known to fit."""
    found = read_folder(folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(FedGPTError, match=f"{folder}/{WEIGHTS} is damaged"):
        load_model(found)
    (folder / WEIGHTS).unlink()
    with pytest.raises(FedGPTError, match=f"{folder}/{WEIGHTS} is damaged"):
        load_model(found)


def test_a_file_that_cannot_be_mapped_is_refused(folder):
    """safetensors maps a file into memory, which is not possible for one in /proc."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/proc/self/maps")
    refused(folder, f"{WEIGHTS} is damaged: .*os error")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "."])
def test_a_file_that_may_not_be_read_is_refused(folder, file):
    """As another user than root, who may read every file."""
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    (folder / file).chmod(0)
    program = (
        "import os; from fedgpt.model.hf_folder import read_folder;"
        f"os.setgroups([]); os.setegid(65534); os.seteuid(65534); read_folder({str(folder)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    last = done.stderr.splitlines()[-1]
    what = "config.json" if file == "." else file
    assert re.search(rf"FedGPTError: \S*{what} cannot be read: Permission denied", last), last


def test_a_model_in_pickle_alone_is_refused_with_the_file_and_what_to_do(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    advised = r"save with save_pretrained\(\.\.\.\) anew"
    refused(folder, rf"safetensors is missing.*pytorch_model\.bin is pickle\), {advised}")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config.from_pretrained(folder)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    import_model(folder)


INDEXES = {
    "cut": (lambda text: text[:40], r"index\.json is damaged: .*char "),
    "empty": (lambda text: "", r"index\.json is empty"),
    "a list": (lambda text: "[1]", r"index\.json is damaged: it has a list, not an object"),
    "no map": (lambda text: "{}", r"index\.json is damaged: weight_map is missing"),
    "an empty map": (lambda text: '{"weight_map": {}}', "weight_map is missing, empty"),
    "a list of names": (lambda text: '{"weight_map": ["a"]}', "weight_map is missing, empty or no"),
    "a number for a name": (lambda text: '{"weight_map": {"a": 5}}', "weight_map has 5 for a file"),
    "no name": (lambda text: '{"weight_map": {"a": ""}}', "weight_map has '' for a file's name"),
    "nested too deeply": (lambda text: '{"a":' * 10**5, r"index\.json is damaged: .*recursion"),
    "other encoding": (lambda text: text.encode("utf-16"), r"index\.json is damaged: .*codec"),
}


@pytest.mark.parametrize(("damage", "message"), INDEXES.values(), ids=INDEXES.keys())
def test_a_damaged_index_is_refused(sharded, damage, message):
    damaged = damage((sharded / INDEX).read_text())
    (sharded / INDEX).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    refused(sharded, message)


def test_an_index_that_does_not_fit_its_files_is_refused(sharded):
    good = weight_map(sharded)
    write_index(sharded, good | {WTE: "c.safetensors"})
    refused(sharded, r"index\.json: 'c\.safetensors' is missing")
    for strange in ("\0", "\ud800", "x" * 300 + ".safetensors"):
        write_index(sharded, good | {WTE: strange})
        refused(sharded, r"index\.json: .* is missing|cannot be read: File name too long")
    for outside in ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors"):
        write_index(sharded, good | {WTE: outside})
        refused(sharded, rf"index\.json: '{outside}' is outside the folder")
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[good[WTE]]
    write_index(sharded, good | {WTE: other})
    refused(sharded, rf"index\.json: '{WTE}' is not in {other}")
    write_index(sharded, good | {"transformer.more": good[WTE]})
    refused(sharded, r"index\.json: 'transformer\.more' is not in ")
    write_index(sharded, good)
    both = load_file(sharded / other) | {WTE: load_file(sharded / good[WTE])[WTE]}
    save_file(both, sharded / other)
    refused(sharded, rf"index\.json: '{WTE}' is in both a\.safetensors and b\.safetensors")


def test_files_in_a_folder_below_are_read(sharded):
    expected = flatten(import_model(sharded))[1]
    (sharded / "parts").mkdir()
    for name in "ab":
        (sharded / f"{name}.safetensors").rename(sharded / "parts" / f"{name}.safetensors")
    write_index(sharded, {name: f"parts/{shard}" for name, shard in weight_map(sharded).items()})
    assert torch.equal(flatten(import_model(sharded))[1], expected)


def test_one_file_comes_before_an_index_as_in_transformers(sharded):
    transformers = pytest.importorskip("transformers")
    other = small()
    other.init_weights(7)
    export_model(sharded, other)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    assert torch.equal(theirs.transformer.wte.weight, other.lm_head.weight)
    assert torch.equal(import_model(sharded).lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [WTE, "transformer.h.1.mlp.c_proj.bias"])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_s_name(folder, name, value):
    change(folder, lambda weights: weights[name].view(-1).__setitem__(3, value))
    read_folder(folder)  # which reads no weights
    with pytest.raises(FedGPTError, match=rf"safetensors: {re.escape(name)} has values that are"):
        import_model(folder)


def test_weights_beyond_float32_are_refused_with_the_tensor_s_name(folder):
    def to_double(weights):
        weights[WTE] = weights[WTE].double() * 1e300

    change(folder, to_double)
    with pytest.raises(FedGPTError, match=rf"safetensors: {WTE} has values that are not finite"):
        import_model(folder)


@pytest.mark.parametrize(
    ("theirs", "extra"),
    [
        ("_orig_mod.{}", "_orig_mod."),
        ("module.{}", "module."),
        ("_fsdp_wrapped_module.{}", "_fsdp_wrapped_module."),
        ("model.{}", "model."),
        ("base_model.model.{}", "base_model.model."),
    ],
)
def test_names_with_the_prefix_of_a_wrapper_are_reported_with_what_to_do(folder, theirs, extra):
    expected = flatten(import_model(folder))[1]

    def rename(weights):
        for name in list(weights):
            weights[theirs.format(name)] = weights.pop(name)
        weights[theirs.format("transformer.h.0.attn.bias")] = torch.ones(1, 1, 16, 16)

    change(folder, rename)
    refused(folder, rf"the names fit without '{re.escape(extra)}', which a wrapper")
    with pytest.raises(FedGPTError) as caught:
        import_model(folder)
    advises(
        caught.value,
        "save the model that is inside, or rename the tensors (with safetensors.torch:"
        f" save_file({{n.replace({extra!r}, ''): p for n, p in load_file(f).items()}}, f,"
        " {'format': 'pt'}))",
    )
    (remedy,) = re.findall(r"save_file\(.*?'pt'\}\)", str(caught.value))
    script = "import sys\nfrom safetensors.torch import load_file, save_file\nf = sys.argv[1]\n"
    subprocess.run([sys.executable, "-c", script + remedy, folder / WEIGHTS], check=True)
    assert torch.equal(flatten(import_model(folder))[1], expected)


def test_a_part_that_a_wrapper_added_in_the_middle_is_reported(folder):
    def rename(weights):
        for name in list(weights):
            if ".h.1." in name:
                weights[name.replace(".h.1.", ".h.1._checkpoint_wrapped_module.")] = weights.pop(
                    name
                )

    change(folder, rename)
    refused(folder, "the names fit without '_checkpoint_wrapped_module.'")


def test_names_that_do_not_fit_are_listed_without_a_false_remedy(folder):
    change(folder, lambda weights: weights.pop(WTE))
    refused(folder, r"missing \['transformer\.wte\.weight'\], unexpected \[\]$")
    change(folder, lambda weights: weights.update({"transformer.wtf.weight": torch.ones(1)}))
    refused(folder, r"missing \['transformer\.wte.*unexpected \['transformer\.wtf\.weight'\]$")


def test_one_parameter_under_two_names_is_refused(folder):
    change(folder, lambda weights: weights.update({"wte.weight": torch.ones(23, 32)}))
    refused(folder, r"(\S+) and (\S+) are the same parameter")


def test_a_head_that_differs_from_the_embedding_to_which_it_is_tied_is_refused(folder):
    """transformers reads such a file as two matrices."""
    change(folder, lambda weights: weights.update({"lm_head.weight": weights[WTE].clone()}))
    import_model(folder)
    change(folder, lambda weights: weights["lm_head.weight"].mul_(2))
    with pytest.raises(FedGPTError, match=r"lm_head\.weight differs from the embedd") as caught:
        import_model(folder)
    advises(caught.value, "(tie_word_embeddings=true); set it to false")
    config(folder, tie_word_embeddings=False)
    assert not import_model(folder).options.tie


CONFIGS = {
    "other type": ({"n_layer": "2"}, "n_layer='2': must be a whole number"),
    "true for a number": ({"n_head": True}, "n_head=True: must be a whole number"),
    "a fraction": ({"n_embd": 32.0}, r"n_embd=32\.0: must be a whole number"),
    "null": ({"n_positions": None}, "n_positions=None: must be a whole number"),
    "negative": ({"n_layer": -1}, r"n_layer=-1: must be at least 1"),
    "zero": ({"n_positions": 0}, r"n_positions=0: must be at least 1"),
    "no tokens": ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
    "a fraction of a token": ({"vocab_size": 23.9}, r"vocab_size=23\.9: must be a whole number"),
    "huge": ({"n_layer": 10**4}, "it has 28 tensors for 10000 layers"),
    "beyond all": ({"n_layer": 10**12}, "model.n_layer=1000000000000: must be at most 10000"),
    "huge width": ({"n_embd": 4 * 10**5}, r"has shape .*, config\.json says \(23, 400000\)"),
    "rate of a text": ({"resid_pdrop": "0.1"}, "resid_pdrop='0.1': must be a number"),
    "rate of NaN": (
        dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), float("nan")),
        "dropout=nan",
    ),
    "rate above 1": (dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 1.5), "dropout=1"),
    "list": ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\]: must be a text"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
    "eps": ({"layer_norm_epsilon": "1e-05"}, "layer_norm_epsilon='1e-05': must be a number"),
    "kind": ({"model_type": ["gpt2"]}, r"model_type=\['gpt2'\] is not supported; allowed are gpt2"),
    "unknown": ({"model_type": "mamba"}, "model_type='mamba' is not supported; allowed are gpt2"),
    "quantised": ({"quantization_config": {"bits": 8}}, "quantization_config: save the model in"),
}


def test_a_quantised_model_is_read_after_it_is_saved_as_the_message_advises(folder):
    config(folder, quantization_config={"bits": 8})
    change(folder, lambda weights: weights.update({WTE: weights[WTE].to(torch.int8)}))
    with pytest.raises(FedGPTError) as caught:
        import_model(folder)
    advises(caught.value, "save the model in float32, float16 or bfloat16")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        export_model(folder, small())
        (folder / "SHA256SUMS").unlink()
        change(folder, lambda weights, to=dtype: weights.update({WTE: weights[WTE].to(to)}))
        import_model(folder)


@pytest.mark.parametrize(("values", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_with_wrong_values_is_refused(folder, values, message):
    config(folder, **values)
    refused(folder, message)


def test_a_name_that_stands_twice_in_a_config_is_refused(folder):
    path = folder / "config.json"
    good = path.read_text()
    layers = json.loads(good)["n_layer"]
    for more in (layers, layers + 1):
        path.write_text(good.replace('"n_layer":', f'"n_layer": {more}, "n_layer":', 1))
        refused(folder, r"config\.json is damaged: the name 'n_layer' stands twice in it")
    path.write_text(good)
    import_model(folder)


# names in config.json -> our option, which is named if the value has the right type
OUR_NAMES = {
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "attention_dropout": "dropout",
}


@pytest.mark.parametrize("variant", ["rotary", "rotary, rmsnorm, no bias", "llama", "qwen2"])
def test_a_config_with_wrong_types_is_refused_in_every_family(tmp_path, variant):
    export_model(tmp_path, small(**VARIANTS[variant]))
    good = json.loads((tmp_path / "config.json").read_text())
    ignored = {"architectures", "initializer_range", "dtype", "torch_dtype"}
    for name in sorted(good.keys() - ignored):
        if name.endswith("token_id"):
            continue
        for wrong in ("x", [1], {"a": 1}, -1):
            (tmp_path / "config.json").write_text(json.dumps(good | {name: wrong}))
            refused(tmp_path, f"{name}|model.{OUR_NAMES.get(name, name)}=-1")
    for rope in ("linear", [1], 3):
        (tmp_path / "config.json").write_text(json.dumps(good | {"rope_scaling": rope}))
        if good["model_type"] != "fedgpt":
            refused(tmp_path, "rope_scaling=.*: must be a mapping")


def test_each_missing_key_of_a_config_is_named(folder):
    good = json.loads((folder / "config.json").read_text())
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in good.items() if key != name})
        )
        refused(folder, f"config.json is not supported: {name} is missing")


def without(folder: Path, *names: str) -> None:
    """Leave these keys out of config.json."""
    good = json.loads((folder / "config.json").read_text())
    assert set(names) <= good.keys()
    left = {key: value for key, value in good.items() if key not in names}
    (folder / "config.json").write_text(json.dumps(left))


def test_what_a_gpt2_config_leaves_out_is_what_transformers_assumes(tmp_path):
    theirs = pytest.importorskip("transformers").GPT2Config()
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    assert (theirs.activation_function, theirs.tie_word_embeddings) == ("gelu_new", True)
    assert [getattr(theirs, name) for name in rates] == [0.1] * 3
    export_model(tmp_path, small(positions="learned", gelu="exact", dropout=0.5))
    without(tmp_path, "activation_function", "tie_word_embeddings", *rates)
    options = read_folder(tmp_path).options
    assert (options.gelu, options.tie, options.dropout) == ("tanh", True, 0.1)


def test_what_a_gpt_neox_config_leaves_out_is_what_transformers_assumes(tmp_path):
    theirs = pytest.importorskip("transformers").GPTNeoXConfig()
    assert theirs.use_parallel_residual and theirs.attention_bias and theirs.hidden_act == "gelu"
    assert not theirs.tie_word_embeddings and theirs.hidden_dropout == theirs.attention_dropout == 0
    model = small(positions="rotary", gelu="tanh", tie=False, dropout=0.5)
    export_model(tmp_path, model)
    good = (tmp_path / "config.json").read_text()
    without(tmp_path, "intermediate_size")
    refused(tmp_path, rf"config\.json says \({theirs.intermediate_size}, 32\)")
    (tmp_path / "config.json").write_text(good)
    without(tmp_path, "use_parallel_residual", "rotary_pct", "rotary_emb_base")
    options = read_folder(tmp_path).options
    assert options.parallel_residual and options.partial_rotary_factor == 0.25
    assert options.rope_theta == 10_000
    (tmp_path / "config.json").write_text(good)
    left_out = ("tie_word_embeddings", "hidden_dropout", "attention_dropout", "hidden_act")
    without(tmp_path, *left_out, "attention_bias")
    options = read_folder(tmp_path).options
    assert (options.gelu, options.tie, options.dropout) == ("exact", False, 0.0) and options.bias


def test_weights_of_an_export_that_changed_are_refused(tmp_path):
    export_model(tmp_path, small())
    import_model(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-2] ^= 1  # still a finite number
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(FedGPTError, match=r"is damaged: its sha256 is not in SHA256S") as caught:
        import_model(tmp_path)
    advises(
        caught.value,
        "copy the folder again, or delete SHA256SUMS if you replaced the weights yourself",
    )
    (tmp_path / "SHA256SUMS").unlink()
    import_model(tmp_path)
    export_model(tmp_path, small())  # as a copy has the same weights again
    import_model(tmp_path)


def test_shards_are_compared_with_the_checksums_too(sharded):
    """An export that was saved again in shards still has the checksum of the one file."""
    sums = sharded / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  {WEIGHTS}\n")
    with pytest.raises(FedGPTError, match=r"/a\.safetensors is damaged: its sha256 is not in SHA"):
        import_model(sharded)
    command = ["sha256sum", "a.safetensors", "b.safetensors"]
    sums.write_bytes(subprocess.check_output(command, cwd=sharded))
    import_model(sharded)
    weights = load_file(sharded / "b.safetensors")
    save_file({name: p + 1 for name, p in weights.items()}, sharded / "b.safetensors")
    with pytest.raises(FedGPTError, match=r"/b\.safetensors is damaged: its sha256 is not in SHA"):
        import_model(sharded)


def test_the_checksum_of_an_export_is_what_sha256sum_checks(tmp_path):
    export_model(tmp_path, small())
    subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, check=True)


def test_a_folder_is_read_without_torch(folder):
    program = (
        "import sys; from fedgpt.model.hf_folder import read_folder;"
        f"read_folder({str(folder)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
