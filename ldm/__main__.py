"""`python -m ldm`, where the command is not on the path."""

from ldm.cli import main

main()
