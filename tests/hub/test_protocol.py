"""The local Hub speaks what the real client asks for: every part of the protocol, and every fault, by huggingface_hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hub.client import OTHER, TOKEN, Client
from hub.local_hub import LocalHub

CARD = (
    b"---\nlicense: mit\ntags: [shoal, merge]\nbase_model: [org/base]\nlibrary_name: shoal\n---\n# A merge\n"
)


@pytest.fixture
def api(hub: LocalHub) -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def addition(path: str, data: bytes) -> Any:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path, data)


def weights(value: float = 0.0, size: int = 12) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save({"a": np.full(size, value, dtype=np.float32)})


def test_who_am_i(api: Any, client: Client) -> None:
    assert api.whoami()["name"] == "anna"
    client.token(OTHER)
    assert api.whoami()["name"] == "bert"


def test_an_expired_token_is_refused(api: Any, hub: LocalHub, client: Client) -> None:
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    hub.add_user("anna", "hf_old", expired=True)
    client.token("hf_old")
    with pytest.raises(HfHubHTTPError) as caught:
        api.model_info("anna/m")
    assert caught.value.response.status_code == 401
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_a_repository_is_created_once(api: Any, hub: LocalHub) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    assert api.create_repo("anna/m", private=True).repo_id == "anna/m"
    assert hub.store.repos["anna/m"].private
    with pytest.raises(HfHubHTTPError):
        api.create_repo("anna/m")
    assert api.create_repo("anna/m", exist_ok=True).repo_id == "anna/m"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("bert/m")


def test_files_become_visible_by_one_commit(api: Any, hub: LocalHub) -> None:
    api.create_repo("anna/m")
    head = api.model_info("anna/m").sha
    operations = [
        addition("README.md", CARD),
        addition("model.safetensors", weights()),
        addition("a/b.json", b"{}"),
    ]
    for operation in operations:
        api.preupload_lfs_files("anna/m", [operation], free_memory=False)
    assert api.model_info("anna/m").sha == head
    made = api.create_commit("anna/m", operations, commit_message="all", parent_commit=head)
    info = api.model_info("anna/m", files_metadata=True)
    assert info.sha == made.oid
    files = {s.rfilename: s for s in info.siblings}
    assert files["model.safetensors"].lfs.sha256 == hashlib.sha256(weights()).hexdigest()
    assert files["model.safetensors"].size == len(weights())
    assert files["README.md"].lfs is None
    assert info.card_data.base_model == ["org/base"]
    assert {"shoal", "license:mit", "base_model:org/base"} <= set(info.tags)
    assert info.safetensors.parameters == {"F32": 12}
    assert [c.title for c in api.list_repo_commits("anna/m")] == ["all", "initial commit"]


def test_large_files_travel_in_parts(api: Any, hub: LocalHub) -> None:
    hub.part_size = 1000
    data = bytes(range(256)) * 10
    api.create_repo("anna/m")
    api.create_commit("anna/m", [addition("model.safetensors", data)], commit_message="large")
    assert hub.count("PUT", "/upload/") == 3
    assert hub.store.repos["anna/m"].commit().files["model.safetensors"].data == data


def test_storage_never_sees_a_token(api: Any, hub: LocalHub, tmp_path: Path) -> None:
    api.create_repo("anna/m")
    api.create_commit("anna/m", [addition("model.safetensors", weights())], commit_message="all")
    api.hf_hub_download("anna/m", "model.safetensors")
    at_storage = [request for request in hub.seen if request.place == "storage"]
    assert {request.method for request in at_storage} == {"PUT", "GET"}
    assert not any(request.authorized for request in at_storage)


def test_a_commit_on_an_older_one_is_refused(api: Any, hub: LocalHub) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    api.create_repo("anna/m")
    head = api.model_info("anna/m").sha
    hub.foreign_commit("anna/m")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit("anna/m", [addition("x.json", b"{}")], commit_message="late", parent_commit=head)
    assert caught.value.response.status_code == 412


def test_a_large_file_must_be_there_before_it_is_committed(api: Any, hub: LocalHub) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    api.create_repo("anna/m")
    operation = addition("model.safetensors", weights())
    api.preupload_lfs_files("anna/m", [operation], free_memory=False)
    hub.store.objects.clear()
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.create_commit("anna/m", [operation], commit_message="all")


def test_deletions(api: Any, hub: LocalHub) -> None:
    hub.add_repo("anna/m", {"a.json": b"{}", "b/c.json": b"{}", "b/d.json": b"{}", "e.json": b"{}"})
    api.delete_file("a.json", "anna/m")
    api.delete_folder("b/", "anna/m")
    assert api.list_repo_files("anna/m") == ["e.json"]


def test_metadata_are_validated(api: Any) -> None:
    from huggingface_hub import RepoCard

    RepoCard(CARD.decode()).validate(repo_type="model")
    for wrong in ("license: nonsense", "base_model: [1]", "base_model_relation: child", "tags: one"):
        with pytest.raises(ValueError, match=r"must be|not valid"):
            RepoCard(f"---\n{wrong}\n---\n").validate(repo_type="model")


def test_listing_by_tag_author_and_page(api: Any, hub: LocalHub, client: Client) -> None:
    hub.page = 2
    for index in range(5):
        hub.add_repo(f"anna/m{index}", {"README.md": CARD})
    hub.add_repo("bert/n", {"README.md": CARD})
    hub.add_repo("bert/other", {"README.md": b"# none"})
    hub.add_repo("bert/hidden", {"README.md": CARD}, private=True)
    assert [m.id for m in api.list_models(filter="shoal")] == [*(f"anna/m{i}" for i in range(5)), "bert/n"]
    assert [m.id for m in api.list_models(filter=["shoal", "merge"], author="bert")] == ["bert/n"]
    assert list(api.list_models(filter="shoal-recipe")) == []
    client.token(OTHER)
    assert "bert/hidden" in [m.id for m in api.list_models(filter="shoal")]


def test_tree_and_paths(api: Any, hub: LocalHub) -> None:
    hub.page = 2
    hub.add_repo(
        "anna/m", {"a.json": b"{}", "b/c.json": b"{}", "b/d.json": b"{}", "model.safetensors": weights()}
    )
    names = [entry.path for entry in api.list_repo_tree("anna/m", recursive=True)]
    assert names == ["a.json", "b", "b/c.json", "b/d.json", "model.safetensors"]
    assert [entry.path for entry in api.list_repo_tree("anna/m")] == ["a.json", "b", "model.safetensors"]
    (info,) = api.get_paths_info("anna/m", ["model.safetensors"])
    assert info.lfs.sha256 == hashlib.sha256(weights()).hexdigest()
    assert api.file_exists("anna/m", "a.json") and not api.file_exists("anna/m", "z.json")


def test_revisions(api: Any, hub: LocalHub) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    repo = hub.add_repo("anna/m", {"a.json": b"1"})
    first = repo.commit().oid
    repo.tags["v1"] = first
    hub.foreign_commit("anna/m", "a.json")
    assert Path(api.hf_hub_download("anna/m", "a.json", revision="v1")).read_bytes() == b"1"
    assert Path(api.hf_hub_download("anna/m", "a.json", revision=first)).read_bytes() == b"1"
    assert Path(api.hf_hub_download("anna/m", "a.json")).read_bytes() == b"theirs\n"
    assert [tag.name for tag in api.list_repo_refs("anna/m").tags] == ["v1"]
    with pytest.raises(RevisionNotFoundError):
        api.model_info("anna/m", revision="v2")


def test_a_whole_snapshot(hub: LocalHub) -> None:
    from huggingface_hub import snapshot_download

    repo = hub.add_repo("anna/m", {"a.json": b"{}", "model.safetensors": weights(), "x.bin": b"\0"})
    folder = Path(snapshot_download("anna/m", allow_patterns=["*.json", "*.safetensors"]))
    assert folder.name == repo.commit().oid
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == weights()


def test_private_and_gated(api: Any, hub: LocalHub, client: Client) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub.add_repo("bert/p", {"a.json": b"{}"}, private=True)
    hub.add_repo("bert/g", {"a.json": b"{}"}, gated="manual")
    for token in (TOKEN, None):
        client.token(token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("bert/p")
        assert api.model_info("bert/g").gated == "manual"
        with pytest.raises(GatedRepoError):
            api.auth_check("bert/g")
        with pytest.raises(GatedRepoError):
            api.hf_hub_download("bert/g", "a.json")
    client.token(TOKEN)
    hub.store.repos["bert/g"].granted.add("anna")
    api.hf_hub_download("bert/g", "a.json")


def test_an_upload_that_is_cut_is_sent_again(api: Any, hub: LocalHub, sleeps: list[float]) -> None:
    api.create_repo("anna/m")
    hub.fault("cut-request", "PUT /upload/", times=2)
    api.create_commit("anna/m", [addition("model.safetensors", weights(size=100_000))], commit_message="all")
    assert [kind for kind, _ in hub.faults.happened] == ["cut-request", "cut-request"]
    assert hub.store.repos["anna/m"].commit().files["model.safetensors"].data == weights(size=100_000)
    assert sleeps


def test_a_download_that_is_cut_goes_on_by_range(
    api: Any, hub: LocalHub, client: Client, sleeps: list[float]
) -> None:
    client.patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    data = weights(size=2_000_000)
    hub.add_repo("anna/m", {"model.safetensors": data})
    hub.fault("cut-response", "GET /object/")
    assert Path(api.hf_hub_download("anna/m", "model.safetensors")).read_bytes() == data
    ranges = [request.range for request in hub.seen if request.method == "GET" and request.place == "storage"]
    assert len(ranges) == 2 and ranges[0] is None and (ranges[1] or "").startswith("bytes=")


def test_the_wait_that_is_asked_for(api: Any, hub: LocalHub, sleeps: list[float]) -> None:
    hub.add_repo("anna/m", {"a.json": b"{}"})
    hub.fault("status", "GET /api/models/anna/m/tree", status=429, headers={"Retry-After": "7"})
    assert [entry.path for entry in api.list_repo_tree("anna/m")] == ["a.json"]
    assert 8.0 in sleeps


def test_wrong_bytes_and_lost_answers(api: Any, hub: LocalHub) -> None:
    import httpx2

    hub.add_repo("anna/m", {"model.safetensors": weights()})
    hub.fault("corrupt", "GET /object/")
    assert Path(api.hf_hub_download("anna/m", "model.safetensors")).read_bytes() != weights()
    hub.fault("lose-response", "POST .*/commit/")
    with pytest.raises(httpx2.RemoteProtocolError):
        api.create_commit("anna/m", [addition("a.json", b"{}")], commit_message="lost")
    assert "a.json" in hub.store.repos["anna/m"].commit().files
