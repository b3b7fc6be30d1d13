"""`irgdistill inspect-graph`."""
