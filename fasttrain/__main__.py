"""`python -m fasttrain`."""

from fasttrain.command import main

main()
