"""Every option of a run: the schema behind `fedgpt run key=value`, one file for each group.

Plain dataclasses, free of heavy imports, so that help is printed at once. Hydra fills them from
conf/ (see config/compose.py). The options of a built-in strategy are the fields of its class in
aggregate/.
"""

from fedgpt.core.options.attack import AttackOptions
from fedgpt.core.options.checkpoint import CheckpointOptions
from fedgpt.core.options.corpus import CorpusOptions
from fedgpt.core.options.evaluate import EvaluateOptions
from fedgpt.core.options.fleet import FleetOptions
from fedgpt.core.options.local import LocalOptions
from fedgpt.core.options.model import ModelOptions
from fedgpt.core.options.option import described
from fedgpt.core.options.pace import PaceOptions
from fedgpt.core.options.partition import PartitionOptions
from fedgpt.core.options.privacy import PrivacyOptions
from fedgpt.core.options.run import RunOptions
from fedgpt.core.options.runtime import RuntimeOptions
from fedgpt.core.options.strategy import StrategyOptions
from fedgpt.core.options.task import TaskOptions
from fedgpt.core.options.tokenizer import TokenizerOptions
from fedgpt.core.options.update import UpdateOptions
from fedgpt.core.options.validate import ValidateOptions

# as typed -> its facts
OPTIONS = {one.key: one for group in (RunOptions, StrategyOptions) for one in described(group)}

__all__ = [
    "OPTIONS",
    "AttackOptions",
    "CheckpointOptions",
    "CorpusOptions",
    "EvaluateOptions",
    "FleetOptions",
    "LocalOptions",
    "ModelOptions",
    "PaceOptions",
    "PartitionOptions",
    "PrivacyOptions",
    "RunOptions",
    "RuntimeOptions",
    "StrategyOptions",
    "TaskOptions",
    "TokenizerOptions",
    "UpdateOptions",
    "ValidateOptions",
]
