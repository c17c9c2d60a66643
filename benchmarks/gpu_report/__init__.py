"""Everything that a GPU is wanted for, in the time that there is, into one archive: ``make gpu-report``."""
