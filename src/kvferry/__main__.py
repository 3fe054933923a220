"""`python -m kvferry` is `kvferry`."""

from __future__ import annotations

import sys

from kvferry.cli import main

sys.exit(main())
