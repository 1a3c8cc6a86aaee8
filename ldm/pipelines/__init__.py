"""From text to images: what a user calls."""

from ldm.pipelines.drawing import PipelineOutput
from ldm.pipelines.finite import NotFinite
from ldm.pipelines.images import ProgressStrip, contact_sheet, from_pil, save_png, to_pil
from ldm.pipelines.pipeline import Pipeline
from ldm.pipelines.sampling import SAMPLERS
from ldm.text import CutPromptWarning

__all__ = [
    "SAMPLERS",
    "CutPromptWarning",
    "NotFinite",
    "Pipeline",
    "PipelineOutput",
    "ProgressStrip",
    "contact_sheet",
    "from_pil",
    "save_png",
    "to_pil",
]
