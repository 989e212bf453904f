"""Classes from outside fedgpt, in a module `outsider` in a folder of its own.

The module consists of the examples in the docstrings of the interfaces, so the tests run what these
show.
"""

from __future__ import annotations

import doctest
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from fedgpt.aggregate.base import Strategy
from fedgpt.data.corpora.base import Corpus
from fedgpt.data.partitions.base import Partition
from fedgpt.update.codecs.base import Codec

INTERFACES = (Codec, Corpus, Partition, Strategy)
# what the example of Strategy needs; the other examples import for themselves
IMPORTS = """from fedgpt.aggregate.base import Strategy, advance
from fedgpt.core.messages import Pacing, ServerState, Update
"""
MODULE = "outsider"
TRUSTED = f"trusted_packages=[{MODULE}]"


def write(folder: Path, more: str = "") -> Path:
    """Write the module to `folder`: every statement of the examples that prints nothing, and
    `more`.
    """
    parser = doctest.DocTestParser()
    examples = [one for cls in INTERFACES for one in parser.get_examples(cls.__doc__ or "")]
    path = folder / f"{MODULE}.py"
    sources = [one.source for one in examples if not one.want]
    path.write_text("".join([IMPORTS, *sources, more]), encoding="utf-8")
    return path


FOLDER = TemporaryDirectory(prefix="fedgpt-outsider-")
write(Path(FOLDER.name))
sys.path.append(FOLDER.name)
