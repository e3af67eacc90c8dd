"""Named Experiments: one value for each method and data set, each a lab note."""
