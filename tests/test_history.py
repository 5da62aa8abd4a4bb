"""Whatever happens to the folder of a run's checkpoints, the newest complete one is found, or the run refuses."""

import json
import os
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from megatron_gft.atomic import sha256_file
from megatron_gft.checkpoints.history import (
    find_checkpoint,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    publish,
    step_of,
)
from megatron_gft.errors import InputError


class Killed(Exception):
    """The process died here."""


def fill(folder: Path, step: int) -> Path:
    """A hidden folder with what a save writes before it is published."""
    partial = folder / f".step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "weights").write_text(str(step))
    entry = {"bytes": len(str(step)), "sha256": sha256_file(partial / "weights")}
    (partial / "files.json").write_text(json.dumps({"weights": entry}))
    return partial


def made(folder: Path, *steps: int, latest: int | None = None) -> Path:
    for step in steps:
        os.rename(fill(folder, step), folder / f"step-{step:08d}")
    if latest is not None:
        (folder / "latest").write_text(f"step-{latest:08d}\n")
    return folder


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("present", "latest", "which", "found"),
    [
        ((), None, "latest", None),
        ((), None, "previous", None),
        ((3,), None, "latest", 3),  # died between the rename and the first ``latest``
        ((3, 4), None, "latest", 4),
        ((3, 4), 3, "latest", 3),
        ((3, 4), 4, "previous", 3),
        ((3, 4, 8), 4, "previous", 3),  # 8 is of a past that was given up
        ((3,), 3, "previous", "no checkpoint before step-00000003"),
        ((3,), None, "previous", "no checkpoint before step-00000003"),
        ((3,), 4, "latest", "names 'step-00000004'"),
        ((3,), 4, "previous", 3),
        ((), 4, "latest", "names 'step-00000004'"),
    ],
)
def test_what_is_found(tmp_path, present, latest, which, found):
    folder = made(tmp_path, *present, latest=latest)
    if isinstance(found, str):
        with pytest.raises(InputError, match=found):
            find_checkpoint(folder, which)
    else:
        path = find_checkpoint(folder, which)
        assert (None if path is None else step_of(path)) == found


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", b"../../etc", b"step-00000003/x"])
def test_a_damaged_pointer_is_refused(tmp_path, text):
    made(tmp_path, 3)
    (tmp_path / "latest").write_bytes(text)
    with pytest.raises(InputError, match="latest: names"):
        find_checkpoint(tmp_path, "latest")


