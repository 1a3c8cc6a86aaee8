"""The data set that training reads: samples, split, sampling order, batches.

What finds the samples of a path is not imported here: `layouts.open_source`, `inspection.inspect`,
`report.dataset_report`.
"""

from ldm.data.dataset import (
    Batch,
    CaptionedImages,
    collate,
    ignore_signals,
    image_statistics,
    split,
    to_signed,
    to_uint8,
)
from ldm.data.rng import SampleOrder, generator, micro_batches
from ldm.data.sources import DataConfig, NoCaptionsError, Sample
