"""`upgrade`: a checkpoint of foveate 0.1.0 gets this version's code, and whatever else is in it stays."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from foveate.cli import app
from foveate.conversion import atomic_folder
from foveate.conversion.bundle import bundle_files
from foveate.conversion.push import push
from foveate.conversion.upgrade import upgrade
from foveate.conversion.verify import verify
from foveate.errors import FoveateError
from foveate.hub_cards import manifest as manifest_module
from foveate.hub_cards.card import PLACE, read_facts, render_card, write_card
from foveate.hub_cards.manifest import MANIFEST_FILE, RECORDS, WEIGHTS, write_manifest
from foveate.registry import pairs_of

from ..helpers.fake_hub import fake_hub, online_environment
from ..helpers.killed import run_and_kill
from ..helpers.released_checkpoints import assemble


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

NEW_CODE = bundle_files(pairs_of("sample")[0].config_class)
OF_FOVEATE = "Converted by foveate; it needs nothing but Transformers"
OLD_SENTENCE, NEW_SENTENCE = f"{OF_FOVEATE} (4.57.6, or 5.16 and newer).", f"{OF_FOVEATE} (4.57.6, or 5.16 and newer;"


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return assemble("sample-llava", tmp_path_factory.mktemp("released") / "tiny")


@pytest.fixture
def old(released, tmp_path) -> Path:
    """A checkpoint of 0.1.0, alone in a folder of its own."""
    return shutil.copytree(released, tmp_path / "place" / "tiny")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def refused(*arguments, **options) -> str:
    """What is said; nothing was changed, and nothing was left beside the folder."""
    folder = Path(arguments[0])
    before, beside = contents(folder), sorted(os.listdir(folder.parent))
    with pytest.raises(FoveateError) as caught:
        upgrade(*arguments, **options)
    assert contents(folder) == before and sorted(os.listdir(folder.parent)) == beside
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWhatIsWritten:
    def test_code_card_and_list_and_nothing_else(self, released, old):
        done = upgrade(old)
        before, after = contents(released), contents(old)
        assert {name: after[name] for name in after if name.endswith(".py")} == NEW_CODE
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        assert changed == {*done.written, *done.removed} and set(done.removed).isdisjoint(after)
        assert {name for name in changed if not name.endswith(".py")} == {"README.md", MANIFEST_FILE}
        assert os.listdir(old.parent) == [old.name], "nothing is left beside it"
        assert verify(old, full=True).as_written

    def test_weights_keep_their_place_on_the_disk(self, old):
        before = {path.name: path.stat() for path in old.glob(f"*{WEIGHTS}")}
        upgrade(old)
        after = {path.name: path.stat() for path in old.glob(f"*{WEIGHTS}")}
        assert before.keys() == after.keys()
        for name, found in after.items():
            assert (found.st_ino, found.st_mtime_ns, found.st_nlink) == (
                before[name].st_ino,
                before[name].st_mtime_ns,
                1,
            )

    def test_hashes_of_weights_are_taken_over_where_size_and_samples_agree(self, old, monkeypatch):
        def sha256_of(path: Path) -> str:
            whole.append(path)
            return read_whole(path)

        files = json.loads((old / MANIFEST_FILE).read_text())["files"]
        whole: list[Path] = []
        read_whole = manifest_module.sha256_of
        monkeypatch.setattr(manifest_module, "sha256_of", sha256_of)
        upgrade(old)
        assert whole and not [path for path in whole if path.suffix == WEIGHTS]
        after = json.loads((old / MANIFEST_FILE).read_text())["files"]
        weights = [name for name in files if name.endswith(WEIGHTS)]
        assert [after[name] for name in weights] == [files[name] for name in weights]

    def test_modes_stay(self, old):
        (old / "README.md").chmod(0o640)
        old.chmod(0o750)
        upgrade(old)
        assert (old / "README.md").stat().st_mode & 0o777 == 0o640 and old.stat().st_mode & 0o777 == 0o750

    def test_adapters_and_records_stay(self, old):
        (old / "adapter").mkdir()
        for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
            (old / name).write_text("{}")
        write_manifest(old, "base")
        beside = {"training_recipe.yaml": "stages: {}", "training_log.json": "[]", "LICENSE": "mine"}
        beside |= {".git/HEAD": "ref", "runs/curve": "1"}
        for name, text in beside.items():
            (old / name).parent.mkdir(exist_ok=True)
            (old / name).write_text(text)
        upgrade(old)
        assert 'subfolder="adapter"' in (old / "README.md").read_text(), "a fact that the card did not know yet"
        assert (old / "adapter/adapter_model.safetensors").read_text() == "{}"
        assert {name: (old / name).read_text() for name in beside} == beside
        assert verify(old).as_written

    def test_references_to_code_are_those_of_this_version(self, old):
        for name in ("config.json", "processor_config.json"):
            content = json.loads((old / name).read_text())
            content["auto_map"] = dict.fromkeys(content["auto_map"], "old_module.OldName")
            content["mine"] = "ä"
            (old / name).write_text(json.dumps(content, ensure_ascii=False))
        write_manifest(old, "base")
        config = json.loads((old / "config.json").read_text())
        upgrade(old)
        expected = pairs_of("sample")[0].config_class.remote_code_map()
        assert json.loads((old / "config.json").read_text()) == {**config, "auto_map": expected}
        processor = json.loads((old / "processor_config.json").read_text())
        assert processor["auto_map"] == {"AutoProcessor": expected["AutoProcessor"]}
        assert '"ä"' in (old / "config.json").read_text()

    def test_code_that_no_longer_belongs_is_removed(self, old):
        (old / "once_ours.py").write_text("VALUE = 1\n")
        write_manifest(old, "base")
        assert "once_ours.py" in upgrade(old).removed
        assert not (old / "once_ours.py").exists() and verify(old).as_written

    def test_code_that_was_edited_is_replaced_and_named(self, old):
        with (old / "compressed_model.py").open("a") as file:
            file.write("import os\n")
        assert upgrade(old).edited == ("compressed_model.py",)
        assert verify(old).as_written

    def test_a_second_time_nothing_is_written(self, old):
        upgrade(old)
        inode, before = old.stat().st_ino, contents(old)
        assert not upgrade(old).is_change
        assert old.stat().st_ino == inode and contents(old) == before


class TestTheCard:
    def test_nobody_edited_is_as_this_version_writes_it(self, old):
        upgrade(old)
        card = (old / "README.md").read_text()
        assert card == render_card(read_facts(old)) and NEW_SENTENCE in card

    def test_ones_own_words_stay(self, old):
        """Paragraphs and metadata added in many places, a sentence edited, a section deleted, results of an evaluation:
        with this version's facts around them, as if it had written the card and the same had been done to it."""

        def edit_card(card: str) -> str:
            for before, after in (
                ("library_name: transformers\n", "language: de\nlibrary_name: transformers\n"),
                ("# llava with", "# My model, a llava with"),
                ("## What it saves\n", "I made it for my dog.\n\n## What it saves\n"),
                ("account says nothing of measured time.", "account says nothing of measured time. On my laptop: 3 s."),
                ("Accuracy: not evaluated.\n", "| task | metric |\n| --- | --- |\n| dogs | 99 % |\n"),
                ("By the pipeline:\n", "By the pipeline, which I like:\n"),
                ("Compression settings (", "Compression settings, which I like ("),
                ("- Details that", "- It knows no cats.\n- Details that"),
            ):
                assert before in card
                card = card.replace(before, after, 1)
            start, end = card.index("In four bits, with"), card.index("With a LoRA adapter")
            return card[:start] + card[end:] + "\n## Thanks\n\nTo my dog.\n"

        new = render_card(read_facts(old))
        (old / "README.md").write_text(edit_card((old / "README.md").read_text()))
        done = upgrade(old)
        assert (old / "README.md").read_text() == edit_card(new)
        assert done.kept_passages == 0

    def test_a_passage_that_both_changed_stays_and_is_counted(self, old):
        edit(old / "README.md", OLD_SENTENCE, "It runs on my laptop.")
        assert upgrade(old).kept_passages == 1
        card = (old / "README.md").read_text()
        assert "It runs on my laptop." in card and NEW_SENTENCE not in card
        assert not upgrade(old).is_change, "the list knows now what this version wrote"

    def test_license_and_base_stay(self, old):
        edit(old / "README.md", "library_name:", "base_model: org/base\nlicense: mit\nlibrary_name:")
        edit(old / "README.md", "# llava with", "# org/base with")
        upgrade(old)
        card = (old / "README.md").read_text()
        assert "\nbase_model: org/base\n" in card and "\nlicense: mit\n" in card and "# org/base with" in card

    def test_one_that_is_not_foveates_is_left_alone(self, old):
        (old / "README.md").write_text("# Mine\n")
        upgrade(old)
        assert (old / "README.md").read_text() == "# Mine\n"

    def test_where_there_is_none_none_is_written(self, old):
        (old / "README.md").unlink()
        upgrade(old)
        assert not (old / "README.md").exists() and verify(old).as_written

    def test_later_ones_are_known_by_the_list(self, old, monkeypatch):
        """A card that yet another version wrote, whose lines the list has: no earlier one is made up."""
        monkeypatch.setattr("foveate.hub_cards.card.TESTED_TRANSFORMERS", ("4.57.6", "9.99.0"))
        write_card(old)
        edit(old / "README.md", "## Use\n", "Mine.\n\n## Use\n")
        monkeypatch.undo()
        monkeypatch.setattr("foveate.conversion.upgrade.released_card", None)
        assert "up to 9.99" in (old / "README.md").read_text()
        upgrade(old)
        new = render_card(read_facts(old))
        assert (old / "README.md").read_text() == new.replace("## Use\n", "Mine.\n\n## Use\n", 1)


