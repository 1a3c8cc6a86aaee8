import itertools

import numpy as np

from ldm.data import generator


def draw(*key: int | str) -> bytes:
    return generator(*key).bytes(16)  # type: ignore[arg-type]


def test_equal_keys_give_equal_streams() -> None:
    assert draw(0, "flip", 3, "a.png") == draw(0, "flip", 3, "a.png")
    assert draw(0, np.int64(3)) == draw(0, 3)  # type: ignore[arg-type]


def test_key_parts_are_unambiguous() -> None:
    keys = [
        (0,),
        (1,),
        (-1,),
        (0, ""),
        (0, 0),
        (0, "0"),
        (0, 1, 11),
        (0, 11, 1),
        (0, 111),
        (0, "a", "bc"),
        (0, "ab", "c"),
        (0, "abc"),
        (0, "flip", 1, "a"),
        (0, "crop", 1, "a"),
        (0, "flip", 2, "a"),
        (0, "flip", 1, "b"),
        (2**80, "a"),
        (0, "\udcff"),  # an id from a file name that is not UTF-8
    ]
    for one, other in itertools.combinations(keys, 2):
        assert draw(*one) != draw(*other), (one, other)


def test_a_stream_is_known_so_that_runs_can_be_repeated() -> None:
    # Independent of this code: blake2b over tag, length and payload of each part, as a Philox key.
    import hashlib

    part = b"i" + (1).to_bytes(8, "little") + b"7" + b"s" + (4).to_bytes(8, "little") + b"flip"
    key = int.from_bytes(hashlib.blake2b(part, digest_size=16).digest(), "little")
    assert draw(7, "flip") == np.random.Generator(np.random.Philox(key=key)).bytes(16)


def test_keyed_draws_are_uniform() -> None:
    draws = np.array([generator(0, "u", index).random() for index in range(4000)])
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.06
