import pytest

from fastgpt.train import samples


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """A sample of a few tokens at each evaluation: there are hundreds in these tests."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 4)
