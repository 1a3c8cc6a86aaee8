"""The names under which files know the layers of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# In a residual block and outside of all blocks: the name in diffusers, the name in the code of CompVis.
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def file_names(layers: Iterable[str]) -> dict[str, str]:
    """Every name under which a file may have one of these layers → the layer."""
    layers = list(layers)
    known = {alias: name for name in layers for alias in _aliases(name)}
    compvis = {alias: name for name, other in compvis_names(layers).items() for alias in _aliases(other)}
    return compvis | known


def compvis_names(layers: Iterable[str]) -> dict[str, str]:
    """Layers of a UNet → their names in the code of CompVis, from which Stable Diffusion came; of any layout.

    There all blocks of a way are counted through. A residual block with the attention behind it is one; so is a change
    of resolution on the way down, while on the way up it is the last part of the block before it.
    """
    layers = list(layers)
    paths = {name[: dot.start()] for name in layers for dot in re.finditer(r"\.|$", name)}
    found = {ours: theirs for ours, theirs in _OUTSIDE.items() if ours in paths}

    def resnets(block: str, theirs: str, part: int = 0) -> int:
        """Names a residual block and its attention from `part` on; returns the part after them."""
        found.update({f"{block}.{ours}": f"{theirs}.{part}.{name}" for ours, name in _IN_RESNET.items()})
        attention = block.replace(".resnets.", ".attentions.")
        if attention not in paths:
            return part + 1
        start = f"{attention}."
        found.update({name: f"{theirs}.{part + 1}.{name[len(start) :]}" for name in layers if name.startswith(start)})
        return part + 2

    count = 1
    for block in _listed(paths, "down_blocks"):
        for resnet in _listed(paths, f"{block}.resnets"):
            resnets(resnet, f"input_blocks.{count}")
            count += 1
        if f"{block}.downsamplers.0" in paths:
            found[f"{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    part = 0
    for resnet in _listed(paths, "mid_block.resnets"):
        part = resnets(resnet, "middle_block", part)
    count = 0
    for block in _listed(paths, "up_blocks"):
        for resnet in _listed(paths, f"{block}.resnets"):
            part = resnets(resnet, f"output_blocks.{count}")
            count += 1
        if f"{block}.upsamplers.0" in paths:
            found[f"{block}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{part}.conv"
    return {name: found[name] for name in layers if name in found}


def _listed(paths: set[str], module: str) -> Iterator[str]:
    """The entries of a list of modules, in their order."""
    index = 0
    while f"{module}.{index}" in paths:
        yield f"{module}.{index}"
        index += 1


def _aliases(name: str) -> Iterator[str]:
    plain = name.removeprefix("text_model.")
    short = re.sub(r"\.to_out\.0$", ".to_out", plain)  # old diffusers
    old = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", plain)  # old diffusers, text encoder
    for alias in {plain, short, old}:
        for full in (alias, f"text_model.{alias}"):
            yield full
            yield full.replace(".", "_")  # kohya
