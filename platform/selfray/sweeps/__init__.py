"""What a sweep asks and how it chooses: no Ray in here."""
