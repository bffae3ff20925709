"""What a client may have the server open: data, and public hosts, up to a size."""

import asyncio
import base64
import http.server
import threading

import pytest

from vlv.serving import pictures
from vlv.serving.pictures import TooLarge, fetch, is_public


def get(url, largest=1000):
    return asyncio.run(fetch(url, largest))


@pytest.fixture
def site(monkeypatch):
    """A web server on this machine, which counts as public: what is asked of it, and its address."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, content = {"/a.png": (200, b"pixels"), "/large.png": (200, b"x" * 5000)}.get(self.path, (404, b""))
            if self.path == "/moved.png":
                status = 302
            self.send_response(status)
            self.send_header("Location", "/a.png")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pictures, "is_public", lambda address: address == "127.0.0.1")
    yield asked, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_data():
    content = bytes(range(256))
    assert get("data:image/png;base64," + base64.b64encode(content).decode()) == content
    assert get("data:;base64,") == b""


def test_public_host(site):
    _, address = site
    assert get(f"{address}/a.png") == b"pixels"


def test_what_is_too_large(site):
    _, address = site
    for url in (f"{address}/large.png", "data:image/png;base64," + base64.b64encode(b"x" * 1100).decode()):
        with pytest.raises(TooLarge, match="larger than 0.001 MB, the most that this server takes"):
            get(url)


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("/etc/passwd", "must begin with data:, https:// or http://; no files of the server are read"),
        ("file:///etc/passwd", "must begin with data:"),
        ("scene.png", "must begin with data:"),
        ("data:image/png,abc", "must have the form data:image/png;base64"),
        ("data:image/png;base64,a!b", "is not valid base64"),
        ("http://", "is not a public host"),
    ],
)
def test_what_is_no_public_url(url, sentence, monkeypatch):
    async def no_look_up(self, host, *_, **__):
        return []

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", no_look_up)
    with pytest.raises(ValueError, match=sentence):
        get(url)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "169.254.169.254"]
)
def test_hosts_of_the_servers_own_network(host, site, monkeypatch):
    asked, address = site
    monkeypatch.setattr(pictures, "is_public", is_public)
    with pytest.raises(ValueError, match="is not a public host: send the image in a data: URL"):
        get(f"http://{host}:{address.rpartition(':')[2]}/a.png")
    assert asked == []


def test_addresses():
    assert all(map(is_public, ["93.184.215.14", "2606:4700:4700::1111"]))
    inside = ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1"]
    assert not any(map(is_public, [*inside, "::ffff:10.0.0.1", "0.0.0.0"]))


@pytest.mark.parametrize("path, sentence", [("/moved.png", "with status 302"), ("/none.png", "with status 404")])
def test_answers_that_are_no_image(path, sentence, site):
    asked, address = site
    with pytest.raises(ValueError, match=f"{path} answers {sentence} and not with an image"):
        get(address + path)
    assert asked == [path]  # a redirect is not followed


def test_a_host_that_is_not_there():
    with pytest.raises(ValueError, match=r"https://nowhere\.invalid/a\.png cannot be fetched"):
        get("https://nowhere.invalid/a.png")
