"""The share of the machine that a policy leaves to a site, enforced for real."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.advice import advises

from fedgpt.client.limits import limit_process
from fedgpt.client.policy import Policy
from fedgpt.core.device import memory
from fedgpt.core.errors import ConfigError

# allocates `used` times what is allowed, by torch and by numpy, and goes on
WORK = """
import sys
import numpy, torch
from fedgpt.client.limits import limit_process, _data_bytes
from fedgpt.client.policy import Policy
from fedgpt.core.device import memory, out_of_memory

share, used = float(sys.argv[1]), float(sys.argv[2])
said = limit_process(Policy(device="cpu", memory=share, threads=1))
size = int(used * share * memory())
for make in (lambda: torch.empty(size, dtype=torch.uint8), lambda: numpy.empty(size, "u1")):
    try:
        make()
        print("ok")
    except (MemoryError, RuntimeError) as error:
        print("refused" if out_of_memory(error) else repr(error))
torch.zeros(1000).sum()  # and the process goes on
print(torch.get_num_threads(), said)
"""


@pytest.mark.parametrize("used, result", [(0.3, "ok"), (1.05, "refused")])
def test_memory_beyond_the_share_is_refused_and_the_process_goes_on(used, result):
    share = 4 * 2**30 / memory()  # 4 GiB
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(share), str(used)],
        capture_output=True,
        text=True,
        check=True,
    )
    *results, last = done.stdout.splitlines()
    assert results == [result, result]
    assert last.startswith("1 at most 4.00 GiB of the machine's")


def test_a_share_that_is_smaller_than_the_process_is_told_with_the_least_that_works():
    with pytest.raises(ConfigError) as caught:
        limit_process(Policy(device="cpu", memory=1e-9))
    least = str(caught.value).rpartition(" ")[2]
    advises(caught.value, f"raise it above {least}")
    assert 0 < float(least) < 1


def test_memory_can_be_limited_on_linux_only(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError) as caught:
        limit_process(Policy(device="cpu", memory=0.5))
    advises(caught.value, "leave it out")
    assert limit_process(Policy(device="cpu")) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_beyond_the_share_is_refused():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        assert "of the GPU's" in limit_process(Policy(device="cuda", memory=0.1))
        torch.empty(int(0.05 * total), dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(0.11 * total), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
