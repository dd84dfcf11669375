"""`python -m fasttrain`."""

from fasttrain.cli import main

main()
