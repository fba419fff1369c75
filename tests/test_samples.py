"""Where the proteins that ship are."""

from pathlib import Path

from distil_rank import samples


def test_a_checkout_uses_its_own_data(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert samples.sample(samples.LABELLED) == "data/functions"
    assert samples.sample(samples.UNLABELLED, samples.LABELLED) == "data/sample"


def test_an_installed_package_uses_its_copy(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    packaged = tmp_path / "site-packages"
    (packaged / samples.LABELLED).mkdir(parents=True)
    monkeypatch.setattr(samples, "PACKAGED", packaged)
    assert samples.sample(samples.UNLABELLED, samples.LABELLED) == str(packaged / samples.LABELLED)


def test_what_is_missing_is_named_as_a_checkout_has_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "PACKAGED", tmp_path / "absent")
    assert Path(samples.sample(samples.UNLABELLED)) == Path("data/sample")
