"""`python -m celbo`: the command line."""

from celbo.app.cli import main

main()
