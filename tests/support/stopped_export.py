"""Exports a model again and again over the same folder, and is killed at each step of it.

    python -m support.stopped_export FOLDER MODEL TOKENIZER

FOLDER holds the files before; MODEL is a folder with the model to export, and TOKENIZER with its
tokenizer. FOLDER-0, FOLDER-1 ... are what is left by kill -9 before the first, second ... change of
a name, which is a rename or a removal of a file. The last one is the complete export.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from fedgpt.data.tokenizer import load_tokenizer
from fedgpt.model.hf import export_model, import_model


def killed_at(step: int) -> None:
    """End this process by kill -9 when it is about to change a file's name for the time `step`."""
    left = [step]

    def watch(event: str, _: tuple[object, ...]) -> None:
        if event in ("os.rename", "os.remove"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(watch)


def main(folder: Path, model: Path, tokenizer: Path) -> None:
    """Export in one child process for each step, until one is not killed."""
    exported, its_tokenizer = import_model(model), load_tokenizer(tokenizer)
    for step in range(99):
        copy = folder.with_name(f"{folder.name}-{step}")
        shutil.copytree(folder, copy)
        if not (child := os.fork()):
            killed_at(step)
            its_tokenizer.save(copy)
            export_model(copy, exported, card="# A model\n")
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
