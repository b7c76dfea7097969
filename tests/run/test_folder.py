import errno
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agents.run.errors import RunError
from agents.run.folder import RunConfig, RunFolder, RunState, append_row, keep_rows, read_rows
from agents.run.options import RunOptions


def settings(tmp_path: Path, **options: object) -> RunConfig:
    run = RunOptions(**{"env": "Ant-v5", "runs": str(tmp_path / "runs"), **options})  # type: ignore[arg-type]
    return RunConfig("npg", run, {"gamma": 0.9, "net_arch": (64, 64)}, {"gamma": "flag", "net_arch": "default"})


def test_a_new_folder_says_what_runs_in_it(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path, seed=3, name="first"), "python train.py npg")
    assert re.fullmatch(r"\d{8}-\d{6}-s3-first", folder.path.name)
    assert folder.path.parent == tmp_path / "runs" / "Ant-v5" / "npg"
    assert folder.command.read_text() == "python train.py npg\n"
    versions = json.loads((folder.path / "versions.json").read_text())
    assert versions["versions"]["torch"]
    assert versions["cpus"] >= 1
    assert folder.config.read_text().startswith("algorithm: npg\n")


def test_the_configuration_reads_back_as_written(tmp_path: Path) -> None:
    written = settings(tmp_path, env_kwargs=("frame_skip=2",), eval_every=7)
    read = RunFolder.create(written, "").read_config()
    assert read.run == written.run
    assert read.config == {"gamma": 0.9, "net_arch": [64, 64]}
    assert read.origins == written.origins


def test_an_id_with_slashes_is_one_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path, env="package:probes/One-v0"), "")
    assert folder.path.parent == tmp_path / "runs" / "package_probes_One-v0" / "npg"


