"""Images inside other files: parquet and Arrow tables, data sets that `datasets` reads, and webdataset tars."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from ldm import disk
from ldm.data.captions import (
    CAPTION_NAMES,
    MAX_TEXT_BYTES,
    Columns,
    captions,
    choose_column,
    match_column,
    sidecar_captions,
)
from ldm.data.files import CAPTION_FILES, IMAGES, nfc, read_file, suffix, unsupported_reason
from ldm.data.rng import content_hash
from ldm.data.rows import first_line, is_text, is_texts, to_python
from ldm.data.sources import Decode, Sample, Skipped
from ldm.progress import printable

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
# Columns that name rows whose images have no name.
KEY_NAMES = ("__key__", "key", "id", "image_id", "file_name", "filename")
# Of an Arrow copy: the number of a row in the parquet file, and why it and those after it up to a number are unusable.
_ROW, _FAULT = "__row__", "__fault__"
_COPY_VERSION = 2
_CHUNK = 32  # rows, of a few MB each; reading one image of a copy reads one chunk
_TAIL = 1024


@dataclass(frozen=True)
class TableColumns:
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


@dataclass(frozen=True)
class ImageTable:
    """An open table: its name in messages, a `datasets.Dataset` on disk, and its columns."""

    name: str
    dataset: Any
    columns: TableColumns


def read_schema(path: Path) -> Any:
    """The Arrow schema of a .parquet or .arrow file. Raises ValueError with the reason."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if suffix(path.name) == ".parquet":
            return parquet.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a {suffix(path.name)} file that can be read: {first_line(error)}") from error


def row_count(path: Path) -> int:
    """The number of rows of a .parquet or .arrow file, by its metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    if suffix(path.name) == ".parquet":
        return int(parquet.read_metadata(path).num_rows)
    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def image_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that have images, as bytes or as an Image of `datasets`."""
    import pyarrow as pa

    def is_bytes(kind: Any) -> bool:
        return str(kind) in ("binary", "large_binary", "binary_view")

    def has_bytes(kind: Any) -> bool:
        return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)

    marked = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    return marked or [field.name for field in schema if is_bytes(field.type) or has_bytes(field.type)]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features of `datasets` by column; empty if it did not write the table."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if name in schema.names and "_type" in feature}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def table_columns(where: str, schema: Any, given: Columns, captioned: bool = True) -> TableColumns:
    """The given columns, or those found by type and name.

    Args:
        where: the name of the table, for messages.
        schema: an Arrow schema; `datasets` writes its features into the metadata.
        captioned: require a column of captions.

    Raises:
        ValueError: listing the columns, if one is missing, ambiguous or of another type.
    """
    import pyarrow as pa

    def check(name: str, possible: list[str], what: str) -> None:
        if name not in possible:
            raise ValueError(
                f'{where}: column "{name}" holds {schema.field(name).type}, not {what}s; set '
                f"data.{'image' if what == 'image' else 'caption'}_column to one of "
                f"{', '.join(possible) or 'another table'}"
            )

    columns, images = list(schema.names), image_columns(schema)
    image = choose_column(where, columns, images, IMAGE_NAMES, "image", given.image)
    check(image, images, "image")
    classes = {
        name: tuple(feature["names"])
        for name, feature in _features(schema).items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
    texts = [
        field.name
        for field in schema
        if field.name != image and (is_text(field.type) or is_texts(field.type) or field.name in classes)
    ]
    key = match_column(
        [field.name for field in schema if is_text(field.type) or pa.types.is_integer(field.type)], KEY_NAMES
    )
    try:
        caption = choose_column(where, columns, texts, CAPTION_NAMES, "caption", given.caption)
    except ValueError:
        if captioned or given.caption is not None:
            raise
        return TableColumns(image, None, key, None)
    check(caption, texts, "text")
    return TableColumns(image, caption, key, classes.get(caption))


def copy_parquet(path: Path, schema: Any, columns: TableColumns, cache: Path) -> Any:
    """A parquet file as a `datasets.Dataset`.

    Parquet has no fast access to single rows, so the needed columns are copied into the folder `cache` as Arrow, once.
    The name of the copy depends on the path, size and times of the file.

    Raises:
        ValueError: if the copy cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset

    stat = path.stat()
    # Unlike mtime, ctime cannot be set by users.
    times = stat.st_mtime_ns, stat.st_ctime_ns
    state = repr((_COPY_VERSION, os.path.realpath(path), stat.st_size, *times, columns.names))
    copy = cache / f"{content_hash(state.encode('utf-8', 'surrogatepass'))}.rows"
    fields = [(name, _plain(schema.field(name).type)) for name in columns.names]
    plain = pa.schema([*fields, (_ROW, pa.int64()), (_FAULT, pa.string())])
    try:
        if not copy.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with (
                disk.new_file(copy) as aside,
                pa.OSFile(str(aside), "wb") as sink,
                pa.ipc.new_stream(sink, plain) as writer,
            ):
                for first, batch, fault in _row_batches(path, columns):
                    count = 1 if batch is None else batch.num_rows
                    cells = [
                        pa.nulls(count, kind) if batch is None else batch.column(name).cast(kind)
                        for name, kind in fields
                    ]
                    rows = pa.array(range(first, first + count), pa.int64())
                    faults = pa.array([fault] * count, pa.string())
                    writer.write_batch(pa.record_batch([*cells, rows, faults], schema=plain))
        return Dataset.from_file(str(copy))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be copied into {cache}: {error}; set data.cache_dir to a disk with room"
        ) from error


def _row_batches(path: Path, columns: TableColumns) -> Iterator[tuple[int, Any, str | None]]:
    """(number of the first row from 1, batch, None), or (…, None, "LAST: why rows up to LAST cannot be read")."""
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
                    yield row, None, f"{end - 1}: {first_line(error)}"
                    break
                yield row, batch, None
                row += batch.num_rows
            row = end


def _plain(kind: Any) -> Any:
    """The type without dictionaries and views, which not every reader of Arrow knows."""
    import pyarrow as pa

    if is_text(kind):
        return pa.large_string()
    return pa.large_binary() if str(kind) == "binary_view" else kind


def read_arrow(path: Path) -> Any:
    """An Arrow stream, as `datasets` writes them, as a `datasets.Dataset`. Raises ValueError with the reason."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        return Dataset.from_file(str(path))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not an Arrow stream that can be read: {first_line(error)}") from error


