"""Nothing of this machine is left in texts, and what is left in files is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.hub.privacy import Leak, Scrubber, Secrets, leaks

SECRETS = Secrets(
    folders=("/home/zaphod/work", "/home/zaphod", "/data"),
    names=("heart-of-gold", "zaphod"),
    tokens=("opensesame1",),
)
SCRUBBER = Scrubber(SECRETS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot read /home/zaphod/work/run/x.yaml: gone", "cannot read <path>: gone"),
        ("in '/opt/other/place/model' and \"/a/b\"", "in '<path>' and \"<path>\""),
        ("see ~/models/x, ~zaphod/y and file:///etc/passwd", "see <path>, <path> and <path>"),
        (r"C:\Users\Zaphod\x.txt or \\server\share\y", "<path> or <path>"),
        ("ran on heart-of-gold by Zaphod", "ran on <name> by <name>"),
        ("HF_TOKEN=opensesame1", "HF_TOKEN=<token>"),
        ("hf_abcdefghijklmnopqrst", "<token>"),
        ("Authorization: Bearer abcdefghijklmnop.qrs", "Authorization: Bearer <token>"),
        ("under /data", "under <path>"),
        (
            'bad\nTraceback (most recent call last):\n  File "/x/y.py", line 3, in f\n    g()\nKeyError: 1',
            "bad\nKeyError: 1",
        ),
    ],
)
def test_private_words_are_replaced(text: str, expected: str) -> None:
    assert SCRUBBER.text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "org/name at https://huggingface.co/org/name/blob/main/README.md",
        "1/2 of the items, and/or others; acc,none; 3 s/candidate",
        "zoo:tiny/base and ./left",
        "weights of layers.0.attn: 0.25",
        "zaphods and heart-of-golden",
        "563cbe99eb4637d3d03595306751d85f097c94e15f62ca39a85994e4e5e6d84a",
        "/",
        "a / b",
    ],
)
def test_other_words_are_kept(text: str) -> None:
    assert SCRUBBER.text(text) == text


def test_data_is_scrubbed_in_depth() -> None:
    data = {"a": ["/x/y/z", {"/home/zaphod": 1.5}], "b": None, "c": True}
    assert SCRUBBER.data(data) == {"a": ["<path>", {"<path>": 1.5}], "b": None, "c": True}


def test_every_kind_of_leak_is_found_in_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "README.md").write_text("see https://huggingface.co/zaphods/data and the path data/x")
    pyarrow.parquet.write_table(pyarrow.table({"a": ["org/name", None], "n": [1, 2]}), clean / "a.parquet")
    (clean / "tokenizer.json").write_text(json.dumps({"vocab": {"zaphod": 1}}))
    assert leaks(clean, SECRETS, ["a question of sixteen"]) == []

    bad = tmp_path / "bad"
    (bad / "journal").mkdir(parents=True)
    (bad / "a.yaml").write_text("folder: /home/zaphod/models")
    table = pyarrow.table({"error": ["on Heart-of-Gold"], "doc": ["Q: a question of sixteen?"]})
    pyarrow.parquet.write_table(table, bad / "journal" / "b.parquet")
    (bad / "c.json").write_text('{"t": "hf_abcdefghijklmnopqrst"}')
    (bad / "d.txt").write_text("opensesame1")
    header = b'{"__metadata__": {"from": "/data/x"}}'
    (bad / "e.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    found = leaks(bad, SECRETS, ["a question of sixteen"])
    assert {leak.file for leak in found} == {
        *("a.yaml", "journal/b.parquet", "c.json", "d.txt", "e.safetensors"),
    }
    assert Leak("a.yaml", "a path of this machine") in found
    assert Leak("journal/b.parquet", "the name of this host or user") in found
    assert Leak("journal/b.parquet", "text of an item") in found
    assert Leak("c.json", "a token") in found


def test_the_text_of_a_picture_is_looked_at_and_its_pixels_are_not(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + b"\0\0\0\0"

    start = b"\x89PNG\r\n\x1a\n"
    (tmp_path / "pixels.png").write_bytes(start + chunk(b"IDAT", b" zaphod ") + chunk(b"IEND", b""))
    (tmp_path / "text.png").write_bytes(start + chunk(b"tEXt", b"Author\0zaphod") + chunk(b"IEND", b""))
    assert [leak.file for leak in leaks(tmp_path, SECRETS)] == ["text.png"]


def test_the_machine_is_asked_for_what_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "trillian"))
    monkeypatch.setenv("LOGNAME", "trillian")
    monkeypatch.setenv("HF_TOKEN", "something-secret")
    monkeypatch.setenv("MY_API_KEY", "another-secret")
    monkeypatch.setenv("TOKEN_FILE", "/run/secrets/token")
    found = Secrets.of_machine([tmp_path / "run"])
    assert str(tmp_path / "trillian") in found.folders and str(tmp_path / "run") in found.folders
    assert "trillian" in found.names
    assert {"something-secret", "another-secret"} <= set(found.tokens)
    assert "/run/secrets/token" not in found.tokens
    # whose name is in the repository's publishes it
    assert "trillian" not in Secrets.of_machine([], ["trillian/fish"]).names


def test_a_page_keeps_its_scripts_and_shows_where_something_was() -> None:
    page = (
        "<p>zaphod in /home/zaphod/x</p><script>zaphod.max('/home/zaphod/x')</script>"
        '<script type="application/json" id="d">["/home/zaphod/x"]</script>'
    )
    assert SCRUBBER.page(page) == (
        "<p>&lt;name&gt; in &lt;path&gt;</p><script>zaphod.max('/home/zaphod/x')</script>"
        '<script type="application/json" id="d">["<path>"]</script>'
    )
