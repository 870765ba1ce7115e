"""Run the command line: ``python -m celbo``."""

from celbo.app.cli import main

main()
