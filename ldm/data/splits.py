"""Which files of a data set belong to the split that is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from ldm.data.captions import printable
from ldm.data.sources import DataConfig

# The words by which `datasets` knows the splits of files.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def choose_split(where: str, paths: Sequence[str], config: DataConfig) -> tuple[list[str], str | None]:
    """The files of `config.subset` (a folder or a file of that name) and `config.split`.

    A file belongs to the split that its name or a folder of it says, as in `data/test-00000-of-00003.parquet`;
    one that says nothing belongs to "train".

    Args:
        where: what holds the files, for messages.
        paths: posix paths within it.

    Returns:
        the files in their order, and the split if there are others.

    Raises:
        ValueError: listing what there is, if there are no such files.
    """
    chosen = list(paths)
    if config.subset is not None:
        chosen = [path for path in paths if config.subset in PurePosixPath(path).with_suffix("").parts]
        if not chosen:
            folders = sorted({PurePosixPath(path).parent.as_posix() for path in paths})
            raise ValueError(
                f'{where} has no files of the subset "{config.subset}"; its files lie in '
                f"{', '.join(map(printable, folders))}; set data.subset to one of these, or leave it out"
            )
    splits: dict[str, list[str]] = {}
    for path in chosen:
        splits.setdefault(_split_of(path), []).append(path)
    wanted = _WORDS.get(config.split, config.split)
    if wanted not in splits:
        raise ValueError(
            f'{where} has no split "{config.split}"; it has {", ".join(sorted(splits))}; set data.split to one of these'
        )
    return splits[wanted], wanted if len(splits) > 1 else None


def _split_of(path: str) -> str:
    # The name itself says it more surely than the folders above.
    for part in reversed(PurePosixPath(path).parts):
        for word in re.split(r"[-._ \d]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return "train"
