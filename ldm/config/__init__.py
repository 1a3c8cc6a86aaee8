"""Training configs: validated, frozen objects, and their YAML. `ldm.config.overrides` reads what a user gives."""

from ldm.config.files import ConfigT, parse_config, read_config, to_yaml
from ldm.config.schema import (
    AutoencoderLossConfig,
    AutoencoderTrainingConfig,
    DiffusionTrainConfig,
    FinetuneConfig,
    LDMConfig,
    SampleConfig,
    TextConfig,
    TrainConfig,
    check_autoencoder,
    check_objective,
    section_name,
)

__all__ = [
    "AutoencoderLossConfig",
    "AutoencoderTrainingConfig",
    "ConfigT",
    "DiffusionTrainConfig",
    "FinetuneConfig",
    "LDMConfig",
    "SampleConfig",
    "TextConfig",
    "TrainConfig",
    "check_autoencoder",
    "check_objective",
    "parse_config",
    "read_config",
    "section_name",
    "to_yaml",
]
