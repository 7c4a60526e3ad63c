"""What a local Hub keeps: users, repositories with commits, and objects by sha256. Nothing of it touches a disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

TIME = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".png", ".gguf", ".model")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"


class Refused(Exception):
    """An answer that is an error: HTTP status, the Hub's error code (header X-Error-Code) and message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"  # of the token
    expired: bool = False


@dataclass(frozen=True)
class Blob:
    """A file of a commit: its bytes, and whether git holds only a pointer to them."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return POINTER.format(oid=self.sha256, size=len(self.data)).encode()

    @property
    def oid(self) -> str:
        """As git names what it holds."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    author: str
    parent: str | None
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """private: seen by its owner only. gated: metadata is public, files are for `granted` users and the owner."""

    id: str
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    def commit(self, revision: str = "main") -> Commit:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        found: list[Commit] = []
        oid: str | None = self.commit(revision).oid
        while oid is not None:
            found.append(self.commits[oid])
            oid = found[-1].parent
        return found

    def add(
        self,
        title: str,
        author: str,
        added: Mapping[str, Blob],
        deleted: tuple[str, ...] = (),
        branch: str = "main",
    ) -> Commit:
        """Commit on a branch; a deleted path that ends in / is a folder."""
        parent = self.refs.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path in deleted:
            gone = [name for name in files if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            for name in gone:
                del files[name]
        files |= added
        listing = "\n".join(f"{path} {blob.oid}" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{parent} {title} {author}\n{listing}".encode()).hexdigest()
        made = Commit(oid, title, author, parent, files)
        self.commits[oid] = made
        self.refs[branch] = oid
        return made

    def card(self, revision: str = "main") -> dict[str, Any]:
        """Front matter of README.md; what is no mapping counts as none."""
        blob = self.commit(revision).files.get("README.md")
        return front_matter(blob.data.decode()) if blob else {}

    def labels(self, revision: str = "main") -> list[str]:
        """Tags as the Hub derives them from the card."""
        card = self.card(revision)
        labels = [str(tag) for tag in card.get("tags") or []]
        labels += [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
        if card.get("license"):
            labels.append(f"license:{card['license']}")
        bases = card.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            labels.append(f"base_model:{base}")
            if card.get("base_model_relation"):
                labels.append(f"base_model:{card['base_model_relation']}:{base}")
        return list(dict.fromkeys(labels))


def front_matter(text: str) -> dict[str, Any]:
    if not text.startswith("---\n"):
        return {}
    found = yaml.safe_load(text[4:].partition("\n---")[0])
    return found if isinstance(found, dict) else {}


class Store:
    """Everything behind a lock; `objects` are what large-file uploads brought, committed or not."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.stored: list[str] = []  # sha256 of every object as it was completed, in order

    def user(self, token: str | None) -> User | None:
        if token is None:
            return None
        user = self.users.get(token)
        if user is None or user.expired:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, user: User | None) -> Repo:
        """A repository that the user may know of."""
        repo = self.repos.get(name)
        if repo is None or (repo.private and (user is None or user.name != repo.owner)):
            if user is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def readable(self, name: str, user: User | None) -> Repo:
        """A repository whose files the user may read."""
        repo = self.repo(name, user)
        if repo.gated and (user is None or user.name not in {repo.owner, *repo.granted}):
            how = (
                "You must be authenticated to access it."
                if user is None
                else "Visit the page to ask for access."
            )
            raise Refused(
                401 if user is None else 403, "GatedRepo", f"Access to model {name} is restricted. {how}"
            )
        return repo

    def writable(self, name: str, user: User | None) -> Repo:
        repo = self.repo(name, user)
        self.may_write(repo.owner, user)
        return repo

    def may_write(self, owner: str, user: User | None) -> None:
        if user is None:
            raise Refused(401, None, "Invalid username or password.")
        if user.name != owner or user.role == "read":
            raise Refused(
                403, None, f"You don't have the rights to create a model under the namespace {owner!r}"
            )

    def create(self, name: str, private: bool, user: User | None) -> Repo:
        """Like the Hub, with a first commit that says which files are large."""
        self.may_write(name.partition("/")[0], user)
        if name in self.repos:
            raise Refused(409, None, "You already created this model repo")
        repo = self.repos[name] = Repo(name, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.add("initial commit", repo.owner, {".gitattributes": Blob(attributes.encode(), False)})
        return repo

    def put(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        self.objects[oid] = data
        self.stored.append(oid)
        return oid


def is_large(path: str, size: int, sample: bytes) -> bool:
    """As the Hub decides: by .gitattributes, size (10 MB), or bytes that are no text."""
    return path.endswith(LFS_SUFFIXES) or size > 10_000_000 or b"\0" in sample
