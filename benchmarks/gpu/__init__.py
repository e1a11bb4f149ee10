"""Everything that needs a card, in one command of at most six minutes: `make gpu`."""
