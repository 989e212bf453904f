"""The ClientApp: which client a SuperNode is."""

from __future__ import annotations

import pytest
from flwr.app import Context, Metadata, RecordDict
from flwr.app.message import make_message
from support.here import tiny_run

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.flower import client_app
from fedgpt.flower.messages import read_info
from fedgpt.flower.run_config import run_config_of


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"partition-id": 7, "num-partitions": 2}, "partition-id=7: must be from 0 to 1, as the"),
        ({"partition-id": -1, "num-partitions": 2}, "partition-id=-1: must be from 0 to 1"),
        ({"partition-id": 0, "num-partitions": 5}, "num-partitions=5: the run has 2 clients"),
        ({"partition-id": "first", "num-partitions": 2}, "'first' is not a whole number"),
        ({"num-partitions": 2}, "partition-id: is missing"),
    ],
)
def test_a_node_with_a_wrong_number_is_refused_with_its_option(tmp_path, config, message):
    options = compose.load(tiny_run(tmp_path))
    request = make_message(Metadata(1, "", 0, 1, "", "", 0.0, 60.0, "query"), RecordDict())
    context = Context(1, 7, config, RecordDict(), run_config_of(options))
    answer = client_app.app(request, context)
    with pytest.raises(ConfigError, match=message):
        read_info(answer)
