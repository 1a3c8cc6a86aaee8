"""From text to images: what a user calls."""

from ldm.pipelines.images import contact_sheet, save_png, to_pil
from ldm.pipelines.pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput", "contact_sheet", "save_png", "to_pil"]
