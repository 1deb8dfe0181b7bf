"""Calibration data: text to token windows, the unquantized sweep, and statistics captured at the sites."""
