"""`irgdistill export`."""
