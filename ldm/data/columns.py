"""Which columns of an Arrow table hold the images and the captions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ldm.data.captions import CAPTION_NAMES, choose_column, match_column
from ldm.data.rows import is_text, is_texts
from ldm.data.sources import DataConfig

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
# What names a row, where its image has no name of its own.
KEY_NAMES = ("__key__", "key", "id", "image_id", "file_name", "filename")


@dataclass(frozen=True)
class Columns:
    """The columns of a table of images: `key` names rows, `classes` are the words for a caption of whole numbers;
    `caption` is None where there is none and none is needed.
    """

    image: str
    caption: str | None
    key: str | None
    classes: tuple[str, ...] | None

    @property
    def names(self) -> list[str]:
        """All of them, once each."""
        return list(dict.fromkeys(name for name in (self.image, self.caption, self.key) if name is not None))


def has_images(schema: Any) -> bool:
    """Whether a table of this Arrow schema holds images, as bytes or in the way of `datasets`."""
    return bool(_image_columns(schema))


def pick_columns(where: str, schema: Any, config: DataConfig, captioned: bool = True) -> Columns:
    """The columns that the config names, or those that their types and names give away.

    Args:
        where: what has the columns, for messages.
        schema: an Arrow schema; `datasets` writes its features into the metadata.
        captioned: refuse a table whose column of captions cannot be told.

    Raises:
        ValueError: listing the columns, if one is missing, of another type, or several are as likely.
    """
    import pyarrow as pa

    columns = list(schema.names)
    features = _features(schema)
    images = _image_columns(schema)
    image = choose_column(where, columns, images, IMAGE_NAMES, "image_column", config.image_column)
    if image not in images:
        raise ValueError(
            f'{where}: column "{image}" holds {schema.field(image).type}, not images; set data.image_column to one of '
            f"{', '.join(images) or 'another table'}"
        )
    classes = {name: tuple(feature["names"]) for name, feature in features.items() if _is_classes(feature)}
    captions = [
        field.name
        for field in schema
        if field.name != image and (is_text(field.type) or is_texts(field.type) or field.name in classes)
    ]
    keys = [field.name for field in schema if is_text(field.type) or pa.types.is_integer(field.type)]
    key = match_column(keys, KEY_NAMES)
    try:
        caption = choose_column(where, columns, captions, CAPTION_NAMES, "caption_column", config.caption_column)
    except ValueError:
        if captioned or config.caption_column is not None:
            raise
        return Columns(image, None, key, None)
    if caption not in captions:
        raise ValueError(
            f'{where}: column "{caption}" holds {schema.field(caption).type}, not texts; set data.caption_column to '
            f"one of {', '.join(captions) or 'another table'}"
        )
    return Columns(image, caption, key, classes.get(caption))


def _image_columns(schema: Any) -> list[str]:
    import pyarrow as pa

    marked = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    if marked:
        return marked
    return [
        field.name
        for field in schema
        if _is_bytes(field.type)
        or (
            pa.types.is_struct(field.type)
            and field.type.get_field_index("bytes") >= 0
            and _is_bytes(field.type.field("bytes").type)
        )
    ]


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_classes(feature: Any) -> bool:
    return feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` says of the columns, by name; nothing where it did not write the table."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if name in schema.names and "_type" in feature}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
