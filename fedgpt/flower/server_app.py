"""The ServerApp: reads the run's options and runs the server on the Grid that Flower passes."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt.core.errors import FedGPTError, Interrupted
from fedgpt.core.options import RunOptions
from fedgpt.flower.failure import keep_failure, write_failure
from fedgpt.flower.run_config import options_of, run_config_of
from fedgpt.flower.serve import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the last version.

    The run folder then contains all results. If the run fails, the reason is written for a launcher
    that waits in another process, which shows it. Without a launcher the error is raised, and for
    a run on a SuperLink the reason is in failure.json of its folder, too.
    """
    options = None
    try:
        options = options_of(context.run_config)
        try:
            serve(options, grid)
        except KeyboardInterrupt:
            if not isinstance(grid, HttpGrid):
                raise
            # asked to stop while it waited for its clients, before the loop
            raise Interrupted(options.run_dir) from None
    except FedGPTError as error:
        if write_failure(error):
            return
        if options is not None and isinstance(grid, HttpGrid):
            keep_failure(error, Path(options.run_dir))
        raise


def run_on(grid: Grid, options: RunOptions) -> None:
    """Run the ServerApp in this process on `grid`, to the last version."""
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run_config_of(options))
    app(grid, context)
