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
    ReadOptions,
    captions,
    choose_column,
    match_column,
    sidecar_captions,
)
from ldm.data.images import CAPTION_FILES, IMAGES, nfc, read_file, suffix, unsupported_reason
from ldm.data.rng import content_hash
from ldm.data.rows import is_text, is_texts, to_python
from ldm.data.sources import Listing, Sample, Skipped
from ldm.progress import error_reason, printable

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
KEY_NAMES = ("__key__", "key", "id", "image_id", "file_name", "filename")  # of images without a name
# Of an Arrow copy: the number of a row in the parquet file, and why it and those after it up to a number are unusable.
_ROW, _FAULT = "__row__", "__fault__"
_COPY_VERSION = 2
_CHUNK = 32  # rows, of a few MB each; reading one image of a copy reads one chunk
_TAIL = 1024


@dataclass(frozen=True)
class ImageTable:
    """An open table of images: its name in messages, a `datasets.Dataset` on disk, and its columns.

    `key` names the rows, `caption` is None if there is none and none is required, `classes` are texts for class numbers
    as captions.
    """

    name: str
    dataset: Any
    image: str
    caption: str | None
    key: str | None
    classes: tuple[str, ...] | None


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
        raise ValueError(f"not a {suffix(path.name)} file that can be read: {error_reason(error)}") from error


