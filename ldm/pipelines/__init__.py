"""From text to images: what a user calls."""

from ldm.pipelines.images import ProgressStrip, contact_sheet, from_pil, save_png, to_pil
from ldm.pipelines.pipeline import Pipeline, PipelineOutput
from ldm.pipelines.sampling import SAMPLERS, NotFinite, SamplingParams
from ldm.text import CutPromptWarning
