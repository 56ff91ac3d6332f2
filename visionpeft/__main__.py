"""`python -m visionpeft` is the command `visionpeft`."""

from .cli import main

main()
