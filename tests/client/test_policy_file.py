"""A policy's file: what it may have, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.advice import advises

from fedgpt.client.policy import Policy, PrivacyLimits
from fedgpt.client.policy_file import MOST_BYTES, read_policy
from fedgpt.core.errors import ConfigError

CA = f"SHA256:{'a' * 43}"
COMPLETE = f"""
text:
  path: ~/notes
  text_field: body
  label_field: topic
  bad_records: skip
  document_bytes: 2048
servers: ["{CA}"]
runs: [night]
tasks: [lm, classify]
most_steps: 200
most_tokens: 500000
privacy:
  units: [example, local]
  most_epsilon: 8
  delta: 1e-6
hours: 20:00-06:00
device: cpu
memory: 0.5
threads: 2
"""


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "policy.yaml"


def problems(file: Path, text: str) -> list[str]:
    """What is wrong with a file, each without the file's name, with which all begin."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_policy(file)
    assert all(problem.startswith(f"{file}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{file}: ") for problem in caught.value.problems]


def test_every_key_is_read(file):
    file.write_text(COMPLETE)
    policy = read_policy(file)
    text = policy.text
    assert (text.name, text.path, text.text_field, text.label_field) == (
        *("files", "~/notes", "body", "topic"),
    )
    assert (text.bad_records, text.document_bytes) == ("skip", 2048)
    assert policy == Policy(
        *([CA], ["night"], ["lm", "classify"], 200, 500_000, "20:00-06:00", "cpu", 0.5, 2, text),
        privacy=PrivacyLimits(["example", "local"], 8, 1e-6),
    )


def test_an_empty_file_has_no_limits(file):
    file.write_text("# nothing yet\n")
    assert read_policy(file) == Policy()


@pytest.mark.parametrize(
    "text, problem",
    [
        ("most_step: 5", "most_step: is not a key of a policy; did you mean 'most_steps' or"),
        ("limit: 5", "limit: is not a key of a policy; choose from servers, runs, tasks,"),
        ("text: {client: author}", "text.client: is not a key of a policy; choose from path, "),
        ("most_steps:", "most_steps: has no value; give it one, or leave out the line"),
        ("most_steps: many", "most_steps=many: must be a whole number, at least 1"),
        ("most_steps: true", "most_steps=true: must be a whole number, at least 1"),
        ("most_steps: 0", "most_steps=0: must be at least 1"),
        ("most_tokens: 1.5", "most_tokens=1.5: must be a whole number, at least 1"),
        ("runs: night", "runs=night: must be a list of texts, such as [a,b], a list of at least"),
        ("runs: []", "runs=[]: must be a list of at least one run's name, or left out for all"),
        ("servers: [abc]", "servers=['abc']: must be a list of fingerprints SHA256:..."),
        ("hours: 8-12", "hours=8-12: must be from-to, such as 20:00-06:00"),
        ("hours: 20:00", "hours=1200: must be a text, from-to, such as 20:00-06:00"),
        ("hours: 08:00-08:00", "hours=08:00-08:00: must be from-to"),
        ("hours: 08:00-25:00", "hours=08:00-25:00: must be from-to"),
        ("device: gpu", "device=gpu: must be auto, cpu or cuda; did you mean 'cpu'?"),
        ("memory: 50", "memory=50: must be above 0 and at most 1"),
        ("memory: .nan", "memory=nan: must be a finite number"),
        ("threads: 0", "threads=0: must be at least 1"),
        ("privacy: example", "privacy: must be keys and their values, such as units: ..."),
        ("privacy: {units: [secret]}", "privacy.units=['secret']: must be a list of at least one"),
        ("privacy: {most_epsilon: -1, delta: 1e-5}", "privacy.most_epsilon=-1: must be above 0"),
        ("privacy: {most_epsilon: 1, delta: 1}", "privacy.delta=1: must be at least 1e-300"),
        ("text: {document_bytes: 1}", "text.document_bytes=1: must be from 64 to 1000000000"),
        ("- most_steps", "must be keys and their values, such as servers: ..."),
        ("a: 1\na: 2", "is not valid YAML (a stands twice, line 1); correct it"),
        ("a: {", "is not valid YAML ("),
        ("a: 2026-13-45", "is not valid YAML ("),
        ("a: !!python/object:os.system {}", "is not valid YAML ("),
        ("#" * (MOST_BYTES + 1), f"has more than {MOST_BYTES:,} bytes, which no policy has"),
    ],
)
def test_a_wrong_key_or_value_is_told_with_what_is_allowed(file, text, problem):
    (told,) = problems(file, text)
    assert told.startswith(problem)


def test_all_problems_are_told_together(file):
    assert len(problems(file, "most_steps: 0\nthreads: 0\nhour: 3")) == 3


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    for path, why in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        ("~nobody-here/policy.yaml", "there is no such home folder"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: {why}"):
            read_policy(path)
    (tmp_path / "latin.yaml").write_bytes("runs: [Nächte]".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not valid YAML"):
        read_policy(tmp_path / "latin.yaml")


def test_the_advice_for_a_budget_is_followed(file):
    epsilon = "privacy: {most_epsilon: 8%s}"
    advises(
        problems(file, epsilon % "")[0],
        "add it, such as delta: 1e-6",
    )
    file.write_text(epsilon % ", delta: 1e-6")
    assert read_policy(file).privacy.delta == 1e-6
    (told,) = problems(file, "privacy: {delta: 1e-6}")
    advises(told, "add it, such as most_epsilon: 8")
    (told,) = problems(file, epsilon % ", delta: 1e-6, units: [none, example]")
    advises(told, "leave out none, or most_epsilon")
    file.write_text(epsilon % ", delta: 1e-6, units: [example]")
    assert read_policy(file).privacy.units == ["example"]
    file.write_text("privacy: {units: [none, example]}")
    assert read_policy(file).privacy.units == ["none", "example"]


def test_the_advice_for_a_line_is_followed(file):
    (told,) = problems(file, "most_steps:")
    advises(told, "give it one, or leave out the line")
    file.write_text("most_steps: 5")
    assert read_policy(file).most_steps == 5
    (told,) = problems(file, "runs: [a")
    advises(told, "correct it")
    (told,) = problems(file, "limit: 5")
    known = "servers, runs, tasks, most_steps, most_tokens, hours, device, memory, threads"
    advises(told, f"choose from {known}, text, privacy")
    file.write_text("runs: [a]")
    assert read_policy(file).runs == ["a"]