def is_saved(folder: Path) -> bool:
    """Whether this is a `save_to_disk` folder."""
    parts = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / part).is_file() for part in parts)


def read_saved(folder: Path, split: str) -> Any:
    """A `save_to_disk` folder as a `datasets.Dataset`; of several splits, `split`.

    Raises:
        ValueError: if it cannot be read, or has no such split.
    """
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # broken JSON and Arrow files raise many types
        raise ValueError(f"{folder} cannot be read as a saved data set: {_one_line(error)}; save it again") from error
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise ValueError(f'{folder} has no split "{split}"; set data.split to one of {", ".join(saved)}')
    return saved[split]


def read_hub(name: str, subset: str | None, split: str) -> Any:
    """A data set of the hub as a `datasets.Dataset`, downloaded by `datasets`. Its code is never run.

    Raises:
        ValueError: if it does not exist or cannot be downloaded.
    """
    from datasets import load_dataset

    # It logs every retry; the error below has the outcome.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return load_dataset(name, name=subset, split=split)
    except Exception as error:  # network, hub, files and formats raise many types
        raise ValueError(
            f"data.path {name} is no folder or file here, and no data set that can be loaded from the hub: "
            f"{_one_line(error)}; check the spelling, the network, data.subset and data.split"
        ) from error
    finally:
        logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_tables(
    tables: Sequence[ImageTable], folder: Path | None, decode: Decode, captioned: bool = True
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
        if row.fault is not None:
            last, _, reason = row.fault.partition(": ")
            skipped.append(Skipped(f"{place}-{last}", f"these rows cannot be read: {reason}"))
            continue
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
        read = partial(_read_row, images[id(table)], row.position)
        if row.fingerprint is None:
            assert file is not None
            read = partial(read_file, file)
        shown = "" if name == row.path else place
        samples.append(Sample(name, tuple(dict.fromkeys(good)), group, read, decode, place=shown))
    return samples, skipped


class _Row(NamedTuple):
    """A row without its image; `fingerprint` is None if it has no bytes."""

    position: int
    number: int
    name: str
    caption: object
    path: str | None
    fingerprint: str | None
    fault: str | None


def _rows(table: ImageTable) -> Iterator[_Row]:
    import pyarrow as pa
    from pyarrow import compute

    columns, index = table.columns, 0
    # Stored batches; joining them would read all images.
    for batch in table.dataset.data.to_batches():
        nothing = [None] * batch.num_rows
        stored, paths = batch.column(columns.image), nothing
        if pa.types.is_struct(stored.type):
            if stored.type.get_field_index("path") >= 0:
                paths = to_python(compute.struct_field(stored, "path"))
            stored = compute.struct_field(stored, "bytes")
        keys = to_python(batch.column(columns.key)) if columns.key else nothing
        texts = to_python(batch.column(columns.caption)) if columns.caption else nothing
        is_copy = _ROW in batch.schema.names
        numbers = batch.column(_ROW).to_pylist() if is_copy else range(index + 1, index + 1 + batch.num_rows)
        faults = batch.column(_FAULT).to_pylist() if is_copy else nothing
        for place, (path, key, text) in enumerate(zip(paths, keys, texts, strict=True)):
            if columns.classes is not None and isinstance(text, int):  # -1 is no class
                text = columns.classes[text].replace("_", " ") if 0 <= text < len(columns.classes) else None
            name = path or ("" if key is None else str(key))
            yield _Row(index, numbers[place], name, text, path, _fingerprint(stored[place]), faults[place])
            index += 1


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


# ---- webdataset: tar files of images and captions

_KNOWN = IMAGES | {*CAPTION_FILES, ".json"}
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".xlsx"})
_Groups = dict[str, dict[str, tarfile.TarInfo]]  # by key and suffix


