"""What is done with a mixture of experts that is there: decode, trace."""
