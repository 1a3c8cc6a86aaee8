"""Captioned images: sources, split, sampling order, and the data set that training reads."""

from ldm.data.batching import BatchOrder, Buckets, SampleOrder, bucket_sizes, micro_batches
from ldm.data.builtin import DIGIT_WORDS
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
from ldm.data.inspection import Duplicate, Inspection, inspect
from ldm.data.layouts import open_source
from ldm.data.report import DatasetReport, dataset_report
from ldm.data.rng import generator
from ldm.data.sources import DataConfig, NoCaptionsError, Sample, Skipped, Source

__all__ = [
    "DIGIT_WORDS",
    "Batch",
    "BatchOrder",
    "Buckets",
    "CaptionedImages",
    "DataConfig",
    "DatasetReport",
    "Duplicate",
    "Inspection",
    "Item",
    "NoCaptionsError",
    "Sample",
    "SampleOrder",
    "Skipped",
    "Source",
    "bucket_sizes",
    "collate",
    "dataset_report",
    "generator",
    "ignore_signals",
    "image_statistics",
    "inspect",
    "micro_batches",
    "open_source",
    "split",
    "to_signed",
    "to_uint8",
]
