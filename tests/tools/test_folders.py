import pytest

from megablip.errors import ConfigError
from tools.folders import complete_folder


def test_a_folder_appears_when_complete_and_replaces_its_like(tmp_path):
    out = tmp_path / "deep" / "out"
    for content in ("1", "2"):
        with complete_folder(out, mark="mark") as folder:
            (folder / "mark").write_text(content)
            (folder / content).touch()
            assert not (out / content).exists()
        assert sorted(path.name for path in out.iterdir()) == [content, "mark"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    with complete_folder(out, mark="mark") as folder:
        (folder / "mark").touch()
    with pytest.raises(ZeroDivisionError), complete_folder(out, mark="mark") as folder:
        (folder / "half").write_text(str(1 / 0))
    assert [path.name for path in out.iterdir()] == ["mark"]
    with complete_folder(out, mark="mark") as folder:
        assert list(folder.iterdir()) == []
        (folder / "mark").touch()


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match="not ours"), complete_folder(tmp_path, mark="mark"):
        pass
    assert (tmp_path / "precious").exists()


def test_an_unfinished_folder_is_gone_on_with(tmp_path):
    out, settings = tmp_path / "out", {"model": "a", "seed": 1}
    with pytest.raises(ZeroDivisionError), complete_folder(out, "mark", settings) as folder:
        (folder / "half").write_text(str(1 / (folder / "half").write_text("")))
    with pytest.raises(ConfigError, match="other settings"), complete_folder(out, "mark", {"model": "b"}):
        pass
    with complete_folder(out, "mark", settings) as folder:
        assert (folder / "half").exists()
        (folder / "mark").touch()
    assert sorted(path.name for path in out.iterdir()) == ["half", "mark", "settings.json"]
