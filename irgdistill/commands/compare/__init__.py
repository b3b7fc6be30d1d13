"""`irgdistill compare`."""
