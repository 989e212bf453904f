"""What a tokenizer of others has besides its ids: what is kept and saved, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.advice import advises
from support.tokenizer_families import BYTES, CHAT, FAMILIES, GPT2, SMOL, Family, split

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import TokenizerOptions
from fedgpt.data import tokenizer, tokenizer_files
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

TALK = [{"role": "user", "content": "Is <|im_end|> here?"}, {"role": "assistant", "content": "No"}]
TEXT = "Don't  <|im_end|> 山下 12345 e\u0301 <tool_call>\n\n  x"
every = pytest.mark.parametrize("name", list(FAMILIES))


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def reason(folder: Path) -> str:
    with pytest.raises(FedGPTError) as refused:
        load_tokenizer(folder)
    assert str(folder / "tokenizer.json") in str(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@every
def test_transformers_reads_a_saved_tokenizer_as_the_original(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    original = FAMILIES[name].write(tmp_path / "original")
    load_tokenizer(original).save(tmp_path / "saved")
    old, new = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / one) for one in ("original", "saved")
    )
    for how in ({}, {"split_special_tokens": True}):
        assert new(TEXT, **how)["input_ids"] == old(TEXT, **how)["input_ids"]
    ids = old(TEXT)["input_ids"]
    for skip in (True, False):
        assert new.decode(ids, skip_special_tokens=skip) == old.decode(
            ids, skip_special_tokens=skip
        )
    assert new.chat_template == old.chat_template
    if old.chat_template:
        how = {"add_generation_prompt": True}
        for tokenize in (False, True):
            rendered = [
                one.apply_chat_template(TALK, tokenize=tokenize, **how) for one in (old, new)
            ]
            assert rendered[0] == rendered[1]
    told = {role: token for role, token in old.special_tokens_map.items() if token}
    assert told.items() <= new.special_tokens_map.items()
    if "model_max_length" in FAMILIES[name].settings and name != "gpt2":
        assert new.model_max_length == old.model_max_length


@every
def test_a_saved_tokenizer_and_a_definition_are_the_same_tokenizer(name, tmp_path):
    tokenizer = load_tokenizer(FAMILIES[name].write(tmp_path / "original"))
    tokenizer.save(tmp_path / "saved", length=77)
    for other in (load_tokenizer(tmp_path / "saved"), Tokenizer(tokenizer.definition)):
        assert (other.digest, other.end, other.specials) == (
            *(tokenizer.digest, tokenizer.end, tokenizer.specials),
        )
        assert other.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert other.chat_template == tokenizer.chat_template
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 77
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert Tokenizer(tokenizer.definition).definition == tokenizer.definition


def test_each_family_and_each_change_of_ids_or_end_has_its_own_digest(tmp_path):
    families = dict(FAMILIES)
    smol = FAMILIES["smollm"]
    families["other end"] = replace(smol, settings={"eos_token": SMOL[0]})
    families["no digits"] = replace(smol, steps=(GPT2,))
    families["more specials"] = replace(smol, behind=["<|tool|>"])
    families["not special"] = replace(smol, ordinary=["<|tool|>"])
    families["normal form"] = replace(smol, normalizer="NFC")
    families["words"] = replace(smol, ignore_merges=True)
    digests = {
        name: load_tokenizer(one.write(tmp_path / name)).digest for name, one in families.items()
    }
    assert len(set(digests.values())) == len(families)
    same = replace(smol, template="{{ messages }}", settings={"eos_token": "<|im_end|>"})
    assert load_tokenizer(same.write(tmp_path / "same")).digest == digests["smollm"]


def test_the_end_is_told_by_the_settings_or_by_the_tokens(tmp_path):
    smol = replace(FAMILIES["smollm"], settings={})
    assert load_tokenizer(smol.write(tmp_path / "a")).end == 0  # <|endoftext|>
    folder = smol.write(tmp_path / "b")
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    assert load_tokenizer(folder).end == 2
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<file_3>", "pad_token": null}')
    assert load_tokenizer(folder).end == 6
    one = Family(behind=["</s>"])
    assert load_tokenizer(one.write(tmp_path / "c")).specials == {"</s>": 1000}
    two = Family(behind=["<s>", "</s>"])
    assert "no file names its eos_token, and it has 2 special tokens" in reason(
        two.write(tmp_path / "d")
    )
    absent = replace(two, settings={"eos_token": "<end>"})
    assert "eos_token '<end>' is not in the vocabulary" in reason(absent.write(tmp_path / "e"))


def test_an_end_token_that_is_not_marked_as_special_is_no_text(tmp_path):
    plain = Family(ordinary=["</s>", "<x>"], settings={"eos_token": "</s>"})
    tokenizer = load_tokenizer(plain.write(tmp_path))
    ids = tokenizer.encode("a</s><x>").tolist()
    assert tokenizer.end == 1000 and tokenizer.end not in ids and 1001 in ids
    assert tokenizer.decode([*ids, tokenizer.end]) == "a</s><x>"


def test_chat_templates_of_all_forms_are_kept(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = FAMILIES["smollm"].write(tmp_path / "more")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    named = [{"name": "default", "template": CHAT}, {"name": "tools", "template": "tools"}]
    listed = replace(
        FAMILIES["smollm"],
        template="",
        settings={"eos_token": "<|im_end|>", "chat_template": named},
    ).write(tmp_path / "listed")
    for original in (folder, listed):
        tokenizer = load_tokenizer(original)
        assert tokenizer.chat_template == CHAT
        tokenizer.save(tmp_path / "saved")
        new = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert new.chat_template == {"default": CHAT, "tools": "tools"}


# what is changed in tokenizer.json -> a part of the reason
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "word piece": (
        lambda t: t.update(
            model={
                "type": "WordPiece",
                "unk_token": "a",
                "vocab": {"a": 0},
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 9,
            }
        ),
        "its model.type is 'WordPiece', not BPE",
    ),
    "unigram": (
        lambda t: t.update(
            model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, added_tokens=[]
        ),
        "its model.type is 'Unigram', not BPE",
    ),
    "byte fallback": (
        lambda t: t["model"].update(byte_fallback=True),
        "its model.byte_fallback is True, so it is no byte-level BPE",
    ),
    "dropout": (lambda t: t["model"].update(dropout=0.5), "its model.dropout is 0.5"),
    "suffix": (
        lambda t: t["model"].update(end_of_word_suffix="</w>"),
        "its model.end_of_word_suffix is '</w>'",
    ),
    "lower case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "'Lowercase' changes"),
    "replacements": (
        lambda t: t.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            }
        ),
        "its normalizer 'Replace' changes the text; allowed are NFC, NFD, NFKC, NFKD",
    ),
    "a space in front": (
        lambda t: t.update(pre_tokenizer=GPT2 | {"add_prefix_space": True}),
        "its pre_tokenizer adds a space to each text (add_prefix_space)",
    ),
    "characters": (
        lambda t: t.update(pre_tokenizer=None),
        "its pre_tokenizer has not one step ByteLevel",
    ),
    "bytes of bytes": (
        lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [GPT2, GPT2]}),
        "its pre_tokenizer has not one step ByteLevel",
    ),
    "meta space": (
        lambda t: t.update(
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": True,
            }
        ),
        "its pre_tokenizer 'Metaspace' is not supported; allowed are ByteLevel, Digits, Split",
    ),
    "lost text": (
        lambda t: t.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [split(" ") | {"behavior": "Removed"}, GPT2],
            }
        ),
        "its pre_tokenizer Split loses text (behavior 'Removed')",
    ),
    "a long pattern": (
        lambda t: t.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [split("a|" * 5000 + "a"), GPT2]}
        ),
        "a pattern of its pre_tokenizer has 10,001 characters",
    ),
    "another decoder": (
        lambda t: t.update(decoder={"type": "Fuse"}),
        "its decoder is not ByteLevel",
    ),
    "no decoder": (lambda t: t.update(decoder=None), "its decoder is not ByteLevel alone"),
    "another id": (
        lambda t: t["added_tokens"][0].update(id=5),
        "its added token '<|endoftext|>' has the id 5, and must be 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_byte_level_bpe_is_refused_by_name(name, tmp_path):
    change, why = REFUSED[name]
    folder = edited(FAMILIES["smollm"].write(tmp_path), "tokenizer.json", change)
    assert why in reason(folder)


@pytest.mark.parametrize("name", ["!", "Ġthe", "é"])
def test_a_special_token_that_is_a_word_of_ordinary_text_is_refused(tmp_path, name):
    """A text would have the id of a special token: `é` stands for a byte of many characters."""
    folder = replace(FAMILIES["smollm"], settings={"pad_token": name}).write(tmp_path)
    told = f"tokenizer_config.json: the special token '{name}' is a word of ordinary text too"
    assert told in reason(folder)


def test_a_word_that_is_marked_as_special_is_refused(tmp_path):
    def mark(content: dict[str, Any]) -> None:
        number = content["model"]["vocab"]["the"]
        content["added_tokens"].append(
            {**content["added_tokens"][0], "content": "the", "id": number}
        )

    folder = edited(FAMILIES["smollm"].write(tmp_path), "tokenizer.json", mark)
    assert "its special token 'the' is a word of ordinary text too" in reason(folder)


def test_a_role_of_a_token_that_the_vocabulary_lacks_changes_no_id(tmp_path):
    """transformers gives it a new id, which no text and no row of the model has."""
    smol = FAMILIES["smollm"]
    more = replace(smol, settings={**smol.settings, "mask_token": "<mask>"})
    one = load_tokenizer(smol.write(tmp_path / "one"))
    two = load_tokenizer(more.write(tmp_path / "two"))
    assert one.digest == two.digest and two.settings["mask_token"] == "<mask>"


# content of tokenizer_config.json -> a part of the reason
WRONG_SETTINGS = {
    "[]": "tokenizer_config.json has a list, not an object",
    "{": "tokenizer_config.json: Expecting property name",
    '{"eos_token": 3}': "eos_token is a number without a token's text",
    '{"eos_token": {"content": ""}}': "eos_token is an object without a token's text",
    '{"additional_special_tokens": "ab"}': "additional_special_tokens is text, not a list",
    '{"additional_special_tokens": [3]}': "additional_special_tokens is a number without",
    '{"chat_template": 3}': "chat_template is no text, and no list of named templates",
    '{"chat_template": [{"name": "a"}]}': "chat_template is no text, and no list of named",
    '{"chat_template": [3]}': "chat_template is no text, and no list of named",
    '{"model_max_length": "long"}': "model_max_length is 'long', and must be above 0",
    '{"model_max_length": NaN}': "model_max_length is nan, and must be above 0",
    '{"pad_token": "\\ud800"}': "pad_token is no text of Unicode",
    '{"auto_map": {"AutoTokenizer": ["a.B", null]}}': "auto_map names Python code",
    '{"add_prefix_space": true}': "add_prefix_space is true",
    '{"added_tokens_decoder": {"7": {"content": "<|im_end|>"}}}': "'<|im_end|>' the id '7', and",
    '{"added_tokens_decoder": [1]}': "added_tokens_decoder is no object",
    '{"added_tokens_decoder": {"2": 3}}': "added_tokens_decoder is null without a token's text",
    '{"added_tokens_decoder": {"2": {"content": "<|im_end|>", "lstrip": 3}}}': (
        "tokenizer_config.json: added_tokens_decoder: "
    ),
}


@pytest.mark.parametrize("content", WRONG_SETTINGS)
def test_wrong_settings_are_refused_with_file_and_reason(content, tmp_path):
    folder = replace(FAMILIES["smollm"], template="").write(tmp_path)
    (folder / "tokenizer_config.json").write_text(content)
    assert WRONG_SETTINGS[content] in reason(folder)


def test_settings_of_a_machine_and_a_class_are_left_out(tmp_path):
    more = {"name_or_path": "/home/ann/model", "tokenizer_file": "/etc/x", "is_local": True}
    smol = FAMILIES["smollm"]
    smol = replace(smol, settings={**smol.settings, **more, "tokenizer_class": "GPT2Tokenizer"})
    tokenizer = load_tokenizer(smol.write(tmp_path))
    assert not more.keys() & tokenizer.settings.keys()
    assert "/home/ann" not in tokenizer.definition


def test_a_template_of_any_text_is_sent_and_saved(tmp_path):
    """Also one that is no Unicode, as JSON may write it."""
    folder = replace(FAMILIES["smollm"], template="").write(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "\\ud800 山"}')
    tokenizer = load_tokenizer(folder)
    sent = tokenizer.definition.encode().decode()
    assert Tokenizer(sent).chat_template == tokenizer.chat_template == "\ud800 山"
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == "\ud800 山"


def test_files_that_no_tokenizer_has_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MOST_BYTES", 1000)
    folder = FAMILIES["smollm"].write(tmp_path)
    with pytest.raises(FedGPTError, match=r"tokenizer\.json has [\d,]+ bytes, and no tokenizer"):
        load_tokenizer(folder)


def test_a_definition_of_any_size_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    definition = load_tokenizer(FAMILIES["qwen"].write(tmp_path)).definition
    Tokenizer(definition)
    monkeypatch.setattr(tokenizer, "MOST_CHARACTERS", len(definition) - 1)
    with pytest.raises(ValueError, match=r"has [\d,]+ characters, and none has so many"):
        Tokenizer(definition)


@pytest.mark.parametrize(
    "definition",
    [
        *('{"tokenizer.json": 3}', '{"tokenizer.json": "[1]"}', '{"tokenizer.json": "{}"}'),
        *('{"tokenizer.json": "{}", "tokenizer_config.json": {}}', "[" * 10**5, '"text"', "null"),
    ],
)
def test_a_definition_that_a_server_made_up_is_refused(definition):
    with pytest.raises((ValueError, RecursionError)):
        Tokenizer(definition)


def test_a_byte_that_no_token_has_is_left_out_and_is_no_special_token(tmp_path):
    smol = FAMILIES["smollm"]
    folder = smol.write(tmp_path)
    edited(folder, "tokenizer.json", lambda t: t["model"].update(unk_token="<|endoftext|>"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.lost == bytes([0x04, 0x1D, 0xF1, 0xF2])
    assert tokenizer.encode("a\x04b").tolist() == tokenizer.encode("a").tolist() + (
        tokenizer.encode("b").tolist()
    )
    needed = replace(smol, without="A")
    assert "no token for the byte 0x41" in reason(needed.write(tmp_path / "needed"))


def test_a_tokenizer_is_taken_from_its_folder_and_none_is_trained(tmp_path):
    folder = FAMILIES["qwen"].write(tmp_path / "qwen")
    tokenizer = make_tokenizer(TokenizerOptions("hf", path=str(folder)), ())
    assert (tokenizer.name, tokenizer.digest) == ("hf", load_tokenizer(folder).digest)
    tokenizer.save(tmp_path / "run" / "model")  # a finished run
    run = make_tokenizer(TokenizerOptions("hf", path=str(tmp_path / "run")), ())
    assert run.digest == tokenizer.digest


def test_a_folder_that_is_wrong_or_missing_names_the_option(tmp_path):
    [problem] = TokenizerOptions("hf").problems()
    assert problem.startswith("tokenizer.path is not set: tokenizer=hf needs the folder")
    advises(problem, "set tokenizer.path=FOLDER")
    options = TokenizerOptions("hf", path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json") as refused:
        make_tokenizer(options, ())
    advises(refused.value, "name the folder of a Hugging Face tokenizer, or of a finished run")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        make_tokenizer(options, ())
    [problem] = refused.value.problems
    assert problem.startswith(f"tokenizer.path={tmp_path}: tokenizer.json: no tokenizer that")
    FAMILIES["llama"].write(tmp_path)
    make_tokenizer(options, ())


def test_a_pattern_that_takes_too_many_steps_is_an_error_and_no_panic(tmp_path, capfd):
    """A server may send one to a site, whose process goes on."""
    slow = Family(steps=(split("(a+)+b"), BYTES), behind=["<|endoftext|>"])
    tokenizer = load_tokenizer(slow.write(tmp_path))
    assert tokenizer.decode(tokenizer.encode("aaab")) == "aaab"
    with pytest.raises(FedGPTError, match=r"the tokenizer fails on a text \(.*retry-limit"):
        tokenizer.encode_many(["a" * 60])
    long = Family(steps=slow.steps, behind=["<|endoftext|>", "a" * 60])
    assert "the tokenizer fails on a text" in reason(long.write(tmp_path / "special"))
    capfd.readouterr()  # the library prints a trace
