import subprocess
from importlib.metadata import version

import pytest

from distil_rank.tracking import provenance


@pytest.fixture(autouse=True)
def forget_the_commit():
    provenance.commit.cache_clear()
    yield
    provenance.commit.cache_clear()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit that holds the package, as far as the module can tell."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "module.py").write_text("")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "module.py"))
    return tmp_path


def test_the_commit_and_whether_files_differ_from_it(repository):
    head, dirty = provenance.commit()
    assert len(head) == 40 and not dirty
    provenance.commit.cache_clear()
    (repository / "module.py").write_text("changed = True")
    assert provenance.commit() == (head, True)


def test_no_commit_outside_a_repository_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "module.py"))
    assert provenance.commit() is None
    provenance.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    found = provenance.versions()
    assert found["torch"] == version("torch")
    assert found["no-such-package"] == "not installed"


def test_a_user_without_a_name(monkeypatch):
    def getuser() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(provenance.getpass, "getuser", getuser)
    assert provenance.user() == "unknown"


@pytest.mark.parametrize(
    ("started", "named"),
    [("/bin/distil-rank", "distil-rank"), ("/lib/distil_rank/__main__.py", "distil_rank"), ("", "python")],
)
def test_the_command_has_a_name(monkeypatch, started, named):
    monkeypatch.setattr(provenance.sys, "argv", [started])
    assert provenance.command() == named
