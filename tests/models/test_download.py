"""Weights from the Hub, played by a server on this machine."""

import hashlib
import http.server
import os
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import save
from tests.models.numpy_resnet import random_tensors

from gse_jax import models
from gse_jax.models import download

CONTENT = save(random_tensors(np.random.default_rng(0), blocks=3, widths=(2, 4, 6), num_classes=4,
                              num_channels=3))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "hf:timm/resnet20.tiny@0123abc"


class Hub:
    """Addresses -> answers, and which were asked for; an answer may be cut short."""

    def __init__(self):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA256}\nsize 9\n"
        self.files = {"/timm/resnet20.tiny/raw/0123abc/model.safetensors": pointer.encode(),
                      "/timm/resnet20.tiny/resolve/0123abc/model.safetensors": CONTENT}
        self.asked, self.missing_bytes = [], 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                hub.asked.append(self.path)
                body = hub.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) - hub.missing_bytes])

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.address + "/")
    monkeypatch.setenv("GSE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield hub
    hub.close()


def files_below(folder):
    return sorted(name for _, _, names in os.walk(folder) for name in names)


def test_weights_are_fetched_once_checked_and_then_work_offline(hub, tmp_path):
    apply_fn, params = models.load("resnet20", weights=NAME)
    assert [path.split("/")[3] for path in hub.asked] == ["raw", "resolve"]
    (tmp_path / "w").write_bytes(CONTENT)
    expected_fn, expected = models.load("resnet20", weights=tmp_path / "w")
    assert apply_fn == expected_fn and jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    hub.files.clear()
    models.load("resnet20", weights=NAME)
    models.load("resnet20", weights=f"{NAME},sha256={SHA256}")
    assert len(hub.asked) == 2
    assert files_below(tmp_path / "cache") == ["model.safetensors", "model.safetensors.sha256"]


def test_a_hash_of_ones_own_needs_no_pointer(hub):
    del hub.files["/timm/resnet20.tiny/raw/0123abc/model.safetensors"]
    download.fetch(f"{NAME},sha256={SHA256}")
    assert len(hub.asked) == 1


def test_another_file_of_the_repository(hub):
    hub.files["/timm/resnet20.tiny/resolve/0123abc/sub/w.safetensors"] = CONTENT
    path = download.fetch(f"{NAME},file=sub/w.safetensors,sha256={SHA256}")
    assert path.read_bytes() == CONTENT and path.parts[-2:] == ("sub", "w.safetensors")


def test_another_content_is_refused_and_not_kept(hub, tmp_path):
    hub.files["/timm/resnet20.tiny/resolve/0123abc/model.safetensors"] = b"<html>login</html>"
    with pytest.raises(ValueError, match=rf"has SHA-256 \w{{64}}, expected {SHA256}"):
        download.fetch(NAME)
    with pytest.raises(ValueError, match=f"expected {'0' * 64}"):
        download.fetch(f"{NAME},sha256={'0' * 64}")
    assert files_below(tmp_path / "cache") == []


def test_a_broken_connection_leaves_nothing(hub, tmp_path):
    hub.missing_bytes = 10
    with pytest.raises((FileNotFoundError, ValueError)):
        download.fetch(f"{NAME},sha256={SHA256}")
    assert files_below(tmp_path / "cache") == []


def test_a_damaged_copy_is_noticed(hub):
    path = download.fetch(NAME)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="delete it"):
        download.fetch(NAME)


def test_no_network_says_what_to_download(hub, tmp_path):
    hub.close()
    with pytest.raises(FileNotFoundError) as caught:
        models.load("resnet20", weights=f"{NAME},sha256={SHA256}")
    message = str(caught.value)
    assert f"{hub.address}/timm/resnet20.tiny/resolve/0123abc/model.safetensors" in message
    assert "download that file" in message and SHA256 in message and "\n" not in message
    assert files_below(tmp_path / "cache") == []


def test_a_missing_revision_and_a_file_without_pointer(hub):
    with pytest.raises(FileNotFoundError, match="HTTP 404"):
        download.fetch("hf:timm/resnet20.tiny@other")
    hub.files["/timm/resnet20.tiny/raw/0123abc/model.safetensors"] = b"<html>"
    with pytest.raises(ValueError, match="states no SHA-256; pass the file's own"):
        download.fetch(NAME)


@pytest.mark.parametrize("bad", [
    "hf:", "hf:timm/resnet", "hf:resnet@1", "hf:a/b/c@1", "hf:a/b@", "hf:../b@1", "hf:a/..@1",
    "hf:a/b@..", "hf:a/b@1/2", "hf:a/b@1,file=../../x", "hf:a/b@1,file=/x", "hf:a/b@1,sha256=abc",
    "hf:a/b@1?x", "hf:a b/c@1",
])
def test_malformed_names_are_refused_before_anything_is_asked(hub, bad):
    with pytest.raises(ValueError, match="weights: .*expected"):
        download.fetch(bad)
    assert hub.asked == []


def test_the_address_must_be_of_the_web(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    with pytest.raises(ValueError, match="HF_ENDPOINT: got 'file:///etc', expected an http"):
        download.fetch(NAME)
