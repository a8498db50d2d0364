"""The synthetic task of densities."""
