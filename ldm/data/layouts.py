"""Any path as a source of captioned images: what it holds says what it is.

A folder is read in the first of these layouts that it has; all are looked for in the folders below it too:

1. a data set that `datasets.save_to_disk` wrote;
2. metadata: `metadata.csv`, `.tsv`, `.jsonl` or `.parquet`, naming image files and their captions. Several of them
   all count, each for the folder it lies in;
3. one table of another name whose rows name image files that are there;
4. captions beside images: `a.txt`, `a.caption` (every line a caption), or `a.json` with a caption in it;
5. webdataset shards: `.tar`;
6. tables with the images in them: `.parquet`, `.arrow`;
7. classes: images in sub-folders, whose names are the captions.

Layouts are not mixed: what only a later one would have captioned is skipped, with that reason. In 5 and 6,
`split` and `subset` choose among the files; a file that is given as the path is read whatever its name says.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from ldm.data.captions import printable
from ldm.data.columns import has_images
from ldm.data.folder import (
    IMAGES,
    Found,
    Listing,
    foreign,
    list_classes,
    list_sidecars,
    suffix,
    summary,
    unnamed_image,
    walk,
)
from ldm.data.metadata import list_metadata, list_named_table
from ldm.data.rows import SUFFIXES as TEXT_TABLES
from ldm.data.rows import first_line
from ldm.data.sources import BUILT_IN, WAYS_OUT, DataConfig, NothingCaptionedError, Skipped, Source
from ldm.data.splits import choose_split
from ldm.data.tables import Table, is_saved, list_tables, open_arrow, open_hub, open_parquet, open_saved
from ldm.data.tars import list_tar


def open_path(config: DataConfig) -> Source:
    """Opens the folder, the file, or the data set of the hub that `config.path` names; see the module.

    Raises:
        ValueError: if there is none, nothing in it has a caption, or the config asks for what it does not have.
    """
    path = Path(config.path).expanduser().absolute()  # samples are read wherever the process goes
    if path.is_dir():
        return _open_saved(path, config) if is_saved(path) else _open_folder(path, config)
    if path.exists():
        return _open_file(path, config)
    check_path(config.path)
    listing = Listing("", *list_tables([open_hub(config)], None, config))
    return _source(config.path, listing, f"data set {config.path} has no captioned image")


def check_path(name: str) -> None:
    """`ValueError` if `name` is no data set that is built in, no file or folder, and cannot be an id on the hub."""
    if name in BUILT_IN or Path(name).expanduser().exists():
        return
    near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
    if near or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        hint = f'did you mean "{near[0]}"?' if near else f"give a folder, or one of {', '.join(BUILT_IN)}"
        raise ValueError(f"data.path {name} does not exist; {hint}")


def _open_saved(folder: Path, config: DataConfig) -> Source:
    listing = Listing("", *list_tables([open_saved(folder, config)], folder, config))
    return _source(str(folder), listing, f"no captioned image in {folder}")


def _open_folder(folder: Path, config: DataConfig) -> Source:
    found = walk(folder)
    tables, broken = _tables_with_images(found)
    # Who names a column of images means a table.
    shards = tables if config.image_column is not None else found.ending(".tar") or tables
    name, listing = str(folder), list_metadata(found, tables, config) or list_named_table(found, config)
    if listing is None and config.image_column is None:
        listing = list_sidecars(found, config.caption_column, config.background_rgb)
    if listing is None and shards:
        chosen, split = choose_split(str(folder), shards, config)
        listing = _list_shards(found, chosen, config)
        listing.covered.update(shards)  # other splits were not asked for
        name += f" (split {split})" if split else ""
    else:
        _refuse_splits(folder, config)
    if listing is None and config.image_column is not None:
        raise ValueError(f'data.image_column is "{config.image_column}", but {folder} holds no table; leave it out')
    listing = listing or list_classes(found, config.background_rgb) or Listing("")
    listing.skipped += found.skipped
    _account_for_the_rest(found, {*found.ending(".tar"), *tables}, broken, listing)
    return _source(name, listing, f"no captioned image in {folder}, which holds {summary(found)}")


def _refuse_splits(folder: Path, config: DataConfig) -> None:
    for key, value in (("subset", config.subset), ("split", config.split)):
        if value not in (None, "train"):
            raise ValueError(f'data.{key} is "{value}", but {folder} is a folder of image files; leave it out')


def _list_shards(found: Found, paths: Sequence[str], config: DataConfig) -> Listing:
    listing = Listing("shards", uncovered="no caption: the shards beside it count alone")
    opened: list[Table] = []
    for path in paths:
        if suffix(path) == ".tar":
            samples, skipped = list_tar(found.root / path, path, config)
            listing.samples += samples
        else:
            open_table = open_parquet if suffix(path) == ".parquet" else open_arrow
            table, skipped = open_table(found.root / path, path, config)
            opened += [table] if table else []
        listing.skipped += skipped
    samples, skipped = list_tables(opened, found.root, config)
    listing.samples += samples
    listing.skipped += skipped
    return listing


def _tables_with_images(found: Found) -> tuple[list[str], list[Skipped]]:
    """(parquet and Arrow files with image bytes in them, those that are broken)."""
    paths = found.ending(".parquet", ".arrow")
    if not paths:
        return [], []
    import pyarrow as pa
    from pyarrow import parquet

    with_images, broken = [], []
    for path in paths:
        try:
            if suffix(path) == ".parquet":
                schema = parquet.read_schema(found.root / path)
            else:
                with pa.memory_map(str(found.root / path)) as source:
                    schema = pa.ipc.open_stream(source).schema
        except (pa.ArrowException, OSError) as error:
            broken.append(Skipped(path, f"not a {suffix(path)} file that can be read: {first_line(error)}"))
        else:
            with_images += [path] if has_images(schema) else []
    return with_images, broken


def _account_for_the_rest(found: Found, shards: set[str], broken: Sequence[Skipped], listing: Listing) -> None:
    named = {entry.path for entry in listing.skipped}
    listing.skipped += [entry for entry in broken if entry.path not in named]
    for path in found.files:
        if path in listing.covered:
            continue
        unread = foreign(path)
        if unread is not None:
            listing.skipped.append(Skipped(path, unread))
        elif suffix(path) in IMAGES:
            listing.skipped.append(Skipped(path, listing.uncovered))
        elif path in shards:
            listing.skipped.append(Skipped(path, f"passed over: the folder is read by {listing.kind}"))
        elif (reason := unnamed_image(found, path)) is not None:
            listing.skipped.append(Skipped(path, reason))


def _open_file(path: Path, config: DataConfig) -> Source:
    nothing = f"no captioned image in {path}"
    if suffix(path.name) == ".tar":
        return _source(str(path), Listing("", *list_tar(path, path.name, config)), nothing)
    found = Found(path.parent, [path.name], [])
    tables, broken = _tables_with_images(found)
    if broken:
        raise ValueError(f"{path}: {broken[0].reason}; write or download it again")
    if tables:
        return _source(str(path), _list_shards(found, tables, config), nothing)
    if suffix(path.name) in TEXT_TABLES:
        named = list_named_table(walk(path.parent), config, [path.name])
        if named is None:
            raise ValueError(f"no row of {path} names an image beside or below it; look at its column of file names")
        return _source(str(path), named, nothing)
    reason = foreign(path.name) or "give the folder that holds the captioned images"
    raise ValueError(f"data.path {config.path} is a file; {reason}")


def _source(name: str, listing: Listing, nothing: str) -> Source:
    skipped = tuple(sorted(listing.skipped, key=lambda entry: entry.path))
    if not listing.samples:
        telling = [entry for entry in skipped if not entry.reason.startswith("no caption")] or skipped
        cause = f" ({printable(telling[0].path)}: {telling[0].reason})" if telling else ""
        raise NothingCaptionedError(f"{nothing}{cause}; {WAYS_OUT}", Source(name, (), skipped))
    assert len({sample.id for sample in listing.samples}) == len(listing.samples)
    return Source(name, tuple(listing.samples), skipped)
