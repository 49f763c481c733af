"""Data and workdirs on an object store, by a stand-in of Google's that speaks its API."""

import collections
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxconv import storage
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.sources import open_source
from jaxconv.errors import Failed, Refused
from jaxconv.train import local_arrays, metrics
from jaxconv.train.checkpoint import Checkpoints
from jaxconv.train.workdir import Workdir, remove

_spec = importlib.util.spec_from_file_location(
    "object_store", Path(__file__).with_name("object_store.py")
)
object_store = importlib.util.module_from_spec(_spec)
sys.modules["object_store"] = object_store
_spec.loader.exec_module(object_store)


@pytest.fixture(scope="module")
def served():
    """One server: TensorStore asks for its address once in a process."""
    object_store.register()
    with object_store.serving() as (objects, environment):
        yield objects, environment


@pytest.fixture
def objects(served, tmp_path, monkeypatch):
    objects, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAXCONV_SCRATCH", str(tmp_path / "scratch"))
    objects.content.clear()
    return objects


def stored(objects, prefix=""):
    return {
        name.removeprefix(prefix): objects.content[name][0].decode()
        for name in objects.names(prefix)
    }


# ---------------------------------------------------------------- workdirs


def test_a_workdir_goes_to_the_bucket_and_comes_back_on_another_machine(
    objects, tmp_path, monkeypatch
):
    with Workdir("gs://bucket/runs/a") as workdir:
        workdir.write_identity({"recipe": "sft"}, preset="tiny")
        (workdir.artifacts / "tokens").mkdir(parents=True)
        (workdir.artifacts / "tokens" / "t.bin").write_bytes(b"12")
        (workdir.artifacts / "rows").mkdir()
        (workdir.artifacts / "rows" / "made_anew").write_bytes(b"1")
        (workdir.path / ".half").write_bytes(b"1")
        with metrics.MetricsWriter(workdir, "sft") as writer:
            writer.write(1, {"loss": 1.0})
        workdir.push()
    names = [n for n in objects.names() if "/tensorboard/" not in n]
    assert names == [
        f"bucket/runs/a/{n}" for n in ("artifacts/tokens/t.bin", "config.json", "metrics.jsonl")
    ]
    monkeypatch.setenv("JAXCONV_SCRATCH", str(tmp_path / "another machine"))
    with Workdir("gs://bucket/runs/a/") as workdir:
        assert workdir.path.is_relative_to(tmp_path / "another machine")
        assert workdir.read_identity()["recipe"] == "sft"
        assert [r["step"] for r in metrics.read(workdir)] == [1]
        assert (workdir.artifacts / "tokens" / "t.bin").read_bytes() == b"12"
        assert str(workdir) == "gs://bucket/runs/a"


def test_only_what_changed_is_sent_and_what_went_goes(objects):
    with Workdir("gs://bucket/run") as workdir:
        for name, text in (("config.json", "{}"), ("a", "1"), ("b", "1")):
            (workdir.path / name).write_text(text)
        workdir.push()
        writes = objects.writes
        workdir.push()
        assert objects.writes == writes
        (workdir.path / "a").write_text("22")
        (workdir.path / "b").unlink()
        (workdir.path / "report.json").write_text("{}")
        (workdir.path / "z").write_text("3")
        workdir.push()
        assert objects.writes == writes + 3
        expected = {"config.json": "{}", "a": "22", "z": "3", "report.json": "{}"}
        assert stored(objects, "bucket/run/") == expected
        # The report tells that the rest is there, so it comes after it.
        assert objects.content["bucket/run/report.json"][1] == objects.writes


def test_the_bucket_has_the_truth(objects):
    """What a process had not sent before it was killed is gone, as its checkpoints are."""
    with Workdir("gs://bucket/run") as workdir:
        for name in ("config.json", "metrics.jsonl"):
            (workdir.path / name).write_text("{}\n")
        workdir.push()
        (workdir.path / "metrics.jsonl").write_text("{}\n{}\n")
        (workdir.path / "unsent").write_text("1")
    with Workdir("gs://bucket/run") as workdir:
        assert (workdir.path / "metrics.jsonl").read_text() == "{}\n"
        assert not (workdir.path / "unsent").exists()


def test_a_reader_has_a_copy_of_its_own_and_sends_nothing(objects):
    with Workdir("gs://bucket/run") as workdir:
        (workdir.path / "config.json").write_text("{}")
        workdir.push()
        reader = Workdir("gs://bucket/run", writer=False, process=1)
        assert reader.path != workdir.path
        (reader.path / "own").write_text("1")
        reader.push()
        assert stored(objects, "bucket/run/") == {"config.json": "{}"}
        (workdir.path / "more").write_text("1")
        workdir.push()
        reader.pull()
        assert (reader.path / "more").read_text() == "1"


def exported(workdir, **files):
    workdir.export.mkdir(exist_ok=True)
    for name, content in files.items():
        (workdir.export / name.replace("_", ".")).write_bytes(content)