def row_count(path: Path) -> int:
    """The number of rows of a .parquet or .arrow file, by its metadata. Raises ValueError if it is damaged."""
    import pyarrow as pa
    from pyarrow import parquet

    if suffix(path.name) == ".parquet":
        return int(parquet.read_metadata(path).num_rows)
    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def image_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that have images, as bytes or as an Image of `datasets`."""
    import pyarrow as pa

    def has_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return str(kind) in ("binary", "large_binary", "binary_view")

    marked = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    return marked or [field.name for field in schema if has_bytes(field.type)]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features of `datasets` by column; empty if it did not write the table."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if name in schema.names and "_type" in feature}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def open_dataset(where: str, dataset: Any, options: ReadOptions) -> ImageTable:
    """A `datasets.Dataset` as a table; `where` is its name. Raises ValueError like `find_columns`."""
    return ImageTable(where, dataset, *find_columns(printable(where), dataset.features.arrow_schema, options))


def find_columns(
    where: str, schema: Any, options: ReadOptions
) -> tuple[str, str | None, str | None, tuple[str, ...] | None]:
    """The columns of images, captions and keys, and the texts of class numbers: as given, or by type and name.

    Args:
        where: the name of the table, for messages.
        schema: an Arrow schema; `datasets` writes its features into the metadata.

    Raises:
        ValueError: listing the columns, if one is missing, ambiguous or of another type.
    """
    import pyarrow as pa

    def check(name: str, possible: list[str], key: str, what: str) -> None:
        if name not in possible:
            known = ", ".join(possible) or "another table"
            why = f"not {what}; set data.{key}_column to one of {known}"
            raise ValueError(f'{where}: column "{name}" holds {schema.field(name).type}, {why}')

    columns, images = list(schema.names), image_columns(schema)
    image = choose_column(where, columns, images, IMAGE_NAMES, "image", options.image)
    check(image, images, "image", "images")
    classes = {
        name: tuple(feature["names"])
        for name, feature in _features(schema).items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }
    texts = [one.name for one in schema if is_text(one.type) or is_texts(one.type) or one.name in classes]
    texts = [name for name in texts if name != image]
    keys = [field.name for field in schema if is_text(field.type) or pa.types.is_integer(field.type)]
    caption = None
    try:
        caption = choose_column(where, columns, texts, CAPTION_NAMES, "caption", options.caption)
    except ValueError:
        if options.captioned or options.caption is not None:
            raise
    else:
        check(caption, texts, "caption", "texts")
    return image, caption, match_column(keys, KEY_NAMES), None if caption is None else classes.get(caption)


def open_parquet(path: Path, name: str, schema: Any, options: ReadOptions, cache: Path) -> ImageTable:
    """A parquet file with this schema as a table.

    Parquet has no fast access to single rows, so the needed columns are copied into the folder `cache` as Arrow, once.
    The name of the copy depends on the path, size and times of the file. Raises ValueError like `find_columns`, or if
    the copy cannot be written.
    """
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    image, caption, key, classes = find_columns(printable(name), schema, options)
    columns = list(dict.fromkeys(column for column in (image, caption, key) if column is not None))
    stat = path.stat()
    times = stat.st_mtime_ns, stat.st_ctime_ns  # unlike mtime, ctime cannot be set by users
    state = repr((_COPY_VERSION, os.path.realpath(path), stat.st_size, *times, columns))
    copy = cache / f"{content_hash(state.encode('utf-8', 'surrogatepass'))}.rows"
    kinds = {column: schema.field(column).type for column in columns}
    # Without dictionaries and views, which not every reader of Arrow knows.
    plain = {column: pa.large_string() if is_text(kind) else kind for column, kind in kinds.items()}
    plain = {column: pa.large_binary() if str(kind) == "binary_view" else kind for column, kind in plain.items()}
    into = pa.schema([*plain.items(), (_ROW, pa.int64()), (_FAULT, pa.string())])
    try:
        if not copy.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with (
                parquet.ParquetFile(path, memory_map=True) as file,
                disk.new_file(copy) as aside,
                pa.OSFile(str(aside), "wb") as sink,
                pa.ipc.new_stream(sink, into) as writer,
            ):
                end = 0
                for group in range(file.num_row_groups):
                    row, end = end, end + file.metadata.row_group(group).num_rows
                    batches = file.iter_batches(_CHUNK, row_groups=[group], columns=columns)
                    while row < end:
                        try:
                            batch, fault = next(batches), None
                            cells = [batch.column(column).cast(kind) for column, kind in plain.items()]
                            last = row + batch.num_rows
                        except (pa.ArrowException, OSError, StopIteration) as error:
                            fault, last = f"{end}: {error_reason(error)}", row + 1
                            cells = [pa.nulls(1, kind) for kind in plain.values()]
                        numbers = pa.array(range(row + 1, last + 1), pa.int64())
                        faults = pa.array([fault] * (last - row), pa.string())
                        writer.write_batch(pa.record_batch([*cells, numbers, faults], schema=into))
                        row = last if fault is None else end
        return ImageTable(name, Dataset.from_file(str(copy)), image, caption, key, classes)
    except OSError as error:
        raise ValueError(f"{path} cannot be copied into {cache}: {error}; set data.cache_dir") from error


def read_arrow(path: Path) -> Any:
    """An Arrow stream, as `datasets` writes them, as a `datasets.Dataset`. Raises ValueError with the reason."""
    from datasets import Dataset

    try:
        return Dataset.from_file(str(path))
    except Exception as error:  # damaged features raise many types
        raise ValueError(f"not an Arrow stream that can be read: {error_reason(error)}") from error


def is_saved(folder: Path) -> bool:
    """Whether this is a `save_to_disk` folder."""
    parts = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / part).is_file() for part in parts)


def read_saved(folder: Path, split: str) -> Any:
    """A `save_to_disk` folder as a `datasets.Dataset`; of several splits, `split`. Raises ValueError if it cannot be
    read, or has no such split.
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
    """A data set of the hub as a `datasets.Dataset`, downloaded by `datasets`. Its code is never run. Raises ValueError
    if it does not exist or cannot be downloaded.
    """
    from datasets import load_dataset

    logger = logging.getLogger("huggingface_hub")  # it logs every retry; the error below has the outcome
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


class _Row(NamedTuple):
    """A row without its image, for which `images` has a table; `fingerprint` is None if it has no bytes."""

    images: Any
    position: int
    place: str
    name: str
    caption: object
    path: str | None
    fingerprint: str | None
    fault: str | None


