"""Every configuration dataclass, and the one way they are read: YAML, then `--section.key value`.

Unknown keys and wrong types are errors that name the key (jsonargparse). `None` means off.
"""

from __future__ import annotations

from redrafter.config.chat import ChatConfig
from redrafter.config.common import (
    DraftingConfig,
    DType,
    PromptFormat,
    SourceConfig,
    TargetConfig,
    TreeConfig,
)
from redrafter.config.compare import CompareConfig
from redrafter.config.convert import ConvertConfig
from redrafter.config.data import (
    AnswersConfig,
    AskedAnswersConfig,
    BigramsConfig,
    CheckConfig,
    DataConfig,
    ExportSpeculatorsConfig,
    ImportSpeculatorsConfig,
    InstructionsConfig,
    MakeAnswersConfig,
    MakeStatesConfig,
    PrepareConfig,
    ProbeConfig,
    RequestsConfig,
    StatesConfig,
)
from redrafter.config.doctor import DoctorConfig
from redrafter.config.evaluation import (
    CostsConfig,
    LosslessConfig,
    SpeedConfig,
    VerifyConfig,
)
from redrafter.config.heads import KINDS, HeadConfig, LoraSettings
from redrafter.config.hub import PushConfig
from redrafter.config.learning import LearnConfig, StreamConfig
from redrafter.config.lookahead import DiscoTrainConfig, RecordsConfig
from redrafter.config.lookahead_eval import LookaheadEvalConfig
from redrafter.config.plan import PlanConfig
from redrafter.config.report import ReportConfig
from redrafter.config.spec_bench import SpecBenchConfig
from redrafter.config.static import StaticConfig
from redrafter.config.table import AcceptanceConfig, RegretConfig, TableConfig
from redrafter.config.training import (
    LOSSES,
    LossConfig,
    OptimConfig,
    TrainConfig,
    TrainEvalConfig,
)

__all__ = [
    "KINDS",
    "LOSSES",
    "AcceptanceConfig",
    "AnswersConfig",
    "AskedAnswersConfig",
    "BigramsConfig",
    "ChatConfig",
    "CheckConfig",
    "CompareConfig",
    "ConvertConfig",
    "CostsConfig",
    "DType",
    "DataConfig",
    "DiscoTrainConfig",
    "DoctorConfig",
    "DraftingConfig",
    "ExportSpeculatorsConfig",
    "HeadConfig",
    "ImportSpeculatorsConfig",
    "InstructionsConfig",
    "LearnConfig",
    "LookaheadEvalConfig",
    "LoraSettings",
    "LossConfig",
    "LosslessConfig",
    "MakeAnswersConfig",
    "MakeStatesConfig",
    "OptimConfig",
    "PlanConfig",
    "PrepareConfig",
    "ProbeConfig",
    "PromptFormat",
    "PushConfig",
    "RecordsConfig",
    "RegretConfig",
    "ReportConfig",
    "RequestsConfig",
    "SourceConfig",
    "SpecBenchConfig",
    "SpeedConfig",
    "StatesConfig",
    "StaticConfig",
    "StreamConfig",
    "TableConfig",
    "TargetConfig",
    "TrainConfig",
    "TrainEvalConfig",
    "TreeConfig",
    "VerifyConfig",
]
