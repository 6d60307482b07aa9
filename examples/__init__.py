"""Examples: two runs on real images, with the data and the networks they share."""
