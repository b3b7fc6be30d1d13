"""Loss terms, a file for each family. Every file here is imported with the settings: it imports torch lazily."""
