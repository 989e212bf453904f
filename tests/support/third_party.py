"""Classes from outside fedgpt, in a module `outsider` in a folder of its own.

The module consists of the examples in the docstrings of the interfaces, so the tests run what these
show.
"""

from __future__ import annotations

import doctest
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedgpt.data.corpora.base import Corpus
from fedgpt.data.partitions.base import Partition
from fedgpt.update.codecs.base import Codec

INTERFACES = (Codec, Corpus, Partition)
MODULE = "outsider"
TRUSTED = f"trusted_packages=[{MODULE}]"


def write(folder: Path) -> Path:
    """Write the module to `folder`: every statement of the examples that prints nothing."""
    parser = doctest.DocTestParser()
    examples = [one for cls in INTERFACES for one in parser.get_examples(cls.__doc__ or "")]
    path = folder / f"{MODULE}.py"
    path.write_text("".join(one.source for one in examples if not one.want), encoding="utf-8")
    return path


FOLDER = TemporaryDirectory(prefix="fedgpt-outsider-")
write(Path(FOLDER.name))
sys.path.append(FOLDER.name)
