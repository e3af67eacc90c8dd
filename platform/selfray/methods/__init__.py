"""One file a method. Adding a method is adding a file here: tests and recipes import it by name."""
