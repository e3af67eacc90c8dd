"""One file per method. A new method is one new file here; tests and recipes import it by name."""
