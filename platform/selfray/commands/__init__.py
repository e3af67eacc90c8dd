"""The command line: one file for each sub-command of `selfray`, and what scripts share with it."""
