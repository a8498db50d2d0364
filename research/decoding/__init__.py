"""Decoding: one loop on the device, and text around it."""
