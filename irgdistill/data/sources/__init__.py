"""Data sources: each file declares what it opens. Imports no torch; packages are imported when a source is opened."""

from irgdistill.config import source as source
