"""Options that are texts: what is typed is what is used, or an error names it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.refused import problems

from fedgpt.config import compose, overrides
from fedgpt.config.texts import FREE_TEXTS, LISTS, TEXTS, quoted
from fedgpt.core.errors import ConfigError

PARSE = OverridesParser.create().parse_override
LOOKS_LIKE_SOMETHING_ELSE = [
    *("2024_10", "1_000", "1e5", "1e-3", "1.50", "007", "0x10", "+1", "inf", "true", "off"),
    *("a ", " a", "~", "2024-10-05", "12:30", "[a]", "{a: 1}", "a,b", "a: b", "# a", "- a", "*a"),
    *("NULL", "None", "a\\", 'a\\"', "it's", '"', "$", "a=b", "!!int 3", "choice(1,2)", "%", "@a"),
    *(
        "a\u2028b",
        "\x85",
        "\u2029 ",
        "\x0b",
        "\x1c",
        "\ufeffa",
        "\x7f",
        "tab\t",
        "\r",
        "a\nb",
        "1\x85",
    ),
]
characters = st.characters(codec="utf-8", exclude_characters="\0")
texts = st.one_of(st.sampled_from(LOOKS_LIKE_SOMETHING_ELSE), st.text(characters, max_size=15))
plain = texts.filter(lambda text: text and "${" not in text and text[0] not in "\"'")
# with corpus=files these take any text
FREE = ("name", "evaluate.prompt", "corpus.text_field", "corpus.label_field")
PATHS = ("run_dir", "cache_dir", "corpus.path")


def value(options: object, key: str) -> object:
    for name in key.split("."):
        options = getattr(options, name)
    return options


@pytest.mark.parametrize("text", [*LOOKS_LIKE_SOMETHING_ELSE, "null"])
def test_a_text_that_looks_like_something_else_is_used_as_it_is_typed(text):
    options = compose.load([f"name={text}", f"run_dir={text}", f"evaluate.prompt={text}"])
    assert options.name == text and Path(options.run_dir) == Path(text).expanduser().resolve()
    assert options.evaluate.prompt == (None if text == "null" else text)


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_a_text_that_looks_like_something_else_is_read_back_from_config_yaml(text):
    typed = compose.load([])
    typed.name = typed.evaluate.prompt = typed.corpus.text_field = typed.run_dir = text
    read = OmegaConf.create(compose.to_yaml(typed))
    assert OmegaConf.to_container(read, resolve=True) == asdict(typed)


@settings(max_examples=10, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys((*FREE, *PATHS), plain)))
def test_any_text_is_used_as_it_is_typed_and_read_back_from_config_yaml(typed):
    """Or a problem names it: a name has no slash, a path no home folder of somebody unknown."""
    words = ["corpus=files", "partition=dirichlet", *(f"{k}={text}" for k, text in typed.items())]
    try:
        options = compose.load(words)
    except ConfigError as error:
        wrong = [key for key in typed if any(p.startswith(f"{key}=") for p in error.problems)]
        assert wrong and all(
            ("/" in typed[key] and key == "name") or (typed[key][0] == "~" and key in PATHS)
            for key in wrong
        ), error
        return
    for one in (options, compose.from_yaml(compose.to_yaml(options))):
        assert {key: value(one, key) for key in FREE} == {key: typed[key] for key in FREE}
        for key in PATHS:
            home = typed[key][0] == "~"  # not in ./~
            path = Path(typed[key]).expanduser() if home else Path(typed[key])
            assert value(one, key) == str(path.resolve())


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TEXTS)), plain)
def test_hydra_gets_the_text_that_was_typed_for_every_option(key, text):
    assume(text != "null")
    assume(key in FREE_TEXTS or ("," not in text and "(" not in text))  # a sweep without -m
    assert PARSE(quoted(f"{key}={text}")).value() == text


@settings(max_examples=200, deadline=None)
@given(texts)
def test_a_prompt_has_no_references_in_any_text(text):
    assume(text != "null" and text[:1] not in ("'", '"'))
    got = PARSE(quoted(f"evaluate.prompt={text}")).value()
    assert OmegaConf.to_container(OmegaConf.create({"p": got}), resolve=True) == {"p": text}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(TEXTS)),
    st.lists(plain.map(str.strip).filter(lambda t: t and "," not in t), min_size=2, max_size=4),
)
def test_in_a_sweep_each_text_is_the_one_that_was_typed(key, wanted):
    assume("null" not in wanted and all(text[0] not in "\"'" for text in wanted))
    word = quoted(f"{key}={','.join(wanted)}", sweep=True)
    override = PARSE(word)
    values = [PARSE(text).value() for text in overrides._single_values(override, {})]
    assert override.is_sweep_override() and values == wanted


def test_null_is_no_value_only_where_an_option_may_have_none():
    assert compose.load(["evaluate.prompt=null"]).evaluate.prompt is None
    assert compose.load(["evaluate.prompt='null'"]).evaluate.prompt == "null"
    word = quoted("evaluate.prompt=null,'null',a", sweep=True)
    assert word == 'evaluate.prompt=null,"null","a"'


def test_quotes_around_the_whole_value_are_not_part_of_it():
    assert compose.load(["name='a, \"b\"'", "evaluate.prompt='it''s'"]).name == 'a, "b"'
    assert quoted("name='1,2',3", sweep=True) == 'name="1,2","3"'


@pytest.mark.parametrize("typed", ["${seed}", "${no}", "${", "\\${seed}", "a ${name} b"])
def test_a_prompt_has_no_references(typed):
    options = compose.load([f"evaluate.prompt={typed}"])
    assert options.evaluate.prompt == typed
    assert compose.from_yaml(compose.to_yaml(options)).evaluate.prompt == typed


def test_other_texts_may_name_another_option():
    options = compose.load(["seed=3", "name=s${seed}", "run_dir=out/${name}"])
    assert options.name == "s3" and options.run_dir == str(Path("out/s3").absolute())
    options = compose.load([r"name=\${seed}"])
    assert options.name == "${seed}" == compose.from_yaml(compose.to_yaml(options)).name


@pytest.mark.parametrize("typed", ["name=${no}", "run_dir=x/${no.such}", "name=${"])
def test_a_reference_to_nothing_is_shown_as_it_was_typed(typed):
    found = problems(typed)
    assert any(problem.startswith(f"{typed}: ${{...}} must name another") for problem in found)


@pytest.mark.parametrize("key", sorted(TEXTS - {*FREE, *PATHS}))
def test_a_text_that_an_option_cannot_take_is_shown_as_it_was_typed(key):
    found = problems(f"{key}=1_0.50")
    path = Path.cwd() / "1_0.50"
    assert any(p.startswith((f"{key}=1_0.50: ", f"{key}={path}: ")) for p in found), found


@pytest.mark.parametrize("key", sorted(LISTS))
def test_texts_in_a_list_are_used_as_they_are_typed(key):
    word = quoted(f"{key}=[1_000,1e5,'1.50',true,a.b*,x y]")
    assert PARSE(word).value() == ["1_000", "1e5", "1.50", "true", "a.b*", "x y"]
    swept = PARSE(quoted(f"{key}=[1_000],[b]", sweep=True))
    assert [PARSE(t).value() for t in overrides._single_values(swept, {})] == [["1_000"], ["b"]]


def test_arguments_in_a_list_keep_their_types():
    word = "track=[{_target_:mine.Chart,size:1e5,color:'2024_10'}]"
    assert PARSE(quoted(word)).value() == [
        {"_target_": "mine.Chart", "size": 1e5, "color": "2024_10"}
    ]


@pytest.mark.parametrize(
    "typed, part",
    [
        ("run_dir=~nobody_here/x", "run_dir=~nobody_here/x: there is no such home folder"),
        (f"run_dir={'n' * 300}", "File name too long; name another folder"),
        ("name=a\0b", r"name='a\x00b': must be a text without the character NUL"),
        ("evaluate.prompt=M\udcfcller", r"evaluate.prompt='M\udcfcller': must be UTF-8 text"),
        ("model.trainable=['a\udcfc']", r"model.trainable=['a\udcfc']: must be UTF-8 text"),
        ("model.trainable=[a\u00fc;b]", "quotes: 'model.trainable=[\"a\u00fc;b\"]'"),
        ("init_from=", "init_from=: must be a folder"),
    ],
)
def test_a_text_that_cannot_be_used_is_named(typed, part):
    assert any(part in problem for problem in problems(typed)), problems(typed)
