"""Makes a first stage half as wide again, as the same function, so that training goes on from what was learned.

    python experiments/widen_first_stage.py openmoji-first-stage runs/scenes-first-stage-wide

Groups of normalization keep their size and get company, old channels do not read new ones, and new ones start at random
(after Net2Net, arXiv:1511.05641, with zeros instead of copies).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from ldm import hub
from ldm.models import AutoencoderConfig, AutoencoderKL


def widened(network: AutoencoderKL, numerator: int = 3, denominator: int = 2) -> AutoencoderKL:
    """A network whose channels are `numerator` / `denominator` as many, and which computes the same.

    Raises:
        ValueError: if the channels or groups do not divide.
    """
    config: AutoencoderConfig = network.config
    for count in (*config.block_out_channels, config.norm_num_groups):
        if count * numerator % denominator:
            raise ValueError(f"{count} channels or groups cannot become {numerator}/{denominator} as many")
    wide = AutoencoderKL(
        dataclasses.replace(
            config,
            block_out_channels=tuple(count * numerator // denominator for count in config.block_out_channels),
            norm_num_groups=config.norm_num_groups * numerator // denominator,
        )
    )
    old = network.state_dict()
    with torch.no_grad():
        for name, value in wide.state_dict().items():
            known = old[name]
            if value.dim() > 1:
                value[: known.shape[0], known.shape[1] :] = 0
                value[: known.shape[0], : known.shape[1]] = known
            else:
                value[: known.shape[0]] = known
    return wide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first_stage", help="a folder, or the name of a built-in one")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    try:
        network = hub.load_autoencoder(hub.find_autoencoder(arguments.first_stage))
        if not isinstance(network, AutoencoderKL):
            raise ValueError(f"{arguments.first_stage} has a codebook; name an autoencoder with a normal posterior")
        hub.save_model(arguments.target, widened(network))
    except ValueError as error:
        parser.error(str(error))
    print(arguments.target)


if __name__ == "__main__":
    main()
