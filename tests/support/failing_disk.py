"""A job on a disk that is full, then read-only, then in order: a script that runs in a separate mount namespace.

Arguments: the folder where the disk is mounted, the folder whose dataset it holds, and the command of the job. The last
line on stdout is one JSON object: of each run the exit status, stdout and stderr. The disk's memory is copied into the
current folder.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ray

from l2d_ray.command_line import load_config
from l2d_ray.distributed.job import connect
from support.scripts import run_script


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(disk: str, source: str, *job: str) -> None:
    mount("-t", "tmpfs", "-o", "size=250k", "tmpfs", disk)
    shutil.copytree(Path(source) / "dataset", Path(disk) / "dataset")
    connect(load_config(list(job[1:])))
    found = {"full": run_script([*job])}
    mount("-o", "remount,size=100m", disk)
    mount("--bind", disk, disk)  # on top of the other mount, in which the first run may have left a file open
    mount("-o", "remount,bind,ro", disk)
    found["read-only"] = run_script([*job])
    subprocess.run(["umount", "--lazy", disk], check=True)
    found["resumed"] = run_script([*job])
    shutil.copytree(Path(disk) / "memory", "memory")
    ray.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
