"""One module per command of `fasttrain-data`; each imports what it needs when it runs."""
