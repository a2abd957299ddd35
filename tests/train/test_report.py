"""The page about a run."""

import dataclasses
import html
import json
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser

import pytest

from fastgpt import report as command
from fastgpt.errors import RequestError
from fastgpt.train import report, samples
from tests.train.test_trainer import stop_after

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(trainer, tmp_path, monkeypatch):
    """A run that was stopped and resumed, and has a finding."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 40)  # so many that they show the training
    one = trainer(max_iters=8, lr_decay_iters=800)
    stop_after(one, 5, signal.SIGTERM)
    one.train()
    assert trainer(init_from="resume").train() == 0
    return tmp_path / "run"


class Tags(HTMLParser):
    """Notes what is opened and closed, and every address."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_writes_its_page_with_what_it_was_and_what_came_of_it(run):
    text = (run / "report.html").read_text()
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [record for record in last if record["kind"] == "eval"][-1]
    assert f"Validation loss {loss['val_loss']:.4f} ± {loss['val_loss_error']:.4f} nats a token" in text
    assert "after 8 steps, 512 tokens" in text
    assert "It is complete." in text
    assert "stopped by SIGTERM at step 5, status 143" in text
    assert "started at step 5" in text
    assert "the learning rate is still at" in text
    assert "sha256 of step-0000008/model.safetensors" in text
    assert text.count("<svg ") == text.count('role="img"') == 5


def test_the_page_is_whole_and_needs_nothing_else(run):
    text = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(address.startswith("#") for address in tags.addresses)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text).replace("http://www.w3.org", "")
    assert tags.seen.count("script") == 1
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert [record["step"] for record in data[0]["records"]["train"]] == list(range(1, 9))


def test_what_it_shows_is_escaped(run):
    config = json.loads((run / "config.json").read_text())
    config.pop("sha256_of_the_rest")
    config["train"]["dataset"] = "</script><script>alert(1)</script><b>&"
    (run / "config.json").write_text(json.dumps(config))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "finding", "step": 3, "code": "x", "text": "<img src=x onerror=alert(2)>"}) + "\n"
        )
    text = report.page([report.read(run)])
    assert "<script>alert" not in text
    assert "<img" not in text.replace("\\u003c", "")
    assert "&lt;/script&gt;" in text
    tags = Tags()
    tags.feed(text)
    assert (tags.open, tags.seen.count("script")) == ([], 1)


def test_several_runs_are_compared(run, trainer, tmp_path, monkeypatch, capsys):
    trainer(out_dir=tmp_path / "other", n_embd=32).train()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    command.main([str(run), str(tmp_path / "other")])
    assert capsys.readouterr().out == "report.html\n"
    text = (tmp_path / "report.html").read_text()
    assert "has the lowest last validation loss" in text
    assert text.count("<h2>") == 2
    command.main([str(run), "--out", "pages/one.html"])
    assert (tmp_path / "pages" / "one.html").read_text() == (run / "report.html").read_text()


def with_last_loss(run, loss, error):
    return dataclasses.replace(
        run, name=str(loss), records=run.records | {"eval": [{"step": 8, "val_loss": loss, "val_loss_error": error}]}
    )


def test_a_lead_that_may_be_chance_is_told_as_that(run):
    read = report.read(run)
    best, close, far = (with_last_loss(read, loss, error) for loss, error in ((4.0, 0.03), (4.05, 0.04), (4.11, 0.04)))
    found = report.verdict([far, close, best])
    assert found.startswith("4.0 has the lowest last validation loss: 4.0000 ± 0.0300 after 8 steps")
    assert found.endswith(
        " That may be chance beside 4.05 (0.0500 ± 0.0500 higher): a larger --eval_iters tells them apart."
    )
    assert "chance" not in report.verdict([best, far])
    assert "chance" not in report.verdict([best, with_last_loss(read, 4.05, None)])  # of one batch


def test_no_spike_is_lost_in_a_long_run():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321] = (54_321, 9.0)
    thinned = report._thinned(points)
    assert len(thinned) <= report.MOST_POINTS
    assert (54_321, 9.0) in thinned
    assert thinned == sorted(thinned)


