"""Random numbers that are a function of their purpose, not of what was drawn before them."""

from __future__ import annotations

import hashlib
import operator

import numpy as np


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A fresh generator for one purpose, e.g. `generator(seed, "flip", epoch, sample_id)`.

    Equal arguments give an equal stream in every process and thread; different arguments give streams that
    are independent for all practical ends: a 128-bit blake2b digest of the arguments keys Philox, a
    counter-based generator (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3). The streams of
    numpy's `Generator` methods may change between versions of numpy, so an exact repetition needs the same
    numpy.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *key):
        digest.update(_encode(part))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))


def _encode(part: int | str) -> bytes:
    # Type and length go first: otherwise 1 and "1", or ("a", "bc") and ("ab", "c"), would be one key.
    # surrogatepass: an id made from a file name that is not valid UTF-8 holds lone surrogates.
    if isinstance(part, str):
        payload, kind = part.encode("utf-8", "surrogatepass"), b"s"
    else:
        payload, kind = str(operator.index(part)).encode(), b"i"
    return kind + len(payload).to_bytes(8, "little") + payload


def content_hash(data: bytes) -> str:
    """The blake2b hash of some bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
