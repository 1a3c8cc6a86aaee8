"""Frozen text encoders behind one protocol: captions in, hidden states [B, L, D] out."""

from ldm.text.encoder import CutPromptWarning, TextEncoder, check_text, ignore_cut_prompts
from ldm.text.loading import REFERENCE, load_text_encoder, load_text_encoder_folders, reference_to