def read_tar(
    path: Path, name: str, column: str | None, decode: Decode, captioned: bool = True
) -> tuple[list[Sample], list[Skipped]]:
    """The samples of one shard: images with the .txt, .caption or .json of the same key.

    The key is the path up to the first dot of its last part, as in webdataset, or up to the last dot if the rest is no
    known suffix. Members of one key need not be neighbors. Only headers and captions are read; images are later read
    by their offset, so no file stays open.

    Args:
        name: of the shard, the prefix of ids: "00000.tar/000000012.jpg".
        column: the key of captions in JSON; None takes a usual one.
        captioned: leave out images without a caption.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    with open(path, "rb") as file:
        for key, members in _tar_groups(file, name, skipped).items():
            images = [kind for kind in members if kind in IMAGES]
            if not images:
                if any(kind in CAPTION_FILES for kind in members):
                    skipped.append(Skipped(f"{name}/{key}", "a caption without an image"))
                continue

            def read_sidecar(kind: str, members: dict[str, tarfile.TarInfo] = members) -> bytes:
                file.seek(members[kind].offset_data)
                # One byte more than allowed, so that the size is checked.
                return file.read(min(members[kind].size, MAX_TEXT_BYTES + 1))

            sidecars = [kind for kind in (*CAPTION_FILES, ".json") if kind in members]
            good, faults = sidecar_captions(sidecars, read_sidecar, column)
            for kind in images:
                id = f"{name}/{key}{kind}"
                if not good and captioned:
                    skipped.append(Skipped(id, faults[0][1] if faults else "no caption"))
                    continue
                read = partial(read_span, str(path), members[kind].offset_data, members[kind].size)
                samples.append(Sample(id, tuple(dict.fromkeys(good)), f"{name}/{key}", read, decode))
            if good:
                skipped += [Skipped(f"{name}/{key}", f"{reason}; its other captions count") for _, reason in faults]
    return samples, skipped


def _tar_groups(file: BinaryIO, name: str, skipped: list[Skipped]) -> _Groups:
    """The usable members by key; keys whose image was skipped are left out."""
    size = os.fstat(file.fileno()).st_size
    groups: _Groups = {}
    lost: set[str] = set()
    for member in _members(file, name, skipped):
        path = member.name.removeprefix("./")
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        folder, slash, base = path.rpartition("/")
        first, dot, rest = base.partition(".")
        if f".{rest.lower()}" not in _KNOWN:
            first, dot, rest = base.rpartition(".")
        key, kind = f"{folder}{slash}{first}", f"{dot}{rest.lower()}"
        fault = unsupported_reason(parts[-1] if parts else "")
        if fault is None and kind in _TABLES:
            fault = (
                "a table within a tar, which is not read; unpack the tar, or give each image a .txt with its caption"
            )
        if fault is None and kind not in _KNOWN:
            continue
        if fault is None and (not member.isfile() or member.issparse()):
            fault = "a link or a sparse file within the tar; pack it as a plain file"
        if fault is None and member.offset_data + member.size > size:
            fault = "cut off at the end of the tar"
        if fault is not None:
            skipped.append(Skipped(f"{name}/{path}", fault))
            if kind not in (*CAPTION_FILES, ".json", *_TABLES):
                lost.add(key)
            continue
        if kind in groups.setdefault(key, {}):
            skipped.append(Skipped(f"{name}/{path}", "twice in the tar; the last one is used"))
        groups[key][kind] = member
    # Join captions and images whose keys differ in the Unicode normal form only.
    bare = {nfc(key): key for key, members in groups.items() if IMAGES.issuperset(members)}
    for key, members in list(groups.items()):
        image = bare.get(nfc(key))
        if image is not None and image != key and IMAGES.isdisjoint(members):
            groups[image] |= groups.pop(key)
    return {key: of for key, of in groups.items() if key not in lost or not IMAGES.isdisjoint(of)}


def _members(file: BinaryIO, name: str, skipped: list[Skipped]) -> Iterator[tarfile.TarInfo]:
    count = 0
    try:
        # "r:" rejects compression, which has no random access.
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isdir():
                    count += 1
                    yield member
    # Broken headers raise many types.
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        cause = f"cut off or broken after {count} members" if count else "not an uncompressed tar file"
        skipped.append(Skipped(name, f"{cause}: {error}"))
        return
    if not count:
        skipped.append(Skipped(name, "no files in it"))


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises OSError if there are fewer."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{printable(path)} ends before byte {offset + size}")
    return data
