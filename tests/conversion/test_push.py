"""`push`: what goes to the hub, by the hub's own client, and what must not."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from foveate.conversion.push import push
from foveate.errors import FoveateError
from foveate.hub_cards.card import PLACE, write_card
from foveate.hub_cards.manifest import MANIFEST_FILE, WEIGHTS, write_manifest

from ..helpers.fake_hub import fake_hub, online_environment


TOKEN = "hf_" + 34 * "a"

#: The command itself, the hub's client, and what came back: in a process that may reach a hub, this one.
ROUND_TRIP = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from huggingface_hub import snapshot_download
    from typer.testing import CliRunner
    from foveate.cli import app
    from foveate.conversion.verify import verify

    folder, back = sys.argv[1:]
    for words in (["--dry-run"], ["--private"]):
        found = CliRunner().invoke(app, ["push", folder, "user/tiny", *words])
        print(found.output)
        assert found.exit_code == 0, found.exception
    snapshot_download("user/tiny", local_dir=back)
    found = verify(back, full=True)
    assert found.as_written and not found.not_whole, found
    """
)


@pytest.fixture
def hub():
    with fake_hub() as running:
        yield running


@pytest.fixture
def online(hub, tmp_path) -> dict[str, str]:
    return online_environment(hub, tmp_path / "hf", TOKEN)


def test_round_trip(hub, online, copy, tmp_path):
    """What comes back from the hub is the checkpoint, as written, with a card that names its place."""
    (copy / "runs").mkdir()
    (copy / "runs" / "events.out.tfevents.0.my-machine").write_text("curves")
    script = [sys.executable, "-c", ROUND_TRIP, str(copy), str(tmp_path / "back")]
    found = subprocess.run(script, capture_output=True, text=True, env=online, cwd=tmp_path)
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]
    assert f"would go to {hub.endpoint}/user/tiny." in found.stdout
    assert f"Pushed {len(hub.files)} files" in found.stdout and "Left out: runs" in found.stdout
    [asked] = hub.created
    assert (asked["organization"], asked["name"]) == ("user", "tiny"), "the dry run has made nothing"
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert sum("/commit/" in request for request in hub.requests) == 1
    assert hub.authorizations >= {f"Bearer {TOKEN}"}

    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert hub.files.keys() == {name for name in files if not name.startswith("runs/")}
    changed = {name for name, content in hub.files.items() if (copy / name).read_bytes() != content}
    assert changed == {"README.md"}, "the list has all hashes of so small a checkpoint already"
    card = hub.files["README.md"].decode()
    assert 'from_pretrained("user/tiny"' in card and PLACE not in card
    assert PLACE in (copy / "README.md").read_text(), "the folder stays as it is"


def test_a_hub_that_refuses(hub, online, copy):
    hub.status = 403
    words = [sys.executable, "-m", "foveate", "push", str(copy), "user/tiny"]
    found = subprocess.run(words, capture_output=True, text=True, env=online)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith(f"foveate: user/tiny can't be pushed to {hub.endpoint}")
    assert "hf auth login" in found.stderr and found.stderr.count("\n") == 1


def refused(folder, **options) -> str:
    """What is said; no request is made, for the endpoint is nowhere."""
    with pytest.raises(FoveateError) as caught:
        push(folder, "user/tiny", api=HfApi(endpoint="http://127.0.0.1:9"), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "scaler.pkl", "last.ckpt", "old.PTH"])
def test_pickles_are_refused(name, copy):
    (copy / name).write_bytes(b"")
    for options in ({}, {"force": True}, {"dry_run": True}):
        assert f"{name} is a pickle or an archive" in refused(copy, **options)


@pytest.mark.parametrize("name", ["merges.txt", "spiece.model", "extra.json", "model.safetensors", "LICENSE"])
def test_pickles_under_another_name_are_refused(name, copy):
    (copy / name).write_bytes(pickle.dumps({"a": 1}))
    assert f"{name} is a pickle or an archive" in refused(copy, force=True)
    torch.save({}, copy / name)
    assert f"{name} is a pickle or an archive" in refused(copy, force=True)


