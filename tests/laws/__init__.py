"""Laws: sentences that hold for any input, each the docstring of its property test."""
