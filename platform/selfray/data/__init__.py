"""Images on disks and in object stores: finding them, converting them to shards, and reading
them."""