def test_the_export_comes_when_it_is_read_and_not_before(objects, tmp_path, monkeypatch):
    with Workdir("gs://bucket/run") as workdir:
        (workdir.path / "config.json").write_text("{}")
        reader = Workdir("gs://bucket/run", writer=False, process=1)
        exported(workdir, config_json=b"{}", model_safetensors=b"1", value_safetensors=b"2")
        workdir.push()
        reader.pull()
        assert (reader.path / "config.json").exists() and not reader.export.exists()
        reader.fetch_export()
        names = ["config.json", "model.safetensors", "value.safetensors"]
        assert sorted(file.name for file in reader.export.iterdir()) == names
        reader.pull()
        assert (reader.export / "model.safetensors").read_bytes() == b"1"
        # Who finds the config of a model finds its weights, however early the sending was ended.
        sent = sorted(names, key=lambda name: objects.content[f"bucket/run/export/{name}"][1])
        assert sent[-1] == "config.json"
    # A finished run on another machine: nothing is copied, and nothing removed from the bucket.
    monkeypatch.setenv("JAXCONV_SCRATCH", str(tmp_path / "another machine"))
    with Workdir("gs://bucket/run") as workdir:
        workdir.push()
        assert not workdir.export.exists() and len(objects.names("bucket/run/export/")) == 3


def test_of_two_exports_the_one_in_the_bucket_is_true_until_another_is_made(objects):
    with Workdir("gs://bucket/run") as workdir:
        (workdir.path / "config.json").write_text("{}")
        exported(workdir, model_safetensors=b"1", more_safetensors=b"1")
        workdir.push()
        exported(workdir, model_safetensors=b"unsent")
    with Workdir("gs://bucket/run") as workdir:
        assert not (workdir.export / "model.safetensors").exists()
        workdir.fetch_export()
        assert (workdir.export / "model.safetensors").read_bytes() == b"1"
        exported(workdir, model_safetensors=b"22")
        (workdir.export / "more.safetensors").unlink()
        workdir.fetch_export()
        assert (workdir.export / "model.safetensors").read_bytes() == b"22"


def test_an_export_that_the_disk_has_no_room_for_is_refused(objects, monkeypatch):
    with Workdir("gs://bucket/run") as workdir:
        (workdir.path / "config.json").write_text("{}")
        exported(workdir, model_safetensors=bytes(2000))
        workdir.push()
        reader = Workdir("gs://bucket/run", writer=False, process=1)
        free = collections.namedtuple("free", "free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: free(1999))
        says = r"the exported model takes .* GB and .*; JAXCONV_SCRATCH may name"
        with pytest.raises(Refused, match=says):
            reader.fetch_export()
        with pytest.raises(Refused, match=says):
            reader.refuse_small_scratch(2000)
        workdir.refuse_small_scratch(2000)  # it is here already
    Workdir("local", writer=False).refuse_small_scratch(2000)


def test_foreign_objects_are_refused_and_not_removed(objects):
    objects.put("bucket/photos/cat.jpg", b"1")
    for use in (Workdir, remove):
        with pytest.raises(Refused, match=r"--workdir=gs://bucket/photos has files but no config"):
            use("gs://bucket/photos")
    assert objects.names() == ["bucket/photos/cat.jpg"]


def test_overwriting_removes_the_whole_run_and_nothing_else(objects):
    for name in ("run/config.json", "run/checkpoints/sft/1/x", "run2/config.json"):
        objects.put(f"bucket/{name}", b"{}")
    remove("gs://bucket/run")
    assert objects.names() == ["bucket/run2/config.json"]
    with Workdir("gs://bucket/run") as workdir:
        assert workdir.read_identity() is None


def test_checkpoints_are_written_to_the_bucket_itself(objects):
    with Workdir("gs://bucket/run") as workdir:
        folder = workdir.checkpoints / "count"
        assert not folder.exists()
        with Checkpoints(folder, keep=2) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, {"w": jnp.arange(4.0) + step}, {"step": step})
            assert checkpoints.steps() == [2, 3]
        assert "bucket/run/checkpoints/count/3/commit_success.txt" in objects.names()
        # A kill in the middle of a save leaves a step without the file that says it is whole.
        for name in objects.names("bucket/run/checkpoints/count/3/"):
            objects.put(name.replace("/3/", "/4/"), objects.content[name][0])
        del objects.content["bucket/run/checkpoints/count/4/commit_success.txt"]
        with Checkpoints(folder, keep=2) as checkpoints:
            assert checkpoints.latest() == 3
            arrays, host = checkpoints.restore(3, {"w": np.zeros(4, np.float32)})
            np.testing.assert_array_equal(arrays["w"], np.arange(4.0) + 3)
            assert host == {"step": 3}
            checkpoints.drop_after(2)
            assert checkpoints.steps() == [2]
        workdir.push()
        assert not workdir.path.joinpath("checkpoints").exists()


