"""Training configs: a YAML file and `--set a.b=value` → validated, frozen objects."""

from ldm.config.files import C, load_config, parse_config, read_config, to_yaml, with_overrides
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
    section_of,
)

__all__ = [
    "AutoencoderLossConfig",
    "AutoencoderTrainingConfig",
    "C",
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
    "section_of",
    "to_yaml",
    "with_overrides",
]
