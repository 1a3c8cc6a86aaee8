"""Training configs: a YAML file and `--set a.b=value` → validated, frozen objects."""

from ldm.config.files import ConfigT, load_config, parse_config, read_config, to_yaml, with_overrides
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
    "load_config",
    "parse_config",
    "read_config",
    "section_name",
    "to_yaml",
    "with_overrides",
]
