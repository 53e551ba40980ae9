import sys

from services.node.node import main

sys.exit(main())
