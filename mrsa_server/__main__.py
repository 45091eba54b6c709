"""`python -m mrsa_server` is `mrsa`."""

import sys

from mrsa_server.cli import main

sys.exit(main())
