"""Licences: the table is sound, and the rule over parents gives what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import PublishError
from shoal.hub.licences import Licence, ParentLicence, check_name, lookup, recognise, table, terms

# of https://huggingface.co/docs/hub/repositories-licenses
HUB = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "bsd-2-clause", "bsd-3-clause", "cc0-1.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-permissive-2.0", "wtfpl", "agpl-3.0",
    "gpl-2.0", "gpl-3.0", "lgpl-3.0", "isc", "mpl-2.0", "unlicense", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "gemma",
}  # fmt: skip


def parent(name: str, stated: str, link: str = "") -> ParentLicence:
    return ParentLicence(f"org/{name}", stated, f"README.md of org/{name}", lookup(stated), link)


def parents(*stated: str) -> list[ParentLicence]:
    return [parent(f"p{number}", text) for number, text in enumerate(stated)]


def by_rule(*stated: str, repo: str = "ann/Llama-3-fish") -> str:
    license_ = terms(parents(*stated), repo).license
    return license_.get("license_name", license_["license"])


@pytest.mark.parametrize("licence", table().values(), ids=str)
def test_every_entry_says_where_it_is_from_and_contradicts_nothing(licence: Licence) -> None:
    assert licence.name and licence.source and licence.checked and licence.link.startswith("http")
    assert licence.hub == (licence.id in HUB)
    assert set(licence.compatible) | set(licence.incompatible) <= set(table())
    assert not (licence.share_alike and licence.passes_on)
    assert licence.may_become(licence.id)
    assert lookup(licence.name.upper()) is licence and lookup(licence.id) is licence


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (["mit"], "mit"),
        (["mit", "apache-2.0", "mit"], "apache-2.0"),
        (["Apache 2.0", "cc-by-4.0"], "apache-2.0"),
        (["apache-2.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["lgpl-3.0", "gpl-3.0", "mpl-2.0"], "gpl-3.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit"], "cc-by-nc-sa-4.0"),
        (["apache-2.0", "llama3.1"], "llama3.1"),
        (["gemma", "llama3.2", "mit"], "gemma-and-llama3.2"),
        (["qwen", "apache-2.0"], "qwen"),
        (["tongyi-qianwen-license-agreement"], "tongyi-qianwen"),
        (["mpl-2.0", "gpl-2.0"], "gpl-2.0"),
        (["gpl-3.0", "agpl-3.0"], "agpl-3.0"),
        (["cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-4.0"], "cc-by-sa-4.0"),
        (["cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"], "cc-by-nc-sa-4.0"),
        (["apache-2.0", "bigcode-openrail-m"], "bigcode-openrail-m"),
        (["llama4", "mit"], "llama4"),
    ],
)
def test_the_licence_of_a_merge(stated: list[str], expected: str) -> None:
    assert by_rule(*stated) == expected
    assert by_rule(*reversed(stated)) == expected


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (["mit", "cc-by-nd-4.0"], "no derivatives"),
        (["cc-by-nc-nd-3.0"], "no derivatives"),
        (["gpl-2.0", "gpl-3.0"], "contradict"),
        (["cc-by-sa-3.0", "gpl-3.0"], "contradict"),
        (["openrail", "mit"], "'openrail', which shoal does not know"),
        (["gpl-3.0", "llama3.1"], "contradict"),
        (["gpl-2.0", "apache-2.0"], "contradict"),
        (["cc-by-sa-4.0", "cc-by-nc-sa-4.0"], "contradict"),
        (["cc-by-nc-4.0", "gpl-3.0"], "contradict"),
        (["mit", ""], "states none"),
        (["mit", "fancy-licence-9"], "'fancy-licence-9', which shoal does not know"),
    ],
)
def test_what_is_refused(stated: list[str], words: str) -> None:
    with pytest.raises(PublishError, match=words) as error:
        terms(parents(*stated), "ann/Llama-3-fish")
    assert "\n" not in str(error.value)


def test_obligations_of_all_parents_are_gathered() -> None:
    found = terms(parents("llama3.1", "qwen-research", "apache-2.0"), "ann/llama-fish")
    assert found.license == {
        "license": "other",
        "license_name": "llama3.1-and-qwen-research",
        "license_link": "LICENSE.md",
    }
    assert found.statements == ("Built with Llama", "Built with Qwen")
    assert [n.partition(" is licensed")[0] for n in found.notices] == ["Llama 3.1", "Qwen"]
    assert found.non_commercial and found.prefixes == ("Llama",)


def test_a_licence_that_the_hub_does_not_know_keeps_the_parents_link() -> None:
    link = "https://example.org/qwen"
    found = terms([parent("a", "qwen", link)], "ann/fish")
    assert found.license == {"license": "other", "license_name": "qwen", "license_link": link}


@pytest.mark.parametrize(
    ("repo", "stated", "good"),
    [
        ("ann/Llama-3-fish", "llama3", True),
        ("ann/llama3.fish", "llama3", True),
        ("ann/Llama-fish", "llama3", False),
        ("ann/Llama-fish", "llama3.3", True),
        ("ann/fish-Llama", "llama3.3", False),
        ("llama/fish", "llama3.3", False),
        ("ann/fish", "apache-2.0", True),
    ],
)
def test_the_name_of_the_repo(repo: str, stated: str, good: bool) -> None:
    if good:
        terms(parents(stated), repo)
        return
    with pytest.raises(PublishError, match=r"begins with 'Llama.*name it e\.g\. \w+/Llama") as error:
        terms(parents(stated), repo)
    proposed = str(error.value).rpartition(" ")[2]
    check_name(proposed, table()[stated].prefix.splitlines())


def test_a_stated_licence_is_for_parents_without_one_and_is_quoted() -> None:
    found = terms(parents("llama3.1", "", "strange"), "ann/Llama-x", "MIT")
    assert found.license["license"] == "llama3.1"
    assert found.quoted == 'stated by the publisher for org/p1, org/p2: "MIT"'
    own = terms(parents("mit", ""), "ann/x", "Our House License 1.0")
    assert own.license == {
        "license": "other",
        "license_name": "our-house-license-1.0",
        "license_link": "LICENSE.md",
    }
    with pytest.raises(PublishError, match="no derivatives"):
        terms(parents("mit", ""), "ann/x", "cc-by-nd-4.0")


def test_a_stated_licence_cannot_overrule_what_is_known() -> None:
    assert terms(parents("mit"), "ann/x", "apache-2.0").license == {"license": "apache-2.0"}
    with pytest.raises(PublishError, match=r"known \(llama3\.1\) and give llama3\.1; leave --license out"):
        terms(parents("llama3.1"), "ann/Llama-x", "mit")
    with pytest.raises(PublishError, match="leave --license out"):
        terms(parents("mit"), "ann/x", "my own")
    assert terms(parents("gpl-3.0", "agpl-3.0"), "ann/x", "agpl-3.0").license == {"license": "agpl-3.0"}
    for stated, wanted in (("gpl-3.0", "agpl-3.0"), ("mpl-2.0", "gpl-3.0")):  # only beside what is under it
        with pytest.raises(PublishError, match=f"give {stated}; leave --license out"):
            terms(parents(stated), "ann/x", wanted)


def test_what_the_hub_has_no_id_for_is_named_with_its_link() -> None:
    found = terms(parents("llama4"), "ann/Llama-x")
    assert found.license == {
        "license": "other",
        "license_name": "llama4",
        "license_link": "https://www.llama.com/llama4/license/",
    }
    assert "European Union" in found.remarks[0]


def test_licence_files_are_recognised() -> None:
    here = (Path(__file__).parents[2] / "LICENSE").read_text()
    assert recognise(here) is table()["apache-2.0"]
    assert recognise("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nLlama 3.2 Version") is table()["llama3.2"]
    assert recognise("Attribution-NonCommercial-ShareAlike 4.0\nInternational") is table()["cc-by-nc-sa-4.0"]
    nvidia = "NVIDIA Open Model License Agreement\nVersion Release Date: October 24, 2025"
    assert recognise(nvidia) is table()["nvidia-open-model-license"]
    assert recognise("Tongyi Qianwen RESEARCH LICENSE AGREEMENT") is None
    assert recognise("All rights reserved.") is None


def test_a_wheel_holds_the_table() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "hub/licences.yaml" in project["tool"]["setuptools"]["package-data"]["shoal"]
