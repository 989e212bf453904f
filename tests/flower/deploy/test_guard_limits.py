"""Token buckets, addresses, and the record of refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgpt.flower.deploy import limits, link
from fedgpt.flower.deploy.limits import Addresses, Bucket, Record, Refused, network_of

NO_KEY = Refused(401, "unknown_key", "the key is not approved")


def pass_seconds(bucket: Bucket, seconds: float) -> None:
    bucket._time -= seconds


def test_a_bucket_gives_its_burst_and_then_its_rate():
    bucket = Bucket(rate=2.0, burst=3)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    pass_seconds(bucket, 1.0)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    pass_seconds(bucket, 1e9)
    assert bucket.left() == 3


@pytest.mark.parametrize(
    "address, network",
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_the_network_of_an_address(address, network):
    assert network_of(address) == network


def test_an_address_is_barred_while_it_is_refused_too_often_and_no_node_calls_from_it(monkeypatch):
    addresses = Addresses()
    assert all(addresses.refused("a") for _ in range(limits.REFUSALS))
    assert not addresses.refused("a")
    assert addresses.barred("a") and not addresses.barred("b")
    addresses.known("a")
    assert not addresses.barred("a")
    monkeypatch.setattr(limits, "KNOWN_SECONDS", -1.0)
    assert addresses.barred("a")
    pass_seconds(addresses._refused["a"], 1.0)
    assert not addresses.barred("a")


def test_the_memory_of_addresses_is_bounded():
    addresses = Addresses()
    for number in range(3 * limits.ADDRESSES):
        addresses.refused(str(number))
        addresses.known(str(number))
    assert len(addresses._refused) == len(addresses._known) == limits.ADDRESSES


def test_a_flood_of_one_reason_is_counted_and_hides_no_other():
    lines = []
    record = Record(lines.append)
    for number in range(10_000):
        record.add(NO_KEY, "203.0.113.7", path="/x" * 5000)
        if number == 5000:
            record.add(Refused(403, "forged_sender", "node 7"), "203.0.113.8", "north", "/v1")
    assert record.counts == {"unknown_key": 10_000, "forged_sender": 1}
    assert [line["reason"] for line in lines].count("unknown_key") == limits.LINES
    forged = lines[-1]
    assert (forged["node"], forged["address"], forged["path"]) == ("north", "203.0.113.8", "/v1")
    pass_seconds(record._buckets["unknown_key"], limits.LINE_SECONDS)
    record.add(NO_KEY, "203.0.113.7")
    assert lines[-1]["more"] == 10_000 - limits.LINES
    assert max(len(json.dumps(line)) for line in lines) < 1000


def test_the_record_on_disk_is_lines_of_json_and_bounded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(link, "AUDIT_BYTES", 10_000)
    line = {"path": "/\n\r\x00\x1b[2J\u2028%s%d" + "x" * 100, "reason": "path"}
    with link._audit(tmp_path) as write:
        for number in range(1000):
            write({**line, "number": number})
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["audit.jsonl"] + [
        f"audit.jsonl.{number}" for number in (1, 2, 3)
    ]
    assert sum(path.stat().st_size for path in files) < 45_000
    for path in files:
        read = [json.loads(text) for text in path.read_text().splitlines()]
        assert read and all(one["path"] == line["path"] for one in read)
    assert json.loads(files[0].read_text().splitlines()[-1])["number"] == 999
