"""`irgdistill doctor`."""
