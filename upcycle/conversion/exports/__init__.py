"""One file for each target of `upcycle.conversion.export`."""
