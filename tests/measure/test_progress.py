"""Progress on a log."""

from distil_rank.measure import progress as module


def test_a_line_every_ten_seconds_where_there_is_no_terminal(monkeypatch, caplog):
    now = iter([0.0, 0.0, 4.0, 11.0, 15.0, 22.0])  # the start, and before each item
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    with caplog.at_level("INFO", logger=module.log.name):
        assert list(module.progress(list("abcde"), "pipelines")) == list("abcde")
    assert caplog.messages == ["pipelines: 2 of 5, about 16 s left", "pipelines: 4 of 5, about 6 s left"]
