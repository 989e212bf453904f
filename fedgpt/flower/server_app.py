"""The ServerApp: reads the run's options and runs the server on the Grid that Flower passes."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp

from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import RunOptions
from fedgpt.flower.failure import write_failure
from fedgpt.flower.run_config import options_of, run_config_of
from fedgpt.flower.serve import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the last version.

    The run folder then contains all results. If the run fails, the reason is written for a launcher
    that waits in another process, which shows it; without a launcher the error is raised.
    """
    try:
        serve(options_of(context.run_config), grid)
    except FedGPTError as error:
        if not write_failure(error):
            raise


def run_on(grid: Grid, options: RunOptions) -> None:
    """Run the ServerApp in this process on `grid`, to the last version."""
    context = Context(grid.run.run_id, SUPERLINK_NODE_ID, {}, RecordDict(), run_config_of(options))
    app(grid, context)
