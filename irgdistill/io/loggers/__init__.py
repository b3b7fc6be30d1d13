"""Loggers, which take a run's records and pictures as well. Each file declares one; those packages load when used."""
