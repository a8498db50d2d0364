"""Tables of measurements, measures of predictions, and tabular peers."""
