"""Which folders `init_from` takes: the tokenizer, and the refusals before any text is read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.advice import advises
from support.refused import problems as refused

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions, RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import Tokenizer, make_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.storage.init_from import check_tokenizer, init_from_problems, read_start

BYTES = make_tokenizer(TokenizerOptions("bytes"), [])
BPE = TokenizerOptions("bpe", 300)
ENGLISH = (
    "the quick brown fox jumps over 2026 lazy dogs, don't you see? In 2026 the cat sat on the mat"
    " and the rat sat on the cat; a wizard's job is to vex chumps quickly\n    in fog\n"
)
OURS = make_tokenizer(BPE, [ENGLISH] * 9)
OTHER = make_tokenizer(BPE, ["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter\n"] * 9)
MODEL = ModelOptions(n_layer=1, n_head=2, n_embd=16, block_size=8, positions="learned")
SHAPE = [f"model.{name}={getattr(MODEL, name)}" for name in ("n_layer", "n_head", "n_embd")]
SHAPE += ["model.block_size=8", "model.positions=learned"]


def exported(folder: Path, tokenizer: Tokenizer | None, vocab_size: int = 0) -> RunOptions:
    """A folder with a model, and the options of a run that starts from it."""
    size = vocab_size or (tokenizer.vocab_size if tokenizer else OURS.vocab_size)
    export_model(folder, GPT(MODEL, size))
    if tokenizer is not None:
        tokenizer.save(folder)
    return RunOptions(init_from=str(folder), model=MODEL, tokenizer=BPE)


def two_files(folder: Path, tokenizer: Tokenizer, **settings: object) -> None:
    """vocab.json and merges.txt, as GPT-2 is published, instead of tokenizer.json."""
    parsed = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = parsed["model"]["vocab"] | {"<|endoftext|>": tokenizer.end}
    merges = "\n".join(" ".join(merge) for merge in parsed["model"]["merges"])
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "GPT2Tokenizer", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def problem(o: RunOptions, tokenizer: Tokenizer = OURS) -> str:
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(o, tokenizer)
    (found,) = caught.value.problems
    assert found.startswith(f"init_from={o.init_from}: ")
    return found


def test_the_same_tokenizer_is_taken_in_either_form(tmp_path):
    o = exported(tmp_path, OURS)
    check_tokenizer(o, OURS)
    two_files(tmp_path, OURS)
    check_tokenizer(o, OURS)


def test_another_tokenizer_of_the_same_size_is_refused_in_either_form(tmp_path):
    assert OTHER.vocab_size == OURS.vocab_size
    o = exported(tmp_path, OTHER)
    assert "has another tokenizer" in problem(o)
    two_files(tmp_path, OTHER)
    assert "has another tokenizer" in problem(o)


def test_a_bytes_model_for_a_bpe_run_is_refused_before_text_is_read(tmp_path):
    o = exported(tmp_path, BYTES)
    (found,) = init_from_problems(o)
    assert found.startswith(f"init_from={tmp_path}: its tokenizer is bytes, this run's is bpe; ")
    advises(found, "set tokenizer=bytes")
    assert not list(init_from_problems(replace(o, tokenizer=TokenizerOptions("bytes"))))


def test_a_bpe_model_for_a_bytes_run_is_refused_before_text_is_read(tmp_path):
    o = replace(exported(tmp_path, OURS), tokenizer=TokenizerOptions("bytes"))
    (found,) = init_from_problems(o)
    advises(found, f"set tokenizer=hf tokenizer.path={tmp_path}")
    assert "has another tokenizer; " in found
    theirs = replace(o, tokenizer=TokenizerOptions("hf", path=str(tmp_path)))
    assert not list(init_from_problems(theirs))
    check_tokenizer(theirs, make_tokenizer(theirs.tokenizer, ()))
    byte_run = exported(tmp_path / "bytes", BYTES)
    for options in (TokenizerOptions("bytes"), TokenizerOptions("hf", path=byte_run.init_from)):
        both = replace(byte_run, tokenizer=options)
        assert not list(init_from_problems(both))
        check_tokenizer(both, BYTES)


def test_a_folder_without_a_tokenizer_is_taken_for_bytes_only(tmp_path):
    o = exported(tmp_path, None)
    found = problem(o)
    assert "has no tokenizer, so its token ids may have other meanings" in found
    advises(found, "copy the tokenizer.json that it was trained with into the folder")
    OURS.save(tmp_path)
    check_tokenizer(o, OURS)
    byte_run = exported(tmp_path / "bytes", None, vocab_size=257)
    check_tokenizer(replace(byte_run, tokenizer=TokenizerOptions("bytes")), BYTES)
    other = exported(tmp_path / "other", None, vocab_size=301)
    (found,) = init_from_problems(replace(other, tokenizer=TokenizerOptions("bytes")))
    assert "its vocab_size is 301, this run's is 257; set model.vocab_size=301" in found


def test_a_vocabulary_that_is_larger_than_the_tokenizer_is_reported(tmp_path):
    o = exported(tmp_path, OURS, vocab_size=320)
    advises(
        problem(o),
        "its vocab_size is 320, this run's is 301; set model.vocab_size=320",
    )
    o.model.vocab_size = 320
    check_tokenizer(o, OURS)
    o.model.vocab_size = None
    small = exported(tmp_path / "small", OURS, vocab_size=300)
    advises(
        problem(small),
        "its vocab_size is 300, this run's tokenizer has 301 tokens; take a model of at least this"
        " size",
    )
    check_tokenizer(exported(tmp_path / "other", OURS), OURS)


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "spiece.model", "vocab.txt", "encoder.json", "vocab.bpe"]
)
def test_a_tokenizer_that_fedgpt_cannot_read_is_refused(tmp_path, name):
    o = exported(tmp_path, None)
    (tmp_path / name).write_text("{}")
    (found,) = init_from_problems(o)
    assert found.startswith(f"init_from={tmp_path}: tokenizer.json cannot be read: No such file")


@pytest.mark.parametrize(
    ("missing", "other"), [("merges.txt", "vocab.json"), ("vocab.json", "merges.txt")]
)
def test_one_of_the_two_files_of_a_tokenizer_names_the_other(tmp_path, missing, other):
    """The message named tokenizer.json, which such a model does not have."""
    o = exported(tmp_path, OURS)
    two_files(tmp_path, OURS)
    content = (tmp_path / missing).read_bytes()
    (tmp_path / missing).unlink()
    found = problem(o)
    assert found.startswith(f"init_from={tmp_path}: {missing} is missing, and {other} alone")
    advises(found, "copy it from the model's source into the folder")
    (tmp_path / missing).write_bytes(content)
    check_tokenizer(o, OURS)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_what_is_in_place_of_a_tokenizer_is_named(tmp_path, file):
    o = exported(tmp_path, OURS)
    if file != "tokenizer.json":
        two_files(tmp_path, OURS)
    link = ".git/annex/objects/Mk/3w/MD5E-s1--a/MD5E-s1--a"
    for content, what in {
        "": "is empty",
        "version https://git-lfs.github.com/spec/v1\n": "is a Git LFS pointer",
        "/annex/objects/MD5E-s1--a\n": "is a git-annex pointer",
        "<!DOCTYPE html>\n": "is a web page or XML; fetch the file again",
    }.items():
        (tmp_path / file).write_text(content)
        assert f"init_from={tmp_path}: {file} {what}" in problem(o)
    (tmp_path / file).unlink()
    (tmp_path / file).symlink_to(link)
    assert f"init_from={tmp_path}: {file} is a git-annex pointer" in problem(o)


def ids_of_transformers(folder: Path, text: str) -> list[int]:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


TEXT = ENGLISH + "    the cat, don't you  see 2026? The RAT said to thee:\n    x is\n"
PIPELINES = {
    "lower case": ("normalizer", {"type": "Lowercase"}),
    "space in front": (
        "pre_tokenizer",
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ),
    "no words": (
        "pre_tokenizer",
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ),
    "digits": (
        "pre_tokenizer",
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        },
    ),
}


@pytest.mark.parametrize(("part", "value"), PIPELINES.values(), ids=PIPELINES.keys())
def test_the_same_vocabulary_behind_another_pipeline_is_another_tokenizer(tmp_path, part, value):
    o = exported(tmp_path, OURS)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    assert ids_of_transformers(tmp_path, TEXT) != OURS.encode(TEXT).tolist(), "it matters"
    found = problem(o)
    refused = "normalizer 'Lowercase' changes the text" in found or "adds a space" in found
    assert refused or "has another tokenizer" in found


def test_other_merges_and_other_added_tokens_are_refused(tmp_path):
    o = exported(tmp_path, OURS)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text())
    other = json.loads(path.read_text())
    other["model"]["merges"] = other["model"]["merges"][::-1]
    path.write_text(json.dumps(other))
    assert ids_of_transformers(tmp_path, TEXT) != OURS.encode(TEXT).tolist(), "it matters"
    assert "has another tokenizer" in problem(o)
    added = {**good["added_tokens"][0], "content": "cat", "id": OURS.vocab_size, "special": False}
    path.write_text(json.dumps(good | {"added_tokens": [*good["added_tokens"], added]}))
    assert ids_of_transformers(tmp_path, TEXT) != OURS.encode(TEXT).tolist(), "it matters"
    assert "has another tokenizer" in problem(o)


def test_two_files_with_added_tokens_or_a_space_in_front_are_refused(tmp_path):
    o = exported(tmp_path, OURS)
    two_files(tmp_path, OURS, add_prefix_space=True)
    assert "add_prefix_space is true" in problem(o)
    two = tmp_path / "two"
    o = exported(two, OURS)
    two_files(two, OURS)
    (two / "added_tokens.json").write_text('{"cat": 301}')
    assert "added_tokens.json adds to its vocabulary" in problem(o)


def test_what_transformers_saves_of_our_tokenizer_is_the_same(tmp_path):
    """Even with the settings of the last call, which transformers saves with it."""
    transformers = pytest.importorskip("transformers")
    o = exported(tmp_path, OURS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs([TEXT, "a"], truncation=True, max_length=5, padding="max_length")
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is not None
    check_tokenizer(o, OURS)
    again = Tokenizer((tmp_path / "tokenizer.json").read_text())
    assert again.encode(TEXT).tolist() == OURS.encode(TEXT).tolist()


DAMAGED = {
    "cut": lambda text: text[:100],
    "a list": lambda text: "[1]",
    "a number": lambda text: "5",
    "other types": lambda text: json.dumps(json.loads(text) | {"model": [1]}),
    "no vocabulary": lambda text: json.dumps(json.loads(text) | {"model": {"type": "BPE"}}),
    "word level": lambda text: json.dumps(
        json.loads(text) | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    ),
    "nested": lambda text: "[" * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, file, damage):
    o = exported(tmp_path, OURS)
    text = (tmp_path / "tokenizer.json").read_text()
    if file == "vocab.json":
        two_files(tmp_path, OURS)
    (tmp_path / file).write_text(damage(text))
    (found,) = init_from_problems(o)
    assert found.startswith(f"init_from={tmp_path}: {file}: no tokenizer that fedgpt can read (")
    assert "\n" not in found


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_token_or_setting_that_stands_twice_is_refused(tmp_path, file):
    """Each reader would take one of the two without a word."""
    o = exported(tmp_path, OURS)
    if file != "tokenizer.json":
        two_files(tmp_path, OURS, model_max_length=8)
    assert not list(init_from_problems(o))
    path = tmp_path / file
    name = '"model_max_length"' if file == "tokenizer_config.json" else '"a"'
    path.write_text(path.read_text().replace(f"{name}:", f"{name}: 1, {name}:", 1))
    (found,) = init_from_problems(o)
    assert f"the name {name.replace(chr(34), chr(39))} stands twice in it" in found


def test_a_run_that_has_not_finished_is_reported(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="has not finished, so it has no model/ yet; name"):
        read_start(str(tmp_path))


def test_a_file_a_path_below_one_and_a_folder_of_other_files_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for name in ("model.safetensors", "model.safetensors/model"):
        start = str(tmp_path / name)
        message = rf"init_from={re.escape(start)}: is not a folder; name the folder of a finished"
        with pytest.raises(ConfigError, match=message):
            read_start(start)
    with pytest.raises(ConfigError, match=r"has no config.json, nor model/config.json") as caught:
        read_start(str(tmp_path))
    advises(
        caught.value,
        "name the folder of a finished run, or of a Hugging Face model, or a GGUF file",
    )
    exported(tmp_path / "model", BYTES)
    assert read_start(str(tmp_path)) and read_start(str(tmp_path / "model"))


def test_each_option_that_differs_is_reported_as_it_is_typed(tmp_path):
    exported(tmp_path, BYTES)
    words = ["model.n_layer=2", "model.tie=false", "model.bias=false", "model.norm=rmsnorm"]
    found = refused(*SHAPE, *words, "tokenizer=bytes", f"init_from={tmp_path}")
    found[-1] = found[-1].removesuffix(", or take model=hf, which has the shape of that model")
    assert found == [
        f"init_from={tmp_path}: its model.{name} is {theirs}, this run's is {ours}; set"
        f" model.{name}={theirs}"
        for name, theirs, ours in [
            ("n_layer", "1", "2"),
            ("norm", "layernorm", "rmsnorm"),
            ("bias", "true", "false"),
            ("tie", "true", "false"),
        ]
    ]
    advises(found[0], "set model.n_layer=1")
    advised = [one.rpartition("set ")[2] for one in found]
    compose.load([*SHAPE, *advised, "tokenizer=bytes", f"init_from={tmp_path}"])


def test_a_damaged_folder_is_reported_with_the_other_options_and_no_folder_is_made(tmp_path):
    exported(tmp_path / "hf", BYTES)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    start = [*SHAPE, "tokenizer=bytes", f"init_from={tmp_path}/hf", f"run_dir={tmp_path}/run"]
    assert refused(*start, "rounds=-1") == [
        "rounds=-1: must be at least 1",
        f"init_from={tmp_path}/hf: model.safetensors is empty",
    ]
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_weights_that_are_not_finite_before_it_reads_text(tmp_path):
    """In one message, with exit code 2, without a folder; the text is not even there."""
    model = GPT(MODEL, 257)
    model.transformer["wpe"].weight.data[1, 1] = float("inf")
    export_model(tmp_path / "hf", model)
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some words of a text\n\n" * 30)
    words = [*SHAPE, "tokenizer=bytes", "corpus=files", f"corpus.path={text}"]
    words += [f"init_from={tmp_path}/hf", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"]
    done = subprocess.run(
        [sys.executable, "-m", "fedgpt", "run", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "model.safetensors: transformer.wpe.weight has values that are not" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("init_from=") == 1
    assert not list(tmp_path.glob("run/*")) and not (tmp_path / "cache").exists()


def test_a_copy_of_a_folder_is_the_same_start(tmp_path):
    o = exported(tmp_path / "one", OURS)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    check_tokenizer(replace(o, init_from=str(tmp_path / "two")), OURS)


LLAMA = ModelOptions(
    **{"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 8, "n_kv_head": 2, "n_inner": 24},
    **{"norm": "rmsnorm", "mlp": "swiglu", "bias": False, "rope_theta": 100_000.0},
)


def test_a_model_of_hugging_face_needs_no_typed_shape(tmp_path):
    export_model(tmp_path, GPT(LLAMA, BYTES.vocab_size))
    BYTES.save(tmp_path)
    words = ("tokenizer=bytes", f"init_from={tmp_path}", "model.dropout=0.1")
    o = compose.load(["model=hf", *words])
    assert o.model == replace(LLAMA, vocab_size=257, dropout=0.1)
    check_tokenizer(o, BYTES)
    # what is written to config.yaml needs the folder no more
    shutil.rmtree(tmp_path)
    again = compose.from_yaml(compose.to_yaml(replace(o, init_from=None)))
    assert again.model == o.model


def test_the_tokenizer_comes_with_the_weights(tmp_path):
    """Of a folder, and of a run's folder; none is trained, so the public part may be empty."""
    export_model(tmp_path / "model", GPT(LLAMA, OURS.vocab_size))
    OURS.save(tmp_path / "model")
    for start in (tmp_path / "model", tmp_path):
        o = compose.load(["model=hf", f"init_from={start}", "corpus.public=0"])
        assert (o.tokenizer.name, o.tokenizer.path) == ("hf", str(tmp_path / "model"))
        tokenizer = make_tokenizer(o.tokenizer, ())
        assert tokenizer.digest == OURS.digest
        check_tokenizer(o, tokenizer)


