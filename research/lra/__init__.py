"""Long Range Arena: tasks of long sequences, and the training of encoders."""
