import sys

from services.jobs.app import main

sys.exit(main())
