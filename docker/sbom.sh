#!/bin/sh
# make sbom: list the contents of the image's Python environment, as CycloneDX, in sbom.json. The tool is installed into a
# container that is removed afterwards, never into the image.
set -eu
image=$1
docker run --rm --user 0 --entrypoint sh "$image" -ec '
    /usr/local/bin/python -m venv /tmp/tool
    /tmp/tool/bin/pip install -q cyclonedx-bom==7.5.0 >&2
    /tmp/tool/bin/cyclonedx-py environment --output-format JSON --output-reproducible /opt/genmodels/bin/python
' > sbom.json
echo "sbom.json: $(grep -c '"bom-ref"' sbom.json) entries"