def read_tables(tables: Sequence[ImageTable], folder: Path | None, options: ReadOptions, listing: Listing) -> None:
    """Adds the rows of tables to a listing; paths of images without bytes are relative to `folder`.

    Ids must not change when other rows do, so they are not row numbers but the name stored with the image, or the key.
    If there is none or it is not unique, a hash of the length and the last kilobyte of the image is added, and a count
    for copies.
    """
    rows = [row for table in tables for row in _rows(table)]
    names = Counter(row.name for row in rows)
    seen: Counter[str] = Counter()
    for row in rows:
        if row.fault is not None:
            last, _, reason = row.fault.partition(": ")
            listing.skipped.append(Skipped(f"{row.place}-{last}", f"these rows cannot be read: {reason}"))
            continue
        file = None if row.path is None else os.path.join(folder or "", row.path)
        good, reasons = captions(row.caption)
        if row.fingerprint is None and (file is None or not os.path.isfile(file)):
            missing = "no image" if file is None else f"no image bytes, and no file {printable(file)[:200]}"
            listing.skipped.append(Skipped(row.place, missing))
            continue
        if good or options.captioned:
            listing.skipped += [Skipped(row.place, reason) for reason in reasons]
        if not good and options.captioned:
            continue
        group = row.name if row.name and names[row.name] == 1 else f"{row.name or 'row'}@{row.fingerprint or row.path}"
        seen[group] += 1
        name = group if seen[group] == 1 else f"{group}#{seen[group]}"
        read = partial(_read_row, row.images, row.position)
        if row.fingerprint is None:
            assert file is not None
            read = partial(read_file, file)
        shown = "" if name == row.path else row.place
        texts = tuple(dict.fromkeys(good))
        listing.samples.append(Sample(name, texts, group, read, options.decode, place=shown))


def _rows(table: ImageTable) -> Iterator[_Row]:
    import pyarrow as pa
    from pyarrow import compute

    images = table.dataset.select_columns([table.image]).with_format("arrow")
    index = 0
    for batch in table.dataset.data.to_batches():  # stored batches; joining them would read all images
        nothing = [None] * batch.num_rows
        stored, paths = batch.column(table.image), nothing
        if pa.types.is_struct(stored.type):
            if stored.type.get_field_index("path") >= 0:
                paths = to_python(compute.struct_field(stored, "path"))
            stored = compute.struct_field(stored, "bytes")
        keys = to_python(batch.column(table.key)) if table.key else nothing
        texts = to_python(batch.column(table.caption)) if table.caption else nothing
        is_copy = _ROW in batch.schema.names
        numbers = batch.column(_ROW).to_pylist() if is_copy else range(index + 1, index + 1 + batch.num_rows)
        faults = batch.column(_FAULT).to_pylist() if is_copy else nothing
        for image, number, path, key, text, fault in zip(stored, numbers, paths, keys, texts, faults, strict=True):
            if table.classes is not None and isinstance(text, int):  # -1 is no class
                text = table.classes[text].replace("_", " ") if 0 <= text < len(table.classes) else None
            fingerprint = None
            if image.is_valid:
                data = memoryview(image.as_buffer())
                length = len(data).to_bytes(8, "little")
                fingerprint = hashlib.blake2b(data[-_TAIL:], digest_size=8, salt=length).hexdigest()
            name = path or ("" if key is None else str(key))
            yield _Row(images, index, f"{table.name}:{number}", name, text, path, fingerprint, fault)
            index += 1


def _read_row(images: Any, index: int) -> bytes:
    value = images[index].column(0)[0].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    assert isinstance(data, bytes), type(data)
    return data


# ---- webdataset: tar files of images and captions

_KNOWN = IMAGES | {*CAPTION_FILES, ".json"}
_TABLES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".xlsx"})


