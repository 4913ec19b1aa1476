"""upcycle."""
