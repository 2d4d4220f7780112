# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib.util
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from ahcq_plugin.mm import weights
from ahcq_plugin.mm.detectors.loading import read_detector
from ahcq_plugin.mm.weights import download, fetch, state_of, wanted
from ahcq_plugin.support.tool import run_tool
from ahcq_plugin.zoo.checkpoints import load_weights
from ahcq_plugin.zoo.published import PUBLISHED_FILES, PublishedFile, damage
from ahcq_plugin.zoo.sam import CHECKPOINTS

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Sends CONTENT, from where a Range asks; /cut sends half of what it promises, /plain knows no ranges."""

    def do_GET(self):
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.asked.append(self.headers.get("Range"))
        if self.path == "/absent.pth":
            return self.send_error(404)
        start = int(asked[1]) if asked and self.path != "/plain.pth" else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut.pth" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    http.asked = []
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


@pytest.fixture
def entry(server):
    return PublishedFile("x", "x.pth", f"http://127.0.0.1:{server.server_port}/x.pth", SHA256, len(CONTENT))


def at(entry, path):
    return replace(entry, url=entry.url.replace("/x.pth", path))


def test_a_file_is_fetched_verified_and_not_fetched_again(entry, server, tmp_path):
    assert state_of(entry, tmp_path) == "missing"
    assert fetch(entry, tmp_path, ROOT, progress=False).endswith("fetched")
    assert (tmp_path / "x.pth").read_bytes() == CONTENT and state_of(entry, tmp_path) == "ok"
    assert fetch(entry, tmp_path, ROOT, progress=False).endswith("ok") and server.asked == [None]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_an_interrupted_download_goes_on_where_it_stopped(entry, server, tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(ConnectionError, match="stopped at 640,000 of 1,280,000 bytes; run it again"):
        download(at(entry, "/cut.pth"), path, progress=False)
    assert not path.exists()
    download(entry, path, progress=False)
    assert path.read_bytes() == CONTENT and server.asked == [None, "bytes=640000-"]


@pytest.mark.parametrize("have", [7, len(CONTENT)])
@pytest.mark.parametrize("where", ["/x.pth", "/plain.pth"])
def test_a_server_without_ranges_and_a_finished_part_end_in_the_whole_file(entry, tmp_path, where, have):
    (tmp_path / "x.pth.part").write_bytes(CONTENT[:have])
    download(at(entry, where), tmp_path / "x.pth", progress=False)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_removed(entry, tmp_path):
    wrong = replace(entry, sha256="0" * 8)
    with pytest.raises(ValueError, match=f"its SHA-256 is {SHA256}, published is 00000000; removed"):
        download(wrong, tmp_path / "x.pth", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_found_by_size_or_checksum_and_kept(entry, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(CONTENT[:-1])
    assert "1,279,999 bytes, the published file 1,280,000" in damage(path, entry)
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ValueError, match=r"x.pth is damaged: its SHA-256 .* remove it to fetch it again"):
        fetch(entry, tmp_path, ROOT)
    assert path.exists() and damage(path, replace(entry, sha256="")) == ""


def test_without_a_server_the_message_says_where_the_file_belongs(entry, tmp_path):
    with pytest.raises(ConnectionError, match="404"):
        download(at(entry, "/absent.pth"), tmp_path / "x.pth", progress=False)
    offline = replace(entry, url="http://127.0.0.1:9/x.pth")
    with pytest.raises(ConnectionError, match=r"cannot fetch http.* put it at .*x.pth"):
        download(offline, tmp_path / "x.pth", progress=False)


def test_a_published_file_that_is_not_what_configs_read_is_converted(entry, server, tmp_path, monkeypatch):
    from ahcq_plugin.mm.detectors import convert_hdetr

    calls = []
    monkeypatch.setattr(
        convert_hdetr, "convert_hdetr", lambda raw, out, config: calls.append((raw, config)) or torch.save({}, out)
    )
    raw = replace(entry, name="hdetr_r50", file="hdetr_r50.pth", convert="hdetr")
    assert fetch(raw, tmp_path, ROOT / "mm_configs", progress=False).endswith("converted from x.pth")
    assert calls == [(tmp_path / "x.pth", ROOT / "mm_configs/_base_/detectors/hdetr_r50.py")]
    assert calls[0][1].is_file() and state_of(raw, tmp_path) == "ok"
    (tmp_path / "hdetr_r50.pth").unlink()
    fetch(raw, tmp_path, ROOT / "mm_configs", progress=False)
    assert len(calls) == 2 and len(server.asked) == 1, "what was downloaded is not downloaded again"


@pytest.mark.parametrize(("digits", "told"), [(8, "8 of 64 digits"), (0, "no digit")])
def test_what_is_not_published_in_full_is_recorded_on_first_use(entry, tmp_path, digits, told):
    entry, path = replace(entry, sha256=SHA256[:digits], size=None), tmp_path / "x.pth"
    done = fetch(entry, tmp_path, ROOT, progress=False)
    assert done == f"{path}: fetched; published of its SHA-256: {told}; what came is recorded in x.pth.sha256"
    assert (tmp_path / "x.pth.sha256").read_text() == f"{SHA256}  x.pth\n" and state_of(entry, tmp_path) == "ok"
    path.write_bytes(CONTENT[:-1] + b"?")
    assert state_of(entry, tmp_path).startswith("damaged: its SHA-256 is ")


@pytest.mark.parametrize("content", [b"", b"junk"])
@pytest.mark.parametrize("convert", ["", "hdetr"])
def test_junk_is_not_there(entry, tmp_path, content, convert):
    entry = replace(entry, sha256="", size=None, convert=convert)
    (tmp_path / "x.pth").write_bytes(content)
    assert state_of(entry, tmp_path) == "damaged: it is no checkpoint (PyTorch's are zip archives)"
    torch.save({}, tmp_path / "x.pth")
    assert state_of(entry, tmp_path) == "there"


def test_a_flipped_bit_in_a_converted_file_is_found(entry, tmp_path, monkeypatch):
    from ahcq_plugin.mm.detectors import convert_yolox

    monkeypatch.setattr(convert_yolox, "convert_yolox", lambda raw, out: torch.save({"x": torch.zeros(3)}, out))
    entry = replace(entry, file="y.pth", convert="yolox")
    fetch(entry, tmp_path, ROOT, progress=False)
    content = bytearray((tmp_path / "y.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "y.pth").write_bytes(content)
    assert state_of(entry, tmp_path).startswith("damaged: its SHA-256 is ")


def test_what_was_recorded_is_checked_by_those_who_load(entry, tmp_path):
    sam = PUBLISHED_FILES["mobile_sam"]  # no digit is published
    for file in (sam.file, "yolox_nano.pth"):
        torch.save({"x": torch.zeros(3)}, tmp_path / file)
        (tmp_path / f"{file}.sha256").write_text(f"{'0' * 64}  {file}\n")
    with pytest.raises(ValueError, match=rf"damaged: its SHA-256 is .*, {sam.file}.sha256 says 0000"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / sam.file, sam)
    with pytest.raises(ValueError, match=r"yolox_nano.pth is damaged: its SHA-256 is .* says 0000"):
        read_detector(Config(dict(load_from=str(tmp_path / "yolox_nano.pth"))))


@pytest.mark.parametrize("leaf", sorted((ROOT / "mm_configs").glob("sam_[blh]_*.py")), ids=lambda path: path.stem)
def test_everything_that_a_published_config_needs_is_known(leaf):
    cfg = Config.fromfile(leaf)
    files = {entry.file for entry in wanted([str(leaf)])}
    assert files == {Path(cfg.load_from).name, Path(cfg.sam.checkpoint).name}


@pytest.mark.parametrize("leaf", sorted((ROOT / "mm_configs").glob("sam2_*_w*.py")), ids=lambda path: path.stem)
def test_a_sam2_config_without_a_path_needs_the_published_file(leaf):
    name = leaf.stem.split("_w")[0]
    if name == "sam2_tiny":
        with pytest.raises(ValueError, match="needs no weights"):
            wanted([str(leaf)])
    else:
        assert wanted([str(leaf)]) == [PUBLISHED_FILES[name]]


def test_a_config_that_builds_a_sam_from_arguments_is_read(tmp_path):
    (tmp_path / "a.py").write_text("sam = dict(name=dict(name='sam2.1_l', image_size=512), checkpoint=None)")
    assert wanted([str(tmp_path / "a.py")]) == [PUBLISHED_FILES["sam2.1_l"]]
    (tmp_path / "b.py").write_text("sam = dict(name='vit_b', checkpoint=False)")
    with pytest.raises(ValueError, match="needs no weights"):
        wanted([str(tmp_path / "b.py")])


def test_checksums_are_those_in_the_names():
    for source in CHECKPOINTS.values():
        (entry,) = [entry for entry in PUBLISHED_FILES.values() if entry.file == source.file]
        assert len(entry.sha256) == 64 and entry.url == source.url
    assert PUBLISHED_FILES["yolox_l"].sha256 == "d3bd2b23" and PUBLISHED_FILES["dino_swin_l"].sha256 == "5486e051"
    assert not PUBLISHED_FILES["hdetr_r50"].sha256, "none is published"


def test_bad_names_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="unknown weights 'sam_x'; allowed: sam_b, "):
        wanted(["sam_x"])
    with pytest.raises(FileNotFoundError, match="no config"):
        wanted([str(tmp_path / "x.py")])
    with pytest.raises(ValueError, match="needs no weights"):
        wanted([str(ROOT / "mm_configs/demo_sam_tiny_w4a4.py")])


def test_the_tool_lists_and_checks(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("fetch_weights", ROOT / "tools" / "fetch_weights.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fetch_weights.py", "--folder", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as end:
            run_tool(tool.main)
        return end.value.code, capsys.readouterr()

    code, out = run("--list")
    assert code == 0 and all(entry.url in out.out for entry in PUBLISHED_FILES.values())
    assert "375,042,383 bytes, SHA-256 ec2df627" in out.out
    code, out = run("--check", "sam_b")
    assert (code, out.out) == (1, f"sam_b: {tmp_path / 'sam_vit_b_01ec64.pth'}: missing\n")
    monkeypatch.setattr(
        weights, "PUBLISHED_FILES", {"sam_b": replace(PUBLISHED_FILES["sam_b"], url="http://127.0.0.1:9/x.pth")}
    )
    code, out = run("sam_b")
    assert code == 2 and out.err.startswith("error: cannot fetch") and str(tmp_path) in out.err
