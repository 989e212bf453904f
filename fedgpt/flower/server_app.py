"""The ServerApp: finds the run's options and serves it on whatever Grid Flower hands over."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import write_text
from fedgpt.flower.run_config import options_of
from fedgpt.flower.serve import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run to the last version; the run folder holds everything that came of it, or failure.json and
    why.
    """
    options = options_of(context.run_config)
    try:
        serve(options, grid)
    except FedGPTError as error:
        if options.runtime.name == "pool":
            raise
        # a launcher in another process learns the reason from the folder
        failure = {"kind": type(error).__name__, "message": str(error)}
        with suppress(OSError):  # it may be that there is no room for it
            write_text(Path(options.run_dir) / "failure.json", json.dumps(failure) + "\n")
        raise
