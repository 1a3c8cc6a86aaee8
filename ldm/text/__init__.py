"""Frozen text encoders behind one protocol: captions in, hidden states [B, L, D] out."""

from ldm.text.encoder import TextEncoder
from ldm.text.loading import load_text_encoder, load_text_encoder_folders

__all__ = ["TextEncoder", "load_text_encoder", "load_text_encoder_folders"]
