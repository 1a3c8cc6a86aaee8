"""Tables that contain images: parquet and Arrow files, and data sets that `datasets` reads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm.data.captions import CAPTION_NAMES, captions, choose_column, match_column, printable
from ldm.data.folder import read_file
from ldm.data.images import decode
from ldm.data.rng import content_hash
from ldm.data.rows import first_line, is_text, is_texts, to_python
from ldm.data.sources import DataConfig, Sample, Skipped

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
# Columns that name rows whose images have no name.
KEY_NAMES = ("__key__", "key", "id", "image_id", "file_name", "filename")


@dataclass(frozen=True)
class Columns:
    """The columns of a table of images: `key` names the rows, `classes` are the texts for class numbers as captions;
    `caption` is None if there is none and none is required.
    """

    image: str
    caption: str | None
    key: str | None
    classes: tuple[str, ...] | None

    @property
    def names(self) -> list[str]:
        """All columns, without repetitions."""
        return list(dict.fromkeys(name for name in (self.image, self.caption, self.key) if name is not None))


def has_images(schema: Any) -> bool:
    """Whether an Arrow schema has images, as bytes or as an Image of `datasets`."""
    return bool(_image_columns(schema))


def pick_columns(where: str, schema: Any, config: DataConfig, captioned: bool = True) -> Columns:
    """The columns of the config, or those found by type and name.

    Args:
        where: the name of the table, for messages.
        schema: an Arrow schema; `datasets` writes its features into the metadata.
        captioned: require a column of captions.

    Raises:
        ValueError: listing the columns, if one is missing, ambiguous or of another type.
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
    classes = {
        name: tuple(feature["names"])
        for name, feature in features.items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
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


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features of `datasets` by column; empty if it did not write the table."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if name in schema.names and "_type" in feature}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


_CHUNK = 32  # rows, of a few MB each; reading one image of a converted file reads one chunk
_ROW = "__row__"  # the column of a converted file with the row in the parquet file
_TAIL = 1024


@dataclass(frozen=True)
class ImageTable:
    """An open table: its name in messages, a `datasets.Dataset` on disk, and its columns."""

    name: str
    dataset: Any
    columns: Columns


def open_parquet(
    path: Path, name: str, config: DataConfig, captioned: bool = True
) -> tuple[ImageTable | None, list[Skipped]]:
    """A parquet file, as an Arrow copy, and its unreadable rows.

    Parquet has no fast access to single rows, so the needed columns are copied into the cache folder once. The name of
    the copy depends on the path, size and times of the file.

    Raises:
        ValueError: if the columns cannot be told, or the copy cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        return None, [Skipped(name, f"not a parquet file that can be read: {first_line(error)}")]
    columns = pick_columns(printable(name), schema, config, captioned)
    stat = path.stat()
    # Unlike mtime, ctime cannot be set by users.
    state = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, columns.names)
    folder = config.cache_folder / "tables"
    copy = folder / f"{content_hash(repr(state).encode('utf-8', 'surrogatepass'))}.rows"
    try:
        if not copy.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _copy(path, schema, columns, copy)
        faults = json.loads(copy.with_suffix(".json").read_text(encoding="utf-8"))
        dataset = Dataset.from_file(str(copy))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be copied into {folder}: {error}; set data.cache_dir to a disk with room"
        ) from error
    skipped = [
        Skipped(f"{name}:{first}-{last}", f"these rows cannot be read: {reason}") for first, last, reason in faults
    ]
    return ImageTable(name, dataset, columns), skipped


def _copy(path: Path, schema: Any, columns: Columns, target: Path) -> None:
    import pyarrow as pa

    plain = pa.schema([(name, _plain(schema.field(name).type)) for name in columns.names] + [(_ROW, pa.int64())])
    faults: list[tuple[int, int, str]] = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
        partly = Path(scratch, "copy")
        with pa.OSFile(str(partly), "wb") as sink, pa.ipc.new_stream(sink, plain) as writer:
            for first, batch in _readable(path, columns, faults):
                rows = pa.array(range(first, first + batch.num_rows), pa.int64())
                arrays = [batch.column(name).cast(plain.field(name).type) for name in columns.names]
                writer.write_batch(pa.record_batch([*arrays, rows], schema=plain))
        noted = Path(scratch, "faults")
        noted.write_text(json.dumps(faults), encoding="utf-8")
        # The copy last: its existence implies that of the faults.
        os.replace(noted, target.with_suffix(".json"))
        os.replace(partly, target)


def _readable(path: Path, columns: Columns, faults: list[tuple[int, int, str]]) -> Iterator[tuple[int, Any]]:
    """(number of the first row from 1, batch) of all readable rows; others are added to `faults`."""
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        row = 1
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            batches = file.iter_batches(_CHUNK, row_groups=[group], columns=columns.names)
            while row < end:
                try:
                    batch = next(batches)
                except (pa.ArrowException, OSError, StopIteration) as error:
                    faults.append((row, end - 1, first_line(error)))
                    break
                yield row, batch
                row += batch.num_rows
            row = end


def _plain(kind: Any) -> Any:
    """The type without dictionaries and views, which not every reader of Arrow knows."""
    import pyarrow as pa

    if is_text(kind):
        return pa.large_string()
    return pa.large_binary() if str(kind) == "binary_view" else kind


def open_arrow(
    path: Path, name: str, config: DataConfig, captioned: bool = True
) -> tuple[ImageTable | None, list[Skipped]]:
    """An Arrow stream, as `datasets` writes them. Raises ValueError if the columns cannot be told."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        dataset = Dataset.from_file(str(path))
    except (pa.ArrowException, OSError) as error:
        return None, [Skipped(name, f"not an Arrow stream that can be read: {first_line(error)}")]
    return ImageTable(
        name, dataset, pick_columns(printable(name), dataset.features.arrow_schema, config, captioned)
    ), []


def open_saved(folder: Path, config: DataConfig, captioned: bool = True) -> ImageTable:
    """A `save_to_disk` folder; of several splits, `config.split`.

    Raises:
        ValueError: if it cannot be read, has no such split, or its columns cannot be told.
    """
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # broken JSON and Arrow files raise many types
        raise ValueError(f"{folder} cannot be read as a saved data set: {one_line(error)}; save it again") from error
    if not isinstance(saved, Dataset):
        if config.split not in saved:
            raise ValueError(f'{folder} has no split "{config.split}"; set data.split to one of {", ".join(saved)}')
        saved = saved[config.split]
    return ImageTable(str(folder), saved, pick_columns(str(folder), saved.features.arrow_schema, config, captioned))


def is_saved(folder: Path) -> bool:
    """Whether this is a `save_to_disk` folder."""
    parts = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / part).is_file() for part in parts)


