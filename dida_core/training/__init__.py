"""What all training loops share: setup, determinism, evaluation, scores, calibration."""
