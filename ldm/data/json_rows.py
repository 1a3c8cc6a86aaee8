"""The rows of JSON files that give captions to image files: COCO's, lists and objects of records, kohya's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ldm.data.captions import CAPTION_NAMES, FILE_NAMES, match_column
from ldm.data.rows import JsonLines, Row

_ROWS_FOR_COLUMNS = 1000
Record = dict[str, Any] | str  # or why there is none


class JsonRows:
    """One JSON value as rows; `number` of a row is the place of its entry.

    - COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}; without images, and in the list
      of its results, the number of an image is its name
    - a list of objects, alone or as the one list of objects in an object, such as Karpathy's {"images": [{"filename",
      "sentences": [{"raw"}]}]}
    - an object of captions by file name: texts, lists of texts, or objects such as kohya's {"caption", "tags"}, where
      the tags count if there is no caption
    - JSON lines under the wrong name

    Raises:
        ValueError: with the reason, if it is none of these.
    """

    def __init__(self, text: str) -> None:
        try:
            value = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            self.is_coco, self._records = False, _lines(text)
            if not self._records:
                raise ValueError(f"not JSON: {error}") from error
        else:
            self.is_coco = isinstance(value, dict) and _is_coco(value)
            if isinstance(value, dict) and not self.is_coco and _is_boxes(value):
                raise ValueError("its annotations have no captions")
            self._records = list(_coco(value) if self.is_coco else _records(value))
        known = [record for record in self._records if isinstance(record, dict)]
        self.columns = list(dict.fromkeys(key for record in known[:_ROWS_FOR_COLUMNS] for key in record))
        if not self.columns:
            raise ValueError("no list or object of captions")

    def read(self, columns: Sequence[str]) -> Iterator[Row]:
        for number, record in enumerate(self._records, start=1):
            if isinstance(record, dict):
                yield Row(number, {name: record[name] for name in columns if name in record})
            else:
                yield Row(number, {}, record)


def _lines(text: str) -> list[Record]:
    try:
        lines = JsonLines(text)
    except ValueError:
        return []
    return [row.fault or row.cells for row in lines.read(lines.columns)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; what it has twice under one key becomes one list, where `dict` would forget the first."""
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    several: dict[str, list[Any]] = {}
    for key, value in pairs:
        several.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return {key: value if len(value) > 1 else value[0] for key, value in several.items()}


def _is_coco(value: dict[str, Any]) -> bool:
    annotations = value.get("annotations")
    return isinstance(annotations, list) and any(
        isinstance(entry, dict) and {"image_id", "caption"} <= entry.keys() for entry in annotations
    )


def _is_boxes(value: dict[str, Any]) -> bool:
    """Whether it is COCO's, of boxes or points, and its images have no captions either."""
    annotations, images = value.get("annotations"), value.get("images")
    return (
        isinstance(annotations, list)
        and isinstance(images, list)
        and _is_list_of_named(images)
        and any(isinstance(entry, dict) and "image_id" in entry for entry in annotations)
        and not any(isinstance(entry, dict) and match_column(entry, CAPTION_NAMES) is not None for entry in images)
    )


def _coco(value: dict[str, Any]) -> Iterator[Record]:
    names: dict[Any, Any] = {}
    images = value.get("images")
    for image in images if isinstance(images, list) else []:
        if isinstance(image, dict) and isinstance(image.get("id"), int | str):
            key = match_column(image, FILE_NAMES)
            names[image["id"]] = image[key] if key else _numbered(image["id"])
    for entry in value["annotations"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            yield "no image_id"
        elif names and entry["image_id"] not in names:
            yield f"image_id {entry['image_id']} is not among its images"
        else:
            name = names.get(entry["image_id"], _numbered(entry["image_id"]))
            yield {"file_name": name, "caption": entry.get("caption")}


def _numbered(number: int | str) -> str:
    return f"{number:012d}" if isinstance(number, int) else number


def _records(value: Any) -> Iterator[Record]:
    if isinstance(value, list):
        yield from map(_entry, value)
        return
    if not isinstance(value, dict):
        return
    # A file of one image's boxes is an object with lists too, but they do not name files.
    lists = [entries for entries in value.values() if _is_list_of_named(entries)]
    if len(lists) > 1:  # images with captions, and boxes in them
        lists = [entries for entries in lists if match_column(entries[0], CAPTION_NAMES) is not None]
    if len(lists) == 1:
        yield from map(_entry, lists[0])
        return
    for name, entry in value.items():
        if isinstance(entry, dict):
            yield {"file_name": name, **_with_tags(entry)}
        else:
            yield {"file_name": name, "caption": entry}


def _is_list_of_named(entries: Any) -> bool:
    return (
        isinstance(entries, list)
        and bool(entries)
        and isinstance(entries[0], dict)
        and (match_column(entries[0], FILE_NAMES) is not None or "image_id" in entries[0])
    )


def _entry(entry: Any) -> Record:
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        return {"file_name": entry[0], "caption": entry[1]}
    if not isinstance(entry, dict):
        return "not a JSON object"
    if match_column(entry, FILE_NAMES) is None and isinstance(entry.get("image_id"), int | str):
        entry = {"file_name": _numbered(entry["image_id"]), **entry}
    if isinstance(entry.get("sentences"), list) and match_column(entry, CAPTION_NAMES) is None:
        entry = {
            **entry,
            "caption": [text.get("raw") if isinstance(text, dict) else text for text in entry["sentences"]],
        }
    return _with_tags(entry)


def _with_tags(entry: dict[str, Any]) -> dict[str, Any]:
    """kohya's record of an image: tags count where there is no caption."""
    tags = entry.get("tags")
    if tags is None or match_column(entry, CAPTION_NAMES) is not None:
        return entry
    return {**entry, "caption": ", ".join(map(str, tags)) if isinstance(tags, list) else tags}
