"""The data set that training reads: samples, split, sampling order, batches.

What finds the samples of a path is not imported here: `layouts.open_source`, `inspection.inspect`,
`report.dataset_report`.
"""

from ldm.data.batching import BatchOrder, Buckets, SampleOrder, bucket_sizes, micro_batches
from ldm.data.dataset import (
    Batch,
    CaptionedImages,
    Item,
    collate,
    ignore_signals,
    image_statistics,
    split,
    to_signed,
    to_uint8,
)
from ldm.data.rng import generator
from ldm.data.sources import DataConfig, NoCaptionsError, Sample, Skipped, Source

__all__ = [
    "Batch",
    "BatchOrder",
    "Buckets",
    "CaptionedImages",
    "DataConfig",
    "Item",
    "NoCaptionsError",
    "Sample",
    "SampleOrder",
    "Skipped",
    "Source",
    "bucket_sizes",
    "collate",
    "generator",
    "ignore_signals",
    "image_statistics",
    "micro_batches",
    "split",
    "to_signed",
    "to_uint8",
]
