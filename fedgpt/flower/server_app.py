"""The ServerApp: reads the run's options and runs the server on the Grid that Flower passes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import write_text
from fedgpt.core.options import RunOptions
from fedgpt.core.runtimes import runtime_of
from fedgpt.flower.run_config import options_of, run_config_of
from fedgpt.flower.serve import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the last version.

    The run folder then contains all results. If the run fails in a separate process, the folder
    contains failure.json with the reason, which the launcher reads.
    """
    options = options_of(context.run_config)
    try:
        serve(options, grid)
    except FedGPTError as error:
        if runtime_of(options).in_process:
            raise
        failure = {"kind": type(error).__name__, "message": str(error)}
        with suppress(OSError):  # the disk may be full
            write_text(Path(options.run_dir) / "failure.json", json.dumps(failure) + "\n")
        raise


def run_on(grid: Grid, options: RunOptions) -> None:
    """Run the ServerApp in this process on `grid`, to the last version."""
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run_config_of(options))
    app(grid, context)
