from importlib.metadata import version

from distil_rank.tracking import provenance


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    installed = provenance.versions()
    assert installed["torch"] == version("torch")
    assert installed["no-such-package"] == "not installed"
