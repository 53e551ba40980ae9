import sys

from services.jobs.app import main

if __name__ == "__main__":
    sys.exit(main())
