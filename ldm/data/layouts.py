"""`open_source`: any data path as a source of captioned images.

`save_to_disk` folders of `datasets` are read as such. Any other folder, with the folders below it, is read from the
source of captions that captions most images, of equals the first of:

1. metadata: `metadata.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet`, each for its folder;
2. another table whose rows name image files: CSV, JSON lines, kohya JSON, Flickr lists, and all COCO annotations;
3. sidecars: `a.txt`, `a.caption` (each line a caption), or `a.json` beside `a.png`;
4. shards: webdataset `.tar` files, else `.parquet` and `.arrow` tables with images (`split` and `subset` apply);
5. if there is no other: the names of sub-folders.

`caption_source` overrides the choice. Sources are never mixed: unused ones, and unreadable files that look like
captions are reported. A file given as the path is read whatever its name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data import folder, shards
from ldm.data.captions import ReadOptions, find_unread_captions
from ldm.data.folder import FOLDERS, METADATA, SIDECARS
from ldm.data.images import IMAGES, FolderFiles, decode, list_files, misnamed_image, stem, suffix, unsupported_reason
from ldm.data.rows import SUFFIXES as TEXT_TABLES
from ldm.data.sources import BUILT_IN, WAYS_OUT, CaptionSource, DataConfig, Listing, NoCaptionsError, Skipped, Source
from ldm.progress import plural, printable

SHARDS = "shards"
_KINDS = {SIDECARS: "captions beside images", FOLDERS: "the names of sub-folders"}  # in messages
# The names of splits that `datasets` knows.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def open_source(config: DataConfig, *, captioned: bool = True) -> Source:
    """Opens the data set that `config.path` names. Nothing is decoded.

    Args:
        captioned: False also lists images without a caption, to train on images alone.

    Raises:
        NoCaptionsError: a ValueError, if there is no captioned image, or no image at all.
        ValueError: if there is no such data set, a package is missing, or the columns, split or subset do not exist.
    """
    if config.path == "digits":
        from ldm.data.builtin import open_digits

        source = open_digits()
    elif config.path == "openmoji":
        from ldm.data.builtin import open_openmoji

        tones, cutouts = config.skin_tones, config.compose > 0
        source = open_openmoji(config.resolution, config.background_rgb, skin_tones=tones, cutouts=cutouts)
    elif config.path == "scenes":
        from ldm.data.builtin import open_scenes

        source = open_scenes(config)
    else:
        source = _open_path(config, captioned)
    if not config.caption_templates:
        return source
    samples = []
    for sample in source.samples:  # append each caption in each template, without repetitions
        filled = (template.replace("{}", text) for template in config.caption_templates for text in sample.captions)
        new = tuple(text for text in dict.fromkeys(filled) if text not in sample.captions)
        samples.append(replace(sample, captions=(*sample.captions, *new), templated=len(new)))
    return replace(source, samples=tuple(samples))


def _open_path(config: DataConfig, captioned: bool) -> Source:
    decoder = partial(decode, background=config.background_rgb)
    options = ReadOptions(config.image_column, config.caption_column, decoder, captioned, config.caption_language)
    path = Path(config.path).expanduser().absolute()  # samples stay readable when the working directory changes
    if path.is_dir() and not shards.is_saved(path):
        return _Folder(path, config, options).open()
    listing, name = Listing(SHARDS), str(path)
    if path.is_dir():
        table = shards.open_dataset(name, shards.read_saved(path, config.split), options)
        shards.read_tables([table], path, options, listing)
    elif not path.exists():
        check_path(config.path)
        name = config.path
        table = shards.open_dataset(name, shards.read_hub(name, config.subset, config.split), options)
        shards.read_tables([table], None, options, listing)
        return _source(name, listing, options, f"data set {name} has no captioned image")
    elif suffix(path.name) == ".tar":
        listing = _read_shards(path.parent, [path.name], {}, config, options)
    else:
        tables, broken = _image_tables(FolderFiles(path.parent, [path.name], []))
        if broken:
            raise ValueError(f"{path}: {broken[0].reason}; write or download it again")
        if tables:
            listing = _read_shards(path.parent, [path.name], tables, config, options)
        elif suffix(path.name) in TEXT_TABLES:
            named, _ = folder.read_named_tables(list_files(path.parent), options, [path.name])
            if not named:
                where = f"data.caption_source {path.name}"
                raise ValueError(f"no row of {path} names an image below it; give the folder of both, and {where}")
            listing = named[0]
            if listing.error is not None:
                raise listing.error
        else:
            reason = unsupported_reason(path.name) or "give the folder that holds the captioned images"
            raise ValueError(f"data.path {config.path} is a file; {reason}")
    return _source(name, listing, options)


def check_path(name: str) -> None:
    """Raises ValueError if `name` is no built-in data set, no file or folder, and cannot be an id on the hub."""
    if name in BUILT_IN or Path(name).expanduser().exists():
        return
    near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1)
    if near or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        hint = f'did you mean "{near[0]}"?' if near else f"give a folder, or one of {', '.join(BUILT_IN)}"
        raise ValueError(f"data.path {name} does not exist; {hint}")


class _Folder:
    """A folder of images, and what may caption them: `tables` are the Arrow schemas of tables with images, `shards` the
    tars or tables that may be read, `listings` metadata, tables and sidecars by preference, `classes` sub-folders.
    """

    def __init__(self, path: Path, config: DataConfig, options: ReadOptions) -> None:
        self.found, self.config, self.options = list_files(path), config, options
        found, given = self.found, config.caption_source
        self.tables, self.broken = _image_tables(found)
        by_table = config.image_column is not None  # `image_column` asks for a table
        self.shards = list(self.tables) if by_table else found.ending(".tar") or list(self.tables)
        if given in found.files:
            self.listings, self.reasons = folder.read_named_tables(found, options, [given])
        else:
            metadata = folder.read_metadata(found, list(self.tables), options)
            named, self.reasons = folder.read_named_tables(found, options)
            named.sort(key=lambda one: (len(one.name), one.name))  # at a tie, the shorter
            sidecars = None if by_table else folder.read_sidecars(found, options)
            strong, weak = ([one for one in named if one.weak == which] for which in (False, True))
            self.listings = [one for one in (metadata, *strong, sidecars, *weak) if one is not None]
        self.classes = None if by_table else folder.read_classes(found, options)
        self.in_shards = 0
        if self.shards and (self.listings or self.classes):
            with suppress(OSError, ValueError):
                listing = Listing()
                for name in choose_split("", self.shards, config.subset, config.split)[0]:
                    if suffix(name) == ".tar":
                        shards.read_tar(path / name, name, replace(options, captioned=True), listing)
                    else:
                        self.in_shards += shards.row_count(path / name)
                self.in_shards += len(listing.samples)

    def open(self) -> Source:
        """The source of the captions that are chosen."""
        config, found, root, chosen = self.config, self.found, self.found.root, self._choose()
        name, listing = str(root), Listing()
        if chosen == SHARDS:
            paths, split = choose_split(name, self.shards, config.subset, config.split)
            listing = _read_shards(root, paths, self.tables, config, self.options)
            listing.covered.update(self.shards)  # of other splits too
            name += f" (split {split})" if split else ""
        else:
            for key, value in (("subset", config.subset), ("split", config.split)):
                if value not in (None, "train"):
                    raise ValueError(f'data.{key} is "{value}", but {root} is a folder of image files; leave it out')
            listing = next((one for one in self.listings if one.name == chosen), listing)
        if chosen == FOLDERS and self.classes is not None:
            listing = self.classes
        with_captions = found.files if chosen == SHARDS else {sample.id for sample in listing.samples}
        sources = []
        for one in self.listings:
            why = f"{len(listing.samples)} have captions from {chosen}"
            if one.name == chosen:
                why = ""
            elif one.error is not None:
                why = str(one.error)
            elif not one.images and one.skipped:
                why = f"{printable(one.skipped[0].path)}: {one.skipped[0].reason}"
            elif chosen is None:
                why = "it has numbers, not words"
            more, doubtful = len(one.images.difference(with_captions)), one.name != chosen and not one.numbers
            sources.append(CaptionSource(one.name, len(one.images), more, why, doubtful))
        read = {path for one in self.listings for path in (*one.covered, *one.files)}
        sources.sort(key=lambda source: source.reason != "")  # the used one first
        sources += find_unread_captions(found, {*read, *self.tables}, self.reasons, with_captions)
        if config.caption_source is not None:  # the choice is deliberate
            why = f"data.caption_source is {config.caption_source}"
            sources = [replace(one, doubtful=False, reason=why if one.reason else "") for one in sources]
        if self.shards and chosen != SHARDS:
            sources.append(CaptionSource(SHARDS, self.in_shards, 0, f"{chosen} is read"))
        if self.classes is not None:
            listing = self._with_classes(self.classes, listing, chosen, sources)
        reported = {source.name for source in sources}
        listing.skipped = [entry for entry in [*listing.skipped, *found.skipped] if entry.path not in reported]
        if not self.options.captioned:  # add the images without captions, which were skipped
            by_stem = chosen in (None, SIDECARS, SHARDS, FOLDERS)  # how the layout names groups
            taken = {sample.id for sample in listing.samples}
            images = [path for path in found.images if path not in taken]
            for path in images:
                group = stem(path) if by_stem else path
                listing.samples.append(folder.file_sample(found, path, [], group, self.options.decode))
            known = set(images)
            if listing.name != SHARDS:  # skipped entries of shards remain
                listing.samples.sort(key=lambda sample: sample.id)
                known |= listing.covered
            listing.skipped = [entry for entry in listing.skipped if entry.path not in known]
            listing.covered.update(images)
        named = {entry.path for entry in listing.skipped}
        listing.skipped += [entry for entry in self.broken if entry.path not in named]
        all_shards = {*found.ending(".tar"), *self.tables}
        for path in found.files:
            reason = None if path in listing.covered else unsupported_reason(path)
            if reason is None and path not in listing.covered:
                if suffix(path) in IMAGES:
                    reason = listing.uncovered
                elif path in all_shards:
                    reason = f"ignored: the folder is read by {_KINDS.get(listing.name, listing.name)}"
                else:
                    reason = misnamed_image(root / path)
            if reason is not None:
                listing.skipped.append(Skipped(path, reason))
        nothing = f"no captioned image in {root}, which holds {folder.summary(found)}"
        return _source(name, listing, self.options, nothing, tuple(sources))

    def _choose(self) -> str | None:
        """The name of the source that captions most images, of equals the first; None if there is none."""
        given, root, classes = self.config.caption_source, self.found.root, self.classes
        if given is not None:
            has = [one.name for one in self.listings] + [SHARDS] * bool(self.shards) + [FOLDERS] * bool(classes)
            if given not in has:
                why = "there are no such captions"
                if given in self.reasons:
                    why = f"no captions can be read from it ({self.reasons[given]})"
                ways = f"give one of {'; '.join(map(printable, has))}, or leave it out" if has else "leave it out"
                raise ValueError(f'data.caption_source is "{given}", but in {root} {why}; {ways}')
            for one in self.listings:
                if one.name == given and one.error is not None:
                    raise one.error
            return given
        sound = [one for one in self.listings if one.error is None]
        # Numbers are unlikely captions.
        worded = [one for one in sound if not one.numbers] or ([] if classes and classes.samples else sound)
        best = max(worded, key=lambda one: len(one.samples), default=None)
        if self.shards and (best is None or self.in_shards > len(best.samples)):
            return SHARDS
        if best is None:
            error = next((one.error for one in self.listings if one.error is not None), None)
            if error is not None and self.options.captioned:
                raise error
            if self.config.image_column is not None:
                column = self.config.image_column
                raise ValueError(f'data.image_column is "{column}", but {root} holds no table; leave it out')
            return None
        same = [one for one in worded if one.name not in (METADATA, SIDECARS) and len(one.images) == len(best.images)]
        if self.options.captioned and best in same and any(one.images != best.images for one in same):
            names = "; ".join(one.name for one in same)
            raise ValueError(f"{root} has several tables of as many images: {names}; set data.caption_source to one")
        return best.name

    def _with_classes(
        self, classes: Listing, listing: Listing, chosen: str | None, sources: list[CaptionSource]
    ) -> Listing:
        """The listing to use, if sub-folders may caption too: they do, if nothing else does. `NoCaptionsError` if
        unreadable files may have captions, or written captions cover less than half as many images.
        """
        count, captioned_count = len(classes.samples), len(listing.samples)
        more = len({sample.id for sample in classes.samples}.difference(sample.id for sample in listing.samples))
        doubtful = [source for source in sources if source.doubtful]
        cause = None
        if chosen is None and doubtful and count:
            first = doubtful[0]
            about = plural(first.images, "image") if first.images else "missing images"
            cause = f"{first.name} names {about} and is not read ({first.reason}); fix it, or"
        elif chosen not in (None, FOLDERS) and self.config.caption_source is None and count > 2 * captioned_count:
            what = "text beside images captions" if chosen == SIDECARS else f"{chosen} captions"
            cause = f"{what} {plural(captioned_count, 'image')}, the names of sub-folders would caption {count}; "
            cause += f"set data.caption_source to {chosen}, or"
        if chosen == FOLDERS or (chosen is None and cause is None):
            sources.append(CaptionSource(FOLDERS, count))
            return classes
        if more:
            sources.append(CaptionSource(FOLDERS, count, more, "folder names are not used beside written captions"))
        if cause is not None and self.options.captioned:
            root = self.found.root
            why = f"{cause} set data.caption_source to {FOLDERS}, which takes the names of sub-folders"
            skipped = [Skipped(sample.id, f"no caption: {why}") for sample in classes.samples]
            skipped = sorted([*skipped, *classes.skipped, *listing.skipped], key=lambda entry: entry.path)
            unused = [source if source.reason else replace(source, reason="it has few captions") for source in sources]
            lost = Source(str(root), (), tuple(skipped), caption_sources=tuple(unused))
            raise NoCaptionsError(f"{root} may have captions that would be lost: {printable(why)}", lost)
        return listing


def _read_shards(
    root: Path, names: Sequence[str], schemas: dict[str, Any], config: DataConfig, options: ReadOptions
) -> Listing:
    listing = Listing(SHARDS, uncovered="no caption: the shards beside it count alone")
    tables = []
    for name in names:
        path = root / name
        if suffix(name) == ".tar":
            shards.read_tar(path, name, options, listing)
        elif suffix(name) == ".parquet":
            copies = config.cache_folder / "tables"
            tables.append(shards.open_parquet(path, name, schemas[name], options, copies))
        else:
            try:
                dataset = shards.read_arrow(path)
            except ValueError as error:
                listing.skipped.append(Skipped(name, str(error)))
                continue
            tables.append(shards.open_dataset(name, dataset, options))
    shards.read_tables(tables, root, options, listing)
    return listing


def _image_tables(found: FolderFiles) -> tuple[dict[str, Any], list[Skipped]]:
    """(the Arrow schemas of parquet and Arrow files with images, broken files)."""
    schemas: dict[str, Any] = {}
    broken: list[Skipped] = []
    for path in found.ending(".parquet", ".arrow"):
        try:
            schema = shards.read_schema(found.root / path)
        except ValueError as error:
            broken.append(Skipped(path, str(error)))
        else:
            if shards.image_columns(schema):
                schemas[path] = schema
    return schemas, broken


def _source(
    name: str, listing: Listing, options: ReadOptions, nothing: str = "", sources: tuple[CaptionSource, ...] = ()
) -> Source:
    """The listing as a source; `nothing` is the error if it has no samples."""
    skipped = tuple(sorted(listing.skipped, key=lambda entry: entry.path))
    source = Source(
        name,
        tuple(listing.samples),
        skipped,
        caption_sources=sources,
        captioned=options.captioned,
        languages=dict(options.languages.most_common()),
    )
    if not listing.samples:
        telling = [entry for entry in skipped if not entry.reason.startswith("no caption")] or skipped
        telling = [*(Skipped(one.name, one.reason) for one in sources if one.doubtful), *telling]
        cause = f" ({printable(telling[0].path)}: {telling[0].reason})" if telling else ""
        nothing = nothing or f"no captioned image in {name}"
        if not options.captioned:
            raise NoCaptionsError(f"{nothing.replace('captioned ', '')}{cause}; add images", source)
        raise NoCaptionsError(f"{nothing}{cause}; {WAYS_OUT}", source)
    assert len({sample.id for sample in listing.samples}) == len(listing.samples)
    return source


def choose_split(where: str, paths: Sequence[str], subset: str | None, split: str) -> tuple[list[str], str | None]:
    """The files of a subset (a folder or file of that name) and a split, in order, and the split if there are several.

    The split is in the name of the file or a folder, as in `data/test-00000-of-00003.parquet`; "train" otherwise.

    Args:
        where: the folder, for messages.
        paths: posix paths in it.

    Raises:
        ValueError: listing the subsets or splits, if there are no such files.
    """
    if subset is not None:
        chosen = [path for path in paths if subset in PurePosixPath(path).with_suffix("").parts]
        if not chosen:
            folders = sorted({PurePosixPath(path).parent.as_posix() for path in paths})
            known = ", ".join(map(printable, folders))
            raise ValueError(f'{where} has no subset "{subset}"; its files are in {known}; set data.subset to one')
        paths = chosen
    splits: dict[str, list[str]] = {}
    for path in paths:
        # The file name takes precedence over the folders.
        words = (word for part in reversed(PurePosixPath(path).parts) for word in re.split(r"[-._ \d]+", part.lower()))
        splits.setdefault(next((_SPLITS[word] for word in words if word in _SPLITS), "train"), []).append(path)
    wanted = _SPLITS.get(split, split)
    if wanted not in splits:
        known = ", ".join(sorted(splits))
        raise ValueError(f'{where} has no split "{split}"; it has {known}; set data.split to one of these')
    return splits[wanted], wanted if len(splits) > 1 else None
