"""`python -m irgdistill`"""

from __future__ import annotations

from irgdistill.cli.app import main

main()
