"""docs/site.md: its policy is one, and its tables name every key, option and check."""

from __future__ import annotations

import re
from dataclasses import fields

from test_readme import TEXTS

from fedgpt.cli import client
from fedgpt.client.policy import Policy, PrivacyLimits
from fedgpt.client.policy_file import read_policy

DOCUMENT = TEXTS["docs/site.md"]


def rows(heading: str) -> set[str]:
    """The words in code of the first column of the table that begins with `heading`."""
    table = DOCUMENT[DOCUMENT.index(f"| {heading} |") :].partition("\n\n")[0]
    return {
        word for line in table.splitlines() for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def test_the_policy_of_the_document_is_one_and_has_every_key(tmp_path):
    (text,) = re.findall(r"```yaml\n(.+?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "policy.yaml").write_text(text)
    policy = read_policy(tmp_path / "policy.yaml")
    top = {one.name for one in fields(Policy)}
    inner = {f"privacy.{one.name}" for one in fields(PrivacyLimits)}
    assert rows("key") == (top - {"privacy"}) | inner
    assert set(re.findall(r"^(\w+):", text, re.MULTILINE)) == top
    assert (policy.text.path, policy.privacy.delta) == ("/srv/notes", 1e-6)


def test_the_table_of_options_names_those_of_the_command():
    options = {option for action in client.parser()._actions for option in action.option_strings}
    assert {word.split()[0] for word in rows("option")} == options - {"-h", "--help"}


def test_the_table_of_checks_has_those_of_the_doctor():
    """The order is that of tests/flower/deploy/test_doctor.py."""
    checks = ("kit", "name", "proxy", "port", "TLS", "link", "clock", "end", "key", "text")
    assert rows("check") == {*checks, "state", "cache"}
