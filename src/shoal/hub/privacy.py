"""What must not be published: paths of this machine, its and its user's name, tokens, tracebacks.

`Scrubber` takes them out of texts; `leaks` looks for them in a finished folder and is asked before anything leaves it.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# access tokens by their form: Hugging Face, GitHub, GitLab, OpenAI and Anthropic, AWS, Slack, a bearer header
TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|(?<=[Bb]earer )[\w.~+/-]{16,}=*"
)
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):(?:\n(?=[ \t]).*|\n(?=\s*$))*\n?")
_FRAME = re.compile(r'^\s*File "[^"\n]*", line \d+.*\n?(?:^\s{4,}.*\n?)?', re.MULTILINE)
# absolute places: /a/b, ~/a, ~user/a, C:\a, \\server\a, file://; not the path of a URL and not 1/2 or org/name
_PATH = re.compile(
    r"file://[^\s'\"<>|]*|(?<![\w.:/~<-])~\w*/[^\s'\"<>|:,;)\]}]*"
    r"|(?<![\w.:/~<-])/(?=[\w.~])[^\s'\"<>|:,;)\]}/]+(?:/[^\s'\"<>|:,;)\]}]*)"
    r"|(?<!\w)[A-Za-z]:\\[^\s'\"<>|,;]*|\\\\[\w.-]+\\[^\s'\"<>|,;]*"
)
# names that tell nothing, or are words of every log
_COMMON = {
    *(
        "root",
        "user",
        "users",
        "ubuntu",
        "admin",
        "runner",
        "jovyan",
        "docker",
        "nobody",
        "guest",
        "test",
        "build",
    ),
    *(
        "localhost",
        "localhost.localdomain",
        "none",
        "base",
        "model",
        "task",
        "item",
        "search",
        "main",
        "home",
    ),
}
_TEXT_BYTES = 256 << 20
_LONG = 5  # letters of a name from which its turning up is no chance; shorter ones are taken out of free texts all the same
_NAME = "the name of this host or user"
_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "added_tokens.json", "report.html"),
)


@dataclass(frozen=True)
class Secrets:
    """What is private on this machine: folders, names of host and user, values of tokens.

    keep: words that are published anyway (names of models, tasks, the recipe), and so give nothing away.
    """

    folders: tuple[str, ...]
    names: tuple[str, ...]
    tokens: tuple[str, ...]

    @staticmethod
    def of_machine(folders: Iterable[Path] = (), keep: Iterable[str] = ()) -> Secrets:
        """Of this process: home, working directory, caches, `folders`; host and user; tokens from where tools keep them."""
        kept = {w.lower() for text in keep for w in re.findall(r"[\w.-]+|[A-Za-z0-9]+", text)}
        kept |= {part for word in kept for part in re.split(r"[\W_]+", word)}
        places = {str(p) for p in (*folders, Path.home(), Path.cwd(), tempfile.gettempdir(), *_caches())}
        places |= {os.path.realpath(p) for p in places}
        names = {n for n in _names() if len(n) >= 3 and n.lower() not in _COMMON | kept}
        return Secrets(
            folders=tuple(sorted((p for p in places if len(p) > 2), key=len, reverse=True)),
            names=tuple(sorted(names, key=len, reverse=True)),
            tokens=tuple(sorted(set(_tokens()), key=len, reverse=True)),
        )


def _caches() -> Iterator[str]:
    for name in ("HF_HOME", "HF_HUB_CACHE", "SHOAL_CACHE", "XDG_CACHE_HOME", "VIRTUAL_ENV"):
        if os.environ.get(name):
            yield os.environ[name]


def _names() -> Iterator[str]:
    with suppress(OSError):
        host = socket.gethostname()
        yield host
        yield host.partition(".")[0]
    with suppress(OSError, KeyError, ImportError):
        yield getpass.getuser()
    with suppress(RuntimeError):
        yield str(Path.home().name)


def _tokens() -> Iterator[str]:
    found = []
    for name, value in os.environ.items():
        if re.search(r"TOKEN|SECRET|API_KEY|PASSWORD", name) and len(value) >= 8 and not value.isdigit():
            found.append(value)
    yield from (value for value in found if os.sep not in value)  # else a file that holds it
    import huggingface_hub

    with suppress(OSError, ValueError):
        token = huggingface_hub.get_token()
        if token:
            yield token


class Scrubber:
    """Replaces what is private in texts and in data; `<path>`, `<host>`, `<token>` stand where it was."""

    def __init__(self, secrets: Secrets) -> None:
        self.secrets = secrets
        parts = [
            rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])" for name in secrets.names if len(name) >= 3
        ]
        self._names = re.compile("|".join(parts), re.IGNORECASE) if parts else None

    def text(self, text: str) -> str:
        text = self.known(_FRAME.sub("", _TRACEBACK.sub("", text)))
        text = _PATH.sub("<path>", text)
        return self._names.sub("<name>", text) if self._names is not None else text

    def known(self, text: str) -> str:
        """Only what is known to be this machine's: its folders and tokens, and what has the form of a token."""
        for token in self.secrets.tokens:
            text = text.replace(token, "<token>")
        text = TOKEN.sub("<token>", text)
        for folder in self.secrets.folders:
            text = re.sub(rf"{_folder(folder)}(?:/[^\s'\"<>|:,;)\]}}\\]*|(?![\w-]))", "<path>", text)
        return text

    def known_data(self, data: Any) -> Any:
        """As `known` in every text of nested data; keys stay."""
        if isinstance(data, str):
            return self.known(data)
        if isinstance(data, Mapping):
            return {key: self.known_data(value) for key, value in data.items()}
        return [self.known_data(value) for value in data] if isinstance(data, Sequence) else data

    def page(self, html: str) -> str:
        """As `known`, and names, in text and attributes; data in scripts as `known`.

        Scripts that run and styles stay: they are ours, and the page's policy lets a script run by its hash alone.
        """
        parts = re.split(r"(<script\b.*?</script>|<style\b.*?</style>)", html, flags=re.DOTALL)
        return "".join(self._script(part) if i % 2 else self._markup(part) for i, part in enumerate(parts))

    def _script(self, part: str) -> str:
        return self.known(part) if re.match(r'<script\b[^>]*"application/json"', part) else part

    def _markup(self, part: str) -> str:
        found = re.sub(r"<(path|token)>", r"&lt;\1&gt;", self.known(part))
        return self._names.sub("&lt;name&gt;", found) if self._names is not None else found

    def data(self, data: Any) -> Any:
        """The same in every text of nested lists and mappings, keys included."""
        if isinstance(data, str):
            return self.text(data)
        if isinstance(data, Mapping):
            return {self.text(str(key)): self.data(value) for key, value in data.items()}
        if isinstance(data, Sequence):
            return [self.data(value) for value in data]
        return data