def test_links_out_of_the_folder_are_refused(copy, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (copy / "secret.json").symlink_to(tmp_path / "secret.json")
    assert "secret.json is a link out of the folder" in refused(copy, force=True)
    (copy / "secret.json").unlink()
    (copy / "folder").symlink_to(tmp_path)
    assert "folder is a link out of the folder" in refused(copy, force=True)
    (copy / "folder").unlink()
    (copy / "nowhere.json").symlink_to(copy / "nothing.json")
    assert "nowhere.json is no file" in refused(copy, force=True)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"_name_or_path": "/home/me/llava"}),
        ("config.json", {"text_config": {"_name_or_path": "~/llava"}}),
        ("tokenizer_config.json", {"name_or_path": "C:\\models\\llava"}),
        ("adapter/adapter_config.json", {"base_model_name_or_path": "/data/base"}),
        ("processor_config.json", {"anything": ["/home/me/x.json"]}),
        ("training_recipe.yaml", {"stages": {"1": {"data": "/home/me/llava.json"}}}),
    ],
)
def test_paths_of_this_machine_are_refused(file, content, copy):
    (copy / file).parent.mkdir(exist_ok=True)
    before = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (copy / file).write_text(json.dumps({**before, **content}))
    said = refused(copy, force=True)
    assert f"{file} has a path of this machine in it" in said
    assert "/home/me" in said or "llava" in said or "/data/base" in said


def test_what_only_looks_like_a_path_is_not(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"_name_or_path": "org/base", "slash": "/", "tag": "</s>", "words": "and/or", "think": "/no_think"}
    (copy / "config.json").write_text(json.dumps(config))
    write_manifest(copy, "org/base")
    assert push(copy, "user/tiny", dry_run=True).verification.as_written


@pytest.mark.parametrize("file", ["README.md", "config.json", "chat_template.jinja", "modeling_llava_baseline.py"])
def test_tokens_are_refused(file, copy):
    with (copy / file).open("a") as written:
        written.write(f"# {TOKEN}\n")
    said = refused(copy, force=True)
    assert f"{file} has a token of the hub in it" in said and TOKEN not in said


def test_tokens_in_weights_files_are_refused(copy):
    [weights] = copy.glob(f"*{WEIGHTS}")
    save_file(load_file(weights), weights, metadata={"format": "pt", "note": TOKEN})
    assert f"{weights.name} has a token of the hub in it" in refused(copy, force=True)


@pytest.mark.parametrize("name", ["notes.md", "picture.png", ".env", "data/train.jsonl", "run.sh"])
def test_what_is_no_part_of_a_checkpoint_is_refused(name, copy):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("mine")
    assert f"{name} is no part of a checkpoint" in refused(copy, force=True)


def test_what_is_not_as_written_has_to_be_forced(copy, written, tmp_path):
    (copy / "extra.json").write_text("{}")
    assert "not as foveate" in refused(copy)
    assert "extra.json" in push(copy, "user/tiny", dry_run=True, force=True).sizes
    saved = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(written).save_pretrained(saved)
    AutoProcessor.from_pretrained(written).save_pretrained(saved)
    assert "saved by Transformers" in refused(saved)
    assert "has no card" in refused(saved, force=True)
    write_card(saved, "org/base")
    upload = push(saved, "user/tiny", dry_run=True, force=True)
    assert not upload.verification.as_written and MANIFEST_FILE not in upload.sizes


def test_damaged_weights_are_refused(copy):
    [weights] = copy.glob(f"*{WEIGHTS}")
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "truncated" in refused(copy, force=True)


def test_a_checkpoint_in_the_adapter_layout_goes_where_its_base_has_a_name(copy):
    for path in (*copy.glob(f"*{WEIGHTS}"), copy / "model.safetensors.index.json"):
        path.unlink()
    config = json.loads((copy / "config.json").read_text())
    for base in ("org/base", "/data/base"):
        (copy / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        write_card(copy, "org/base")
        write_manifest(copy, "org/base")
        assert "loading reads the weights of\n`org/base` as well" in (copy / "README.md").read_text()
        if base == "org/base":
            assert push(copy, "user/tiny", dry_run=True).verification.as_written
    assert "(base_model_name_or_path: /data/base)" in refused(copy)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "", "user/", "https://huggingface.co/user/tiny", "us er/tiny"])
def test_a_name_that_is_none(name, copy):
    with pytest.raises(FoveateError, match="write user/name"):
        push(copy, name, dry_run=True)


def test_a_dry_run_lists_every_file_with_its_size(copy):
    upload = push(copy, "user/tiny", dry_run=True, api=HfApi(endpoint="http://127.0.0.1:9"))
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert upload.sizes == {path.relative_to(copy).as_posix(): path.stat().st_size for path in files}
    assert upload.url == "http://127.0.0.1:9/user/tiny"
