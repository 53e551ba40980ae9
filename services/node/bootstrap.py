"""Put the first key into the storage of a new platform: python -m services.node.bootstrap --storage URL --key FILE

`make secrets` makes the key; only its hash goes to the storage. Running this again changes nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from genmodels.errors import GenmodelsError
from genmodels.keys import Keys
from genmodels.storage import open_storage
from genmodels.storage.retry import retry_until_available

NAME = "bootstrap"


def main() -> int:
    parser = argparse.ArgumentParser(description="Put the first key into the storage.")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--key", type=Path, required=True, help="file with a key that `make secrets` made")
    options = parser.parse_args()
    try:
        token = options.key.read_text().strip()
        key = retry_until_available(lambda: Keys(open_storage(options.storage)).admit(token, NAME, ("admin",)))
    except (GenmodelsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"key {key.id} of {key.name} is in {options.storage}" + (", and revoked" if key.revoked else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
