"""Three sites and a server on this machine: keys, clients, and an asynchronous run over TLS.

    python simulations/deploy/one_host.py                 # a new folder, which is kept
    python simulations/deploy/one_host.py --folder DIR --rounds 30

Every command is printed before it is run, so that it can be typed on three machines as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from deployment import SITES, deployment


def main() -> int:
    """Run it; returns the exit code of the server."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--rounds", type=int, default=30, help="versions of the model (30)")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="fedgpt-deploy-")) / "deployment"
    with deployment(folder) as one:
        print(f"$ cd {one.folder}  # the output of each process is in logs/", flush=True)
        one.write_texts()
        one.make_keys()
        for site in SITES:
            one.start_client(site)
        options = ["name=first", "pace=buffer", "pace.clients=3", f"rounds={chosen.rounds}"]
        options += ["local.steps=10", "tokenizer.vocab_size=2048", "evaluate.samples=0"]
        server = one.start_server(*one.run_options(*options))
        code = server.wait()
        print(one.log("server"), end="")
        for site in SITES:
            told = [line for line in one.log(site).splitlines() if "its model is in" in line]
            print(f"{site}: {''.join(told[-1:]) or 'has no model'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
