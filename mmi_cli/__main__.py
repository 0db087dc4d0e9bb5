"""`python -m mmi_cli` is `mmi`."""

from __future__ import annotations

import sys

from mmi_cli.main import main

sys.exit(main())
