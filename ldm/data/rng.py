"""Keyed random generators and content hashes."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A generator for one purpose: `generator(seed, "flip", epoch, sample_id)`.

    The stream is a function of the arguments: their 128-bit blake2b digest is the key of Philox, a counter-based
    generator (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3). Exact repetition needs the same version
    of numpy.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        digest.update(_encode(part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _encode(part: int | str) -> bytes:
    # With type and length, so that 1 and "1", or ("a", "bc") and ("ab", "c"), differ. File names that are not UTF-8
    # hold lone surrogates.
    if isinstance(part, str):
        payload, kind = part.encode("utf-8", "surrogatepass"), b"s"
    else:
        payload, kind = str(operator.index(part)).encode(), b"i"
    return kind + len(payload).to_bytes(8, "little") + payload


def content_hash(data: bytes) -> str:
    """The blake2b hash of some bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def pick(choices: Sequence[T], rng: np.random.Generator) -> T:
    """A uniformly random element."""
    return choices[int(rng.integers(len(choices)))]
