"""The files for Docker and systemd start commands that exist, with folders that fit together."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedgpt.cli import COMMANDS, keys
from fedgpt.flower.deploy.link_process import END_SECONDS
from fedgpt.flower.deploy.supervise import OUTPUT_SECONDS, STOP_SECONDS

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "simulations" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def check(words: list[str]) -> None:
    """Raise if fedgpt would refuse these words."""
    parser = COMMANDS[words[0]].module.parser()
    parser.parse_intermixed_args(words[1:])


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_a_container_runs_a_command_and_sees_what_it_names(service):
    about = COMPOSE["services"][service]
    words = shlex.split(about["command"])
    check(words)
    inside = {volume.split(":")[1] for volume in about["volumes"]}
    named = [word for word in words if word.startswith("/")]
    assert named and all(any(f"{word}/".startswith(f"{at}/") for at in inside) for word in named)
    assert not about.get("depends_on") or set(about["depends_on"]) <= set(COMPOSE["services"])


def test_each_site_has_folders_of_its_own():
    sites = {name: one for name, one in COMPOSE["services"].items() if name != "server"}
    folders = [volume.split(":")[0] for one in sites.values() for volume in one["volumes"]]
    assert len(set(folders)) == len(folders) == 9
    for name, one in sites.items():
        assert f"/{name}.kit " in one["command"]
        assert all(name in volume for volume in one["volumes"])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_command_of_fedgpt(path):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(path)
    program, *words = shlex.split(unit["Service"]["ExecStart"].replace("%i", "clinic-a"))
    assert program == "/srv/fedgpt/venv/bin/fedgpt"
    check(words)


def test_a_server_has_the_time_to_stop_that_it_may_take():
    needed = STOP_SECONDS + OUTPUT_SECONDS + END_SECONDS
    assert float(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > needed
    unit = (DEPLOY / "systemd" / "fedgpt-server.service").read_text()
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert float(seconds) > needed


def test_an_image_is_built_from_what_the_package_needs_and_nothing_else():
    """No key, kit or text that lies beside it, and no history."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if not rule.startswith("#")]
    assert rules[0] == "*" and rules[-1] == "**/__pycache__"
    allowed = rules[1:-1]
    assert all(rule.startswith("!") and (ROOT / rule[1:]).exists() for rule in allowed)
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", build["project"]["readme"], *build["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    needed |= set(re.findall(r"/src/(\S+)", DOCKERFILE))
    assert {rule[1:] for rule in allowed} == needed


def needs(name: str, extras: Iterable[str]) -> list[Requirement]:
    """What an installed package needs here besides PyTorch."""
    found = [Requirement(line) for line in metadata.requires(name) or ()]
    return [
        one
        for one in found
        if one.name != "torch"
        and (one.marker is None or any(one.marker.evaluate({"extra": x}) for x in extras))
    ]


def test_the_list_with_hashes_has_all_that_is_needed():
    entries = (DEPLOY / "requirements.txt").read_text().replace("\\\n", " ").splitlines()
    pins: dict[str, str] = {}
    for line in entries:
        if not line.startswith("#"):
            about, *hashes = line.split(" --hash=sha256:")
            assert hashes and all(re.fullmatch(r"[0-9a-f]{64}\s*", one) for one in hashes), line
            entry = Requirement(about)
            if entry.marker is None or entry.marker.evaluate():
                (pin,) = entry.specifier
                assert pin.operator == "==" and canonicalize_name(entry.name) not in pins
                pins[canonicalize_name(entry.name)] = pin.version
    assert "torch" not in pins
    waiting, seen = needs("fedgpt", [""]), set()
    for one in waiting:  # the list grows in the loop
        name = canonicalize_name(one.name)
        assert one.specifier.contains(pins[name]), f"{one}, and the list has {pins[name]}"
        # of another version nothing is known here
        if one not in seen and metadata.version(name) == pins[name]:
            waiting += needs(name, one.extras or [""])
        seen.add(one)
    assert len(seen) > 60


def test_the_user_of_an_image_owns_the_folders_of_its_volumes():
    """Docker gives a new volume the owner of the folder that the image has in its place."""
    before, user, _ = DOCKERFILE.partition("\nUSER fedgpt\n")
    assert user and "chown -R fedgpt /data" in before
    made = set(re.findall(r"mkdir -p (\S+)", before))
    mounts = [volume for one in COMPOSE["services"].values() for volume in one["volumes"]]
    inside = {at.split(":")[1] for at in mounts if at.split(":")[0] in COMPOSE["volumes"]}
    assert inside and inside <= made


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_a_unit_but_the_missing_program(path):
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    told = done.stderr.strip().splitlines()
    assert [line for line in told if "is not executable" not in line] == []


def test_the_commands_of_the_page_are_commands():
    page = (DEPLOY / "README.md").read_text()
    typed = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"fedgpt (keys .+|submit .+|status .+)", typed)
    assert len(found) >= 5
    for line in found:
        words = shlex.split(line, comments=True)
        if words[0] == "keys" and len(words) > 2:
            keys.parser().parse_args(words[1:])
        elif words[0] != "keys":
            check(words)
