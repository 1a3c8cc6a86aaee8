"""Checkpoints on disk: what is written, what makes way, and what someone has put beside them stays."""

import os

import pytest

from ldm.training import checkpoints


def write(run, step):
    checkpoints.write_checkpoint(
        checkpoints.checkpoint_folder(run, step), lambda folder: (folder / "weights").write_text(str(step))
    )


@pytest.mark.parametrize(
    ("added", "stays"), [(None, False), (".DS_Store", False), ("notes.txt", True), ("pipeline/sample.png", True)]
)
def test_a_checkpoint_with_files_of_someone_is_not_pruned(added, stays, tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    if added is not None:
        path = checkpoints.checkpoint_folder(tmp_path, 2) / added
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    checkpoints.prune_checkpoints(tmp_path, 1, None)
    left = ["step_00000002"] * stays + ["step_00000006"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == left


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_stands_where_a_checkpoint_is_written_is_renamed(what, tmp_path):
    target = checkpoints.checkpoint_folder(tmp_path, 2)
    target.parent.mkdir()
    if what == "folder":
        target.mkdir()
        (target / "notes").write_text("mine")
    elif what == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    write(tmp_path, 2)
    assert (target / "weights").read_text() == "2"
    aside = target.with_name("damaged.step_00000002")
    assert (
        os.readlink(aside) == "nowhere" if what == "link" else (aside / "notes" if what == "folder" else aside).exists()
    )
    assert checkpoints.list_checkpoints(tmp_path) == [target]
