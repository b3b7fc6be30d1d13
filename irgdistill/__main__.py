"""`python -m irgdistill`"""

from irgdistill.cli import main

main()
