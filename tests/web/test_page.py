"""The page without a browser: what it needs, contacts, limits, and how its functions answer."""

import json
import socket
import sys
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")

from taming.web import page as page_module  # noqa: E402
from taming.web.page import build_page, launch  # noqa: E402
from taming.web.progress import Job, Jobs  # noqa: E402
from taming.web.request import Request  # noqa: E402
from taming.web.session import Session  # noqa: E402
from tests.web.tiny_runs import export  # noqa: E402


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    export(folder / "run", "class_label")
    return Session([folder], tmp_path_factory.mktemp("images"), device="cpu")


def test_without_gradio_it_says_what_to_install(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"the page needs gradio .* pip install 'taming\[demo\]'"):
        build_page(session)


def test_a_run_fits_the_inputs_to_it(session):
    choose = page_module._choose(session, ["top_k", "guidance", "stride"])
    first, (name, about, height, width, _, top_k, guidance, stride, _) = choose("run")
    assert first[0] is None and first[-1]["interactive"] is False  # until it is loaded
    assert (name, height, width) == ("run", 32, 32)
    assert "trained at 32x32 pixels given class label" in about
    assert top_k["label"] == "top-k (0: all 16)"
    assert stride["maximum"] == 4 and guidance["interactive"] is False
    _, (name, about, *rest, button) = choose("<b>gone")
    assert name is None and "there is no run &#x27;&lt;b&gt;gone&#x27;" in about and not button["interactive"]


def test_jobs_belong_to_visitors():
    jobs = Jobs()
    one, two = jobs.begin("one"), jobs.begin("two")
    jobs.cancel("one")
    jobs.cancel("nobody")
    assert one.cancelled and not two.cancelled
    jobs.forget("two")
    assert two.cancelled and not jobs.begin("two").cancelled


def test_a_job_can_be_cancelled_before_its_turn():
    jobs = Jobs()
    jobs.wait("one")
    jobs.cancel("one")
    assert jobs.begin("one").cancelled
    jobs.end("one")
    jobs.wait("one")
    assert not jobs.begin("one").cancelled  # another click


def test_a_click_that_is_heard_twice_begins_one_job():
    jobs = Jobs()
    job = jobs.begin("one")
    jobs.wait("one")  # comes late
    jobs.cancel("one")
    assert job.cancelled


@pytest.fixture
def address(session, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    page = build_page(session)
    monkeypatch.setattr(page_module, "build_page", lambda session: page)
    yield launch(session, max_upload=0.01, block=False)
    page.close()


def test_it_listens_here_alone_and_contacts_nobody(address):
    assert address.startswith("http://127.0.0.1:")
    html = urllib.request.urlopen(address, timeout=10).read().decode()
    config = json.loads(urllib.request.urlopen(address + "config", timeout=10).read())
    assert config["analytics_enabled"] is False and config["theme_hash"]
    styles = urllib.request.urlopen(address + "theme.css", timeout=10).read().decode()
    assert "fonts.googleapis.com" not in html + styles and "@import" not in styles
    assert Image.MAX_IMAGE_PIXELS == 50_000_000


@pytest.fixture
def contacted(monkeypatch):
    """Addresses that the server fetches; names are looked up as if each were a public machine."""
    import httpx
    import safehttpx

    addresses = []

    async def send(client, request, **_):
        addresses.append(str(request.url))
        return httpx.Response(200, content=b"stranger", request=request)

    for name in ("get", "async_validate_url"):  # restored after the test
        monkeypatch.setattr(safehttpx, name, getattr(safehttpx, name))
    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    own = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **named: own(
        host if host in ("127.0.0.1", None) else "93.184.216.34", *rest, **named))
    return addresses


def call(address, route, **body):
    """Answer of the page's interface to a JSON body, or to none: (status, text)."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + route, data, {"content-type": "application/json"})
    opener = urllib.request.build_opener(NoRedirect)
    try:
        with opener.open(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


@pytest.mark.parametrize("url", ["https://example.com/a.png", "http://10.0.0.1/a.png", "https://hf.co/a.png"])
def test_no_address_of_a_visitor_is_fetched(contacted, address, url):
    config = json.loads(urllib.request.urlopen(address + "config", timeout=10).read())
    images = {part["id"] for part in config["components"] if part["type"] in ("image", "imageeditor")}
    event = next(  # one that reads an image
        dependency for dependency in config["dependencies"]
        if images & set(dependency["inputs"]) and dependency["backend_fn"]
    )
    file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    editor = {"background": file, "layers": [], "composite": file}
    kinds = {part["id"]: part["type"] for part in config["components"]}
    data = [{"image": file, "imageeditor": editor}.get(kinds[number]) for number in event["inputs"]]
    joined = dict(data=data, fn_index=event["id"], session_hash="x", trigger_id=event["targets"][0][0])
    status, _ = call(address, "gradio_api/queue/join", **joined)
    assert status == 200
    _, events = call(address, "gradio_api/queue/data?session_hash=x")
    assert '"success":false' in events.replace(" ", "")
    assert call(address, f"gradio_api/file={url}")[0] in (302, 403)  # 302: the visitor may fetch it
    assert contacted == []


def test_a_large_body_is_refused(address):
    for size, expected in ((2_000_000, 413), (100, 422)):
        request = urllib.request.Request(address + "gradio_api/upload", data=b"0" * size, method="POST")
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as caught:
            urllib.request.urlopen(request, timeout=10)
        if isinstance(caught.value, urllib.error.HTTPError):
            assert (caught.value.code == 413) == (expected == 413)
        else:
            assert expected == 413  # it did not wait for the rest


def test_a_port_that_is_taken(session, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port} .Address already in use.: "):
            launch(session, port=port, block=False)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a..b", "::ffff:300.0.0.1"])
def test_a_host_that_cannot_be_listened_on_ends_at_once(session, host):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"cannot listen on {host} .*: choose another --port or --host"):
        launch(session, host=host, block=False)
    assert time.monotonic() - start < 15


def fetched(address, path):
    """The status of a request for a file, and the file."""
    try:
        with urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_only_the_images_that_the_page_wrote_are_served(address, session, tmp_path_factory):
    keep = tmp_path_factory.mktemp("kept")
    for file in (keep / "private.png", keep / "sub" / "private.txt"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"private")
    session.keep = keep
    request = Request("run", (32, 32), {"class_label": 0})
    *_, (image,) = session.generate(request, Job())
    copy = keep / image.path.name
    assert fetched(address, image.path) == (200, copy.read_bytes())
    run = session.runs()[0].path / "config.yaml"
    for file in (copy, keep / "private.png", keep / "sub" / "private.txt", run, __file__):
        assert fetched(address, file)[0] == 403, file
    assert {path.name for path in keep.iterdir()} == {"private.png", "sub", copy.name}