def read_tar(path: Path, name: str, options: ReadOptions, listing: Listing) -> None:
    """Adds the samples of one shard to a listing: images with the .txt, .caption or .json of the same key.

    The key is the path up to the first dot of its last part, as in webdataset, or up to the last dot if the rest is no
    known suffix. Members of one key need not be neighbors. Ids begin with `name`: "00000.tar/000000012.jpg". Only
    headers and captions are read; images are later read by their offset, so no file stays open.
    """
    skipped = listing.skipped
    with open(path, "rb") as file:
        for key, members in _tar_groups(file, name, skipped).items():
            images = [kind for kind in members if kind in IMAGES]
            if not images:
                if any(kind in CAPTION_FILES for kind in members):
                    skipped.append(Skipped(f"{name}/{key}", "a caption without an image"))
                continue

            def read_sidecar(kind: str, members: dict[str, tarfile.TarInfo] = members) -> bytes:
                file.seek(members[kind].offset_data)
                return file.read(min(members[kind].size, MAX_TEXT_BYTES + 1))  # one more, so that the size is checked

            sidecars = [kind for kind in (*CAPTION_FILES, ".json") if kind in members]
            good, faults = sidecar_captions(sidecars, read_sidecar, options)
            for kind in images:
                id = f"{name}/{key}{kind}"
                if not good and options.captioned:
                    skipped.append(Skipped(id, faults[0][1] if faults else "no caption"))
                    continue
                read = partial(read_span, str(path), members[kind].offset_data, members[kind].size)
                texts = tuple(dict.fromkeys(good))
                listing.samples.append(Sample(id, texts, f"{name}/{key}", read, options.decode))
            if good:
                skipped += [Skipped(f"{name}/{key}", f"{reason}; its other captions count") for _, reason in faults]


def _tar_groups(file: BinaryIO, name: str, skipped: list[Skipped]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """The usable members by key and suffix; keys whose image was skipped are left out."""
    size = os.fstat(file.fileno()).st_size
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    lost: set[str] = set()

    def add(member: tarfile.TarInfo) -> None:
        path = member.name.removeprefix("./")
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            return
        folder, slash, base = path.rpartition("/")
        first, dot, rest = base.partition(".")
        if f".{rest.lower()}" not in _KNOWN:
            first, dot, rest = base.rpartition(".")
        key, kind = f"{folder}{slash}{first}", f"{dot}{rest.lower()}"
        fault = unsupported_reason(parts[-1] if parts else "")
        if fault is None and kind in _TABLES:
            fault = "a table within a tar, which is not read; unpack the tar, or put captions into .txt files"
        if fault is None and kind not in _KNOWN:
            return
        if fault is None and (not member.isfile() or member.issparse()):
            fault = "a link or a sparse file within the tar; pack it as a plain file"
        if fault is None and member.offset_data + member.size > size:
            fault = "cut off at the end of the tar"
        if fault is not None:
            skipped.append(Skipped(f"{name}/{path}", fault))
            if kind not in (*CAPTION_FILES, ".json", *_TABLES):
                lost.add(key)
            return
        if kind in groups.setdefault(key, {}):
            skipped.append(Skipped(f"{name}/{path}", "twice in the tar; the last one is used"))
        groups[key][kind] = member

    count = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # "r:" rejects compression, which has no random access
            for member in tar:
                if not member.isdir():
                    count += 1
                    add(member)
        if not count:
            skipped.append(Skipped(name, "no files in it"))
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        cause = f"cut off or broken after {count} members" if count else "not an uncompressed tar file"
        skipped.append(Skipped(name, f"{cause}: {error}"))
    # Join captions and images whose keys differ in the Unicode normal form only.
    bare = {nfc(key): key for key, members in groups.items() if IMAGES.issuperset(members)}
    for key, members in list(groups.items()):
        image = bare.get(nfc(key))
        if image is not None and image != key and IMAGES.isdisjoint(members):
            groups[image] |= groups.pop(key)
    return {key: of for key, of in groups.items() if key not in lost or not IMAGES.isdisjoint(of)}


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`. Raises OSError if there are fewer."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise OSError(f"{printable(path)} ends before byte {offset + size}")
    return data
