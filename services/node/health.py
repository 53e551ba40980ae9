"""Check that all given URLs answer, in images that have no curl: python -m services.node.health URL ..."""

from __future__ import annotations

import sys
import urllib.request

SECONDS = 4.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores the proxies that the environment names


def main() -> None:
    for url in sys.argv[1:]:
        DIRECT.open(url, timeout=SECONDS).close()


if __name__ == "__main__":
    main()
