import sys

from services.node.node import main

if __name__ == "__main__":
    sys.exit(main())