def test_arrays_of_one_process_are_kept_in_the_bucket(objects):
    path = epath.Path("gs://bucket/run/checkpoints/games/1.0")
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": jnp.float32(2.5)}
    assert not local_arrays.fits(path, arrays)
    local_arrays.save(path, arrays)
    assert objects.names() == ["bucket/run/checkpoints/games/1.0"]
    assert local_arrays.fits(path, arrays)
    found = local_arrays.load(path, arrays)
    np.testing.assert_array_equal(found["a"], arrays["a"])
    assert found["b"] == 2.5
    assert not local_arrays.fits(path, {"a": arrays["a"]})


# ---------------------------------------------------------------- data


def chat(i):
    messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]
    return {"messages": messages}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def quarantine(tmp_path):
    return Quarantine(tmp_path / "work" / "quarantine.jsonl")


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz"])
def test_data_are_read_from_the_bucket_and_bad_rows_named_as_there(objects, quarantine, name):
    content = lines(chat(0), {"messages": [{"role": "user"}]}, chat(2))
    objects.put(f"bucket/data/{name}", gzip.compress(content) if "gz" in name else content)
    url = f"gs://bucket/data/{name}"
    source = open_source(epath.Path(url), "auto", quarantine)
    assert [record.id for record in source] == [f"{name}:1", f"{name}:3"]
    [bad] = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert (bad["file"], bad["line"]) == (url, 2)
    assert "messages[0]" in json.dumps(bad)


def test_a_folder_in_the_bucket_is_a_folder(objects, quarantine):
    for name in ("b.jsonl", "deep/a.jsonl", "notes.txt"):
        objects.put(f"bucket/data/{name}", lines(chat(name)))
    objects.put("bucket/data2/c.jsonl", lines(chat("other")))
    source = open_source("gs://bucket/data", "openai", quarantine)
    assert [record.messages[0].content for record in source] == ["b.jsonl?", "deep/a.jsonl?"]
    # Gone there, gone here.
    del objects.content["bucket/data/b.jsonl"]
    assert len(open_source("gs://bucket/data", "openai", quarantine)) == 1


def test_what_did_not_change_is_fetched_once(objects, tmp_path, monkeypatch):
    objects.put("bucket/x.jsonl", b"1\n")
    place = storage.fetch("gs://bucket/x.jsonl", tmp_path)
    first = place.stat().st_ino
    assert storage.fetch("gs://bucket/x.jsonl", tmp_path).stat().st_ino == first
    objects.put("bucket/x.jsonl", b"2\n")
    assert storage.fetch("gs://bucket/x.jsonl", tmp_path).read_bytes() == b"2\n"


@pytest.mark.parametrize(
    "url, content, why",
    [
        ("gs://bucket/none.jsonl", None, "gs://bucket/none.jsonl is not there"),
        ("gs://bucket/x.txt", b"1", "gs://bucket/x.txt: its name must end with"),
        ("gs://bucket/x.jsonl.gz", b"1", "gs://bucket/x.jsonl.gz is not a gzip file"),
        ("gs://bucket/x.json", b"{", "gs://bucket/x.json is not JSON"),
        ("gs://bucket/x.jsonl", b"{}\n", r"first gs://bucket/x.jsonl, line 1, .*no format"),
        ("nowhere://x.jsonl", None, "no such kind of store; it may be gs://… or s3://…"),
    ],
)
def test_refusals_name_the_url(objects, quarantine, url, content, why):
    if content is not None:
        objects.put(url.removeprefix("gs://"), content)
    with pytest.raises(Refused, match=why) as refused:
        open_source(url, "auto", quarantine)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url, package", [("gs://b/x", "gcsfs"), ("s3://b/x", "s3fs")])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, url, package):
    def missing(url):
        raise ImportError("install it")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    for use in (lambda: storage.fetch(url, tmp_path), lambda: Workdir(url)):
        with pytest.raises(Refused) as refused:
            use()
        assert str(refused.value) == f"{url} needs {package}; the extra jaxconv[cloud] has it"


def test_a_list_that_cannot_be_read_costs_no_copy(objects, monkeypatch):
    with Workdir("gs://bucket/run") as workdir:
        (workdir.path / "config.json").write_text("{}")
        workdir.push()
        ls = object_store.Bucket.ls

        def broken(self, path, **options):
            raise OSError("connection lost")

        monkeypatch.setattr(object_store.Bucket, "ls", broken)
        with pytest.raises(Failed, match=r"cannot reach gs://bucket/run: .*could not be listed"):
            workdir.pull()
        monkeypatch.setattr(object_store.Bucket, "ls", ls)
        assert (workdir.path / "config.json").exists()


def test_a_store_that_cannot_be_reached_is_a_failure_in_one_line(objects, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    with pytest.raises(Failed, match=r"^cannot reach gs://bucket/x: .*refused") as failed:
        storage.fetch("gs://bucket/x", tmp_path)
    assert "\n" not in str(failed.value)
