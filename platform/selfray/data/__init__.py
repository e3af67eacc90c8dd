"""Images on disks and in object stores: what is there, how it is read, in which order."""