class TestWhatIsRefused:
    def test_changed_weights(self, old):
        weights = next(old.glob(f"*{WEIGHTS}"))
        flip_last_byte(weights)
        assert f"changed: {weights.name}" in refused(old)
        upgrade(old, force=True)
        assert verify(old, full=True).as_written, "listed as they are"

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
    def test_a_changed_file(self, name, old):
        (old / name).write_text((old / name).read_text() + "\n")
        assert f"changed: {name}" in refused(old)
        upgrade(old, force=True)
        assert verify(old).as_written

    def test_a_missing_file_and_one_that_is_not_listed(self, old):
        (old / "chat_template.jinja").rename(old / "chat.jinja")
        said = refused(old)
        assert "missing: chat_template.jinja" in said and "not listed: chat.jinja" in said and "--force" in said

    @pytest.mark.parametrize("name", ["extra.py", "folder/extra.py", "tested_versions.py"])
    def test_code_that_is_not_listed(self, name, old):
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text("import os\n")
        assert f"code that foveate did not write: {name}" in refused(old)
        done = upgrade(old, force=True)
        assert done.left == (() if name in NEW_CODE else (name,))
        assert verify(old).as_written == (name in NEW_CODE), "verify goes on saying it"

    def test_one_that_a_newer_version_wrote(self, old):
        content = json.loads((old / MANIFEST_FILE).read_text())
        (old / MANIFEST_FILE).write_text(json.dumps({**content, "foveate": "99.0"}))
        assert "written by foveate 99.0" in refused(old) and "pip install --upgrade foveate" in refused(old, force=True)
        assert not verify(old).upgrade_due and "a newer version, foveate 99.0" in verify(old).verdict

    def test_another_folder(self, old, tmp_path):
        config = json.loads((old / "config.json").read_text())
        for fields in ({"model_type": "llava"}, {"compression": {"method": "sample", "nonsense": 1}}):
            (old / "config.json").write_text(json.dumps({**config, **fields}))
            said = refused(old)
            assert "model_type is 'llava'" in said or f"{old}'s config can't be read: Unknown compression" in said
        (old / "config.json").unlink()
        assert "has no config.json" in refused(old)
        (old / MANIFEST_FILE).write_text("{}")
        with pytest.raises(FoveateError, match="neither a folder nor a name"):
            upgrade(tmp_path / "nowhere")
        with pytest.raises(FoveateError, match="ships with foveate"):
            upgrade("lab:tiny-llava")

    def test_options_that_do_not_go_together(self, old, tmp_path):
        assert "give one of them" in refused(old, tmp_path / "out", push=True)
        assert "`foveate push" in refused(old, push=True)
        with pytest.raises(FoveateError, match="--out OUT"):
            upgrade("user/tiny")
        assert "exists already" in refused(old, old.parent)

    def test_a_folder_that_cannot_be_replaced(self, old, monkeypatch, tmp_path):
        monkeypatch.chdir(old)
        assert "you are in it" in refused(old)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os.path, "ismount", lambda path: True)
        assert "is where a file system is mounted" in refused(old)
        monkeypatch.undo()
        cache = tmp_path / "models--user--tiny"
        (cache / "blobs").mkdir(parents=True)
        (cache / "snapshots").mkdir()
        shutil.move(old, cache / "snapshots" / "c0ffee")
        assert "cache's copy" in refused(cache / "snapshots" / "c0ffee")

    def test_a_full_disk(self, old, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("foveate.conversion.upgrade.write_anew", fail)
        assert "No space left" in refused(old)


class TestWhereItLies:
    def test_a_copy_leaves_the_other_as_it_is(self, old, tmp_path):
        before = contents(old)
        (old / ".git").mkdir()
        (old / ".git" / "HEAD").write_text("ref")
        done = upgrade(old, tmp_path / "new" / "copy")
        assert done.place == str(tmp_path / "new" / "copy") and verify(done.place, full=True).as_written
        assert {name: content for name, content in contents(old).items() if name != ".git/HEAD"} == before
        same = next(old.glob(f"*{WEIGHTS}"))
        assert not same.samefile(Path(done.place) / same.name) and not (Path(done.place) / ".git").exists()

    def test_a_link_to_it_stays_a_link(self, old, tmp_path):
        (tmp_path / "link").symlink_to(old)
        upgrade(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and verify(old).as_written

    def test_links_in_it_stay_links(self, old, tmp_path):
        weights = next(old.glob(f"*{WEIGHTS}"))
        shutil.move(weights, tmp_path / "blob")
        weights.symlink_to(os.path.relpath(tmp_path / "blob", old))
        upgrade(old)
        assert weights.is_symlink() and verify(old, full=True).as_written

    def test_without_hard_links(self, old, monkeypatch):
        def fail(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", fail)
        upgrade(old)
        assert verify(old, full=True).as_written

    def test_what_transformers_saved(self, old, tmp_path):
        """Has no list; its code is what its `auto_map` leads to. It gets a list of what is there."""
        upgrade(old)
        saved = tmp_path / "saved"
        AutoModelForImageTextToText.from_pretrained(old).save_pretrained(saved)
        AutoProcessor.from_pretrained(old).save_pretrained(saved)
        with (saved / "configuration_sequence.py").open("a") as file:
            file.write("\nfrom .once_ours import VALUE\n")
        (saved / "once_ours.py").write_text("VALUE = 1\n")
        assert "`foveate upgrade" in verify(saved).verdict
        (saved / "own.py").write_text("VALUE = 1\n")
        assert "code that foveate did not write: own.py" in refused(saved)
        (saved / "own.py").unlink()
        done = upgrade(saved)
        assert done.before is None and done.removed == ("once_ours.py",)
        assert verify(saved, full=True).as_written and not (saved / "README.md").exists()

    def test_in_the_adapter_layout(self, old):
        for path in (*old.glob(f"*{WEIGHTS}"), old / "model.safetensors.index.json"):
            path.unlink()
        config = json.loads((old / "config.json").read_text())
        (old / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
        write_manifest(old, "org/base")
        upgrade(old)
        assert json.loads((old / "config.json").read_text())["base_model_name_or_path"] == "org/base"
        assert verify(old).as_written


class TestKilled:
    """At every step of it, in a fork of this process; what is there afterwards is whole."""

    @pytest.mark.parametrize("at_once", [True, False])
    def test_leaves_the_old_or_the_new_and_what_the_next_one_clears_up(self, at_once, released, tmp_path, monkeypatch):
        if at_once and sys.platform != "linux":
            pytest.skip("two folders change places at once on Linux alone")
        if not at_once:
            monkeypatch.setattr(atomic_folder, "_exchange", lambda *_: False)
        place = tmp_path / "place"
        before = contents(released)
        shutil.copytree(released, tmp_path / "new" / "tiny")
        upgrade(tmp_path / "new" / "tiny")
        after = contents(tmp_path / "new" / "tiny")
        seen, step, killed = set(), 0, True
        while killed:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(released, place / "tiny")
            killed = run_and_kill(place, step, lambda: upgrade(place / "tiny"))
            left = os.listdir(place)
            beside = [name for name in left if name != "tiny"]
            assert len(beside) <= 1 and all(name.startswith(".tiny.partial-") for name in beside)
            if "tiny" not in left:
                [aside] = beside
                assert not at_once and contents(place / aside / "old") == before, "whole, under another name"
                seen.add("aside")
            else:
                found = contents(place / "tiny")
                assert found in (before, after), f"half of it at step {step}"
                seen.add("old" if found == before else "new")
            upgrade(place / "tiny")
            assert contents(place / "tiny") == after and os.listdir(place) == ["tiny"]
            step += 1
        assert seen == ({"old", "new"} if at_once else {"old", "new", "aside"})
        assert step > 40


class TestOnTheHub:
    #: The command on a repository of a hub on loopback, which a process may reach that is not this one.
    SCRIPT = textwrap.dedent(
        """
        import sys
        from typer.testing import CliRunner
        from foveate.cli import app

        found = CliRunner().invoke(app, ["upgrade", *sys.argv[1:]])
        print(found.output, end="")
        sys.exit(found.exit_code)
        """
    )

    @pytest.fixture
    def hub(self, old):
        with fake_hub() as running:
            running.files = contents(old)
            card = running.files["README.md"].decode().replace(PLACE, "user/tiny")
            running.files["README.md"] = card.replace("## Use\n", "Mine.\n\n## Use\n", 1).encode()
            running.files[".gitattributes"] = b"*.safetensors filter=lfs\n"
            yield running

    def run(self, hub, place, *words):
        environment = online_environment(hub, place / "hf", "hf_" + 34 * "a")
        command = [sys.executable, "-c", self.SCRIPT, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)

    def test_by_one_commit_without_its_weights(self, hub, old, tmp_path):
        before = dict(hub.files)
        found = self.run(hub, tmp_path, "user/tiny", "--push")
        assert found.returncode == 0, found.stdout + found.stderr[-3000:]
        assert f"Upgraded {hub.endpoint}/user/tiny from foveate 0.1.0" in found.stdout
        assert [commit["summary"][:7] for commit in hub.commits] == ["Upgrade"]
        assert not [name for name in hub.requests if "/resolve/" in name and name.endswith(WEIGHTS)]
        assert {name: code for name, code in hub.files.items() if name.endswith(".py")} == NEW_CODE
        changed = {name for name in before.keys() | hub.files.keys() if before.get(name) != hub.files.get(name)}
        assert {name for name in changed if not name.endswith(".py")} == {"README.md", MANIFEST_FILE}
        card = hub.files["README.md"].decode()
        assert "Mine.\n\n## Use\n" in card and NEW_SENTENCE in card and 'from_pretrained("user/tiny"' in card
        assert PLACE not in card
        back = tmp_path / "back"
        for name, content in hub.files.items():
            (back / name).parent.mkdir(parents=True, exist_ok=True)
            (back / name).write_bytes(content)
        assert verify(back, full=True).as_written
        found = self.run(hub, tmp_path, "user/tiny", "--push")
        assert "is up to date" in found.stdout and len(hub.commits) == 1

    def test_into_a_folder(self, hub, tmp_path):
        found = self.run(hub, tmp_path, "user/tiny", "--out", tmp_path / "out")
        assert found.returncode == 0, found.stdout + found.stderr[-3000:]
        assert verify(tmp_path / "out", full=True).as_written and not hub.commits
        assert not (tmp_path / "out" / ".cache").exists()
        assert "Mine.\n\n## Use\n" in (tmp_path / "out" / "README.md").read_text()

    def test_changed_weights_are_found_by_the_hubs_own_hash(self, hub, tmp_path):
        name = next(name for name in hub.files if name.endswith(WEIGHTS))
        hub.files[name] = hub.files[name][:-1] + bytes([hub.files[name][-1] ^ 1])
        found = self.run(hub, tmp_path, "user/tiny", "--push")
        assert found.returncode == 2
        assert f"user/tiny is not upgraded, as it is not what was written (changed: {name})" in found.stdout
        assert not hub.commits
        assert self.run(hub, tmp_path, "user/tiny", "--push", "--force").returncode == 0
        entry = json.loads(hub.files[MANIFEST_FILE])["files"][name]
        assert entry == {"size": len(hub.files[name]), "sha256": hashlib.sha256(hub.files[name]).hexdigest()}

    def test_without_a_list_of_files(self, hub, tmp_path):
        """Weights are listed by the hub's hash, which `verify` compares."""
        del hub.files[MANIFEST_FILE]
        assert self.run(hub, tmp_path, "user/tiny", "--push").returncode == 0
        back = tmp_path / "back"
        for name, content in hub.files.items():
            (back / name).parent.mkdir(parents=True, exist_ok=True)
            (back / name).write_bytes(content)
        assert verify(back).as_written
        weights = next(back.glob(f"*{WEIGHTS}"))
        flip_last_byte(weights)
        assert verify(back).findings == {"changed": (weights.name,)}

    def test_a_hub_that_refuses(self, hub, tmp_path):
        hub.status = 403
        found = self.run(hub, tmp_path, "user/tiny", "--push")
        assert found.returncode == 2 and "user/tiny can't be upgraded" in found.stdout
        found = self.run(hub, tmp_path, "user/other/tiny", "--push")
        assert found.returncode == 2 and "neither a folder nor a name on the hub" in found.stdout


class TestTheCommands:
    def run(self, *words):
        return CliRunner().invoke(app, [str(word) for word in words])

    def test_upgrade_says_what_it_did_and_verify_when_it_is_due(self, old):
        due = self.run("verify", old)
        assert due.exit_code == 3 and f"`foveate upgrade {old}` brings it up to date." in due.output
        found = self.run("upgrade", old)
        assert found.exit_code == 0 and f"Upgraded {old} from foveate 0.1.0" in found.output
        assert MANIFEST_FILE in found.output and "tested_versions.py" in found.output
        assert self.run("verify", old).exit_code == 0
        assert "is up to date" in self.run("upgrade", old).output

    def test_bad_input_is_one_line(self, old):
        (old / "config.json").write_text("{}")
        found = self.run("upgrade", old)
        assert found.exit_code == 2 and found.stderr.startswith("foveate: ") and found.stderr.count("\n") == 1
        assert self.run("verify", old).exit_code == 1

    def test_push_names_it(self, old):
        with pytest.raises(FoveateError, match="bring it up to date with `foveate upgrade"):
            push(old, "user/tiny", api=HfApi(endpoint="http://127.0.0.1:9"))
        assert set(RECORDS).isdisjoint(json.loads((old / MANIFEST_FILE).read_text())["files"])
