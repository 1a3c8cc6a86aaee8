"""From the names that tables give to images to the files of a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from ldm.data.captions import printable
from ldm.data.folder import IMAGES, FolderFiles, nfc, stem, suffix

_NAMES_TO_TRY = 100
_FOLDERS_TO_TRY = 50
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
Key = TypeVar("Key")


class FileNames:
    """The files of a folder by the names that a table may have for them.

    A name leads to the file that it spells, relative to a folder, in full, or with backslashes. The same letters in
    other code points, the suffix in other case, and a name without its suffix lead to a file too, if it is the only
    one. No name leads out of the folder.
    """

    def __init__(self, found: FolderFiles) -> None:
        self.found = found

    def resolve(self, base: str, name: str, *, anywhere: bool = False) -> str:
        """The path within the folder; ValueError with the reason if there is no such file in it.

        Args:
            base: what names are relative to, "" or ending in "/".
            anywhere: a name is the end of a path, in whatever folder that lies, if it is the end of one alone.
        """
        shown = printable(name)[:200]
        if re.match(r"[a-z][a-z0-9+.-]+://|data:", name, re.IGNORECASE):
            raise ValueError(f"{shown[:80]} is a URL; URLs are not downloaded, give the name of a file")
        # A backslash is a letter here and a separator where many tables are made.
        spelled = [self._within(base, name), self._within(base, name.replace("\\", "/"))]
        for path in spelled:
            if path is not None and self._is_file(path):
                return path
        meant = spelled[-1]
        if meant is None:
            moved = self._moved(name)
            if len(moved) == 1:
                return moved[0]
            raise ValueError(f"{shown} lies outside the folder")
        meant = without_number(meant)
        if self._is_file(meant):
            return meant
        alike = self._alike(meant) or (self._ending(meant) if anywhere else [])
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ValueError(f"{shown} may be {' or '.join(map(printable, alike[:2]))}; give the whole name")
        raise ValueError(f"there is no file {shown}{self._hint(meant)}")

    def base_folder(self, table: str, names: Iterable[str]) -> tuple[str, bool] | None:
        """The folder that names in the file `table` are relative to, and `anywhere` as `resolve` takes it.

        It is the folder that most of the first hundred are in, of: the table's own, those of images that it is called
        after, as captions_val2017.json is after val2017/, those below its own, those above it, all others. If more of
        them are the end of one path each, or as many and the folder is not the table's own, they are that. None if no
        name leads to an image.
        """
        found = ((name, self._ending(_tail(without_number(name)))) for name in dict.fromkeys(names))
        ends = dict(islice(((name, paths) for name, paths in found if paths), _NAMES_TO_TRY))
        tried, own = list(ends), parent_prefix(table)
        holding = Counter(parent_prefix(path) for paths in ends.values() for path in paths)
        best, most = own, 0
        for base in _bases(table, [folder for folder, _ in holding.most_common(_FOLDERS_TO_TRY)]):
            held = sum(self._holds(base, name) for name in tried)
            if held > most:
                best, most = base, held
            if most == len(tried):
                break
        if most < len(tried):
            held = sum(self._holds("", name, anywhere=True) for name in tried)
            if held > most or (held == most > 0 and best != own):
                return "", True
        return (best, False) if most else None

    def _holds(self, base: str, name: str, anywhere: bool = False) -> bool:
        try:
            return suffix(self.resolve(base, name, anywhere=anywhere)) in IMAGES
        except ValueError:
            return False

    def _within(self, base: str, name: str) -> str | None:
        root = self.found.root
        if os.path.isabs(name):
            for top in (os.path.abspath(root), os.path.realpath(root)):
                if os.path.commonpath([top, os.path.normpath(name)]) == top:
                    return os.path.relpath(name, top)
            return None
        path = os.path.normpath(base + name)
        return None if path.split(os.sep)[0] == ".." or _DRIVE.match(name) else path

    def _moved(self, name: str) -> Sequence[str]:
        """Images that a whole path of another machine, where nothing is here, names by as long an end as there is."""
        if not (os.path.isabs(name) or _DRIVE.match(name)) or os.path.exists(name):
            return ()
        parts = name.replace("\\", "/").split("/")
        tails = ("/".join(parts[first:]) for first in range(1, len(parts)))
        return next((paths for tail in tails if tail and (paths := self._ending(tail))), ())

    def _is_file(self, path: str) -> bool:
        try:
            return path in self._files or os.path.isfile(self.found.root / path)
        except ValueError:  # a NUL in the name
            return False

    def _alike(self, path: str) -> Sequence[str]:
        """Files that `path` names in other code points, with the suffix in other case, or without its suffix."""
        path = nfc(path)
        same = [other for other in self._composed.get(path, ()) if suffix(other) == suffix(path)]
        if same:
            return same
        if suffix(path) in IMAGES:
            return [other for other in self._stems.get(nfc(stem(path)), ()) if suffix(other) == suffix(path)]
        return self._stems.get(path, ())

    def _ending(self, path: str) -> Sequence[str]:
        """Images whose path ends with `path`, which may lack its suffix."""
        path = nfc(path)
        ends = self._tails.get(_tail(path).casefold(), ())
        if suffix(path) in IMAGES:
            whole = [f"/{nfc(stem(other))}{suffix(other)}" for other in ends]
            path = stem(path) + suffix(path)
        else:
            whole = [f"/{nfc(stem(other))}" for other in ends]
        exact = [other for other, full in zip(ends, whole, strict=True) if full.endswith(f"/{path}")]
        return exact or (self._numbers.get(int(path), ()) if re.fullmatch(r"[0-9]{1,18}", path) else ())

    @cached_property
    def _files(self) -> set[str]:
        return set(self.found.files)

    @cached_property
    def _images(self) -> list[str]:
        return [path for path in self.found.files if suffix(path) in IMAGES]

    @cached_property
    def _composed(self) -> dict[str, list[str]]:
        return _grouped((nfc(path), path) for path in self.found.files if not path.isascii())

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        return _grouped((nfc(stem(path)), path) for path in self._images)

    @cached_property
    def _tails(self) -> dict[str, list[str]]:
        named = ((_tail(nfc(path)).casefold(), path) for path in self._images)
        bare = ((_tail(nfc(stem(path))).casefold(), path) for path in self._images)
        return _grouped((*named, *bare))

    @cached_property
    def _numbers(self) -> dict[int, list[str]]:
        """COCO calls image 139 000000000139.jpg, or COCO_train2014_000000000139.jpg."""
        return _grouped(
            (int(match[1]), path)
            for path in self._images
            if (match := re.fullmatch(r"(?:COCO_[a-z]+\d+_)?([0-9]{1,18})", _tail(stem(path))))
        )

    @cached_property
    def _folded(self) -> dict[str, str]:
        folded = {nfc(stem(path)).casefold(): path for path in self._images}
        return folded | {nfc(path).casefold(): path for path in self._images}

    def _hint(self, path: str) -> str:
        """What may be meant that nobody may take for it: other case, another suffix."""
        folded = nfc(path).casefold()
        ends = self._tails.get(folded, [""])
        near = self._folded.get(folded) or self._folded.get(stem(folded)) or ends[0]
        return f"; did you mean {printable(near)}?" if near else ""


def _bases(table: str, folders: Sequence[str]) -> Iterable[str]:
    """What names of a table may be relative to: its folder, those that it is called after, those below its own, those
    above it, and the others.
    """
    own, name = parent_prefix(table), stem(_tail(table))
    called = [folder for folder in sorted(folders) if _is_called(name, _tail(folder.rstrip("/")))]
    above = [own[: match.end()] for match in reversed(list(re.finditer("/", own.removesuffix("/"))))]
    below = [folder for folder in sorted(folders) if folder.startswith(own)]
    return dict.fromkeys((own, *called, *below, *above, "", *sorted(folders)))


def _is_called(table: str, folder: str) -> bool:
    """Whether one of the words of a table's name begins as the name of a folder does, or that as the word."""
    words = [word for word in re.split(r"[\W_]+", table.casefold()) if len(word) > 2]
    return len(folder) > 2 and any(
        word.startswith(folder.casefold()) or folder.casefold().startswith(word) for word in words
    )


def without_number(name: str) -> str:
    """ "1000.jpg" of "1000.jpg#0", as Flickr's lists number the captions of an image."""
    return re.sub(r"#\d+$", "", name) if suffix(re.sub(r"#\d+$", "", name)) in IMAGES else name


def parent_prefix(path: str) -> str:
    """ "a/" of "a/b.png", "" of "b.png"."""
    return path[: path.rfind("/") + 1]


def _tail(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for key, path in pairs:
        if path not in groups.setdefault(key, []):
            groups[key].append(path)
    return groups