def test_an_option_with_an_equal_meaning_does_not_differ(tmp_path):
    export_model(tmp_path, GPT(LLAMA, BYTES.vocab_size))
    BYTES.save(tmp_path)
    same = replace(LLAMA, head_dim=4, mlp_bias=False, gelu="tanh", qkv_bias=False)
    o = RunOptions(init_from=str(tmp_path), model=same, tokenizer=TokenizerOptions("bytes"))
    check_tokenizer(o, BYTES)
    o.model.n_kv_head = None
    found = problem(o, BYTES)
    assert "its model.n_kv_head is 2, this run's is null; set model.n_kv_head=2" in found


def test_the_command_says_what_model_hf_needs_and_what_it_replaces(tmp_path):
    (found,) = refused("model=hf", "tokenizer=bytes")
    assert found.startswith("model=hf: the model has the shape of the one in init_from, which is")
    advises(found, "name a Hugging Face folder with init_from=FOLDER")
    (found,) = refused("model=hf", "tokenizer=bytes", f"init_from={tmp_path}/none")
    assert "is not a folder" in found
    export_model(tmp_path, GPT(LLAMA, BYTES.vocab_size))
    BYTES.save(tmp_path)
    words = ("tokenizer=bytes", f"init_from={tmp_path}")
    (found,) = refused("model=hf", "model.n_layer=1", *words)
    advises(
        found,
        "model.n_layer=1: has no effect with model=hf, whose shape is that of the model in"
        " init_from; leave it out",
    )
    with pytest.raises(ConfigError, match=r"model\.n_layer=1: has no effect with model=hf"):
        compose.check_sweep(["seed=0,1", "model=hf", "model.n_layer=1", *words])
    found = refused("model.n_layer=2", "model.n_embd=64", *words)
    advises(found[-1], "or take model=hf, which has the shape of that model")
    assert compose.load(["model=hf", *words]).model.n_embd == 16
