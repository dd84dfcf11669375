"""`python -m fasttrain_data`."""

from fasttrain_data.cli import main

main()