def _folder(folder: str) -> str:
    """A pattern for a folder; one of a single part, `/data`, is also the end of many an address, and is none there."""
    return re.escape(folder) if folder.count("/") > 1 else rf"(?<![\w.~%-]){re.escape(folder)}"


@dataclass(frozen=True)
class Leak:
    """Something private in a file; `what` names its kind and not itself."""

    file: str
    what: str


def leaks(folder: Path, secrets: Secrets, texts: Sequence[str] = ()) -> list[Leak]:
    """What is private in the files of a folder: text files as they are, parquet decoded, weights by their header.

    texts: item texts that must not be there either (short ones are not looked for: they are in every text).
    """
    tests = _tests(secrets, texts)
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = _content(path)
        name = path.relative_to(folder).as_posix()
        for what, test in tests:
            # a short name is among the words of a vocabulary, and in the code of a plotting library
            if what == _NAME and path.name in _VOCABULARIES:
                continue
            if test(content) or test(name):
                found.append(Leak(name, what))
    return found


def _tests(secrets: Secrets, texts: Sequence[str]) -> list[tuple[str, Callable[[str], bool]]]:
    tests: list[tuple[str, Callable[[str], bool]]] = [("a token", lambda text: bool(TOKEN.search(text)))]
    if secrets.tokens:
        tests.append(("a token", lambda text: any(token in text for token in secrets.tokens)))
    if secrets.folders:
        places = re.compile("|".join(rf"{_folder(f)}(?=[/\s'\":,;)]|$)" for f in secrets.folders))
        tests.append(("a path of this machine", lambda text: bool(places.search(text))))
    if long := [name for name in secrets.names if len(name) >= _LONG]:
        parts = (rf"(?<![A-Za-z0-9]){re.escape(n)}(?![A-Za-z0-9])" for n in long)
        names = re.compile("|".join(parts), re.IGNORECASE)
        tests.append((_NAME, lambda text: bool(names.search(text))))
    longer = sorted({text.strip() for text in texts if len(text.strip()) >= 16})
    if longer:
        tests.append(("text of an item", lambda text: any(item in text for item in longer)))
    return tests


def _content(path: Path) -> str:
    """What there is to read in a file: of weights the header, of pictures their text chunks."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        values = [str(table.schema.metadata or "")]
        for column in table.columns:
            if str(column.type) in ("string", "large_string"):
                values += [str(v) for v in set(column.to_pylist()) if v is not None]
        return "\n".join(values)
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            size = int.from_bytes(file.read(8), "little")
            return file.read(min(size, _TEXT_BYTES)).decode("utf-8", "replace")
        content = file.read(_TEXT_BYTES)
    return _picture_text(content) if path.suffix == ".png" else content.decode("utf-8", "replace")


def _picture_text(content: bytes) -> str:
    """All chunks of a PNG but the compressed pixels, in which any short word turns up by chance."""
    kept, at = [], 8
    while at + 8 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] != b"IDAT":
            kept.append(content[at + 8 : at + 8 + size])
        at += 12 + size
    return b"\n".join(kept).decode("utf-8", "replace")