def test_a_pointer_that_cannot_be_read_is_not_a_missing_one(tmp_path):
    (made(tmp_path, 3) / "latest").mkdir()
    with pytest.raises(InputError, match="latest: cannot be read .*-> correct that, or remove it"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("text", ['{"weights": ', "[]", '{"weights": 3}', '{"weights": {"bytes": 1}}', "\xff"])
def test_a_damaged_list_of_files_is_damage(tmp_path, text):
    (made(tmp_path, 3) / "step-00000003" / "files.json").write_text(text, encoding="latin-1")
    assert "files.json: " in find_damage(tmp_path / "step-00000003")[0]


def test_half_a_checkpoint_is_refused_or_put_aside(tmp_path, caplog):
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(InputError, match="step-00000004: incomplete"):
        find_checkpoint(tmp_path, "latest")
    made(tmp_path, 3)
    assert step_of(find_checkpoint(tmp_path, "latest")) == 3
    for number in (1, 2):  # nobody knows what is in it
        (tmp_path / "step-00000004" / "theirs").write_text(str(number))
        publish(fill(tmp_path, 4), 4, 2)
        assert steps(tmp_path) == [3, 4] and f"it is incomplete-{number}-step-00000004 now" in caplog.text
        assert (tmp_path / f"incomplete-{number}-step-00000004" / "theirs").read_text() == str(number)
        (tmp_path / "step-00000004" / "files.json").unlink()


@pytest.mark.parametrize(
    ("present", "latest", "new", "keep_last", "left"),
    [
        ((), None, 1, 2, [1]),
        ((1, 2), 2, 3, 2, [2, 3]),
        ((1, 2, 3), 3, 4, 1, [4]),
        ((6, 8), 8, 7, 1, [7]),  # after resume=previous: the newest stays although 8 sorts behind it
        ((6, 8), 8, 7, 2, [6, 7]),
        ((6, 8), 8, 8, 2, [6, 8]),
        ((8,), 8, 8, 1, [8]),
    ],
)
def test_what_goes(tmp_path, present, latest, new, keep_last, left):
    folder = made(tmp_path, *present, latest=latest)
    publish(fill(folder, new), new, keep_last)
    assert steps(folder) == left and find_checkpoint(folder, "latest").name == f"step-{new:08d}"
    assert sorted(path.name for path in folder.iterdir() if path.name[0] == ".") == []


operation = st.one_of(
    st.tuples(st.just("save"), st.integers(1, 3), st.integers(0, 12)),  # steps on, file operation at which it dies
    st.tuples(st.just("damage"), st.booleans(), st.just(0)),
    st.tuples(st.just("previous"), st.just(0), st.just(0)),
    st.tuples(st.just("keep"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("lose pointer"), st.just(0), st.just(0)),
)


@settings(max_examples=300)
@given(story=st.lists(operation, min_size=3, max_size=14))
def test_nothing_that_was_saved_is_lost(tmp_path_factory, story):
    """Random lives of a run: saves that die between any two file operations, damage, ``resume=previous``, another
    ``keep_last``, a lost ``latest``. ``saved`` is the last step whose save returned, ``maybe`` one that died late."""
    folder = tmp_path_factory.mktemp("life")
    saved, maybe, keep, step, damaged = 0, set(), 2, 0, set()
    for what, first, second in story:
        if what == "save":
            step += first
            if dies_in_publish(folder, step, keep, second):
                maybe.add(step)
                step = newest_step(folder)
            else:
                saved, maybe = step, set()
                damaged.discard(step)
                assert newest_step(folder) == step and len(list_checkpoints(folder)) <= keep
        elif what == "damage" and (found := find_checkpoint(folder, "latest")):
            (found / "weights").write_text("x")
            damaged.add(step_of(found))
        elif what == "previous" and any(step_of(path) < newest_step(folder) for path in list_checkpoints(folder)):
            before, step = step, step_of(find_checkpoint(folder, "previous"))
            assert step < newest_step(folder)
            saved, maybe = step, maybe | {saved, before}
        elif what == "keep":
            keep = first
        elif what == "lose pointer":
            (folder / "latest").unlink(missing_ok=True)
            step = newest_step(folder)
            maybe.add(step)
        complete = list_checkpoints(folder)
        assert newest_step(folder) in (maybe | {saved} if complete else {0})
        assert complete or not saved, "a checkpoint was saved and none is left"
        assert {step_of(path) for path in complete if find_damage(path)} <= damaged, "half a checkpoint"


def newest_step(folder: Path) -> int:
    """Where the next start goes on; 0 only without any checkpoint."""
    found = find_checkpoint(folder, "latest")
    assert (found is None) == (not list_checkpoints(folder))
    return step_of(found) if found else 0


def dies_in_publish(folder: Path, step: int, keep: int, at: int) -> bool:
    """Publish ``step``; the process dies before file operation ``at`` (0: never). True when it died."""
    count = 0
    with pytest.MonkeyPatch.context() as patch:

        def dying(name: str, original):
            def run(*arguments, **options):
                nonlocal count
                count += 1
                if count == at:
                    if name == "rmtree" and Path(arguments[0]).is_dir():  # half of it is gone
                        for file in list(Path(arguments[0]).iterdir())[:1]:  # none: it died here before
                            file.unlink()
                    raise Killed
                return original(*arguments, **options)

            return run

        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, dying(name, getattr(module, name)))
        partial = folder / f".step-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            publish(fill(folder, step), step, keep)
        except Killed:
            return True
    return False


@pytest.mark.parametrize(("said", "folder"), [("1000\n", "iter_0001000"), ("release", "release")])
def test_the_folder_that_megatron_lm_saves_in_is_named_as_it_is(tmp_path, said, folder):
    """Its ``--load`` takes the folder with the tracker file; so does ``checkpoint.init_from``."""
    (tmp_path / folder).mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(said)
    with pytest.raises(InputError, match="neither a Megatron checkpoint"):
        newest_checkpoint(tmp_path, "checkpoint.init_from")
    (tmp_path / folder / "metadata.json").write_text("{}")
    assert newest_checkpoint(tmp_path, "checkpoint.init_from") == tmp_path / folder
    for other in ("", "../x", "\xb2", "7"):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(other)
        with pytest.raises(InputError, match="neither a Megatron checkpoint"):
            newest_checkpoint(tmp_path, "checkpoint.init_from")
