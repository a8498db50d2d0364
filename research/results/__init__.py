"""Result files: written whole, and read as tables."""