def test_runs_that_start_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260102-030405")
    folders = [RunFolder.create(settings(tmp_path), str(k)) for k in range(3)]
    assert [folder.path.name for folder in folders] == [f"20260102-030405-s0{end}" for end in ("", "-2", "-3")]
    assert [folder.command.read_text() for folder in folders] == ["0\n", "1\n", "2\n"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    run_dir = tmp_path / "mine"
    RunFolder.create(settings(tmp_path, run_dir=str(run_dir)), "first")
    with pytest.raises(RunError, match=r"exists and is not overwritten; .* train\.py resume"):
        RunFolder.create(settings(tmp_path, run_dir=str(run_dir)), "second")
    assert (run_dir / "command.txt").read_text() == "first\n"


def test_a_folder_of_something_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not overwritten"):
        RunFolder.create(settings(tmp_path, run_dir=str(tmp_path)), "")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_be_the_runs_own(tmp_path: Path) -> None:
    (tmp_path / "output.txt").write_text("what the run prints, where it is one of several")
    assert RunFolder.create(settings(tmp_path, run_dir=str(tmp_path)), "").config.is_file()
    with pytest.raises(RunError, match="exists and is not overwritten"):
        RunFolder.create(settings(tmp_path, run_dir=str(tmp_path)), "")


def test_where_a_run_is_reads_back(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    assert folder.read_state() is None
    state = RunState("failed", 12, 3.5, 0.25, None, -1.0, "why")
    folder.write_state(state)
    assert folder.read_state() == state
    assert [file.name for file in folder.path.glob("*state*")] == ["state.json"]
    assert not folder.is_locked()
    with folder.lock():
        assert folder.is_locked()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder.create(settings(tmp_path), "")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder at"):
        RunFolder.open(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        RunFolder.open(tmp_path)
    run = RunFolder.create(settings(tmp_path), "")
    with pytest.raises(RunError, match="no checkpoint yet"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("text", ["", "algorithm: npg", "run: {env: Ant-v5, spets: 3}", "[1", "run: {env_kwargs: 3}"])
def test_a_foreign_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    folder.config.write_text(text)
    with pytest.raises(RunError, match="cannot be read as a run's configuration"):
        folder.read_config()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    with folder.lock(), pytest.raises(RunError, match="Another process"):
        folder.lock()
    folder.lock().close()


def test_the_lock_outlives_a_new_configuration(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    with folder.lock():
        folder.write_config(settings(tmp_path, threads=3))
        with pytest.raises(RunError, match="Another process"):
            folder.lock()


def test_a_kill_while_the_configuration_is_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(settings(tmp_path, threads=2), "")
    seen = []

    def killed(descriptor: int) -> None:
        seen.append(folder.read_config().run.threads)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write_config(settings(tmp_path, threads=3))
    assert seen == [2]
    assert folder.read_config().run.threads == 2


def test_rows_beyond_the_checkpoint_and_broken_ones_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "progress.csv"
    for steps in (1, 5, 9):
        append_row(file, {"steps": steps, "text": "a, b"})
    with file.open("a") as stream:
        stream.write("3")
    keep_rows(file, "steps", 5)
    assert file.read_text() == 'steps,text\n1,"a, b"\n5,"a, b"\n'
    append_row(file, {"steps": 6, "text": ""})
    assert [row["steps"] for row in read_rows(file)] == ["1", "5", "6"]


def test_no_rows_need_no_file(tmp_path: Path) -> None:
    keep_rows(tmp_path / "none.csv", "steps", 5)
    assert read_rows(tmp_path / "none.csv") == []
    assert not (tmp_path / "none.csv").exists()


ODD_LINES = {
    "a text for steps": "run: {env: Ant-v5, env_kwargs: [], steps: many}",
    "a number for the environment": "run: {env: 5, env_kwargs: []}",
    "a number for threads that is none": "run: {env: Ant-v5, env_kwargs: [], threads: .nan}",
    "a list for the config": "config: []",
    "aliases": "config: {a: &a [1], b: *a}",
    "much": "config: {a: " + "1" * 2**18 + "}",
    "a text that does not end": "config: '",
    "a call": "config: !!python/object/apply:os.system ['ls']",
    "depth": "config: " + "[" * 20_000,
}


@pytest.mark.parametrize("kind", ODD_LINES)
def test_an_odd_configuration_is_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    name = ODD_LINES[kind].partition(":")[0]
    lines = [line for line in folder.config.read_text().splitlines() if name == "config" or not line.startswith("  ")]
    folder.config.write_text("\n".join([line for line in lines if not line.startswith(name)] + [ODD_LINES[kind]]))
    with pytest.raises(RunError, match=r"config\.yaml cannot be read as a run's configuration") as caught:
        folder.read_config()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "{", '{"state": "running"}', "[]", '{"state": 1, "steps": "a"}'])
def test_half_a_state_is_none(tmp_path: Path, text: str) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    folder.state.write_text(text)
    assert folder.read_state() is None


@pytest.mark.parametrize("name", ["progress.csv", "checkpoints/last.zip", "command.txt", ".lock", "curve.png"])
def test_nothing_is_written_through_a_link_out_of_the_run(tmp_path: Path, name: str) -> None:
    folder, outside = RunFolder.create(settings(tmp_path), ""), tmp_path / "outside"
    outside.write_text("mine")
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to(outside)
    with pytest.raises(RunError, match=rf"{name} is a link out of the run's folder, to {outside}"):
        folder.lock()
    assert outside.read_text() == "mine"


def test_the_folder_of_checkpoints_is_no_link_either(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    (folder.path / "checkpoints").rmdir()
    (folder.path / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(RunError, match="checkpoints is a link out of"):
        folder.lock()


def test_a_row_is_not_added_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").symlink_to(tmp_path / "outside.csv")
    (tmp_path / "outside.csv").write_text("steps\n1\n")
    with pytest.raises(OSError, match="symbolic link"):
        append_row(tmp_path / "rows.csv", {"steps": 2})


@pytest.mark.parametrize("name", ["checkpoints/last.zip", "progress.csv", "evaluations.csv"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    make(folder.path / name)
    with pytest.raises(RunError, match=rf"{name} is not a file"):
        RunFolder.open(folder.path).lock() if name.endswith("zip") else folder.lock()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, original = RunFolder.create(settings(tmp_path), ""), Path.open

    def refused(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode != "r":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return original(path, mode, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\).*copy it"):
        folder.lock()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    folder = RunFolder.create(settings(tmp_path), "")
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    left = [folder.path / f".curve.{gone}.tmp.png", folder.last.parent / f".last.zip.{gone}.tmp"]
    others = [folder.path / ".mine.tmp", folder.path / f".state.{os.getpid()}.tmp.json", folder.path / ".a.0.tmp"]
    for file in (*left, *others):
        file.touch()
    folder.lock().close()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)


@pytest.mark.parametrize(
    "text", ["steps,me", "eps,mean\n1,2\n", "1,2\n3,4\n", "steps,me1,2\n3,4\n", "\0\n\0", '"steps,mean\n1,2\n']
)
def test_a_file_without_its_header_is_set_aside(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(text)
    said = keep_rows(file, "steps", 5)
    assert said is not None
    assert "no whole header: it is kept as damaged-rows.csv" in said
    assert (tmp_path / "damaged-rows.csv").read_text() == text
    append_row(file, {"steps": 6, "mean": 1})
    assert read_rows(file) == [{"steps": "6", "mean": "1"}]


def test_rows_that_are_no_numbers_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"steps,mean\n1,2\nx,2\n\xff,3\n2,5\n7,5\n3\n")
    assert keep_rows(file, "steps", 5) is None
    assert [row["steps"] for row in read_rows(file)] == ["1", "2"]


def test_a_row_that_finds_no_room_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "rows.csv", os.write
    append_row(file, {"steps": 1})

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 4:
            raise OSError(errno.ENOSPC, "no room")
        return write(descriptor, data[:2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="no room"):
        append_row(file, {"steps": 22222})
    assert file.read_text() == "steps\n1\n"
