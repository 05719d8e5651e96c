"""What packages plug in is found by name: the lab without an install's metadata, and anybody's package with it."""

import subprocess
import sys

import pytest

from foveate import FoveateError, plugins
from foveate.evaluation.tasks import Task, all_tasks, find_task
from foveate.plugins import DATA_GROUP, PICTURES_GROUP, TASKS_GROUP, all_plugins, find_plugin


GROUPS = (TASKS_GROUP, DATA_GROUP, PICTURES_GROUP)


@pytest.fixture
def charts(tmp_path, monkeypatch):
    """Somebody's package, installed, with a task."""
    (tmp_path / "charts.py").write_text(
        "from foveate.evaluation.tasks import Task\n"
        "TASKS = {'charts': Task('charts', lambda number, seed: [], 3), 'charts-long': Task('long', list, None)}\n"
    )
    metadata = tmp_path / "charts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: charts\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[foveate.tasks]\ncharts = charts:TASKS\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("charts", None)


@pytest.mark.parametrize("group", GROUPS)
def test_a_source_tree_finds_the_lab_without_metadata(group, monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    assert all_plugins(group) and all(name == "lab" or name.startswith("lab-") for name in all_plugins(group))


@pytest.mark.parametrize("group", GROUPS)
def test_a_wheel_finds_the_lab_by_its_metadata(group, tmp_path, monkeypatch):
    """`setup.cfg` isn't there, and that of another project says nothing."""
    entries = plugins._of_source_tree(group)
    (tmp_path / "setup.cfg").write_text(
        f"[metadata]\nname = other\n[options.entry_points]\n{group} =\n    lab = os:sep\n"
    )
    monkeypatch.setattr(plugins, "_SOURCE_TREE", tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    assert find_plugin(group, next(iter(all_plugins(group)))) is not None


def test_a_task_of_a_package_is_found_by_name(charts):
    assert find_task("charts").num_examples == 3 and find_task("charts-long").title == "long"
    assert isinstance(all_tasks()["charts"], Task)
    with pytest.raises(FoveateError, match=r"There is no task 'charts-short'.*lab-vqa, .*charts-long, .*mt-gqa"):
        find_task("charts-short")


def test_a_package_is_imported_when_it_is_asked_for_by_name(charts):
    assert find_task("lab-vqa") and find_task("mt-gqa")
    assert "charts" not in sys.modules
    find_task("charts")
    assert "charts" in sys.modules


def test_evaluation_and_training_begin_without_the_lab():
    code = (
        "import sys, foveate.evaluation.ask, foveate.evaluation.results, foveate.training.train\n"
        "print([name for name in sys.modules if name.startswith('foveate.lab')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