def test_a_run_of_an_older_version_and_one_without_an_evaluation_have_a_page(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["kind"] == "train"))
    text = report.page([report.read(run)])
    assert "Nothing has been evaluated yet." in text
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["kind"] in ("train", "eval")))
    assert "It has not ended." in report.page([report.read(run)])


def test_what_the_model_wrote_at_each_evaluation_is_shown(run):
    samples = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = {record["step"]: record for record in samples if record["kind"] == "sample"}
    assert sorted(samples) == [0, 4, 8]
    assert len({record["text"] for record in samples.values()}) > 1
    assert len({record["prompt"] for record in samples.values()}) == 1
    text = (run / "report.html").read_text()
    assert text.count('<pre><span class="prompt">') == 3
    assert html.escape(samples[8]["text"]) in text


def test_of_many_samples_the_first_the_last_and_some_between_are_shown(run):
    one = report.read(run)
    many = [{"kind": "sample", "step": i, "prompt": "<p>", "text": f"text {i}"} for i in range(100)]
    text = report.page([dataclasses.replace(one, records=one.records | {"sample": many})])
    shown = [int(step) for step in re.findall(r"<summary>step (\d+)</summary>", text)]
    assert len(shown) == report.MOST_SAMPLES
    assert (shown[0], shown[-1]) == (0, 99)
    assert "&lt;p&gt;" in text
    assert "<p></span>" not in text


def test_a_prediction_stands_beside_what_was_measured(run):
    one = report.read(run)
    start = one.start | {"predicted_ms": {"GEMM": 30.0, "loss": 0.0, "norm": 10.0}, "predicted_bytes": 3 << 20}
    text = report.page([dataclasses.replace(one, records=one.records | {"start": [start]})])
    assert "GEMM 75%, norm 25%" in text
    assert "3.00 MiB" in text


def test_a_run_that_has_diverged_does_not_show_an_earlier_loss_as_its_last(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    evaluations[-1].update(val_loss=None, train_loss=None, val_loss_error=None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    diverged = report.read(run)
    said = report.verdict([diverged])
    assert said.startswith("The loss is not finite at the last evaluation, step 8. Before, it was ")
    assert report.page([diverged]).count("<td>not finite</td>") == 2
    assert report.verdict([diverged, diverged]) == "No run has a finite loss at its last evaluation."


def test_runs_on_different_data_are_told_not_to_compare(run, tmp_path):
    one = report.read(run)
    assert "do not compare" not in report.verdict([one, one])
    other = {**one.start, "dataset": {"path": "x", "id": "another"}}
    two = dataclasses.replace(one, records={**one.records, "start": [other]})
    assert "The runs have different data, so their losses do not compare" in report.verdict([one, two])


def test_runs_of_one_name_are_told_apart_by_their_folders(run, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(run, tmp_path / place / "run")
    report.write([tmp_path / "a" / "run", tmp_path / "b" / "run"], tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "<h1>Comparison of a/run, b/run</h1>" in text


@pytest.mark.parametrize(("ms", "unit"), [(5.0, "seconds"), (60e3, "minutes"), (3600e3, "hours")])
def test_time_is_shown_in_a_unit_that_fits(run, ms, unit):
    one = report.read(run)
    updates = [update | {"ms": ms} for update in one.records["train"]]
    text = report.page([dataclasses.replace(one, records=one.records | {"train": updates})])
    assert f"{unit} of training, without evaluations" in text


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(RequestError, match="is not a run"):
        command.main([str(tmp_path)])
    with pytest.raises(RequestError, match="is not a run"):
        command.main([str(tmp_path / "typo")])
    assert not (tmp_path / "typo").exists()
    (tmp_path / "config.json").write_text('{"n_layer": 2, "bos_token_id": 1}')
    with pytest.raises(RequestError, match=r"is not a run: another program wrote its config\.json"):
        command.main([str(tmp_path)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(RequestError, match="has logged nothing yet"):
        command.main([str(run)])
    shutil.rmtree(run / "checkpoints")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_an_error(run, tmp_path, width):
    shot = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}",
        f"file://{run / 'report.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 20_000
