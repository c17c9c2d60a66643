"""What versions of Megatron do in different ways, done in one: a module for each difference.  Imports ``upstream``."""
