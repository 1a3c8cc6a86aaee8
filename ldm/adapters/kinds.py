"""What a file is that is no plain LoRA of a UNet and its text encoder: told from the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

# Names may have dots, or underscores as kohya writes them.
_NETWORK = r"(?:unet\.|lora_unet_|(?:model\.)?diffusion_model\.|base_model\.model\.)?"
_ARCHITECTURES = {
    "layers of Stable Diffusion XL": (
        r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|conditioner\.embedders\."
        rf"|{_NETWORK}(?:label_emb|add_embedding)[._]"
    ),
    "layers of a transformer such as Flux or Stable Diffusion 3": (
        r"transformer\.|lora_transformer_|lora_te3_|text_encoder_3\.|text_encoders\.(?!clip_l\.)"
        rf"|{_NETWORK}(?:transformer\.)?(?:(?:double|single|joint|single_transformer|transformer)_)?"
        r"(?:blocks|layers)[._]\d"
    ),
    "layers of a motion module": r".*motion_modules?[._]",
    "layers of a ControlNet": r"(?:lora_)?control(?:net)?[._]|control_model\.|.*(?:input_hint_block|zero_convs)[._]",
}
_KINDS = {
    "magnitudes of DoRA": r".*(?:\.dora_scale|\.lora_magnitude_vector(?:\.\w+)*)",
    "factors of LoHa": r".*\.hada_[wt]\d.*",
    "factors of LoKr": r".*\.lokr_[wt]\d.*",
    "rotations of OFT": r".*(?:[._]b?oft_\w+)(?:\.\w+)*",
    "scales of IA3": r".*(?:\.on_input|[._]ia3_l(?:\.\w+)*)",
    "factors of GLoRA": r".*\.(?:a|b)[12]\.weight|.*\.[abc]m\.weight",
    "vectors of VeRA": r".*vera_lambda.*",
    "singular values of AdaLoRA": r".*\.(?:lora_E|ranknum)(?:\.\w+)*",
    "cores of a Tucker decomposition (LoCon)": r".*\.lora_mid\.weight",
    "a LoRA of embeddings": r".*\.lora_embedding_[AB](?:\.\w+)*",
    "biases beside A or B": r".*[._]lora(?:_(?:A|B|up|down)|\.(?:up|down)|_linear_layer\.(?:up|down))\.bias",
    "whole differences of weights": r".*\.(?:diff(?:_b)?|[wb]_norm|set_weight|set_bias|reshape_weight)",
    "whole layers saved beside it": r".*\.modules_to_save\..*",
    "embeddings of textual inversion": (
        r"bundle_emb\..*|.*string_to_(?:param|token).*|emb_params|clip_[lg]|learned_embeds.*|<.*>"
    ),
}
# Of the text states of Stable Diffusion XL.
_XL_WIDTH = 2048
_TO_TEXT = re.compile(r".*attn2[._](?:processor[._])?to_[kv][._]lora(?:_A|[._]down|_linear_layer\.down)\..*")


def check_plain_lora(path: Path, tensors: Mapping[str, Tensor], text_width: int | None) -> None:
    """`ValueError` where a file holds something else than A, B and α of layers, or layers of another architecture.

    Args:
        text_width: of the text states of the UNet that it is meant for, if that is known.
    """
    found: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind, pattern in _ARCHITECTURES.items() if re.match(pattern, key)), None)
        kind = kind or next((kind for kind, pattern in _KINDS.items() if re.fullmatch(pattern, key)), None)
        wide = tensor.ndim > 1 and tensor.shape[1] == _XL_WIDTH != text_width
        if kind is None and wide and _TO_TEXT.match(key):
            kind = "layers of Stable Diffusion XL"
        if kind is not None:
            found.setdefault(kind, []).append(key)
    if not found:
        return
    order = [kind for kind in (*_ARCHITECTURES, *_KINDS) if kind in found]
    named = [f"{kind} ({len(found[kind])} of {len(tensors)} tensors, such as {min(found[kind])})" for kind in order]
    remedy = "choose one for Stable Diffusion 1.x or 2.x"
    if order[0] not in _ARCHITECTURES:
        remedy = "choose a plain LoRA, or save it as one with the tool that made it"
    raise ValueError(f"{path} is no plain LoRA for this model: it holds {' and '.join(named)}; {remedy}")
