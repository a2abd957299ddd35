"""Downloads from a server on this machine that answers well, wrongly, slowly, or breaks off."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import sources
from fastgpt.data.dataset import open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import write_shard
from fastgpt.errors import RequestError

TEXT = "To be, or not to be: that is the question.\n" * 10
DIGEST = hashlib.sha256(TEXT.encode()).hexdigest()


class Server:
    """Answers with ``files`` by path. Each answer is changed by the next of ``faults``, if there is one.

    Attributes:
        files: content by path.
        faults: called with the handler and the content; answer instead.
        asked: method and file name of every request.
    """

    def __init__(self):
        self.files, self.faults, self.asked = {}, [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def answer(self):
                server.asked.append((self.command, self.path.rpartition("/")[2]))
                content = server.files.get(self.path)
                if content is None:
                    return self.status(404)
                if server.faults and self.command == "GET":
                    return server.faults.pop(0)(self, content)
                return self.content(content)

            def status(self, code):
                self.send_response(code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def content(self, content, stop=None):
                """Announces the whole, as the hub does it, and sends it up to ``stop``."""
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[:stop])
                if stop is not None:
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Server()
    yield server
    server.stop()


def broken(handler, content):
    handler.content(content, stop=len(content) // 2)


def failing(handler, content):
    handler.status(503)


def wrong(handler, content):
    handler.content(b"<html>Please log in</html>")


def silent(handler, content):
    time.sleep(1)
    handler.close_connection = True


def dripping(handler, content):
    """One byte every 50 ms, which no timeout of a single read notices."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    try:
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        handler.close_connection = True


# ---- a plain file ----


@pytest.fixture
def shakespeare(server, monkeypatch):
    server.files["/input.txt"] = TEXT.encode()
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server.url}/input.txt")
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", DIGEST)
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0.0, 0.0))
    return server


def refusal():
    with pytest.raises(RequestError) as caught:
        prepare("shakespeare-char")
    assert "\n" not in str(caught.value)
    assert "get that file in another way, then: " in str(caught.value)
    assert not os.path.exists("data") or os.listdir("data") == []
    return str(caught.value)


@pytest.mark.parametrize("faults", [[], [broken], [failing, broken]], ids=["good", "broken once", "failing and broken"])
def test_shakespeare_is_downloaded_also_when_that_fails_at_first(shakespeare, faults):
    shakespeare.faults += faults
    dataset = open_dataset(prepare("shakespeare-char"))
    assert dataset.tokenizer().decode(np.concatenate([*dataset.train, *dataset.val])) == TEXT
    assert len(shakespeare.asked) == len(faults) + 1


def test_a_connection_that_always_breaks_is_said_after_some_tries(shakespeare):
    shakespeare.faults += [broken] * 9
    assert f"the connection broke after {len(TEXT) // 2} of {len(TEXT)} bytes" in refusal()
    assert len(shakespeare.asked) == 3


def test_another_content_is_refused_at_once(shakespeare):
    shakespeare.faults += [wrong]
    assert "returned something other than that file" in refusal()
    assert len(shakespeare.asked) == 1


def test_a_file_that_is_not_there_is_refused_at_once(shakespeare):
    shakespeare.files.clear()
    assert "HTTP Error 404: Not Found" in refusal()
    assert len(shakespeare.asked) == 1


@pytest.mark.parametrize("fault", [silent, dripping])
def test_a_download_that_does_not_end_is_given_up(shakespeare, monkeypatch, fault):
    monkeypatch.setattr(sources, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.3)
    shakespeare.faults += [fault] * 9
    begin = time.monotonic()
    assert ("bytes in 0.3 s" if fault is dripping else "timed out") in refusal()
    assert time.monotonic() - begin < 10  # 21 s a try, if it is dripping


def test_without_a_connection_it_is_not_tried_again(shakespeare, monkeypatch):
    monkeypatch.setattr(sources, "RETRY_SECONDS", (60.0,))
    shakespeare.stop()
    assert "Connection refused" in refusal()


# ---- Hugging Face's hub ----


@pytest.fixture
def hub(server, tmp_path):
    """A hub with shards of fineweb10b, and the command that prepares two of them in a process of its own."""
    pytest.importorskip("huggingface_hub")
    for i, name in enumerate(["val_000000", "train_000001", "train_000002"]):
        shard = tmp_path / f"fineweb_{name}.bin"
        write_shard(shard, np.full(5000, i, dtype=np.uint16))
        server.files[f"/datasets/{sources.FINEWEB_REPO}/resolve/main/{shard.name}"] = shard.read_bytes()
        shard.unlink()

    def run(**variables):
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), **variables}
        argv = [sys.executable, "-m", "fastgpt.data", "prepare", "fineweb10b", "--shards=2", "--overwrite"]
        server.asked.clear()
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)

    server.run = run
    return server


def downloaded(server):
    return [name for method, name in server.asked if method == "GET" and name.startswith("fineweb")]


NAMES = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_fineweb_is_downloaded_once_also_when_it_breaks_off(hub):
    hub.faults += [broken]
    done = hub.run()
    assert done.returncode == 0, done.stderr
    assert downloaded(hub) == [NAMES[0], *NAMES]
    dataset = open_dataset("fineweb10b")
    assert [(shard[0], len(shard)) for shard in (*dataset.val, *dataset.train)] == [(0, 5000), (1, 5000), (2, 5000)]
    assert "prepared 15,000 tokens in" in done.stderr

    assert hub.run().returncode == 0
    assert downloaded(hub) == []
    assert hub.run(HF_HUB_OFFLINE="1").returncode == 0
    assert hub.asked == []


def test_fineweb_goes_on_with_the_shards_that_it_has(hub):
    missing = next(path for path in hub.files if path.endswith(NAMES[2]))
    content = hub.files.pop(missing)
    done = hub.run()
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: cannot download {NAMES[2]} of {sources.FINEWEB_REPO} from Hugging Face (")
    assert "Traceback" not in done.stderr
    assert os.listdir("data") == []

    hub.files[missing] = content
    assert hub.run().returncode == 0
    assert downloaded(hub) == [NAMES[2]]
    assert len(open_dataset(Path("data", "fineweb10b")).train) == 2


def test_without_a_connection_fineweb_is_answered_in_one_line(hub):
    done = hub.run(HF_HUB_OFFLINE="1")  # otherwise the hub's library tries for 24 s
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: cannot download {NAMES[0]} of {sources.FINEWEB_REPO}")
