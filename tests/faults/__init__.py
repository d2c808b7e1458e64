"""Tools that break inputs and kill runs: `make faults` and `make kills`; small numbers of both run in the tests."""
