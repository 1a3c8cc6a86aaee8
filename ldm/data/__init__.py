"""Captioned images: sources, split, sampling order, and the data set that training reads."""

from ldm.data.account import Account, account_of
from ldm.data.buckets import Buckets, bucket_sizes
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
from ldm.data.digits import DIGIT_WORDS
from ldm.data.inspection import Duplicate, Inspection, inspect
from ldm.data.keyed import generator
from ldm.data.order import BatchOrder, SampleOrder, micro_batches
from ldm.data.sources import DataConfig, NothingCaptionedError, Sample, Skipped, Source, open_source

__all__ = [
    "DIGIT_WORDS",
    "Account",
    "Batch",
    "BatchOrder",
    "Buckets",
    "CaptionedImages",
    "DataConfig",
    "Duplicate",
    "Inspection",
    "Item",
    "NothingCaptionedError",
    "Sample",
    "SampleOrder",
    "Skipped",
    "Source",
    "account_of",
    "bucket_sizes",
    "collate",
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
