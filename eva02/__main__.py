import sys

from eva02.cli import main

sys.exit(main())