def open_hub(config: DataConfig, captioned: bool = True) -> ImageTable:
    """A data set of the hub, downloaded by `datasets`. Its code is never run.

    Raises:
        ValueError: if it does not exist, cannot be downloaded, or its columns cannot be told.
    """
    from datasets import load_dataset

    # It logs every retry; the error below has the outcome.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        dataset = load_dataset(config.path, name=config.subset, split=config.split)
    except Exception as error:  # network, hub, files and formats raise many types
        raise ValueError(
            f"data.path {config.path} is no folder or file here, and no data set that can be loaded from the hub: "
            f"{one_line(error)}; check the spelling, the network, data.subset and data.split"
        ) from error
    finally:
        logger.setLevel(level)
    return ImageTable(config.path, dataset, pick_columns(config.path, dataset.features.arrow_schema, config, captioned))


def list_tables(
    tables: Sequence[ImageTable], folder: Path | None, config: DataConfig, captioned: bool = True
) -> tuple[list[Sample], list[Skipped]]:
    """The rows of tables as samples.

    Ids must not change when other rows do, so they are not row numbers but the name stored with the image, or the key.
    If there is none or it is not unique, a hash of the length and the last kilobyte of the image is added, and a count
    for copies.

    Args:
        folder: what paths of images without bytes are relative to.
        captioned: leave out images without a caption.
    """
    rows = [(table, row) for table in tables for row in _rows(table)]
    names = Counter(row.name for _, row in rows)
    seen: Counter[str] = Counter()
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    images = {id(table): table.dataset.select_columns([table.columns.image]).with_format("arrow") for table in tables}
    for table, row in rows:
        place = f"{table.name}:{row.number}"
        file = None if row.path is None else os.path.join(folder or "", row.path)
        good, reasons = captions(row.caption)
        if row.fingerprint is None and (file is None or not os.path.isfile(file)):
            missing = "no image" if file is None else f"no image bytes, and no file {printable(file)[:200]}"
            skipped.append(Skipped(place, missing))
            continue
        if good or captioned:
            skipped += [Skipped(place, reason) for reason in reasons]
        if not good and captioned:
            continue
        group = row.name if row.name and names[row.name] == 1 else f"{row.name or 'row'}@{row.fingerprint or row.path}"
        seen[group] += 1
        name = group if seen[group] == 1 else f"{group}#{seen[group]}"
        read = partial(_read_row, images[id(table)], row.index)
        if row.fingerprint is None:
            assert file is not None
            read = partial(read_file, file)
        decoder = partial(decode, background=config.background_rgb)
        shown = "" if name == row.path else place
        samples.append(Sample(name, tuple(dict.fromkeys(good)), group, read, decoder, place=shown))
    return samples, skipped


@dataclass(frozen=True)
class _Row:
    """A row without its image; `fingerprint` is None if it has no bytes."""

    index: int
    number: int
    name: str
    caption: object
    path: str | None
    fingerprint: str | None


def _rows(table: ImageTable) -> Iterator[_Row]:
    import pyarrow as pa
    from pyarrow import compute

    columns = table.columns
    index = 0
    # Stored batches; joining them would read all images.
    for batch in table.dataset.data.to_batches():
        image = batch.column(columns.image)
        stored, paths = image, [None] * len(image)
        if pa.types.is_struct(image.type):
            stored = compute.struct_field(image, "bytes")
            if image.type.get_field_index("path") >= 0:
                paths = to_python(compute.struct_field(image, "path"))
        keys = to_python(batch.column(columns.key)) if columns.key else [None] * len(image)
        texts = to_python(batch.column(columns.caption)) if columns.caption else [None] * len(image)
        numbers = batch.column(_ROW).to_pylist() if _ROW in batch.schema.names else None
        for place, (path, key, text) in enumerate(zip(paths, keys, texts, strict=True)):
            name = path or ("" if key is None else str(key))
            number = numbers[place] if numbers else index + 1
            yield _Row(index, number, name, _words(text, columns), path, _fingerprint(stored[place]))
            index += 1


def _words(value: object, columns: Columns) -> object:
    if columns.classes is None or not isinstance(value, int):
        return value
    # -1 is no class.
    return columns.classes[value].replace("_", " ") if 0 <= value < len(columns.classes) else None


def _fingerprint(stored: Any) -> str | None:
    if not stored.is_valid:
        return None
    data = memoryview(stored.as_buffer())
    return hashlib.blake2b(data[-_TAIL:], digest_size=8, salt=len(data).to_bytes(8, "little")).hexdigest()


def _read_row(images: Any, index: int) -> bytes:
    value = images[index].column(0)[0].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    assert isinstance(data, bytes), type(data)
    return data


def one_line(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
