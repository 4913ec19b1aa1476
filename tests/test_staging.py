import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_models

import upcycle
from upcycle.errors import UsageError
from upcycle.models.companions import copy_companions
from upcycle.targets.files.finished_shards import Manifest, sha256
from upcycle.targets.files.staging import staged


def content(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(directory.iterdir())}


def test_the_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as directory:
        assert directory == tmp_path / "deep" / "out.partial" / "new"
        (directory / "a").write_text("1")
        assert not out.exists()
    assert content(out) == {"a": "1"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_everything_as_it_was(
    error: type[BaseException], existed: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
        (out / "old").write_text("kept")

    def fail() -> None:
        with staged(out, overwrite=existed) as directory:
            (directory / "half").write_text("")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existed else [])
    assert not existed or content(out) == {"old": "kept"}


def test_an_existing_directory_is_refused_unless_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("")
    with pytest.raises(UsageError, match="`overwrite=True`"), staged(out):
        pytest.fail("the block must not run")
    with staged(out, overwrite=True) as directory:
        (directory / "new").write_text("")
    assert content(out) == {"new": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with staged(out):
            out.mkdir()
            (out / "theirs").write_text("")

    with pytest.raises(UsageError, match="exists already"):
        write()
    assert content(out) == {"theirs": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    for out in (dense, tmp_path):
        with (
            pytest.raises(UsageError, match="in use"),
            staged(out, overwrite=True, protect=[dense]),
        ):
            pytest.fail("the block must not run")
    monkeypatch.chdir(dense)
    with pytest.raises(UsageError, match="in use"), staged(dense, overwrite=True):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="not a directory"),
        staged(tmp_path / "file", overwrite=True),
    ):
        pytest.fail("the block must not run")


def left_by_a_killed_run(out: Path, files: dict[str, str]) -> None:
    """What `staged` leaves of a run that was killed after it had finished `files`."""
    new = out.with_name("out.partial") / "new"
    new.mkdir(parents=True)
    manifest = Manifest(new, lambda: "key")
    for name, text in files.items():
        (new / name).write_text(text)
        manifest.finished(new / name, sha256(new / name))


def test_finished_files_are_kept_or_removed_as_the_user_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left_by_a_killed_run(out, {"a": "1"})
    with pytest.raises(UsageError, match=r"`resume=True`.*`fresh=True`"), staged(out):
        pytest.fail("the block must not run")
    with staged(out, resume=True) as directory:
        assert content(directory) == {"a": "1"}
        assert Manifest(directory, lambda: "key").is_whole(directory / "a")
    assert content(out) == {"a": "1"}
    left_by_a_killed_run(out, {"a": "2"})
    with staged(out, overwrite=True, fresh=True) as directory:
        assert content(directory) == {}
    assert content(out) == {}


def test_what_was_not_finished_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left_by_a_killed_run(out, {"a": "1", "b": "1", "c": "1"})
    new = tmp_path / "out.partial" / "new"
    (new / "thesis.txt").write_text("")
    (new / "folder").mkdir()
    (new / "b").unlink()
    (new / "b").symlink_to(new / "a")
    before = (new / "c").stat()
    (new / "c").write_text("2")
    os.utime(new / "c", ns=(before.st_atime_ns, before.st_mtime_ns))
    with staged(out, resume=True) as directory:
        manifest = Manifest(directory, lambda: "key")
        whole = {name: manifest.is_whole(directory / name) for name in ("a", "b", "c")}
        assert whole == {"a": True, "b": False, "c": False}
        assert sorted(p.name for p in directory.iterdir()) == ["a", "c"]


def test_files_of_another_run_are_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    left_by_a_killed_run(out, {"a": "1"})

    def other() -> None:
        with staged(out, resumable=True, resume=True) as directory:
            Manifest(directory, lambda: "another key")

    with pytest.raises(UsageError, match="left from another conversion"):
        other()
    assert content(tmp_path / "out.partial" / "new") == {"a": "1"}


def test_a_failure_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail(resumable: bool) -> None:
        with staged(out, resumable=resumable) as directory:
            manifest = Manifest(directory, lambda: "key")
            (directory / "a").write_text("1")
            manifest.finished(directory / "a", sha256(directory / "a"))
            raise RuntimeError("the disk is full")

    for resumable in (False, True):
        with pytest.raises(RuntimeError):
            fail(resumable)
        assert (tmp_path / "out.partial").exists() == resumable


@pytest.mark.parametrize("what", ["folder", "link", "file", "linked lock"])
def test_what_is_not_ours_is_left_alone(what: str, tmp_path: Path) -> None:
    mine, partial = tmp_path / "mine", tmp_path / "out.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("")
    if what == "folder":
        mine.rename(partial)
    elif what == "link":
        partial.symlink_to(mine)
    elif what == "file":
        partial.write_text("")
    else:
        partial.mkdir()
        (partial / "upcycle.lock").symlink_to(mine / "thesis.txt")
    with pytest.raises(UsageError, match="move"), staged(tmp_path / "out", fresh=True):
        pytest.fail("the block must not run")
    assert list(tmp_path.rglob("thesis.txt"))


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    with (
        staged(tmp_path / "out"),
        pytest.raises(UsageError, match="another run is writing it now"),
        staged(tmp_path / "out", fresh=True),
    ):
        pytest.fail("the block must not run")
    assert (tmp_path / "out").is_dir()


def test_a_mounted_volume_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(UsageError, match="mounted volume"), staged(tmp_path / "out"):
        pytest.fail("the block must not run")


KILLED = """
import os, signal, sys
from pathlib import Path
from upcycle.targets.files import staging

count, at = 0, int(sys.argv[2])
if sys.argv[3] == "two steps":
    staging._rename = lambda *_: False

def watch(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

rename = staging._rename
def exchange(*arguments):
    watch("os.rename", ())
    done = rename(*arguments)
    watch("os.rename", ())
    return done

staging._rename = exchange
sys.addaudithook(watch)
with staging.staged(Path(sys.argv[1]), overwrite=True, fresh=True) as directory:
    (directory / "new").write_text("new")
"""


@pytest.mark.parametrize("way", ["at once", "two steps"])
def test_killed_at_any_step_the_output_is_the_old_or_the_new(way: str, tmp_path: Path) -> None:
    """Where a file system cannot swap two names, the next run puts the old one back."""
    for step in range(1, 30):
        out = tmp_path / str(step) / "out"
        out.mkdir(parents=True)
        (out / "old").write_text("old")
        command = [sys.executable, "-c", KILLED, str(out), str(step), way]
        code = subprocess.run(command, check=False).returncode
        if way == "at once":
            assert content(out) in ({"old": "old"}, {"new": "new"})
        with staged(out, overwrite=True) as directory:
            assert content(out) in ({"old": "old"}, {"new": "new"})
            assert content(directory) == {}
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        if code == 0:
            break
    assert code == 0
    assert step > 5


def source_with(tmp_path: Path, *names: str) -> Path:
    source = tmp_path / "source"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    return source


def test_companions_are_what_loaders_ask_for(tmp_path: Path) -> None:
    wanted = ["tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"]
    unwanted = ["config.json", "README.md", "model.safetensors", "pytorch_model.bin", ".git"]
    unwanted += ["model.safetensors.index.json", "onnx/model.json", "model.gguf", "heads.pt"]
    unwanted += ["evil.sh", "tokenization_mine.py", "scaler.joblib", "adapter_config.json"]
    source, target = source_with(tmp_path, *wanted, *unwanted, "1_Pooling/config.json"), tmp_path
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.json").write_text("half")
    expected = {"1_Pooling/config.json", *wanted, "modules.json"}
    assert copy_companions(source, target) == sorted(expected)
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert present == expected
    assert (target / "tokenizer.json").read_text() == "x"
    assert "tokenization_mine.py" in copy_companions(source, target, trust_remote_code=True)


@pytest.mark.parametrize("path", ["..", "../..", "/etc", "a/../../b", "..\\.."])
def test_folders_above_the_model_are_refused(path: str, tmp_path: Path) -> None:
    source = source_with(tmp_path, "model/tokenizer.json", "secret.txt") / "model"
    (source / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(UsageError, match=r"modules\.json: it names"):
        copy_companions(source, tmp_path)


def test_links_are_followed_within_the_model_and_into_the_blobs_of_a_cache(tmp_path: Path) -> None:
    secret = source_with(tmp_path, "secret.txt", "models--a/blobs/0f") / "secret.txt"
    snapshot = tmp_path / "source/models--a/snapshots/main"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/0f")
    (snapshot / "vocab.txt").symlink_to("tokenizer.json")
    target = tmp_path / "target"
    target.mkdir()
    assert copy_companions(snapshot, target) == ["tokenizer.json", "vocab.txt"]
    (snapshot / "merges.txt").symlink_to(secret)
    with pytest.raises(UsageError, match=r"merges\.txt: a link that leads out"):
        copy_companions(snapshot, target)
    (snapshot / "merges.txt").unlink()
    (snapshot / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(UsageError, match="additional_chat_templates: a link that leads out"):
        copy_companions(snapshot, target)


def test_save_says_what_it_takes_itself(tmp_path: Path) -> None:
    """A streamed run was interrupted where a module is to be saved."""
    out = tmp_path / "out"
    left_by_a_killed_run(out, {"a": "1"})
    done = upcycle.convert(small_models.build("llama"), "sparse-upcycling", verify=False)
    with pytest.raises(UsageError, match="`fresh=True`"):
        done.save(out, verify=False)
    done.save(out, verify=False, fresh=True)
    assert not (out / "a").exists()
    assert (out / "config.json").is_file()
